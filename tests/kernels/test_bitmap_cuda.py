"""The product of bitmap tiles on tensor cores: the CUDA source, emulated on the CPU, against numpy in float64.

Operands are bfloat16, so their products are exact in float32: only the sums and the result's rounding may differ.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest

from tests.kernels.emulated import KERNELS, Array, address, launch, load, needs_emulator, placed, under
from tests.kernels.operands import Mask, assert_close, kept, normal, spoiled, wide

pytestmark = needs_emulator

SOURCES = KERNELS / "spmm/bitmap.cu", KERNELS / "spmm/bitmap_tiles.cpp"
LAWS: list[float | str] = [0.5, 0.8, "all", "none", "one row", "one column", "one"]


@dataclass(frozen=True)
class Tiles:
    start: Array
    groups: Array
    largest: int


def tiles_of(weights: Array, mask: Mask) -> Tiles:
    rows, columns = weights.shape
    code, bits = load(*SOURCES), np.packbits(mask.ravel(), bitorder="little")
    packed = placed(weights[mask])
    start, largest = np.full(-(-rows // 16) * -(-columns // 64) + 1, -1, np.int32), ctypes.c_int32(-1)
    place = address(bits), rows, columns, address(start)
    units = code.hpcprune_bitmap_tiles_plan(*place, ctypes.byref(largest))
    assert units == start[-1] and (np.diff(start) >= 0).all() and np.diff(start).max(initial=0) == largest.value
    groups = placed(np.full(16 * units, 0xFF, np.uint8))
    code.hpcprune_bitmap_tiles_fill(*place, address(packed), address(groups), 3)
    return Tiles(start, groups, largest.value)


def check(mask: Mask, batch: int, offset: int = 0, bias: bool = True) -> None:
    rows, columns = mask.shape
    weights = np.where(mask, normal(rows, columns), 0).astype(np.uint16)
    tiles, x = tiles_of(weights, mask), normal(batch, columns, seed=1, offset=offset)
    added, y = normal(rows, dtype="float32", seed=2) if bias else None, spoiled(batch, rows)
    where = tiles.start, tiles.groups, tiles.largest
    launch(load(*SOURCES), "bitmap", rows, columns, *where, x, batch, added, y)
    one = np.zeros(rows) if added is None else wide(added)
    exact, terms = wide(x) @ wide(weights).T + one, abs(wide(x)) @ abs(wide(weights)).T + abs(one)
    assert_close(y, exact, terms, columns + 1)


@pytest.mark.parametrize("law", LAWS)
def test_products_are_right(law: float | str) -> None:
    for shape in [(1, 1), (17, 70), (33, 520), (48, 128), (16, 1100)]:
        for batch in (1, 7, 8, 9, 33) if law == 0.5 else (9,):
            check(kept(*shape, law), batch)


@pytest.mark.parametrize("batch", [1, 16, 70])
def test_products_in_any_order(batch: int, seed: None) -> None:
    mask = kept(40, 1300, 0.5)
    mask[:, 64:128] = mask[16:32] = False  # groups without a survivor
    for offset in (0, 2):
        check(mask, batch, offset, bias=False)


@pytest.mark.parametrize("rows,batch", [(16 * 255, 32), (16 * 509, 64)])
def test_strips_together(rows: int, batch: int) -> None:
    """Enough rows that two strips share a tile of X, and the last block has one too few."""
    check(kept(rows, 72, 0.5), batch)


def test_tiles_keep_the_bytes_they_should() -> None:
    mask = kept(64, 256, 0.5)
    counts = mask.reshape(4, 16, 4, 64).sum((1, 3)).ravel()
    assert np.diff(tiles_of(normal(64, 256), mask).start).tolist() == (8 + -(-counts // 8)).tolist()


@pytest.mark.parametrize("rows,columns,batch", [(0, 8, 3), (20, 0, 3), (20, 8, 0)])
def test_no_rows_no_columns_no_samples(rows: int, columns: int, batch: int) -> None:
    check(np.ones((rows, columns), bool), batch)


def check_some() -> None:
    """Shapes whose ends are no multiple of anything, and one of which X is copied in whole chunks."""
    for rows, columns, batch in [(17, 203, 3), (40, 136, 35), (20, 1160, 9)]:
        check(kept(rows, columns, 0.5), batch)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_are_silent(flavour: str) -> None:
    under(flavour, check_some, seed=1)
