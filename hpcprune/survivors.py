"""Survivors: the weights that are left, as one packed vector a dtype, which is what is trained.

The forward and backward passes use the model's dense parameters. After each backward pass the survivors' gradients are
gathered into a packed vector, that vector is all-reduced (no indices travel: every rank has the same masks), the
optimizer steps on packed weights, and those are scattered into the dense parameters. A pruned weight has no gradient,
no momentum and no place to be written to, so it stays zero whatever the optimizer does.

Parameters that are not prunable (biases, norms) ride in the same vectors, whole.

Singh and Bhatele, "Exploiting Sparsity in Pruned Neural Networks to Optimize Large Model Training", 2023,
https://arxiv.org/abs/2302.05045
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hpcprune.masks import Masks

__all__ = ["Survivors"]


@dataclass(frozen=True)
class Segment:
    """A parameter's part of a packed vector; `places` are the survivors' flat indices, None where all survive."""

    name: str
    parameter: nn.Parameter
    places: Tensor | None
    start: int
    stop: int


class Survivors:
    """The packed trainable weights of a model under masks.

    `packed` maps a dtype to the packed weights, a parameter for an optimizer; its `.grad` is the packed gradient.
    """

    def __init__(self, model: nn.Module, masks: Masks | None = None) -> None:
        """Pack the trainable weights of `model`; without masks, all of them. Pruned weights are set to zero."""
        if masks is not None:
            masks.apply(model)
        self.segments: dict[torch.dtype, list[Segment]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
            places = _places(masks, name, parameter)
            segments = self.segments.setdefault(parameter.dtype, [])
            start = segments[-1].stop if segments else 0
            length = parameter.numel() if places is None else places.numel()
            segments.append(Segment(name, parameter, places, start, start + length))
        self.packed: dict[torch.dtype, nn.Parameter] = {}
        for dtype, segments in self.segments.items():
            device = segments[0].parameter.device
            self.packed[dtype] = nn.Parameter(torch.empty(segments[-1].stop, dtype=dtype, device=device))
            self.packed[dtype].grad = torch.zeros_like(self.packed[dtype])
        self.pack()

    def __len__(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.packed.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the gradients if nothing were pruned."""
        return sum(s.parameter.numel() * s.parameter.element_size() for each in self.segments.values() for s in each)

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

    @torch.no_grad()
    def pack(self) -> None:
        """Take the packed weights from the model's dense parameters."""
        for dtype, segments in self.segments.items():
            for segment in segments:
                _gather(segment, segment.parameter.data, self.packed[dtype].data)

    @torch.no_grad()
    def pack_gradients(self) -> None:
        """Gather the survivors' gradients and free the dense ones. A parameter without a gradient counts as zeros."""
        for segments, gradients in zip(self.segments.values(), self.gradients(), strict=True):
            for segment in segments:
                if segment.parameter.grad is None:
                    gradients[segment.start : segment.stop] = 0
                else:
                    _gather(segment, segment.parameter.grad, gradients)
                    segment.parameter.grad = None

    @torch.no_grad()
    def unpack(self) -> None:
        """Write the packed weights to the model's dense parameters; pruned weights are not touched."""
        for dtype, segments in self.segments.items():
            for segment in segments:
                values = self.packed[dtype].data[segment.start : segment.stop]
                flat = segment.parameter.data.view(-1)
                if segment.places is None:
                    flat.copy_(values)
                else:
                    flat.index_copy_(0, segment.places, values)


def _places(masks: Mapping[str, Tensor] | None, name: str, parameter: nn.Parameter) -> Tensor | None:
    if masks is None or name not in masks:
        return None
    mask = masks[name].reshape(-1).numpy()
    if mask.all():
        return None
    return torch.from_numpy(np.flatnonzero(mask)).to(parameter.device)


def _gather(segment: Segment, dense: Tensor, packed: Tensor) -> None:
    target, flat = packed[segment.start : segment.stop], dense.reshape(-1)
    if segment.places is None:
        target.copy_(flat)
    else:
        torch.index_select(flat, 0, segment.places, out=target)
