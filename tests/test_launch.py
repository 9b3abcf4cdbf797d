"""Launch mistakes that need no second host to be seen, and what Slurm is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcprune.errors import WorldError
from hpcprune.job import Checkpoint
from hpcprune.launch import check_gpus, late_checkpoint
from hpcprune.slurm import job_states, seconds_left


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that prints what is in the file beside it, and notes what it was asked."""
    path = tmp_path / "bin/squeue"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\necho "$@" > "$0.asked"\ncat "$0.says"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def test_ranks_that_would_share_a_gpu_over_nccl_are_refused() -> None:
    four = [f"GPU {number} of {host}" for host in ("node1", "node2") for number in (1, 2)]
    check_gpus("auto", four)
    check_gpus("auto", ["", ""])
    check_gpus("mpi", [four[0]] * 4)
    for exchange in ("auto", "torch"):
        with pytest.raises(WorldError, match=r"^ranks 1 and 4 share GPU 2 of node1, and nccl .*exchange: mpi"):
            check_gpus(exchange, [*four, four[1]])


@pytest.mark.parametrize(
    ("keys", "left", "says"),
    [
        ({}, None, None),
        ({}, 1001, None),
        ({}, 999, "comes in 16 min 39 s, before the next checkpoint in about 16 min 40 s"),
        ({"every_steps": 20}, 201, None),
        ({"every_steps": 20}, 199, "comes in 3 min 19 s, before the next checkpoint in about 3 min 20 s"),
        ({"every_steps": 500}, 1001, None),
        ({"every_minutes": 1}, 61, None),
        ({"every_minutes": 1, "every_steps": 20}, 59, "comes in 59.0 s, before the next checkpoint in about 60.0 s"),
    ],
)
def test_a_limit_before_the_next_checkpoint_is_told(keys: dict[str, int], left: float | None, says: str | None) -> None:
    """100 steps of 10 s are left."""
    said = late_checkpoint(Checkpoint(**keys), 10.0, left, 100)
    assert said is None if says is None else says in said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9:30", 570), ("1:00:05", 3605), ("2-03:00:00", 183600), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_the_time_that_slurm_leaves(squeue: Path, text: str, seconds: float | None) -> None:
    squeue.with_name("squeue.says").write_text(f"18 3:00\n17 {text}\n" if text else "")
    assert seconds_left({"SLURM_JOB_ID": "17"}) == seconds
    assert squeue.with_name("squeue.asked").read_text().split() == ["--noheader", "--jobs=17", "--format=%A", "%L"]
    assert seconds_left({}) is None


def test_without_slurm_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert seconds_left({"SLURM_JOB_ID": "17"}) is None and job_states(["17"]) == {}
    assert job_states([]) == {}
