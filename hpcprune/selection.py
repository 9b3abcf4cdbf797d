"""One group of scores that are ranked together, and how far the search for its k-th smallest has come.

A group looks only at this rank's part. What it counts is summed over the ranks by threshold.py, which hands the sums
back and so moves the search of all groups on at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcprune.errors import ThresholdError
from hpcprune.native import threshold
from hpcprune.native.threshold import View, count_around, histogram, to_keys
from hpcprune.scores import FORMATS, Format, Integers, Scores, bits_of, on_host, widen

__all__ = ["Group"]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]

WIDEN_BLOCK = 1 << 18  # scores converted at a time where a group's dtypes differ; a multiple of 8


@dataclass
class Group:
    """What is ranked together: this rank's part of it, and how far the search has come.

    The k-th smallest is one of the `inside` keys (over all ranks) in [lo, hi]; `base` keys lie below lo. `keys` are
    this rank's keys in that range if they were collected. At the end it is `key`, with `ties` keys equal to it, of
    which `own_ties` are this rank's.
    """

    index: int
    parts: list[Scores]
    k: int
    absolute: bool
    total: int = 0  # scores over all ranks
    form: Format = FORMATS[0]
    lo: int = 0
    hi: int = 0
    base: int = 0
    inside: int = 0
    expected: int = 0  # how many scores should lie inside the bracket
    keys: Array | None = None
    settled: bool = False
    key: int = 0
    ties: int = 0
    own_ties: int = 0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(part.size for part in self.parts)

    @classmethod
    def of(cls, index: int, arrays: Sequence[Any], k: int, names: Sequence[str], absolute: bool) -> Group:
        try:
            wanted = operator.index(k)
        except TypeError:
            raise ThresholdError(f"k: {k!r} is not an integer") from None
        if len(names) > 1 and len(names) != len(arrays):
            raise ThresholdError(f"{len(names)} names for {len(arrays)} arrays: give one for each, or one for all")
        parts = []
        for number, array in enumerate(arrays):
            name = names[number if len(names) > 1 else 0] if names else ""
            integers, form = bits_of(array, name or f"array {number}")
            parts.append(Scores(integers, form, name))
        return cls(index, parts, wanted, absolute)

    @property
    def view(self) -> View:
        return View.ABSOLUTE if self.absolute else View.SIGNED

    @property
    def smallest(self) -> int:
        return 0 if self.absolute else -self.form.infinity

    @property
    def cut(self) -> int:
        return self.k - self.base

    def pieces(self) -> Iterator[tuple[list[Integers], list[tuple[int, int]]]]:
        """This rank's scores in the group's format: arrays of one place for one call, and each one's (part, start)."""
        filled = [(number, part) for number, part in enumerate(self.parts) if part.size]
        places = {getattr(part.integers, "device", None) for _, part in filled}
        if len(places) == 1 and all(part.form == self.form for _, part in filled):
            yield [part.integers for _, part in filled], [(number, 0) for number, _ in filled]
            return
        for number, part in filled:
            if part.form == self.form and not isinstance(part.integers, np.ndarray):
                yield [part.integers], [(number, 0)]
                continue
            for start in range(0, part.size, WIDEN_BLOCK):
                piece = on_host(part.integers[start : start + WIDEN_BLOCK])
                yield [widen(piece, part.form, self.form)], [(number, start)]

    def sample(self, wanted: int) -> Array:
        """Keys from `wanted` equal stretches of this rank's scores, at a random but repeatable place in each."""
        ends = np.cumsum([part.size for part in self.parts], dtype=np.int64)
        jitter = np.random.default_rng(wanted).random(wanted) if wanted < self.size else np.zeros(wanted)
        places = ((np.arange(wanted) + jitter) * (self.size / max(wanted, 1))).astype(np.int64).clip(max=self.size - 1)
        found = [np.empty(0, self.form.integer)]
        for part, end in zip(self.parts, ends, strict=True):
            if not part.size:
                continue  # of a format, perhaps, that no score has, and that the group's does not hold
            start = end - part.size
            first, last = np.searchsorted(places, (start, end))
            inside = on_host(part.integers[places[first:last] - start])
            found.append(to_keys(widen(inside, part.form, self.form), self.view))
        return np.concatenate(found)

    def bracket(self, sample: Array, sigmas: float) -> None:
        """Set [lo, hi] so that the k-th smallest almost surely lies in it, if `sigmas` is not small."""
        self.lo = self.hi = self.smallest
        if self.k == 0 or not sample.size:
            return
        sample.sort()
        fraction = (self.k - 0.5) / self.total
        exact = sample.size == self.total
        margin = 0.0 if exact else sigmas * (math.sqrt(fraction * (1 - fraction) * sample.size) + 1)
        centre = fraction * sample.size - 0.5
        low, high = (self.k - 1, self.k - 1) if exact else (math.floor(centre - margin), math.ceil(centre + margin))
        self.lo = int(sample[low]) if low >= 0 else self.smallest
        self.hi = int(sample[high]) if high < sample.size else self.form.infinity
        self.expected = math.ceil(2 * margin / sample.size * self.total)

    def count(self, capacity: int, threads: int | None) -> tuple[list[int], bool]:
        """Count around [lo, hi] and keep the keys strictly inside: below, at lo, between, at hi, and 1 if too many."""
        counts, nan = np.zeros(5, np.int64), False
        kept: list[Array] = [np.empty(0, self.form.integer)]
        for arrays, _ in self.pieces():
            left = capacity - int(counts[2])
            bracket = self.lo, self.hi, self.form.infinity
            found = _passes(arrays).count_around(arrays, self.view, *bracket, max(left, 0), threads)
            dropped = int(found.keys is None)
            counts += (found.below, found.at_lo, found.between, found.at_hi, dropped)
            nan = nan or found.nan
            if found.keys is not None:
                kept.append(found.keys)
        self.keys = kept[1] if len(kept) == 2 else np.concatenate(kept)
        return counts.tolist(), nan

    def place(self, own: Sequence[int], everywhere: Sequence[int]) -> None:
        """Conclude from the counts around the bracket, over all ranks, where the k-th smallest is."""
        below, at_lo, between, at_hi, dropped = everywhere
        through_lo, through_between = below + at_lo, below + at_lo + between
        lo, hi = self.lo, self.hi
        if self.k == 0:
            self._settle(self.smallest - 1, 0, 0, 0)
        elif self.k <= below:
            self._look_in(self.smallest, lo - 1, 0, below)
        elif self.k <= through_lo:
            self._settle(lo, below, at_lo, own[1])
        elif self.k <= through_between:
            kept = None if dropped else self.keys
            self._look_in(lo + 1, hi - 1, through_lo, between)
            self.keys = kept
        elif self.k <= through_between + at_hi:
            self._settle(hi, through_between, at_hi, own[3])
        else:
            through_hi = through_between + at_hi
            self._look_in(hi + 1, self.form.infinity, through_hi, self.total - through_hi)

    def histogram(self, shift: int, bins: int, threads: int | None) -> npt.NDArray[np.int64]:
        """This rank's keys in [lo, hi] by (key - lo) >> shift."""
        if self.keys is not None:
            return histogram([self.keys], View.KEYS, self.lo, self.hi, shift, bins, threads)
        result = np.zeros(bins, np.int64)
        for arrays, _ in self.pieces():
            result += _passes(arrays).histogram(arrays, self.view, self.lo, self.hi, shift, bins, threads)
        return result

    def narrow(self, shift: int, own: npt.NDArray[np.int64], everywhere: npt.NDArray[np.int64]) -> None:
        """Go on in the one bin that holds the k-th smallest."""
        through = self.base + np.cumsum(everywhere)
        number = int(np.searchsorted(through, self.k))
        lo = self.lo + (number << shift)
        hi = min(self.hi, lo + (1 << shift) - 1)
        inside = int(everywhere[number])
        base = int(through[number]) - inside
        if lo == hi:
            self._settle(lo, base, inside, int(own[number]))
            return
        keys = self.keys
        self._look_in(lo, hi, base, inside)
        if keys is not None:
            self.keys = count_around([keys], View.KEYS, lo - 1, hi + 1, self.form.infinity, keys.size).keys

    def collect(self, threads: int | None) -> Array:
        """This rank's keys in [lo, hi]; few enough, as `inside` says."""
        if self.keys is None:
            lo, hi = self.lo, self.hi
            self.lo, self.hi = lo - 1, hi + 1
            self.count(self.inside, threads)
            self.lo, self.hi = lo, hi
        assert self.keys is not None
        return self.keys

    def finish(self, own: Array, everywhere: Array) -> None:
        """Take the k-th smallest from all keys that are left."""
        everywhere.sort()
        key = everywhere[self.k - self.base - 1]
        first, last = np.searchsorted(everywhere, key), np.searchsorted(everywhere, key, side="right")
        self._settle(int(key), self.base + int(first), int(last - first), int(np.count_nonzero(own == key)))

    def _look_in(self, lo: int, hi: int, base: int, inside: int) -> None:
        self.lo, self.hi, self.base, self.inside, self.keys = lo, hi, base, inside, None

    def _settle(self, key: int, base: int, ties: int, own_ties: int) -> None:
        self.key, self.base, self.ties, self.own_ties, self.keys, self.settled = key, base, ties, own_ties, None, True

    def pack(self, cut: int, threads: int | None) -> list[Bits]:
        """This rank's masks, with the first `cut` of this rank's ties gone."""
        masks = [np.zeros((part.size + 7) // 8, np.uint8) for part in self.parts]
        left = -1 if cut >= self.own_ties else cut
        for arrays, places in self.pieces():
            left = _passes(arrays).pack(
                arrays, [masks[number][start // 8 :] for number, start in places], self.view, self.key, left, threads
            )
        return masks


def _passes(arrays: Sequence[Integers]) -> Any:
    """The module that counts over such arrays: numpy's, or tensors on a GPU."""
    if isinstance(arrays[0], np.ndarray):
        return threshold
    from hpcprune.native import cuda_threshold  # imports torch

    return cuda_threshold
