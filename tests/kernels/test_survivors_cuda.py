"""Survivors by mask bits: the CUDA source, emulated on the CPU, has the bits of the CPU's functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcprune.native import survivors as cpu
from tests.kernels.emulated import KERNELS, Array, address, launch, load, needs_emulator, placed, under

pytestmark = needs_emulator

SOURCE = KERNELS / "survivors/survivors.cu"
SIZES = [0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 1000, 1023, 1024, 1025, 5000]
DENSITIES = [0.0, 0.03, 0.5, 0.97, 1.0]
ELEMENTS = {"2 bytes": np.uint16, "4 bytes": np.uint32, "8 bytes": np.uint64}
GUARD = 3  # elements on either side that must stay as they are


class Cuda:
    """The functions of survivors.cu with numpy's arrays, `offset` elements away from where 128 bits are aligned."""

    def __init__(self, bits: Array, length: int, offset: int = 0) -> None:
        self.code = load(SOURCE)
        self.bits, self.length, self.offset = placed(bits, offset), length, offset
        self.before = np.full((length + 1023) // 1024 + 1, -1, np.int64)
        launch(self.code, "survivors_before", self.bits, length, self.before)

    def placed(self, array: Array) -> Array:
        return placed(array, self.offset * array.itemsize)

    def call(self, function: str, changed: Array, other: Array) -> Array:
        """Calls a function that takes dense and packed, of which `changed` is one; gives what became of it."""
        guarded = np.full(changed.size + 2 * GUARD, 0x5A, changed.dtype)
        guarded[GUARD:-GUARD] = changed
        memory = placed(guarded, (self.offset - GUARD + 16) * changed.itemsize)
        target, other = memory[GUARD:-GUARD], self.placed(other)
        dense, packed = (other, target) if function == "gather" else (target, other)
        launch(self.code, function, changed.itemsize, dense, self.length, self.bits, self.before, packed)
        assert (memory[:GUARD] == 0x5A).all() and (memory[-GUARD:] == 0x5A).all()
        return target


def mask(length: int, density: float) -> Array:
    return np.packbits(np.random.default_rng(length).random(length) < density, bitorder="little")


def random(length: int, element: Any) -> Array:
    size = np.dtype(element).itemsize
    drawn: Array = np.random.default_rng(1).integers(1, 255, length * size, np.uint8)
    return drawn.view(element)


def agree(bits: Array, length: int, element: Any, offset: int = 0) -> None:
    cuda, dense = Cuda(bits, length, offset), random(length, element)
    packed = cpu.gather(dense, bits)
    assert cuda.before[-1] == cpu.popcount(bits)
    assert np.array_equal(cuda.call("gather", np.zeros_like(packed), dense), packed)
    assert np.array_equal(cuda.call("scatter", ~dense, packed), cpu.scatter(packed, bits, length))
    updated = ~dense
    cpu.update(updated, bits, packed)
    assert np.array_equal(cuda.call("update", ~dense, packed), updated)


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("density", DENSITIES)
def test_the_same_as_on_the_cpu(element: Any, density: float) -> None:
    for length in SIZES:
        agree(mask(length, density), length, element)


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_arrays_and_masks_may_begin_anywhere(element: Any, offset: int) -> None:
    for length in (1, 33, 65, 1100, 3000):
        agree(mask(length, 0.4), length, element, offset)


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("period", [2, 8, 16, 64, 4096])
def test_stretches_that_are_full_or_empty(element: Any, period: int) -> None:
    kept = np.arange(9000) // period % 2 == 1
    agree(np.packbits(kept, bitorder="little"), kept.size, element)


def test_whatever_the_order_of_threads(seed: None) -> None:
    agree(mask(5000, 0.5), 5000, np.uint32)


def check_some() -> None:
    for element in ELEMENTS.values():
        for length, density in ((1, 1.0), (1025, 0.5), (4504, 0.9)):
            agree(mask(length, density), length, element)
            agree(mask(length, density), length, element, 1)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_are_silent(flavour: str) -> None:
    under(flavour, check_some, seed=1)


def check_long_scan() -> None:
    tiles = 4096 + 3
    bits = np.random.default_rng(3).integers(0, 256, tiles * 128, np.uint8)
    counts = np.unpackbits(bits).reshape(tiles, 1024).sum(1, dtype=np.int64)
    cuda = Cuda(bits, tiles * 1024)
    assert np.array_equal(cuda.before, np.concatenate([[0], np.cumsum(counts)]))


def test_tiles_beyond_what_a_block_scans_at_once(seed: None) -> None:
    check_long_scan()


def test_chunks_of_a_scan_do_not_race() -> None:
    under("thread", check_long_scan)


def test_other_elements_are_refused() -> None:
    cuda, memory = Cuda(mask(10, 0.5), 10), address(np.zeros(10, np.uint8))
    bits = address(cuda.bits)
    for function in ("gather", "scatter", "update"):
        assert getattr(cuda.code, f"hpcprune_cuda_{function}")(1, memory, 10, bits, memory, memory, None) == 1
