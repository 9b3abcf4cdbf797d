"""Wire: a bucket of gradients summed whole, as it is or in a 16-bit dtype while it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hpcprune.errors import GOING_ON, NumericsError
from hpcprune.exchange import Exchange, Pending

if TYPE_CHECKING:
    from hpcprune.buckets import Bucket
    from hpcprune.training import Retraining

__all__ = ["Wire", "travelling_dtypes", "wire_dtype"]


def wire_dtype(retrain: Retraining) -> torch.dtype | None:
    """The dtype to which a job's gradients are cut down to travel; None if they travel as they are."""
    dtype: torch.dtype = getattr(torch, retrain.wire)
    return dtype if dtype.itemsize < torch.float32.itemsize else None


def travelling_dtypes(model: nn.Module, retrain: Retraining) -> set[torch.dtype]:
    """The dtypes in which a job's gradients travel, in its dense training and in retraining."""
    own = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    narrow = wire_dtype(retrain)
    return own | {narrow} if narrow is not None else own


@dataclass(frozen=True)
class _Cast:
    pending: Pending
    buffer: Tensor
    gradient: Tensor

    def wait(self) -> None:
        self.pending.wait()
        self.gradient.copy_(self.buffer)


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
        buffer = self.cut(gradient)
        pending = self._exchange.begin(buffer, what)
        return pending if buffer is gradient else _Cast(pending, buffer, gradient)

    def cut(self, values: Tensor) -> Tensor:
        """Values as they travel; themselves if their dtype is no wider than the wire's."""
        if self._dtype is None or self._dtype.itemsize >= values.dtype.itemsize:
            return values
        return values.to(self._dtype)

    def check_sums(self, gradients: Sequence[Tensor], what: str) -> None:
        if self._dtype is None or all(torch.isfinite(each.sum(dtype=torch.float64)) for each in gradients):
            return
        wider = "bfloat16 or float32" if self._dtype == torch.float16 else "float32"
        raise NumericsError(
            f"{what}: a sum over the ranks does not fit {str(self._dtype).removeprefix('torch.')}, in which gradients "
            f"travel; write wire: {wider}. {GOING_ON}"
        )
