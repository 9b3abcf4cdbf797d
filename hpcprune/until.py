"""Until: pruning to a goal instead of a number, the highest sparsity at which a metric is still good enough.

The rounds go on as scheduled for as long as the goal is met. Where a round misses it, the sparsity between the highest
that met it and the lowest that missed it is tried, from the network that met it, until the two networks' sizes differ
by less than a tenth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Goal", "Tried", "best_round", "dense_metrics", "parse", "sparsity_to_try", "told", "tried"]

CLOSE = 1.1  # sizes whose ratio is below this are not told apart

_NUMBER = r"(\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_GOAL = re.compile(
    rf"(?P<metric>\S.*?)\s*(?P<sign>>=|<=)\s*(?:(?P<dense>dense)\s*(?:(?P<how>[-+*])\s*(?P<by>{_NUMBER}))?|"
    rf"(?P<bound>-?{_NUMBER}))"
)


@dataclass(frozen=True)
class Goal:
    """A metric, whether its bound is the least or the most, and the bound: factor * the dense network's + offset."""

    metric: str
    at_least: bool
    factor: float
    offset: float

    def bound(self, dense: Mapping[str, float]) -> float:
        """What the metric is held to, by the dense network's metrics."""
        return self.factor * dense[self.metric] + self.offset

    def met(self, metrics: Mapping[str, float], dense: Mapping[str, float]) -> bool:
        """Whether a network's metrics are good enough. NaN never is."""
        value, bound = metrics[self.metric], self.bound(dense)
        return value >= bound if self.at_least else value <= bound

    def better(self, one: float, other: float) -> bool:
        """Whether one value of the metric is better than another."""
        return one > other if self.at_least else one < other


def parse(text: str) -> Goal | None:
    """The goal in a text: `accuracy >= dense - 0.01`, `rmse <= dense * 1.02`, `f1 >= 0.9`; None where it is none."""
    found = _GOAL.fullmatch(text.strip())
    if found is None:
        return None
    at_least = found["sign"] == ">="
    if found["bound"] is not None:
        return Goal(found["metric"], at_least, 0.0, float(found["bound"]))
    by = float(found["by"]) if found["by"] else 0.0
    if found["how"] == "*":
        return Goal(found["metric"], at_least, by, 0.0)
    return Goal(found["metric"], at_least, 1.0, -by if found["how"] == "-" else by)


@dataclass(frozen=True)
class Tried:
    """A round that is over: the sparsity that it came to, and whether it met the goal."""

    sparsity: float
    met: bool


def dense_metrics(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """What the dense network has of each metric."""
    found: Mapping[str, float] = next(each["metrics"] for each in evaluations if each["when"] == "dense")
    return found


def tried(goal: Goal, evaluations: Sequence[Mapping[str, Any]]) -> list[Tried]:
    """The rounds that are over, by a run's evaluations."""
    dense = dense_metrics(evaluations)
    return [Tried(each["sparsity"], goal.met(each["metrics"], dense)) for each in _rounds(evaluations)]


def told(goal: Goal, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Whether the round that is over meets the goal, in words."""
    value, bound = evaluations[-1]["metrics"][goal.metric], goal.bound(dense_metrics(evaluations))
    met, side = "met" if tried(goal, evaluations)[-1].met else "missed", "least" if goal.at_least else "most"
    return f"the goal is {met}: {goal.metric} {value:.4f}, at {side} {bound:.4f} is wanted"


def best_round(goal: Goal, evaluations: Sequence[Mapping[str, Any]]) -> tuple[int, bool] | None:
    """The round whose network is the result, and whether it meets the goal; None before the first.

    It is the sparsest that meets it; where none does, the one that is nearest to it.
    """
    rounds, dense = _rounds(evaluations), dense_metrics(evaluations)
    met = [each for each in rounds if goal.met(each["metrics"], dense)]
    if met:
        return max(met, key=lambda each: each["sparsity"])["round"], True
    best: Mapping[str, Any] | None = None
    for each in rounds:
        if best is None or goal.better(each["metrics"][goal.metric], best["metrics"][goal.metric]):
            best = each
    return None if best is None else (best["round"], False)


def _rounds(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [each for each in evaluations if each["when"] == "retrained"]


def sparsity_to_try(scheduled: Sequence[float], tried: Sequence[Tried], dense_met: bool) -> float | None:
    """The sparsity of the next round; None where the highest is found.

    scheduled: those of the job's rounds. tried: those so far, in order. dense_met: whether the dense network meets it.
    """
    missed = [each.sparsity for each in tried if not each.met]
    if not missed:
        return scheduled[len(tried)] if len(tried) < len(scheduled) else None
    good = max((each.sparsity for each in tried if each.met), default=0.0 if dense_met else None)
    if good is None or (1 - good) / (1 - min(missed)) < CLOSE:
        return None
    return 1 - math.sqrt((1 - good) * (1 - min(missed)))
