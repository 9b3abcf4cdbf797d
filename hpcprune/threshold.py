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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from hpcprune.errors import NumericsError, ThresholdError
from hpcprune.scores import FORMATS, value_of, widest
from hpcprune.selection import Group
from hpcprune.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Limits", "Threshold", "ThresholdError", "kth_smallest", "select_survivors"]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]


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
    group = [Group.of(0, arrays, k, names or (), absolute)]
    _find(group, World.of(comm), Limits(), threads)
    return _result(group[0])


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
        Group.of(index, arrays, k, names[index] if names else (), absolute)
        for index, (arrays, k) in enumerate(zip(groups, ks, strict=True))
    ]
    straddling = _find(found, world, limits, threads)
    cuts = _split_cuts(straddling, world)
    return [(_result(group), group.pack(cuts.get(group.index, group.cut), threads)) for group in found]


def _result(group: Group) -> Threshold:
    if group.k == 0:
        return Threshold(-math.inf, 0, 0, 0)
    return Threshold(value_of(group.key, group.form), group.base, group.ties, group.cut)


def _find(groups: Sequence[Group], world: World, limits: Limits, threads: int | None) -> list[Group]:
    """Settle every group on every rank; gives those that lie on several ranks."""
    _agree_on_ks(groups, world)
    present = np.zeros((len(groups), 1 + len(FORMATS)), np.int64)
    for row, group in zip(present, groups, strict=True):
        row[0] = group.size > 0
        for part in group.parts:
            row[1 + FORMATS.index(part.form)] += part.size
    present = world.allreduce(present, "threshold: sizes")
    for row, group in zip(present, groups, strict=True):
        group.total = int(row[1:].sum())
        group.form = widest([form for form, size in zip(FORMATS, row[1:], strict=True) if size])
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


def _agree_on_ks(groups: Sequence[Group], world: World) -> None:
    given = [group.k for group in groups], [group.absolute for group in groups]
    digest = int.from_bytes(hashlib.sha256(repr(given).encode()).digest()[:7], "big")
    highest, lowest = world.allreduce(np.array([digest, -digest], np.int64), "threshold: agreement on k", op="max")
    if highest == -lowest:
        return
    everyone = world.allgather((len(groups), given[0][:4]), "threshold: what each rank was given")
    told = "; ".join(f"rank {rank}: {count} groups, k = {ks}" for rank, (count, ks) in enumerate(everyone[:4]))
    raise ThresholdError(f"ranks disagree about k, absolute or the number of groups ({told}): give all the same")


def _solve(groups: Sequence[Group], world: World, limits: Limits, threads: int | None, nan: bool) -> bool:
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


def _sample(groups: Sequence[Group], world: World, limits: Limits) -> None:
    samples = []
    for group in groups:
        wanted = min(limits.samples // len(groups), int(group.total ** (2 / 3)) + 64)
        if group.k == 0:
            wanted = 0
        samples.append(group.sample(min(group.size, math.ceil(wanted * group.size / max(1, group.total)))))
    for group, sample in zip(groups, _gather_keys(samples, groups, world, "threshold: sample"), strict=True):
        group.bracket(sample, limits.sigmas)


def _narrow(groups: Sequence[Group], world: World, limits: Limits, threads: int | None) -> None:
    """One round of histograms: each group goes on in one of its bins."""
    digits = max(2, int(math.log2(limits.bins / len(groups)))) if limits.bins > len(groups) else 2
    shifts = [max(0, (group.hi - group.lo).bit_length() - digits) for group in groups]
    mine = np.stack([group.histogram(shift, 1 << digits, threads) for group, shift in zip(groups, shifts, strict=True)])
    everywhere = world.allreduce(mine, "threshold: histograms")
    for group, shift, own, alls in zip(groups, shifts, mine, everywhere, strict=True):
        group.narrow(shift, own, alls)


def _gather_keys(keys: Sequence[Array], groups: Sequence[Group], world: World, what: str) -> list[Array]:
    """Each group's keys from all ranks, in one collective: how many for each group come first, then the keys."""
    wide = any(group.form.name == "float64" for group in groups)
    dtype = np.int64 if wide else np.int32
    sizes = np.array([array.size for array in keys], dtype)
    received = world.gather_arrays(np.concatenate([sizes, *keys]).astype(dtype, copy=False), what)
    split = [np.split(array[len(keys) :], np.cumsum(array[: len(keys)])[:-1]) for array in received]
    return [np.concatenate([from_rank[number] for from_rank in split]) for number in range(len(keys))]


def _share_settled(groups: Sequence[Group], local: Sequence[Group], world: World) -> None:
    """Tell all ranks what a rank has found alone."""
    rows = [(group.index, group.key, group.base, group.ties) for group in local]
    told = world.gather_arrays(np.array(rows, np.int64).reshape(-1), "threshold: results")
    own = {group.index for group in local}
    for index, key, base, ties in np.concatenate(told).reshape(-1, 4).tolist():
        if index not in own:
            groups[index].key, groups[index].base, groups[index].ties = key, base, ties


def _split_cuts(straddling: Sequence[Group], world: World) -> dict[int, int]:
    """How many of its own ties this rank cuts, for groups on several ranks keeping some ties. Lower ranks go first."""
    partial = {group.index: group for group in straddling if 0 < group.cut < group.ties}
    if not partial:
        return {}
    rows = [(index, group.own_ties) for index, group in partial.items() if group.own_ties]
    told = world.gather_arrays(np.array(rows, np.int64).reshape(-1), "threshold: ties of each rank")
    before = np.concatenate([np.empty(0, np.int64), *told[: world.rank]]).reshape(-1, 2)
    return {index: max(0, group.cut - int(before[before[:, 0] == index, 1].sum())) for index, group in partial.items()}


def _raise_nan(groups: Sequence[Group], world: World) -> None:
    mine = []
    for group in groups:
        for number, part in enumerate(group.parts):
            where = f" of rank {world.rank}" if world.size > 1 else ""
            name = part.name or f"array {number}" + (f" of group {group.index}" if len(groups) > 1 else "") + where
            mine.append((name, part.count_nan(), part.size))
    raise_nan(mine, world)


def raise_nan(mine: Sequence[tuple[str, int, int]], world: World) -> NoReturn:
    """Raise NumericsError on every rank, each with its own (name, NaNs, size) of arrays of scores. Collective."""
    found: dict[str, tuple[int, int]] = {}
    for name, nans, size in (row for rows in world.allgather(mine, "threshold: NaN") for row in rows):
        before = found.get(name, (0, 0))
        found[name] = before[0] + nans, before[1] + size
    bad = [f"{name}: {nans} of {size} scores are NaN" for name, (nans, size) in found.items() if nans]
    more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
    raise NumericsError(
        f"{bad[0]}{more}; such weights cannot be ranked: train again with a lower learning rate, or load other weights"
    )
