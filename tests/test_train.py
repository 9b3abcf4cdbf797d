"""The training loop on one rank, against torch's own optimizers: what a step does, and that it can be done again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hpcprune
from hpcprune.errors import JobError, NumericsError
from hpcprune.masks import Masks
from hpcprune.optimizer import make_optimizer
from hpcprune.survivors import Survivors
from hpcprune.train import Plan, average_batch_norm, plan_steps
from hpcprune.training import LrSchedule, Training
from hpcprune.world import World
from tests.training import OPTIMIZERS, Remembering, Small, begin, torchs


def masked(task: Small, sparsity: float = 0.6) -> Masks:
    return hpcprune.prune(task.model(), sparsity, comm=World.alone())


def assert_same_model(a: nn.Module, b: nn.Module, same: bool = True) -> None:
    equal = [torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)]
    assert all(equal) == same


# The plan


@pytest.mark.parametrize(
    ("training", "samples", "ranks", "plan"),
    [
        ({"epochs": 3, "batch_size": 10}, 50, 1, Plan(10, 5, 15)),
        ({"epochs": 3, "batch_size": 10}, 59, 1, Plan(10, 5, 15)),
        ({"epochs": 3, "batch_size": 10}, 50, 4, Plan(10, 5, 15)),
        ({"epochs": 3, "batch_size": 10, "batch_per": "rank"}, 80, 4, Plan(40, 2, 6)),
        ({"epochs": 0.5, "batch_size": 10}, 80, 1, Plan(10, 8, 4)),
        ({"epochs": 2.25, "batch_size": 10}, 80, 1, Plan(10, 8, 18)),
        ({"epochs": 0, "batch_size": 10}, 80, 1, Plan(10, 8, 0)),
        ({"steps": 7, "batch_size": 10}, 80, 1, Plan(10, 8, 7)),
        ({"steps": 0, "batch_size": 10}, 80, 1, Plan(10, 8, 0)),
        ({"epochs": 3, "batch_size": 1000}, 50, 2, Plan(50, 1, 3)),
        ({"epochs": 3, "batch_size": 30, "batch_per": "rank"}, 50, 2, Plan(50, 1, 3)),
        ({"epochs": 1, "batch_size": 3}, 9, 3, Plan(3, 3, 3)),
    ],
)
def test_a_training_falls_into_steps(training: dict[str, float | str], samples: int, ranks: int, plan: Plan) -> None:
    assert plan_steps(Training.model_validate(training), samples, ranks, "train") == plan


def test_a_batch_too_small_for_the_ranks_is_refused() -> None:
    training = Training(epochs=1, batch_size=3)
    with pytest.raises(JobError, match=r"^retrain\.batch_size: 3 is less than a sample for each of 4 ranks; raise it$"):
        plan_steps(training, 100, 4, "retrain")
    assert plan_steps(Training(epochs=1, batch_size=3, batch_per="rank"), 100, 4, "retrain").batch == 12


# Steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_job_describes_torchs_optimizers(name: str) -> None:
    ours = make_optimizer(Survivors(nn.Linear(3, 1)), OPTIMIZERS[name])
    theirs = torchs(name, [nn.Parameter(torch.ones(3))])
    assert type(ours) is type(theirs)
    for key, value in theirs.param_groups[0].items():
        assert key == "params" or ours.param_groups[0][key] == value, key


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("more", [{}, {"accumulate": 5}, {"clip_norm": 0.1}], ids=["plain", "in parts", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_is_the_loop_that_torchs_users_write(name: str, more: dict[str, float], pruned: bool) -> None:
    """The masks are multiplied into the gradients and the weights; the learning rate falls by torch's scheduler."""
    norm = "accumulate" not in more  # a batch norm sees the parts of a batch, not the whole
    task, theirs = Small(norm=norm), Small(norm=norm).model()
    masks = masked(task) if pruned else Masks([], [])
    masks.apply(theirs)
    optimizer = torchs(name, theirs.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=0.1 * OPTIMIZERS[name].lr)
    ours = begin(task, name, masks=masks, more={"lr_schedule": LrSchedule(name="cosine", final=0.1), **more})
    for number in range(12):
        step = ours.trainer.step(number, False)
        chosen = torch.tensor(ours.data.asked[-12:])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(theirs(ours.data.inputs[chosen]), ours.data.labels[chosen])
        loss.backward()
        for key in masks:
            theirs.get_parameter(key).grad.mul_(masks[key])
        if "clip_norm" in more:
            assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1) > 0.1
        assert step.learning_rate == pytest.approx(optimizer.param_groups[0]["lr"])
        assert step.loss == pytest.approx(loss.item(), rel=1e-6)
        assert not step.stop
        assert 0 <= step.waited <= step.seconds
        optimizer.step()
        scheduler.step()
        masks.apply(theirs)
        for key in masks:
            gone = ours.model.get_parameter(key)[~masks[key]]
            assert gone.numel() and not gone.any()
    for a, b in zip(ours.model.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_an_epoch_takes_each_sample_once_and_every_epoch_another_order() -> None:
    for batch_size, left in ((10, 0), (12, 2)):
        training = begin(Small(), batch_size=batch_size, steps=3 * (50 // batch_size))
        for number in range(training.trainer.plan.steps):
            training.trainer.step(number, False)
        length = len(training.data.asked) // 3
        epochs = [training.data.asked[start : start + length] for start in range(0, 3 * length, length)]
        assert all(len(set(epoch)) == 50 - left for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert set(epochs[0]) | set(epochs[1]) | set(epochs[2]) == set(range(50)), "what is dropped is dropped by chance"


def test_a_stop_is_handed_on() -> None:
    training = begin(Small())
    assert [training.trainer.step(number, stop).stop for number, stop in enumerate((False, True, False))] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("spoil", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_no_number_is_an_error_before_a_weight_changes(spoil: float, shown: str) -> None:
    task = Small(spoil=spoil)
    training = begin(task)
    with pytest.raises(
        NumericsError, match=rf"^retrain 1: step 4: NaN or infinite .* rank 0: .*loss.* {shown}.*; lower"
    ):
        training.trainer.step(4, False)
    assert_same_model(training.model, task.model())


# The same again


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_with_the_optimizers_state_gives_the_same_bits(name: str) -> None:
    """In the middle of an epoch and with dropout: no generator is saved."""
    task = Small(norm=True, dropout=True)
    masks = masked(task)
    whole = begin(task, name, masks=masks)
    cut = begin(task, name, masks=masks)
    for number in range(10):
        whole.trainer.step(number, False)
    for number in range(6):
        cut.trainer.step(number, False)
    state = {key: value.clone() for key, value in cut.trainer.optimizer_state().items()}
    cut.trainer.close()
    torch.manual_seed(99)
    resumed = begin(task, name, masks=masks, model=copy.deepcopy(cut.model))
    resumed.trainer.load_optimizer_state(state, masks)
    again = resumed.trainer.optimizer_state()
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    for number in range(6, 10):
        resumed.trainer.step(number, False)
    assert_same_model(resumed.model, whole.model)
    assert resumed.data.asked == whole.data.asked[6 * 12 :]
    if name != "plain sgd":
        forgetful = begin(task, name, masks=masks, model=copy.deepcopy(cut.model))
        for number in range(6, 10):
            forgetful.trainer.step(number, False)
        assert_same_model(forgetful.model, whole.model, same=False)


def test_the_optimizers_state_is_as_small_as_the_survivors() -> None:
    task = Small()
    masks = masked(task, 0.9)
    survivors = masks.survivors | {"0.bias": 12, "2.bias": 4}
    for name, moments in (("plain sgd", 0), ("sgd", 1), ("adam", 2), ("adamw", 2)):
        training = begin(task, name, masks=masks)
        assert training.trainer.optimizer_state() == {}
        training.trainer.step(0, False)
        sizes = [(key.rpartition("/")[0], value.numel()) for key, value in training.trainer.optimizer_state().items()]
        assert sorted(size for size in sizes if size != ("", 1)) == sorted([*survivors.items()] * moments)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    task = Small(dropout=True)
    runs = [begin(task, seed=seed) for seed in (3, 3, 4)]
    for run in runs:
        torch.manual_seed(id(run) % 1000)
        for number in range(8):
            run.trainer.step(number, False)
    assert_same_model(runs[0].model, runs[1].model)
    assert_same_model(runs[0].model, runs[2].model, same=False)
    assert runs[0].data.asked == runs[1].data.asked != runs[2].data.asked


def test_alone_the_statistics_of_batch_norms_stay_as_they_are() -> None:
    model = Small(norm=True).model()
    model(Remembering().inputs)
    before = copy.deepcopy(model)
    average_batch_norm(model, World.alone())
    assert_same_model(model, before)
    average_batch_norm(nn.BatchNorm1d(3, track_running_stats=False), World.alone())
