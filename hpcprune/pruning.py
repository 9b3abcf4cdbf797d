"""Pruning: from scores to masks, over all ranks.

Each rank scores its shard, the threshold is found over all ranks, the masks are gathered and agreed on, and the pruned
weights become zero. What was pruned before is not scored again, so masks only ever lose weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from hpcprune.criteria import CRITERIA
from hpcprune.errors import JobError
from hpcprune.layers import find_layers
from hpcprune.masks import Bits, Masks, gather_masks
from hpcprune.native.survivors import popcount
from hpcprune.packing import survivors_of
from hpcprune.schedule import pruned_count
from hpcprune.shards import Layer, Span, deal
from hpcprune.threshold import Threshold, select_survivors
from hpcprune.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Pruned", "prune", "prune_layers"]

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Pruned:
    """New masks, each layer's threshold by name, and the seconds that this rank spent on each part."""

    masks: Masks
    thresholds: Mapping[str, Threshold]
    seconds: Mapping[str, float]


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    scope: Scope = "global",
    criterion: str = "magnitude",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    comm: World | MPI.Intracomm | None = None,
) -> Masks:
    """Prune a model in place and return the masks.

    On one rank, in a notebook for instance, it prunes alone. Under mpirun every rank calls it with the same weights,
    scores its shard of them, and gets the same masks.

    Args:
        model: any module; the weights of its linear, convolutional and recurrent layers are prunable.
        sparsity: the part of the prunable weights to prune, at least 0 and less than 1.
        scope: whether weights are ranked over all layers ("global") or within each ("layer").
        criterion: how weights are scored; "magnitude" is all there is.
        include, exclude: shell patterns on the names of parameters or of the modules that hold them.
        comm: the ranks; all that were launched (MPI.COMM_WORLD) by default.

    Returns:
        Masks: name, as in `named_parameters` -> boolean tensor of its shape, True where a weight survives.

    Raises:
        JobError: sparsity, scope, criterion or a pattern is not usable.
        NumericsError: a weight is NaN.
    """
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise JobError(f"sparsity: {sparsity!r} is not in [0, 1)")
    if scope not in ("global", "layer"):
        raise JobError(f"scope: {scope!r} is not one of: global, layer")
    if criterion not in CRITERIA:
        raise JobError(f"criterion: {criterion!r} is not one of: {', '.join(CRITERIA)}")
    world = World.of(comm)
    layers = find_layers(model, include, exclude)
    parameters = dict(model.named_parameters())
    shards = deal(layers, world.size)
    pruned = prune_layers(parameters, Masks.full(layers), shards, sparsity, scope, criterion, world)
    pruned.masks.apply(model)
    return pruned.masks


def prune_layers(
    parameters: Mapping[str, torch.Tensor],
    masks: Masks,
    shards: Sequence[Sequence[Span]],
    sparsity: float,
    scope: Scope,
    criterion: str,
    world: World,
) -> Pruned:
    """Prune the layers of `masks` further, to `sparsity`. The parameters are read, not changed."""
    layers, own = masks.layers, shards[world.rank]
    clock = [time.perf_counter()]
    fresh = masks.nonzeros == masks.weights
    before = [] if fresh else [_slice_bits(masks.bits(layers[span.layer].name), span) for span in own]
    pieces = [_scores(parameters[layers[span.layer].name], span, criterion) for span in own]
    if not fresh:
        pieces = [survivors_of(piece, bits) for piece, bits in zip(pieces, before, strict=True)]
    clock.append(time.perf_counter())

    groups, counts = _rank_together(layers, masks, own, pieces, sparsity, scope)
    names = [[layers[span.layer].name for span in own]] if scope == "global" else [[layer.name] for layer in layers]
    selected = select_survivors(groups, counts, world, absolute=CRITERIA[criterion].absolute, names=names)
    clock.append(time.perf_counter())

    bits = [packed for _, group in selected for packed in group]
    if not fresh:
        bits = [_deposit(new, old) for new, old in zip(bits, before, strict=True)]
    found = gather_masks(layers, shards, bits, world)
    clock.append(time.perf_counter())
    thresholds = {layer.name: selected[0 if scope == "global" else number][0] for number, layer in enumerate(layers)}
    seconds = dict(zip(("score", "threshold", "masks"), np.diff(clock).tolist(), strict=True))
    return Pruned(found, thresholds, seconds)


def _rank_together(
    layers: Sequence[Layer],
    masks: Masks,
    own: Sequence[Span],
    pieces: Sequence[torch.Tensor],
    sparsity: float,
    scope: Scope,
) -> tuple[list[list[torch.Tensor]], list[int]]:
    """What is ranked together, and how many of each group are to go beyond those that went before."""
    if scope == "global":
        gone = masks.weights - masks.nonzeros
        return [list(pieces)], [max(0, pruned_count(masks.weights, sparsity) - gone)]
    groups: list[list[torch.Tensor]] = [[] for _ in layers]
    for span, piece in zip(own, pieces, strict=True):
        groups[span.layer].append(piece)
    gone_by_layer = [layer.weights - masks.survivors[layer.name] for layer in layers]
    counts = [
        max(0, pruned_count(layer.weights, sparsity) - gone) for layer, gone in zip(layers, gone_by_layer, strict=True)
    ]
    return groups, counts


def _scores(parameter: torch.Tensor, span: Span, criterion: str) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)[span.start : span.stop]
    return CRITERIA[criterion].scores(flat)


def _slice_bits(packed: Bits, span: Span) -> Bits:
    """The bits of a span, beginning at bit 0."""
    first, shift = divmod(span.start, 8)
    piece = packed[first : (span.stop + 7) // 8]
    if shift == 0 and span.stop % 8 == 0:
        return piece
    return np.packbits(np.unpackbits(piece, bitorder="little")[shift : shift + span.weights], bitorder="little")


def _deposit(new: Bits, old: Bits) -> Bits:
    """The bits `new`, one for each bit set in `old`, put at the places of those."""
    places = np.unpackbits(old, bitorder="little").view(np.bool_)
    places[places] = np.unpackbits(new, count=popcount(old), bitorder="little").view(np.bool_)
    return np.packbits(places, bitorder="little")
