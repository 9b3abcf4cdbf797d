"""What criteria have to do with training: movement is followed in every step, and L1 pulls weights to zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpcprune
from hpcprune.criteria import CRITERIA
from hpcprune.layers import find_layers
from hpcprune.masks import Masks
from hpcprune.rounds import followed
from hpcprune.shards import Span
from hpcprune.stage import Carried
from hpcprune.world import World
from tests.training import OPTIMIZERS, Begun, Small, begin, torchs

STEPS = 8


def plain_steps(begun: Begun, model: nn.Module, masks: Masks | None, optimizer: str, l1: float) -> dict[str, Tensor]:
    """The same steps as torch's documentation would have them; the sum of -g w, and the model stepped."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    stepper = torchs(optimizer, model.parameters())
    for number in range(STEPS):
        before = len(begun.data.asked)
        begun.trainer.step(number, stop=False)
        chosen = torch.tensor(begun.data.asked[before:])
        stepper.zero_grad()
        F.cross_entropy(model(begun.data.inputs[chosen]), begun.data.labels[chosen]).backward()
        for name, parameter in model.named_parameters():
            kept = masks[name] if masks is not None and name in masks else torch.ones_like(parameter)
            assert parameter.grad is not None
            parameter.grad *= kept
            total[name] -= parameter.grad * parameter.detach()
        stepper.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if masks is not None and name in masks:
                    parameter *= masks[name]
                if l1 and name.endswith("weight"):
                    by = OPTIMIZERS[optimizer].lr * l1
                    parameter.copy_(parameter.sign() * (parameter.abs() - by).clamp(min=0))
    return total


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_movement_is_the_sum_over_steps_and_is_carried_over(optimizer: str, sparsity: float) -> None:
    task, plain = Small(), Small().model()
    masks = hpcprune.prune(plain, sparsity, comm=World.alone()) if sparsity else None
    begun = begin(task, optimizer, masks=masks, criterion=CRITERIA["movement"])
    expected = plain_steps(begun, plain, masks, optimizer, 0)
    carried = Carried(begun.trainer.optimizer_state(), {}, masks)
    layers = find_layers(plain)
    found = followed(layers, carried)
    assert found is not None
    for number, layer in enumerate(layers):
        whole = expected[layer.name].reshape(-1)
        torch.testing.assert_close(found(Span(number, 0, layer.weights)), whole)
        torch.testing.assert_close(found(Span(number, 5, 20)), whole[5:20])
    begun.trainer.close()

    fewer = hpcprune.prune(begun.model, 0.8, comm=World.alone())
    again = begin(task, optimizer, model=begun.model, masks=fewer, criterion=CRITERIA["movement"])
    again.trainer.load_optimizer_state(carried.optimizer, masks)
    later = followed(layers, Carried(again.trainer.optimizer_state(), {}, fewer))
    assert later is not None
    for number, layer in enumerate(layers):
        kept = expected[layer.name] * fewer[layer.name]
        torch.testing.assert_close(later(Span(number, 0, layer.weights)), kept.reshape(-1))


def test_other_criteria_follow_nothing() -> None:
    begun = begin(Small(), criterion=CRITERIA["magnitude"])
    begun.trainer.step(0, stop=False)
    assert followed(find_layers(begun.model), Carried(begun.trainer.optimizer_state(), {}, None)) is None


@pytest.mark.parametrize("optimizer", ["plain sgd", "adamw"])
def test_l1_is_the_proximal_step_on_prunable_weights_alone(optimizer: str) -> None:
    plain = Small().model()
    begun = begin(Small(), optimizer, more={"l1": 0.5})
    plain_steps(begun, plain, None, optimizer, 0.5)
    for name, parameter in begun.model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name))
    zeros = {name: int((p == 0).sum()) for name, p in begun.model.named_parameters()}
    assert zeros["0.weight"] > 5 and zeros["0.bias"] == 0
