"""Each criterion against its formula, written here again in float64 over whole models, and torch's autograd."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torch_geometric.nn import Linear
from transformers.pytorch_utils import Conv1D

import hpcprune
from hpcprune.errors import JobError, NumericsError
from hpcprune.world import World

BATCH = 8
Scores = dict[str, Tensor]


def network() -> nn.Module:
    """A convolution, a grouped one that strides and pads, and linear layers."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=4, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 20, 1),
        nn.Flatten(),
        nn.Linear(20 * 4 * 3, 10),
    )


def samples(count: int = 37) -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 10)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(data: TensorDataset, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Of nearly equal sizes."""
    count = math.ceil(len(data) / size)
    return [data[len(data) * n // count : len(data) * (n + 1) // count] for n in range(count)]


def gradients(model: nn.Module, batch: Any) -> Scores:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss(model, batch), list(named.values())), strict=True))


def weights(model: nn.Module) -> Scores:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


def magnitude(model: nn.Module, data: TensorDataset) -> Scores:
    return {name: w.abs() for name, w in weights(model).items()}


def lamp(model: nn.Module, data: TensorDataset) -> Scores:
    found = {}
    for name, w in weights(model).items():
        flat = w.reshape(-1).square()
        found[name] = torch.stack([u / flat[flat >= u].sum() for u in flat]).reshape(w.shape)
    return found


def sensitivity(model: nn.Module, data: TensorDataset) -> Scores:
    found = {name: torch.zeros_like(w) for name, w in weights(model.eval()).items()}
    for batch in batches(data):
        for name, g in gradients(model, batch).items():
            if name in found:
                found[name] += (model.get_parameter(name).detach() * g).abs() * len(batch[1]) / len(data)
    return found


def snip(model: nn.Module, data: TensorDataset) -> Scores:
    total: Scores = {}
    model.train()
    for batch in batches(data):
        for name, g in gradients(model, batch).items():
            total[name] = total.get(name, torch.zeros_like(g)) + g * len(batch[1])
    return {name: (w * total[name]).abs() for name, w in weights(model).items()}


def fisher(model: nn.Module, data: TensorDataset) -> Scores:
    found = {name: torch.zeros_like(w) for name, w in weights(model.eval()).items()}
    for batch in batches(data, 1):
        for name, g in gradients(model, batch).items():
            if name in found:
                found[name] += (model.get_parameter(name).detach() * g).square()
    return found


def wanda(model: nn.Module, data: TensorDataset) -> Scores:
    """By unfolding what each convolution sees."""
    found: Scores = {}
    x = data.tensors[0].double()
    model.eval()
    for number, module in enumerate(model):
        if isinstance(module, nn.Conv2d):
            columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            norm = columns.transpose(0, 1).reshape(columns.shape[1], -1).norm(dim=1)
            per_group = norm.reshape(module.groups, 1, *module.weight.shape[1:])
            by_row = per_group.expand(-1, module.out_channels // module.groups, *[-1] * 3).reshape(module.weight.shape)
            found[f"{number}.weight"] = module.weight.detach().abs() * by_row
        elif isinstance(module, nn.Linear):
            found[f"{number}.weight"] = module.weight.detach().abs() * x.norm(dim=0)
        x = module(x).detach()
    return found


def movement(model: nn.Module, data: TensorDataset) -> Scores:
    whole = gradients(model.eval(), data[:])
    return {name: -w * whole[name] for name, w in weights(model).items()}


REFERENCES: dict[str, Callable[[nn.Module, TensorDataset], Scores]] = {
    "magnitude": magnitude,
    "l1": magnitude,
    "lamp": lamp,
    "sensitivity": sensitivity,
    "snip": snip,
    "fisher": fisher,
    "movement": movement,
    "wanda": wanda,
}


def double(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


def pruned_by(scores: Scores, sparsity: float, scope: str) -> dict[str, Tensor]:
    """By sorting: the plain way."""
    if scope == "row":
        masks = {name: torch.ones(s.shape[0], s[0].numel(), dtype=torch.bool) for name, s in scores.items()}
        for name, s in scores.items():
            for row, mask in zip(s.reshape(len(s), -1), masks[name], strict=True):
                mask[row.sort(stable=True).indices[: round(sparsity * row.numel())]] = False
        return {name: mask.reshape(scores[name].shape) for name, mask in masks.items()}
    if scope == "layer":
        return {n: pruned_by({n: s}, sparsity, "global")[n] for n, s in scores.items()}
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    kept = torch.ones(flat.shape, dtype=torch.bool)
    kept[flat.sort(stable=True).indices[: round(sparsity * flat.numel())]] = False
    pieces = kept.split([s.numel() for s in scores.values()])
    return {name: piece.reshape(scores[name].shape) for (name, piece) in zip(scores, pieces, strict=True)}


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("criterion", REFERENCES)
def test_masks_are_those_of_the_formula(criterion: str, scope: str) -> None:
    model, data = network().double(), double(samples())
    with torch.no_grad():
        model[1].running_mean.uniform_(-0.5, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = pruned_by(REFERENCES[criterion](network_like(model), data), 0.6, scope)
    masks = hpcprune.prune(
        model, 0.6, scope=scope, criterion=criterion, data=data, loss=loss, batch_size=BATCH, comm=World.alone()
    )
    for name, kept in expected.items():
        assert torch.equal(masks[name], kept), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * masks[name] if name in masks else before[name]), name
    assert all(module.training for module in model.modules()), "the model's modes are as they were"
    assert all(parameter.grad is None for parameter in model.parameters())


def network_like(model: nn.Module) -> nn.Module:
    twin = network().double()
    twin.load_state_dict(model.state_dict())
    return twin


def test_each_criterion_has_its_own_scope_where_none_is_given() -> None:
    def by_row(criterion: str) -> bool:
        masks = hpcprune.prune(network(), 0.5, criterion=criterion, data=samples(), comm=World.alone())
        return all(len(set(m.flatten(1).sum(1).tolist())) == 1 for m in masks.values())

    assert by_row("wanda")
    assert not by_row("magnitude")


@pytest.mark.parametrize("criterion", ["wanda", "snip", "fisher"])
def test_what_is_random_is_left_as_it_was(criterion: str) -> None:
    drawn = []
    for look in (False, True):
        model = network()
        torch.manual_seed(9), np.random.seed(9), random.seed(9)
        if look:
            hpcprune.prune(model, 0.5, criterion=criterion, data=samples(), loss=loss, comm=World.alone())
        drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert drawn[0] == drawn[1]


def test_a_last_batch_is_not_of_one_sample() -> None:
    """Which a batch norm in training would refuse."""
    model, data = (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 10)),
        TensorDataset(torch.randn(33, 4), torch.arange(33) % 10),
    )
    hpcprune.prune(model, 0.5, criterion="snip", data=data, loss=loss, batch_size=32, comm=World.alone())


def test_sparse_gradients_of_embeddings_are_scores_too() -> None:
    def masks(sparse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        data = TensorDataset(torch.arange(60).reshape(20, 3) % 20, torch.arange(20) % 3)
        options = {"embeddings": True, "data": data, "loss": loss, "comm": World.alone()}
        return [*hpcprune.prune(model, 0.5, criterion="fisher", **options).values()]

    assert all(torch.equal(a, b) for a, b in zip(masks(True), masks(False), strict=True))


def test_random_masks_follow_from_the_seed_and_are_of_no_pattern() -> None:
    def mask(seed: int) -> Tensor:
        model = nn.Sequential(nn.Linear(300, 200), nn.Linear(300, 200))
        return torch.stack([*hpcprune.prune(model, 0.5, criterion="random", seed=seed, comm=World.alone()).values()])

    one, again, other = mask(1), mask(1), mask(2)
    assert torch.equal(one, again)
    for a, b in ((one, other), (one[0], one[1]), (one[:, :100], one[:, 100:])):
        agreeing = int((a == b).sum())
        assert abs(agreeing - a.numel() / 2) < 5 * math.sqrt(a.numel()) / 2
    assert not torch.equal(one[0], mask(1)[1])


def test_what_was_pruned_before_stays_and_counts() -> None:
    """Row by row, over rounds, through the run's own function."""
    from hpcprune.criteria import CRITERIA
    from hpcprune.layers import find_layers
    from hpcprune.masks import Masks
    from hpcprune.ranking import Target, prune_layers
    from hpcprune.shards import deal

    model = network()
    layers = find_layers(model)
    masks, parameters = Masks.full(layers), dict(model.named_parameters())
    for sparsity in (0.3, 0.3, 0.55, 0.9):
        target = Target(CRITERIA["magnitude"], "row", sparsity)
        found = prune_layers(parameters, masks, deal(layers, 1, whole_rows=True), target, World.alone()).masks
        for name, mask in found.items():
            assert not torch.any(mask & ~masks[name])
            width = mask[0].numel()
            assert set((~mask).flatten(1).sum(1).tolist()) == {round(sparsity * width)}
        masks = found
        with torch.no_grad():
            for name in masks:
                parameters[name].masked_fill_(~masks[name], 100.0)


def test_what_went_before_goes_first_in_a_row_whatever_is_left() -> None:
    """Scores may be below 0, as movement's are, and those of pruned weights are nothing to go by."""
    from hpcprune.rows import select_in_rows

    scores, before = (
        torch.tensor([-3.0, 9.0, -1.0, -2.0, 9.0, -4.0]),
        np.packbits([1, 0, 1, 1, 0, 1], bitorder="little"),
    )
    (bits,) = select_in_rows([scores], [before], [6], [0.5], ["w"], World.alone())
    assert np.unpackbits(bits, count=6, bitorder="little").tolist() == [1, 0, 1, 1, 0, 0]


def test_first_among_equals_go_in_a_row() -> None:
    model = nn.Linear(10, 3)
    nn.init.constant_(model.weight, 0.5)
    mask = hpcprune.prune(model, 0.4, scope="row", comm=World.alone())["weight"]
    assert mask.tolist() == [[False] * 4 + [True] * 6] * 3


def test_a_layer_of_zeros_has_lamp_scores() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight)
    masks = hpcprune.prune(model, 0.7, criterion="lamp", comm=World.alone())
    assert masks["1.weight"].sum() == 36 - round(0.7 * 36)
    assert not masks["0.weight"].any()


