"""Goals: how they are read, and that the search ends at the highest sparsity that meets one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcprune.until import CLOSE, Goal, Tried, parse, sparsity_to_try

DENSE = {"accuracy": 0.9, "rmse": 0.5, "f1 of t-shirt": 0.8}


@pytest.mark.parametrize(
    ("text", "metric", "bound", "good", "bad"),
    [
        ("accuracy >= dense - 0.01", "accuracy", 0.89, 0.89, 0.8899),
        ("accuracy>=dense", "accuracy", 0.9, 0.9, 0.89),
        ("accuracy >= 0.95", "accuracy", 0.95, 0.96, 0.94),
        ("rmse <= dense + .02", "rmse", 0.52, 0.51, 0.53),
        ("rmse <= dense * 1.1", "rmse", 0.55, 0.54, 0.56),
        ("rmse <= 1e-1", "rmse", 0.1, 0.1, 0.2),
        ("f1 of t-shirt >= dense - 5e-2", "f1 of t-shirt", 0.75, 0.76, 0.74),
    ],
)
def test_a_goal_is_read(text: str, metric: str, bound: float, good: float, bad: float) -> None:
    goal = parse(text)
    assert goal is not None and goal.metric == metric
    assert goal.bound(DENSE) == pytest.approx(bound)
    assert goal.met({metric: good}, DENSE) and not goal.met({metric: bad}, DENSE)
    assert not goal.met({metric: float("nan")}, DENSE)
    assert goal.better(good, bad) and not goal.better(bad, good)


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy > 0.9", ">= 0.9", "accuracy >= dense / 2", "accuracy >= dens - 1", "a >= 1 2"]
)
def test_what_is_no_goal_is_none(text: str) -> None:
    assert parse(text) is None


def search(scheduled: list[float], highest: float) -> list[Tried]:
    """As a run does it, of a network that meets the goal up to a sparsity."""
    tried: list[Tried] = []
    while (sparsity := sparsity_to_try(scheduled, tried, highest >= 0)) is not None:
        tried.append(Tried(sparsity, sparsity <= highest))
        assert len(tried) < 100
    return tried


def test_rounds_that_all_meet_it_are_those_of_the_schedule() -> None:
    assert search([0.5, 0.8, 0.9], 0.95) == [Tried(0.5, True), Tried(0.8, True), Tried(0.9, True)]


def test_a_round_that_misses_it_is_halved_by_size() -> None:
    tried = search([0.5, 0.92], 0.8)
    assert tried[:3] == [Tried(0.5, True), Tried(0.92, False), Tried(pytest.approx(0.8), True)]


def test_a_goal_that_the_dense_network_misses_ends_with_the_first_round_that_does() -> None:
    assert search([0.5, 0.8], -1) == [Tried(0.5, False)]


@given(st.lists(st.floats(0.05, 0.999), min_size=1, max_size=5, unique=True), st.floats(0, 0.9999))
def test_the_highest_is_found_to_a_tenth_of_the_size(scheduled: list[float], highest: float) -> None:
    tried = search(sorted(scheduled), highest)
    best = max((each.sparsity for each in tried if each.met), default=0.0)
    missed = min((each.sparsity for each in tried if not each.met), default=None)
    assert best <= highest
    if missed is None:
        assert best == max(scheduled)
    else:
        assert highest < missed and (1 - best) / (1 - missed) < CLOSE


def test_it_is_plain_data() -> None:
    assert Goal("x", True, 1.0, 0.0) == parse("x >= dense")
