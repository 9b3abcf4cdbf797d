"""2:4: a matrix of which at most two of every four neighbours in a row survive, for products on the CPU.

Two weights of each four are held, and two bits for each that say which it is (kernels/spmm/two_of_four.cpp). Nothing is
there for what was pruned, and nothing has to be counted to find the next weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.sparse import kernels
from hpcprune.sparse.kernels import SparseError, count_survivors
from hpcprune.sparse.patterns import two_of_four

__all__ = ["TwoOfFour", "lay_out", "multiply"]

STRIPE, UNIT = 8, 16  # rows and columns, as the kernel has them
_NIBBLES = np.arange(16)[:, None] >> np.arange(4) & 1
_COUNT = _NIBBLES.sum(1).astype(np.int32)
_PLACES = np.argsort(1 - _NIBBLES, 1, kind="stable")[:, :2].astype(np.uint32)  # of the first two ones, if there are


@dataclass(frozen=True)
class TwoOfFour:
    """The layout of W [rows, columns], in stripes of 8 rows and units of 16 columns.

    code: int32 [stripes, units, 4], for each two rows of a unit the places of their weights, two bits each. order:
    int32 [stripes, units, 4, 16], which survivor each weight is, -1 for none. The weights are
    `panels.refill(order, survivors)`.
    """

    rows: int
    columns: int
    code: Tensor
    order: Tensor


def lay_out(bits: npt.NDArray[np.uint8], rows: int, columns: int) -> TwoOfFour:
    """Lay out W [rows, columns].

    Args:
        bits: W's packed mask, (rows * columns + 7) // 8 bytes.

    Raises:
        SparseError: a mask that is not 2:4, or more weights survive than 32 bits count.
    """
    count_survivors(bits, rows, columns)
    if not two_of_four(bits, rows, columns):
        raise SparseError(
            f"more than two of four weights survive somewhere in {rows} x {columns}, or rows end within four"
        )
    stripes, units = -(-rows // STRIPE), -(-columns // UNIT)
    fours = np.zeros((stripes * STRIPE, units * UNIT // 4), np.uint8)
    fours[:rows, : columns // 4] = np.stack([bits & 15, bits >> 4], 1).ravel()[: rows * columns // 4].reshape(rows, -1)
    count = _COUNT[fours]
    before = (np.cumsum(count, dtype=np.int32).reshape(count.shape) - count)[..., None]
    slot = np.arange(2, dtype=np.int32)
    order = np.where(slot < count[..., None], before + slot, np.int32(-1))

    def in_lanes(each: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[rows, fours, 2] as the kernel's lanes have it: those of a four, of two rows, two weights each."""
        lanes: npt.NDArray[Any] = (
            each.reshape(stripes, 4, 2, units, 4, 2).transpose(0, 3, 1, 4, 2, 5).reshape(stripes, units, 4, 16)
        )
        return lanes

    code = (in_lanes(_PLACES[fours]) << 2 * np.arange(16, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return TwoOfFour(
        rows, columns, torch.from_numpy(code.view(np.int32)), torch.from_numpy(np.ascontiguousarray(in_lanes(order)))
    )


def multiply(x: Tensor, code: Tensor, value: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias [batch, rows], by the code of `lay_out` and its weights.

    Args:
        x: [batch, columns], float32 or bfloat16, contiguous. bias: [rows], float32.
    """
    matrix, shape = (code.data_ptr(), code.numel()), x.shape
    return kernels.multiply("hpcprune_two_of_four", matrix, value, x, shape, bias, x.new_empty(shape[0], rows), rows)
