"""Patterns that kernels are made for, recognised from packed mask bits: whole blocks, and two of four.

`bits` are the mask of W [rows, columns], row by row: bit i of byte j is weight 8 j + i, 1 = survives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["SIDES", "mask_rows", "side_of_blocks", "two_of_four"]

SIDES = (64, 32, 16)  # of the blocks that there are kernels for

Bits = npt.NDArray[np.uint8]
_FEW_IN_BOTH_HALVES = np.array([max((byte & 15).bit_count(), (byte >> 4).bit_count()) <= 2 for byte in range(256)])


def side_of_blocks(bits: Bits, rows: int, columns: int) -> int | None:
    """The largest side for which every block of the mask is whole or empty, None if there is none of `SIDES`.

    Blocks begin at multiples of their side; those at the edges may be cut off.
    """
    smallest = min(SIDES)
    kept = np.zeros((-(-rows // smallest), -(-columns // smallest)), np.bool_)
    for block_row in range(kept.shape[0]):
        strip = mask_rows(bits, columns, smallest * block_row, min(rows, smallest * (block_row + 1)))
        kept[block_row] = strip[0, ::smallest]
        if (strip != np.repeat(kept[block_row], smallest)[:columns]).any():
            return None
    for side in sorted(SIDES, reverse=True):
        times = side // smallest
        first = kept[::times, ::times]
        whole = np.repeat(np.repeat(first, times, 0), times, 1)[: kept.shape[0], : kept.shape[1]]
        if (whole == kept).all():
            return side
    return None


def two_of_four(bits: Bits, rows: int, columns: int) -> bool:
    """Whether of every four neighbours in a row at most two survive, as sparse tensor cores have it (2:4)."""
    return columns % 4 == 0 and bool(_FEW_IN_BOTH_HALVES[bits[: (rows * columns + 7) // 8]].all())


def mask_rows(bits: Bits, columns: int, first: int, last: int) -> npt.NDArray[np.bool_]:
    """The mask of rows [first, last)."""
    start, stop = first * columns, last * columns
    ones = np.unpackbits(bits[start // 8 : (stop + 7) // 8], bitorder="little")
    return ones[start % 8 : start % 8 + stop - start].view(np.bool_).reshape(last - first, columns)
