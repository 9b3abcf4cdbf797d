"""Ranking: from scores to masks, over all ranks.

Each rank scores its shard, the threshold is found over all ranks, the masks are gathered and agreed on, and the pruned
weights become zero. What was pruned before is not ranked again, so masks only ever lose weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpcprune.criteria import Criterion, Piece, Scope
from hpcprune.masks import Bits, Masks, gather_masks
from hpcprune.native.survivors import popcount
from hpcprune.packing import survivors_of
from hpcprune.rows import select_in_rows
from hpcprune.schedule import pruned_count
from hpcprune.shards import Layer, Span
from hpcprune.threshold import Threshold, select_survivors
from hpcprune.world import World

if TYPE_CHECKING:
    from hpcprune.statistics import Gathered

__all__ = ["Pruned", "Target", "prune_layers", "score"]


@dataclass(frozen=True)
class Target:
    """What is to be gone, and of what.

    sparsity: of all weights together; with a scope other than "global", of each layer (or of each of its rows).
    """

    criterion: Criterion
    scope: Scope
    sparsity: float | Sequence[float]
    seed: int = 0

    def of_layers(self, layers: Sequence[Layer]) -> list[float]:
        """The sparsity of each."""
        return [self.sparsity] * len(layers) if isinstance(self.sparsity, (int, float)) else [*self.sparsity]


@dataclass(frozen=True)
class Pruned:
    """New masks, each layer's threshold by name (rows have too many), and this rank's seconds for each part."""

    masks: Masks
    thresholds: Mapping[str, Threshold]
    seconds: Mapping[str, float]


def prune_layers(
    parameters: Mapping[str, torch.Tensor],
    masks: Masks,
    shards: Sequence[Sequence[Span]],
    target: Target,
    world: World,
    statistic: Gathered | None = None,
) -> Pruned:
    """Prune the layers of `masks` further. The parameters are read, not changed.

    statistic: what the criterion asked for; None where it looks at weights alone.
    """
    layers, own = masks.layers, shards[world.rank]
    clock = [time.perf_counter()]
    fresh = masks.nonzeros == masks.weights
    before = [None if fresh else _slice_bits(masks.bits(layers[span.layer].name), span) for span in own]
    scored = (score(parameters, layers[span.layer], span, target, statistic) for span in own)
    # Rows are ranked layer by layer, so that the scores of one are there at a time.
    pieces = scored if target.scope == "row" else [*scored]
    clock.append(time.perf_counter())
    bits, thresholds = (_rows if target.scope == "row" else _groups)(masks, own, pieces, before, target, world)
    clock.append(time.perf_counter())
    found = gather_masks(layers, shards, bits, world)
    clock.append(time.perf_counter())
    seconds = dict(zip(("score", "threshold", "masks"), np.diff(clock).tolist(), strict=True))
    return Pruned(found, thresholds, seconds)


def score(
    parameters: Mapping[str, torch.Tensor],
    layer: Layer,
    span: Span,
    target: Target,
    statistic: Gathered | None,
) -> torch.Tensor:
    """A score for each number of a span that this rank owns; `criterion.absolute` says of which kinds magnitudes count.

    An edge whose number was learned to be below 0 does harm: it goes before any that does not, the further the sooner.
    """
    gathered, numbers = None if statistic is None else statistic(span), parameters[layer.name].detach()
    piece = Piece(layer, span, numbers, gathered, target.seed)
    if layer.kind == "weights" or not target.criterion.of_values:
        return target.criterion.scores(piece)
    scores = target.criterion.scores(replace(piece, parameter=numbers.clamp(min=0)))
    return torch.where(piece.weights < 0, piece.weights.to(scores.dtype), scores)


_Selected = tuple[list[Bits], dict[str, Threshold]]


def _rows(
    masks: Masks,
    own: Sequence[Span],
    pieces: Iterable[torch.Tensor],
    before: Sequence[Bits | None],
    target: Target,
    world: World,
) -> _Selected:
    layers, sparsities = masks.layers, target.of_layers(masks.layers)
    scores = (piece.abs() for piece in pieces) if _absolute(masks, target) else pieces
    widths = [layers[span.layer].row for span in own]
    names = [layers[span.layer].name for span in own]
    return select_in_rows(scores, before, widths, [sparsities[span.layer] for span in own], names, world), {}


def _groups(
    masks: Masks,
    own: Sequence[Span],
    pieces: Iterable[torch.Tensor],
    before: Sequence[Bits | None],
    target: Target,
    world: World,
) -> _Selected:
    """By a threshold over all layers, or one a layer."""
    layers, everywhere = masks.layers, target.scope == "global"
    left = [p if bits is None else survivors_of(p, bits) for p, bits in zip(pieces, before, strict=True)]
    groups, counts = _rank_together(masks, own, left, target)
    names = [[layers[span.layer].name for span in own]] if everywhere else [[layer.name] for layer in layers]
    selected = select_survivors(groups, counts, world, absolute=_absolute(masks, target), names=names)
    bits = [packed for _, group in selected for packed in group]
    found = [new if old is None else _deposit(new, old) for new, old in zip(bits, before, strict=True)]
    return found, {layer.name: selected[0 if everywhere else number][0] for number, layer in enumerate(layers)}


def _absolute(masks: Masks, target: Target) -> bool:
    """Whether the magnitudes of scores count; masks are of one kind of thing."""
    return any(layer.kind in target.criterion.absolute for layer in masks.layers)


def _rank_together(
    masks: Masks, own: Sequence[Span], pieces: Sequence[torch.Tensor], target: Target
) -> tuple[list[list[torch.Tensor]], list[int]]:
    """What is ranked together, and how many of each group are to go beyond those that went before."""
    layers = masks.layers
    if target.scope == "global":
        assert isinstance(target.sparsity, (int, float))
        gone = masks.weights - masks.nonzeros
        return [list(pieces)], [max(0, pruned_count(masks.weights, target.sparsity) - gone)]
    groups: list[list[torch.Tensor]] = [[] for _ in layers]
    for span, piece in zip(own, pieces, strict=True):
        groups[span.layer].append(piece)
    counts = [
        max(0, pruned_count(layer.weights, sparsity) - (layer.weights - masks.survivors[layer.name]))
        for layer, sparsity in zip(layers, target.of_layers(layers), strict=True)
    ]
    return groups, counts


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
