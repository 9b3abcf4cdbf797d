"""A statistic: numbers that a criterion multiplies weights with, gathered over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from hpcprune.shards import Layer, Span
from hpcprune.statistics.calibration import Calibration

__all__ = ["Gathered", "Statistic"]

Gathered: TypeAlias = Callable[[Span], Tensor]
"""For a span that this rank owns: float64, a number for each of its weights, on the model's device."""


class Statistic(Protocol):
    """What a criterion asks for. The sums are of float64, so that they hardly hang on the number of ranks."""

    def check(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Raise JobError where it cannot be gathered for one of the layers, with what to do."""
        ...

    def gather(self, calibration: Calibration, layers: Sequence[Layer], shards: Sequence[Sequence[Span]]) -> Gathered:
        """Gather it over all ranks. Collective. A rank keeps what it owns."""
        ...
