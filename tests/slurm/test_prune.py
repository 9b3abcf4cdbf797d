"""slurm/prune.sh on a real Slurm: time limits, preemption, dead nodes, and the weights of a run undisturbed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcprune.checkpoint import newest_step, read_model, read_step
from tests.conftest import ROOT, Launch
from tests.mpi.test_run import PACK, assert_same_weights, uninterrupted
from tests.slurm.conftest import Slurm, SlurmJob, emulate

__all__ = ["uninterrupted"]

pytestmark = pytest.mark.timeout(600)
TWO = ("--nodes=2", "--ntasks-per-node=1")
SCRIPT, TINY = ROOT / "slurm/prune.sh", ROOT / "tests/jobs/tiny/job.yaml"


def submit(slurm: Slurm, out: Path, *flags: str, more: tuple[str, ...] = (PACK,), **env: str) -> SlurmJob:
    """The tests' smallest job on 2 nodes, in slow motion: some 12 s of steps."""
    return slurm.sbatch(out, SCRIPT, TINY, *more, "--out", out, flags=(*TWO, *flags), TINY_SLEEP="0.1", **env)


def in_the_middle(job: SlurmJob, out: Path) -> None:
    """Wait until the run is in its first round."""
    job.wait((out / "checkpoints/step-00000040").exists, "the checkpoint of step 40")


def assert_went_on(job: SlurmJob, out: Path, uninterrupted: Path, restarts: int = 1) -> None:
    """It ended well after so many restarts or more, with the weights of a run that nothing disturbed."""
    assert job.end() == "COMPLETED", job.text
    found = int(job.show()["Restarts"])
    assert found >= restarts and job.text.count("going on from") == found, job.text
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


def test_from_sbatch_to_a_checked_checkpoint(slurm: Slurm, mpirun: Launch, tmp_path: Path) -> None:
    out, job = tmp_path / "run", "jobs/mnist/job.yaml"
    short = ("train.epochs=0.2", "retrain.epochs=0.1", "prune.rounds=1", "prune.schedule=one-shot")
    pruned = slurm.sbatch(out, SCRIPT, job, *short, "--out", out, flags=("--nodes=4",))
    checked = slurm.sbatch(
        tmp_path / "check", ROOT / "slurm/check.sh", out, flags=(f"--dependency=afterok:{pruned.number}",)
    )
    assert pruned.end() == "COMPLETED", pruned.text
    assert "4 ranks on node[1-4], by --mpi=pmix" in pruned.text
    assert checked.end() == "COMPLETED", checked.text
    assert "model.h5" in checked.text
    alone = ("hpcprune", "run", job, *short, f"weights={out / 'dense.h5'}", "retrain.epochs=0", "--out")
    done = mpirun(1, *alone, tmp_path / "alone", timeout=120)
    assert done.returncode == 0, done.stderr
    hashes = {read_model(path / "model.h5").about["mask_hash"] for path in (out, tmp_path / "alone")}
    assert len(hashes) == 1


def test_before_its_time_is_up_it_is_saved_and_requeued(slurm: Slurm, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    job = slurm.sbatch(
        out, SCRIPT, TINY, PACK, "--out", out, flags=(*TWO, "--time=1", "--signal=B:USR1@35"), TINY_SLEEP="0.2"
    )
    assert_went_on(job, out, uninterrupted)
    assert "stopped by SIGUSR1" in job.text and "stopped with a complete checkpoint; requeued" in job.text


def test_pushed_out_by_another_partition_it_goes_on(slurm: Slurm, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out)
    in_the_middle(job, out)
    other = tmp_path / "other.sh"
    other.write_text("#!/bin/sh\nsleep 5\n")
    urgent = slurm.sbatch(tmp_path / "other", other, flags=("--partition=high", "--nodes=4", "--exclusive"))
    assert urgent.end() == "COMPLETED"
    assert_went_on(job, out, uninterrupted)


@pytest.mark.parametrize("place", [0, 1], ids=["of the batch host", "of another node"])
def test_power_is_lost(slurm: Slurm, tmp_path: Path, uninterrupted: Path, place: int) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out)
    in_the_middle(job, out)
    emulate("fail", job.nodes[place])
    assert_went_on(job, out, uninterrupted)


def test_a_cable_is_pulled(slurm: Slurm, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out)
    in_the_middle(job, out)
    emulate("unplug", job.nodes[1])
    assert_went_on(job, out, uninterrupted)


def test_a_users_mistake_ends_it_at_once_and_once(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "run", more=("prune.sparsity=1.2",))
    assert job.end(60) == "FAILED"
    assert int(job.show()["Restarts"]) == 0
    assert job.show()["ExitCode"] == "2:0"
    assert job.text.count("prune.sparsity=1.2: 1.2 is not in [0, 1)") == 1
    assert "requeued" not in job.text


def test_the_number_of_restarts_is_limited(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out, HPCPRUNE_RESTARTS="1")
    for _ in range(2):
        before = job.text.count("ranks on node")
        job.wait(
            lambda before=before: job.text.count("train: loss") + job.text.count("0: ") > 3 * (before or 1), "a start"
        )
        job.wait(lambda: job.state == "RUNNING", "it to run")
        time.sleep(4)
        job.signal("--signal=USR1", "--batch")
        job.wait(lambda: job.state != "RUNNING", "its end")
    assert job.end() == "FAILED"
    assert int(job.show()["Restarts"]) == 1
    assert "stopped, and not requeued: that was start 2" in job.text


def test_scancel_ends_all_within_10_seconds_with_a_complete_checkpoint(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out)
    in_the_middle(job, out)
    job.wait(lambda: job.state == "RUNNING", "it to run")
    start = time.monotonic()
    job.signal()
    assert job.end() == "CANCELLED"
    processes = lambda: [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in _read(p)]  # noqa: E731
    job.wait(lambda: not processes(), "all processes to be gone", 10 - (time.monotonic() - start))
    path, passed_over = newest_step(out / "checkpoints")
    assert path is not None and not passed_over
    assert read_step(path).about["ledger"]["run_step"] % 10, "it should have been saved when it was told to end"
    assert "stopped by SIGTERM" in job.text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
