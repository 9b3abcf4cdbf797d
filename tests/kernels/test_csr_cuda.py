"""Products with a pruned matrix in CSR: the CUDA sources, emulated on the CPU, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.emulated import KERNELS, Array, launch, load, needs_emulator, placed, under
from tests.kernels.operands import Mask, assert_close, kept, normal, spoiled, wide

pytestmark = needs_emulator

SPMM, SDDMM = KERNELS / "spmm/csr.cu", KERNELS / "sddmm/csr.cu"
SHAPES = [(1, 1), (3, 5), (37, 64), (50, 70), (9, 300)]
# Samples that a lane looks up one by one, then every width of a tile, of which there are several.
BATCHES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 128, 130]
SPARSITIES = [0.0, 0.5, 0.9, 0.99, 1.0]
LAWS = ["one row", "one column", "far apart", "every length"]
DTYPES = ["float32", "bfloat16"]


def csr(mask: Mask) -> tuple[Array, Array, Array]:
    """Where rows start, columns, and the rows by their lengths, longest first."""
    lengths = mask.sum(1)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return start, np.nonzero(mask)[1].astype(np.int32), np.argsort(-lengths, kind="stable").astype(np.int32)


def product(mask: Mask, value: Array, x: Array, bias: Array | None = None) -> Array:
    code, (rows, columns), batch = load(SPMM), mask.shape, len(x)
    kind = 1 * (value.dtype == np.uint16) + 2 * (x.dtype == np.uint16)
    start, column, order = csr(mask)
    y = spoiled(batch, rows, dtype="bfloat16" if kind & 2 else "float32")
    size = code.hpcprune_cuda_spmm_csr_scratch(kind, rows, columns, batch)
    assert (size > 0) == (batch > 4 and rows + columns > 0)
    scratch = placed(np.full(size, 0xFF, np.uint8))
    launch(code, "spmm_csr", kind, rows, columns, start, column, value, order, x, batch, bias, y, scratch)
    return y


def sampled(mask: Mask, dy: Array, x: Array) -> Array:
    code, (rows, columns), batch, survivors = load(SDDMM), mask.shape, len(x), int(mask.sum())
    kind = 2 * (x.dtype == np.uint16)
    start, column, _ = csr(mask)
    gradient = spoiled(survivors, dtype="float32")
    scratch = placed(np.full(code.hpcprune_cuda_sddmm_csr_scratch(kind, rows, columns, batch), 0xFF, np.uint8))
    sizes = rows, columns, survivors
    launch(code, "sddmm_csr", kind, *sizes, start, column, dy, x, batch, gradient, scratch)
    return gradient


def check_product(mask: Mask, value: Array, x: Array, bias: Array | None = None) -> None:
    weights = np.zeros(mask.shape)
    weights[mask] = wide(value)
    exact, terms = wide(x) @ weights.T, abs(wide(x)) @ abs(weights.T)
    if bias is not None:
        exact, terms = exact + wide(bias), terms + abs(wide(bias))
    assert_close(product(mask, value, x, bias), exact, terms, mask.sum(1))


def check_sampled(mask: Mask, dy: Array, x: Array) -> None:
    exact, terms = wide(dy).T @ wide(x), abs(wide(dy)).T @ abs(wide(x))
    assert_close(sampled(mask, dy, x), exact[mask], terms[mask], len(x))


def check(mask: Mask, batch: int, of_weights: str, of_samples: str, offset: int = 0) -> None:
    """Both products; everything begins `offset` elements after a multiple of 16 bytes."""
    rows, columns = mask.shape
    in_weights, in_samples = (offset * (4 if dtype == "float32" else 2) for dtype in (of_weights, of_samples))
    value = normal(int(mask.sum()), dtype=of_weights, offset=in_weights)
    x = normal(batch, columns, dtype=of_samples, offset=in_samples)
    check_product(mask, value, x, normal(rows, dtype="float32"))
    check_sampled(mask, normal(batch, rows, dtype=of_samples, seed=1, offset=in_samples), x)


@pytest.mark.parametrize("of_samples", DTYPES)
@pytest.mark.parametrize("of_weights", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_products_are_right(sparsity: float, of_weights: str, of_samples: str) -> None:
    for shape in SHAPES:
        for batch in BATCHES:
            check(kept(*shape, sparsity), batch, of_weights, of_samples)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_uneven_rows_in_any_order(dtype: str, law: str, seed: None) -> None:
    for mask in (kept(45, 333, law), np.ascontiguousarray(kept(45, 333, law).T)):
        for batch in (1, 4, 6, 17, 70):
            check(mask, batch, dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_samples_than_are_transposed_at_once(dtype: str) -> None:
    check(kept(5, 8, 0.5), 2100, "float32", dtype)
    code = load(SPMM)
    sizes = {code.hpcprune_cuda_spmm_csr_scratch(0, 5, 8, batch) for batch in (1024, 2100)}
    assert len(sizes) == 1, "scratch does not grow with the batch"


@pytest.mark.parametrize("columns", [300_000, 1_100_000])
def test_larger_shares_for_more_survivors(columns: int) -> None:
    """A warp takes 64 of them, and the most that it may, 256."""
    check_sampled(np.ones((2, columns), bool), normal(1, 2), normal(1, columns))


@pytest.mark.parametrize("rows,columns,batch", [(0, 5, 9), (5, 0, 9), (5, 0, 2), (0, 0, 1), (5, 6, 0)])
def test_nothing_at_all(rows: int, columns: int, batch: int) -> None:
    check(np.ones((rows, columns), bool), batch, "float32", "float32")


def test_pruned_weights_do_not_meet_infinite_samples() -> None:
    """Rows are filled up with nothing: a sample that a row has no weight for does not reach its sum."""
    mask = kept(40, 70, 0.8)
    mask[:, 0] = mask[:, 69] = False
    for batch in (1, 3, 6, 20, 40, 130):
        x, dy = normal(batch, 70, dtype="float32"), normal(batch, 40, dtype="float32")
        x[:, [0, 69]] = np.inf
        assert np.isfinite(product(mask, normal(int(mask.sum()), dtype="float32"), x)).all()
        assert np.isfinite(sampled(mask, dy, x)).all()


def test_arrays_that_do_not_begin_at_128_bits() -> None:
    for offset in (1, 2, 3):
        for batch in (3, 8):
            check(kept(20, 92, 0.4), batch, "float32", "float32", offset)
            check(kept(20, 92, 0.4), batch, "bfloat16", "bfloat16", offset)


def test_results_repeat_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = kept(50, 120, 0.7)
    value, x, dy = (normal(*shape, dtype="float32") for shape in [(int(mask.sum()),), (21, 120), (21, 50)])
    monkeypatch.delenv("CUEMU_SEED", raising=False)
    first = product(mask, value, x), sampled(mask, dy, x)
    for seed in ("3", "4"):
        monkeypatch.setenv("CUEMU_SEED", seed)
        again = product(mask, value, x), sampled(mask, dy, x)
        assert (first[0] == again[0]).all() and (first[1] == again[1]).all()


def check_some() -> None:
    for mask in (kept(21, 75, 0.5), kept(20, 333, "one row")):
        for batch in (1, 3, 5, 9, 33, 130):
            for dtype in DTYPES:
                check(mask, batch, dtype, dtype)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_are_silent(flavour: str) -> None:
    under(flavour, check_some, seed=1)
