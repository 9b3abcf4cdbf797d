"""Sparsity over the rounds, and the learning rate over the steps: two pure functions of a position.

Nothing here holds state, so that a run that was cut goes on with the very numbers it would have had. No torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcprune.prune_section import Prune
    from hpcprune.training import LrSchedule

__all__ = [
    "layers_of_round",
    "learning_rate_factor",
    "name_of_round",
    "pruned_count",
    "share_of_round",
    "sparsity_of_round",
    "steps_after_round",
    "steps_of_round",
]


def sparsity_of_round(prune: Prune, number: int) -> float:
    """The sparsity after the pruning of round `number`; the last round has exactly `prune.sparsity`."""
    return prune.sparsity * share_of_round(prune, number)


def share_of_round(prune: Prune, number: int) -> float:
    """The share of the sparsity that is come to by round `number`, 1 to `prune.rounds`; round 0 is the dense network.

    linear: in equal parts. cubic: much at first, when there is much to spare, and little at the end
    (Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1 with s_i = 0).
    Rises from round to round to exactly 1. layer-by-layer: that of the layers that were come to.
    """
    if not 0 <= number <= prune.rounds:
        raise ValueError(f"round {number} is not in 0 to {prune.rounds}")
    done = number / prune.rounds
    if prune.schedule == "layer-by-layer":
        return float(number > 0)
    if prune.schedule == "cubic":
        return 1 - (1 - done) ** 3
    return done


def name_of_round(prune: Prune, number: int) -> str:
    """What a round is called: with a goal nobody knows how many there will be."""
    return f"round {number}" if prune.until is not None else f"round {number}/{prune.rounds}"


def layers_of_round(layers: int, rounds: int, number: int) -> int:
    """The first of `layers` layers that are pruned by the end of a round of layer-by-layer; those behind it are too."""
    return layers - layers * number // rounds


def steps_of_round(prune: Prune, number: int, steps: int) -> range:
    """The steps of round `number`'s retraining, of `steps` steps: all, or its part of the one that all rounds share.

    Zhu and Gupta, equation 1, with Delta t = `prune.every_steps` and t_0 = 0.
    """
    if prune.every_steps is None:
        return range(steps)
    return range((number - 1) * prune.every_steps, steps if number == prune.rounds else number * prune.every_steps)


def steps_after_round(prune: Prune, number: int, steps: int) -> int:
    """The steps of retraining in the rounds behind round `number`, each of `steps` or all sharing as many."""
    if prune.every_steps is not None:
        return steps - (steps_of_round(prune, number, steps).stop if number else 0)
    return max(0, prune.rounds - number) * steps


def pruned_count(total: int, sparsity: float) -> int:
    """How many of `total` weights go at this sparsity: the nearest whole number, a half to the even one.

    torch.nn.utils.prune rounds in the same way, so that both prune as many.
    """
    return round(sparsity * total)


def learning_rate_factor(schedule: LrSchedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in step `step`, 0 to `steps` - 1, of a training of `steps`.

    The warm-up rises linearly, (step + 1) / (warmup + 1) (Goyal et al. 2017, arXiv:1706.02677); the rest of the
    training is linear, cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), a fall at given shares, or constant.
    A warm-up of `steps` or more is all there is.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is not in 0 to {steps - 1}")
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    done = (step - schedule.warmup) / (steps - schedule.warmup)
    if schedule.name == "linear":
        return 1 - (1 - schedule.final) * done
    if schedule.name == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2
    if schedule.name == "step":
        return float(schedule.factor ** sum(done >= share for share in schedule.at))
    return 1.0
