"""The ranks' collectives against MPI's own, and the ways in which ranks fail: every one ends, and it is told once.

Run by mpirun this file is the program of one rank: `test_world_ranks.py CASE FOLDER`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpcprune import world as module
from hpcprune.errors import JobError
from hpcprune.world import World, threads_of_a_rank
from tests.conftest import Launch

TIMEOUT = 5.0  # of collectives, where ranks are missing; less and a busy machine is taken for a missing rank
OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}


# Collectives


def check_reductions(world: World, comm: MPI.Intracomm) -> None:
    """Whole numbers, so that the order of the summands does not matter."""
    random = np.random.default_rng(comm.Get_rank())
    for dtype in ("uint8", "int32", "int64", "uint64", "float32", "float64"):
        whole = random.integers(0, 40, (6, 8)).astype(dtype)
        for array in (whole, whole[0], whole[:0], whole[2, 3], whole.T, whole[::2, 1::3], np.asfortranarray(whole)):
            given = np.asarray(array)
            before = given.copy()
            for op, theirs in OPS.items():
                expected = np.empty(given.shape, dtype)
                comm.Allreduce(np.array(given, order="C"), expected, theirs)
                found = world.allreduce(given, "test", op)  # type: ignore[arg-type]
                assert found.dtype == expected.dtype and found.shape == expected.shape
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(given, before)


def check_gathering(world: World, comm: MPI.Intracomm) -> None:
    rank, size = comm.Get_rank(), comm.Get_size()
    random = np.random.default_rng(7 + rank)
    for dtype in ("uint8", "int16", "float32", "complex128"):
        for lengths in ([0] * size, [5] * size, range(size), [0] * (size - 1) + [1000], [1000] + [0] * (size - 1)):
            array = (100 * random.standard_normal(lengths[rank])).astype(dtype)
            for given in (array, np.repeat(array, 2)[::2]):
                found = world.gather_arrays(given, "test")
                for ours, theirs in zip(found, comm.allgather(given), strict=True):
                    assert ours.dtype == theirs.dtype
                    np.testing.assert_array_equal(ours, theirs)
                    assert not np.shares_memory(ours, given)


def check_objects(world: World, comm: MPI.Intracomm) -> None:
    rank = comm.Get_rank()
    for value in (None, rank, "x" * 1000 * rank, {"rank": [rank, b"\0" * rank]}, JobError(f"rank {rank}: no")):
        ours, theirs = world.allgather(value, "test"), comm.allgather(value)
        assert repr(ours) == repr(theirs)
        for root in range(comm.Get_size()):
            assert repr(world.bcast(value, "test", root)) == repr(comm.bcast(value, root))
    assert world.lead(lambda: ("from", rank), "test") == ("from", 0)
    assert world.together(lambda: rank, "test") == rank


def check_barrier(world: World, comm: MPI.Intracomm) -> None:
    time.sleep(0.1 * comm.Get_rank())
    arrived = time.monotonic()
    waited = world.seconds_waited
    world.barrier("test")
    left = time.monotonic()
    assert min(comm.allgather(left)) >= max(comm.allgather(arrived))
    assert 0 <= world.seconds_waited - waited <= left - arrived
    assert (world.seconds_waited > waited) == (comm.Get_size() > 1)


def check_hosts(world: World, comm: MPI.Intracomm) -> None:
    assert (world.local_rank, world.local_size) == (comm.Get_rank(), comm.Get_size())
    cores = len(os.sched_getaffinity(0))
    assert threads_of_a_rank(world) == max(1, cores // comm.Get_size())


def collectives(folder: Path) -> None:
    check_hosts(World.of(), MPI.COMM_WORLD)
    halves = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.Get_rank() % 2)
    for comm in (MPI.COMM_WORLD, halves):
        world = World.of(comm)
        assert (world.rank, world.size) == (comm.Get_rank(), comm.Get_size())
        for check in (check_reductions, check_gathering, check_objects, check_barrier):
            check(world, comm)
    usual, module.SLICE = module.SLICE, 60  # of no whole number of items, on 3 ranks nor on 2
    check_gathering(World.of(), MPI.COMM_WORLD)
    module.SLICE = usual
    (folder / f"done-{World.of().rank}").touch()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_collectives_are_those_of_mpi(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, "collectives", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("done-*"))) == ranks


# Failures: what the ranks do, each from where all of them have met


def one_raises(world: World) -> None:
    if world.rank == 1:
        raise ArithmeticError("of rank 1")


def all_raise(world: World) -> None:
    raise ArithmeticError(f"of rank {world.rank}")


def two_raise_and_one_after_them(world: World) -> None:
    """Rank 0 is the lowest, but what it raises may be for want of the others."""
    if world.rank == 0:
        time.sleep(0.3)
    raise ArithmeticError(f"of rank {world.rank}")


def one_makes_a_mistake(world: World) -> None:
    if world.rank == 2:
        raise JobError("of rank 2")


def all_make_a_mistake(world: World) -> None:
    raise JobError(f"of rank {world.rank}")


def two_make_a_mistake_together(world: World) -> None:
    world.together(lambda: world.rank and all_make_a_mistake(world), "test")


def one_raises_together(world: World) -> None:
    world.together(lambda: one_raises(world), "test")


def one_is_interrupted(world: World) -> None:
    if world.rank == 2:
        raise KeyboardInterrupt


def one_is_killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def one_never_comes(world: World) -> None:
    time.sleep(60 * (world.rank == 2))


def two_never_come_and_one_is_late(world: World) -> None:
    time.sleep({0: 0, 1: 60, 2: 0.85 * TIMEOUT, 3: 60}[world.rank])


def nobody_comes_to_the_host(world: World) -> None:
    if world.rank == 0:
        _ = world.local_rank
    time.sleep(60)


# As regular expressions. Of ranks that fail together, the lowest tells it, or one that was first by a hair.
FAILED, ERROR = r"hpcprune: failed \(rank {}\):\nTraceback", r"hpcprune: error \(rank ({})\): of rank \1\n"
WAITED = r"hpcprune: error \(rank [012]\): test: waited 5 s for {}\. Look at what"
Case = tuple[Callable[[World], None], int, int | None, str]
CASES: dict[str, Case] = {
    case[0].__name__: case
    for case in (
        (one_raises, 3, 1, FAILED.format(1)),
        (all_raise, 3, 1, FAILED.format("[012]")),
        (two_raise_and_one_after_them, 3, 1, FAILED.format("[12]")),
        (one_makes_a_mistake, 3, 2, ERROR.format(2)),
        (all_make_a_mistake, 3, 2, ERROR.format("[012]")),
        (two_make_a_mistake_together, 3, 2, ERROR.format(1)),
        (one_raises_together, 3, 1, FAILED.format(1)),
        (one_is_interrupted, 3, 1, r"hpcprune: interrupted \(rank 2\)\n"),
        (one_is_killed, 3, None, ""),
        (one_never_comes, 3, 2, WAITED.format(r"rank 2 \(of 3\)")),
        (two_never_come_and_one_is_late, 4, 2, WAITED.format(r"ranks 1, 3 \(of 4\)")),
        (nobody_comes_to_the_host, 2, 2, r"finding the ranks of each host: waited 5 s for rank 1 \(of 2\)"),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_a_failure_ends_every_rank_within_5_seconds_and_is_told_once(mpirun: Launch, tmp_path: Path, name: str) -> None:
    _, ranks, code, told = CASES[name]
    done = mpirun(ranks, __file__, name, tmp_path, timeout=30)
    processes = [Path("/proc", path.name) for path in tmp_path.iterdir()]
    assert len(processes) == ranks
    met = max(path.stat().st_mtime for path in tmp_path.iterdir())
    limit = met + 5 + (TIMEOUT if "waited" in told else 0)
    while any(path.exists() for path in processes) and time.time() < limit:
        time.sleep(0.01)
    assert time.time() < limit
    assert done.returncode == code if code is not None else done.returncode != 0
    assert re.search(told, done.stderr), done.stderr
    assert done.stderr.count("hpcprune: ") == bool(told), done.stderr
    assert done.stderr.count("Traceback") == told.count("Traceback"), done.stderr
    assert done.stderr.count("ArithmeticError: of rank") == told.count("Traceback")
    assert "got past" not in done.stdout


def main(case: str, folder: Path) -> None:
    if case == "collectives":
        collectives(folder)
        return
    world = World.of(timeout=TIMEOUT)
    world.barrier("meeting")
    (folder / str(os.getpid())).touch()
    action: Any = CASES[case][0]
    action(world)
    world.allreduce(np.ones(3), "test")
    print("got past it", flush=True)


if __name__ == "__main__":
    with World.of().guard():
        main(sys.argv[1], Path(sys.argv[2]))
