"""CSR: an unstructured pruned matrix laid out for products on a GPU (kernels/spmm/csr.cu, kernels/sddmm/csr.cu).

As with panels, the weights lie beside the layout, so that one layout serves all of a round's steps: those of W are the
packed survivors as they are, those of W^T the same in another order.

None of this was ever run on a GPU; tests run it with the emulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native.launching import ask, launch
from hpcprune.sparse.kernels import FLOATS, SparseError, is_half
from hpcprune.sparse.operands import check_mask, check_operand

__all__ = ["Csr", "lay_out", "multiply", "sampled"]


@dataclass(frozen=True)
class Csr:
    """The layout of W [rows, columns], int32.

    start: where each row begins, and the end. column: of each entry. row_order: all rows, longest first, in which
    kernels take them. order: which survivor each entry is.
    """

    rows: int
    columns: int
    start: Tensor
    column: Tensor
    row_order: Tensor
    order: Tensor


def lay_out(
    bits: npt.NDArray[np.uint8], rows: int, columns: int, device: torch.device, *, transposed: bool = False
) -> Csr:
    """Lay out W [rows, columns], or W^T, on a device: bits go there, and all else is found there.

    Args:
        bits: W's packed mask, (rows * columns + 7) // 8 bytes.

    Raises:
        SparseError: the mask is of another length, or the matrix larger than kernels can take.
    """
    survivors = check_mask(bits, rows, columns)
    packed = torch.from_numpy(np.ascontiguousarray(bits)).to(device)
    ones = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    kept = ones.flatten()[: rows * columns].view(torch.bool).view(rows, columns)
    row, column = kept.nonzero(as_tuple=True)
    order = torch.arange(survivors, device=device)
    if transposed:
        rows, columns, kept = columns, rows, kept.t()
        order = column.argsort(stable=True)
        row, column = column[order], row[order]
    lengths = kept.sum(1)
    start = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    start[1:] = lengths.cumsum(0)
    row_order = lengths.argsort(descending=True, stable=True)
    return Csr(rows, columns, start, *(each.to(torch.int32) for each in (column, row_order, order)))


def multiply(
    x: Tensor, start: Tensor, column: Tensor, row_order: Tensor, value: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    """x W^T + bias [batch, rows], by the layout of a `Csr` and its weights.

    Args:
        x: [batch, columns], float32 or bfloat16, contiguous.
        value: [survivors], float32 or bfloat16, in the layout's order. bias: [rows], float32.

    Raises:
        SparseError: operands do not fit. CudaError: the kernel could not be started.
    """
    rows = _check(x, start, column, columns)
    check_operand("row_order", row_order, (rows,), x, torch.int32)
    check_operand("W", value, column.shape, x, *FLOATS)
    check_operand("bias", bias, (rows,), x, torch.float32)
    kind, batch = is_half("W", value) + 2 * is_half("x", x), x.shape[0]
    y, scratch = x.new_empty(batch, rows), _scratch("spmm_csr_scratch", x, kind, rows, columns)
    launch("spmm_csr", kind, rows, columns, start, column, value, row_order, x, batch, bias, y, scratch)
    return y


def sampled(x: Tensor, gradient: Tensor, start: Tensor, column: Tensor, columns: int) -> Tensor:
    """The gradient of the survivors alone, of those of gradient^T x: packed, float32.

    Args:
        x: [batch, columns]. gradient: [batch, rows], with respect to the product. Of one dtype, contiguous.
        start, column: of W's own layout, not of W^T's.
    """
    rows = _check(x, start, column, columns)
    check_operand("gradient", gradient, (x.shape[0], rows), x, x.dtype)
    kind, survivors = 2 * is_half("x", x), column.shape[0]
    packed = x.new_empty(survivors, dtype=torch.float32)
    scratch = _scratch("sddmm_csr_scratch", x, kind, rows, columns)
    launch("sddmm_csr", kind, rows, columns, survivors, start, column, gradient, x, x.shape[0], packed, scratch)
    return packed


def _check(x: Tensor, start: Tensor, column: Tensor, columns: int) -> int:
    """The number of rows of W."""
    if x.dim() != 2 or start.dim() != 1 or column.dim() != 1 or not start.shape[0]:
        shapes = ", ".join(str(list(each.shape)) for each in (x, start, column))
        raise SparseError(f"x, start and column of shapes {shapes}; [batch, columns], [rows + 1], [survivors] needed")
    check_operand("x", x, (x.shape[0], columns), x, *FLOATS)
    check_operand("start", start, start.shape, x, torch.int32)
    check_operand("column", column, column.shape, x, torch.int32)
    return start.shape[0] - 1


def _scratch(name: str, x: Tensor, kind: int, rows: int, columns: int) -> Tensor:
    return x.new_empty(ask(name, x.device, kind, rows, columns, x.shape[0]), dtype=torch.uint8)
