"""Products on a GPU as the package computes them: layouts and operators, against dense float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hpcprune.native import launching
from hpcprune.native.cuda import CudaError
from hpcprune.sparse import bitmap_tiles, bsr, csr
from hpcprune.sparse.cuda_ops import bitmap_tiles_linear, bsr_linear, csr_linear
from hpcprune.sparse.kernels import SparseError
from tests.kernels.cuda_layers import FLOATS, HALF, OPERATORS, assert_product, mask_of, pruned, training

BATCHES = [1, 4, 5, 33]
SIDES = [16, 32, 64]


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
