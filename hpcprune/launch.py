"""The launch: whether ranks on several hosts run the same code on the same files.

On a cluster a folder may be another one on each node, a task's file may be an old copy, an environment may be half
updated. Each shows late and strangely, as a checkpoint in parts on several disks or as weights that differ, so it is
looked at before any work is done. On one host there is nothing to compare.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Hashable, Sequence
from pathlib import Path

from hpcprune.errors import WorldError
from hpcprune.host import versions
from hpcprune.job import Checkpoint, Job
from hpcprune.report.units import as_seconds
from hpcprune.world import World

__all__ = ["check_code", "check_folder", "check_gpus", "late_checkpoint"]

PATIENCE = 10.0  # seconds in which a file must be seen by all: NFS may remember for a while that it was not there
CLOCKS_APART = 10.0  # seconds


def check_code(job: Job, world: World) -> str | None:
    """Compare versions, the task's file and the clocks of all hosts. Collective.

    Returns:
        What is odd but does no harm, as a sentence; None if nothing is.

    Raises:
        WorldError: on every rank: the hosts' versions or files differ; it names them.
    """
    if world.local_size == world.size:
        return None
    world.barrier("launch: clocks")
    seen = world.allgather((socket.gethostname(), time.time(), versions(), job.digest()), "launch: comparing hosts")
    hosts = [each[0] for each in seen]
    for package in seen[0][2]:
        _refuse_difference(
            f"{package} differs between hosts", hosts, [each[2][package] for each in seen], "install the same on all"
        )
    if len({each[3] for each in seen}) > 1:
        task = job.task_file or job.task
        _refuse_difference(
            f"{task} differs between hosts", hosts, [each[3][:12] for each in seen], "put it on a disk that all share"
        )
    clocks = [each[1] for each in seen]
    apart = max(clocks) - min(clocks)
    if apart > CLOCKS_APART:
        first, last = hosts[clocks.index(min(clocks))], hosts[clocks.index(max(clocks))]
        return f"the clock of {first} is {apart:.0f} s behind that of {last}: times in logs and of files do not compare"
    return None


def check_folder(path: Path, world: World) -> None:
    """WorldError, on every rank, if a host does not see what rank 0 writes into the run's folder. Collective."""
    if world.local_size == world.size:
        return
    note, token = path / ".launch", world.bcast(secrets.token_hex(), "launch: folder")
    world.lead(lambda: note.write_text(token), "launch: writing into the run's folder")
    seen, end = False, time.monotonic() + PATIENCE
    while not seen and time.monotonic() < end:
        try:
            seen = note.read_text() == token
        except OSError:
            time.sleep(0.1)
    found = world.allgather((socket.gethostname(), seen), "launch: comparing the run's folder")
    world.lead(lambda: note.unlink(missing_ok=True), "launch: clearing the run's folder")
    blind = sorted({host for host, sees in found if not sees})
    if blind:
        raise WorldError(
            f"out: {path.absolute()} on {', '.join(blind)} is not the folder that it is on {found[0][0]}, where rank 0 "
            "is; choose one on a disk that all hosts share, with --out"
        )


def check_gpus(exchange: str, gpus: Sequence[str]) -> None:
    """WorldError if ranks share a GPU, and the exchange is nccl, which cannot. `gpus`: each rank's, or "" for none."""
    if exchange not in ("auto", "torch"):
        return
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank]:
            raise WorldError(
                f"ranks {gpus.index(gpu)} and {rank} share {gpu}, and nccl needs one for each; launch as many ranks a "
                "host as it has GPUs (srun --ntasks-per-node=4), or write retrain.exchange: mpi"
            )


def late_checkpoint(checkpoint: Checkpoint, pace: float, left: float | None, to_end: int) -> str | None:
    """A sentence if a job's time will be up before its next checkpoint; None if not, or if there is no limit.

    Args:
        pace: seconds a step. left: seconds until the limit. to_end: steps to the end of this training, where one is
            written in any case.
    """
    steps = min(checkpoint.every_steps or to_end, to_end)
    first = min(steps * pace, 60 * (checkpoint.every_minutes or float("inf")))
    if left is None or first < left:
        return None
    return (
        f"the time limit comes in {as_seconds(left)}, before the next checkpoint in about {as_seconds(first)}: the "
        "steps until then are lost unless a signal comes first, as with slurm/prune.sh; give checkpoint.every_minutes"
    )


def _refuse_difference(what: str, hosts: Sequence[str], values: Sequence[Hashable], fix: str) -> None:
    """Raise WorldError if the hosts' values differ, with a host for each of them."""
    places = dict(zip(values, hosts, strict=True))
    if len(places) > 1:
        each = ", ".join(f"{value} on {host}" for value, host in places.items())
        raise WorldError(f"{what} ({each}); {fix}")
