"""The compiled library as sparse products use it: found once, its dtypes, its errors."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library

__all__ = ["FLOATS", "SparseError", "done", "kernels", "kind"]

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


def kind(value: Tensor, x: Tensor) -> int:
    """The kernels' number for the dtypes of weights and samples."""
    return (value.dtype == torch.bfloat16) + 2 * (x.dtype == torch.bfloat16)


def done(status: int) -> None:
    """Raise SparseError where a kernel found no memory."""
    if status:
        raise SparseError("no memory for the sums of a sparse product; use a smaller batch or fewer threads")
