"""slurm/prune.sh on a real Slurm: time limits, preemption, dead nodes, and the weights of a run undisturbed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from hpcprune.checkpoint import newest_step, read_model, read_step
from tests.commands import Command
from tests.conftest import ROOT, TINY
from tests.mpi.test_run import PACK, assert_same_weights
from tests.slurm.conftest import OVER, Slurm, SlurmJob, clear, emulate

pytestmark = pytest.mark.timeout(900)
TWO = ("--nodes=2", "--ntasks-per-node=1", "--exclusive", "--cpus-per-task=1")  # with threads as under mpirun
SCRIPT = ROOT / "slurm/prune.sh"


def submit(
    slurm: Slurm, out: Path, *flags: str, more: tuple[str, ...] = (PACK,), sleep: float = 0.1, **env: str
) -> SlurmJob:
    """The tests' smallest job on 2 nodes, in slow motion: some 12 s of steps."""
    script = [SCRIPT, TINY, *more, "--out", out]
    return slurm.sbatch(out, *script, flags=(*TWO, *flags), TINY_SLEEP=str(sleep), **env)


def in_the_middle(job: SlurmJob, out: Path) -> None:
    """Wait until the run is in its first round."""
    job.wait((out / "checkpoints/step-00000040").exists, "the checkpoint of step 40")


def push_out(slurm: Slurm, job: SlurmJob, out: Path) -> None:
    """Give the job's nodes to one of a partition of higher priority for 5 s."""
    other = out.with_suffix(".sh")
    other.write_text("#!/bin/sh\nsleep 5\n")
    flags = ("--partition=high", "--nodes=2", f"--nodelist={','.join(job.nodes)}", "--exclusive")
    assert slurm.sbatch(out.with_name("urgent"), other, flags=flags).end() == "COMPLETED"


DISTURBANCES: dict[str, Callable[[Slurm, SlurmJob, Path], object]] = {
    "pushed out by another partition": push_out,
    "power of the batch host": lambda slurm, job, out: emulate("fail", job.nodes[0]),
    "power of another node": lambda slurm, job, out: emulate("fail", job.nodes[1]),
    "a cable": lambda slurm, job, out: emulate("unplug", job.nodes[1]),
}


Ended = dict[str, Future[tuple[SlurmJob, Path]]]


