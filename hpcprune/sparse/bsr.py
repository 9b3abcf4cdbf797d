"""BSR: a matrix of which whole blocks of weights survive, laid out for tensor cores (kernels/blocks/{spmm,sddmm}.cu).

bfloat16, in blocks that are row-major each. As with CSR the weights lie beside the layout.

None of this was ever run on a GPU; tests run it with the emulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native.launching import launch
from hpcprune.sparse import blocks
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.operands import check_mask, check_operand
from hpcprune.sparse.patterns import SIDES

__all__ = ["Bsr", "lay_out", "multiply", "refill", "sampled"]


@dataclass(frozen=True)
class Bsr:
    """The layout of W [rows, columns], int32.

    start: for each row of blocks where its blocks begin, and the end. row, column: of each block, in blocks. order:
    [blocks, side, side], which survivor each weight is, -1 beyond the matrix's edges.
    """

    rows: int
    columns: int
    start: Tensor
    row: Tensor
    column: Tensor
    order: Tensor


def lay_out(
    bits: npt.NDArray[np.uint8],
    rows: int,
    columns: int,
    side: int,
    device: torch.device,
    *,
    transposed: bool = False,
) -> Bsr:
    """Lay out W [rows, columns], or W^T, on a device; arguments and errors as of `blocks.lay_out`."""
    check_mask(bits, rows, columns)
    found = blocks.lay_out(bits, rows, columns, side, transposed=transposed)
    counts = found.start.diff()
    row = torch.arange(len(counts), dtype=torch.int32, device="cpu").repeat_interleave(counts)
    order = found.order.transpose(1, 2).contiguous()
    tensors = (each.to(device) for each in (found.start, row, found.column, order))
    return Bsr(found.rows, found.columns, *tensors)


def refill(order: Tensor, survivors: Tensor) -> Tensor:
    """A layout's weights [blocks, side, side], from the packed survivors; zeros beyond the matrix's edges."""
    return torch.cat([survivors, survivors.new_zeros(1)])[order]  # -1 is the last


def multiply(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    """x W^T + bias [batch, rows], by the start and column of a `Bsr` and its weights.

    Args:
        x: [batch, columns], bfloat16, contiguous. value: bfloat16, as `refill` has it. bias: [rows], float32.

    Raises:
        SparseError: operands do not fit. CudaError: the kernel could not be started.
    """
    side = _check(x, start, column, value.shape, rows, columns)
    check_operand("W", value, (column.shape[0], side, side), x, torch.bfloat16)
    check_operand("bias", bias, (rows,), x, torch.float32)
    y = x.new_empty(x.shape[0], rows)
    launch("block_spmm", side, rows, columns, start, column, value, x, x.shape[0], bias, y)
    return y


def sampled(x: Tensor, gradient: Tensor, row: Tensor, column: Tensor, order: Tensor, survivors: int) -> Tensor:
    """The gradient of the survivors alone, of those of gradient^T x: packed, float32.

    Args:
        x: [batch, columns]. gradient: [batch, rows], with respect to the product. bfloat16, contiguous.
        row, column, order: of W's own layout, not of W^T's.
    """
    if x.dim() != 2 or gradient.dim() != 2:
        raise SparseError(f"x and gradient of shapes {list(x.shape)}, {list(gradient.shape)}; 2-D ones are needed")
    rows, columns = gradient.shape[1], x.shape[1]
    side = _check(x, None, column, order.shape, rows, columns)
    check_operand("gradient", gradient, (x.shape[0], rows), x, torch.bfloat16)
    check_operand("row", row, column.shape, x, torch.int32)
    check_operand("order", order, (column.shape[0], side, side), x, torch.int32)
    dense = x.new_empty(order.shape, dtype=torch.float32)
    launch("block_sddmm", side, rows, columns, row, column, column.shape[0], x, gradient, x.shape[0], dense)
    packed = dense.new_empty(survivors + 1)
    packed[order] = dense  # what lies beyond the edges goes to the last
    return packed[:survivors]


def _check(x: Tensor, start: Tensor | None, column: Tensor, blocks: tuple[int, ...], rows: int, columns: int) -> int:
    """The side of blocks."""
    if x.dim() != 2 or column.dim() != 1 or len(blocks) != 3 or blocks[-1] not in SIDES:
        raise SparseError(
            f"x, column and blocks of shapes {list(x.shape)}, {list(column.shape)}, {list(blocks)}; "
            f"[batch, columns], [blocks], [blocks, side, side] are needed, sides of {', '.join(map(str, SIDES))}"
        )
    side = blocks[-1]
    check_operand("x", x, (x.shape[0], columns), x, torch.bfloat16)
    check_operand("start", start, (-(-rows // side) + 1,), x, torch.int32)
    check_operand("column", column, column.shape, x, torch.int32)
    return side
