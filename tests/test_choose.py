"""The choice of which layers run sparse: what is timed and how, and what is replaced by what."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hpcprune.errors import HpcpruneError
from hpcprune.layers import find_layers
from hpcprune.masks import Masks
from hpcprune.sparse import SparseConv2d, SparseLinear, choose, sparsify
from hpcprune.sparse.held import Kernel, fit
from hpcprune.sparse.kernels import SparseError, kernels
from tests.kernels.test_products import bits_of
from tests.test_sparse import KERNELS, mask_for, prune_to


def stack(width: int = 256, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


@pytest.fixture
def half_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that sparse takes half the time, after both were run."""
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: (first(), second(), (1.0, 0.5))[2])


def seconds(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[float, float]) -> None:
    """The clock says this, of dense and sparse, one call after the other."""
    told = iter(pairs)
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: next(told))


def test_contenders_are_timed_in_turns_and_by_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    now, runs = 0.0, list[str]()
    monkeypatch.setattr(choose, "_now", lambda: now)

    def taking(name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += milliseconds / 1e3 * (50 if len(runs) in (10, 15) else 1)  # something else wants the machine
            runs.append(name)

        return run

    assert choose.time_in_turns(taking("a", 1), taking("b", 4)) == pytest.approx((1e-3, 4e-3))
    assert "".join(runs) == "aabb" + choose.TURNS * "aab", "a turn takes 2 ms at least"


@torch.no_grad()
def test_layers_are_timed_under_the_autocast_that_they_run_under(half_the_time: None) -> None:
    model, x = stack(64), torch.randn(4, 64)
    model[0].eval()
    masks = prune_to(model)
    dense = copy.deepcopy(model)

    def infer() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert [choice.kernel for choice in sparsify(model, masks, infer).layers] == ["panels", "panels"]
    assert model.training and not model[0].training
    with torch.autocast("cpu", torch.bfloat16):
        expected = dense(x)
    torch.testing.assert_close(infer(), expected, rtol=3e-2, atol=3e-2)


def test_an_inference_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack(64).train()
    monkeypatch.setattr(choose, "_time_layer", lambda dense, sparse, calls: (1.0, 0.5))
    calls = iter(range(2))

    def infer() -> Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return model(torch.randn(4, 64))

    masks = prune_to(model)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, masks, infer)
    assert all(type(model[i][0]) is nn.Linear and model[i][0].training for i in range(2))


@torch.no_grad()
def test_what_is_faster_is_replaced_and_computes_the_same(half_the_time: None) -> None:
    model, x = stack(1024), torch.randn(64, 1024)
    masks = prune_to(model, 0.98)
    dense = copy.deepcopy(model).train()
    found = sparsify(dense, masks, lambda: dense(x))
    assert [choice.name for choice in found.layers] == ["0.0", "1.0"]
    assert all(choice.kernel == "panels" and choice.sparse_seconds < choice.dense_seconds for choice in found.layers)
    assert all(choice.calls == ((64, 1024),) for choice in found.layers)
    assert found.layers[0].sparsity == pytest.approx(1 - masks.densities["0.0.weight"])
    assert not found.undone and found.sparse_seconds < found.dense_seconds  # type: ignore[operator]
    assert isinstance(dense[0][0], SparseLinear) and dense.training
    torch.testing.assert_close(dense(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_is_slower_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stack(), torch.randn(20, 256)
    first = model[0][0]
    seconds(monkeypatch, (1.0, 1.0), (1.0, 0.5), (2.0, 1.5))
    found = sparsify(model, prune_to(model), lambda: model(x))
    assert [choice.kernel for choice in found.layers] == ["dense", "panels"]
    assert model[0][0] is first and isinstance(model[1][0], SparseLinear)
    assert (found.dense_seconds, found.sparse_seconds, found.undone) == (2.0, 1.5, False)


def test_all_is_undone_where_the_model_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stack(), torch.randn(20, 256)
    before = [*model.modules()]
    seconds(monkeypatch, (1.0, 0.5), (1.0, 0.5), (2.0, 2.0))
    found = sparsify(model, prune_to(model), lambda: model(x))
    assert found.undone and all(choice.kernel == "panels" for choice in found.layers)
    assert all(own is old for own, old in zip(model.modules(), before, strict=True))


def test_without_an_inference_linear_layers_are_tried_with_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 1))
    seconds(monkeypatch, (1.0, 0.5), (1.0, 0.6))
    found = sparsify(model, prune_to(model), samples=7)
    assert [(choice.name, choice.calls) for choice in found.layers] == [("0", ((7, 64),))]
    assert found.dense_seconds is None and isinstance(model[0], SparseLinear)


