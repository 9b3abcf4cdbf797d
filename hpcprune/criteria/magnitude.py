"""Magnitude: a weight's score is its absolute value.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Magnitude"]


class Magnitude(Criterion):
    """|w|."""

    name = "magnitude"
    absolute = ("weights",)

    def scores(self, piece: Piece) -> Tensor:
        return piece.weights
