"""Products with whole blocks on tensor cores: the CUDA sources, emulated on the CPU, against numpy in float64.

Operands are bfloat16, so their products are exact in float32: only the sums and the result's rounding may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.kernels.emulated import KERNELS, Array, launch, load, needs_emulator, placed, under
from tests.kernels.operands import Exact, assert_close, kept, normal, spoiled, wide

pytestmark = needs_emulator

SPMM, SDDMM = KERNELS / "blocks/spmm.cu", KERNELS / "blocks/sddmm.cu"
SIDES = [16, 32, 64]


@dataclass(frozen=True)
class Blocks:
    side: int
    shape: tuple[int, int]
    start: Array
    row: Array
    column: Array
    value: Array

    @property
    def dense(self) -> Array:
        side, (rows, columns) = self.side, self.shape
        result = np.zeros((-(-rows // side) * side, -(-columns // side) * side), np.uint16)
        for row, column, value in zip(self.row, self.column, self.value, strict=True):
            result[row * side : (row + 1) * side, column * side : (column + 1) * side] = value
        return result[:rows, :columns]

    @property
    def transposed(self) -> Blocks:
        order = np.lexsort((self.row, self.column))
        count = np.bincount(self.column, minlength=-(-self.shape[1] // self.side))
        start = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        value = placed(self.value[order].transpose(0, 2, 1))
        return Blocks(self.side, self.shape[::-1], start, self.column[order], self.row[order], value)


def blocks_of(side: int, rows: int, columns: int, law: float | str, offset: int = 0) -> Blocks:
    mask = kept(-(-rows // side), -(-columns // side), law)
    row, column = (index.astype(np.int32) for index in np.nonzero(mask))
    start = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    value = normal(len(row), side, side, seed=2)
    for block, r, c in zip(value, row, column, strict=True):
        block[max(0, rows - r * side) :] = block[:, max(0, columns - c * side) :] = 0
    return Blocks(side, (rows, columns), start, row, column, placed(value, offset))


def check_product(w: Blocks, x: Array, bias: Array | None = None) -> None:
    y, dense = spoiled(len(x), w.shape[0]), wide(w.dense)
    launch(load(SPMM), "block_spmm", w.side, *w.shape, w.start, w.column, w.value, x, len(x), bias, y)
    added = np.zeros(len(dense)) if bias is None else wide(bias)
    exact, terms = wide(x) @ dense.T + added, abs(wide(x)) @ abs(dense).T + abs(added)
    assert_close(y, exact, terms, w.shape[1] + 1)


def check_gradient(w: Blocks, x: Array, dy: Array, offset: int = 0) -> None:
    side, gradient = w.side, spoiled(*w.value.shape, dtype="float32", offset=offset)
    launch(load(SDDMM), "block_sddmm", side, *w.shape, w.row, w.column, len(w.row), x, dy, len(x), gradient)

    def blocks(matrix: Exact) -> Exact:
        padded = np.zeros((-(-w.shape[0] // side) * side, -(-w.shape[1] // side) * side))
        padded[: w.shape[0], : w.shape[1]] = matrix
        cut = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side)
        return np.asarray(cut.transpose(0, 2, 1, 3)[w.row, w.column])

    assert_close(gradient, blocks(wide(dy).T @ wide(x)), blocks(abs(wide(dy)).T @ abs(wide(x))), len(x))


def check(side: int, rows: int, columns: int, batch: int, law: float | str = 0.5, offset: int = 0) -> None:
    """Y, dX and the gradient; everything begins `offset` bytes after a multiple of 16, the gradient twice that."""
    w = blocks_of(side, rows, columns, law, offset)
    x, dy = normal(batch, columns, seed=1, offset=offset), normal(batch, rows, seed=3, offset=offset)
    check_product(w, x, normal(rows, dtype="float32"))
    check_product(w.transposed, dy)
    check_gradient(w, x, dy, 2 * offset)


@pytest.mark.parametrize("law", [0.5, "all", "none", "one row", "one column", "one"])
@pytest.mark.parametrize("side", SIDES)
def test_products_are_right(side: int, law: float | str) -> None:
    for down, across in [(1, 1), (3, 6), (2, 9)]:
        for less in (0, 5):  # the last blocks stand out beyond W's edges
            for batch in (1, 7, 8, 9, 33) if law == 0.5 and down == 3 else (9,):
                check(side, down * side - less, across * side - less, batch, law)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [1, 150])
def test_products_in_any_order(side: int, batch: int, seed: None) -> None:
    for offset in (0, 2):
        check(side, 2 * side, 9 * side, batch, offset=offset)


@pytest.mark.parametrize("side", SIDES)
def test_wide_tiles_of_samples(side: int) -> None:
    """Enough block rows that a thread block takes 64 samples, or 128."""
    w = blocks_of(side, 64 * side, side, "all")
    for batch in (64, 130):
        check_product(w, normal(batch, side, seed=1))


@pytest.mark.parametrize("rows,columns,batch", [(0, 8, 3), (20, 0, 3), (20, 8, 0)])
def test_blocks_of_nothing(rows: int, columns: int, batch: int) -> None:
    check(16, rows, columns, batch, "all")


def test_other_sides_are_refused() -> None:
    assert load(SPMM).hpcprune_cuda_block_spmm(8, 1, 1, *[None] * 4, 1, *[None] * 3) == 1
    assert load(SDDMM).hpcprune_cuda_block_sddmm(8, 1, 1, None, None, 1, None, None, 1, None, None) == 1


def check_some() -> None:
    """Shapes whose ends are no multiple of anything, and one of which everything is copied in whole chunks."""
    for rows, columns, batch in [(17, 203, 3), (40, 136, 70)]:
        for side in SIDES:
            check(side, rows, columns, batch)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_are_silent(flavour: str) -> None:
    under(flavour, check_some, seed=1)
