"""hpcprune.prune, against torch's own pruning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import hpcprune
from hpcprune.errors import JobError, NumericsError
from hpcprune.world import World


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.Linear(100, 301), nn.Linear(301, 77), nn.LSTM(13, 7)).to(dtype)


def targets(model: nn.Module) -> list[tuple[nn.Module, str]]:
    pairs = [(model[0], "weight"), (model[1], "weight"), (model[2], "weight")]
    return [*pairs, (model[3], "weight_ih_l0"), (model[3], "weight_hh_l0")]


@pytest.mark.parametrize("sparsity", [0, 0.013, 0.5, 0.9, 0.999])
def test_global_magnitude_masks_equal_torchs(sparsity: float) -> None:
    ours, theirs = network(), network()
    masks = hpcprune.prune(ours, sparsity, comm=World.alone())
    torch_prune.global_unstructured(targets(theirs), torch_prune.L1Unstructured, amount=sparsity)
    for name, (module, weight) in zip(masks, targets(theirs), strict=True):
        assert torch.equal(masks[name], getattr(module, f"{weight}_mask").bool()), name
        assert torch.equal(ours.get_parameter(name), getattr(module, weight)), name


def test_layer_scope_masks_equal_torchs() -> None:
    ours, theirs = network(), network()
    masks = hpcprune.prune(ours, 0.83, scope="layer", comm=World.alone())
    for name, (module, weight) in zip(masks, targets(theirs), strict=True):
        torch_prune.l1_unstructured(module, weight, amount=0.83)
        assert torch.equal(masks[name], getattr(module, f"{weight}_mask").bool()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_exactly_as_many_go_as_asked_for_whatever_the_ties(dtype: torch.dtype) -> None:
    model = network(dtype)
    masks = hpcprune.prune(model, 0.77, comm=World.alone())
    assert masks.weights - masks.nonzeros == round(0.77 * masks.weights)
    kept = torch.cat([model.get_parameter(name)[masks[name]].abs().double() for name in masks])
    gone = torch.cat([network(dtype).get_parameter(name)[~masks[name]].abs().double() for name in masks])
    assert gone.max() <= kept.min()


def test_ties_are_cut_in_global_order() -> None:
    model = nn.ModuleList([nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)])
    for parameter in model.parameters():
        nn.init.constant_(parameter, -0.5)
    masks = hpcprune.prune(model, 0.625, comm=World.alone())
    flat = torch.cat([masks[name].reshape(-1) for name in masks])
    assert flat.tolist() == [False] * 10 + [True] * 6


def test_pruning_again_goes_further_and_brings_nothing_back() -> None:
    """Through the run's own function, whose masks of one round are what the next begins with."""
    from hpcprune.criteria import CRITERIA
    from hpcprune.layers import find_layers
    from hpcprune.masks import Masks
    from hpcprune.ranking import Target, prune_layers
    from hpcprune.shards import deal

    model = network()
    parameters = dict(model.named_parameters())
    layers = find_layers(model)
    shards = deal(layers, 1)
    masks = Masks.full(layers)
    for scope in ("global", "layer"):
        for sparsity in (0.3, 0.3, 0.7, 0.95):
            target = Target(CRITERIA["magnitude"], scope, sparsity)
            found = prune_layers(parameters, masks, shards, target, World.alone()).masks
            for name in found:
                assert not torch.any(found[name] & ~masks[name])
            masks = found
            # What is pruned gets large values: only its mask may keep it from coming back.
            with torch.no_grad():
                for name in masks:
                    parameters[name].masked_fill_(~masks[name], 100.0)
    assert masks.nonzeros <= round(0.05 * masks.weights) + len(masks)


@pytest.mark.parametrize("sparsity", [1.2, -0.1, 1, float("nan"), "ninety"])
def test_a_sparsity_out_of_range_is_refused(sparsity: object) -> None:
    with pytest.raises(JobError, match=r"is not in \[0, 1\)"):
        hpcprune.prune(network(), sparsity, comm=World.alone())


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(JobError, match="criterion: 'magic' is not one of: magnitude"):
        hpcprune.prune(network(), 0.5, criterion="magic", comm=World.alone())
    with pytest.raises(JobError, match="scope: 'local' is not one of: global, layer"):
        hpcprune.prune(network(), 0.5, scope="local", comm=World.alone())


def test_a_nan_is_an_error_that_names_the_layer_and_the_count_and_changes_nothing() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[3, :5] = float("nan")
    before = model[1].weight.clone()
    with pytest.raises(NumericsError, match=r"2\.weight: 5 of "):
        hpcprune.prune(model, 0.5, comm=World.alone())
    assert torch.equal(model[1].weight, before)


def test_a_model_that_is_not_contiguous_is_pruned_as_any_other() -> None:
    plain, strided = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    strided.load_state_dict(plain.state_dict())
    strided.to(memory_format=torch.channels_last)
    a, b = (hpcprune.prune(model, 0.6, comm=World.alone()) for model in (plain, strided))
    assert torch.equal(a["weight"], b["weight"])
    assert torch.equal(plain.weight, strided.weight)
