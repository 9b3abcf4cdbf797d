"""The compiled library as sparse products use it: found once, its dtypes, its errors, and the call of a product."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library
from hpcprune.native.pool import pool
from hpcprune.native.survivors import popcount

__all__ = ["FLOATS", "SparseError", "count_survivors", "done", "is_half", "kernels", "multiply", "sample"]

MOST = (1 << 31) - 1  # survivors of a layer
FLOATS = (torch.float32, torch.bfloat16)


class SparseError(HpcpruneError):
    """Sparse products cannot be had, or their operands do not fit."""


@lru_cache(maxsize=1)
def kernels() -> tuple[ctypes.CDLL, int]:
    """The compiled library and the number of its path, asked for once a process: a product may take 5 us.

    Raises:
        SparseError: there is none.
    """
    chosen = library()
    if chosen.code is None:
        raise SparseError(f"sparse products need the compiled kernels: {chosen.reason}")
    return chosen.code, chosen.level


def is_half(name: str, tensor: Tensor) -> bool:
    """Whether it is bfloat16 and not float32, as kernels want to know; SparseError where it is neither."""
    if tensor.dtype not in FLOATS:
        raise SparseError(f"{name} is {tensor.dtype}; sparse products take float32 and bfloat16")
    return tensor.dtype == torch.bfloat16


def multiply(
    kernel: str, matrix: Sequence[int], value: Tensor, x: Tensor, shape: Sequence[Any], bias: Tensor | None, y: Tensor
) -> Tensor:
    """y, filled with x W^T + bias by a kernel.

    Args:
        matrix: the kernel's arguments for W beside its weights. value: those as the kernel has them, float32 or
            bfloat16; sums are float32.
        x: float32 or bfloat16, contiguous. shape: the kernel's arguments for x and y beside themselves.
        bias: [rows], float32. y: contiguous, of x's dtype.
    """
    code, level = kernels()
    kind = is_half("W", value) + 2 * is_half("x", x)
    done(
        getattr(code, kernel)(
            level,
            kind,
            *matrix,
            value.data_ptr(),
            x.data_ptr(),
            *shape,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
            pool(),
        )
    )
    return y


def sample(kernel: str, matrix: Sequence[int], x: Tensor, gradient: Tensor, survivors: int) -> Tensor:
    """The gradient of the survivors alone, of those of gradient^T x, by a kernel: packed, float32.

    Args:
        matrix: the kernel's arguments for W.
        x: [batch, columns]. gradient: [batch, rows], with respect to the product. Of one dtype, contiguous.
    """
    packed = torch.empty(survivors, dtype=torch.float32)
    code, level = kernels()
    half, threads = is_half("x", x), torch.get_num_threads()
    operands = x.data_ptr(), gradient.data_ptr(), x.shape[0], packed.data_ptr()
    done(getattr(code, kernel)(level, half, *matrix, *operands, threads, pool()))
    return packed


def count_survivors(bits: npt.NDArray[np.uint8], rows: int, columns: int) -> int:
    """How many weights survive; SparseError where bits are no mask of W [rows, columns], or 32 bits do not count them.

    Args:
        bits: W's packed mask, (rows * columns + 7) // 8 bytes.
    """
    if bits.size != (rows * columns + 7) // 8:
        raise SparseError(f"{bits.size} bytes of mask for {rows} x {columns} weights; (weights + 7) // 8 are needed")
    survivors = popcount(bits)
    if survivors > MOST:
        raise SparseError(f"{survivors:,} weights survive in one layer; {MOST:,} at most")
    return survivors


def done(status: int) -> None:
    """Raise SparseError where a kernel found no memory."""
    if status:
        raise SparseError("no memory for the sums of a sparse product; use a smaller batch or fewer threads")
