"""A buffer as libraries see it that know the host's memory alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A buffer itself where it lies in the host's memory, else a copy of it in pinned memory, under way at once."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._host = buffer.detach(), buffer.detach()
        self._copied: torch.cuda.Event | None = None
        if buffer.device.type == "cuda":
            self._host = torch.empty_like(self._host, device="cpu", pin_memory=True)
            self._host.copy_(self._buffer, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(buffer.device))

    def ready(self) -> Tensor:
        """The buffer in the host's memory, once its values are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host

    def give_back(self) -> None:
        """Put what is in the host's memory now into the buffer."""
        if self._copied is not None:
            self._buffer.copy_(self._host, non_blocking=True)
