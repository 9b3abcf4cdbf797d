"""The exchange over torch.distributed: nccl where there is CUDA, gloo elsewhere.

The ranks find each other through MPI: rank 0 opens a store on a port that the system chooses and broadcasts where it
is, so that no port is agreed on beforehand and none is taken twice.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from hpcprune.errors import WorldError
from hpcprune.exchange import Gathering, Pending
from hpcprune.exchange.dtypes import WIRE_DTYPES
from hpcprune.world import World

__all__ = ["TorchExchange"]


@dataclass(frozen=True)
class _Work:
    work: dist.Work
    world: World
    what: str

    def wait(self) -> None:
        self.world.wait(self.work.is_completed, self.what)
        try:
            self.work.wait()
        except RuntimeError as error:
            raise WorldError(f"{self.what}: a rank is gone ({str(error).splitlines()[0]})") from error


@dataclass(frozen=True)
class _Gathered:
    work: _Work
    parts: list[Tensor]

    def wait(self) -> list[Tensor]:
        self.work.wait()
        return self.parts


class TorchExchange:
    """All-reduces over a torch.distributed process group that spans a world; there is one group a process."""

    def __init__(self, world: World, device: torch.device) -> None:
        """Form the group: collective over the world."""
        self.name = "nccl" if device.type == "cuda" else "gloo"
        self.bytes_sent = 0
        self.wire_dtypes = WIRE_DTYPES["torch"]
        self._world = world
        one_host = world.local_size == world.size
        if one_host and world.size > 1:
            # A host's own name may resolve slowly, or not at all; ranks of one host do not need it.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        timeout = timedelta(seconds=world.timeout)
        address, port, store = "", 0, None
        if world.rank == 0:
            address = "127.0.0.1" if one_host else _own_address()
            store = TCPStore(address, 0, world.size, True, timeout, wait_for_workers=False)
            port = store.port
        address, port = world.bcast((address, port), "exchange: rendezvous")
        if store is None:
            store = TCPStore(address, port, world.size, False, timeout, wait_for_workers=False)
        dist.init_process_group(self.name, store=store, rank=world.rank, world_size=world.size, timeout=timeout)

    def begin(self, buffer: Tensor, what: str) -> Pending:
        self.bytes_sent += buffer.nbytes
        work = dist.all_reduce(buffer, async_op=True)
        assert work is not None
        return _Work(work, self._world, what)

    def gather(self, buffer: Tensor, what: str) -> Gathering:
        self.bytes_sent += buffer.nbytes
        parts = [torch.empty_like(buffer) for _ in range(self._world.size)]
        work = dist.all_gather(parts, buffer, async_op=True)
        assert work is not None
        return _Gathered(_Work(work, self._world, what), parts)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _own_address() -> str:
    """An address of this host that other hosts can reach: the one its name resolves to, unless that is a loopback."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel only picks the interface it would use
        return str(probe.getsockname()[0])
    return socket.gethostname()
