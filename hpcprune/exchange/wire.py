"""Wire: a bucket of gradients summed whole, as it is or in a 16-bit dtype while it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpcprune.errors import NumericsError
from hpcprune.exchange import Exchange, Pending

if TYPE_CHECKING:
    from hpcprune.buckets import Bucket
    from hpcprune.training import Retraining

__all__ = ["Wire", "wire_dtype"]


def wire_dtype(retrain: Retraining) -> torch.dtype | None:
    """The dtype to which a job's gradients are cut down to travel; None if they travel as they are."""
    dtype: torch.dtype = getattr(torch, retrain.wire)
    return dtype if dtype.itemsize < torch.float32.itemsize else None


@dataclass(frozen=True)
class _Cast:
    pending: Pending
    buffer: Tensor
    gradient: Tensor
    what: str

    def wait(self) -> None:
        self.pending.wait()
        self.gradient.copy_(self.buffer)
        if not torch.isfinite(self.buffer.sum(dtype=torch.float32)):
            name = str(self.buffer.dtype).removeprefix("torch.")
            raise NumericsError(
                f"{self.what}: the sum over the ranks does not fit {name}, in which gradients travel; write wire: "
                "bfloat16 or float32, or clip the gradients (clip_norm)"
            )


class Wire:
    """Sends buckets over a backend in `dtype`, or each in its own dtype if that is narrower or `dtype` is None."""

    whole_first = False

    def __init__(self, exchange: Exchange, dtype: torch.dtype | None) -> None:
        self._exchange, self._dtype = exchange, dtype

    def begin_step(self, number: int) -> None:
        pass

    def own_state(self) -> dict[str, Tensor]:
        return {}

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        pass

    def begin(self, gradient: Tensor, bucket: Bucket, what: str) -> Pending:
        if self._dtype is None or self._dtype.itemsize >= gradient.dtype.itemsize:
            return self._exchange.begin(gradient, what)
        buffer = gradient.to(self._dtype)
        return _Cast(self._exchange.begin(buffer, what), buffer, gradient, what)
