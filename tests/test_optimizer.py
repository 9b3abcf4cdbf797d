"""The optimizer's state by name: independent of the vectors' layout, and carried over when more is pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hpcprune
from hpcprune.masks import Masks
from hpcprune.optimizer import load_state, make_optimizer, named_state
from hpcprune.survivors import Survivors
from hpcprune.training import Optimizer
from hpcprune.world import World

SPECS = {
    "sgd": Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.1),
    "plain": Optimizer(name="sgd", lr=0.1, momentum=0.0),
    "adam": Optimizer(name="adam", lr=0.01),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 20), nn.BatchNorm1d(20), nn.Linear(20, 4))


def step(survivors: Survivors, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for segment in survivors:
        dense = torch.randn(segment.parameter.numel(), generator=generator)
        segment.packing.gather(dense, survivors.gradient(segment))
    optimizer.step()
    survivors.unpack()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("packing", [True, False])
def test_going_on_under_another_layout_gives_the_same_weights(name: str, packing: bool) -> None:
    models = network(), network()
    masks = hpcprune.prune(models[0], 0.6, comm=World.alone())
    masks.apply(models[1])
    survivors = Survivors(models[0], masks)
    optimizer = make_optimizer(survivors, SPECS[name])
    for seed in (1, 2):
        step(survivors, optimizer, seed)
    saved = {key: value.clone() for key, value in named_state(optimizer, survivors).items()}
    models[1].load_state_dict(models[0].state_dict())

    other = Survivors(models[1], masks, order=["2.bias", "0.weight"], packing=packing)
    going_on = make_optimizer(other, SPECS[name])
    load_state(going_on, other, saved, masks)
    for seed in (3, 4):
        step(survivors, optimizer, seed)
        # The same gradients for the same names, in the other layout.
        gradients = {segment.name: survivors.gradient(segment) for segment in survivors}
        for segment in other:
            dense = torch.zeros(segment.parameter.numel())
            own = next(s for s in survivors if s.name == segment.name)
            own.packing.scatter(gradients[segment.name], dense)
            segment.packing.gather(dense, other.gradient(segment))
        going_on.step()
        other.unpack()
    for (key, one), (_, two) in zip(models[0].state_dict().items(), models[1].state_dict().items(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", SPECS)
def test_what_stays_keeps_its_state_when_more_is_pruned(name: str) -> None:
    model = network()
    before = hpcprune.prune(model, 0.5, comm=World.alone())
    survivors = Survivors(model, before)
    optimizer = make_optimizer(survivors, SPECS[name])
    for seed in (1, 2, 3):
        step(survivors, optimizer, seed)
    state = named_state(optimizer, survivors)
    after = hpcprune.prune(model, 0.8, comm=World.alone())
    later = Survivors(model, after)
    carried = make_optimizer(later, SPECS[name])
    load_state(carried, later, state, before)
    for key, value in named_state(carried, later).items():
        parameter = key.rpartition("/")[0]
        if parameter in after:
            kept = after[parameter].reshape(-1)[before[parameter].reshape(-1)]
            assert torch.equal(value, state[key][kept]), key
            assert value.numel() == after.survivors[parameter]
        else:
            assert torch.equal(value, state[key]), key


def test_state_by_name_shares_memory_and_counts_survivors_alone() -> None:
    model = network()
    masks: Masks = hpcprune.prune(model, 0.75, comm=World.alone())
    survivors = Survivors(model, masks)
    optimizer = make_optimizer(survivors, SPECS["adamw"])
    assert named_state(optimizer, survivors) == {}
    step(survivors, optimizer, 1)
    state = named_state(optimizer, survivors)
    moments = [value for key, value in state.items() if key != "step"]
    assert sum(value.numel() for value in moments) == 2 * len(survivors)
    state["2.weight/exp_avg"].fill_(9)
    assert torch.all(named_state(optimizer, survivors)["2.weight/exp_avg"] == 9)
