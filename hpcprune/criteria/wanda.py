"""Wanda: a weight counts as much as it is large and as its input is, among the weights of its output.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece

if TYPE_CHECKING:
    from torch import Tensor

    from hpcprune.statistics import Statistic

__all__ = ["Wanda"]


class Wanda(Criterion):
    """|w| times the Euclidean norm, over all samples and places, of the input that it is multiplied with."""

    name = "wanda"
    kinds = ("weights",)
    scope = "row"
    looks_at = "inputs"

    def statistic(self) -> Statistic:
        from hpcprune.statistics import InputEnergy

        return InputEnergy()

    def scores(self, piece: Piece) -> Tensor:
        return piece.weights.double().abs() * piece.gathered.sqrt()
