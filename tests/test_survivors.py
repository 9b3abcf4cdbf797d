"""Survivors: packing, unpacking, and zeros that stay zero whatever the optimizer does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hpcprune
from hpcprune.survivors import Survivors
from hpcprune.world import World


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_train_as_masked_dense_weights_do_and_zeros_stay_zero(name: str) -> None:
    """Against torch's own optimizer on the dense weights, the masks multiplied in after each step."""
    ours, theirs = network(), network()
    masks = hpcprune.prune(ours, 0.7, comm=World.alone())
    masks.apply(theirs)
    survivors = Survivors(ours, masks)
    optimizer, dense_optimizer = OPTIMIZERS[name](survivors.parameters()), OPTIMIZERS[name](theirs.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        inputs = torch.randn(8, 2, 6, 6, generator=generator)
        labels = torch.randint(5, (8,), generator=generator)
        for model in (ours, theirs):
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
        survivors.pack_gradients()
        optimizer.step()
        survivors.unpack()
        for key, parameter in theirs.named_parameters():
            if key in masks:
                parameter.grad.mul_(masks[key])
        dense_optimizer.step()
        masks.apply(theirs)
        for key in masks:
            pruned = ours.get_parameter(key)[~masks[key]]
            assert pruned.numel() and torch.all(pruned == 0)
    for (key, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


def test_the_packed_vector_holds_survivors_and_unprunable_parameters_alone() -> None:
    model = network()
    masks = hpcprune.prune(model, 0.7, comm=World.alone())
    survivors = Survivors(model, masks)
    others = sum(p.numel() for name, p in model.named_parameters() if name not in masks)
    assert len(survivors) == masks.nonzeros + others
    assert survivors.packed_bytes == 4 * len(survivors)
    assert survivors.dense_bytes == 4 * sum(p.numel() for p in model.parameters())
    state = OPTIMIZERS["adamw"](survivors.parameters())
    survivors.parameters()[0].grad.fill_(1)
    state.step()
    moments = [t for v in state.state.values() for t in v.values() if t.numel() > 1]
    assert sum(t.numel() for t in moments) == 2 * len(survivors)


def test_pruned_values_are_zeroed_when_packing_begins() -> None:
    model = network()
    masks = hpcprune.prune(network(), 0.7, comm=World.alone())
    Survivors(model, masks)
    for name in masks:
        assert torch.all(model.get_parameter(name)[~masks[name]] == 0)


def test_a_parameter_without_a_gradient_counts_as_zeros_and_a_frozen_one_is_left_out() -> None:
    model = network()
    model[3].weight.requires_grad = False
    survivors = Survivors(model)
    assert len(survivors) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    survivors.gradients()[0].fill_(7)
    survivors.pack_gradients()
    assert torch.all(survivors.gradients()[0] == 0)


def test_dense_gradients_are_freed_once_packed() -> None:
    model = network()
    survivors = Survivors(model)
    model(torch.randn(2, 2, 6, 6)).sum().backward()
    survivors.pack_gradients()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_dtype_has_its_own_vector() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16)])
    survivors = Survivors(model, hpcprune.prune(model, 0.5, scope="layer", comm=World.alone()))
    assert [(p.dtype, p.numel()) for p in survivors.parameters()] == [(torch.bfloat16, 12), (torch.float32, 12)]
    survivors.packed[torch.bfloat16].data.fill_(3)
    survivors.unpack()
    assert int((model[1].weight == 3).sum()) == 8 and int((model[1].weight == 0).sum()) == 8
