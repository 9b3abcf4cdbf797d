"""Mistakes on two ranks: told once, whichever ranks they are found on, and mpirun ends with exit status 2."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, Launch

TASK = (SMALL / "task.py").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMALL, tmp_path / "job")) / "job.yaml"


def assert_told_once(ended: subprocess.CompletedProcess[str], says: str) -> None:
    assert ended.returncode == 2, ended.stderr
    told = [line for line in (ended.stdout + ended.stderr).splitlines() if "hpcprune: " in line]
    assert len(told) == 1 and re.search(says, told[0]), ended.stderr
    assert "Traceback" not in ended.stderr


COMMAND_LINES = {
    "option": ("--frob", r"No such option:? '?--frob'?; write: hpcprune run .* \(hpcprune run --help says more\)"),
    "job": ("prune.sparsity=1.2", r"override prune\.sparsity=1\.2: 1\.2 is not in \[0, 1\)"),
    "task": ("task=tusk.py", r"no such file: .*/tusk\.py; beside the job file there is: task\.py"),
    "batch": ("retrain.batch_size=1", r"retrain\.batch_size: 1 is less than a sample for each of 2 ranks; raise it"),
    "weights": ("weights=w.pt", r"0\.weight: 1 of 256 values are NaN or infinite; take weights of a sound training"),
    "folder": ("out=/proc/self/run", r"out: /proc/self/run cannot be .*; choose another folder with --out"),
}


@pytest.mark.parametrize("argument,says", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_mistake_is_told_once(mpirun: Launch, job: Path, argument: str, says: str) -> None:
    weights = {"0.weight": torch.ones(64, 4), "0.bias": torch.ones(64), "2.weight": torch.ones(2, 64)}
    weights["0.weight"][3, 2] = torch.nan
    torch.save({**weights, "2.bias": torch.ones(2)}, job.with_name("w.pt"))
    out = [] if "out=" in argument else ["--out", job.parent / "run"]
    assert_told_once(mpirun(2, "hpcprune", "run", job, *out, argument, timeout=120), says)
    assert not (job.parent / "run").exists()


TASKS = {
    "on one rank": (
        "        data =",
        "        assert os.environ['OMPI_COMM_WORLD_RANK'] == '0'\n        data =",
        r"error \(rank 1\): task: Small\.data raised AssertionError: \(at \S+/task\.py:25: assert os\.environ",
    ),
    "samples": (
        "train=data",
        "train=torch.utils.data.Subset(data, [0])",
        r"Small\.data\(\)\.train has 1 samples for 2 ranks; use at most 1 ranks",
    ),
}


@pytest.mark.parametrize("old,new,says", TASKS.values(), ids=TASKS)
def test_a_mistake_in_the_task_is_told_once(mpirun: Launch, job: Path, old: str, new: str, says: str) -> None:
    job.with_name("task.py").write_text(TASK.replace(old, new, 1))
    assert_told_once(mpirun(2, "hpcprune", "run", job, "--out", job.parent / "run", timeout=120), says)
    assert not (job.parent / "run").exists()


@pytest.mark.parametrize("room,says", [(0, r"metrics\.jsonl: cannot be"), (8192, r"rank-000.\.h5: cannot be")])
def test_a_disk_that_fills_up_is_told_once(mpirun: Launch, job: Path, disk: Path, room: int, says: str) -> None:
    fill = {"FILL": f"{disk}/filler:10:{room}"}
    ended = mpirun(2, "hpcprune", "run", job, "--out", disk / "run", timeout=120, env=fill)
    assert_told_once(ended, says + " written: .*; (free some space|put that right)")
    assert not [*disk.rglob("*.partial")], "a part of a file was left"
