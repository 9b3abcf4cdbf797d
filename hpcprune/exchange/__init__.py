"""The exchange: all-reduces of packed gradients over the ranks.

Backends differ in what carries the bytes; to the training loop they are one small protocol: begin an all-reduce of a
buffer, in place, and wait for it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Exchange", "Gathering", "Pending"]


class Pending(Protocol):
    """An all-reduce under way."""

    def wait(self) -> None:
        """Return when the buffer holds the sum over all ranks."""
        ...


class Gathering(Protocol):
    """An all-gather under way."""

    def wait(self) -> list[Tensor]:
        """Every rank's buffer, in rank order."""
        ...


class Exchange(Protocol):
    """A backend. `bytes_sent` counts what this rank has passed to all-reduces."""

    name: str
    bytes_sent: int

    def begin(self, buffer: Tensor, what: str) -> Pending:
        """Start summing a buffer over all ranks, in place; `what` names it in the message when ranks are missing."""
        ...

    def gather(self, buffer: Tensor, what: str) -> Gathering:
        """Start to bring every rank's buffer, all of one length and dtype, to every rank."""
        ...

    def close(self) -> None:
        """Leave the group of ranks."""
        ...
