"""Bitmap tiles: a pruned matrix as its mask and its survivors, in the order in which tensor cores take them.

For products of bfloat16 with few samples on a GPU, which wait for the weights to come from memory: at 50 to 80 % a bit
a weight costs less than an index for each survivor (kernels/spmm/bitmap.cu). The layout is packed on the CPU, once
(kernels/spmm/bitmap_tiles.cpp), so it is for inference.

None of this was ever run on a GPU; tests run it with the emulator.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native.launching import launch
from hpcprune.sparse.kernels import SparseError, kernels
from hpcprune.sparse.operands import check_mask, check_operand

__all__ = ["BitmapTiles", "lay_out", "multiply"]

HEIGHT, WIDTH = 16, 64  # of a group
UNIT = 16  # bytes in which groups are counted


@dataclass(frozen=True)
class BitmapTiles:
    """W [rows, columns]. start: int32, where groups begin, and the end. groups: bytes. largest: of them, in units."""

    rows: int
    columns: int
    start: Tensor
    groups: Tensor
    largest: int


def lay_out(bits: npt.NDArray[np.uint8], rows: int, columns: int, survivors: Tensor) -> BitmapTiles:
    """Lay out W [rows, columns] on the device of its survivors.

    Args:
        bits: its packed mask, (rows * columns + 7) // 8 bytes. survivors: packed, bfloat16.

    Raises:
        SparseError: these do not fit each other, or there is no compiled library for the CPU.
    """
    check_operand("survivors", survivors, (check_mask(bits, rows, columns),), survivors, torch.bfloat16)
    code = kernels().code
    bits, packed = np.ascontiguousarray(bits), survivors.cpu().contiguous()
    start = torch.empty(-(-rows // HEIGHT) * -(-columns // WIDTH) + 1, dtype=torch.int32, device="cpu")
    largest = ctypes.c_int32()
    matrix = bits.ctypes.data, rows, columns, start.data_ptr()
    units = code.hpcprune_bitmap_tiles_plan(*matrix, ctypes.byref(largest))
    groups = torch.empty(UNIT * units, dtype=torch.uint8, device="cpu")
    code.hpcprune_bitmap_tiles_fill(*matrix, packed.data_ptr(), groups.data_ptr(), torch.get_num_threads())
    return BitmapTiles(rows, columns, start.to(survivors.device), groups.to(survivors.device), largest.value)


def multiply(
    x: Tensor, start: Tensor, groups: Tensor, bias: Tensor | None, rows: int, columns: int, largest: int
) -> Tensor:
    """x W^T + bias [batch, rows], by the start, groups and largest of a `BitmapTiles`.

    Args:
        x: [batch, columns], bfloat16, contiguous. bias: [rows], float32.

    Raises:
        SparseError: operands do not fit. CudaError: the kernel could not be started.
    """
    if x.dim() != 2:
        raise SparseError(f"x of shape {list(x.shape)}; [batch, columns] is needed")
    check_operand("x", x, (x.shape[0], columns), x, torch.bfloat16)
    check_operand("start", start, (-(-rows // HEIGHT) * -(-columns // WIDTH) + 1,), x, torch.int32)
    check_operand("groups", groups, groups.shape, x, torch.uint8)
    check_operand("bias", bias, (rows,), x, torch.float32)
    y = x.new_empty(x.shape[0], rows)
    launch("bitmap", rows, columns, start, groups, largest, x, x.shape[0], bias, y)
    return y
