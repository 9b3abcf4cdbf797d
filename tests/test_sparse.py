"""Sparse operators against torch's dense ones, and the choice of where they run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hpcprune
from hpcprune.layers import find_layers
from hpcprune.masks import Masks
from hpcprune.sparse import SparseConv2d, SparseLinear, choose, sparsify
from hpcprune.sparse.held import Kernel, fit, hold
from hpcprune.sparse.kernels import SparseError, kernels
from hpcprune.sparse.modules import sparse_module
from hpcprune.sparse.ops import panels_linear, survivors_linear
from hpcprune.sparse.panels import lay_out
from tests.kernels.test_products import bits_of, laid_out

ROWS, COLUMNS = 70, 300
KERNELS = get_args(Kernel)


@pytest.fixture
def weights() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS) * (torch.rand(ROWS, COLUMNS) < 0.2)


def operands(weights: Tensor) -> tuple[Any, ...]:
    """What `survivors_linear` takes, from x on; the first three have a gradient."""
    bits = bits_of(weights)
    own, across = lay_out(bits, ROWS, COLUMNS), lay_out(bits, ROWS, COLUMNS, transposed=True)
    x, bias = torch.randn(2, 5, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    survivors = weights[weights != 0].requires_grad_()
    return x, survivors, bias, own.layout, own.order, across.layout, across.order, ROWS


def dense_gradients(weights: Tensor, given: tuple[Any, ...]) -> list[Tensor]:
    x, dense, bias = (each.detach().clone().requires_grad_() for each in (given[0], weights, given[2]))
    functional.linear(x, dense, bias).square().sum().backward()
    return [x.grad, dense.grad[weights != 0], bias.grad]  # type: ignore[index, list-item]


# Operators


def test_gradients_are_those_of_the_dense_layer(weights: Tensor) -> None:
    given = operands(weights)
    survivors_linear(*given).square().sum().backward()
    for own, dense in zip(given[:3], dense_gradients(weights, given), strict=True):
        torch.testing.assert_close(own.grad, dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_gets_a_gradient(weights: Tensor, needed: int) -> None:
    given = operands(weights)
    for i in range(3):
        given[i].requires_grad_(i == needed)
    survivors_linear(*given).square().sum().backward()
    assert [each.grad is not None for each in given[:3]] == [i == needed for i in range(3)]
    torch.testing.assert_close(given[needed].grad, dense_gradients(weights, given)[needed], rtol=1e-5, atol=1e-4)


def held_of(kernel: Kernel, dtype: torch.dtype) -> list[Tensor]:
    mask = mask_for(kernel, ROWS, COLUMNS)
    return [*hold(kernel, bits_of(mask), ROWS, COLUMNS, torch.randn(int(mask.sum())).to(dtype)).values()]


def test_torch_finds_nothing_wrong_with_the_operators(weights: Tensor) -> None:
    given, ops = operands(weights), torch.ops.hpcprune
    x, survivors, bias, layout, order, *_ = (each.detach() if isinstance(each, Tensor) else each for each in given)
    images, (of_images, convolved) = torch.randn(2, 30, 9, 11), laid_out(weights)
    gradient = torch.randn(2, 5, ROWS)
    for operator, arguments in (
        (ops.survivors_linear, given),
        *(
            (getattr(ops, f"{kernel}_linear"), (x, *held_of(kernel, dtype), each, ROWS))
            for kernel in KERNELS
            for each in (bias, None)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (ops.panels_conv2d, (images, of_images.layout, convolved, bias, ROWS, [2, 5], [1, 2], [0, 1], [2, 1])),
        (ops.panels_refill, (order, survivors)),
        (ops.panels_sampled, (x, gradient, layout, order, len(survivors))),
    ):
        assert set(torch.library.opcheck(operator.default, arguments).values()) == {"SUCCESS"}


def test_they_compile_into_one_graph(weights: Tensor) -> None:
    given = operands(weights)
    compiled = torch.compile(lambda *of: survivors_linear(*of).relu() * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), survivors_linear(*given).relu() * 2)
    compiled(*given).square().sum().backward()
    own = [each.grad.clone() for each in given[:3]]
    for each in given[:3]:
        each.grad = None
    (survivors_linear(*given).relu() * 2).square().sum().backward()
    for gradient, each in zip(own, given[:3], strict=True):
        torch.testing.assert_close(gradient, each.grad)


def test_other_dtypes_are_refused(weights: Tensor) -> None:
    layout, value = laid_out(weights)
    with pytest.raises(hpcprune.HpcpruneError, match=r"x is torch\.float64; sparse products take float32 and bfloat16"):
        panels_linear(torch.randn(3, COLUMNS).double(), layout.layout, value, None, ROWS)
    with pytest.raises(hpcprune.HpcpruneError, match=r"W is torch\.float16; sparse products take float32 and bfloat16"):
        panels_linear(torch.randn(3, COLUMNS), layout.layout, value.half(), None, ROWS)
    with pytest.raises(hpcprune.HpcpruneError, match=r"W is torch\.float64; sparse products take float32 and bfloat16"):
        survivors_linear(*(each.double() if i == 1 else each for i, each in enumerate(operands(weights))))


# Modules


def prune_to(module: nn.Module, sparsity: float = 0.8) -> Masks:
    return hpcprune.prune(module, sparsity)


def mask_for(kernel: Kernel, rows: int, columns: int) -> Tensor:
    """A mask that the kernel is made for."""
    if kernel == "blocks":
        return (
            (torch.rand(-(-rows // 16), -(-columns // 16)) < 0.3)
            .repeat_interleave(16, 0)
            .repeat_interleave(16, 1)[:rows, :columns]
        )
    if kernel == "two_of_four":
        return (torch.rand(rows, columns // 4, 4).argsort(-1) < 2).view(rows, columns)
    return torch.rand(rows, columns) < 0.2


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_a_linear_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, kernel: Kernel) -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=bias)).to(dtype)
    mask = mask_for(kernel, ROWS, COLUMNS)
    model[0].weight *= mask
    sparse = sparse_module(model[0], bits_of(mask), kernel)
    assert isinstance(sparse, SparseLinear) and sparse.kernel == kernel
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(sparse(x), model(x))
    assert torch.equal(sparse.weight, model[0].weight)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2), "bias": False},
        {"kernel_size": (5, 2), "padding": (4, 3), "stride": (1, 3), "dilation": (3, 1)},
        {"kernel_size": (17, 23)},
    ],
)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_convolution(options: dict[str, Any], batched: bool, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(6, 10, **options)).to(dtype)
    sparse = sparse_module(model[0], prune_to(model).bits("0.weight"))
    assert isinstance(sparse, SparseConv2d)
    x = torch.randn(3, 6, 17, 23, dtype=dtype) if batched else torch.randn(6, 17, 23, dtype=dtype)
    torch.testing.assert_close(sparse(x), model(x))
    last = x.to(memory_format=torch.channels_last) if batched else x
    torch.testing.assert_close(sparse(last), model(x))
    assert torch.equal(sparse.weight, model[0].weight)


@torch.no_grad()
def test_autocast_makes_bfloat16_of_it_as_of_a_dense_layer() -> None:
    model, x = nn.Sequential(nn.Linear(COLUMNS, ROWS)), torch.randn(4, COLUMNS)
    sparse = sparse_module(model[0], prune_to(model).bits("0.weight"))
    assert sparse is not None
    with torch.autocast("cpu", torch.bfloat16):
        own, dense = sparse(x), model(x)
    assert own.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(own, dense, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.float16):
        own, dense = sparse(x.half()), model(x)
    assert own.dtype == torch.float32  # as the weights: no kernel takes float16
    torch.testing.assert_close(own, dense.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(), (COLUMNS - 1,), (4, COLUMNS + 1), (COLUMNS, 4)])
def test_an_input_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(COLUMNS, ROWS)
    sparse = sparse_module(layer, prune_to(nn.Sequential(layer)).bits("0.weight"))
    assert sparse is not None
    with pytest.raises(SparseError, match=rf"the input is \[.*\]; a layer of {COLUMNS} inputs takes"):
        sparse(torch.randn(shape))


@pytest.mark.parametrize("shape", [(6, 9), (5, 9, 9), (2, 7, 9, 9), (2, 6, 2, 9), (1, 2, 6, 9, 9)])
def test_what_is_no_image_for_the_kernel_is_refused(shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d(6, 8, 3)
    sparse = sparse_module(layer, prune_to(nn.Sequential(layer)).bits("0.weight"))
    assert sparse is not None
    with pytest.raises(SparseError, match=r"this convolution takes \[images, 6, height, width\]"):
        sparse(torch.randn(shape))


@pytest.mark.parametrize(("kernel", "share"), [("panels", 0.14), ("bitmap", 0.135)])
def test_memory_falls_with_the_density(kernel: Kernel, share: float) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    sparse = sparse_module(model[0], prune_to(model, 0.9).bits("0.weight"), kernel)
    assert sparse is not None and not [*sparse.parameters()]
    held = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in sparse.buffers()}
    assert sum(held.values()) < share * model[0].weight.nbytes


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(4, 4, 3),
        nn.Linear(4, 4).double(),
        nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
    ],
)
def test_what_has_no_counterpart_stays(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    masks = prune_to(model)
    assert sparse_module(layer, masks.bits("0.weight")) is None


# The choice


def stack(width: int = 256, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other tell little about speed on a machine that does other things too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def test_layers_are_timed_under_the_autocast_that_they_run_under(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: (first(), second(), (1.0, 0.5))[2])
    model, x = stack(64), torch.randn(4, 64)
    model[0].eval()
    dense = copy.deepcopy(model)

    def infer() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert [choice.kernel for choice in sparsify(model, prune_to(dense), infer).layers] == ["panels", "panels"]
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
def test_what_is_faster_is_replaced_and_computes_the_same(one_thread: None) -> None:
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


def seconds(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[float, float]) -> None:
    """The clock says this, of dense and sparse, one call after the other."""
    told = iter(pairs)
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: next(told))


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
def test_a_transformer_goes_on_working(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 7, 32)
    masks = prune_to(model)
    expected = model(x)
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: (second(), (1.0, 0.5))[1])
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