@pytest.mark.parametrize(("rows", "expected"), [(8, "bitmap"), (9, "panels")])
def test_a_bitmap_is_tried_for_few_samples(monkeypatch: pytest.MonkeyPatch, rows: int, expected: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    seconds(monkeypatch, (1.0, 0.5), (1.0, 0.4))
    found = sparsify(model, prune_to(model), samples=rows)
    assert found.layers[0].kernel == expected and model[0].kernel == expected
    assert found.layers[0].sparse_seconds == (0.4 if expected == "bitmap" else 0.5)


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_tried_where_the_mask_is_made_for_them(kernel: Kernel, rows: int) -> None:
    expected = {"panels", kernel, "bitmap"} if rows == 1 else {"panels", kernel} - {"bitmap"}
    assert set(fit(bits_of(mask_for(kernel, 128, 256)), 128, 256, rows)) == expected


@pytest.mark.parametrize("kernel", ["blocks", "two_of_four"])
def test_the_kernel_of_a_pattern_is_chosen_where_it_is_the_fastest(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    model = nn.Sequential(nn.Linear(256, 128))
    masks = Masks(find_layers(model), [bits_of(mask_for(kernel, 128, 256))])
    masks.apply(model)
    seconds(monkeypatch, (1.0, 0.5), (1.0, 0.4))
    found = sparsify(model, masks, samples=20)
    assert found.layers[0].kernel == kernel and model[0].kernel == kernel


def test_what_the_model_does_not_call_stays_dense() -> None:
    """As the layers of an encoder whose weights torch reads in one fused step."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(x) @ self.read.weight

    model, x = Reads(), torch.randn(3, 8)
    assert [choice.name for choice in sparsify(model, prune_to(model), lambda: model(x)).layers] == ["called"]


@torch.no_grad()
def test_a_transformer_goes_on_working(half_the_time: None) -> None:
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 7, 32)
    masks = prune_to(model)
    expected = model(x)
    found = sparsify(model, masks, lambda: model(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [choice.name for choice in found.layers] == ["linear1", "linear2"]


def test_a_layer_that_is_called_twice_is_timed_in_both_shapes() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"own": layer})
    found = sparsify(model, prune_to(model), lambda: (layer(torch.ones(2, 8)), layer(torch.ones(5, 8))))
    assert found.layers[0].calls == ((2, 8), (5, 8))


def test_nothing_is_replaced_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", "numpy")
    kernels.cache_clear()
    model = stack()
    found = sparsify(model, prune_to(model), samples=1)
    monkeypatch.undo()
    kernels.cache_clear()
    assert found.reason == "sparse products need the compiled kernels: forced by HPCPRUNE_NATIVE"
    assert not found.layers and isinstance(model[0][0], nn.Linear)


# What layers are to a model


@torch.no_grad()
@pytest.mark.parametrize("faster", [True, False])
def test_a_layer_with_several_names_is_replaced_at_all_of_them(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    layer, x = nn.Linear(64, 64), torch.randn(20, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer))
    masks = prune_to(model)
    expected = model(x)
    seconds(monkeypatch, (1.0, 0.5), (2.0, 1.0 if faster else 2.0))
    found = sparsify(model, masks, lambda: model(x))
    assert [(choice.name, choice.calls) for choice in found.layers] == [("0", ((20, 64),) * 3)]
    assert model[0] is model[2] is model[3][0] and isinstance(model[0], SparseLinear if faster else nn.Linear)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_weight_of_two_layers_stays_dense(half_the_time: None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(20, 64)
    model[2].weight = model[0].weight
    found = sparsify(model, prune_to(model), lambda: model(x))
    assert [choice.name for choice in found.layers] == ["1"]
    assert [type(layer) for layer in model] == [nn.Linear, SparseLinear, nn.Linear]
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(3, 3, 1)])
def test_a_model_that_is_the_layer_itself_stays_and_it_is_said_why(layer: nn.Module) -> None:
    found = sparsify(layer, prune_to(layer), samples=3)
    name = type(layer).__name__
    assert found.reason == (
        f"the model is a {name} itself, and nothing holds it that could hold a sparse one; prune and give "
        "nn.Sequential(layer) instead"
    )
    assert not found.layers


@torch.no_grad()
def test_an_input_may_be_given_by_its_name(half_the_time: None) -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.layer = nn.Conv2d(3, 4, 1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=self.convolution(input=x))

    model, x = Names(), torch.randn(2, 3, 5, 8)
    masks = prune_to(model)
    expected = model(x)
    found = sparsify(model, masks, lambda: model(x))
    assert [choice.kernel for choice in found.layers] == ["panels", "panels"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("told", [True, False])
def test_no_random_number_of_others_is_drawn(told: bool) -> None:
    model, x = stack(16), torch.randn(3, 16)
    masks, before = prune_to(model), torch.get_rng_state()
    assert sparsify(model, masks, (lambda: model(x)) if told else None).layers
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_of_another_network_are_refused() -> None:
    model = stack(16)
    masks = prune_to(stack(16))
    with pytest.raises(SparseError, match=r"0\.0\.weight: \d+ of the weights that its mask prunes are not zero; set"):
        sparsify(model, masks)
    with pytest.raises(HpcpruneError, match=r"the masks' 0\.0\.weight of shape \(16, 16\) is not in this Sequential"):
        sparsify(stack(17), masks)
    masks.apply(model)
    with torch.no_grad():
        model[1][0].weight[~masks["1.0.weight"]] = torch.nan
    with pytest.raises(SparseError, match=r"1\.0\.weight: \d+ of"):
        sparsify(model, masks)


@torch.no_grad()
def test_what_is_sparse_already_is_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(stack(64), nn.Conv2d(1, 4, 3)), torch.randn(20, 64)
    masks = prune_to(model)
    seconds(monkeypatch, (1.0, 0.5), (1.0, 2.0), (1.0, 0.5), (2.0, 1.0))
    infer = lambda: model[1](model[0](x)[None])  # noqa: E731
    assert [choice.kernel for choice in sparsify(model, masks, infer).layers] == ["panels", "dense", "panels"]
    before, expected = [*model.modules()], infer()
    dense = property(lambda layer: pytest.fail("a dense weight is made"))
    monkeypatch.setattr(SparseLinear, "weight", dense)
    monkeypatch.setattr(SparseConv2d, "weight", dense)
    seconds(monkeypatch, (1.0, 2.0), (2.0, 2.0))
    assert [choice.name for choice in sparsify(model, masks, infer).layers] == ["0.1.0"]
    assert all(own is old for own, old in zip(model.modules(), before, strict=True))
    assert torch.equal(infer(), expected)
