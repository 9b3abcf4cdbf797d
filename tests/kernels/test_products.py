"""Products with a pruned matrix, on every path, against numpy in float64; and the layout that they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcprune.errors import HpcpruneError
from hpcprune.sparse import bitmap
from hpcprune.sparse.bitmap import bitmap_of
from hpcprune.sparse.kernels import SparseError, kernels
from hpcprune.sparse.panels import Panels, lay_out, multiply, refill, sampled

SHAPES = [(1, 1), (3, 5), (64, 256), (65, 257), (130, 700), (4, 1000), (700, 3)]
BATCHES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 65, 100]
LAWS = ["half", "few", "none", "all", "one row", "one column"]


def pruned(rows: int, columns: int, law: str) -> Tensor:
    random = np.random.default_rng(rows * columns)
    weights = random.standard_normal((rows, columns)).astype(np.float32)
    kept = random.random((rows, columns)) < {"half": 0.5, "few": 0.03, "all": 1}.get(law, 0)
    if law == "one row":
        kept[rows // 2] = True
    if law == "one column":
        kept[:, columns // 2] = True
    return torch.from_numpy(weights * kept)


def bits_of(weights: Tensor) -> np.ndarray:
    return np.packbits((weights != 0).numpy().ravel(), bitorder="little")


def laid_out(weights: Tensor, transposed: bool = False) -> tuple[Panels, Tensor]:
    layout = lay_out(bits_of(weights), *weights.shape, transposed=transposed)
    return layout, refill(layout.order, weights[weights != 0])


def exact(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> np.ndarray:
    product = x.double().numpy() @ weights.double().numpy().T
    return product if bias is None else product + bias.double().numpy()


def bound(x: Tensor, weights: Tensor) -> np.ndarray:
    """How far a chain of sums in float32 may be from the exact one, with a bias of less than 10."""
    terms = x.double().abs().numpy() @ weights.double().abs().numpy().T + 10
    return terms * (weights.shape[1] + 2) * 2.0**-24


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_products_are_right(compiled: str, rows: int, columns: int, law: str) -> None:
    weights, bias = pruned(rows, columns, law), torch.randn(rows)
    layout, value = laid_out(weights)
    across, across_value = laid_out(weights, transposed=True)
    for batch in BATCHES:
        x, gradient = torch.randn(batch, columns), torch.randn(batch, rows)
        error = multiply(x, layout.layout, value, bias, rows).numpy() - exact(x, weights, bias)
        assert (abs(error) <= bound(x, weights)).all()
        error = multiply(gradient, across.layout, across_value, None, columns).numpy() - exact(gradient, weights.T)
        assert (abs(error) <= bound(gradient, weights.T)).all()
        own = sampled(x, gradient, layout.layout, layout.order, int((weights != 0).sum())).numpy()
        kept = (weights != 0).numpy()
        assert (abs(own - exact(gradient.T, x.T)[kept]) <= bound(gradient.T, x.T)[kept]).all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows,columns", [*SHAPES, (20, 64), (20, 72), (33, 47)])
def test_products_by_bitmap_are_right(compiled: str, rows: int, columns: int, law: str) -> None:
    weights, bias = pruned(rows, columns, law), torch.randn(rows)
    held = bitmap_of(bits_of(weights), rows, columns, weights[weights != 0])
    for batch in (1, 2, 5):
        x = torch.randn(batch, columns)
        error = bitmap.multiply(x, held.bits, held.first, held.value, bias, rows).numpy() - exact(x, weights, bias)
        assert (abs(error) <= bound(x, weights)).all()


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
def test_bfloat16_is_summed_in_float32(compiled: str, of_weights: torch.dtype, of_x: torch.dtype) -> None:
    weights = pruned(70, 900, "half").to(of_weights)
    layout, value = laid_out(weights)
    assert value.dtype == of_weights
    for batch in (1, 4, 40):
        x = torch.randn(batch, 900).to(of_x)
        product = multiply(x, layout.layout, value, None, 70)
        rounding = 0 if of_x == torch.float32 else 2.0**-8 * abs(exact(x, weights))
        held = bitmap_of(bits_of(weights), 70, 900, weights[weights != 0])
        for each in (product, bitmap.multiply(x, held.bits, held.first, held.value, None, len(weights))):
            assert each.dtype == of_x
            assert (abs(each.double().numpy() - exact(x, weights)) <= bound(x, weights) * 1.01 + rounding).all()
    x, gradient = torch.randn(40, 900).bfloat16(), torch.randn(40, 70).bfloat16()
    kept = (weights != 0).numpy()
    own = sampled(x, gradient, layout.layout, layout.order, int(kept.sum())).numpy()
    assert (abs(own - exact(gradient.T, x.T)[kept]) <= bound(gradient.T, x.T)[kept]).all()


def test_a_sample_has_the_same_result_in_any_batch_and_on_any_number_of_threads(compiled: str) -> None:
    weights = pruned(300, 700, "half")
    layout, value = laid_out(weights)
    x, gradient = torch.randn(101, 700), torch.randn(101, 300)
    whole = multiply(x, layout.layout, value, None, 300)
    own = sampled(x, gradient, layout.layout, layout.order, int((weights != 0).sum()))
    held = bitmap_of(bits_of(weights), *weights.shape, weights[weights != 0])
    by_bitmap = bitmap.multiply(x, held.bits, held.first, held.value, None, len(weights))
    for batch in BATCHES:
        assert torch.equal(multiply(x[:batch].contiguous(), layout.layout, value, None, 300), whole[:batch])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(multiply(x, layout.layout, value, None, 300), whole)
            assert torch.equal(multiply(x[:1], layout.layout, value, None, 300), whole[:1])
            assert torch.equal(sampled(x, gradient, layout.layout, layout.order, len(own)), own)
            assert torch.equal(bitmap.multiply(x, held.bits, held.first, held.value, None, len(weights)), by_bitmap)
    finally:
        torch.set_num_threads(before)


def test_threads_of_its_own_where_there_is_no_pool(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = pruned(300, 700, "half"), torch.randn(101, 700)
    layout, value = laid_out(weights)
    pooled = multiply(x, layout.layout, value, None, 300)
    monkeypatch.setattr("hpcprune.sparse.kernels.pool", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(multiply(x, layout.layout, value, None, 300), pooled)


def test_infinities_and_nan_reach_the_result(compiled: str) -> None:
    weights, x = pruned(8, 300, "all"), torch.ones(5, 300)
    layout, value = laid_out(weights)
    x[2, 7], x[3, 9] = float("inf"), float("nan")
    product = multiply(x, layout.layout, value, None, 8)
    assert product[[0, 1, 4]].isfinite().all() and product[2].isinf().all() and product[3].isnan().all()
    half = multiply(x.bfloat16(), layout.layout, value, None, 8)
    assert half[2].isinf().all() and half[3].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_every_survivor_has_one_entry(compiled: str, rows: int, columns: int, law: str, transposed: bool) -> None:
    weights = pruned(rows, columns, law)
    layout, value = laid_out(weights, transposed)
    survivors = layout.order[layout.order >= 0]
    assert torch.equal(survivors.sort().values, torch.arange(int((weights != 0).sum()), dtype=torch.int32))
    assert not value[layout.order < 0].any()
    assert (layout.rows, layout.columns) == ((columns, rows) if transposed else (rows, columns))


def test_little_is_filled_up(compiled: str) -> None:
    """What the header of panels.h says of its cost."""
    for sparsity, least in ((0.5, 1.02), (0.9, 1.04), (0.99, 1.09)):
        weights = torch.randn(1024, 1024) * (torch.rand(1024, 1024) >= sparsity)
        layout = lay_out(bits_of(weights), 1024, 1024)
        survivors = int((weights != 0).sum())
        assert survivors <= layout.order.numel() <= least * survivors


def test_what_does_not_fit_is_refused(compiled: str) -> None:
    with pytest.raises(SparseError, match=r"3 bytes of mask for 5 x 5 weights; \(weights \+ 7\) // 8 are needed"):
        lay_out(np.zeros(3, np.uint8), 5, 5)


def test_nothing_is_laid_out_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", "numpy")
    kernels.cache_clear()
    with pytest.raises(SparseError, match="sparse products need the compiled kernels: forced by HPCPRUNE_NATIVE"):
        lay_out(np.zeros(4, np.uint8), 5, 5)
    monkeypatch.undo()
    kernels.cache_clear()


def test_fused_multiply_add_gives_the_same_bits_in_vectors_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = pruned(130, 700, "half"), torch.randn(70, 700)
    found = []
    for path in ("avx2", "avx512"):
        monkeypatch.setenv("HPCPRUNE_NATIVE", path)
        kernels.cache_clear()
        try:
            layout, value = laid_out(weights)
        except HpcpruneError as error:
            pytest.skip(str(error))
        found.append(multiply(x, layout.layout, value, None, 130))
    monkeypatch.undo()
    kernels.cache_clear()
    assert torch.equal(*found)
