"""Every backend of the exchange on real ranks: sums against numpy's, gathering, and ranks that are missing or die.

Run by mpirun this file is the program of one rank: `test_exchange_ranks.py CASE FOLDER [BACKEND]`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from hpcprune.errors import JobError, WorldError
from hpcprune.exchange import Exchange
from hpcprune.exchange.choose import open_exchange
from hpcprune.world import World
from tests.conftest import Launch

COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.Get_rank(), COMM.Get_size()
WITHOUT_HOROVOD = importlib.util.find_spec("horovod") is None and "HPCPRUNE_NO_HOROVOD" in os.environ
BACKENDS = ("torch", "mpi", "horovod")[: 2 if WITHOUT_HOROVOD else 3]
NAMES = {"torch": "gloo", "mpi": "mpi", "horovod": "horovod"}
SHORT, BFLOAT = torch.float16, torch.bfloat16
# Horovod's threads wait for each other by spinning, which takes minutes where other tests have the cores.
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}
LARGE = 10_000_000  # of float32: 40 MB, several of the slices in which mpi sends


def part(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings. 16-bit ones are whole and small, so that their sum over 3 ranks is exact."""
    generator = torch.Generator().manual_seed(1000 * rank + length)
    if dtype.itemsize == 2 or not dtype.is_floating_point:
        return torch.randint(-40, 40, (length,), generator=generator).to(dtype)
    return torch.randn(length, generator=generator, dtype=dtype)