@pytest.fixture(scope="module")
def ended(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Jobs to which these things happened in their middle, one that came to its time limit ("limited"), one that was
    told to stop once too often ("restarted"), and their folders.

    All at the same time, for mostly they wait for Slurm.
    """
    base = tmp_path_factory.mktemp("ended")

    def disturb(name: str) -> tuple[SlurmJob, Path]:
        out = base / name.replace(" ", "-")
        job = submit(cluster, out)
        in_the_middle(job, out)
        DISTURBANCES[name](cluster, job, out)
        job.end()
        return job, out

    def restart() -> tuple[SlurmJob, Path]:
        out = base / "restarted"
        job = submit(cluster, out, HPCPRUNE_RESTARTS="1")
        in_the_middle(job, out)
        job.signal("--signal=USR1", "--batch")
        job.wait(lambda: "going on from /" in job.text, "its second start")
        job.signal("--signal=USR1", "--batch")
        job.end()
        return job, out

    def limit() -> tuple[SlurmJob, Path]:
        """Its limit is a minute; after 10 to 40 s it is told to stop, and its steps alone take as long.

        Once it has gone on it has time enough, or it would be told again and again.
        """
        limited.wait(lambda: limited.show()["Restarts"] != "0", "its second start")
        if limited.state not in OVER:  # what was left may have been a step
            limited.update("TimeLimit=10")
        limited.end()
        return limited, out

    out = base / "limited"
    limited = submit(cluster, out, "--time=1", "--signal=B:USR1@20", sleep=0.4)
    limited.wait(lambda: any(out.glob("checkpoints/step-*")), "its steps, before others slow its start down")
    with ThreadPoolExecutor(len(DISTURBANCES) + 2) as threads:
        ends = {name: threads.submit(disturb, name) for name in DISTURBANCES}
        ends |= {"limited": threads.submit(limit), "restarted": threads.submit(restart)}
    clear(cluster)
    return ends


def assert_went_on(job: SlurmJob, out: Path, uninterrupted: Path, found_complete: int = 0) -> None:
    """It ended well, after a restart at least, with the weights of a run that nothing disturbed.

    found_complete: restarts that had nothing left to do.
    """
    assert job.state == "COMPLETED", job.text
    restarts = int(job.show()["Restarts"])
    assert restarts and job.text.count("going on from /") == restarts - found_complete, job.text
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


@pytest.mark.parametrize("what", DISTURBANCES)
def test_whatever_happens_it_goes_on_to_the_same_weights(ended: Ended, uninterrupted: Path, what: str) -> None:
    job, out = ended[what].result()
    assert_went_on(job, out, uninterrupted)


def test_before_its_time_is_up_it_is_saved_and_requeued(ended: Ended, uninterrupted: Path) -> None:
    job, out = ended["limited"].result()
    # Told to stop as its last step is done, it ends well and is requeued all the same.
    assert_went_on(job, out, uninterrupted, found_complete=job.text.count("holds this run, complete"))
    assert "stopped by SIGTERM" in job.text and "told to stop; requeuing" in job.text


def test_told_to_stop_before_it_listens_it_is_requeued_too(slurm: Slurm, tmp_path: Path) -> None:
    """While the script looks for a way to start MPI, and while the ranks start."""
    jobs = []
    for seconds in (0.2, 2.5):
        job = submit(slurm, tmp_path / str(seconds), sleep=0)
        job.wait(lambda job=job: job.state == "RUNNING", "it to run")
        time.sleep(seconds)
        job.signal("--signal=USR1", "--batch")
        jobs.append(job)
    for job in jobs:
        assert job.end() == "COMPLETED", job.text
        assert int(job.show()["Restarts"]) == 1 and "told to stop; requeuing" in job.text


def test_from_sbatch_to_a_checked_checkpoint(slurm: Slurm, hpcprune: Command, tmp_path: Path) -> None:
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
    alone = ("run", ROOT / job, *short, f"weights={out / 'dense.h5'}", "retrain.epochs=0", "--out", tmp_path / "alone")
    done = hpcprune(*alone)
    assert done.code == 0, done.err
    hashes = {read_model(path / "model.h5").about["mask_hash"] for path in (out, tmp_path / "alone")}
    assert len(hashes) == 1


def test_a_users_mistake_ends_it_at_once_and_once(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "run", more=("prune.sparsity=1.2",))
    assert job.end(60) == "FAILED"
    assert int(job.show()["Restarts"]) == 0
    assert job.show()["ExitCode"] == "2:0"
    assert job.text.count("prune.sparsity=1.2: 1.2 is not in [0, 1)") == 1
    assert "requeuing" not in job.text


def test_a_rank_that_dies_alone_ends_it_once(slurm: Slurm, tmp_path: Path) -> None:
    """Before it can say a word to the others, which Slurm ends half a minute later."""
    (tmp_path / "task.py").write_text("import os\nos._exit(3) if os.environ['SLURM_PROCID'] == '1' else None\n")
    (tmp_path / "job.yaml").write_text("task: task.py\nprune: {sparsity: 0.5}\ntrain: {epochs: 1}\n")
    job = slurm.sbatch(tmp_path / "run", SCRIPT, tmp_path / "job.yaml", "--out", tmp_path / "run", flags=TWO)
    assert job.end() == "FAILED"
    assert int(job.show()["Restarts"]) == 0 and "requeuing" not in job.text, job.text


SHAPES = {
    ("--nodes=2", "--gres=gpu:2"): "4 ranks with 1 thread",
    ("--nodes=2", "--exclusive", "--ntasks-per-node=1"): "2 ranks with 2 threads",
    ("--ntasks=3", "--nodes=2"): "3 ranks with 1 thread",
}


def test_ranks_are_as_many_as_the_tasks_the_gpus_or_the_cpus(slurm: Slurm, tmp_path: Path) -> None:
    jobs = {}
    for number, flags in enumerate(SHAPES):
        out = tmp_path / str(number)
        jobs[flags] = slurm.sbatch(out, SCRIPT, TINY, "prune.rounds=1", "retrain.epochs=0", "--out", out, flags=flags)
    for flags, job in jobs.items():
        assert job.end() == "COMPLETED" and SHAPES[flags] in job.text, job.text


def test_the_number_of_restarts_is_limited(ended: Ended) -> None:
    job, _ = ended["restarted"].result()
    assert job.state == "FAILED"
    assert int(job.show()["Restarts"]) == 1
    assert "told to stop, and not requeued: HPCPRUNE_RESTARTS is reached" in job.text


def test_scancel_ends_all_within_10_seconds_with_a_complete_checkpoint(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out)
    in_the_middle(job, out)
    job.wait(lambda: job.state == "RUNNING", "it to run")
    start, told = time.monotonic(), time.time()
    job.signal()
    assert job.end() == "CANCELLED"
    processes = lambda: [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in _read(p)]  # noqa: E731
    job.wait(lambda: not processes(), "all processes to be gone", 10 - (time.monotonic() - start))
    path, passed_over = newest_step(out / "checkpoints")
    assert path is not None and not passed_over
    read_step(path)
    assert path.stat().st_mtime > told, "it should have been saved when it was told to end"
    assert "stopped by SIGTERM" in job.text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
