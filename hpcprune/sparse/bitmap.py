"""Bitmap: a pruned weight matrix as its mask and its survivors, for products with one sample or a few on the CPU.

Nothing is laid out: the mask's bits and the packed survivors are the matrix (kernels/spmm/bitmap.cpp). At 50 to 80 % an
index for each survivor, as panels have it, would cost as much as the zeros do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.sparse import kernels

__all__ = ["Bitmap", "bitmap_of", "multiply"]

BYTES_AFTER, VALUES_AFTER = 8, 16  # that a vector's load may touch beyond the end


@dataclass(frozen=True)
class Bitmap:
    """W [rows, columns]. bits: its mask. first: int64, where each row's survivors begin in `value`. All with an end."""

    bits: Tensor
    first: Tensor
    value: Tensor


def bitmap_of(bits: npt.NDArray[np.uint8], rows: int, columns: int, survivors: Tensor) -> Bitmap:
    """The bitmap of a matrix from its packed mask and its packed survivors, float32 or bfloat16."""
    kept = np.unpackbits(bits, count=rows * columns, bitorder="little").reshape(rows, columns)
    counts = kept.sum(1, dtype=np.int64)
    return Bitmap(
        torch.from_numpy(np.concatenate([bits, np.zeros(BYTES_AFTER, np.uint8)])),
        torch.from_numpy(np.cumsum(counts) - counts),
        torch.cat([survivors, survivors.new_zeros(VALUES_AFTER)]),
    )


def multiply(x: Tensor, bits: Tensor, first: Tensor, value: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias [batch, rows], by the bits, first and value of a `Bitmap`.

    Args:
        x: [batch, columns], float32 or bfloat16, contiguous. bias: [rows], float32.
    """
    matrix, shape = (bits.data_ptr(), bits.numel(), first.data_ptr(), first.numel()), x.shape
    return kernels.multiply("hpcprune_bitmap", matrix, value, x, shape, bias, x.new_empty(shape[0], rows), rows)
