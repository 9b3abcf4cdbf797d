"""Blocks: a matrix of which whole blocks of weights survive, laid out for products on the CPU (kernels/blocks).

As with panels, a layout says which survivor each of its weights is; the weights themselves lie beside it, so that one
layout serves all of a round's steps, in which the weights change and the masks do not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.sparse import kernels
from hpcprune.sparse.kernels import SparseError, count_survivors
from hpcprune.sparse.patterns import SIDES, mask_rows

__all__ = ["Blocks", "lay_out", "multiply", "sampled"]


@dataclass(frozen=True)
class Blocks:
    """The layout of W [rows, columns] in blocks of `side` x `side`, of which those that survive are there.

    start: int32, for each row of blocks where its blocks begin, and the end. column: int32, for each block its column
    of blocks. order: int32 [blocks, side, side], a column of a block after another: which survivor each weight is, -1
    beyond the matrix's edges. The weights are `panels.refill(order, survivors)`.
    """

    rows: int
    columns: int
    side: int
    start: Tensor
    column: Tensor
    order: Tensor


def lay_out(bits: npt.NDArray[np.uint8], rows: int, columns: int, side: int, *, transposed: bool = False) -> Blocks:
    """Lay out W [rows, columns], or W^T.

    Args:
        bits: W's packed mask, (rows * columns + 7) // 8 bytes.
        side: 64, 32 or 16, a side for which every block is whole or empty (`patterns.side_of_blocks`).

    Raises:
        SparseError: another side, a mask of other blocks, or more weights survive than 32 bits count.
    """
    if side not in SIDES:
        raise SparseError(f"blocks of {side} x {side}; there are kernels for sides of {', '.join(map(str, SIDES))}")
    survivors = count_survivors(bits, rows, columns)
    heights, widths = _sides(rows, side), _sides(columns, side)
    kept = np.array([mask_rows(bits, columns, row, row + 1)[0, ::side] for row in range(0, rows, side)])
    lengths = kept @ widths  # of every row of a row of blocks
    whole = int(lengths @ heights)
    if survivors != whole:
        raise SparseError(f"{survivors:,} weights survive, not the {whole:,} of whole blocks {side} x {side}")
    first = np.cumsum(lengths * heights) - lengths * heights
    before = np.cumsum(kept * widths, 1) - kept * widths
    r, c = np.nonzero(kept)
    if transposed:
        by_column = np.lexsort((r, c))
        r, c = r[by_column], c[by_column]
    # Survivor (row i, column j) of a block, side x side each.
    i, j = np.arange(side)[:, None], np.arange(side)
    at = (first[r] + before[r, c])[:, None, None] + i * lengths[r][:, None, None] + j
    inside = (i < heights[r][:, None, None]) & (j < widths[c][:, None, None])
    order = np.where(inside, at, -1).astype(np.int32)
    if not transposed:
        order = order.transpose(0, 2, 1)
    across, along = (c, r) if transposed else (r, c)
    counts = np.bincount(across, minlength=len(widths) if transposed else len(heights))
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    shape = (columns, rows) if transposed else (rows, columns)
    tensors = (torch.from_numpy(np.ascontiguousarray(each)) for each in (start, along.astype(np.int32), order))
    return Blocks(*shape, side, *tensors)


def multiply(x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias [batch, rows], by the start and column of `lay_out` and its weights.

    Args:
        x: [batch, columns], float32 or bfloat16, contiguous. bias: [rows], float32.
    """
    matrix = value.shape[-1], start.data_ptr(), start.numel(), column.data_ptr(), column.numel()
    shape = x.shape
    return kernels.multiply("hpcprune_blocks_product", matrix, value, x, shape, bias, x.new_empty(shape[0], rows), rows)


def sampled(x: Tensor, gradient: Tensor, start: Tensor, column: Tensor, order: Tensor, survivors: int) -> Tensor:
    """The gradient of the survivors alone, of those of gradient^T x: packed, float32.

    Args:
        x: [batch, columns]. gradient: [batch, rows], with respect to the product. Of one dtype, contiguous.
    """
    layout = (start.data_ptr(), start.numel()), (column.data_ptr(), column.numel()), (order.data_ptr(), order.numel())
    matrix = order.shape[-1], *itertools.chain(*layout)
    return kernels.sample("hpcprune_blocks_gradient", matrix, x, gradient, survivors)


def _sides(length: int, side: int) -> npt.NDArray[np.int64]:
    """How long the blocks along an edge are: all `side`, but for the last."""
    return np.minimum(side, length - np.arange(0, length, side))
