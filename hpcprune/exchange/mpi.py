"""The exchange over MPI: mpi4py, and a thread of ours that carries on while backward computes.

MPI moves a non-blocking collective on only inside MPI calls, so somebody must call. The thread asks and naps in turns.
Blocking all-reduces would spin instead: while a rank waits for a late one they took half of a core from backward,
napping takes 3 % of it (2 ranks on 2 cores). Once all are there, 100 MB take as long as with gloo.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcprune.errors import JobError, WorldError
from hpcprune.exchange import Gathering, Pending
from hpcprune.exchange.dtypes import WIRE_DTYPES, refuse_dtype
from hpcprune.exchange.host_copy import HostCopy
from hpcprune.world import World

__all__ = ["MpiExchange", "refuse_few_threads"]

# Bytes of one collective: for 64 MB and more Open MPI took twice as long, since its working memory, as large as what is
# sent, came fresh from the system each time.
SLICE = 16_000_000
NAP = 1 / 50  # of the time that a collective has taken so far, within these limits in seconds
SHORTEST_NAP = 1e-4
LONGEST_NAP = 1e-3
GLANCE = 1e-4  # seconds that the caller sleeps between looks at what the thread does


@dataclass
class _Task:
    """What the thread does for one buffer."""

    action: Callable[[], None]
    world: World
    what: str
    done: Event = field(default_factory=Event)
    error: Exception | None = None

    def run(self) -> None:
        try:
            self.action()
        except Exception as error:
            self.error = error
        self.done.set()

    def wait(self) -> None:
        # Sleeping inside the look, since a caller that looks without a pause keeps Python from the thread.
        self.world.wait(lambda: self.done.wait(GLANCE), self.what)
        if isinstance(self.error, MPI.Exception):
            raise WorldError(f"{self.what}: MPI failed ({self.error})") from self.error
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class _Sum:
    task: _Task
    copy: HostCopy

    def wait(self) -> None:
        self.task.wait()
        self.copy.give_back()


@dataclass(frozen=True)
class _Gathered:
    task: _Task
    received: Tensor
    device: torch.device

    def wait(self) -> list[Tensor]:
        self.task.wait()
        return list(self.received.to(self.device))


class MpiExchange:
    """All-reduces over a communicator of their own, one after the other in the order in which they begin."""

    def __init__(self, world: World) -> None:
        """Duplicate the world's communicator: collective over the world."""
        self.name = "mpi"
        self.bytes_sent = 0
        self.wire_dtypes = WIRE_DTYPES["mpi"]
        self._world = world
        self._comm: MPI.Intracomm | None = None
        if world.comm is not None:
            refuse_few_threads()
            self._comm, request = world.comm.Idup()
            world.wait(request.Test, "exchange: duplicating the communicator")
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._last: _Task | None = None
        self._thread = Thread(target=self._work, name="hpcprune-exchange", daemon=True)
        self._thread.start()

    def begin(self, buffer: Tensor, what: str) -> Pending:
        refuse_dtype("mpi", buffer.dtype)
        copy = HostCopy(buffer)
        return _Sum(self._start(lambda: self._sum(copy), buffer, what), copy)

    def gather(self, buffer: Tensor, what: str) -> Gathering:
        copy = HostCopy(buffer)
        received = torch.empty((self._world.size, len(buffer)), dtype=buffer.dtype)
        return _Gathered(self._start(lambda: self._gather(copy, received), buffer, what), received, buffer.device)

    def close(self) -> None:
        self._tasks.put(None)
        if self._last is not None and not self._last.done.is_set():
            return  # the thread keeps the buffers into which MPI may still write, and ends with the process
        self._thread.join()
        if self._comm is not None:
            self._comm.Free()

    def _start(self, action: Callable[[], None], buffer: Tensor, what: str) -> _Task:
        self.bytes_sent += buffer.nbytes
        self._last = _Task(action, self._world, what)
        self._tasks.put(self._last)
        return self._last

    # The thread

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()

    def _sum(self, copy: HostCopy) -> None:
        values = copy.ready().view(-1).numpy()
        if self._comm is None:
            return
        step = SLICE // values.itemsize
        for start in range(0, len(values), step):
            _finish(self._comm.Iallreduce(MPI.IN_PLACE, values[start : start + step]))

    def _gather(self, copy: HostCopy, received: Tensor) -> None:
        sent = copy.ready()
        if self._comm is None:
            received[0].copy_(sent)
            return
        own, all_of_them = sent.view(torch.uint8).numpy(), received.view(torch.uint8).numpy()
        step = max(SLICE // len(received), 1)
        for start in range(0, len(own), step):
            piece = own[start : start + step]
            pieces = np.empty((len(received), len(piece)), np.uint8)
            _finish(self._comm.Iallgather(piece, pieces))
            all_of_them[:, start : start + step] = pieces


def refuse_few_threads() -> None:
    """Raise JobError if MPI was started so that only one thread may call it."""
    levels = {
        MPI.THREAD_SINGLE: "THREAD_SINGLE",
        MPI.THREAD_FUNNELED: "THREAD_FUNNELED",
        MPI.THREAD_SERIALIZED: "THREAD_SERIALIZED",
    }
    level = levels.get(MPI.Query_thread())
    if level is not None:
        raise JobError(
            f"retrain.exchange: mpi needs THREAD_MULTIPLE, since a thread of its own calls MPI, but MPI was started "
            f"with {level}; write exchange: torch, or have MPI started with more (MPI4PY_RC_THREAD_LEVEL, your MPI's "
            "build)"
        )


def _finish(request: MPI.Request) -> None:
    start = time.monotonic()
    while not request.Test():
        time.sleep(min(max((time.monotonic() - start) * NAP, SHORTEST_NAP), LONGEST_NAP))
