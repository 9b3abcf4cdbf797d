"""The exchange over Horovod, for machines whose MPI or fabric Horovod is set up for.

Horovod has a thread of its own, which looks for new buffers once a cycle and has the ranks agree on those that all of
them have begun. It finds counterparts by name, not by order. While it waits for other ranks it spins: where backward
needs all cores, OMPI_MCA_mpi_yield_when_idle=1 makes it let go of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from mpi4py import MPI  # it starts MPI and so ends it too: what Horovod starts it ends in `close`, under our feet
from torch import Tensor

from hpcprune.errors import WorldError
from hpcprune.exchange import Gathering, Pending
from hpcprune.exchange.dtypes import WIRE_DTYPES, refuse_dtype
from hpcprune.exchange.host_copy import HostCopy
from hpcprune.world import World

__all__ = ["HorovodExchange"]

# Milliseconds. With Horovod's own 5 a vote of a few bytes took 10 ms, with 1 it takes 2; less gained nothing, and
# between steps the thread takes the more of a core the shorter its cycle is.
CYCLE = "1"
# Names of buffers of one length and dtype. Horovod remembers what the ranks agreed on for 1024 names, so names come
# back; a name cannot come back while its last buffer is on its way, so there are several.
NAMES = 16


@dataclass
class _Operation:
    """What Horovod knows under a number until it is finished. `result` is there from then until it is taken."""

    number: int
    world: World
    what: str
    done: bool = False
    result: Tensor | None = None

    def finish(self) -> None:
        self.world.wait(lambda: self.done or hvd.poll(self.number), self.what)
        if not self.done:
            self.done = True
            try:
                self.result = hvd.synchronize(self.number)
            except HorovodInternalError as error:
                raise WorldError(f"{self.what}: Horovod failed ({error})") from error

    def take(self) -> Tensor:
        """The result, which is not kept: the exchange remembers operations, but must not hold on to their memory."""
        self.finish()
        assert self.result is not None, "an operation is waited for once"
        result, self.result = self.result, None
        return result


@dataclass(frozen=True)
class _Sum:
    operation: _Operation
    copy: HostCopy

    def wait(self) -> None:
        self.operation.take()
        self.copy.give_back()


@dataclass(frozen=True)
class _Gathered:
    operation: _Operation
    buffer: Tensor
    ranks: int

    def wait(self) -> list[Tensor]:
        received = self.operation.take().view(self.buffer.dtype).to(self.buffer.device)
        return list(received.view(self.ranks, -1))


class HorovodExchange:
    """All-reduces by Horovod over the world's communicator; there is one Horovod a process."""

    def __init__(self, world: World) -> None:
        """Start Horovod: collective over the world."""
        self.name = "horovod"
        self.bytes_sent = 0
        self.wire_dtypes = WIRE_DTYPES["horovod"]
        self._world = world
        self._begun: Counter[str] = Counter()
        self._latest: dict[str, _Operation] = {}  # of each name
        os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE)
        world.barrier("exchange: starting Horovod")  # since Horovod's own start has no time limit
        try:
            hvd.init(world.comm or MPI.COMM_SELF)
        except ValueError as error:
            raise WorldError(
                f"Horovod does not start ({error}); build it for this MPI: sh scripts/install-horovod.sh"
            ) from error

    def begin(self, buffer: Tensor, what: str) -> Pending:
        refuse_dtype("horovod", buffer.dtype)
        copy = HostCopy(buffer)
        return _Sum(self._start("sum", buffer, what, lambda name: _sum(copy, name)), copy)

    def gather(self, buffer: Tensor, what: str) -> Gathering:
        copy = HostCopy(buffer)
        return _Gathered(
            self._start("gather", buffer, what, lambda name: _gather(copy, name)), buffer, self._world.size
        )

    def close(self) -> None:
        hvd.shutdown()

    def _start(self, kind: str, buffer: Tensor, what: str, start: Callable[[str], int]) -> _Operation:
        self.bytes_sent += buffer.nbytes
        alike = f"{kind}.{buffer.dtype}.{buffer.numel()}"
        # Counted over all that begin and not those under way: the latter may differ between ranks, names must not.
        name = f"{alike}.{self._begun[alike] % NAMES}"
        self._begun[alike] += 1
        if name in self._latest:
            self._latest[name].finish()
        operation = self._latest[name] = _Operation(start(name), self._world, what)
        return operation


def _sum(copy: HostCopy, name: str) -> int:
    number: int = hvd.allreduce_async_(copy.ready(), name=name, op=hvd.Sum)
    return number


def _gather(copy: HostCopy, name: str) -> int:
    # As bytes, since Horovod does not know all dtypes.
    number: int = hvd.allgather_async(copy.ready().view(torch.uint8), name=name)
    return number
