"""Criteria from the loss's gradient: how much the loss would change without a weight.

All are first-order or diagonal: with the gradient g of a weight w, its removal changes the loss by about -g w, and
near a minimum, where g averages to nothing, by about half of w^2 times the curvature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece

if TYPE_CHECKING:
    from torch import Tensor

    from hpcprune.job import Job
    from hpcprune.statistics import Statistic

__all__ = ["Fisher", "Sensitivity", "Snip"]


class Sensitivity(Criterion):
    """|w g|, the mean over batches.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017,
    https://arxiv.org/abs/1611.06440, and "Importance Estimation for Neural Network Pruning", 2019,
    https://arxiv.org/abs/1906.10771
    """

    name = "sensitivity"
    looks_at = "loss"

    def statistic(self) -> Statistic:
        from hpcprune.statistics import Gradients

        return Gradients(lambda gradient: gradient.abs())

    def scores(self, piece: Piece) -> Tensor:
        return piece.weights.double().abs() * piece.gathered


class Snip(Criterion):
    """|w g| of the gradient over all samples, with batch norms as in training: for networks that are not trained yet.

    Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019,
    https://arxiv.org/abs/1810.02340
    """

    name = "snip"
    looks_at = "loss"

    def statistic(self) -> Statistic:
        from hpcprune.statistics import Gradients

        return Gradients(lambda gradient: gradient, training=True)

    def refusal(self, job: Job) -> str:
        if job.prune.calibrate is not None and job.prune.calibrate.batch_size == 1:
            return "snip looks at the network as in training, where batch norms need several samples; raise batch_size"
        return ""

    def scores(self, piece: Piece) -> Tensor:
        return (piece.weights.double() * piece.gathered).abs()


class Fisher(Criterion):
    """w^2 times the mean over samples of g^2, the diagonal of the empirical Fisher matrix in the Hessian's place.

    LeCun et al., "Optimal Brain Damage", 1989,
    https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html; Theis et al.,
    "Faster gaze prediction with dense networks and Fisher pruning", 2018, https://arxiv.org/abs/1801.05787
    """

    name = "fisher"
    looks_at = "loss"

    def statistic(self) -> Statistic:
        from hpcprune.statistics import Gradients

        return Gradients(lambda gradient: gradient.square(), by_sample=True)

    def scores(self, piece: Piece) -> Tensor:
        return piece.weights.double().square() * piece.gathered
