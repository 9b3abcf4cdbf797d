"""The benches are no tests, and are run by hand; but what they import and name must be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