def test_shared_and_frozen_weights_are_scored() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(3 * self.first(x).relu())

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(9, 6, dtype=torch.float64)
    seen = x.square().sum(0) + (3 * model.first(x).relu()).square().sum(0)
    expected = pruned_by({"w": (model.first.weight.abs() * seen.sqrt()).detach()}, 0.5, "row")["w"]
    masks = hpcprune.prune(model, 0.5, criterion="wanda", data=[*x], batch_size=4, comm=World.alone())
    assert torch.equal(masks["first.weight"], expected)

    frozen, data = network().double(), double(samples())
    frozen[0].weight.requires_grad_(False)
    masks = hpcprune.prune(frozen, 0.5, criterion="fisher", data=data, loss=loss, comm=World.alone())
    free = hpcprune.prune(network().double(), 0.5, criterion="fisher", data=data, loss=loss, comm=World.alone())
    assert torch.equal(masks["0.weight"], free["0.weight"])
    assert not frozen[0].weight.requires_grad


def test_inputs_of_other_libraries_linear_layers_are_those_that_meet_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 5), nn.ReLU(), Linear(6, 4)).double()  # weights [5, 6] and [4, 6]
    x = torch.randn(9, 3, 5, dtype=torch.float64) * torch.arange(1, 6)
    between = (x @ model[0].weight + model[0].bias).relu()
    seen = [each.detach().flatten(0, 1).norm(dim=0) for each in (x, between)]
    scores = {"0.weight": model[0].weight.abs() * seen[0][:, None], "2.weight": model[2].weight.abs() * seen[1]}
    expected = pruned_by({name: each.detach() for name, each in scores.items()}, 0.5, "layer")
    given = {"criterion": "wanda", "data": [*x], "batch_size": 4, "comm": World.alone()}
    with pytest.raises(JobError, match=r"prune.scope: row ranks .* 0\.weight \(Conv1D\)"):
        hpcprune.prune(model, 0.5, **given)
    masks = hpcprune.prune(model, 0.5, scope="layer", **given)
    assert all(torch.equal(masks[name], kept) for name, kept in expected.items())