def in_order(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """The same one on every rank, which a set's is not."""
    return sorted(dtypes, key=str)


def total(length: int, dtype: torch.dtype) -> np.ndarray:
    return np.sum([part(rank, length, dtype).double().numpy() for rank in range(RANKS)], axis=0)


def check_sum(buffer: Tensor, length: int, dtype: torch.dtype) -> None:
    """To the last bits; and they are the same on every rank, or the ranks' weights would drift apart."""
    rounding = {torch.float32: 1e-6, torch.float64: 1e-15}.get(dtype, 0)
    np.testing.assert_allclose(buffer.double().numpy(), total(length, dtype), rtol=rounding, atol=rounding)
    assert len(set(COMM.allgather(zlib.crc32(buffer.view(torch.uint8).numpy())))) == 1


# What a backend must do


def check_sums(exchange: Exchange) -> None:
    for dtype in in_order(exchange.wire_dtypes):
        for length in (0, 1, 7, 1001, LARGE if dtype == torch.float32 else 4096):
            buffer = part(RANK, length, dtype)
            sent = exchange.bytes_sent
            exchange.begin(buffer, "test").wait()
            check_sum(buffer, length, dtype)
            assert exchange.bytes_sent - sent == length * dtype.itemsize


def check_many_in_flight(exchange: Exchange) -> None:
    """More than a few alike, which only their order tells apart, waited for in another order on each rank."""
    dtypes = in_order(exchange.wire_dtypes)
    shapes = [(100 + place % 2 * (place // 6), dtypes[place % len(dtypes)]) for place in range(60)]
    shapes += [(50, torch.float32)] * 40
    buffers = [part(RANK, length, dtype) + place for place, (length, dtype) in enumerate(shapes)]
    pending = [exchange.begin(buffer, "test") for buffer in buffers]
    for place in np.random.default_rng(RANK).permutation(len(pending)):
        pending[place].wait()
    for place, ((length, dtype), buffer) in enumerate(zip(shapes, buffers, strict=True)):
        expected = np.sum([(part(rank, length, dtype) + place).double().numpy() for rank in range(RANKS)], axis=0)
        np.testing.assert_allclose(buffer.double().numpy(), expected, rtol=0 if dtype.itemsize == 2 else 1e-5)


def check_part_of_a_buffer(exchange: Exchange) -> None:
    """Buckets are parts of one vector; their neighbours stay as they are."""
    whole = torch.arange(300.0)
    pending = [exchange.begin(whole[start : start + 100], "test") for start in (0, 200)]
    for each in pending:
        each.wait()
    expected = np.arange(300.0)
    expected[:100] *= RANKS
    expected[200:] *= RANKS
    np.testing.assert_array_equal(whole.numpy(), expected)


def check_gathering(exchange: Exchange) -> None:
    """Among sums, as top-k sends its indices and values."""
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64, SHORT, BFLOAT):
        for length in (0, 1, 1001, LARGE // 4 if dtype == torch.int64 else 5):
            buffer, beside = part(RANK, length, dtype), part(RANK, 7, torch.float32)
            gathering, pending = exchange.gather(buffer, "test"), exchange.begin(beside, "test")
            found = gathering.wait()
            pending.wait()
            assert len(found) == RANKS
            for rank, its in enumerate(found):
                assert its.dtype == dtype and torch.equal(its, part(rank, length, dtype))
            assert torch.equal(buffer, part(RANK, length, dtype))
            check_sum(beside, 7, torch.float32)


def check_overlap(exchange: Exchange) -> None:
    """The sum comes while the caller computes and asks for nothing."""
    buffer = torch.ones(LARGE)
    COMM.Barrier()
    pending = exchange.begin(buffer, "test")
    matrix, limit = torch.randn(200, 200), time.monotonic() + 30
    while float(buffer[-1]) != RANKS and time.monotonic() < limit:
        torch.mm(matrix, matrix)
    assert float(buffer[-1]) == RANKS
    pending.wait()
    assert bool((buffer == RANKS).all())


def check_refusals(exchange: Exchange) -> None:
    for dtype in {SHORT, BFLOAT} - exchange.wire_dtypes:
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(JobError, match=f"retrain.exchange: {exchange.name} cannot sum gradients of {name}, only"):
            exchange.begin(torch.ones(3, dtype=dtype), "test")


def bits(exchange: Exchange) -> dict[torch.dtype, bytes]:
    """Of sums that are not exact."""
    found = {}
    for dtype in in_order(exchange.wire_dtypes):
        generator = torch.Generator().manual_seed(RANK)
        buffer = torch.randn(50_001, generator=generator, dtype=torch.float64).to(dtype)
        exchange.begin(buffer, "test").wait()
        found[dtype] = buffer.view(torch.uint8).numpy().tobytes()
    return found


def works(folder: Path) -> None:
    # Of half of the ranks too: none of the backends may take the ranks for those that were launched.
    for comm in (COMM, COMM.Split(RANK % 2, RANK)):
        found = []
        for name in BACKENDS:
            world = World.of(comm, timeout=60)
            exchange, why = open_exchange(name, world, torch.device("cpu"), {torch.float32})
            assert why == f"gradients are exchanged over {NAMES[name]}, as retrain.exchange says"
            if comm is COMM:
                for check in (check_sums, check_many_in_flight, check_part_of_a_buffer, check_gathering, check_overlap):
                    check(exchange)
                check_refusals(exchange)
                found.append(bits(exchange))
            else:
                buffer = torch.full((5,), float(RANK))
                exchange.begin(buffer, "test").wait()
                assert buffer.tolist() == [sum(rank for rank in range(RANKS) if rank % 2 == RANK % 2)] * 5
            exchange.close()
        if RANKS <= 2:
            assert all(each[dtype] == found[0][dtype] for each in found for dtype in each)
    assert not MPI.Is_finalized()
    (folder / f"done-{RANK}").touch()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_backends_sum_and_gather(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, "works", tmp_path, timeout=120, env=YIELD)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("done-*"))) == ranks


def test_horovod_is_there() -> None:
    """Horovod's part of the tests is left out only where that is asked for."""
    if WITHOUT_HOROVOD:
        pytest.skip("HPCPRUNE_NO_HOROVOD is set and Horovod is not installed")
    assert importlib.util.find_spec("horovod"), "sh scripts/install-horovod.sh, or set HPCPRUNE_NO_HOROVOD"


# Ranks that are missing, or die


def missing(folder: Path) -> None:
    """Rank 1 has opened the exchange but begins nothing; one backend after the other, each on ranks of its own."""
    for name in BACKENDS:
        world = World(COMM.Dup(), timeout=1.5)
        exchange, _ = open_exchange(name, world, torch.device("cpu"), {torch.float32})
        if RANK == 1:
            time.sleep(2.5)
        else:
            with pytest.raises(WorldError, match=r"step 3: waited 1.5 s for rank 1 \(of 3\)\. Look at what"):
                exchange.begin(torch.ones(7), "step 3").wait()
        COMM.Barrier()
    (folder / f"done-{RANK}").touch()
    COMM.Barrier()
    COMM.Abort(7)  # not even Horovod could end in peace now


def test_a_rank_that_begins_nothing_is_named(mpirun: Launch, tmp_path: Path) -> None:
    done = mpirun(3, __file__, "missing", tmp_path, timeout=60, env=YIELD)
    assert done.returncode == 7, done.stderr
    assert len(list(tmp_path.glob("done-*"))) == 3


def dies(folder: Path, name: str) -> None:
    exchange, _ = open_exchange(name, World.of(timeout=60), torch.device("cpu"), {torch.float32})
    (folder / str(os.getpid())).touch()
    COMM.Barrier()
    if RANK == 1:
        exchange.begin(torch.ones(LARGE), "test")
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        exchange.begin(torch.ones(LARGE), "test").wait()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_rank_that_dies_ends_the_others_within_10_seconds(mpirun: Launch, tmp_path: Path, name: str) -> None:
    done = mpirun(3, __file__, "dies", tmp_path, name, timeout=60, env=YIELD)
    assert done.returncode != 0
    processes = [Path("/proc", path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 3
    limit = max(path.stat().st_mtime for path in tmp_path.iterdir()) + 10
    while any(path.exists() for path in processes) and time.time() < limit:
        time.sleep(0.01)
    assert time.time() < limit


if __name__ == "__main__":
    torch.set_num_threads(1)
    with World.of().guard():
        globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
