"""Sparsity over rounds against the published formula, and the learning rate against torch's own schedulers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune
from torch.optim import lr_scheduler

from hpcprune.prune_section import Prune
from hpcprune.schedule import learning_rate_factor, pruned_count, sparsity_of_round
from hpcprune.training import LrSchedule


def make(sparsity: float, rounds: int, schedule: str) -> Prune:
    return Prune.model_validate({"sparsity": sparsity, "rounds": rounds, "schedule": schedule})


def test_one_shot_is_the_whole_at_once() -> None:
    assert [sparsity_of_round(make(0.9, 1, "one-shot"), number) for number in (0, 1)] == [0.0, 0.9]


def test_linear_goes_in_equal_parts() -> None:
    assert [sparsity_of_round(make(0.8, 4, "linear"), n) for n in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 20])
def test_cubic_is_the_published_formula(rounds: int) -> None:
    final, initial = 0.95, 0.0
    for number in range(rounds + 1):
        # Zhu and Gupta 2017, equation 1, with t0 = 0, one pruning step a round.
        published = final + (initial - final) * (1 - number / rounds) ** 3
        assert sparsity_of_round(make(final, rounds, "cubic"), number) == pytest.approx(published, abs=1e-12)


@given(
    st.floats(0, 1, exclude_max=True, allow_subnormal=False),
    st.integers(1, 60),
    st.sampled_from(["linear", "cubic"]),
)
def test_sparsity_never_falls_and_ends_exactly(sparsity: float, rounds: int, schedule: str) -> None:
    prune = make(sparsity, rounds, schedule)
    steps = [sparsity_of_round(prune, number) for number in range(rounds + 1)]
    assert steps[0] == 0 and steps[-1] == sparsity
    assert all(a <= b for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("number", [-1, 4])
def test_a_round_that_there_is_not(number: int) -> None:
    with pytest.raises(ValueError, match=f"round {number} is not in 0 to 3"):
        sparsity_of_round(make(0.5, 3, "linear"), number)


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_as_many_are_pruned_as_torch_prunes(total: int, sparsity: float) -> None:
    if sparsity > 0:  # torch takes a whole 0 for a count, and 0.0 for a share
        layer = torch.nn.Linear(total, 1, bias=False)
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert pruned_count(total, sparsity) == int((layer.weight_mask == 0).sum())


def test_a_half_is_rounded_to_the_even() -> None:
    assert [pruned_count(total, 0.5) for total in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert pruned_count(0, 0.9) == 0 and pruned_count(10, 0.0) == 0


def torch_factors(build: str, schedule: LrSchedule, steps: int) -> list[float]:
    """The learning rates of `steps` steps at a base of 1, from torch.optim.lr_scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rest = steps - schedule.warmup
    later: lr_scheduler.LRScheduler
    if build == "cosine":
        later = lr_scheduler.CosineAnnealingLR(optimizer, rest, eta_min=schedule.final)
    elif build == "linear":
        later = lr_scheduler.LinearLR(optimizer, 1.0, schedule.final, rest)
    elif build == "step":
        milestones = [-int(-share * rest // 1) for share in schedule.at]  # rounded up
        later = lr_scheduler.MultiStepLR(optimizer, milestones, gamma=schedule.factor)
    else:
        later = lr_scheduler.ConstantLR(optimizer, 1.0)
    scheduler: lr_scheduler.LRScheduler = later
    if schedule.warmup:
        warm = lr_scheduler.LinearLR(optimizer, 1 / (schedule.warmup + 1), 1.0, schedule.warmup)
        scheduler = lr_scheduler.SequentialLR(optimizer, [warm, later], [schedule.warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    "values",
    [
        {"name": "constant"},
        {"name": "linear"},
        {"name": "linear", "final": 0.25},
        {"name": "cosine"},
        {"name": "cosine", "final": 0.1},
        {"name": "step"},
        {"name": "step", "at": [0.25, 0.5, 0.8], "factor": 0.5},
    ],
)
def test_the_learning_rate_is_torchs(values: dict[str, object], warmup: int) -> None:
    schedule = LrSchedule.model_validate({**values, "warmup": warmup})
    steps = 40 + warmup
    ours = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert ours == pytest.approx(torch_factors(schedule.name, schedule, steps), abs=1e-9)


def test_a_warm_up_longer_than_the_training_only_rises() -> None:
    schedule = LrSchedule(name="cosine", warmup=9)
    assert [learning_rate_factor(schedule, step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(("step", "steps"), [(-1, 5), (5, 5), (0, 0)])
def test_a_step_that_there_is_not(step: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is not in 0 to {steps - 1}"):
        learning_rate_factor(LrSchedule(), step, steps)


def test_schedules_import_no_torch() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    code = "import sys, hpcprune.schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
