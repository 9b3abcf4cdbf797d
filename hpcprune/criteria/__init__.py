"""Criteria: how a weight is scored. The weights with the lowest scores go.

A criterion is a name and a way to score one layer's weights; one family a file. To add one: write its class beside
`magnitude.py`, add it to `CRITERIA`, and the job file knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from hpcprune.criteria.magnitude import Magnitude

if TYPE_CHECKING:
    import torch

__all__ = ["CRITERIA", "Criterion"]


class Criterion(Protocol):
    """What a criterion has."""

    @property
    def name(self) -> str:
        """Its name in the job file."""
        ...

    @property
    def absolute(self) -> bool:
        """Whether the scores' magnitudes count; they are taken on the fly and never stored."""
        ...

    def scores(self, weights: torch.Tensor) -> torch.Tensor:
        """A score for each of a layer's weights (any shape and float dtype): a tensor of the same shape."""
        ...


CRITERIA: Mapping[str, Criterion] = MappingProxyType({criterion.name: criterion for criterion in (Magnitude(),)})
