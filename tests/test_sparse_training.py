"""Retraining with sparse layers: the steps are those of dense layers, but for the order of sums."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune import breakeven
from hpcprune.breakeven import sparse_layers
from hpcprune.errors import TaskError
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.sparse import training
from hpcprune.sparse.training import faster_layers
from hpcprune.survivors import Survivors
from hpcprune.train import Trainer
from hpcprune.world import World
from tests.test_sparse import mask_for
from tests.test_sparse_modules import saved
from tests.training import Begun, Small, begin

NAMES = ["0.weight", "2.weight"]


class Single(Small):
    """In float32, which sparse products take."""

    def model(self) -> nn.Module:
        return super().model().float()

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0].float())


class Blocks(Single):
    """Whole blocks of weights are there, the others zero."""

    def model(self) -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4))
        with torch.no_grad():
            for layer in model[::2]:
                layer.weight *= mask_for("blocks", *layer.weight.shape)
        return model


def start(model: nn.Module, masks: Masks, sparse: list[str], task: Small | None = None, **more: Any) -> Begun:
    survivors = Survivors(model, masks, sparse=sparse)
    return begin(task or Single(), masks=masks, model=model, survivors=survivors, more=more)


def both(task: Small, sparse: list[str], **more: Any) -> tuple[Begun, Begun]:
    """A training with sparse layers, and one without."""
    model = task.model()
    linear = torch.cat([layer.weight.flatten() for layer in model if isinstance(layer, nn.Linear)])
    masks = hpcprune.prune(model, max(0.7, float((linear == 0).double().mean())))
    dense = copy.deepcopy(model)
    return start(model, masks, sparse, task, **more), start(dense, masks, [], task, **more)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_losses(ours: Begun, theirs: Begun, steps: int, within: float) -> None:
    for number in range(steps):
        own, other = (begun.trainer.step(number, False) for begun in (ours, theirs))
        assert own.loss == pytest.approx(other.loss, rel=within)


def assert_same_weights(ours: Begun, theirs: Begun, *, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """When both trainings are over."""
    for begun in (ours, theirs):
        begun.trainer.close()
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=rtol, atol=atol)


@pytest.mark.parametrize("sparse", [NAMES, NAMES[:1], NAMES[1:]])
@pytest.mark.parametrize("more", [{}, {"accumulate": 3}, {"clip_norm": 0.1}], ids=str)
def test_steps_are_those_of_dense_layers(sparse: list[str], more: dict[str, Any]) -> None:
    ours, theirs = both(Single(), sparse, **more)
    assert_same_losses(ours, theirs, 12, 1e-4)
    state, others = ours.trainer.optimizer_state(), theirs.trainer.optimizer_state()
    assert {name: value.shape for name, value in state.items()} == {n: value.shape for n, value in others.items()}
    for name, value in state.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-3, atol=1e-5)


def test_whole_blocks_train_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    own = training.blocks_survivors_linear
    monkeypatch.setattr(training, "blocks_survivors_linear", lambda *of: products.append(of[0].shape) or own(*of))
    ours, theirs = both(Blocks(), ["0.weight", "2.weight", "4.weight"])
    assert_same_losses(ours, theirs, 5, 1e-4)
    assert_same_weights(ours, theirs)
    assert len(products) == 5 * 3


def test_the_dense_weights_are_up_to_date_when_they_are_looked_at() -> None:
    ours, _ = both(Single(), NAMES)
    before = weights(ours.model)
    ours.trainer.step(0, False)
    stale = weights(ours.model)
    assert torch.equal(stale["0.weight"], before["0.weight"]) and not torch.equal(stale["0.bias"], before["0.bias"])
    ours.trainer.optimizer_state()
    now = weights(ours.model)
    assert not torch.equal(now["0.weight"], before["0.weight"])
    assert torch.equal(now["0.weight"] != 0, before["0.weight"] != 0)
    ours.trainer.step(1, False)
    ours.trainer.close()
    x = torch.randn(3, 6)
    closed = weights(ours.model)
    assert not torch.equal(closed["0.weight"], now["0.weight"])
    assert type(ours.model[0]) is nn.Linear and not {"_leaf", "_product"} & {*vars(ours.model[0])}  # type: ignore[index]
    expected = nn.functional.linear(x, closed["0.weight"], closed["0.bias"])
    torch.testing.assert_close(ours.model[0](x), expected)  # type: ignore[index]


def reloaded(model: nn.Module) -> nn.Module:
    other = Single().model()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("taken", [copy.deepcopy, saved, reloaded])
def test_what_is_taken_of_a_model_while_it_trains_is_dense_and_has_its_weights(
    taken: Callable[[nn.Module], nn.Module],
) -> None:
    ours, _ = both(Single(), NAMES)
    ours.trainer.step(0, False)
    random = torch.get_rng_state()
    other, x = taken(ours.model), torch.randn(3, 6)
    assert taken is reloaded or torch.equal(torch.randn(3, 6, generator=drawing(random)), x)
    assert [type(layer) for layer in other] == [nn.Linear, nn.ReLU, nn.Linear]  # type: ignore[attr-defined]
    assert {*vars(other[0])} == {*vars(nn.Linear(1, 1))}  # type: ignore[index]
    expected = ours.model(x).detach()
    torch.testing.assert_close(other(x), expected)
    for parameter in other.parameters():
        parameter.data.zero_()
    ours.trainer.step(1, False)
    assert not torch.equal(ours.model(x), expected) and not other(x).any()


def test_whoever_reads_a_weight_while_it_trains_has_that_of_now() -> None:
    """As torch's fused layers do, which call no layer."""
    ours, _ = both(Single(), NAMES)
    for number in range(2):
        ours.trainer.step(number, False)
        x = torch.randn(3, 6)
        layer = ours.model[0]  # type: ignore[index]
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        assert layer.weight is ours.model.get_parameter("0.weight")


