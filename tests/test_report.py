"""The report: what it says follows from the figures, and every shape of run can be shown."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hpcprune.errors import JobError
from hpcprune.report.curve import thinned
from hpcprune.report.format import Report
from hpcprune.report.page import write_html
from hpcprune.report.table import print_table
from hpcprune.report.units import as_bytes, as_percent, as_seconds
from hpcprune.report.verdicts import findings, rows
from hpcprune.report.write import write_json

HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


def sample(rounds: int = 5, sparsity: float = 0.95, ranks: int = 2, layers: int = 4, points: int = 60) -> Report:
    """A run as the demo's, or of another size; made of figures that fit together."""
    random = np.random.default_rng(1)
    shapes = [[16, 1, 3, 3], [32, 16, 3, 3], [64, 1568], [10, 64]]
    reuse = [784, 196, 1, 1]
    names = ["features.0.weight", "features.3.weight", "classifier.1.weight", "classifier.3.weight"]
    if layers != 4:
        shapes, reuse = [[64, 64]] * layers, [1] * layers
        names = [f"encoder.blocks.{i // 4}.attention.self.{'qkvo'[i % 4]}_proj.weight" for i in range(layers)]
    found: list[Any] = []
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        count = math.prod(shape)
        share = sparsity * (0.35 + 0.65 * min(1, 2 * (i + 1) / layers)) if sparsity < 0.98 else sparsity
        left = count - round(count * share)
        found.append(
            {"name": name, "shape": shape, "dtype": "float32", "weights": count, "nonzeros": left}
            | {"sparsity": 1 - left / count, "threshold": 0.0731}
            | {"flops_dense": 2 * count * reuse[i], "flops_survivors": 2 * left * reuse[i]}
            | {
                "seconds_dense": 2e-9 * count,
                "seconds_sparse": 1e-9 * count * (i or 3),
                "kernel": "panels" if i == 1 else "dense",
            }
        )
    weights, survivors = (sum(layer[key] for layer in found) for key in ("weights", "nonzeros"))
    evaluations: list[Any] = []

    def evaluate(when: str, number: int, at: float, accuracy: float) -> None:
        metrics = {"loss": 2.3 - 2.2 * accuracy, "accuracy": accuracy, "f1": accuracy - 0.002}
        metrics |= {"precision": accuracy - 0.001, "recall": accuracy - 0.003}
        evaluations.append(
            {
                "when": when,
                "round": number,
                "sparsity": at,
                "step": 200 + 60 * number,
                "metrics": metrics,
                "seconds": 0.41,
            }
        )

    evaluate("dense", 0, 0.0, 0.972)
    for number in range(1, rounds + 1):
        at = sparsity * (1 - (1 - number / rounds) ** 3)
        evaluate("pruned", number, at, 0.97 - 0.6 * at**6)
        evaluate("retrained", number, at, 0.975 - 0.009 * at**8)
    curve: list[Any] = []
    for i in range(points):
        part = i * (rounds + 1) // points
        since = i - -(-part * points // (rounds + 1))
        loss = 0.05 + (2.2 if part == 0 else 0.1 + 0.12 * part) * math.exp(-8 * since * (rounds + 1) / points)
        loss *= float(random.lognormal(0, 0.25))
        curve.append({"step": i, "stage": "retrain" if part else "train", "round": part or None, "loss": loss})
    values = random.normal(0, 0.06, weights if weights < 300_000 else 300_000)
    edges = np.linspace(-0.3, 0.3, 61)
    kept = values[np.abs(values) > np.quantile(np.abs(values), sparsity)] if sparsity else values
    by_round = [
        {
            "round": r,
            "steps": 60,
            "bytes_dense": 60 * 4 * weights,
            "bytes_sent": round(60 * 4 * weights * (1 - sparsity * r / rounds)),
            "seconds": 12.0,
            "waited": 1.5,
            "overlap": 45.0,
            "samples": 60 * 64,
        }
        for r in range(1, rounds + 1)
    ]
    stages = [{"name": "train", "round": None, "seconds": 14.2}]
    for r in range(1, rounds + 1):
        for name, seconds in (
            ("score", 0.02),
            ("threshold", 0.011),
            ("masks", 0.03),
            ("retrain", 5.1),
            ("evaluate", 0.8),
            ("checkpoint", 0.12),
        ):
            stages.append({"name": name, "round": r, "seconds": seconds})
    dense = {"nonzeros": weights + 180, "parameters": weights + 180, "flops": sum(f["flops_dense"] for f in found)}
    pruned = {
        "nonzeros": survivors + 180,
        "parameters": weights + 180,
        "flops": sum(f["flops_survivors"] for f in found),
    }
    return {
        "format": 1,
        "job": {
            "task": "task.py",
            "seed": 1,
            "prune": {
                "sparsity": sparsity,
                "criterion": "magnitude",
                "scope": "global",
                "rounds": rounds,
                "schedule": "cubic",
            },
            "retrain": {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9},
            "batch_size": 128,
        },
        "out": "runs/mnist",
        "versions": {"hpcprune": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7", "mpi": "Open MPI 5.0.11"},
        "created": "2026-11-24T05:12:44+00:00",
        "host": {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 2},
        "ranks": ranks,
        "threads": 1,
        "resumed": [],
        "model": {"class": "Net", "parameters": weights + 180, "prunable": weights},
        "primary": "accuracy",
        "higher_is_better": True,
        "layers": found,
        "evaluations": evaluations,
        "costs": {
            "dense": {
                **dense,
                "bytes_disk": 4 * weights + 5000,
                "bytes_memory": 4 * weights + 720,
                "seconds_per_sample": 2.13e-4,
                "seconds_per_epoch": 2.31,
            },  # type: ignore[typeddict-item]
            "pruned": {
                **pruned,
                "bytes_disk": 4 * survivors + weights // 8 + 5000,
                "bytes_memory": 4 * weights + 720,
                "seconds_per_sample": 2.09e-4,
                "seconds_per_epoch": 2.44,
            },  # type: ignore[typeddict-item]
        },
        "exchange": {
            "steps": 60 * rounds,
            "bytes_dense": sum(e["bytes_dense"] for e in by_round),
            "bytes_sent": sum(e["bytes_sent"] for e in by_round),
            "by_round": by_round,  # type: ignore[typeddict-item]
        },
        "stages": stages,  # type: ignore[typeddict-item]
        "rank_loads": [
            {
                "rank": r,
                "host": f"node{r // 64:03d}",
                "weights_scored": weights // ranks
                + int(random.integers(-weights // ranks // 40, weights // ranks // 40 + 1)),
                "score_seconds": 0.1,
                "train_seconds": 38.0 + float(random.normal(0, 0.8)),
                "wait_seconds": 2.5 + float(random.random()),
                "peak_memory_bytes": 412_000_000 + 1_000_000 * r,
            }
            for r in range(ranks)
        ],
        "imbalance": 1.013,
        "curve": curve,
        "histograms": {
            "edges": edges.tolist(),
            "dense": np.histogram(values, edges)[0].tolist(),
            "pruned": np.histogram(kept, edges)[0].tolist(),
        },
        "inference": {"samples": 64, "threads": 1, "sparse": {"undone": False}},
        "mask_hash": "5f2b" * 16,
        "model_file": {"path": "runs/mnist/model.h5", "bytes": 46_211, "sha256": "9c1d" * 16},
    }


def page(report: Report, folder: Path) -> ET.Element:
    """The page, which is well-formed XML as well as HTML: a tag left open or text left unescaped ends here."""
    path = folder / "report.html"
    write_html(report, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


def text_of(element: ET.Element) -> str:
    return "".join(element.itertext())


def table(root: ET.Element, name: str) -> list[list[str]]:
    (found,) = (t for t in root.iter(f"{HTML}table") if t.get("id") == name)
    return [[text_of(cell).strip() for cell in row] for row in found.iter(f"{HTML}tr")]


def figures(root: ET.Element) -> dict[str, ET.Element]:
    """Figures by what a screen reader says of them."""
    return {svg.get("aria-label", ""): svg for svg in root.iter(f"{SVG}svg")}


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    root = page(sample(), tmp_path)
    for element in root.iter():
        assert element.tag not in {f"{HTML}{tag}" for tag in ("script", "link", "img", "iframe", "object", "base")}
        for name, value in element.attrib.items():
            if name.endswith(("href", "src")):
                assert value.startswith("#"), (element.tag, name, value)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", text))
    assert set(re.findall(r"https?://[^\"' <]*", text)) == {
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/2000/svg",
    }


def test_ids_are_unique_and_their_uses_are_met(tmp_path: Path) -> None:
    root = page(sample(), tmp_path)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {*re.findall(r"url\(#([^)]*)\)", text), *re.findall(r'href="#([^"]*)"', text)} <= set(ids)


def test_figures_take_every_colour_from_the_page(tmp_path: Path) -> None:
    """A colour of their own would be lost on a light or on a dark page; so would SVG's default, black."""
    root = page(sample(points=900), tmp_path)
    styles = (tmp_path / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert len(figures(root)) == 7
    for label, svg in figures(root).items():
        assert svg.get("role") == "img"
        text = ET.tostring(svg, encoding="unicode")
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\"])|\brgb|\bblack\b|\bwhite\b", text), label
        used = set(re.findall(r"var\(--(\w+)\)", text))
        assert used
        # Three themes: light, dark, print.
        assert all(len(re.findall(rf"--{name}: #", styles)) == 3 for name in used)
        for element in svg.iter(f"{SVG}text"):
            assert "fill: var(" in (element.get("style") or ""), text_of(element)
        for path in svg.iter(f"{SVG}path"):
            style = path.get("style") or ""
            assert "fill" in style or "stroke" in style or _inside(svg, path, ("defs", "clipPath")), label


def _inside(root: ET.Element, element: ET.Element, tags: tuple[str, ...]) -> bool:
    return any(element in list(parent.iter()) for tag in tags for parent in root.iter(f"{SVG}{tag}"))


def test_the_numbers_shown_are_those_of_the_dict(tmp_path: Path) -> None:
    report = sample()
    root = page(report, tmp_path)
    result = {row[0]: row[1:] for row in table(root, "result")}
    assert result["accuracy"] == [
        "97.20 %",
        f"{100 * report['evaluations'][-1]['metrics']['accuracy']:.2f} %",
        "\u22120.30 points",
        "worse",
    ]  # type: ignore[operator]
    survivors = sum(layer["nonzeros"] for layer in report["layers"])
    assert result["prunable weights"][:2] == ["105,744", f"{survivors:,}"]
    assert result["time a sample"][:2] == ["213 \N{MICRO SIGN}s", "209 \N{MICRO SIGN}s"]
    for row, layer in zip(table(root, "layers")[1:], report["layers"], strict=True):
        assert row[0] == layer["name"]
        assert [int(row[i].replace(",", "")) for i in (3, 4, 7, 8)] == [
            layer[key]
            for key in ("weights", "nonzeros", "flops_dense", "flops_survivors")  # type: ignore[literal-required]
        ]
    for row, e in zip(table(root, "evaluations")[1:], report["evaluations"], strict=True):
        assert row[:3] == [e["when"], str(e["round"]), str(e["step"])]
        assert row[4] == f"{100 * e['metrics']['accuracy']:.2f} %"  # type: ignore[operator]
    whole = text_of(root)
    for value in (report["mask_hash"], report["model_file"]["sha256"], report["host"]["cpu"], "2.13.0+cpu", "cubic"):
        assert value in whole
    bars = text_of(figures(root)["sparsity of each layer"])
    assert all(f"{100 * layer['sparsity']:.2f} % of {layer['weights']:,}" in bars for layer in report["layers"])


HOSTILE = "<script>alert(1)</script>&\"'$x_1$\x00\x1b[31m]]>\ud800[red]{{ 7 * 7 }}\n"


def test_hostile_text_is_text(tmp_path: Path) -> None:
    report: Any = sample()
    report["out"] = f"runs/{HOSTILE}"
    report["model"]["class"] = report["host"]["cpu"] = report["mask_hash"] = report["created"] = HOSTILE
    report["versions"][HOSTILE] = report["job"][HOSTILE] = HOSTILE
    report["primary"] = HOSTILE
    for e in report["evaluations"]:
        e["metrics"][HOSTILE] = 1.5
    for part in (report["layers"], report["stages"]):
        part[0]["name"] = HOSTILE
    report["layers"][0]["dtype"] = report["rank_loads"][0]["host"] = report["curve"][0]["stage"] = HOSTILE
    report["model_file"]["path"] = HOSTILE
    root = page(report, tmp_path)
    assert not list(root.iter(f"{HTML}script"))
    assert not list(root.iter(f"{SVG}script"))
    whole = text_of(root)
    assert "alert(1)" in whole
    assert "{{ 7 * 7 }}" in whole
    assert "$x_1$" in text_of(figures(root)["wall time of each stage"])
    assert not set("\x00\x1b\ud800") & set((tmp_path / "report.html").read_text(encoding="utf-8"))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    print_table(report, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31m" not in shown
    assert "[red]" in shown
    write_json(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["mask_hash"] == HOSTILE


def without_metrics(report: Any) -> None:
    for e in report["evaluations"]:
        e["metrics"] = dict.fromkeys(e["metrics"])
        e["seconds"] = None


def without_costs(report: Any) -> None:
    for side in report["costs"].values():
        side.update(dict.fromkeys(side))
    for layer in report["layers"]:
        layer["threshold"] = layer["flops_dense"] = layer["flops_survivors"] = None
        layer["seconds_dense"] = layer["seconds_sparse"] = None
    for load in report["rank_loads"]:
        load.update(score_seconds=None, train_seconds=None, wait_seconds=None, peak_memory_bytes=None)


def stopped_at_once(report: Any) -> None:
    for key in ("evaluations", "stages", "rank_loads", "curve", "layers"):
        report[key] = []
    report["histograms"] = {"edges": [], "dense": [], "pruned": []}
    report["exchange"] = {"steps": 0, "bytes_dense": 0, "bytes_sent": 0, "by_round": []}


def diverged(report: Any) -> None:
    for point in report["curve"][5:]:
        point["loss"] = math.nan
    report["evaluations"][-1]["metrics"]["loss"] = math.inf
    report["evaluations"][-1]["metrics"]["accuracy"] = math.nan


def a_language_model(report: Any) -> None:
    report.update(primary="perplexity", higher_is_better=False)
    for i, e in enumerate(report["evaluations"]):
        e["metrics"] = {"loss": 3.3 + 0.1 * i, "perplexity": math.exp(3.3 + 0.1 * i)}


def empty_histograms(report: Any) -> None:
    report["histograms"]["pruned"] = [0] * len(report["histograms"]["pruned"])


@pytest.mark.parametrize(
    "change",
    [without_metrics, without_costs, stopped_at_once, diverged, a_language_model, empty_histograms],
    ids=lambda change: change.__name__,
)
def test_what_is_missing_or_unusual_can_be_shown(change: Any, tmp_path: Path) -> None:
    report = sample()
    change(report)
    page(report, tmp_path)
    print_table(report, Console(file=io.StringIO(), width=80))
    write_json(report, tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_one_round_one_rank_nothing_pruned(tmp_path: Path) -> None:
    report = sample(rounds=1, ranks=1, sparsity=0.0)
    report["exchange"] = {"steps": 60, "bytes_dense": 0, "bytes_sent": 0, "by_round": []}
    root = page(report, tmp_path)
    assert "gradients sent a rank" not in {row[0] for row in table(root, "result")}
    assert "1 rank with 1 thread each" in text_of(root)
    assert "Nothing was pruned." in text_of(root)


def test_the_exchange_is_shown_by_round_a_step(tmp_path: Path) -> None:
    report = sample(rounds=2)
    first = report["exchange"]["by_round"][0]
    sizes = [as_bytes(first["bytes_dense"] / 60), as_bytes(first["bytes_sent"] / 60)]
    _, shown, *_ = table(page(report, tmp_path), "exchange")
    assert shown == ["1", "60", *sizes, "12.50 %", "75.00 %", "320"]


def test_a_large_run_stays_readable_and_small(tmp_path: Path) -> None:
    report = sample(layers=200, ranks=512, points=100_000, rounds=12)
    root = page(report, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    drawn = figures(root)
    bars = list(drawn["sparsity of each layer"].iter(f"{SVG}title"))
    assert [bar.text.split(":")[0] for bar in bars] == [layer["name"] for layer in report["layers"]]  # type: ignore[union-attr]
    _, _, width, height = map(float, drawn["sparsity of each layer"].get("viewBox", "").split())
    assert width / len(bars) > 3
    assert height < 400
    assert len(table(root, "layers")) == 201
    shown = [text_of(text) for text in drawn["load of each rank"].iter(f"{SVG}text")]
    assert len(shown) < 40


def test_a_thinned_curve_keeps_its_spikes() -> None:
    x, y = np.arange(100_003.0), np.zeros(100_003)
    y[[77, 50_000]] = 9, -4
    at, low, mean, high = thinned(x, y, 400)
    assert len(at) == len(low) == len(mean) == len(high) == 400
    assert (high.max(), low.min()) == (9, -4)
    assert (np.diff(at) > 0).all()
    assert mean.mean() == pytest.approx(y.mean(), rel=0.01)
    assert thinned(x[:3], y[:3], 400)[0] is not x
    np.testing.assert_array_equal(thinned(x[:3], y[:3], 400)[0], x[:3])


def verdicts(report: Report) -> dict[str, str]:
    return {row.label: row.verdict for row in rows(report)}


@pytest.mark.parametrize(
    ("key", "label", "ratio", "verdict", "listed"),
    [
        ("seconds_per_sample", "time a sample", 0.89, "faster", False),
        ("seconds_per_sample", "time a sample", 0.91, "not faster", True),
        ("seconds_per_sample", "time a sample", 1.09, "not faster", True),
        ("seconds_per_sample", "time a sample", 1.11, "slower", True),
        ("bytes_disk", "file", 0.985, "smaller", False),
        ("bytes_disk", "file", 0.995, "not smaller", True),
        ("bytes_disk", "file", 1.02, "larger", True),
        ("bytes_memory", "memory of the model", 0.5, "smaller", False),
        ("bytes_memory", "memory of the model", 1.0, "not smaller", True),
        ("seconds_per_epoch", "time an epoch", 0.5, "faster", False),
        ("flops", "FLOPs a sample", 1.0, "not fewer", True),
        ("nonzeros", "parameters but zeros", 0.4, "fewer", False),
    ],
)
def test_verdicts(key: str, label: str, ratio: float, verdict: str, listed: bool) -> None:
    report: Any = sample()
    report["costs"]["dense"][key] = 1000.0
    report["costs"]["pruned"][key] = 1000.0 * ratio
    assert verdicts(report)[label] == verdict
    assert (label in {finding.what for finding in findings(report)}) == listed


def test_fewer_flops_that_save_no_time_are_on_paper() -> None:
    report = sample()
    assert verdicts(report)["FLOPs a sample"] == "fewer, on paper"
    assert "FLOPs, on paper only" in {finding.what for finding in findings(report)}
    report["costs"]["pruned"]["seconds_per_sample"] = 1e-4
    assert verdicts(report)["FLOPs a sample"] == "fewer"
    assert "FLOPs, on paper only" not in {finding.what for finding in findings(report)}


def test_how_each_layer_runs_is_said_with_both_times(tmp_path: Path) -> None:
    report = sample()
    lines = page(report, tmp_path).findall(f".//{HTML}table[@id='layers']/{HTML}tbody/{HTML}tr")
    found = [[text_of(cell) for cell in line][-3:] for line in lines]
    assert [runs for _, _, runs in found] == ["dense", "panels", "dense", "dense"]
    assert found[1][:2] == [as_seconds(2e-9 * 4608), as_seconds(1e-9 * 4608)]
    assert "64 samples on 1 thread, each layer by itself" in text_of(page(report, tmp_path))
    report["inference"]["sparse"]["undone"] = True
    assert "but the network as a whole was not, so all run dense" in text_of(page(report, tmp_path))


def test_why_no_layer_was_tried_sparse_is_said(tmp_path: Path) -> None:
    report = sample()
    report["costs"]["pruned"]["seconds_per_sample"] = report["costs"]["dense"]["seconds_per_sample"]
    assert "No layer was tried" not in text_of(page(report, tmp_path))
    report["inference"]["sparse"]["reason"] = "no compiler; see <doctor>"
    whys = {finding.what: finding.why for finding in findings(report)}
    assert whys["time a sample"] == "No layer was tried sparse: no compiler; see <doctor>."
    text = text_of(page(report, tmp_path))
    assert text.count("No layer was tried sparse: no compiler; see <doctor>.") == 2, "in the findings and below layers"
    report["inference"]["sparse"] = None  # the job did not want it
    assert "the table of layers says" in {finding.what: finding.why for finding in findings(report)}["time a sample"]


def test_what_fell_by_less_than_the_weights_is_said() -> None:
    report = sample()
    name = "FLOPs a sample, by less than the weights"
    assert name in {finding.what for finding in findings(report)}
    report["costs"]["pruned"]["flops"] = round(report["costs"]["dense"]["flops"] * 0.05)  # type: ignore[operator]
    assert name not in {finding.what for finding in findings(report)}


def test_a_run_without_reproach_says_so(tmp_path: Path) -> None:
    report = sample()
    for key, value in report["costs"]["dense"].items():
        report["costs"]["pruned"][key] = value * 0.05  # type: ignore[literal-required, operator]
    assert findings(report) == []
    assert "All that was measured got smaller or faster." in text_of(page(report, tmp_path))


@pytest.mark.parametrize(
    ("dense", "pruned", "change", "verdict"),
    [
        (0.9, 0.91, "+1.00 points", "better"),
        (0.91, 0.9, "\u22121.00 points", "worse"),
        (0.9, 0.900001, "+0.00 points", "same"),
        (0.9, None, "", ""),
    ],
)
def test_quality_of_a_share(dense: float, pruned: float | None, change: str, verdict: str) -> None:
    report = sample()
    report["evaluations"][0]["metrics"]["accuracy"] = dense
    report["evaluations"][-1]["metrics"]["accuracy"] = pruned
    assert rows(report)[0][3:5] == (change, verdict)


def test_lower_is_better_where_the_task_says_so() -> None:
    report = sample()
    a_language_model(report)
    found = verdicts(report)
    assert (found["perplexity"], found["loss"]) == ("worse", "worse")
    report["evaluations"][-1]["metrics"] = {"loss": 3.0, "perplexity": 20.0, "entropy": 1.0}
    report["evaluations"][0]["metrics"]["entropy"] = 2.0
    found = verdicts(report)
    assert (found["perplexity"], found["loss"]) == ("better", "better")
    assert found["entropy"] == ""  # nobody said which way is good


def test_nearly_all_is_not_all() -> None:
    assert as_percent(0.95) == "95.00 %"
    assert as_percent(0.999999) == "99.9999 %"
    assert as_percent(1.0) == "100.00 %"
    assert as_percent(0.000001) == "0.0001 %"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"), (46_211, "46.2 kB")],
)
def test_bytes(value: int, text: str) -> None:
    assert as_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.13e-4, "213 \N{MICRO SIGN}s"),
        (0.0421, "42.1 ms"),
        (4, "4.00 s"),
        (125, "2 min 05 s"),
        (3725, "1 h 02 min"),
        (7199.9, "2 h 00 min"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert as_seconds(value) == text


def printed(report: Report, **settings: Any) -> str:
    out = io.StringIO()
    print_table(report, Console(file=out, width=80, **settings))
    return out.getvalue()


def test_a_goal_is_printed_whole() -> None:
    report: Any = sample()
    text = "a metric with a long name >= dense - 0.0125"
    report["goal"] = {"text": text, "metric": "accuracy", "bound": 0.9, "value": 0.91, "met": True}
    assert f"goal: {text} (91.00 %): met" in printed(report)


def test_where_no_layer_was_tried_sparse_the_page_says_so() -> None:
    report: Any = sample()
    report["costs"]["pruned"]["seconds_per_sample"] = report["costs"]["dense"]["seconds_per_sample"]
    for layer in report["layers"]:
        layer["seconds_sparse"] = None
    whys = {finding.what: finding.why for finding in findings(report)}
    assert whys["time a sample"].startswith("No layer was tried sparse: evaluate.sparse is never")
    report["layers"][0]["seconds_sparse"] = 1e-3
    whys = {finding.what: finding.why for finding in findings(report)}
    assert "multiplies zeros too" in whys["time a sample"]


def test_the_table_fits_80_columns_and_is_plain_off_a_terminal() -> None:
    report: Any = sample()
    report["evaluations"][0]["metrics"]["accuracy"] = 0.1
    for e in report["evaluations"]:
        e["metrics"]["a metric with a name that is much too long for a column"] = -1234.5678
    for side, scale in (("dense", 1), ("pruned", 0.999)):
        report["costs"][side].update(nonzeros=int(999_999_999 * scale), bytes_disk=int(999_400_000_000 * scale))
    text = printed(report)
    assert "\x1b" not in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(line[22:] for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    for row in rows(report):
        # One line a row: label (cut if need be), both figures, change and verdict all on it.
        (line,) = [line for line in lines if line.strip().startswith(row.label[:18])]
        assert all(part in line for part in row[1:5])
    assert "\x1b[" in printed(report, force_terminal=True, color_system="standard", no_color=False)


def test_the_terminal_names_what_did_not_shrink_and_the_files() -> None:
    text = printed(sample())
    assert "memory of the model \N{MULTIPLICATION SIGN}1.00, time a sample \N{MULTIPLICATION SIGN}0.98" in text
    assert text.splitlines()[-3:] == ["runs/mnist/model.h5", "runs/mnist/report.html", "runs/mnist/report.json"]
    report: Any = sample()
    report["out"] = "runs/" + "long/" * 30 + "mnist"
    assert report["out"] + "/report.html" in printed(report)


def test_json_is_the_dict(tmp_path: Path) -> None:
    report = sample()
    before = copy.deepcopy(report)
    path = tmp_path / "report.json"
    write_json(report, path)
    assert json.loads(path.read_text(encoding="utf-8")) == report == before
    page(report, tmp_path)
    assert report == before


@pytest.mark.parametrize("write", [write_json, write_html])
def test_a_file_is_replaced_whole_or_not_at_all(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report"
    path.write_text("before")
    mode = path.stat().st_mode

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(JobError, match=r"report: cannot be written \(No space left"):
        patch.setattr("os.fsync", full)
        write(sample(), path)
    assert path.read_text() == "before"
    (tmp_path / "reader").hardlink_to(path)
    write(sample(), path)
    assert (tmp_path / "reader").read_text() == "before"  # a new file took the name, the old one was not written into
    (tmp_path / "reader").unlink()
    assert path.read_text(encoding="utf-8")[:1] in "{<"
    assert path.stat().st_mode == mode
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_folder_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be written") as caught:
        write_json(sample(), tmp_path / "nowhere" / "report.json")
    assert "\n" not in str(caught.value)


def test_the_page_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    page(sample(), tmp_path)
    assert dict(matplotlib.rcParams) == before
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    write_html(sample(), tmp_path / "a.html")
    write_html(sample(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
