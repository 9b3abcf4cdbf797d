"""Scores as integers: the bits of an array of floats, which compare as the floats do and cost no copy.

Of numpy and torch, in four formats; where formats differ, all are taken in the narrowest that holds them all exactly.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hpcprune.errors import ThresholdError
from hpcprune.native.library import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "Format", "Integers", "Scores", "bits_of", "on_host", "value_of", "widen", "widest"]

Array = npt.NDArray[Any]
Integers: TypeAlias = "Array | Tensor"


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
    """One array: its bits as flat integers, on the GPU that it is on or the host, its format, and what to call it."""

    integers: Integers
    form: Format
    name: str

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.integers.shape[0])

    def count_nan(self) -> int:
        """How many of them are NaN."""
        largest = np.iinfo(self.form.integer).max
        return sum(
            int((self.integers[start : start + BLOCK] & largest > self.form.infinity).sum())
            for start in range(0, self.size, BLOCK)
        )


def on_host(integers: Integers) -> Array:
    """The same integers as an array of numpy's."""
    return integers if isinstance(integers, np.ndarray) else integers.cpu().numpy()


def bits_of(array: Any, name: str) -> tuple[Integers, Format]:
    """An array's storage as flat integers, without a copy if it is contiguous; and its format.

    A tensor stays on its GPU where there are kernels that can count there.
    """
    dtype, kind = "", type(array).__name__
    if isinstance(array, tuple) and len(array) == 2:
        array, dtype = array
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        from hpcprune.native.cuda_threshold import integers_there  # imports torch, which scores alone do not need

        dtype = str(array.dtype).removeprefix("torch.")
        there = integers_there(array) if dtype in BY_NAME else None
        if there is not None:
            return there, BY_NAME[dtype]
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
