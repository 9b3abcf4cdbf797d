"""A criterion: how a weight is scored, and what must be known for it. The weights with the lowest scores go.

Job files name criteria, so nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpcprune.job import Job
    from hpcprune.shards import Kind, Layer, Span
    from hpcprune.statistics import Statistic

__all__ = ["SCOPES", "Criterion", "Piece", "Scope"]

Scope = Literal["global", "layer", "row"]
SCOPES: tuple[Scope, ...] = ("global", "layer", "row")


@dataclass(frozen=True)
class Piece:
    """A rank's part of a layer, as a criterion sees it.

    parameter: the layer's weights, all of them; those that were pruned before are 0. statistic: float64, a number for
    each weight of the span, where the criterion asked for one. seed: the job's.
    """

    layer: Layer
    span: Span
    parameter: Tensor
    statistic: Tensor | None
    seed: int

    @property
    def weights(self) -> Tensor:
        """Those of the span, flat, in the parameter's own memory where it is contiguous."""
        return self.parameter.detach().reshape(-1)[self.span.start : self.span.stop]

    @property
    def gathered(self) -> Tensor:
        """The statistic, which is there as the criterion asked for it."""
        assert self.statistic is not None
        return self.statistic


class Criterion(ABC):
    """How a weight is scored."""

    name: ClassVar[str]
    """In the job file."""
    scope: ClassVar[Scope] = "global"
    """What is ranked together where the user does not say."""
    kinds: ClassVar[tuple[Kind, ...]] = ("weights", "edges")
    """What it can score."""
    of_values: ClassVar[bool] = True
    """Whether scores follow from the weights' values or gradients; if so, edges are scored by what was learned of
    them."""
    absolute: ClassVar[tuple[Kind, ...]] = ()
    """Of which kinds the magnitudes of what `scores` gives count; they are taken on the fly and never stored."""
    looks_at: ClassVar[Literal["weights", "inputs", "loss", "training"]] = "weights"
    """What it must be given: nothing but the weights, samples to run the model on, their loss too, or what `follow`
    gave in the steps of the training before."""

    @abstractmethod
    def scores(self, piece: Piece) -> Tensor:
        """A score for each weight of a piece: flat, of any float dtype. Those of pruned weights are not looked at."""

    def statistic(self) -> Statistic:
        """What is to be gathered where it looks at inputs or at the loss."""
        raise NotImplementedError(f"{self.name} looks at {self.looks_at}")

    def follow(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """What a step of training adds to each weight's statistic, where it looks at training."""
        raise NotImplementedError(f"{self.name} looks at {self.looks_at}")

    def refusal(self, job: Job) -> str:
        """What of a job it cannot work with, and what to do; nothing if it can."""
        return ""

    def check(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Raise JobError, with what to do, where it cannot score a layer of a model that is trained and pruned."""
        if self.calibrates:
            self.statistic().check(model, layers)

    @property
    def calibrates(self) -> bool:
        """Whether it looks at samples."""
        return self.looks_at in ("inputs", "loss")
