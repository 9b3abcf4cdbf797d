"""What a run came to: report.json, report.html and the table on the terminal, all from one plain dict.

The dict is the truth: what is shown is computed from it here and nowhere else, so a report can be made again from
report.json. A pruned network is easily called smaller and faster, so each figure gets a verdict by fixed limits, and
what did not get smaller or faster is listed with the reason.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcprune.errors import JobError

__all__ = ["Report", "findings", "print_table", "rows", "write_html", "write_json"]

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
# Two timings closer than this cannot be told apart on a machine that does anything else; sizes are exact.
TIME_NOISE = 0.10
SIZE_NOISE = 0.01


class LayerReport(TypedDict):
    name: str
    shape: list[int]
    dtype: str
    weights: int
    nonzeros: int
    sparsity: float
    threshold: float | None
    flops_dense: int | None  # of one sample
    flops_survivors: int | None


class Evaluation(TypedDict):
    when: Literal["dense", "pruned", "retrained"]
    round: int
    sparsity: float
    step: int
    metrics: dict[str, float | None]
    seconds: float | None


class Costs(TypedDict):
    """None: not measured."""

    nonzeros: int | None  # of all parameters
    parameters: int | None
    flops: int | None  # of one sample
    bytes_disk: int | None
    bytes_memory: int | None
    seconds_per_sample: float | None
    seconds_per_epoch: float | None


class RoundExchange(TypedDict):
    round: int
    steps: int
    bytes_dense: int
    bytes_sent: int


class Exchange(TypedDict):
    """Bytes that one rank passed to all-reduces of gradients, and would have passed without pruning."""

    steps: int
    bytes_dense: int
    bytes_sent: int
    by_round: list[RoundExchange]


class Stage(TypedDict):
    name: str
    round: int | None
    seconds: float


class RankLoad(TypedDict):
    rank: int
    host: str
    weights_scored: int
    score_seconds: float | None
    train_seconds: float | None
    wait_seconds: float | None
    peak_memory_bytes: int | None


class CurvePoint(TypedDict):
    step: int
    stage: str
    round: int | None
    loss: float | None


class Histograms(TypedDict):
    """Counts of the prunable weights in bins; `pruned` has the survivors alone."""

    edges: list[float]
    dense: list[int]
    pruned: list[int]


class Report(TypedDict):
    """report.json, format 1. Sizes in bytes, times in seconds, shares in [0, 1]."""

    format: int
    job: dict[str, Any]
    out: str
    versions: dict[str, str]
    created: str  # ISO 8601
    host: dict[str, Any]  # cpu, cores
    ranks: int
    threads: int
    resumed: list[int]  # the steps that the run went on from
    model: dict[str, Any]  # class, parameters, prunable
    primary: str
    higher_is_better: bool
    layers: list[LayerReport]
    evaluations: list[Evaluation]
    costs: dict[str, Costs]  # dense, pruned
    exchange: Exchange
    stages: list[Stage]
    rank_loads: list[RankLoad]
    imbalance: float  # max over mean of the weights scored
    curve: list[CurvePoint]
    histograms: Histograms
    mask_hash: str
    model_file: dict[str, Any]  # path, bytes, sha256


class Row(NamedTuple):
    """A line of the result table: the figure of the dense and the pruned network, as text, and what to make of it."""

    label: str
    dense: str
    pruned: str
    change: str
    verdict: str
    good: bool | None  # None: neither


class Finding(NamedTuple):
    """Something that did not get smaller or faster, or (`partly`) not as one might think: what, the figures, why."""

    what: str
    figures: str
    ratio: str
    why: str
    partly: bool


def write_json(report: Report, path: Path) -> None:
    """Write report.json; NaN and infinity, which JSON lacks, become null. Raises JobError if it cannot be written."""
    _write(path, json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")


def write_html(report: Report, path: Path) -> None:
    """Write report.html, one file that loads nothing. Raises JobError if it cannot be written."""
    from hpcprune import plots  # matplotlib takes half a second to import, and is needed here alone

    environment = Environment(
        loader=PackageLoader("hpcprune", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value, keep="\n") if type(value) is str else value,
    )
    formats = (as_bytes, as_count, as_metric, as_percent, as_seconds)
    environment.filters.update({f.__name__.removeprefix("as_"): f for f in formats})
    figures = {name: getattr(plots, name)(report) for name in plots.__all__}
    page = environment.get_template("report.html.j2").render(
        report=report,
        title=plain(Path(report["out"]).name or report["out"]),
        headline=_headline(report),
        rows=rows(report),
        findings=findings(report),
        figures=figures,
        metrics=_metric_names(report),
        job=yaml.safe_dump(_finite(report["job"]), sort_keys=False, allow_unicode=True),
        again=_again(report),
    )
    _write(path, page)


def print_table(report: Report, console: Console) -> None:
    """Print the result to a terminal, in 80 columns; plain text where the console is no terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=21)
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows(report):
        style = {True: "green", False: "yellow", None: ""}[row.good]
        table.add_row(*map(Text, row[:4]), Text(row.verdict, style=style))
    console.print(table)
    console.print()
    kept = [f"{finding.what} {finding.ratio}" for finding in findings(report) if not finding.partly]
    if kept:
        console.print(Text("Not smaller or faster: " + ", ".join(kept) + "; the report says why."))
    out = Path(report["out"])
    for path in (report["model_file"]["path"], out / "report.html", out / "report.json"):
        console.print(Text(plain(path)), soft_wrap=True)


