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
