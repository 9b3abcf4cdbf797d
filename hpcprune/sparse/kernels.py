"""The compiled library as sparse products use it: found once, its dtypes, its errors, and the call of a product."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library
from hpcprune.native.pool import pool
from hpcprune.native.survivors import popcount

__all__ = ["FLOATS", "SparseError", "count_survivors", "is_half", "kernels", "multiply", "sample"]

DOES_NOT_FIT = 2  # of Status in kernels/paths.h

MOST = (1 << 31) - 1  # survivors of a layer
FLOATS = (torch.float32, torch.bfloat16)
_KINDS = {(value, x): i + 2 * j for i, value in enumerate(FLOATS) for j, x in enumerate(FLOATS)}  # as kernels have them
_PRODUCTS = [struct.Struct(f"={12 + numbers}q") for numbers in range(6)]  # Product in kernels/product.h


class SparseError(HpcpruneError):
    """Sparse products cannot be had, or their operands do not fit."""


class Kernels(NamedTuple):
    """The compiled library, the number of its path, and the address of the threads' pool."""

    code: ctypes.CDLL
    level: int
    pool: int  # 0: there is none


@lru_cache(maxsize=1)
def kernels() -> Kernels:
    """What a product is called with, asked for once a process: it may take 5 us.

    Raises:
        SparseError: there is no compiled library.
    """
    chosen = library()
    if chosen.code is None:
        raise SparseError(f"sparse products need the compiled kernels: {chosen.reason}")
    return Kernels(chosen.code, chosen.level, pool() or 0)


def is_half(name: str, tensor: Tensor) -> bool:
    """Whether it is bfloat16 and not float32, as kernels want to know; SparseError where it is neither."""
    if tensor.dtype not in FLOATS:
        raise SparseError(f"{name} is {tensor.dtype}; sparse products take float32 and bfloat16")
    return tensor.dtype == torch.bfloat16


def multiply(
    kernel: str,
    matrix: Sequence[int],
    value: Tensor,
    x: Tensor,
    samples: Sequence[int],
    bias: Tensor | None,
    y: Tensor,
    rows: int,
) -> Tensor:
    """y, filled with x W^T + bias by a kernel.

    Args:
        matrix: the kernel's arguments for W beside its weights. value: those as the kernel has them, float32 or
            bfloat16; sums are float32.
        x: float32 or bfloat16, contiguous. samples: how many, and of how many columns.
        bias: [rows], float32. y: contiguous, of x's dtype.

    Raises:
        SparseError: operands do not fit each other, or there is no memory.
    """
    code, level, threads_pool = kernels()
    kind = _KINDS.get((value.dtype, x.dtype))
    if kind is None:
        raise SparseError(f"W is {value.dtype} and x is {x.dtype}; sparse products take float32 and bfloat16")
    value, bias = value.contiguous(), None if bias is None else bias.contiguous()
    status = DOES_NOT_FIT
    if bias is None or bias.numel() == rows:
        operands = _PRODUCTS[len(matrix)].pack(
            level,
            kind,
            value.data_ptr(),
            value.numel(),
            x.data_ptr(),
            *samples,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            torch.get_num_threads(),
            threads_pool,
            *matrix,
        )
        status = getattr(code, kernel)(operands)
    if status:
        _fail(status, x=x, value=value, bias=bias, product=y)
    return y


def sample(kernel: str, matrix: Sequence[int], x: Tensor, gradient: Tensor, survivors: int) -> Tensor:
    """The gradient of the survivors alone, of those of gradient^T x, by a kernel: packed, float32.

    Args:
        matrix: the kernel's arguments for W.
        x: [batch, columns]. gradient: [batch, rows], with respect to the product. Of one dtype, contiguous.

    Raises:
        SparseError: operands do not fit each other, or there is no memory.
    """
    packed = x.new_empty(survivors, dtype=torch.float32)
    code, level, threads_pool = kernels()
    status = DOES_NOT_FIT
    if x.shape[0] == gradient.shape[0] and x.dtype == gradient.dtype:
        status = getattr(code, kernel)(
            level,
            is_half("x", x),
            *matrix,
            *(x.data_ptr(), *x.shape),
            *(gradient.data_ptr(), gradient.shape[1]),
            *(packed.data_ptr(), survivors),
            torch.get_num_threads(),
            threads_pool,
        )
    if status:
        _fail(status, x=x, gradient=gradient, survivors=packed)
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


def _fail(status: int, **operands: Tensor | None) -> NoReturn:
    if status != DOES_NOT_FIT:
        raise SparseError("no memory for the sums of a sparse product; use a smaller batch or fewer threads")
    shapes = ", ".join(f"{name} {[*each.shape]}" for name, each in operands.items() if each is not None)
    raise SparseError(f"{shapes} do not fit each other and the layout: it is to be the one of this very matrix's mask")