def rows(report: Report) -> list[Row]:
    """The result table, dense against pruned. What was not measured on either side has no row."""
    dense, pruned = _first_and_last(report)
    found = [_quality(name, dense.get(name), pruned.get(name), report) for name in _metric_names(report)]
    costs = _costs(report)
    for cost in costs.values():
        verdict = cost.verdict
        word = "" if verdict is None else _WORDS[cost.kind][verdict + 1]
        good = None if verdict is None else verdict == -1
        if cost.label == "FLOPs a sample" and good and costs["time a sample"].verdict != -1:
            word, good = word + ", on paper", None
        found.append(Row(cost.label, cost.show(cost.old), cost.show(cost.new), cost.ratio, word, good))
    return [row for row in found if (row.dense, row.pruned) != (DASH, DASH)]


def findings(report: Report) -> list[Finding]:
    """What did not get smaller or faster, then what did so in part, with the figures and the reason."""
    costs = _costs(report)
    found = [Finding(c.label, c.figures, c.ratio, _WHY[c.label], False) for c in costs.values() if c.verdict in (0, 1)]
    flops, weights = costs["FLOPs a sample"], costs["prunable weights"]
    if flops.verdict == -1 and costs["time a sample"].verdict in (0, 1):
        found.append(Finding("FLOPs, on paper only", flops.figures, flops.ratio, _WHY["on paper"], True))
    for cost, why in ((costs["file"], _WHY["masks"]), (flops, _WHY["reuse"])):
        if cost.verdict == weights.verdict == -1 and cost.new * weights.old > 1.5 * cost.old * weights.new:
            ratio = f"{cost.ratio} against {weights.ratio}"
            found.append(Finding(f"{cost.label}, by less than the weights", cost.figures, ratio, why, True))
    whole = sum(layer["nonzeros"] == layer["weights"] for layer in report["layers"])
    if whole and weights.verdict == -1:
        found.append(Finding("layers left dense", f"{whole} of {len(report['layers'])}", "", _WHY["left dense"], True))
    return found


class _Cost(NamedTuple):
    """A figure that is meant to get smaller."""

    label: str
    old: Any
    new: Any
    show: Callable[[Any], str]
    kind: Literal["size", "count", "time"]

    @property
    def verdict(self) -> int | None:
        """-1: less, 0: the same within the noise, 1: more; None: cannot be said."""
        if not self.old or self.new is None or not math.isfinite(self.new / self.old):
            return None
        noise = TIME_NOISE if self.kind == "time" else SIZE_NOISE
        return -1 if self.new < (1 - noise) * self.old else 1 if self.new > (1 + noise) * self.old else 0

    @property
    def ratio(self) -> str:
        return "" if self.verdict is None else as_ratio(self.new / self.old)

    @property
    def figures(self) -> str:
        return f"{self.show(self.old)} \N{RIGHTWARDS ARROW} {self.show(self.new)}"


