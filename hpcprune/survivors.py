"""Survivors: the weights that are left, as one packed vector a dtype, which is what is trained.

The forward and backward passes use the model's dense parameters. The survivors' gradients are gathered into a packed
vector as backward finishes them, that vector is all-reduced in buckets (no indices travel: every rank has the same
masks), the optimizer steps on packed weights, and those are scattered into the dense parameters. A pruned weight has no
gradient, no momentum and no place to be written to, so it stays zero whatever the optimizer does.

Parameters that are not prunable (biases, norms) ride in the same vectors, whole.

Singh and Bhatele, "Exploiting Sparsity in Pruned Neural Networks to Optimize Large Model Training", 2023,
https://arxiv.org/abs/2302.05045
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hpcprune.errors import TaskError
from hpcprune.masks import Masks
from hpcprune.packing import Masked, Packed, Packing, Whole, dense_of

__all__ = ["Segment", "Survivors"]


@dataclass(frozen=True)
class Segment:
    """A parameter's part of its dtype's packed vector: the elements [start, stop).

    leaf: these elements as a tensor of their own, where the layer computes with the survivors themselves instead of the
    dense parameter.
    """

    name: str
    parameter: nn.Parameter
    packing: Packing
    start: int
    stop: int
    leaf: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """What backward gives a gradient."""
        return self.parameter if self.leaf is None else self.leaf

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def unpack(self, weights: Tensor) -> None:
        """Write its part of the packed vector to the dense parameter; pruned weights are not touched."""
        self.packing.scatter(weights.detach(), self.parameter.data.view(-1))


class Survivors:
    """The packed trainable weights of a model under masks.

    `packed` maps a dtype to the packed weights, a parameter for an optimizer; its `.grad` is the packed gradient.
    `segments` maps a dtype to the parts of its vector, in order. A parameter of which nothing is pruned becomes a view
    of the packed vector, so that it need not be copied back after a step.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks | None = None,
        *,
        order: Sequence[str] = (),
        packing: bool = True,
        sparse: Collection[str] = (),
    ) -> None:
        """Pack the trainable weights of `model`; without masks, all of them. Pruned weights are set to zero.

        Args:
            order: names of parameters in the order in which backward finishes them, which becomes the vectors'; those
                that are not named come after, the last registered first, as backward does it in most models.
            packing: False keeps pruned weights in the vectors as zeros, for densities at which packing does not pay.
            sparse: names of pruned parameters whose layers compute with a leaf of their segment (sparse/training.py).
        """
        if masks is not None:
            masks.apply(model)
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        names = [name for name in order if name in trainable]
        names += [name for name in reversed(trainable) if name not in set(order)]
        self.segments: dict[torch.dtype, list[Segment]] = {}
        for name in names:
            parameter = trainable[name]
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
            segments = self.segments.setdefault(parameter.dtype, [])
            start = segments[-1].stop if segments else 0
            how = _packing(name, parameter, masks, packing)
            segments.append(Segment(name, parameter, how, start, start + how.length))
        self.packed: dict[torch.dtype, nn.Parameter] = {}
        for dtype, segments in self.segments.items():
            device = segments[0].parameter.device
            self.packed[dtype] = nn.Parameter(torch.empty(segments[-1].stop, dtype=dtype, device=device))
            self.packed[dtype].grad = torch.zeros_like(self.packed[dtype])
        with torch.no_grad():
            for segment in self:
                weights = self.weights(segment)
                segment.packing.gather(segment.parameter.data.view(-1), weights)
                if segment.packing.whole:
                    segment.parameter.data = weights.view(segment.parameter.shape)
        for segments in self.segments.values():
            for i, segment in enumerate(segments):
                if segment.name in sparse:
                    leaf = self.weights(segment).detach().requires_grad_()
                    segments[i] = replace(segment, leaf=leaf)

    def __iter__(self) -> Iterator[Segment]:
        """All segments, dtype after dtype, in the vectors' order."""
        for segments in self.segments.values():
            yield from segments

    def __len__(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.packed.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the gradients if nothing were pruned."""
        return sum(segment.parameter.numel() * segment.parameter.element_size() for segment in self)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed gradients."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.packed.values())

    def parameters(self) -> list[nn.Parameter]:
        """The packed vectors, for an optimizer."""
        return list(self.packed.values())

    def gradients(self) -> list[Tensor]:
        """The packed gradients, in the order of `parameters`."""
        return [parameter.grad for parameter in self.packed.values() if parameter.grad is not None]

    def weights(self, segment: Segment) -> Tensor:
        """A segment's weights, a view of the packed vector."""
        return self.packed[segment.dtype].data[segment.start : segment.stop]

    def gradient(self, segment: Segment) -> Tensor:
        """A segment's gradient, a view of the packed one."""
        gradient = self.packed[segment.dtype].grad
        assert gradient is not None
        return gradient[segment.start : segment.stop]

    @torch.no_grad()
    def pack_gradient(self, segment: Segment, add: bool = False) -> None:
        """Gather a segment's gradient and free the dense one; none counts as zeros. `add`: to what is there already."""
        target, dense = self.gradient(segment), segment.source.grad
        if segment.leaf is not None and segment.parameter.grad is not None:
            raise TaskError(
                f"{segment.name} is used outside its layer, which computes with the survivors alone; write "
                "retrain.sparse: never"
            )
        if dense is not None and dense.layout != torch.strided:
            raise TaskError(
                f"{segment.name}: its gradient is {dense.layout}, and only dense ones can be packed; build its module "
                "with sparse=False"
            )
        if dense is not None:
            into = torch.empty_like(target) if add else target
            if segment.leaf is None:
                segment.packing.gather(dense.reshape(-1), into)
            else:
                into.copy_(dense)
            if add:
                target.add_(into)
            segment.source.grad = None
        elif not add:
            target.zero_()

    @torch.no_grad()
    def repack(self, segment: Segment, values: Tensor, masks: Masks | None, out: Tensor) -> None:
        """Lay a segment's values out as this does, those of an optimizer for example.

        Weights that were pruned since lose theirs; those that were pruned then get zero.

        Args:
            values: as packed under `masks`, of this round or an earlier one, or one for every weight.
            out: as long as the segment.
        """
        weights, dense = segment.parameter.numel(), values.to(segment.parameter.device)
        if values.numel() != weights:
            assert masks is not None, "only what is pruned has fewer values than weights"
            dense = dense_of(dense, masks.bits(segment.name), weights)
        segment.packing.gather(dense, out)

    def pack_gradients(self) -> None:
        """Gather all gradients after a backward pass, for a loop of one's own."""
        for segment in self:
            self.pack_gradient(segment)

    @torch.no_grad()
    def unpack(self, everything: bool = False) -> None:
        """Write the packed weights to the model's dense parameters; pruned weights are not touched.

        everything: those too whose layers do not compute with them.
        """
        for segment in self:
            if not segment.packing.whole and (everything or segment.leaf is None):
                segment.unpack(self.weights(segment))


def _packing(name: str, parameter: nn.Parameter, masks: Masks | None, packing: bool) -> Packing:
    if masks is None or name not in masks or masks.survivors[name] == parameter.numel():
        return Whole(parameter.numel())
    kind = Packed if packing else Masked
    return kind(masks.bits(name), parameter.numel(), parameter.device)
