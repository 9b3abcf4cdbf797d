"""Scores as integers: the bits of an array of floats, which compare as the floats do and cost no copy.

Of numpy and torch, in four formats; where formats differ, all are taken in the narrowest that holds them all exactly.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcprune.errors import ThresholdError
from hpcprune.native.library import BLOCK

__all__ = ["FORMATS", "Format", "Scores", "bits_of", "value_of", "widen", "widest"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Format:
    """How a float dtype is stored: as which integer, and the bits of its infinity."""

    name: str
    integer: npt.DTypeLike
    infinity: int


FORMATS = (
    Format("float64", np.int64, 0x7FF << 52),
    Format("float32", np.int32, 0xFF << 23),
    Format("float16", np.int16, 0x1F << 10),
    Format("bfloat16", np.int16, 0xFF << 7),
)
BY_NAME = {form.name: form for form in FORMATS}


@dataclass
class Scores:
    """One array: its bits as flat integers, its format, and what to call it."""

    integers: Array
    form: Format
    name: str

    def count_nan(self) -> int:
        """How many of them are NaN."""
        largest = np.iinfo(self.integers.dtype).max
        return sum(
            int(np.count_nonzero(self.integers[start : start + BLOCK] & largest > self.form.infinity))
            for start in range(0, self.integers.size, BLOCK)
        )


def bits_of(array: Any, name: str) -> tuple[Array, Format]:
    """An array's storage as flat integers, without a copy if it is contiguous; and its format."""
    dtype, kind = "", type(array).__name__
    if isinstance(array, tuple) and len(array) == 2:
        array, dtype = array
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        dtype = str(array.dtype).removeprefix("torch.")
        array = array.detach().cpu().contiguous()
        array = (array.view(torch.int16) if dtype == "bfloat16" else array).numpy()
    if isinstance(array, np.ndarray):
        dtype = dtype or array.dtype.name
        stored = np.dtype(np.uint16 if dtype == "bfloat16" else dtype) if dtype in BY_NAME else None
        if stored is not None and (array.dtype == stored or (dtype == "bfloat16" and array.dtype == np.int16)):
            return np.ascontiguousarray(array).reshape(-1).view(BY_NAME[dtype].integer), BY_NAME[dtype]
    raise ThresholdError(
        f"{name}: {kind} of {dtype or getattr(array, 'dtype', 'no dtype')} cannot be ranked; give "
        f'numpy arrays or tensors of {", ".join(BY_NAME)}, or (uint16 array, "bfloat16")'
    )


def widest(forms: Sequence[Format]) -> Format:
    """The narrowest format that holds all of some formats exactly."""
    if len(forms) == 1:
        return forms[0]
    return BY_NAME["float64" if not forms or BY_NAME["float64"] in forms else "float32"]


def widen(integers: Array, form: Format, wide: Format) -> Array:
    """The bits of floats in a wider format."""
    if form == wide:
        return integers
    if form.name == "bfloat16":
        floats: Array = (integers.astype(np.int32) << 16).view(np.float32)
    else:
        floats = integers.view(form.name)
    with np.errstate(invalid="ignore"):  # a signalling NaN is counted later, not warned of here
        return floats.astype(wide.name).view(wide.integer)


def value_of(key: int, form: Format) -> float:
    """The score that a key stands for."""
    magnitude = np.array([abs(key)], form.integer)
    wide = widen(magnitude, form, BY_NAME["float64"]).view(np.float64)
    return math.copysign(float(wide[0]), key) if key else 0.0
