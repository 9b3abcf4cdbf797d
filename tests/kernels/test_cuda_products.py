"""Products on a GPU as the package computes them: layouts, operators and their gradients, against dense float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcprune.native import launching
from hpcprune.native.cuda import CudaError
from hpcprune.sparse import bitmap_tiles, bsr, csr
from hpcprune.sparse.cuda_ops import (
    bitmap_tiles_linear,
    bsr_linear,
    bsr_survivors_linear,
    csr_linear,
    csr_survivors_linear,
)
from hpcprune.sparse.kernels import SparseError
from tests.kernels.test_products import bits_of

FLOATS = [torch.float32, torch.bfloat16]
HALF = torch.bfloat16
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
BATCHES = [1, 4, 5, 33]
SIDES = [16, 32, 64]
OPERATORS = [
    pytest.param("csr", torch.float32, id="csr float32"),
    pytest.param("csr", HALF, id="csr bfloat16"),
    pytest.param("bsr", HALF, id="bsr"),
]


def pruned(device: torch.device, dtype: torch.dtype, rows: int, columns: int, side: int = 1) -> Tensor:
    """Weights of which a fifth survives, in blocks; the second row of blocks is empty, the first whole."""
    generator = torch.Generator().manual_seed(rows)
    kept = torch.rand(-(-rows // side), -(-columns // side), generator=generator) < 0.2
    kept[1:2] = False
    kept[0] = True
    kept = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
    weights = torch.randn(rows, columns, generator=generator).abs() + 0.1
    return (weights * torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1, 1) * kept).to(device, dtype)


def mask_of(weights: Tensor) -> np.ndarray:
    return bits_of(weights.cpu())


def assert_near(given: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    """Within what a float32 sum of `count` terms in any order may differ by, and the rounding of its result."""
    slack = terms * (count + 1) * 2.0**-24 * 1.01
    slack = slack + ROUNDING[given.dtype] * (exact.abs() + slack)
    difference = (given.detach().double() - exact).abs()
    assert (difference <= slack).all(), f"{(difference - slack).max():g} beyond the bound"


def assert_product(y: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    exact, terms = x.double() @ weights.double().t(), x.double().abs() @ weights.double().abs().t()
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    assert_near(y, exact, terms, weights.shape[1] + 1)


@dataclass
class Training:
    """A pruned layer with what its operator takes, and its dense twin in float64."""

    operator: Any
    x: Tensor
    survivors: Tensor
    bias: Tensor
    layout: tuple[Any, ...]
    weights: Tensor

    def __call__(self) -> Tensor:
        product: Tensor = self.operator(*self.arguments)
        return product

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.survivors, self.bias, *self.layout


def training(device: torch.device, kind: str, dtype: torch.dtype, rows: int = 70, columns: int = 100) -> Training:
    weights = pruned(device, dtype, rows, columns, 1 if kind == "csr" else 16)
    bits = mask_of(weights)
    if kind == "csr":
        own, across = (csr.lay_out(bits, rows, columns, device, transposed=way) for way in (False, True))
        tensors = (own.start, own.column, own.row_order, across.start, across.column, across.row_order, across.order)
        operator, layout = csr_survivors_linear, tensors
    else:
        own, across = (bsr.lay_out(bits, rows, columns, 16, device, transposed=way) for way in (False, True))
        tensors = (own.start, own.row, own.column, own.order, across.start, across.column, across.order)
        operator, layout = bsr_survivors_linear, (*tensors, rows, columns)
    torch.manual_seed(1)
    x = torch.randn(2, 5, columns, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(rows, device=device, dtype=dtype, requires_grad=True)
    return Training(operator, x, weights[weights != 0].requires_grad_(), bias, layout, weights)


# Products


@pytest.mark.parametrize("of_samples", FLOATS)
@pytest.mark.parametrize("of_weights", FLOATS)
@pytest.mark.parametrize("rows,columns", [(1, 1), (37, 64), (70, 300)])
def test_csr(
    device: torch.device,
    rows: int,
    columns: int,
    of_weights: torch.dtype,
    of_samples: torch.dtype,
) -> None:
    weights = pruned(device, of_weights, rows, columns)
    bits, survivors = mask_of(weights), weights[weights != 0]
    own, across = (csr.lay_out(bits, rows, columns, device, transposed=way) for way in (False, True))
    assert (own.start.diff()[own.row_order.long()].diff() <= 0).all(), "the longest rows come first"
    bias = torch.randn(rows, device=device)
    for batch in BATCHES:
        x = torch.randn(batch, columns, device=device).to(of_samples)
        y = csr_linear(x, own.start, own.column, own.row_order, survivors, bias, columns)
        assert y.dtype == of_samples
        assert_product(y, x, weights, bias)
        gradient = torch.randn(batch, rows, device=device).to(of_samples)
        value = survivors[across.order]
        back = csr_linear(gradient, across.start, across.column, across.row_order, value, None, rows)
        assert_product(back, gradient, weights.t(), None)


@pytest.mark.parametrize("rows,columns", [(1, 1), (40, 130), (16, 1100)])
def test_bitmap_tiles(device: torch.device, rows: int, columns: int) -> None:
    weights = pruned(device, HALF, rows, columns)
    tiles = bitmap_tiles.lay_out(mask_of(weights), rows, columns, weights[weights != 0])
    bias = torch.randn(rows, device=device)
    for batch in BATCHES:
        x = torch.randn(batch, columns, device=device).to(HALF)
        y = bitmap_tiles_linear(x, tiles.start, tiles.groups, bias, rows, columns, tiles.largest)
        assert_product(y, x, weights, bias)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows,columns", [(1, 1), (70, 200), (130, 64)])
def test_bsr(device: torch.device, rows: int, columns: int, side: int) -> None:
    weights = pruned(device, HALF, rows, columns, side)
    bits, survivors = mask_of(weights), weights[weights != 0]
    own, across = (bsr.lay_out(bits, rows, columns, side, device, transposed=way) for way in (False, True))
    bias = torch.randn(rows, device=device)
    for batch in BATCHES:
        x = torch.randn(batch, columns, device=device).to(HALF)
        y = bsr_linear(x, own.start, own.column, bsr.refill(own.order, survivors), bias, rows, columns)
        assert_product(y, x, weights, bias)
        gradient = torch.randn(batch, rows, device=device).to(HALF)
        value = bsr.refill(across.order, survivors)
        back = bsr_linear(gradient, across.start, across.column, value, None, columns, rows)
        assert_product(back, gradient, weights.t(), None)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_nothing_and_everything_survives(device: torch.device, kept: float) -> None:
    weights = torch.randn(32, 48, device=device).to(HALF) * kept
    bits, survivors, x = mask_of(weights), weights[weights != 0], torch.randn(7, 48, device=device).to(HALF)
    rows = csr.lay_out(bits, 32, 48, device)
    tiles = bitmap_tiles.lay_out(bits, 32, 48, survivors)
    blocks = bsr.lay_out(bits, 32, 48, 16, device)
    for y in (
        csr_linear(x, rows.start, rows.column, rows.row_order, survivors, None, 48),
        bitmap_tiles_linear(x, tiles.start, tiles.groups, None, 32, 48, tiles.largest),
        bsr_linear(x, blocks.start, blocks.column, bsr.refill(blocks.order, survivors), None, 32, 48),
    ):
        assert_product(y, x, weights, None)


def test_any_shape_and_stride_of_samples(device: torch.device) -> None:
    weights = pruned(device, torch.float32, 20, 30)
    own = csr.lay_out(mask_of(weights), 20, 30, device)
    operands = own.start, own.column, own.row_order, weights[weights != 0], None, 30
    x = torch.randn(30, 3, 2, device=device).permute(2, 1, 0)
    assert_product(csr_linear(x, *operands).view(6, 20), x.reshape(6, 30), weights, None)
    assert csr_linear(x[0, 0], *operands).shape == (20,)
    assert csr_linear(x[:0], *operands).shape == (0, 3, 20)


# Gradients


@pytest.mark.parametrize("kind,dtype", OPERATORS)
def test_gradients_are_those_of_the_dense_layer(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    layer = training(device, kind, dtype)
    given = torch.randn(2, 5, 70, device=device).to(dtype)
    layer().backward(given)
    x, dy = layer.x.detach().double().view(10, 100), given.double().view(10, 70)
    assert layer.x.grad is not None and layer.survivors.grad is not None and layer.bias.grad is not None
    assert_product(layer.x.grad.view(10, 100), dy, layer.weights.t(), None)
    kept = layer.weights != 0
    assert_near(layer.survivors.grad, (dy.t() @ x)[kept], (dy.t().abs() @ x.abs())[kept], 10)
    assert_near(layer.bias.grad, dy.sum(0), dy.abs().sum(0), 10)


@pytest.mark.parametrize("kind,dtype", OPERATORS)
@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_gets_a_gradient(
    device: torch.device,
    kind: str,
    dtype: torch.dtype,
    needed: int,
) -> None:
    layer = training(device, kind, dtype)
    leaves = layer.x, layer.survivors, layer.bias
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == needed)
    layer().sum().backward()  # type: ignore[no-untyped-call]
    assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]


def test_a_gradient_is_the_products_slope(device: torch.device) -> None:
    """By differences: the product is linear in each operand, so a step of any size will do."""
    layer = training(device, "csr", torch.float32)
    layer().sum().backward()  # type: ignore[no-untyped-call]
    for leaf in (layer.x, layer.survivors, layer.bias):
        assert leaf.grad is not None
        step, before, at = torch.randn_like(leaf), layer().double().sum(), leaf.detach().clone()
        with torch.no_grad():
            leaf += step
            slope = layer().double().sum() - before
            leaf.copy_(at)
        torch.testing.assert_close(slope, (leaf.grad.double() * step.double()).sum(), rtol=1e-3, atol=1e-2)


# As torch operators


def test_torch_finds_nothing_wrong_with_the_operators(device: torch.device) -> None:
    ops = torch.ops.hpcprune
    unstructured, blocks = training(device, "csr", torch.float32), training(device, "bsr", HALF)
    x, survivors, bias = (each.detach() for each in unstructured.arguments[:3])
    start, column, row_order, *_ = unstructured.layout
    x16, survivors16 = blocks.x.detach(), blocks.survivors.detach()
    start16, row16, column16, order16, *_ = blocks.layout
    value = bsr.refill(order16, survivors16)
    tiles = bitmap_tiles.lay_out(mask_of(blocks.weights), 70, 100, survivors16)
    gradient = torch.randn(2, 5, 70, device=device)
    for operator, arguments in (
        (ops.csr_survivors_linear, unstructured.arguments),
        (ops.bsr_survivors_linear, blocks.arguments),
        (ops.csr_linear, (x, start, column, row_order, survivors, bias, 100)),
        (ops.csr_sampled, (x, gradient, start, column, 100)),
        (ops.bsr_linear, (x16, start16, column16, value, None, 70, 100)),
        (ops.bsr_sampled, (x16, gradient, row16, column16, order16, len(survivors16))),
        (ops.bitmap_tiles_linear, (x16, tiles.start, tiles.groups, bias, 70, 100, tiles.largest)),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("kind,dtype", OPERATORS)
def test_a_compiled_function_has_them_in_one_graph(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    layer = training(device, kind, dtype)

    def function(*arguments: Any) -> Tensor:
        product: Tensor = layer.operator(*arguments).relu()
        return product

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*layer.arguments)
    torch.testing.assert_close(compiled, layer().relu())
    compiled.sum().backward()
    found = layer.survivors.grad
    layer.survivors.grad = None
    layer().relu().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, layer.survivors.grad)


# What does not fit


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    weights = pruned(device, torch.float32, 20, 30)
    own, survivors, x = csr.lay_out(mask_of(weights), 20, 30, device), weights[weights != 0], torch.randn(5, 30)
    x = x.to(device)
    layout = own.start, own.column, own.row_order
    with pytest.raises(SparseError, match=r"x is float32 \[5, 29\] on .*; .*\[5, 30\]"):
        csr.multiply(x[:, :29].contiguous(), *layout, survivors, None, 30)
    with pytest.raises(SparseError, match=r"x is float64 .*; float32 or bfloat16"):
        csr.multiply(x.double(), *layout, survivors, None, 30)
    with pytest.raises(SparseError, match="W is"):
        csr.multiply(x, *layout, survivors[1:], None, 30)
    with pytest.raises(SparseError, match="bias is bfloat16"):
        csr.multiply(x, *layout, survivors, torch.zeros(20, device=device, dtype=HALF), 30)
    with pytest.raises(SparseError, match="on meta"):
        csr.multiply(x, *layout, survivors.to("meta"), None, 30)
    with pytest.raises(SparseError, match="gradient is"):
        csr.sampled(x, torch.zeros(4, 20, device=device), own.start, own.column, 30)
    with pytest.raises(SparseError, match="x is float32"):
        bitmap_tiles.multiply(x, own.start, own.column, None, 20, 30, 1)
    with pytest.raises(SparseError, match="sides of 64, 32, 16"):
        bsr.multiply(x.to(HALF), own.start, own.column, torch.zeros(1, 8, 8, device=device, dtype=HALF), None, 20, 30)
    with pytest.raises(SparseError, match="74 bytes of mask"):
        csr.lay_out(mask_of(weights)[:-1], 20, 30, device)
    with pytest.raises(SparseError, match="rows and columns at most"):
        csr.lay_out(mask_of(weights), 1 << 21, 30, device)


def test_a_kernel_that_cannot_be_started_is_named_with_what_it_was_given(device: torch.device) -> None:
    weights = pruned(device, torch.float32, 20, 30)
    own, x = csr.lay_out(mask_of(weights), 20, 30, device), torch.randn(5, 60, device=device)[:, ::2]
    with pytest.raises(CudaError, match=r"^spmm_csr\(0, 20, 30, int32\[21\] on .*float32\[5, 30\].*contiguous"):
        csr.multiply(x, own.start, own.column, own.row_order, weights[weights != 0], None, 30)
    block = torch.zeros(1, device=device, dtype=HALF)
    with pytest.raises(CudaError, match=r"^block_spmm\(8, 1, 1, .*: CUDA error 1 \(invalid value\)$"):
        launching.launch("block_spmm", 8, 1, 1, own.start, own.column, block, block, 1, None, block)


# On a GPU, against what torch calls there


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 8, 32, 256])
def test_cublas_and_cusparse_agree(batch: int, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    gpu = torch.device("cuda")
    weights = pruned(gpu, dtype, 1024, 768)
    own = csr.lay_out(mask_of(weights), 1024, 768, gpu)
    x = torch.randn(batch, 768, device=gpu, dtype=dtype)
    y = csr_linear(x, own.start, own.column, own.row_order, weights[weights != 0], None, 768)
    tolerance = {torch.float32: 1e-4, HALF: 2e-2}[dtype]
    torch.testing.assert_close(y, functional.linear(x, weights), rtol=tolerance, atol=10 * tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(y, (weights.to_sparse_csr() @ x.t()).t(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_products_are_on_torchs_current_stream() -> None:
    gpu = torch.device("cuda")
    weights = pruned(gpu, torch.float32, 512, 512)
    own, survivors = csr.lay_out(mask_of(weights), 512, 512, gpu), weights[weights != 0]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # x is not there before this ends
        x = torch.randn(64, 512, device=gpu)
        y = csr_linear(x, own.start, own.column, own.row_order, survivors, None, 512)
        assert_product(y, x, weights, None)
