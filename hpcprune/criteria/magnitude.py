"""Magnitude: a weight's score is its absolute value.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude:
    name: str = "magnitude"
    absolute: bool = True

    def scores(self, weights: torch.Tensor) -> torch.Tensor:
        return weights
