"""The optimizer on packed weights, and its state by the parameters' names.

An optimizer's state lies in packed vectors as the weights do. By name it does not depend on how the vectors are laid
out, so it can be saved, gone on with under another layout, and carried over when further weights are pruned: those that
stay keep their momentum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpcprune.masks import Masks
from hpcprune.survivors import Survivors
from hpcprune.training import Optimizer

__all__ = ["FOLLOWED", "followed_only", "laid_out", "load_state", "make_optimizer", "named_state", "named_vectors"]

FOLLOWED = "followed"  # under this key, what a criterion has followed lies beside the optimizer's own state


def make_optimizer(survivors: Survivors, spec: Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer that a job describes."""
    parameters = survivors.parameters()
    if spec.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name]
    return kind(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)


def named_state(optimizer: torch.optim.Optimizer, survivors: Survivors) -> dict[str, Tensor]:
    """The optimizer's tensors, under "<parameter>/<key>" as it packs the parameter, or "<key>". Memory is shared."""
    named = {}
    for dtype, packed in survivors.packed.items():
        for key, value in optimizer.state[packed].items():
            if not isinstance(value, Tensor):
                continue
            if value.shape != packed.shape:
                named[key] = value
                continue
            named |= named_vectors(key, {dtype: value}, survivors)
    return named


def named_vectors(key: str, vectors: Mapping[torch.dtype, Tensor], survivors: Survivors) -> dict[str, Tensor]:
    """Vectors laid out as the packed ones, under "<parameter>/<key>". Memory is shared."""
    return {
        f"{segment.name}/{key}": vectors[dtype][segment.start : segment.stop]
        for dtype in vectors
        for segment in survivors.segments[dtype]
    }


def load_state(
    optimizer: torch.optim.Optimizer, survivors: Survivors, named: Mapping[str, Tensor], masks: Masks | None
) -> None:
    """Set the optimizer's state to what `named_state` gave under `masks`, which may be those of an earlier round.

    Weights that were pruned since lose theirs; the packed vectors may be laid out in another way.
    """
    keys = {name.rpartition("/")[2] for name in named} - {FOLLOWED}
    for dtype, packed in survivors.packed.items():
        state = optimizer.state[packed]
        for key in keys:
            if key in named:
                state[key] = named[key].clone()
                continue
            state[key] = laid_out(key, dtype, survivors, named, masks)


def followed_only(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a criterion has followed, without the optimizer's own state."""
    return {name: value for name, value in named.items() if name.endswith(f"/{FOLLOWED}")}


def laid_out(
    key: str, dtype: torch.dtype, survivors: Survivors, named: Mapping[str, Tensor], masks: Masks | None
) -> Tensor:
    """The vector of a dtype that `named_vectors` took apart under `masks`, as the survivors of now are packed."""
    vector = torch.zeros_like(survivors.packed[dtype], requires_grad=False)
    for segment in survivors.segments[dtype]:
        survivors.repack(segment, named[f"{segment.name}/{key}"], masks, out=vector[segment.start : segment.stop])
    return vector
