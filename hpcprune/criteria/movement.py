"""Movement: weights that training moves towards zero go, however large they are.

Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, https://arxiv.org/abs/2005.07683
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece
from hpcprune.errors import JobError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpcprune.job import Job
    from hpcprune.shards import Layer

__all__ = ["Movement"]


class Movement(Criterion):
    """The sum of -g w over the steps of training: above 0 where a step takes w away from zero.

    It is summed from the first step of the dense training on; a weight's ends when it is pruned.
    """

    name = "movement"
    kinds = ("weights",)
    looks_at = "training"

    def follow(self, weights: Tensor, gradients: Tensor) -> Tensor:
        return -gradients * weights

    def scores(self, piece: Piece) -> Tensor:
        return piece.gathered

    def check(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        frozen = [layer.name for layer in layers if not model.get_parameter(layer.name).requires_grad]
        if frozen:
            raise JobError(
                f"prune.criterion: movement follows weights while they are trained, and {frozen[0]} is not "
                "(requires_grad is False); exclude it (prune.exclude), or choose another criterion"
            )

    def refusal(self, job: Job) -> str:
        if job.retrain.top_k is not None:
            return "movement needs the whole gradient, of which top_k sends a part; remove top_k"
        if job.prune.until is not None:
            return "movement is not kept of the networks that until goes back to; choose another criterion"
        if job.weights == "train" and job.train is not None and (job.train.epochs or job.train.steps):
            return ""
        return (
            "movement follows weights while they are trained, and nothing is trained before the first pruning; let "
            "model() of the task load the weights, and fine-tune them (weights: train, and train), or choose another "
            "criterion"
        )
