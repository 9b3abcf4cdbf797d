"""Survivors by mask bits: taken out of an array, put back into one, counted.

`bits` are packed masks: bit i of byte j is element 8 j + i, 1 = survives, padding bits 0. A large array may be taken in
pieces that start at multiples of 8. kernels/survivors does it where there is a compiled library, numpy elsewhere, with
the same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import BLOCK, library, threads_or_default

__all__ = ["MaskError", "gather", "popcount", "scatter", "update"]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]


class MaskError(HpcpruneError, ValueError):
    """Mask bits do not fit the values they are meant for."""


def popcount(bits: Bits) -> int:
    """How many bits are 1 in a uint8 array."""
    bits = _as_bits(bits)
    code = library().code
    if code is not None:
        return int(code.hpcprune_popcount(bits.ctypes.data, bits.size))
    table = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
    return sum(int(table[bits[i : i + BLOCK]].sum(dtype=np.int64)) for i in range(0, bits.size, BLOCK))


def gather(values: Array, bits: Bits, threads: int | None = None, out: Array | None = None) -> Array:
    """The elements of `values` whose bit is 1, in order.

    Args:
        values: 1-D, elements of 2, 4 or 8 bytes of any dtype (bfloat16 as uint16).
        bits: uint8, ceil(len(values) / 8) bytes.
        threads: as many as this process has cores if None.
        out: where they go, instead of a new array: 1-D, contiguous, of the same dtype, popcount(bits) long.

    Returns:
        `out`, or a new 1-D array of the same dtype, popcount(bits) long.

    Raises:
        MaskError: lengths or dtypes disagree, or a padding bit is 1.
    """
    values = _as_elements(np.ascontiguousarray(values))
    bits = _check_bits(bits, values.size)
    ones = popcount(bits)
    result = np.empty(ones, values.dtype) if out is None else out
    if result.dtype != values.dtype or result.shape != (ones,) or not result.flags.c_contiguous:
        raise MaskError(f"out is {result.dtype} of shape {result.shape}: {values.dtype} of shape ({ones},) is needed")
    chosen = library()
    if chosen.code is not None:
        chosen.code.hpcprune_gather(
            chosen.level,
            values.itemsize,
            values.ctypes.data,
            values.size,
            bits.ctypes.data,
            result.ctypes.data,
            threads_or_default(threads),
        )
        return result
    done = 0
    for start, stop, kept in _blocks(bits, values.size):
        here = values[start:stop][kept]
        result[done : done + here.size] = here
        done += here.size
    return result


def scatter(survivors: Array, bits: Bits, count: int, threads: int | None = None) -> Array:
    """The opposite of `gather`: `count` elements, the survivors where the bit is 1, in order, and zero elsewhere.

    Args:
        survivors: 1-D, popcount(bits) elements of 2, 4 or 8 bytes of any dtype.
        bits: uint8, ceil(count / 8) bytes.
        count: the length of the dense array.
        threads: as many as this process has cores if None.

    Returns:
        a new 1-D array of the survivors' dtype, `count` long.

    Raises:
        MaskError: lengths or counts disagree, or a padding bit is 1.
    """
    survivors = _as_elements(np.ascontiguousarray(survivors))
    dense = np.empty(count, survivors.dtype)
    if not _put("scatter", dense, bits, survivors, threads):
        for start, stop, kept, here in _with_survivors(bits, survivors, count):
            dense[start:stop] = 0
            dense[start:stop][kept] = here
    return dense


def update(dense: Array, bits: Bits, survivors: Array, threads: int | None = None) -> None:
    """Write the survivors into a dense array, in place, where the bit is 1; the other elements are not touched.

    Args:
        dense: 1-D, contiguous, writeable, elements of 2, 4 or 8 bytes of any dtype.
        bits: uint8, ceil(len(dense) / 8) bytes.
        survivors: 1-D, popcount(bits) elements of the same dtype.
        threads: as many as this process has cores if None.

    Raises:
        MaskError: lengths, counts or dtypes disagree, or a padding bit is 1.
    """
    _check_in_place(dense)
    survivors = _as_elements(np.ascontiguousarray(survivors))
    if survivors.dtype != dense.dtype:
        raise MaskError(f"survivors of {survivors.dtype} cannot be written into an array of {dense.dtype}")
    if not _put("update", _as_elements(dense), bits, survivors, threads):
        for start, stop, kept, here in _with_survivors(bits, survivors, dense.size):
            dense[start:stop][kept] = here


def _put(function: str, dense: Array, bits: Bits, survivors: Array, threads: int | None) -> bool:
    """Check, and call a kernel that writes survivors into `dense`; False if there is no compiled library."""
    bits = _check_bits(bits, dense.size)
    ones = popcount(bits)
    if ones != survivors.size:
        raise MaskError(f"{survivors.size} survivors for a mask with {ones} bits set: they must be as many")
    chosen = library()
    if chosen.code is None:
        return False
    arrays = (dense.ctypes.data, dense.size, bits.ctypes.data, survivors.ctypes.data)
    kernel = getattr(chosen.code, f"hpcprune_{function}")
    kernel(chosen.level, dense.itemsize, *arrays, threads_or_default(threads))
    return True


def _with_survivors(
    bits: Bits, survivors: Array, count: int
) -> Iterator[tuple[int, int, npt.NDArray[np.bool_], Array]]:
    """The blocks of a mask, each with the survivors that belong into it."""
    done = 0
    for start, stop, kept in _blocks(bits, count):
        here = int(np.count_nonzero(kept))
        yield start, stop, kept, survivors[done : done + here]
        done += here


def _blocks(bits: Bits, count: int) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    for start in range(0, count, BLOCK):
        stop = min(count, start + BLOCK)
        ones = np.unpackbits(bits[start // 8 : (stop + 7) // 8], count=stop - start, bitorder="little")
        yield start, stop, ones.view(np.bool_)


def _check_in_place(array: Array) -> None:
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise MaskError("values that are not contiguous or not writeable cannot be changed in place: pass a copy")


def _as_elements(array: Array) -> Array:
    if array.ndim != 1 or array.itemsize not in (2, 4, 8):
        raise MaskError(f"shape {array.shape} of {array.dtype}: a 1-D array of 2, 4 or 8 bytes an element is needed")
    return array


def _as_bits(bits: Bits) -> Bits:
    if bits.dtype != np.uint8 or bits.ndim != 1:
        raise MaskError(f"mask of shape {bits.shape} and {bits.dtype}: packed bits are a 1-D uint8 array")
    return np.ascontiguousarray(bits)


def _check_bits(bits: Bits, count: int) -> Bits:
    bits = _as_bits(bits)
    if bits.size != (count + 7) // 8:
        raise MaskError(f"{bits.size} bytes of mask for {count} elements: {(count + 7) // 8} are needed")
    if count % 8 and bits[-1] >> count % 8:
        raise MaskError(f"mask for {count} elements has bits set beyond the last one: they must be 0")
    return bits
