"""The exchange: all-reduces of packed gradients over the ranks.

Backends differ in what carries the bytes; to the training loop they are one small protocol: begin an all-reduce of a
buffer, in place, and wait for it. `choose.open_exchange` opens one.

Every rank begins the same operations in the same order, on contiguous buffers of the same length and dtype; what has
begun may be waited for in any order, and must be before `close`. A backend carries on while the caller computes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Exchange", "Gathering", "Pending"]


class Pending(Protocol):
    """An all-reduce under way."""

    def wait(self) -> None:
        """Return when the buffer holds the sum over all ranks.

        Raises:
            WorldError: ranks are missing, which it names, or gone.
        """
        ...


class Gathering(Protocol):
    """An all-gather under way."""

    def wait(self) -> list[Tensor]:
        """Every rank's buffer, in rank order, as new tensors. Raises what `Pending.wait` does."""
        ...


class Exchange(Protocol):
    """A backend.

    name: gloo, nccl, mpi or horovod. bytes_sent: what this rank has passed to collectives. wire_dtypes: what `begin`
    can sum.
    """

    name: str
    bytes_sent: int
    wire_dtypes: frozenset[torch.dtype]

    def begin(self, buffer: Tensor, what: str) -> Pending:
        """Start summing a buffer over all ranks, in place; `what` names it in the message when ranks are missing."""
        ...

    def gather(self, buffer: Tensor, what: str) -> Gathering:
        """Start to bring every rank's buffer to every rank: one-dimensional, of 16-bit or wider numbers or uint8."""
        ...

    def close(self) -> None:
        """Leave the group of ranks."""
        ...
