"""Top-k: only the largest of the survivors' gradients travel, and what stays behind is added to later ones.

Deep Gradient Compression (Lin et al. 2018, https://arxiv.org/abs/1712.01887): each rank keeps a velocity and a residual
for every weight. The velocity takes the gradient in as momentum does, the residual sums velocities up; the residual's
largest elements travel and both are cleared there (momentum correction and factor masking). A gradient is clipped on
each rank before it is taken in, to the threshold over the root of the number of ranks. The share that travels may fall
from everything in a warm-up. Indices address the packed vector, and what travels is the exact k largest: the threshold
that prunes weights selects gradients as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpcprune.exchange import Exchange, Gathering, Pending
from hpcprune.exchange.wire import Wire
from hpcprune.masks import Masks
from hpcprune.survivors import Survivors
from hpcprune.threshold import select_survivors
from hpcprune.world import World

if TYPE_CHECKING:
    from hpcprune.buckets import Bucket

__all__ = ["TopK"]

DENSE_ABOVE = 0.5  # a value and its index are two words: above this share the whole bucket is shorter


@dataclass(frozen=True)
class _Sum:
    places: Gathering
    values: Gathering
    gradient: Tensor

    def wait(self) -> None:
        self.gradient.zero_()
        # Rank after rank on every rank, so that all add in the same order and stay the same bit for bit.
        for places, values in zip(self.places.wait(), self.values.wait(), strict=True):
            self.gradient.index_add_(0, places, values.to(self.gradient.dtype))


class TopK:
    """Sends the largest elements of buckets over a backend.

    wire: the dtype in which they travel, None for their own; what rounding takes off stays behind too. share: of a
    bucket's elements that travel; falls from 1 over `warmup` steps. momentum: the optimizer's, which must then have
    none itself. clip_norm: of the whole gradient, or None.
    """

    def __init__(
        self,
        exchange: Exchange,
        survivors: Survivors,
        ranks: int,
        *,
        wire: torch.dtype | None = None,
        share: float,
        warmup: int = 0,
        momentum: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self._step = 0
        self.whole_first = clip_norm is not None
        self._exchange, self._survivors, self._wire = exchange, survivors, Wire(exchange, wire)
        self._share, self._warmup, self._momentum = share, warmup, momentum
        self._limit = math.inf if clip_norm is None else clip_norm / math.sqrt(ranks)
        self._velocity = {dtype: torch.zeros_like(packed.data) for dtype, packed in survivors.packed.items()}
        self._residual = {dtype: torch.zeros_like(packed.data) for dtype, packed in survivors.packed.items()}

    def share(self) -> float:
        """The share that travels in this step: exponentially from 1 to `share` in the warm-up."""
        return float(self._share ** min(1.0, self._step / (self._warmup + 1) if self._warmup else 1.0))

    def begin_step(self, number: int) -> None:
        self._step = number

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        """Clip this rank's own gradient."""
        norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for gradient in gradients:
            gradient.mul_(torch.clamp(self._limit / (norm + 1e-6), max=1.0).to(gradient.dtype))

    @torch.no_grad()
    def begin(self, gradient: Tensor, bucket: Bucket, what: str) -> Pending:
        velocity = self._velocity[bucket.dtype][bucket.start : bucket.stop]
        residual = self._residual[bucket.dtype][bucket.start : bucket.stop]
        velocity.mul_(self._momentum).add_(gradient)
        residual.add_(velocity)
        count = max(1, round(self.share() * len(gradient)))
        if count > DENSE_ABOVE * len(gradient):
            gradient.copy_(residual)
            velocity.zero_()
            residual.sub_(self._wire.cut(residual))
            return self._wire.begin(gradient, bucket, what)
        names = [[f"the gradient of {bucket.segments[0].name} and those behind it"]]
        groups = [[torch.nan_to_num(residual).cpu()]]
        [(_, [bits])] = select_survivors(groups, [len(gradient) - count], World.alone(), absolute=True, names=names)
        chosen = np.flatnonzero(np.unpackbits(bits, count=len(gradient), bitorder="little"))
        places = torch.from_numpy(chosen.astype(np.int32)).to(gradient.device)
        values = residual.index_select(0, places)
        sent = self._wire.cut(values)
        velocity.index_fill_(0, places.long(), 0)
        residual.index_copy_(0, places.long(), values - sent)
        return _Sum(self._exchange.gather(places, what), self._exchange.gather(sent, what), gradient)

    def check_sums(self, gradients: Sequence[Tensor], what: str) -> None:
        self._wire.check_sums(gradients, what)

    def own_state(self) -> dict[str, Tensor]:
        """This rank's velocities and residuals, under "<parameter>/velocity" and "<parameter>/residual"."""
        return {
            f"{segment.name}/{key}": vectors[segment.dtype][segment.start : segment.stop]
            for segment in self._survivors
            for key, vectors in (("velocity", self._velocity), ("residual", self._residual))
        }

    def load_own_state(self, tensors: Mapping[str, Tensor], masks: Masks | None) -> None:
        """Take what `own_state` gave under `masks`, of this round or an earlier one."""
        own = self.own_state()
        for segment in self._survivors:
            for name in (f"{segment.name}/velocity", f"{segment.name}/residual"):
                self._survivors.repack(segment, tensors[name], masks, out=own[name])
