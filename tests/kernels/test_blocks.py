"""Products with whole blocks of weights, on every path, against numpy in float64; and the patterns that masks form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcprune.sparse.blocks import Blocks, lay_out, multiply, sampled
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.panels import refill
from hpcprune.sparse.patterns import SIDES, side_of_blocks, two_of_four
from tests.kernels.test_products import bits_of, bound, exact

SHAPES = [(1, 1), (3, 5), (64, 128), (65, 127), (130, 300), (200, 17)]
BATCHES = [1, 2, 3, 5, 9, 16, 33, 65]
LAWS = ["half", "few", "none", "all", "one row", "one column"]


def pruned(rows: int, columns: int, side: int, law: str) -> tuple[Tensor, Tensor]:
    """Weights of which whole blocks are zero, and where they are not."""
    random = np.random.default_rng(rows * columns + side)
    kept = random.random((-(-rows // side), -(-columns // side))) < {"half": 0.5, "few": 0.1, "all": 1}.get(law, 0)
    if law == "one row":
        kept[kept.shape[0] // 2] = True
    if law == "one column":
        kept[:, kept.shape[1] // 2] = True
    mask = np.kron(kept, np.ones((side, side), np.bool_))[:rows, :columns]
    weights = random.standard_normal((rows, columns)).astype(np.float32) * mask
    return torch.from_numpy(weights), torch.from_numpy(mask)


def laid_out(weights: Tensor, mask: Tensor, side: int, transposed: bool = False) -> tuple[Blocks, Tensor]:
    layout = lay_out(bits_of(mask), *weights.shape, side, transposed=transposed)
    return layout, refill(layout.order, weights[mask])


def product(x: Tensor, layout: Blocks, value: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(x, layout.start, layout.column, value, bias, layout.rows)


def gradient_of(x: Tensor, gradient: Tensor, layout: Blocks, survivors: int) -> Tensor:
    return sampled(x, gradient, layout.start, layout.column, layout.order, survivors)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_products_are_right(compiled: str, rows: int, columns: int, side: int, law: str) -> None:
    weights, mask = pruned(rows, columns, side, law)
    bias = torch.randn(rows)
    layout, value = laid_out(weights, mask, side)
    across, across_value = laid_out(weights, mask, side, transposed=True)
    for batch in BATCHES:
        x, gradient = torch.randn(batch, columns), torch.randn(batch, rows)
        error = product(x, layout, value, bias).numpy() - exact(x, weights, bias)
        assert (abs(error) <= bound(x, weights)).all()
        error = product(gradient, across, across_value, None).numpy() - exact(gradient, weights.T)
        assert (abs(error) <= bound(gradient, weights.T)).all()
        own = gradient_of(x, gradient, layout, int(mask.sum())).numpy()
        error = own - exact(gradient.T, x.T)[mask.numpy()]
        assert (abs(error) <= bound(gradient.T, x.T)[mask.numpy()]).all()


def test_a_sample_has_the_same_result_in_any_batch_and_on_any_number_of_threads(
    compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, mask = pruned(300, 9000, 16, "half")  # so many columns that samples go in chunks
    layout, value = laid_out(weights, mask, 16)
    x, gradient = torch.randn(101, 9000), torch.randn(101, 300)
    whole = product(x, layout, value, None)
    own = gradient_of(x, gradient, layout, int(mask.sum()))
    for batch in BATCHES:
        assert torch.equal(product(x[:batch].contiguous(), layout, value, None), whole[:batch])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            assert torch.equal(product(x, layout, value, None), whole)
            assert torch.equal(product(x[:1], layout, value, None), whole[:1])
            assert torch.equal(gradient_of(x, gradient, layout, len(own)), own)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("hpcprune.sparse.kernels.pool", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(product(x, layout, value, None), whole)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
def test_bfloat16_is_summed_in_float32(compiled: str, of_weights: torch.dtype, of_x: torch.dtype) -> None:
    weights, mask = pruned(70, 900, 16, "half")
    weights = weights.to(of_weights)
    layout, value = laid_out(weights, mask, 16)
    assert value.dtype == of_weights
    for batch in (1, 4, 40):
        x = torch.randn(batch, 900).to(of_x)
        y = product(x, layout, value, None)
        rounding = 0 if of_x == torch.float32 else 2.0**-8 * abs(exact(x, weights))
        assert y.dtype == of_x
        assert (abs(y.double().numpy() - exact(x, weights)) <= bound(x, weights) * 1.01 + rounding).all()
    x, gradient = torch.randn(40, 900).to(of_x), torch.randn(40, 70).to(of_x)
    own = gradient_of(x, gradient, layout, int(mask.sum())).numpy()
    assert (abs(own - exact(gradient.T, x.T)[mask.numpy()]) <= bound(gradient.T, x.T)[mask.numpy()]).all()


def test_no_samples_and_no_blocks(compiled: str) -> None:
    weights, mask = pruned(40, 50, 16, "half")
    layout, value = laid_out(weights, mask, 16)
    assert product(torch.empty(0, 50), layout, value, None).shape == (0, 40)
    assert not gradient_of(torch.empty(0, 50), torch.empty(0, 40), layout, int(mask.sum())).any()


def test_infinities_and_nan_stay_with_their_sample(compiled: str) -> None:
    weights, mask = pruned(20, 70, 16, "all")
    layout, value = laid_out(weights, mask, 16)
    x = torch.ones(5, 70)
    x[2, 69], x[3, 9] = float("inf"), float("nan")
    y = product(x, layout, value, None)
    assert y[[0, 1, 4]].isfinite().all() and y[2].isinf().all() and y[3].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_every_survivor_has_one_place(rows: int, columns: int, side: int, transposed: bool) -> None:
    _, mask = pruned(rows, columns, side, "half")
    layout = lay_out(bits_of(mask), rows, columns, side, transposed=transposed)
    survivors = layout.order[layout.order >= 0]
    assert torch.equal(survivors.sort().values, torch.arange(int(mask.sum()), dtype=torch.int32))
    assert layout.order.shape == (layout.column.numel(), side, side)
    assert layout.start[-1] == layout.column.numel()
    assert (layout.rows, layout.columns) == ((columns, rows) if transposed else (rows, columns))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SparseError, match="blocks of 8 x 8; there are kernels for sides of 64, 32, 16"):
        lay_out(np.zeros(8, np.uint8), 8, 8, 8)
    with pytest.raises(SparseError, match=r"3 bytes of mask for 5 x 5 weights; \(weights \+ 7\) // 8 are needed"):
        lay_out(np.zeros(3, np.uint8), 5, 5, 16)
    mask = torch.ones(16, 32, dtype=torch.bool)
    mask[3, 4] = False
    with pytest.raises(SparseError, match="511 weights survive, not the 512 of whole blocks 16 x 16"):
        lay_out(bits_of(mask), 16, 32, 16)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows,columns", [(192, 256), (130, 300), (65, 127)])
def test_blocks_are_recognised_by_their_largest_side(rows: int, columns: int, side: int) -> None:
    _, mask = pruned(rows, columns, side, "half")
    mask[:side, :side], mask[:side, side : 2 * side] = True, False  # so that no larger side fits
    assert side_of_blocks(bits_of(mask), rows, columns) == side
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 0), (17, 33)):
        other = mask.clone()
        other[row, column] ^= True
        corner = row == rows - 1 and column == columns - 1 and rows % 16 == 1 and columns % 16 == 1
        assert corner or side_of_blocks(bits_of(other), rows, columns) is None


def test_masks_of_nothing_and_of_everything_are_blocks() -> None:
    for mask in (torch.zeros(100, 90, dtype=torch.bool), torch.ones(100, 90, dtype=torch.bool)):
        assert side_of_blocks(bits_of(mask), 100, 90) == 64


@pytest.mark.parametrize("rows,columns", [(1, 4), (3, 12), (8, 64), (5, 20)])
def test_two_of_four_is_recognised(rows: int, columns: int) -> None:
    random = np.random.default_rng(columns)
    quads = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], np.bool_)
    kept = quads[random.integers(0, len(quads), rows * columns // 4)].reshape(rows, columns)
    assert two_of_four(np.packbits(kept, bitorder="little"), rows, columns)
    for quad in (0, rows * columns // 4 - 1):
        three = kept.copy()
        three.reshape(-1, 4)[quad] = [True, True, False, True]
        assert not two_of_four(np.packbits(three, bitorder="little"), rows, columns)
    assert not two_of_four(np.packbits(kept, bitorder="little"), rows * columns // 2, 2)
