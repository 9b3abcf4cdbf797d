"""The passes of the threshold: the CUDA source, emulated on the CPU, counts and packs as the CPU's functions do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hpcprune.native import threshold as cpu
from hpcprune.native.threshold import View, to_keys
from tests.kernels.emulated import KERNELS, Array, address, launch, load, needs_emulator, placed, under

pytestmark = needs_emulator

SOURCE = KERNELS / "threshold/threshold.cu"
SIZES = [0, 1, 7, 63, 64, 65, 1000, 1023, 1025, 5000]
INFINITY = {np.int16: 0x7C00, np.int32: 0x7F800000, np.int64: 0x7FF << 52}
INTEGERS = list(INFINITY)
LAWS = ["normal", "ties", "special", "all the same"]


class Cuda:
    """The functions of threshold.cu, an array after another, `offset` elements from where 128 bits are aligned."""

    def __init__(self, parts: Sequence[Array], view: View, offset: int = 0) -> None:
        self.code = load(SOURCE)
        self.parts, self.view, self.offset = [placed(part, offset * part.itemsize) for part in parts], view, offset
        self.bits = 8 * parts[0].itemsize

    def each(self, operation: str, *arguments: int | Array) -> None:
        for part in self.parts:
            launch(self.code, operation, self.bits, int(self.view), part, part.size, *arguments)

    def count_around(self, lo: int, hi: int, infinity: int, capacity: int) -> tuple[list[int], Array]:
        """The five counts, and the buffer of the keys between with a guard of -7 behind its capacity."""
        counts, keys = np.zeros(5, np.int64), np.full(capacity + 100, -7, self.parts[0].dtype)
        self.each("count_around", lo, hi, infinity, keys, capacity, counts)
        return counts.tolist(), keys

    def histogram(self, lo: int, hi: int, shift: int, bins: int) -> Array:
        result = np.zeros(bins, np.int64)
        self.each("histogram", lo, hi, shift, bins, result)
        return result

    def pack(self, threshold: int, cut: int) -> tuple[list[Array], int]:
        """The masks, and what is left of the cut."""
        left, masks = np.array([cut], np.int64), []
        for part in self.parts:
            scratch = np.full((part.size + 1023) // 1024, -1, np.int64)
            guarded = placed(np.full((part.size + 7) // 8 + 4, 0xAA, np.uint8), self.offset)
            launch(self.code, "pack", self.bits, int(self.view), part, part.size, threshold, left, scratch, guarded)
            assert (guarded[-4:] == 0xAA).all()
            masks.append(guarded[:-4])
        return masks, int(left[0])


def agree(parts: Sequence[Array], view: View, offset: int = 0) -> None:
    """Every function agrees with the CPU's, around several brackets and for several cuts."""
    cuda, infinity = Cuda(parts, view, offset), INFINITY[parts[0].dtype.type]
    keys = np.sort(np.concatenate([to_keys(part, view) for part in parts]))
    ends = [int(keys[int(place * (keys.size - 1))]) for place in (0, 0.3, 0.6, 1)] if keys.size else [0, 1, 1, 5]
    for lo, hi in ((ends[0], ends[3]), (ends[1], ends[2]), (ends[2], ends[2])):
        capacity = keys.size
        counts, found = cuda.count_around(lo, hi, infinity, capacity)
        expected = cpu.count_around(parts, view, lo, hi, infinity, capacity)
        assert expected.keys is not None
        told = [expected.below, expected.at_lo, expected.between, expected.at_hi, int(expected.nan)]
        assert counts == told
        assert np.array_equal(np.sort(found[: counts[2]]), np.sort(expected.keys)) and (found[counts[2] :] == -7).all()
        for bins in (2, 16, 4096):
            shift = max(0, (hi - lo).bit_length() - bins.bit_length() + 1)
            assert np.array_equal(cuda.histogram(lo, hi, shift, bins), cpu.histogram(parts, view, lo, hi, shift, bins))
    for threshold in (ends[1], ends[3]):
        ties = int((keys == threshold).sum())
        for cut in (-1, 0, 1, ties // 2, ties, ties + 5):
            masks = [np.zeros((part.size + 7) // 8, np.uint8) for part in parts]
            left = cpu.pack(parts, masks, view, threshold, cut)
            packed, left_there = cuda.pack(threshold, cut)
            assert left_there == left
            assert all(np.array_equal(mine, theirs) for mine, theirs in zip(packed, masks, strict=True))


def scores(size: int, integer: Any, law: str) -> Array:
    """The bits of floats, none of them NaN."""
    random = np.random.default_rng(size)
    special = np.array([0, np.iinfo(integer).min, 1, INFINITY[integer], INFINITY[integer] + np.iinfo(integer).min])
    floats = random.standard_normal(size).astype(f"f{np.dtype(integer).itemsize}").view(integer)
    if law == "ties":
        return random.choice(floats[:5], size).astype(integer) if size else floats
    if law == "special":
        return np.where(random.random(size) < 0.5, random.choice(special, size).astype(integer), floats)
    return np.full(size, 7, integer) if law == "all the same" else floats


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("view", list(View))
@pytest.mark.parametrize("integer", INTEGERS)
def test_the_same_as_on_the_cpu(integer: Any, view: View, law: str) -> None:
    for size in SIZES:
        agree([scores(size, integer, law)], view)


@pytest.mark.parametrize("integer", INTEGERS)
def test_calls_go_on_where_earlier_ones_ended(integer: Any) -> None:
    for law in ("normal", "ties"):
        agree([scores(size, integer, law) for size in (1100, 3, 0, 2048, 77)], View.ABSOLUTE)


@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("offset", [1, 3])
def test_arrays_and_masks_may_begin_anywhere(integer: Any, offset: int) -> None:
    agree([scores(1500, integer, "ties"), scores(70, integer, "special")], View.SIGNED, offset)


def test_whatever_the_order_of_threads(seed: None) -> None:
    agree([scores(9000, np.int32, "ties")], View.ABSOLUTE)
    agree([scores(9000, np.int16, "normal")], View.SIGNED)


def check_some() -> None:
    for integer in INTEGERS:
        agree([scores(1500, integer, "ties"), scores(70, integer, "special")], View.SIGNED)
        agree([scores(2100, integer, "normal")], View.ABSOLUTE, 1)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_are_silent(flavour: str) -> None:
    under(flavour, check_some, seed=1)


@pytest.mark.parametrize("integer", INTEGERS)
def test_more_keys_than_there_is_room_for_stay_inside_the_buffer(integer: Any) -> None:
    keys = np.arange(9000).astype(integer)
    counts, found = Cuda([keys], View.KEYS).count_around(10, 8000, 0, 100)
    assert counts == [10, 1, 7989, 1, 0]
    assert (found[100:] == -7).all() and np.unique(found[:100]).size == 100
    assert (found[:100] > 10).all() and (found[:100] < 8000).all()


def test_a_buffer_that_fills_up_again_and_again() -> None:
    keys = np.random.default_rng(4).permutation(3_000_000)
    counts, found = Cuda([keys], View.KEYS).count_around(0, keys.size - 1, 0, keys.size)
    assert counts == [0, 1, keys.size - 2, 1, 0]
    assert np.array_equal(np.sort(found[: keys.size - 2]), np.arange(1, keys.size - 1))


@pytest.mark.parametrize("integer", INTEGERS)
def test_nan_is_noticed_with_either_sign(integer: Any) -> None:
    for position in (0, 63, 1030):
        for sign in (0, np.iinfo(integer).min):
            data = np.ones(1031, integer)
            data[position] = INFINITY[integer] + 1 + sign
            for view in (View.SIGNED, View.ABSOLUTE):
                assert Cuda([data], view).count_around(0, 5, INFINITY[integer], 10)[0][4] == 1
            assert Cuda([data], View.KEYS).count_around(0, 5, INFINITY[integer], 10)[0][4] == 0


def test_more_bins_than_a_block_counts_at_once() -> None:
    keys = np.random.default_rng(2).integers(0, 20_000, 4000).astype(np.int32)
    assert np.array_equal(Cuda([keys], View.KEYS).histogram(0, 19_999, 0, 20_000), np.bincount(keys, minlength=20_000))


def test_other_types_are_refused() -> None:
    code, memory = load(SOURCE), address(np.zeros(8, np.int64))
    for bits, view in ((8, 0), (32, 3)):
        assert code.hpcprune_cuda_pack(bits, view, memory, 1, 0, memory, memory, memory, None) == 1
