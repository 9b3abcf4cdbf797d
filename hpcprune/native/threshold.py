"""Counting over scores, and the masks that follow: the passes of the exact k-th smallest score.

`parts` are flat arrays of one signed integer dtype: the bits of floats, or keys made of them. kernels/threshold does it
where there is a compiled library, numpy elsewhere, with the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcprune.native.library import BLOCK, library, threads_or_default

__all__ = ["Around", "View", "count_around", "histogram", "pack", "to_keys"]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]


class View(IntEnum):
    """What the integers of an array stand for, which says how they become keys that are ordered as the scores are."""

    SIGNED = 0  # the bits of floats, ranked by value
    ABSOLUTE = 1  # the bits of floats, ranked by magnitude
    KEYS = 2  # keys already


@dataclass(frozen=True)
class Around:
    """How many keys lie around a bracket, and those strictly inside it (None if they were more than allowed).

    If `nan`, there is a NaN among the scores and the rest means nothing.
    """

    below: int
    at_lo: int
    between: int
    at_hi: int
    nan: bool
    keys: Array | None


def to_keys(integers: Array, view: View) -> Array:
    """Integers that are ordered as the scores are: -0 equals +0, a NaN's magnitude lies above infinity's."""
    if view == View.KEYS:
        return integers
    magnitude = integers & np.iinfo(integers.dtype).max
    return magnitude if view == View.ABSOLUTE else np.where(integers < 0, -magnitude, magnitude)


def count_around(
    parts: Sequence[Array], view: View, lo: int, hi: int, infinity: int, capacity: int, threads: int | None = None
) -> Around:
    """Count keys below `lo`, at it, between and at `hi`; collect up to `capacity` of those between, in any order.

    Keys at the two ends are counted and not collected, so that ties there cost nothing. `infinity` is the largest
    magnitude that is not NaN.
    """
    dtype = parts[0].dtype if parts else np.dtype(np.int64)
    chosen = library()
    if chosen.code is not None:
        counts, keys = np.zeros(5, np.int64), np.empty(capacity, dtype)
        arrays = _Arrays(parts)
        bracket = (lo, hi, infinity, keys.ctypes.data, capacity, counts.ctypes.data)
        chosen.code.hpcprune_count_around(
            chosen.level, 8 * dtype.itemsize, view, *arrays.arguments, *bracket, threads_or_default(threads)
        )
        below, at_lo, between, at_hi, nan = counts.tolist()
        return Around(below, at_lo, between, at_hi, bool(nan), keys[:between] if between <= capacity else None)
    below = at_lo = between = at_hi = 0
    nan = False
    found: list[Array] = []
    for block in _in_blocks(parts):
        keys = to_keys(block, view)
        if view != View.KEYS:
            nan = nan or bool(((keys > infinity) | (keys < -infinity)).any())
        inside = keys[(keys > lo) & (keys < hi)]
        below += int(np.count_nonzero(keys < lo))
        at_lo += int(np.count_nonzero(keys == lo))
        at_hi += int(np.count_nonzero(keys == hi)) if hi != lo else 0
        between += inside.size
        if between <= capacity:
            found.append(inside)
    collected = np.concatenate([np.empty(0, dtype), *found]) if between <= capacity else None
    return Around(below, at_lo, between, at_hi, nan, collected)


def histogram(
    parts: Sequence[Array], view: View, lo: int, hi: int, shift: int, bins: int, threads: int | None = None
) -> npt.NDArray[np.int64]:
    """How many keys with lo <= key <= hi lie in each bin (key - lo) >> shift, of which there must be enough."""
    result = np.zeros(bins, np.int64)
    code = library().code
    if code is not None and parts:
        arrays = _Arrays(parts)
        place = (lo, hi, shift, bins, result.ctypes.data)
        code.hpcprune_histogram(8 * parts[0].itemsize, view, *arrays.arguments, *place, threads_or_default(threads))
        return result
    for block in _in_blocks(parts):
        keys = to_keys(block, view)
        inside = keys[(keys >= lo) & (keys <= hi)].astype(np.int64)
        # The difference of two 64-bit keys needs all 64 bits, so it is taken without a sign.
        distance = inside.view(np.uint64) - np.uint64(lo % (1 << 64))
        result += np.bincount((distance >> np.uint64(shift)).astype(np.int64), minlength=bins)
    return result


def pack(
    parts: Sequence[Array],
    masks: Sequence[Bits],
    view: View,
    threshold: int,
    cut: int,
    threads: int | None = None,
) -> int:
    """Write each part's mask: a bit is 1 where the key is above the threshold, or a tie after the first `cut` ties.

    Args:
        masks: ceil(size / 8) bytes for each part, contiguous; every byte is written.
        cut: counted over the parts in order; negative cuts every tie.

    Returns:
        how much of `cut` is left, for the parts that come next.
    """
    chosen = library()
    if chosen.code is not None and parts:
        arrays = _Arrays(parts)
        targets = np.array([mask.ctypes.data for mask in masks], np.uintp)
        place = (threshold, cut, targets.ctypes.data)
        return int(
            chosen.code.hpcprune_pack(
                chosen.level, 8 * parts[0].itemsize, view, *arrays.arguments, *place, threads_or_default(threads)
            )
        )
    for part, mask in zip(parts, masks, strict=True):
        for start in range(0, part.size, BLOCK):
            keys = to_keys(part[start : start + BLOCK], view)
            survives = keys > threshold
            if cut >= 0:
                ties = keys == threshold
                if cut > 0:
                    first = np.flatnonzero(ties)[:cut]
                    ties[first] = False
                    cut -= first.size
                survives |= ties
            mask[start // 8 : (start + BLOCK) // 8] = np.packbits(survives, bitorder="little")
    return cut


class _Arrays:
    """Arrays as the kernels take them: addresses, lengths, how many. Lives as long as the call that it is passed to."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self._addresses = np.array([part.ctypes.data for part in parts], np.uintp)
        self._lengths = np.array([part.size for part in parts], np.int64)
        self.arguments = (self._addresses.ctypes.data, self._lengths.ctypes.data, len(parts))


def _in_blocks(parts: Sequence[Array]) -> Iterator[Array]:
    for part in parts:
        for start in range(0, part.size, BLOCK):
            yield part[start : start + BLOCK]