def drawing(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def test_a_layer_that_trains_sparse_takes_its_input_by_name_too() -> None:
    class Names(Single):
        def predict(self, model: Any, batch: Any) -> Any:
            return model[2](input=model[0](input=batch[0].float()))

    ours, theirs = both(Names(), NAMES)
    assert ours.trainer.step(0, False).loss == pytest.approx(theirs.trainer.step(0, False).loss, rel=1e-4)


def test_a_step_works_without_dense_gradients() -> None:
    ours, _ = both(Single(), NAMES)
    seen = []
    for name in NAMES:
        ours.model.get_parameter(name).register_hook(lambda gradient: seen.append(gradient))
    ours.trainer.step(0, False)
    assert not seen


def test_a_layer_that_a_batch_does_not_use_has_no_gradient() -> None:
    class Halves(Single):
        def predict(self, model: Any, batch: Any) -> Any:
            return model[0](batch[0].float())[:, :4]

    ours, _ = both(Halves(), NAMES)
    before = ours.trainer.survivors.packed[torch.float32].detach().clone()
    ours.trainer._backward(0, "a step")
    for segment in ours.trainer.survivors:
        assert bool(ours.trainer.survivors.gradient(segment).any()) == segment.name.startswith("0."), segment.name
    assert torch.equal(ours.trainer.survivors.packed[torch.float32], before)


def test_autocast_computes_in_bfloat16() -> None:
    ours, theirs = both(Single(), NAMES, autocast=True)
    assert_same_losses(ours, theirs, 3, 2e-2)


def test_a_weight_that_is_used_outside_its_layer_too_is_refused() -> None:
    class Penalised(Single):
        def loss(self, output: Any, batch: Any) -> Tensor:
            return super().loss(output, batch) + self.penalised.weight.square().sum()

    task = Penalised()
    ours, _ = both(task, NAMES)
    task.penalised = ours.model[0]  # type: ignore[attr-defined, index]
    with pytest.raises(TaskError, match=r"0\.weight is used outside its layer, .*; write retrain.sparse: never"):
        ours.trainer.step(0, False)


# The choice


def told(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[float, float]) -> None:
    seconds = iter(pairs)
    monkeypatch.setattr(training, "time_in_turns", lambda dense, sparse: (dense(), sparse(), next(seconds))[2])


def test_layers_that_are_faster_by_themselves_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Single().model()
    masks = hpcprune.prune(model, 0.7)
    told(monkeypatch, (1.0, 0.95), (1.0, 0.5))
    before = weights(model)
    assert faster_layers(model, masks, lambda: model(torch.randn(3, 6))) == ["2.weight"]
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_layers_are_timed_under_the_autocast_that_they_train_under(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Single().model()
    masks = hpcprune.prune(model, 0.7)
    told(monkeypatch, (1.0, 0.5), (1.0, 0.5))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(3, 6))

    assert faster_layers(model, masks, step) == ["0.weight", "2.weight"]


def test_a_weight_of_two_layers_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    masks = hpcprune.prune(model, 0.5)
    told(monkeypatch, *[(1.0, 0.5)] * 3)
    assert faster_layers(model, masks, lambda: model(torch.randn(3, 8))) == ["1.weight"]


def test_a_layer_with_two_names_trains_sparse_as_one() -> None:
    class Twice(Single):
        def model(self) -> nn.Module:
            layer = nn.Linear(6, 6)
            return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 4))

    ours, theirs = both(Twice(), ["0.weight"])
    assert_same_losses(ours, theirs, 3, 1e-4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours.model(x), theirs.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", [1, 2])
def test_layers_are_found_by_what_calls_them(monkeypatch: pytest.MonkeyPatch, again: int) -> None:
    """By a name of the input, and those with a second name too."""
    layer = nn.Linear(8, 8)
    model = nn.Sequential(*[layer] * again)
    masks = hpcprune.prune(model, 0.5)
    told(monkeypatch, (1.0, 0.5))
    assert faster_layers(model, masks, lambda: model[-1](input=torch.randn(3, 8))) == ["0.weight"]


@pytest.mark.parametrize(("dense", "sparse"), [(2.0, 1.0), (1.0, 1.0)])
def test_all_train_dense_where_a_step_is_not_faster(
    monkeypatch: pytest.MonkeyPatch, dense: float, sparse: float
) -> None:
    model, ledger = Single().model(), Ledger()
    masks = hpcprune.prune(model, 0.7)
    told(monkeypatch, *[(1.0, 0.5)] * 2)

    def make(packing: bool) -> Trainer:
        assert packing
        return start(model, masks, ledger.sparse or []).trainer

    fastest: Callable[[Trainer], float] = lambda trainer: (trainer.close(), sparse if ledger.sparse else dense)[1]  # noqa: E731
    monkeypatch.setattr(breakeven, "_fastest", fastest)
    found, why = sparse_layers(masks, make, model, ledger, World.alone())
    times = f"{sparse * 1e3:.1f} ms so and {dense * 1e3:.1f} ms dense"
    if sparse < dense:
        assert (found, why) == (NAMES, f"2 of 2 layers train sparse: a step takes {times}")
    else:
        assert (found, why) == ([], f"all layers train dense: with 2 sparse ones a step takes {times}")
    assert ledger.sparse is None
