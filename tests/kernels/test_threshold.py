"""The passes of the threshold: every path counts and packs as numpy does, whatever the number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library
from hpcprune.native.threshold import View, count_around, histogram, pack, to_keys
from tests.kernels.conftest import PATHS

INFINITY = {np.int16: 0x7C00, np.int32: 0x7F800000, np.int64: 0x7FF << 52}


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([np.int16, np.int32, np.int64]),
    view=st.sampled_from(list(View)),
    sizes=st.lists(st.integers(0, 200), max_size=4),
    ends=st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_passes_agree_with_numpy_on_every_path(
    bits: Any, view: View, sizes: list[int], ends: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    infinity = INFINITY[bits]
    lowest = np.iinfo(bits).min
    pool = np.array([0, lowest, 1, lowest + 1, 2, 5, infinity, infinity + lowest, 77, infinity - 1, 1000, -5], bits)
    pool[-1] = 3 if view != View.KEYS else -5  # as float bits that would be NaN
    parts = [random.choice(pool, size) for size in sizes]
    keys = to_keys(np.concatenate([np.empty(0, bits), *parts]), view)
    values = np.sort(np.unique(to_keys(pool, view))).tolist()
    lo, hi = values[ends[0] % len(values)], values[ends[1] % len(values)]
    lo, hi = min(lo, hi), max(lo, hi)
    cut = int(random.integers(-1, 20))
    ties = np.flatnonzero(keys == lo)
    survives = keys >= lo
    survives[ties[: cut if cut >= 0 else ties.size]] = False
    shift = max(0, (hi - lo).bit_length() - 3)
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPCPRUNE_NATIVE", path)
            try:
                library()
            except HpcpruneError:
                continue
            found = count_around(parts, view, lo, hi, infinity if view != View.KEYS else 0, 1000)
            inside = keys[(keys > lo) & (keys < hi)]
            assert not found.nan
            assert (found.below, found.at_lo) == (np.count_nonzero(keys < lo), np.count_nonzero(keys == lo))
            assert found.at_hi == (np.count_nonzero(keys == hi) if hi > lo else 0)
            assert found.keys is not None and found.between == inside.size
            assert np.array_equal(np.sort(found.keys), np.sort(inside))
            if inside.size:
                assert count_around(parts, view, lo, hi, infinity, inside.size - 1).keys is None
            counts = histogram(parts, view, lo, hi, shift, 8)
            offsets = [(int(key) - lo) >> shift for key in keys if lo <= key <= hi]
            assert counts.tolist() == np.bincount(np.array(offsets, np.int64), minlength=8).tolist()
            masks = [np.full((part.size + 7) // 8, 0xAA, np.uint8) for part in parts]
            left = pack(parts, masks, view, lo, cut)
            unpacked = [np.unpackbits(m, count=p.size, bitorder="little") for m, p in zip(masks, parts, strict=True)]
            assert np.array_equal(np.concatenate([np.empty(0, np.uint8), *unpacked]), survives)
            assert left == (max(0, cut - ties.size) if cut >= 0 else -1)
            padding = [m[-1] >> p.size % 8 for m, p in zip(masks, parts, strict=True) if p.size % 8]
            assert not any(padding)


@pytest.mark.parametrize("distinct", [7, 100_000])
@pytest.mark.parametrize("part_of_ties", [0.0, 0.01, 0.4, 0.7, 1.0])
def test_threads_cut_ties_in_order(path: str, distinct: int, part_of_ties: float) -> None:
    random = np.random.default_rng(distinct)
    parts = [random.integers(0, distinct, size).astype(np.int32) for size in (600_001, 7, 300_003)]
    keys = np.concatenate(parts)
    ties = np.flatnonzero(keys == 3)
    cut = int(part_of_ties * ties.size)
    expected = keys >= 3
    expected[ties[:cut]] = False
    masks = [np.zeros((part.size + 7) // 8, np.uint8) for part in parts]
    assert pack(parts, masks, View.KEYS, 3, cut, threads=3) == 0
    unpacked = [np.unpackbits(m, count=p.size, bitorder="little") for m, p in zip(masks, parts, strict=True)]
    assert np.array_equal(np.concatenate(unpacked), expected)
    assert pack(parts, masks, View.KEYS, 3, ties.size + 5, threads=3) == 5


def test_more_keys_than_there_is_room_for_stay_inside_the_buffer(path: str) -> None:
    code = library().code
    if code is None:
        pytest.skip("numpy has no buffer")
    data, buffer, counts = np.arange(9000, dtype=np.int32), np.full(9000, -7, np.int32), np.zeros(5, np.int64)
    address, length = np.array([data.ctypes.data], np.uintp), np.array([data.size], np.int64)
    arrays = (address.ctypes.data, length.ctypes.data, 1)
    room = (buffer.ctypes.data, 100, counts.ctypes.data)
    assert code.hpcprune_count_around(library().level, 32, View.KEYS, *arrays, 10, 8000, 0, *room, 1) == 0
    assert counts.tolist() == [10, 1, 7989, 1, 0]
    assert (buffer[100:] == -7).all()


def test_nan_is_noticed_with_either_sign(path: str) -> None:
    for position in (0, 63, 70):
        for value in (np.nan, -np.nan):
            scores = np.ones(71, np.float32)
            scores[position] = value
            for view in (View.SIGNED, View.ABSOLUTE):
                found = count_around([scores.view(np.int32)], view, 0, 5, INFINITY[np.int32], 100)
                assert found.nan, (position, value, view)
