"""The exact k-th smallest score over all ranks, and the masks of what lies above it.

The threshold is found by counting, not by sorting. A small sample of all ranks' scores gives a bracket that almost
surely holds the k-th smallest; one pass counts the scores below the bracket and collects the few inside it; the answer
is then found among those exactly, by histograms that halve and halve again what is left. If the bracket misses, or
more scores lie inside it than may be kept, histograms over the scores themselves take over: slower, and as exact.
A second pass packs the masks. So the scores are read twice, and less than a megabyte travels whatever their number.

Ties at the threshold are cut in global order (rank, then array, then index), so exactly k scores go, and the masks are
the same on any number of ranks. The sample decides only how long it takes, never the answer.
"""

from __future__ import annotations

import hashlib
import math
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpcprune import native
from hpcprune.errors import HpcpruneError, NumericsError
from hpcprune.native import View
from hpcprune.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Threshold", "ThresholdError", "kth_smallest", "select_survivors"]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]

WIDEN_BLOCK = 1 << 18  # scores converted at a time where a group's dtypes differ; a multiple of 8


class ThresholdError(HpcpruneError, ValueError):
    """k, or the arrays of scores, are not usable."""


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest score over all ranks.

    value: the score itself; -inf for k = 0.
    below: how many scores are less than it.
    ties: how many equal it.
    cut: how many of these ties are among the k smallest, k - below; the first ones in global order are.
    """

    value: float
    below: int
    ties: int
    cut: int


@dataclass(frozen=True)
class Limits:
    """What a selection may send and hold: about 600 kB a rank with these values. The answer never depends on them."""

    samples: int = 32768  # scores in the sample, over all ranks and groups
    sigmas: float = 6.0  # half the bracket's width: a wider one is missed less often and holds more to look through
    bins: int = 4096  # bins of a histogram, over all groups
    gathered: int = 16384  # so few scores that are left are gathered and sorted
    spare: int = 65536  # scores that a rank may collect beyond twice the number that is expected inside a bracket


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


def kth_smallest(
    arrays: Sequence[Any],
    k: int,
    comm: World | MPI.Intracomm | None = None,
    *,
    absolute: bool = False,
    names: Sequence[str] | None = None,
    threads: int | None = None,
) -> Threshold:
    """The exact k-th smallest score over all arrays of all ranks. Collective.

    Args:
        arrays: this rank's scores, any number of arrays of any shape, also none. numpy float64, float32, float16;
            (uint16 array, "bfloat16"); torch tensors of these four dtypes. What is not contiguous is copied. Differing
            dtypes are compared exactly, as the narrowest one that holds them all.
        k: counted over all ranks, 0 <= k <= number of scores; the same on every rank.
        comm: the ranks; MPI.COMM_WORLD if None.
        absolute: rank by magnitude, without a copy of the scores.
        names: what to call the arrays in errors, one for each, or one for all.
        threads: of this rank; as many as it has cores if None.

    Raises:
        ThresholdError: k or an array is not usable, or ranks disagree about k. It is a ValueError too.
        NumericsError: a score is NaN; raised on every rank.
    """
    group = [_Group.of(0, arrays, k, names or (), absolute)]
    _find(group, World.of(comm), Limits(), threads)
    return group[0].threshold()


def select_survivors(
    groups: Sequence[Sequence[Any]],
    ks: Sequence[int],
    comm: World | MPI.Intracomm | None = None,
    *,
    absolute: bool = False,
    names: Sequence[Sequence[str]] | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
) -> list[tuple[Threshold, list[Bits]]]:
    """Prune the k smallest scores of each group: its threshold, and for each of this rank's arrays a packed mask.

    Collective; the number of collectives does not grow with the number of groups, and groups that lie on one rank
    send nothing but their result.

    Args:
        groups: for each thing that is ranked by itself (all weights, or one layer), this rank's part of it as for
            `kth_smallest`. Every rank gives as many groups, in the same order.
        ks: how many scores of each group go, over all ranks.
        names: for each group, names of its arrays as for `kth_smallest`.
        limits: for tests.

    Returns:
        for each group its threshold and its masks: uint8, bit i of byte j is score 8 j + i in C order, 1 = survives.

    Raises:
        as `kth_smallest`.
    """
    world, limits = World.of(comm), limits or Limits()
    if len(ks) != len(groups) or (names is not None and len(names) != len(groups)):
        raise ThresholdError(f"{len(groups)} groups, {len(ks)} ks, names {names!r}: give one of each for every group")
    found = [
        _Group.of(index, arrays, k, names[index] if names else (), absolute)
        for index, (arrays, k) in enumerate(zip(groups, ks, strict=True))
    ]
    straddling = _find(found, world, limits, threads)
    cuts = _split_cuts(straddling, world)
    return [(group.threshold(), group.pack(cuts.get(group.index, group.cut), threads)) for group in found]


@dataclass
class _Part:
    """One array: its bits as flat integers, its format, and what to call it."""

    integers: Array
    form: Format
    name: str


@dataclass
class _Group:
    """What is ranked together: this rank's part of it, and how far the search has come.

    The k-th smallest is one of the `inside` keys (over all ranks) in [lo, hi]; `base` keys lie below lo. `keys` are
    this rank's keys in that range if they were collected. At the end it is `key`, with `ties` keys equal to it, of
    which `own_ties` are this rank's.
    """

    index: int
    parts: list[_Part]
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
        self.size = sum(part.integers.size for part in self.parts)

    @classmethod
    def of(cls, index: int, arrays: Sequence[Any], k: int, names: Sequence[str], absolute: bool) -> _Group:
        try:
            wanted = operator.index(k)
        except TypeError:
            raise ThresholdError(f"k: {k!r} is not an integer") from None
        if len(names) > 1 and len(names) != len(arrays):
            raise ThresholdError(f"{len(names)} names for {len(arrays)} arrays: give one for each, or one for all")
        parts = []
        for number, array in enumerate(arrays):
            name = names[number if len(names) > 1 else 0] if names else ""
            integers, form = _bits_of(array, name or f"array {number}")
            parts.append(_Part(integers, form, name))
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

    def threshold(self) -> Threshold:
        if self.k == 0:
            return Threshold(-math.inf, 0, 0, 0)
        return Threshold(_value(self.key, self.form), self.base, self.ties, self.cut)

    def pieces(self) -> Iterator[tuple[list[Array], list[tuple[int, int]]]]:
        """This rank's scores in the group's format: arrays for one call, and each one's (part, start)."""
        filled = [(number, part) for number, part in enumerate(self.parts) if part.integers.size]
        if filled and all(part.form == self.form for _, part in filled):
            yield [part.integers for _, part in filled], [(number, 0) for number, _ in filled]
            return
        for number, part in filled:
            for start in range(0, part.integers.size, WIDEN_BLOCK):
                piece = part.integers[start : start + WIDEN_BLOCK]
                yield [_widen(piece, part.form, self.form)], [(number, start)]

    def sample(self, wanted: int) -> Array:
        """Keys from `wanted` equal stretches of this rank's scores, at a random but repeatable place in each."""
        ends = np.cumsum([part.integers.size for part in self.parts], dtype=np.int64)
        jitter = np.random.default_rng(wanted).random(wanted) if wanted < self.size else np.zeros(wanted)
        places = ((np.arange(wanted) + jitter) * (self.size / max(wanted, 1))).astype(np.int64).clip(max=self.size - 1)
        found = [np.empty(0, self.form.integer)]
        for part, end in zip(self.parts, ends, strict=True):
            start = end - part.integers.size
            first, last = np.searchsorted(places, (start, end))
            inside = part.integers[places[first:last] - start]
            found.append(native.to_keys(_widen(inside, part.form, self.form), self.view))
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
            found = native.count_around(arrays, self.view, self.lo, self.hi, self.form.infinity, max(left, 0), threads)
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
            return native.histogram([self.keys], View.KEYS, self.lo, self.hi, shift, bins, threads)
        result = np.zeros(bins, np.int64)
        for arrays, _ in self.pieces():
            result += native.histogram(arrays, self.view, self.lo, self.hi, shift, bins, threads)
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
            self.keys = native.count_around([keys], View.KEYS, lo - 1, hi + 1, self.form.infinity, keys.size).keys

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
        masks = [np.zeros((part.integers.size + 7) // 8, np.uint8) for part in self.parts]
        left = -1 if cut >= self.own_ties else cut
        for arrays, places in self.pieces():
            left = native.pack(
                arrays, [masks[number][start // 8 :] for number, start in places], self.view, self.key, left, threads
            )
        return masks


def _find(groups: Sequence[_Group], world: World, limits: Limits, threads: int | None) -> list[_Group]:
    """Settle every group on every rank; gives those that lie on several ranks."""
    _agree_on_ks(groups, world)
    present = np.zeros((len(groups), 1 + len(FORMATS)), np.int64)
    for row, group in zip(present, groups, strict=True):
        row[0] = group.size > 0
        for part in group.parts:
            row[1 + FORMATS.index(part.form)] += part.integers.size
    present = world.allreduce(present, "threshold: sizes")
    for row, group in zip(present, groups, strict=True):
        group.total = int(row[1:].sum())
        group.form = _widest([form for form, size in zip(FORMATS, row[1:], strict=True) if size])
        if not 0 <= group.k <= group.total:
            raise ThresholdError(f"k: {group.k} is not in 0 ... {group.total}, the number of scores over all ranks")
    holders = present[:, 0]
    straddling = [group for group, count in zip(groups, holders, strict=True) if count > 1]
    local = [group for group, count in zip(groups, holders, strict=True) if count == 1 and group.size]
    for group in groups:
        if not group.total:
            group.place([0] * 5, [0] * 5)

    alone, nan = World.alone(), False
    for group in local:
        nan = not _solve([group], alone, limits, threads, False) or nan
    if not _solve(straddling, world, limits, threads, nan):
        _raise_nan(groups, world)
    if world.size > 1:
        _share_settled(groups, local, world)
    return straddling


def _agree_on_ks(groups: Sequence[_Group], world: World) -> None:
    given = [group.k for group in groups], [group.absolute for group in groups]
    digest = int.from_bytes(hashlib.sha256(repr(given).encode()).digest()[:7], "big")
    highest, lowest = world.allreduce(np.array([digest, -digest], np.int64), "threshold: agreement on k", op="max")
    if highest == -lowest:
        return
    everyone = world.allgather((len(groups), given[0][:4]), "threshold: what each rank was given")
    told = "; ".join(f"rank {rank}: {count} groups, k = {ks}" for rank, (count, ks) in enumerate(everyone[:4]))
    raise ThresholdError(f"ranks disagree about k, absolute or the number of groups ({told}): give all the same")


def _solve(groups: Sequence[_Group], world: World, limits: Limits, threads: int | None, nan: bool) -> bool:
    """Settle groups over the ranks of a world, all at once; False if there was a NaN, here or elsewhere."""
    if groups:
        _sample(groups, world, limits)
    own = np.zeros((len(groups) + 1, 5), np.int64)
    for row, group in zip(own, groups, strict=False):
        row[:], found_nan = group.count(min(group.size, 2 * group.expected + limits.spare), threads)
        nan = nan or found_nan
    own[-1, 0] = nan
    everywhere = world.allreduce(own, "threshold: counts")
    if everywhere[-1, 0]:
        return False
    for group, mine, alls in zip(groups, own.tolist(), everywhere.tolist(), strict=False):
        group.place(mine, alls)
    few = limits.gathered // max(1, len(groups))
    while wide := [group for group in groups if not group.settled and group.inside > few]:
        _narrow(wide, world, limits, threads)
    rest = [group for group in groups if not group.settled]
    if rest:
        left = [group.collect(threads) for group in rest]
        for group, keys, alls in zip(rest, left, _gather_keys(left, rest, world, "threshold: last keys"), strict=True):
            group.finish(keys, alls)
    return True


def _sample(groups: Sequence[_Group], world: World, limits: Limits) -> None:
    samples = []
    for group in groups:
        wanted = min(limits.samples // len(groups), int(group.total ** (2 / 3)) + 64)
        if group.k == 0:
            wanted = 0
        samples.append(group.sample(min(group.size, math.ceil(wanted * group.size / max(1, group.total)))))
    for group, sample in zip(groups, _gather_keys(samples, groups, world, "threshold: sample"), strict=True):
        group.bracket(sample, limits.sigmas)


def _narrow(groups: Sequence[_Group], world: World, limits: Limits, threads: int | None) -> None:
    """One round of histograms: each group goes on in one of its bins."""
    digits = max(2, int(math.log2(limits.bins / len(groups)))) if limits.bins > len(groups) else 2
    shifts = [max(0, (group.hi - group.lo).bit_length() - digits) for group in groups]
    mine = np.stack([group.histogram(shift, 1 << digits, threads) for group, shift in zip(groups, shifts, strict=True)])
    everywhere = world.allreduce(mine, "threshold: histograms")
    for group, shift, own, alls in zip(groups, shifts, mine, everywhere, strict=True):
        group.narrow(shift, own, alls)


def _gather_keys(keys: Sequence[Array], groups: Sequence[_Group], world: World, what: str) -> list[Array]:
    """Each group's keys from all ranks, in one collective: how many for each group come first, then the keys."""
    wide = any(group.form.name == "float64" for group in groups)
    dtype = np.int64 if wide else np.int32
    sizes = np.array([array.size for array in keys], dtype)
    received = world.gather_arrays(np.concatenate([sizes, *keys]).astype(dtype, copy=False), what)
    split = [np.split(array[len(keys) :], np.cumsum(array[: len(keys)])[:-1]) for array in received]
    return [np.concatenate([from_rank[number] for from_rank in split]) for number in range(len(keys))]


def _share_settled(groups: Sequence[_Group], local: Sequence[_Group], world: World) -> None:
    """Tell all ranks what a rank has found alone."""
    rows = [(group.index, group.key, group.base, group.ties) for group in local]
    told = world.gather_arrays(np.array(rows, np.int64).reshape(-1), "threshold: results")
    own = {group.index for group in local}
    for index, key, base, ties in np.concatenate(told).reshape(-1, 4).tolist():
        if index not in own:
            groups[index].key, groups[index].base, groups[index].ties = key, base, ties


def _split_cuts(straddling: Sequence[_Group], world: World) -> dict[int, int]:
    """How many of its own ties this rank cuts, for groups on several ranks keeping some ties. Lower ranks go first."""
    partial = {group.index: group for group in straddling if 0 < group.cut < group.ties}
    if not partial:
        return {}
    rows = [(index, group.own_ties) for index, group in partial.items() if group.own_ties]
    told = world.gather_arrays(np.array(rows, np.int64).reshape(-1), "threshold: ties of each rank")
    before = np.concatenate([np.empty(0, np.int64), *told[: world.rank]]).reshape(-1, 2)
    return {index: max(0, group.cut - int(before[before[:, 0] == index, 1].sum())) for index, group in partial.items()}


def _raise_nan(groups: Sequence[_Group], world: World) -> None:
    mine = []
    for group in groups:
        for number, part in enumerate(group.parts):
            where = f" of rank {world.rank}" if world.size > 1 else ""
            name = part.name or f"array {number}" + (f" of group {group.index}" if len(groups) > 1 else "") + where
            mine.append((name, _count_nan(part), part.integers.size))
    found: dict[str, tuple[int, int]] = {}
    for name, nans, size in (row for rows in world.allgather(mine, "threshold: NaN") for row in rows):
        before = found.get(name, (0, 0))
        found[name] = before[0] + nans, before[1] + size
    bad = [f"{name}: {nans} of {size} scores are NaN" for name, (nans, size) in found.items() if nans]
    more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
    raise NumericsError(
        f"{bad[0]}{more}; such weights cannot be ranked: train again with a lower learning rate, or load other weights"
    )


def _count_nan(part: _Part) -> int:
    largest = np.iinfo(part.integers.dtype).max
    return sum(
        int(np.count_nonzero(part.integers[start : start + native.BLOCK] & largest > part.form.infinity))
        for start in range(0, part.integers.size, native.BLOCK)
    )


def _bits_of(array: Any, name: str) -> tuple[Array, Format]:
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


def _widest(forms: Sequence[Format]) -> Format:
    """The narrowest format that holds all of some formats exactly."""
    if len(forms) == 1:
        return forms[0]
    return BY_NAME["float64" if not forms or BY_NAME["float64"] in forms else "float32"]


def _widen(integers: Array, form: Format, wide: Format) -> Array:
    """The bits of floats in a wider format."""
    if form == wide:
        return integers
    if form.name == "bfloat16":
        floats: Array = (integers.astype(np.int32) << 16).view(np.float32)
    else:
        floats = integers.view(form.name)
    with np.errstate(invalid="ignore"):  # a signalling NaN is counted later, not warned of here
        return floats.astype(wide.name).view(wide.integer)


def _value(key: int, form: Format) -> float:
    magnitude = np.array([abs(key)], form.integer)
    wide = _widen(magnitude, form, BY_NAME["float64"]).view(np.float64)
    return math.copysign(float(wide[0]), key) if key else 0.0
