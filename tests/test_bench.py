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
    from domains_runs import Domain, Runs

    def run(*words: str | Path) -> tuple[int, str]:
        ended = hpcprune(*words)
        return ended.code, ended.err

    domain = Domain(str(ROOT / "tests/jobs/small"), ("lamp", "wanda"), 0.02, sparsities=(0.9,))
    said: list[str] = []
    runs, page = Runs(tmp_path / "runs", run, said.append), tmp_path / "results.md"
    runs.measure(domain, 1, first=1)
    (best, worse), reports = runs.sought(domain, 1), tmp_path / "runs/small"
    names = ["dense", "lamp-90", "wanda-90", "random-90", "magnitude-90"]
    assert said == [f"small, seed 1: {name}" for name in names]

    said.clear()
    runs.measure(domain, 1, first=1)
    assert not said, "nothing is run again"
    reached = {name: figures(reports / f"seed-1/{name}/report.json") for name in names}
    assert len({each[0] for each in reached.values()}) == 1, "all prune one dense network"
    assert reached[f"{best}-90"][2] >= reached[f"{worse}-90"][2]

    for name, second in {"dense": [0.9, 0.9, 0.9], "magnitude-90": [0.9, 0.4, 0.89]}.items():  # and of no other
        shutil.copytree(reports / f"seed-1/{name}", reports / f"seed-2/{name}")
        file = reports / f"seed-2/{name}/report.json"
        report = json.loads(file.read_text())
        for evaluation, accuracy in zip(report["evaluations"], second, strict=True):
            evaluation["metrics"]["accuracy"] = accuracy
        file.write_text(json.dumps(report))
        reached[name] = [*zip(reached[name], second, strict=True)]
    write_page(runs, [domain, Domain("missing", (), 0.1)], page)
    text = page.read_text()
    means = [statistics.mean(each) for each in reached["magnitude-90"]]
    for number, retraining in enumerate(["without", "with"], start=1):
        spread = statistics.stdev(reached["magnitude-90"][number])
        assert f"| magnitude | {retraining} | {100 * means[number]:.2f} ± {100 * spread:.2f} % |" in text
        assert f"| random | {retraining} | {100 * reached['random-90'][number]:.2f} % (1 of 2) |" in text
    (kept,) = re.findall("At most 2.00 points worse than dense, with retraining: (.*)", text)
    assert ("magnitude up to 90 %" in kept) == (means[2] >= means[0] - 0.02)
    assert ("magnitude nowhere" in kept) == (means[2] < means[0] - 0.02)
    (lost,) = re.findall(r"No better than a predictor that always says the same \((5.*) %\): (.*)", text)
    assert ("magnitude without retraining at 90 %" in lost[1]) == (100 * means[1] <= float(lost[0]))
    assert f"with retraining: {best} " in text and "## missing" not in text


def figures(report: Path) -> list[float]:
    return [each["metrics"]["accuracy"] for each in json.loads(report.read_text())["evaluations"]]
