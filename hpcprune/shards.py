"""Shards: which part of which layer each rank scores.

All layers are laid end to end in global order (layer order, then flat index) and the line is cut into one piece a rank.
So a shard is a few flat ranges of layers, the shards' order is the global order (which is what decides between equal
scores), and the loads are as even as the places where a cut may fall allow: at a layer's edge or between two rows where
one is near, else between any two weights. Nothing here needs torch or MPI: any rank can work out every rank's shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Kind", "Layer", "Span", "deal", "imbalance", "shards_of_kind"]

Kind = Literal["weights", "edges"]

SNAP = 0.01  # a cut moves to a layer's edge or a row's if one is within this part of a fair share


@dataclass(frozen=True)
class Layer:
    """A prunable parameter: its name as in `named_parameters`, its shape, and its dtype by name ("float32").

    kind: whether its numbers are weights of the network, or stand for the edges of a graph (graph.py).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = "weights"

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Weights in one row: everything behind the first dimension."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Span:
    """The weights `start` to `stop` of the flattened layer number `layer`."""

    layer: int
    start: int
    stop: int

    @property
    def weights(self) -> int:
        return self.stop - self.start


def deal(layers: Sequence[Layer], ranks: int, *, whole_rows: bool = False) -> list[list[Span]]:
    """The spans that each of `ranks` ranks owns, in global order; a rank without any has an empty list.

    The largest shard has at most 1.05 times the mean's weights for any layers with more than 20 rows a rank. With
    `whole_rows` no row is cut, however uneven that is.
    """
    edges = [0]
    for layer in layers:
        edges.append(edges[-1] + layer.weights)
    fair = edges[-1] / ranks
    cuts = [0, *(_snap(round(rank * fair), fair, layers, edges, whole_rows) for rank in range(1, ranks)), edges[-1]]
    return [_spans(start, max(start, stop), edges) for start, stop in itertools.pairwise(cuts)]


def shards_of_kind(
    layers: Sequence[Layer], shards: Sequence[Sequence[Span]], kind: Kind
) -> tuple[list[Layer], list[list[Span]]]:
    """The layers of a kind, and what of them each rank owns."""
    numbers = [number for number, layer in enumerate(layers) if layer.kind == kind]
    renumbered = {number: new for new, number in enumerate(numbers)}
    spans = [[replace(s, layer=renumbered[s.layer]) for s in shard if s.layer in renumbered] for shard in shards]
    return [layers[number] for number in numbers], spans


def imbalance(shards: Sequence[Sequence[Span]]) -> float:
    """The largest shard's weights over the mean's; 1 when nothing is to be dealt."""
    loads = [sum(span.weights for span in shard) for shard in shards]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _snap(cut: int, fair: float, layers: Sequence[Layer], edges: Sequence[int], whole_rows: bool) -> int:
    slack = SNAP * fair
    for (start, stop), layer in zip(itertools.pairwise(edges), layers, strict=True):
        if start <= cut < stop:
            if whole_rows:
                return start + round((cut - start) / layer.row) * layer.row
            if min(cut - start, stop - cut) <= slack:
                return start if cut - start <= stop - cut else stop
            # Rows whose first weight begins a byte of the packed mask make the masks cheap to put together.
            for unit in (math.lcm(layer.row, 8), layer.row):
                nearest = start + round((cut - start) / unit) * unit
                if abs(nearest - cut) <= slack and nearest <= stop:
                    return nearest
    return cut


def _spans(first: int, last: int, edges: Sequence[int]) -> list[Span]:
    spans = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        low, high = max(first, start), min(last, stop)
        if low < high:
            spans.append(Span(number, low - start, high - start))
    return spans