def test_recurrent_and_transposed_layers_are_scored_by_their_gradients() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.up = nn.LSTM(5, 4, bidirectional=True), nn.ConvTranspose1d(8, 6, 2, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.rnn(x)[0].transpose(1, 2)).mean(2)

    torch.manual_seed(0)
    model, x = Both(), torch.randn(20, 7, 5)
    data = TensorDataset(x, torch.arange(20) % 6)
    masks = hpcprune.prune(model, 0.5, criterion="sensitivity", data=data, loss=loss, comm=World.alone())
    assert {"rnn.weight_hh_l0_reverse", "up.weight"} <= set(masks)
    with pytest.raises(JobError, match=r"rnn\.weight_ih_l0 is LSTM's; exclude it"):
        hpcprune.prune(model, 0.5, criterion="wanda", data=data, comm=World.alone())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"criterion": "wanda"}, "data: not given; wanda looks at samples: give a map-style dataset"),
    "empty data": ({"criterion": "wanda", "data": []}, "data: list, without samples"),
    "no loss": ({"criterion": "fisher", "data": samples()}, "loss: None is not a function; fisher needs the mean"),
    "a loss that is none": ({"criterion": "fisher", "data": samples(), "loss": lambda m, b: 1.0}, "loss: gave float"),
    "a loss a sample": (
        {"criterion": "snip", "data": samples(), "loss": lambda m, b: m(b[0])},
        r"loss: gave Tensor of shape \[18, 10\], not the mean over the batch",
    ),
    "no batch": ({"criterion": "wanda", "data": samples(), "batch_size": 0}, "batch_size: 0 is not a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_criterion_needs_is_asked_for(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(JobError, match=message):
        hpcprune.prune(network(), 0.5, comm=World.alone(), **given)


def test_a_layer_that_sees_nothing_is_named() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    with pytest.raises(JobError, match=r"attention\.out_proj\.weight saw no input while the model ran"):
        hpcprune.prune(
            Attends(), 0.5, criterion="wanda", data=[*torch.randn(4, 8)], exclude=["*in_proj*"], comm=World.alone()
        )


@pytest.mark.parametrize("criterion", ["wanda", "sensitivity", "fisher"])
def test_a_sample_that_is_not_finite_is_an_error_and_changes_nothing(criterion: str) -> None:
    model, data = network(), samples()
    data.tensors[0][5, 0, 0, 0] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NumericsError, match="NaN or infinite values on rank 0"):
        hpcprune.prune(model, 0.5, criterion=criterion, data=data, loss=loss, comm=World.alone())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
