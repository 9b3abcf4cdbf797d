"""LAMP: magnitudes made comparable between layers, so that one global threshold gives each layer a sparsity of its own.

Lee et al., "Layer-Adaptive Sparsity for the Magnitude-Based Pruning", 2021, https://arxiv.org/abs/2010.07611
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lamp"]


class Lamp(Criterion):
    """w^2 over the sum of the squares of the layer's weights that are not smaller; a layer's largest has score 1.

    Pruned weights are zeros, which add nothing to the sums. Ranks that share a layer score all of it, alike.
    """

    name = "lamp"
    kinds = ("weights",)

    def scores(self, piece: Piece) -> Tensor:
        squares, order = piece.parameter.detach().reshape(-1).double().square().sort(stable=True)
        not_smaller = squares.flip(0).cumsum(0).flip(0)
        scores = squares.new_empty(squares.shape)
        scores[order] = squares / not_smaller.clamp(min=sys.float_info.min)  # a layer may be all zeros
        return scores[piece.span.start : piece.span.stop]
