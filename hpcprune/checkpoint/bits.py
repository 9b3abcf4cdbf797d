"""Packed masks cut and joined at any weight, and the counts that a file states and its reader holds it to.

Bit i of byte j is weight 8 j + i; the bits after the last weight are 0.
"""

from __future__ import annotations

import numpy as np

from hpcprune.checkpoint.format import Array, Bits, mask_bytes

__all__ = ["cut_bits", "join_bits", "padding_clear", "popcount", "tally"]

SLICE = 1 << 18  # elements that are looked at a time, so that what numpy makes on the way stays in the cache

_EXPONENT = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def popcount(bits: Bits) -> int:
    """How many bits are 1."""
    return sum(int(_ONES[bits[at : at + SLICE]].sum(dtype=np.int64)) for at in range(0, bits.size, SLICE))


def padding_clear(bits: Bits, weights: int) -> bool:
    """Whether the bits after the last of `weights` weights are 0."""
    return weights % 8 == 0 or int(bits[-1]) >> (weights % 8) == 0


def cut_bits(bits: Bits, start: int, stop: int) -> Bits:
    """The bits of the weights [start, stop), packed anew from bit 0; a view where no bit has to move."""
    size, shift, first = mask_bytes(stop - start), start % 8, start // 8
    if shift == 0 and stop % 8 == 0:
        return bits[first : first + size]
    piece: Bits = bits[first : first + size] >> np.uint8(shift)
    if shift:
        after = bits[first + 1 : first + 1 + size]
        piece[: after.size] |= after << np.uint8(8 - shift)
    if (stop - start) % 8:
        piece[-1] &= (1 << ((stop - start) % 8)) - 1
    return piece


def join_bits(bits: Bits, start: int, piece: Bits) -> None:
    """Set the bits of `piece` in `bits` from weight `start` on; undoes `cut_bits` where `bits` is 0."""
    shift, first = start % 8, start // 8
    bits[first : first + piece.size] |= piece << np.uint8(shift)
    if shift:
        after = bits[first + 1 : first + 1 + piece.size]
        after |= piece[: after.size] >> np.uint8(8 - shift)


def tally(values: Array, dtype: str) -> tuple[int, int]:
    """How many elements are not zero (both zeros count as zero), and how many are NaN or infinite."""
    nonzeros = nonfinite = 0
    half = _EXPONENT.get(dtype)
    flat = values.reshape(-1)
    for at in range(0, flat.size, SLICE):
        part = flat[at : at + SLICE]
        if half is not None:
            part = part.view(np.uint16)
            nonfinite += int(np.count_nonzero((part & half) == half))
            nonzeros += int(np.count_nonzero(part & np.uint16(0x7FFF)))
        else:
            if part.dtype.kind == "f":
                nonfinite += part.size - int(np.count_nonzero(np.isfinite(part)))
            nonzeros += int(np.count_nonzero(part != 0))
    return nonzeros, nonfinite
