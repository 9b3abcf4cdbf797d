"""The benches are no tests, and are run by hand; but what they import and name must be there."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Command
from tests.conftest import ROOT

BENCHES = sorted((ROOT / "bench").glob("*.py"))
LOAD = "import runpy, sys; sys.path[0] = 'bench'; runpy.run_path(sys.argv[1], run_name='loaded')"


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.name)
def test_a_bench_loads(bench: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, bench], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ([], ["panels", "bitmap", "F.linear", "torch CSR"]),
        (["--pattern", "blocks", "--backward"], ["blocks", "F.linear"]),
    ],
    ids=" ".join,
)
def test_products_are_benchmarked(options: list[str], heads: list[str]) -> None:
    """It holds what every contender gives to what F.linear does."""
    small = ["--shapes", "64x48", "--batch", "1,3", "--sparsity", "0.5", "--threads", "1"]
    command = [sys.executable, ROOT / "bench/spmm.py", *small, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, _, _, head, *lines = done.stdout.splitlines()
    assert all(name in head for name in heads) and len(lines) == 2
    for line in lines:
        ratio, *_ = (cell for cell in line.split() if "." in cell and "%" not in cell)
        assert float(ratio) > 0 and line.count("%") == 3


def test_domains_are_measured_once_and_their_page_says_what_the_reports_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hpcprune: Command
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    from domains_page import write_page
    from domains_runs import Domain, Results, Runs

    reached: dict[str, list[float]] = {}

    def run(*words: str | Path) -> tuple[int, str]:
        ended, out = hpcprune(*words), Path(words[-1])
        reached[out.name] = figures(out / "report.json")
        return ended.code, ended.err

    domain = Domain(str(ROOT / "tests/jobs/small"), ("lamp", "wanda"), 0.02, sparsities=(0.9,))
    said: list[str] = []
    file, page = tmp_path / "results.jsonl", tmp_path / "results.md"
    runs = Runs(tmp_path / "runs", Results(file), run, said.append)
    runs.measure(domain, 1, first=1)
    names = ["dense", "lamp-90", "wanda-90", "random-90", "magnitude-90"]
    assert said == [f"small, seed 1: {name}" for name in names]
    assert len({each[0] for each in reached.values()}) == 1, "all prune one dense network"
    best, worse = runs.results.sought(domain, 1)
    assert reached[f"{best}-90"][2] >= reached[f"{worse}-90"][2]

    said.clear()
    results = Results(file)  # as another process has them
    again = runs._replace(results=results)
    again.measure(domain, 1, first=1)
    assert not said, "nothing is run again"

    for name, pruned, retrained in (("dense", 0.9, 0.9), ("magnitude-90", 0.4, 0.89)):  # and no other
        first = results.get(domain, 1, name)
        assert first is not None and [first.pruned, first.retrained] == reached[name][1:]
        results.add(first._replace(seed=2, pruned=pruned, retrained=retrained))
    write_page(Results(file), [domain, Domain("missing", (), 0.1)], page)
    text, dense = page.read_text(), statistics.mean([reached["dense"][2], 0.9])
    means = {}
    for retraining, at, second in (("without", 1, 0.4), ("with", 2, 0.89)):
        both = [reached["magnitude-90"][at], second]
        means[retraining], spread = statistics.mean(both), statistics.stdev(both)
        assert f"| magnitude | {retraining} | {100 * means[retraining]:.2f} ± {100 * spread:.2f} % |" in text
        assert f"| random | {retraining} | {100 * reached['random-90'][at]:.2f} % (1 of 2) |" in text
    (kept,) = re.findall("At most 2.00 points worse than dense, with retraining: (.*)", text)
    assert ("magnitude up to 90 %" in kept) == (means["with"] >= dense - 0.02)
    assert ("magnitude nowhere" in kept) == (means["with"] < dense - 0.02)
    (lost,) = re.findall(r"No better than a predictor that always says the same \((5.*) %\): (.*)", text)
    assert ("magnitude without retraining at 90 %" in lost[1]) == (100 * means["without"] <= float(lost[0]))
    assert f"with retraining: {best} " in text and "## missing" not in text

    shutil.rmtree(tmp_path / "runs")
    again.measure(domain, 2, first=1)
    assert said == [f"small, seed 2: {name}" for name in ["dense", "random-90", "magnitude-90", f"{best}-90"]], "anew"


def figures(report: Path) -> list[float]:
    return [each["metrics"]["accuracy"] for each in json.loads(report.read_text())["evaluations"]]
