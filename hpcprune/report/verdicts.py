"""What to make of a report's figures.

A pruned network is easily called smaller and faster, so each figure gets a verdict by fixed limits, and what did not
get smaller or faster is listed with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from hpcprune.errors import GoalError
from hpcprune.report.format import LayerReport, Report
from hpcprune.report.units import (
    DASH,
    TIMES,
    as_bytes,
    as_change,
    as_count,
    as_metric,
    as_percent,
    as_ratio,
    as_seconds,
    as_short,
    is_share,
    plain,
)

__all__ = [
    "Finding",
    "Row",
    "check_goal",
    "findings",
    "first_and_last",
    "headline",
    "layers_of_weights",
    "metric_names",
    "ratios",
    "rows",
]

# Two timings closer than this cannot be told apart on a machine that does anything else; sizes are exact.
TIME_NOISE = 0.10
SIZE_NOISE = 0.01


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


def rows(report: Report) -> list[Row]:
    """The result table, dense against pruned. What was not measured on either side has no row."""
    dense, pruned = first_and_last(report)
    found = [_quality(name, dense.get(name), pruned.get(name), report) for name in metric_names(report)]
    goal = report.get("goal")
    if goal is not None:
        value = as_metric(goal["value"], goal.get("metric", report["primary"]))
        found.insert(0, Row(f"goal: {goal['text']}", DASH, value, "", "met" if goal["met"] else "missed", goal["met"]))
    costs = _costs(report)
    for cost in costs.values():
        verdict = cost.verdict
        word = "" if verdict is None else _WORDS[cost.kind][verdict + 1]
        good = None if verdict is None else verdict == -1
        if cost.label == "FLOPs a sample" and good and costs["time a sample"].verdict != -1:
            word, good = word + ", on paper", None
        found.append(Row(cost.label, cost.show(cost.old), cost.show(cost.new), cost.ratio, word, good))
    return [row for row in found if (row.dense, row.pruned) != (DASH, DASH)]


def ratios(report: Report) -> dict[str, str]:
    """What became smaller or faster by how much, by the labels of the result table; "" where it was not measured."""
    return {label: cost.ratio for label, cost in _costs(report).items()}


def findings(report: Report) -> list[Finding]:
    """What did not get smaller or faster, then what did so in part, with the figures and the reason."""
    costs = _costs(report)
    whys = _WHY | _of_sparse(report)
    found = [Finding(c.label, c.figures, c.ratio, whys[c.label], False) for c in costs.values() if c.verdict in (0, 1)]
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
    "edges": "None of the graph's edges was pruned.",
    "nodes with edges": "No node was pruned; those that are left without an edge lost the last one to its score.",
    "parameters but zeros": "Next to nothing was pruned.",
    "file": "At this sparsity the masks (1 bit a weight) take what the pruned weights would have taken.",
    "memory of the model": "A layer that runs dense keeps its zeros in memory; only the file leaves them out.",
    "FLOPs a sample": "The weights that are multiplied with are still there.",
    "time a sample": "A layer that runs dense multiplies zeros too; the table of layers says what was tried.",
    "time an epoch": "Passes are dense without retrain.sparse; exchange and optimizer work on survivors alone.",
    "gradients sent a rank": "The survivors' gradients are as many as the dense ones.",
    "on paper": "The survivors need no more than this, but the kernels that ran did not skip the weights' zeros.",
    "masks": "Beside the survivors the file holds the masks (1 bit a weight) and all that is not prunable.",
    "reuse": "More survivors lie where weights are used more often in a sample; the rest of the model counts whole.",
    "left dense": "None of their weights scored below the threshold.",
}


def _of_sparse(report: Report) -> dict[str, str]:
    """Why there is no faster network where no layer was tried sparse."""
    if reason := (report["inference"]["sparse"] or {}).get("reason"):
        return {"time a sample": f"No layer was tried sparse: {reason}."}
    if all(layer["seconds_sparse"] is None for layer in report["layers"]):
        never = "No layer was tried sparse: evaluate.sparse is never, or none is torch's own Linear or Conv2d."
        return {"time a sample": never}
    return {}


def _costs(report: Report) -> dict[str, _Cost]:
    before, after, sent = report["costs"]["dense"], report["costs"]["pruned"], report["exchange"]
    sends = sent["bytes_dense"] or None
    costs = (
        _Cost("prunable weights", *_weights(report), as_count, "count"),
        _Cost("edges", *_graph(report, "edges"), as_count, "count"),
        _Cost("nodes with edges", *_graph(report, "nodes"), as_count, "count"),
        _Cost("parameters but zeros", before["nonzeros"], after["nonzeros"], as_count, "count"),
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


def headline(report: Report) -> list[tuple[str, str, str]]:
    """The four figures on top: label, figure, and what it means."""
    weights, survivors = _weights(report)
    sparsity = as_percent(1 - survivors / weights if weights else 0.0)
    dense, pruned = first_and_last(report)
    name = report["primary"]
    old, new = dense.get(name), pruned.get(name)
    change = as_change(name, old, new)
    meaning = f"{change} from the dense {as_metric(old, name)}" if change else f"dense: {as_metric(old, name)}"
    left = f"{as_count(survivors)} of {as_count(weights)} prunable weights are left"
    for thing in ("edges", "nodes"):
        had, has = _graph(report, thing)
        left += "" if has is None else f"; {as_count(has)} of {as_count(had)} {thing}"
    found = [
        ("sparsity", sparsity, left),
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


def first_and_last(report: Report) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Metrics of the dense network, and of the last state of the pruned one."""
    dense = next((e["metrics"] for e in report["evaluations"] if e["when"] == "dense"), {})
    return dense, next((e["metrics"] for e in reversed(report["evaluations"]) if e["when"] != "dense"), {})


def metric_names(report: Report) -> list[str]:
    """All metrics, the primary one first."""
    names = dict.fromkeys([report["primary"], *(name for e in report["evaluations"] for name in e["metrics"])])
    return list(names)


def _weights(report: Report) -> tuple[int, int]:
    """Prunable weights, and survivors."""
    layers = layers_of_weights(report)
    return sum(layer["weights"] for layer in layers), sum(layer["nonzeros"] for layer in layers)


def layers_of_weights(report: Report) -> list[LayerReport]:
    """The layers without those that stand for the edges of a graph."""
    return [layer for layer in report["layers"] if layer.get("kind", "weights") == "weights"]


def _graph(report: Report, thing: str) -> tuple[int | None, int | None]:
    """How many edges or nodes there are in the graph, and survive; None where they were not to be pruned."""
    graph = report.get("graph")
    return graph[thing] if graph is not None and thing in report["job"]["prune"]["what"] else (None, None)


def check_goal(report: Report) -> None:
    """Raise GoalError where a run had a goal and no network of it meets that."""
    goal = report.get("goal")
    if goal is not None and not goal["met"]:
        raise GoalError(
            f"prune.until: {goal['text']} was never met; the nearest is {goal['value']:.6g} at "
            f"{report['evaluations'][-1]['sparsity']:.2%}, and the result is that network. Retrain for longer, "
            "prune in more rounds, so that the first goes less far, or ask for less"
        )