_WORDS = {
    "size": ("smaller", "not smaller", "larger"),
    "count": ("fewer", "not fewer", "more"),
    "time": ("faster", "not faster", "slower"),
}
_WHY = {
    "prunable weights": "Nothing was pruned.",
    "all parameters": "Next to nothing was pruned.",
    "file": "At this sparsity the masks (1 bit a weight) take what the pruned weights would have taken.",
    "memory of the model": "In memory each layer stays a dense array, zeros included; only the file leaves them out.",
    "FLOPs a sample": "The weights that are multiplied with are still there.",
    "time a sample": "The dense kernels run at the same speed: a zero is multiplied like any other number.",
    "time an epoch": "Forward and backward passes are dense; only exchange and optimizer work on survivors alone.",
    "gradients sent a rank": "The survivors' gradients are as many as the dense ones.",
    "on paper": "The survivors need no more than this, but the kernels that ran did not skip the zeros.",
    "masks": "Beside the survivors the file holds the masks (1 bit a weight) and all that is not prunable.",
    "reuse": "More survivors lie where weights are used often (convolutions); the rest of the model counts whole.",
    "left dense": "None of their weights scored below the threshold.",
}


def _costs(report: Report) -> dict[str, _Cost]:
    before, after, sent = report["costs"]["dense"], report["costs"]["pruned"], report["exchange"]
    sends = sent["bytes_dense"] or None
    costs = (
        _Cost("prunable weights", *_weights(report), as_count, "count"),
        _Cost("all parameters", before["nonzeros"], after["nonzeros"], as_count, "count"),
        _Cost("file", before["bytes_disk"], after["bytes_disk"], as_bytes, "size"),
        _Cost("memory of the model", before["bytes_memory"], after["bytes_memory"], as_bytes, "size"),
        _Cost("FLOPs a sample", before["flops"], after["flops"], as_short, "count"),
        _Cost("time a sample", before["seconds_per_sample"], after["seconds_per_sample"], as_seconds, "time"),
        _Cost("time an epoch", before["seconds_per_epoch"], after["seconds_per_epoch"], as_seconds, "time"),
        _Cost("gradients sent a rank", sends, sent["bytes_sent"] if sends else None, as_bytes, "size"),
    )
    return {cost.label: cost for cost in costs}


def _quality(name: str, old: float | None, new: float | None, report: Report) -> Row:
    change = as_change(name, old, new)
    up = report["higher_is_better"] if name == report["primary"] else is_share(name)
    known = name in ("loss", report["primary"]) or is_share(name)
    verdict, good = "", None
    if change and known:
        same = not any(digit in change for digit in "123456789")
        good = None if same else change.startswith("+") == up
        verdict = "same" if same else "better" if good else "worse"
    return Row(plain(name), as_metric(old, name), as_metric(new, name), change, verdict, good)


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """The four figures on top: label, figure, and what it means."""
    weights, survivors = _weights(report)
    sparsity = as_percent(1 - survivors / weights if weights else 0.0)
    dense, pruned = _first_and_last(report)
    name = report["primary"]
    old, new = dense.get(name), pruned.get(name)
    change = as_change(name, old, new)
    meaning = f"{change} from the dense {as_metric(old, name)}" if change else f"dense: {as_metric(old, name)}"
    found = [
        ("sparsity", sparsity, f"{as_count(survivors)} of {as_count(weights)} prunable weights are left"),
        (plain(name), as_metric(new, name), meaning),
    ]
    costs = _costs(report)
    for cost in (costs["file"], costs["FLOPs a sample"]):
        verdict = cost.verdict
        on_paper = cost.kind == "count" and verdict == -1 and costs["time a sample"].verdict in (0, 1)
        note = "; on paper, not faster" if on_paper else ""
        if verdict is None:
            figure = "not measured"
        elif verdict == -1 and cost.new:
            figure = f"{cost.old / cost.new:.1f}{TIMES} {_WORDS[cost.kind][0]}"
        else:
            figure = _WORDS[cost.kind][verdict + 1]
        found.append((cost.label, figure, f"{cost.show(cost.new)}, from {cost.show(cost.old)}{note}"))
    return found


