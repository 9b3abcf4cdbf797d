"""The counts of several layers together: those of weights, and apart from them the edges of graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hpcprune.checkpoint.format import sparsity
from hpcprune.checkpoint.pieces import Outline, Piece

__all__ = ["Totals", "by_kind"]


class Totals(NamedTuple):
    """Of several layers."""

    layers: int
    weights: int
    survivors: int

    @property
    def sparsity(self) -> float:
        return sparsity(self.survivors, self.weights)


def by_kind(layers: Iterable[Piece | Outline]) -> tuple[Totals, Totals]:
    """Those of weights, and those that stand for the edges of a graph (their attribute `kind` says so)."""
    apart: tuple[list[Piece | Outline], list[Piece | Outline]] = [], []
    for layer in layers:
        apart[layer.attributes.get("kind") == "edges"].append(layer)
    weights, edges = (
        Totals(len(each), sum(one.weights for one in each), sum(one.survivors for one in each)) for each in apart
    )
    return weights, edges
