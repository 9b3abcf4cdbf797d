"""How a pruned matrix can be held: the kernels by name, which of them a mask is fit for, and what each takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hpcprune.sparse import blocks, ops, panels, patterns, two_of_four
from hpcprune.sparse.bitmap import bitmap_of
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.panels import refill

__all__ = ["LINEAR", "Bits", "Kernel", "fit", "hold"]

Bits = npt.NDArray[np.uint8]
Kernel = Literal["panels", "bitmap", "blocks", "two_of_four"]

FEW = 8  # rows of X at a time, up to which a bitmap may be faster than panels

# The operators, which take x, what `hold` gives, a bias or None, and the number of rows.
LINEAR: Mapping[Kernel, Any] = {
    "panels": ops.panels_linear,
    "bitmap": ops.bitmap_linear,
    "blocks": ops.blocks_linear,
    "two_of_four": ops.two_of_four_linear,
}


def fit(bits: Bits, rows: int, columns: int, samples: int) -> list[Kernel]:
    """The kernels that may be the fastest for a mask of W [rows, columns] and at most so many rows of X at once."""
    found: list[Kernel] = ["panels"]
    if samples <= FEW:
        found.append("bitmap")
    if patterns.side_of_blocks(bits, rows, columns):
        found.append("blocks")
    if patterns.two_of_four(bits, rows, columns):
        found.append("two_of_four")
    return found


def hold(kernel: Kernel, bits: Bits, rows: int, columns: int, survivors: Tensor) -> dict[str, Tensor]:
    """A pruned W [rows, columns] as a kernel's operator takes it: its tensors between x and the bias, by name.

    Raises:
        SparseError: the mask is not what the kernel is for.
    """
    if kernel == "bitmap":
        bitmap = bitmap_of(bits, rows, columns, survivors)
        return {"bits": bitmap.bits, "first": bitmap.first, "value": bitmap.value}
    if kernel == "blocks":
        side = patterns.side_of_blocks(bits, rows, columns)
        if side is None:
            raise SparseError(f"not whole blocks survive of {rows} x {columns} weights; use panels")
        cut = blocks.lay_out(bits, rows, columns, side)
        return {"start": cut.start, "column": cut.column, "value": refill(cut.order, survivors)}
    if kernel == "two_of_four":
        fours = two_of_four.lay_out(bits, rows, columns)
        return {"code": fours.code, "value": refill(fours.order, survivors)}
    layout = panels.lay_out(bits, rows, columns)
    return {"layout": layout.layout, "value": refill(layout.order, survivors)}
