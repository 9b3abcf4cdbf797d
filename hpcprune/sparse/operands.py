"""Operands of products on a GPU, checked before a kernel sees them: one that is misled reads what is not there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native import launching
from hpcprune.native.cuda import UnavailableError
from hpcprune.sparse.kernels import SparseError, count_survivors

__all__ = ["LONGEST", "check_mask", "check_operand", "need_kernels"]

LONGEST = 1 << 20  # rows or columns: within what grids of blocks and 32-bit offsets can say


def need_kernels(device: torch.device) -> None:
    """Raise SparseError where there are no CUDA kernels for a device."""
    try:
        launching.kernels(device)
    except UnavailableError as why:
        raise SparseError(f"sparse products on {device} need the CUDA kernels: {why}") from None


def check_mask(bits: npt.NDArray[np.uint8], rows: int, columns: int) -> int:
    """How many weights survive; SparseError where bits are not the mask of a matrix that kernels can take."""
    if max(rows, columns) > LONGEST:
        raise SparseError(f"{rows:,} x {columns:,} weights; {LONGEST:,} rows and columns at most on a GPU")
    return count_survivors(bits, rows, columns)


def check_operand(name: str, tensor: Tensor | None, shape: Sequence[int], like: Tensor, *dtypes: torch.dtype) -> None:
    """Raise SparseError unless a tensor, where there is one, has this shape, `like`'s device and one of some dtypes."""
    if tensor is None:
        return
    if tensor.shape != tuple(shape) or tensor.device != like.device or tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise SparseError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}; "
            f"{allowed} {list(shape)} on {like.device} is needed"
        )
