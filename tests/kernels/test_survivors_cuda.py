"""Survivors by mask bits: the CUDA source, emulated on the CPU, has the bits of the CPU's functions."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from hpcprune.native import survivors as cpu
from tests.kernels.emulated import Array, address, emulated, misaligned

SIZES = [0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 1000, 1023, 1024, 1025, 5000]
DENSITIES = [0.0, 0.03, 0.5, 0.97, 1.0]
ELEMENTS = [np.uint16, np.uint32, np.uint64]
GUARD = 3  # elements on either side that must stay as they are


class Cuda:
    """The functions of survivors.cu with numpy's arrays, `offset` elements away from where 128 bits are aligned."""

    def __init__(self, bits: Array, length: int, offset: int = 0) -> None:
        self.code = emulated("survivors/survivors.cu")
        self.bits, self.length, self.offset = misaligned(bits, offset), ctypes.c_int64(length), offset
        self.before = np.full((length + 1023) // 1024 + 1, -1, np.int64)
        assert not self.code.hpcprune_cuda_survivors_before(address(self.bits), self.length, address(self.before), None)

    def call(self, function: str, changed: Array, other: Array) -> Array:
        """Calls a function that takes dense and packed, of which `changed` is one; gives what became of it."""
        guarded = np.full(changed.size + 2 * GUARD, 0x5A, changed.dtype)
        guarded[GUARD:-GUARD] = changed
        memory = misaligned(guarded, self.offset - GUARD + 16)
        target, other = memory[GUARD:-GUARD], misaligned(other, self.offset)
        dense, packed = (other, target) if function == "gather" else (target, other)
        place = (self.length, address(self.bits), address(self.before))
        run = getattr(self.code, f"hpcprune_cuda_{function}")
        assert not run(changed.itemsize, address(dense), *place, address(packed), None)
        assert (memory[:GUARD] == 0x5A).all() and (memory[-GUARD:] == 0x5A).all()
        return target

    def zero_pruned(self, dense: Array) -> Array:
        memory = misaligned(dense, self.offset)
        run = self.code.hpcprune_cuda_zero_pruned
        assert not run(dense.itemsize, address(memory), self.length, address(self.bits), None)
        return memory


def mask(length: int, density: float) -> Array:
    return np.packbits(np.random.default_rng(length).random(length) < density, bitorder="little")


def random(length: int, element: Any) -> Array:
    size = np.dtype(element).itemsize
    return np.random.default_rng(1).integers(1, 255, length * size, np.uint8).view(element)


def agree(bits: Array, length: int, element: Any, offset: int) -> None:
    cuda, dense = Cuda(bits, length, offset), random(length, element)
    packed = cpu.gather(dense, bits)
    assert cuda.before[-1] == cpu.popcount(bits)
    assert np.array_equal(cuda.call("gather", np.zeros_like(packed), dense), packed)
    assert np.array_equal(cuda.call("scatter", ~dense, packed), cpu.scatter(packed, bits, length))
    updated, zeroed = ~dense, dense.copy()
    cpu.update(updated, bits, packed)
    assert np.array_equal(cuda.call("update", ~dense, packed), updated)
    cpu.zero_pruned(zeroed, bits)
    assert np.array_equal(cuda.zero_pruned(dense), zeroed)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("density", DENSITIES)
def test_the_same_as_on_the_cpu(element: Any, density: float) -> None:
    for length in SIZES:
        agree(mask(length, density), length, element, 0)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("offset", [1, 2, 5])
def test_arrays_and_masks_may_begin_anywhere(element: Any, offset: int) -> None:
    for length in (1, 33, 65, 1100, 3000):
        agree(mask(length, 0.4), length, element, offset)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("period", [2, 8, 16, 64, 4096])
def test_stretches_that_are_full_or_empty(element: Any, period: int) -> None:
    kept = np.arange(9000) // period % 2 == 1
    agree(np.packbits(kept, bitorder="little"), kept.size, element, 0)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_whatever_the_order_of_threads(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUEMU_SEED", seed)
    agree(mask(5000, 0.5), 5000, np.uint32, 0)


def test_tiles_beyond_what_a_block_scans_at_once() -> None:
    tiles = 4096 + 4096 // 2 + 3
    bits = np.random.default_rng(3).integers(0, 256, tiles * 128, np.uint8)
    counts = np.unpackbits(bits).reshape(tiles, 1024).sum(1, dtype=np.int64)
    cuda = Cuda(bits, tiles * 1024)
    assert np.array_equal(cuda.before, np.concatenate([[0], np.cumsum(counts)]))


def test_other_elements_are_refused() -> None:
    cuda, memory = Cuda(mask(10, 0.5), 10), np.zeros(10, np.uint8)
    arguments = (address(memory), cuda.length, address(cuda.bits), address(cuda.before), address(memory), None)
    for function in ("gather", "scatter", "update"):
        assert getattr(cuda.code, f"hpcprune_cuda_{function}")(1, *arguments) == 1
    assert cuda.code.hpcprune_cuda_zero_pruned(1, address(memory), cuda.length, address(cuda.bits), None) == 1
