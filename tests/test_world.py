"""The world of one rank, what launchers promise, and how work and cores are divided among ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcprune.errors import JobError, NumericsError, WorldError
from hpcprune.world import (
    SIZE_VARIABLES,
    AgreedError,
    World,
    as_ranges,
    part_of_rank,
    promised_size,
    threads_of_a_rank,
)


def world_of(rank: int, size: int) -> World:
    """A rank among several, for what needs no messages."""
    world = World.alone()
    world.rank, world.size = rank, size
    return world


# What launchers promise


@pytest.mark.parametrize(
    ("environ", "variable", "promised"),
    [
        ({}, "", None),
        ({"SLURM_NTASKS": "3"}, "SLURM_NTASKS", 3),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE", 3),
        ({"PMI_SIZE": "3"}, "PMI_SIZE", 3),
        ({"MV2_COMM_WORLD_SIZE": "3"}, "MV2_COMM_WORLD_SIZE", 3),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS", 3),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE", 2),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "2"}, "PMI_SIZE", 2),
        ({"SLURM_NTASKS": "", "PMI_SIZE": "many"}, "", None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_the_innermost_launcher_says_how_many_ranks_there_are(
    environ: dict[str, str], variable: str, promised: int | None
) -> None:
    """`mpirun -n 2` inside an allocation of 8 tasks means 2."""
    assert promised_size(environ) == (variable, promised)
    if promised is not None:
        world_of(0, promised).check_size(environ)


@pytest.mark.parametrize("variable", SIZE_VARIABLES)
def test_ranks_that_each_run_alone_are_refused_with_the_launch_that_helps(variable: str) -> None:
    with pytest.raises(WorldError, match=rf"^{variable}=4 ranks were launched, but MPI sees 1: .*srun --mpi=pmix"):
        World.alone().check_size({variable: "4"})
    World.alone().check_size({})


@pytest.mark.parametrize(
    ("size", "refused"), [("1", False), ("4", True)], ids=["as many as promised", "fewer than promised"]
)
def test_the_command_line_looks_at_the_environment(size: str, refused: bool) -> None:
    program = "from hpcprune.world import World; w = World.of()\nwith w.guard(): w.check_size()"
    environ = {name: value for name, value in os.environ.items() if name not in SIZE_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environ, "SLURM_NTASKS": size}, capture_output=True, text=True
    )
    assert done.returncode == (2 if refused else 0), done.stderr
    assert ("SLURM_NTASKS=4 ranks were launched, but MPI sees 1" in done.stderr) == refused
    assert done.stderr.count("\n") == refused


# One rank


def test_alone_every_collective_gives_back_what_it_was_given() -> None:
    world = World.alone()
    array = np.arange(6.0).reshape(2, 3)
    for op in ("sum", "max", "min"):
        result = world.allreduce(array, "test", op)
        np.testing.assert_array_equal(result, array)
        assert not np.shares_memory(result, array)
    (gathered,) = world.gather_arrays(array[0], "test")
    np.testing.assert_array_equal(gathered, array[0])
    assert not np.shares_memory(gathered, array)
    assert world.allgather({"a": 1}, "test") == [{"a": 1}]
    assert world.bcast("value", "test") == "value"
    assert world.lead(lambda: 5, "test") == world.together(lambda: 5, "test") == 5
    world.barrier("test")
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    assert world.bytes_reduced == 3 * array.nbytes + array[0].nbytes
    assert World.of(world) is world


def test_alone_a_mistake_is_one_line_and_anything_else_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def divide() -> float:
        return 1 / len("")

    def mistake() -> None:
        raise NumericsError("layer 3: 5 of 9 weights are NaN")

    world = World.alone()
    for wrapped in (False, True):
        with pytest.raises(SystemExit) as ended, world.guard():
            world.together(mistake, "test") if wrapped else mistake()
        assert ended.value.code == NumericsError.exit_code == 2
        assert capsys.readouterr().err == "hpcprune: error: layer 3: 5 of 9 weights are NaN\n"
        with pytest.raises(SystemExit) as ended, world.guard():
            world.together(divide, "test") if wrapped else divide()
        assert ended.value.code == 1
        text = capsys.readouterr().err
        assert text.startswith("hpcprune: failed:\nTraceback") and text.count("Traceback") == 1
        assert text.endswith("ZeroDivisionError: division by zero\n")


def test_alone_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, World.alone().guard():
        raise KeyboardInterrupt
    assert ended.value.code == 1
    assert capsys.readouterr().err == "hpcprune: interrupted\n"


def test_the_guard_lets_an_exit_and_a_success_pass() -> None:
    with World.alone().guard():
        pass
    with pytest.raises(SystemExit) as ended, World.alone().guard():
        sys.exit(75)
    assert ended.value.code == 75


def test_a_mistake_that_all_know_of_says_whose_and_what() -> None:
    def mistake() -> None:
        raise JobError("prune.sparsity: 1.2 is not in [0, 1)")

    with pytest.raises(AgreedError, match=r"sparsity: 1\.2 is not in") as caught:
        World.alone().together(mistake, "test")
    assert caught.value.rank == 0 and isinstance(caught.value.error, JobError)


# Dividing


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_parts_are_equal_to_one_and_cover_all_in_order(count: int, size: int) -> None:
    parts = [part_of_rank(count, world_of(rank, size)) for rank in range(size)]
    assert parts[0][0] == 0 and parts[-1][1] == count
    assert all(parts[rank][1] == parts[rank + 1][0] for rank in range(size - 1))
    sizes = {stop - start for start, stop in parts}
    assert sizes <= {count // size, -(-count // size)}


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([range(8)], [8]),
        ([range(8)] * 2, [4, 4]),
        ([range(8)] * 3, [2, 2, 2]),
        ([range(2)] * 5, [1] * 5),
        ([{0}, {1}], [1, 1]),
        ([range(4), range(4, 8)], [4, 4]),
        ([range(4)] * 2 + [range(4, 8)] * 2, [2] * 4),
        ([range(6)] * 3, [2] * 3),
        ([range(4), range(2)], [3, 1]),
    ],
    ids=[
        "alone",
        "2 of 8 cores",
        "3 of 8 cores",
        "more ranks than cores",
        "bound to a core",
        "bound to sockets",
        "2 a socket",
        "3 of 6 cores",
        "one inside the other",
    ],
)
def test_ranks_share_the_cores_that_they_may_run_on(
    monkeypatch: pytest.MonkeyPatch, cores: list[range | set[int]], threads: list[int]
) -> None:
    """Of all hosts, only the ranks of the own one count: these are ranks 5, 6, ... of 99."""
    host = {5 + number: set(own) for number, own in enumerate(cores)}
    monkeypatch.setattr(World, "_host", host)
    assert [threads_of_a_rank(world_of(rank, 99)) for rank in host] == threads
    assert [world_of(rank, 99).local_rank for rank in host] == list(range(len(cores)))
    assert world_of(5, 99).local_size == len(cores)


def test_alone_a_rank_takes_the_cores_that_it_may_run_on() -> None:
    assert threads_of_a_rank(World.alone()) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 3, 7], "0-3, 7"),
        ([1, 3, 5], "1, 3, 5"),
        ([0, 5, 6, 7, 9], "0, 5-7, 9"),
        (range(4096), "0-4095"),
    ],
)
def test_runs_of_numbers_are_shortened(numbers: list[int], text: str) -> None:
    assert as_ranges(numbers) == text


@given(st.sets(st.integers(0, 200)))
def test_ranges_can_be_read_back(numbers: set[int]) -> None:
    read: list[int] = []
    for part in filter(None, as_ranges(sorted(numbers)).split(", ")):
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)