def _first_and_last(report: Report) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Metrics of the dense network, and of the last state of the pruned one."""
    dense = next((e["metrics"] for e in report["evaluations"] if e["when"] == "dense"), {})
    return dense, next((e["metrics"] for e in reversed(report["evaluations"]) if e["when"] != "dense"), {})


def _metric_names(report: Report) -> list[str]:
    """All metrics, the primary one first."""
    names = dict.fromkeys([report["primary"], *(name for e in report["evaluations"] for name in e["metrics"])])
    return list(names)


def _weights(report: Report) -> tuple[int, int]:
    """Prunable weights, and survivors."""
    return sum(layer["weights"] for layer in report["layers"]), sum(layer["nonzeros"] for layer in report["layers"])


def _again(report: Report) -> list[str]:
    """The commands that repeat the run and compare."""
    out = Path(report["out"])
    job, new = shlex.quote(f"{out}/job.yaml"), shlex.quote(f"{out}-again")
    models = " ".join(shlex.quote(f"{folder}/model.h5") for folder in (out, f"{out}-again"))
    return [
        f"OMP_NUM_THREADS={report['threads']} mpirun -n {report['ranks']} hpcprune run {job} --out {new}",
        f"hpcprune diff {models}",
    ]


def plain(text: object, keep: str = "") -> str:
    """Text without control characters (terminal escapes, NUL, line ends), for a page or a terminal."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def is_share(name: str) -> bool:
    """Whether a metric is a part of one, shown in per cent; a higher one is better."""
    return name.lower() in ("accuracy", "f1", "precision", "recall")


def as_metric(value: float | None, name: str) -> str:
    if value is None or not math.isfinite(value):
        return DASH if value is None else str(value)
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:#.4g}".rstrip(".")


def as_change(name: str, old: float | None, new: float | None) -> str:
    """The difference, as a signed text; "" where there is none to give."""
    if old is None or new is None or not math.isfinite(new - old):
        return ""
    text = f"{100 * (new - old):+.2f} points" if is_share(name) else f"{new - old:+.3g}"
    return text.replace("-", MINUS, 1)


def as_percent(share: float) -> str:
    """Two decimals, or as many as it takes for what is not quite 100 % not to look so."""
    digits = 2
    while 0 < share < 1 and digits < 12 and f"{100 * share:.{digits}f}" in (f"{100:.{digits}f}", f"{0:.{digits}f}"):
        digits += 1
    return f"{100 * share:.{digits}f} %"


def as_count(value: float | None) -> str:
    """All digits, up to the nine that a column has room for."""
    return as_short(value) if value is None or value >= 1e9 else f"{value:,.0f}"


def as_short(value: float | None, base: str = "") -> str:
    """Three digits and a decimal prefix: 5.62 M."""
    if value is None:
        return DASH
    power = 0
    while abs(value) >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    digits = 0 if not power or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P'][power]}{base}".rstrip()


def as_bytes(value: float | None) -> str:
    return as_short(value, "B")


def as_seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if value >= 3600:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02} min"
    if value >= 120:
        return f"{round(value) // 60} min {round(value) % 60:02} s"
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "\N{MICRO SIGN}s")
    return f"{value * scale:#.3g}".rstrip(".") + f" {unit}"


def as_ratio(value: float) -> str:
    return f"{TIMES}{value:.2f}" if value >= 0.0995 else f"{TIMES}{value:#.2g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _write(path: Path, text: str) -> None:
    """All or nothing: a new file beside the old one takes its place when it is whole and on disk."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written ({error.strerror}); make room or write elsewhere with --out"
        ) from error
    finally:
        new.unlink(missing_ok=True)
