"""Gather, scatter, update and popcount: every path gives the bits of numpy's boolean indexing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcprune.native.survivors import MaskError, gather, popcount, scatter, update

ELEMENTS = (np.float64, np.float32, np.float16, np.uint16)


def random_bits(seed: int, count: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    kept = np.random.default_rng(seed).random(count) < density
    return kept, np.packbits(kept, bitorder="little")


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_gather_and_scatter_agree_with_boolean_indexing(path: str, element: Any, density: float) -> None:
    for count in (0, 1, 7, 8, 63, 64, 65, 200, 1000):
        kept, bits = random_bits(count, count, density)
        values = np.random.default_rng(1).integers(1, 255, count * np.dtype(element).itemsize, np.uint8).view(element)
        survivors = gather(values, bits)
        dense = scatter(survivors, bits, count)
        updated = ~values.view(f"u{values.itemsize}")
        others = updated[~kept].copy()
        update(updated, bits, survivors.view(updated.dtype))
        assert updated[kept].tobytes() == survivors.tobytes() and np.array_equal(updated[~kept], others)
        out = np.empty_like(survivors)
        assert gather(values, bits, out=out) is out and out.tobytes() == survivors.tobytes()
        expected = np.where(kept, values.view(f"u{values.itemsize}"), 0)
        assert survivors.dtype == element and dense.dtype == element
        assert survivors.tobytes() == values[kept].tobytes()
        assert dense.tobytes() == expected.tobytes()
        assert popcount(bits) == np.count_nonzero(kept)


@pytest.mark.parametrize("element", [np.float16, np.float32, np.float64])
def test_threads_share_a_large_array(path: str, element: Any) -> None:
    count = 3 * (1 << 18) + 12345
    kept, bits = random_bits(5, count, 0.2)
    values = np.arange(count).astype(np.int64).view(np.float64).astype(element) + element(1)
    survivors = gather(values, bits, threads=3)
    assert survivors.tobytes() == values[kept].tobytes()
    assert scatter(survivors, bits, count, threads=3).tobytes() == np.where(kept, values, element(0)).tobytes()
    target = np.full(count, 5, element)
    update(target, bits, survivors, threads=3)
    assert target.tobytes() == np.where(kept, values, element(5)).tobytes()


def test_slices_at_multiples_of_eight_are_the_whole(path: str) -> None:
    kept, bits = random_bits(3, 1001, 0.4)
    values = np.arange(1001, dtype=np.float32)
    pieces = [gather(values[i : i + 104], bits[i // 8 : (i + 104) // 8]) for i in range(0, 1001, 104)]
    assert np.array_equal(np.concatenate(pieces), values[kept])


def test_nothing_is_written_beyond_the_ends(path: str) -> None:
    kept, bits = random_bits(9, 203, 0.6)
    memory = np.full(300, 7, np.float32)
    update(memory[10:213], bits, np.full(kept.sum(), 5, np.float32))
    assert (memory[:10] == 7).all() and (memory[213:] == 7).all()
    assert np.array_equal(memory[10:213], np.where(kept, 5, 7))


def test_counts_that_disagree_are_refused(path: str) -> None:
    values, bits = np.ones(10, np.float32), np.array([0xFF, 0x03], np.uint8)
    with pytest.raises(MaskError, match="1 bytes of mask for 10 elements: 2 are needed"):
        gather(values, bits[:1])
    with pytest.raises(MaskError, match="bits set beyond the last one"):
        gather(values, np.array([0xFF, 0x07], np.uint8))
    with pytest.raises(MaskError, match="9 survivors for a mask with 10 bits set"):
        scatter(values[:9], bits, 10)
    with pytest.raises(MaskError, match="9 survivors for a mask with 10 bits set"):
        update(values, bits, values[:9])
    with pytest.raises(MaskError, match="survivors of float64 cannot be written into an array of float32"):
        update(values, bits, values.astype(np.float64))
    with pytest.raises(MaskError, match=r"out is float32 of shape \(9,\): float32 of shape \(10,\) is needed"):
        gather(values, bits, out=values[:9])
    with pytest.raises(MaskError, match="1-D array of 2, 4 or 8 bytes"):
        gather(np.ones(10, np.int8), bits)
    with pytest.raises(MaskError, match="1-D array of 2, 4 or 8 bytes"):
        update(np.ones((2, 5), np.float32), bits, values)
    with pytest.raises(MaskError, match="not contiguous"):
        update(np.ones(20, np.float32)[::2], bits, values)
    with pytest.raises(MaskError, match="uint8"):
        popcount(bits.astype(np.int64))
