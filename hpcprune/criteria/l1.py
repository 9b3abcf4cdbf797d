"""L1: magnitude, after a training that drives weights to zero.

The penalty is stepped on by its proximal operator, which makes zeros of small weights and not only small weights of
them: Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.2, https://web.stanford.edu/~boyd/papers/prox_algs.html;
of networks, Liu et al., "Sparse Convolutional Neural Networks", 2015.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcprune.criteria.magnitude import Magnitude

if TYPE_CHECKING:
    from hpcprune.job import Job

__all__ = ["L1"]


class L1(Magnitude):
    """|w|, of weights that were trained with `l1`."""

    name = "l1"
    kinds = ("weights",)

    def refusal(self, job: Job) -> str:
        train = job.train if job.weights == "train" else None
        if (train is not None and train.l1 and (train.epochs or train.steps)) or (
            job.retrain.l1 and job.prune.rounds > 1
        ):
            return ""
        return (
            "l1 prunes what was trained with an L1 term before; give train.l1, or retrain.l1 and several rounds, or "
            "write criterion: magnitude"
        )
