"""Distribution: the sparsity of each layer, where layers are not ranked together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcprune.errors import JobError
from hpcprune.layers import matching
from hpcprune.shards import Layer

if TYPE_CHECKING:
    from hpcprune.prune_section import Prune

__all__ = ["erdos_renyi_kernel", "sparsities_of_layers"]


def sparsities_of_layers(prune: Prune, layers: Sequence[Layer], share: float) -> list[float]:
    """Each layer's sparsity where a `share` of all sparsities is come to: that of its pattern in `prune.layers`, or its
    part of `prune.sparsity`.

    Raises:
        JobError: a pattern matches no layer, or two match the same.
    """
    found: dict[str, float] = {}
    by: dict[str, str] = {}
    for pattern, target in prune.layers.items():
        names = matching(pattern, [layer.name for layer in layers])
        if not names:
            raise JobError(
                f"prune.layers: {pattern!r} matches no prunable layer; there are {len(layers)}, such as "
                f"{', '.join(layer.name for layer in layers[:3])}"
            )
        for name in names:
            if name in by:
                raise JobError(f"prune.layers: {by[name]!r} and {pattern!r} both match {name}; let one of them do so")
            by[name], found[name] = pattern, target * share
    others = [layer for layer in layers if layer.name not in found]
    sparsity = prune.sparsity * share
    shares = [sparsity] * len(others) if prune.distribution == "uniform" else erdos_renyi_kernel(others, sparsity)
    found |= {layer.name: each for layer, each in zip(others, shares, strict=True)}
    return [found[layer.name] for layer in layers]


def erdos_renyi_kernel(layers: Sequence[Layer], sparsity: float) -> list[float]:
    """Sparsities under which a layer's density is as the sum of its sides over their product.

    Together the layers have `sparsity`; a layer that would be denser than dense is left whole, and the others bear it.
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, https://arxiv.org/abs/1911.11134
    """
    raw = [sum(layer.shape) / layer.weights for layer in layers]
    whole: set[int] = set()
    while True:
        rest = [number for number in range(len(layers)) if number not in whole]
        left = (1 - sparsity) * sum(layer.weights for layer in layers) - sum(layers[n].weights for n in whole)
        scale = left / sum(raw[number] * layers[number].weights for number in rest) if rest else 0.0
        denser = {number for number in rest if scale * raw[number] > 1}
        if not denser:
            return [0.0 if number in whole else max(0.0, 1 - scale * raw[number]) for number in range(len(layers))]
        whole |= denser
