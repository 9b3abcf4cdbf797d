"""Attention: an edge counts as much as the network's own layers attend to it.

Velickovic et al., "Graph Attention Networks", 2018, https://arxiv.org/abs/1710.10903
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece

if TYPE_CHECKING:
    from torch import Tensor

    from hpcprune.statistics import Statistic

__all__ = ["Attention"]


class Attention(Criterion):
    """The edge's attention coefficient: the mean over heads, summed over layers and both directions."""

    name = "attention"
    kinds = ("edges",)
    of_values = False
    looks_at = "inputs"

    def statistic(self) -> Statistic:
        from hpcprune.statistics import Attention

        return Attention()

    def scores(self, piece: Piece) -> Tensor:
        return piece.gathered
