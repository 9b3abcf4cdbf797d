"""Products with 2:4 matrices, on every path, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.panels import refill
from hpcprune.sparse.two_of_four import lay_out, multiply
from tests.kernels.test_products import bits_of, bound, exact

SHAPES = [(1, 4), (1, 16), (7, 12), (8, 32), (9, 36), (33, 300), (70, 520)]
BATCHES = [1, 2, 3, 4, 5, 8, 9, 33, 65]
LAWS = ["two", "fewer", "one row", "none"]


def pruned(rows: int, columns: int, law: str) -> Tensor:
    """Weights of which two of four survive, or fewer."""
    random = np.random.default_rng(rows * columns)
    kept = random.random((rows, columns // 4, 4)).argsort(-1) < 2
    if law == "fewer":
        kept &= random.random(kept.shape) < 0.4
    if law == "one row":
        kept[np.arange(rows) != rows // 2] = False
    if law == "none":
        kept[:] = False
    weights = random.standard_normal((rows, columns)).astype(np.float32)
    return torch.from_numpy(weights * kept.reshape(rows, columns))


def laid_out(weights: Tensor) -> tuple[Tensor, Tensor]:
    layout = lay_out(bits_of(weights), *weights.shape)
    return layout.code, refill(layout.order, weights[weights != 0])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_products_are_right(compiled: str, rows: int, columns: int, law: str) -> None:
    weights, bias = pruned(rows, columns, law), torch.randn(rows)
    code, value = laid_out(weights)
    for batch in BATCHES:
        x, own = torch.randn(batch, columns), bias if batch % 2 else None
        error = multiply(x, code, value, own, rows).numpy() - exact(x, weights, own)
        assert (abs(error) <= bound(x, weights)).all()


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
def test_bfloat16_is_summed_in_float32(compiled: str, of_weights: torch.dtype, of_x: torch.dtype) -> None:
    weights = pruned(70, 900, "two").to(of_weights)
    code, value = laid_out(weights)
    assert value.dtype == of_weights
    for batch in (1, 4, 40):
        x = torch.randn(batch, 900).to(of_x)
        product = multiply(x, code, value, None, 70)
        rounding = 0 if of_x == torch.float32 else 2.0**-8 * abs(exact(x, weights))
        assert product.dtype == of_x
        assert (abs(product.double().numpy() - exact(x, weights)) <= bound(x, weights) * 1.01 + rounding).all()


def test_a_sample_has_the_same_result_in_any_batch_and_on_any_number_of_threads(
    compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, x = pruned(300, 9000, "two"), torch.randn(101, 9000)  # so many columns that samples go in chunks
    code, value = laid_out(weights)
    whole = multiply(x, code, value, None, 300)
    for batch in BATCHES:
        assert torch.equal(multiply(x[:batch].contiguous(), code, value, None, 300), whole[:batch])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            assert torch.equal(multiply(x, code, value, None, 300), whole)
            assert torch.equal(multiply(x[:1], code, value, None, 300), whole[:1])
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("hpcprune.sparse.kernels.pool", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(multiply(x, code, value, None, 300), whole)


def test_infinities_and_nan_stay_with_their_sample(compiled: str) -> None:
    weights, x = torch.zeros(20, 72), torch.ones(5, 72)
    weights[:, [0, 9, 10, 69]] = 1.0
    code, value = laid_out(weights)
    x[2, 69], x[3, 9] = float("inf"), float("nan")
    product = multiply(x, code, value, None, 20)
    assert product[[0, 1, 4]].isfinite().all() and product[3].isnan().all() and not product[2].isfinite().any()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_every_survivor_has_one_place(rows: int, columns: int, law: str) -> None:
    weights = pruned(rows, columns, law)
    layout = lay_out(bits_of(weights), rows, columns)
    survivors = layout.order[layout.order >= 0]
    assert torch.equal(survivors.sort().values, torch.arange(int((weights != 0).sum()), dtype=torch.int32))
    assert layout.order.shape == (*layout.code.shape, 16)


def test_no_samples(compiled: str) -> None:
    code, value = laid_out(pruned(9, 36, "two"))
    assert multiply(torch.empty(0, 36), code, value, None, 9).shape == (0, 9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SparseError, match=r"3 bytes of mask for 5 x 8 weights; \(weights \+ 7\) // 8 are needed"):
        lay_out(np.full(3, 3, np.uint8), 5, 8)
    with pytest.raises(SparseError, match="more than two of four"):
        lay_out(np.full(5, 7, np.uint8), 5, 8)
    with pytest.raises(SparseError, match="more than two of four"):
        lay_out(np.zeros(4, np.uint8), 5, 6)
