"""nvcc compiles every CUDA source without a warning or a spill, to the instructions that were meant; and a launch of
any shape is one that CUDA takes."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from hpcprune.sparse.kernels import MOST
from hpcprune.sparse.operands import LONGEST
from tests.kernels.emulated import KERNELS
from tests.kernels.nvcc import (
    ARCHITECTURES,
    built,
    instructions,
    launches,
    needs_disassembler,
    needs_nvcc,
    record,
    resident,
)
from tests.kernels.signatures import Function, Parameter, functions

pytestmark = needs_nvcc

PLANTED = Path(__file__).with_name("planted.cu")
SOURCES = [PLANTED, *sorted(KERNELS.glob("*/*.cu"))]

by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.parent.name}/{source.stem}")
by_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@by_source
@by_architecture
def test_no_kernel_spills_registers(source: Path, architecture: str) -> None:
    kernels = built(source)[architecture]
    assert kernels
    for kernel in kernels.values():
        assert kernel.spilled == 0, kernel


WIDE = r"\bLDG\.E\.(\w+\.)*128\b"  # a load of 128 bits
WIDE_STORE = r"\bSTG\.E\.(\w+\.)*128\b"
MULTIPLY = r"\bHMMA\.16816\.F32\.BF16\b"
COPY = r"\bLDGSTS\.E\.(\w+\.)*128\b"  # global to shared memory, while the thread goes on


@needs_disassembler
@by_architecture
@pytest.mark.parametrize(
    ("source", "kernel", "meant"),
    [
        ("spmm/csr.cu", "spmm_few", [WIDE]),
        ("spmm/csr.cu", "spmm_tile", [WIDE]),
        ("sddmm/csr.cu", "sddmm_share", [WIDE]),
        ("spmm/bitmap.cu", "bitmap", [MULTIPLY, COPY]),
        ("blocks/spmm.cu", "spmm", [MULTIPLY, COPY]),
        ("blocks/sddmm.cu", "sddmm", [MULTIPLY, COPY]),
        # Those that take neighbours together.
        ("survivors/survivors.cu", "gatherILi[248]E", [WIDE]),
        ("survivors/survivors.cu", "scatterILb[01]ELi[248]E", [WIDE_STORE]),
        ("threshold/threshold.cu", "count_aroundILi[248]E", [WIDE]),
        ("threshold/threshold.cu", "histogramILi[248]E", [WIDE]),
        ("threshold/threshold.cu", "count_tiesILi[248]E", [WIDE]),
        ("threshold/threshold.cu", "packILi[248]E", [WIDE]),
    ],
)
def test_kernels_are_of_the_instructions_that_were_meant(
    source: str, kernel: str, meant: list[str], architecture: str
) -> None:
    found = {
        name: code for name, code in instructions(KERNELS / source, architecture).items() if re.search(kernel, name)
    }
    assert found
    for name, code in found.items():
        for instruction in meant:
            assert re.search(instruction, code), f"{name} has no {instruction}"


# Blocks that a multiprocessor holds at once of every launch, whatever the architecture: fewer threads, registers or
# bytes of shared memory leave room for more. What waits for memory wants many warps, tensor cores two blocks.
RESIDENT = {
    "spmm_few": 10,
    "spmm_tile": 6,
    "sddmm_share": 20,
    "transpose_tile": 8,
    "bitmap": 2,
    "spmm": 2,
    "sddmm": 2,
    "count": 16,
    "scan_counts": 2,
    "gather": 4,
    "scatter": 16,
    "count_around": 5,
    "histogram": 4,
    "count_ties": 6,
    "share_cut": 2,
    "pack": 8,
}
SIDES = (0, 1, 77, 65535, 65536)
SIZES = {
    **dict.fromkeys(("rows", "columns"), (*SIDES, LONGEST)),
    "batch": SIDES,
    "survivors": (0, 1, 65537, MOST),
    "blocks": (0, 1, 65537, MOST // 16**2),
    "bins": (0, 1, 4096, 65537),
    "largest": (8, 9, 72, 136),  # of the groups of bitmap tiles: nothing is left, all is left
}
COUNTS = (0, 1, 65537, LONGEST**2)  # of elements
KINDS = (0, 1, 2, 3, 4, 8, 16, 32, 64)
POINTERS = (1 << 40, (1 << 40) + 4)  # with and without the alignment of vectors
MOST_CALLS = 3000  # of a function


def choices(parameter: Parameter) -> tuple[float, ...]:
    """What is tried for a parameter of a launcher that is no pointer."""
    of_type = {"int64_t": COUNTS, "float": (1.0,)}
    return SIZES.get(parameter.name, of_type.get(parameter.type, KINDS))


def sample(function: Function) -> Iterator[list[object]]:
    """Arguments of all combinations, or of so many drawn from them that any three parameters meet in almost all theirs.

    Pointers are aligned all alike: each on its own would be too many.
    """
    tried: list[tuple[float, ...]] = [
        (0x5EED,) if parameter.name == "stream" else (0,) if parameter.type == "*" else choices(parameter)
        for parameter in function.parameters
    ]
    combinations: Iterator[tuple[float, ...]] = itertools.product(*tried)
    if np.prod([len(values) for values in tried]) * len(POINTERS) > MOST_CALLS:
        random = np.random.default_rng(0)
        columns = [random.integers(0, len(values), MOST_CALLS // len(POINTERS)) for values in tried]
        combinations = (
            tuple(values[i] for values, i in zip(tried, row, strict=True)) for row in zip(*columns, strict=True)
        )
    for combination in combinations:
        for pointer in POINTERS:
            yield [
                pointer if parameter.type == "*" and parameter.name != "stream" else value
                for parameter, value in zip(function.parameters, combination, strict=True)
            ]


@lru_cache(maxsize=1024)
def least(kernel: str) -> int:
    """The number of RESIDENT for a kernel's mangled name; planted kernels promise nothing."""
    if "planted" in kernel:
        return 1
    [blocks] = [blocks for name, blocks in RESIDENT.items() if re.search(rf"{len(name)}{name}[IE]", kernel)]
    return blocks


@by_source
def test_no_shape_makes_a_launch_that_cuda_refuses(source: Path) -> None:
    code, kernels = record(source), built(source)["sm_80"]
    for function in functions(source):
        if function.name == "hpcprune_cuda_fill" or function.parameters[-1].name != "stream":
            continue  # takes its grid from its caller, or launches nothing
        launched = 0
        for arguments in sample(function):
            getattr(code, function.name)(*arguments)
            for launch in launches(code):
                told = f"{function.name}{arguments}: {launch}"
                launched += 1
                kernel = kernels[launch.kernel]
                threads = launch.block[0] * launch.block[1] * launch.block[2]
                assert not launch.wrong, told
                assert launch.stream == 0x5EED, told
                assert threads <= (kernel.threads or 1024), f"{told}: beyond its __launch_bounds__"
                for architecture, of_source in built(source).items():
                    blocks = resident(of_source[launch.kernel], threads, launch.shared, architecture)
                    assert blocks >= least(launch.kernel), f"{told}: {blocks} blocks a multiprocessor of {architecture}"
        assert launched, f"{function.name} never launches anything"


def test_a_spill_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text("""
__global__ void __launch_bounds__(1024, 2) spilling(const float* from, float* to) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = from[threadIdx.x * 64 + i];
  __syncthreads();
  for (int i = 0; i < 64; ++i) to[i * 1024 + threadIdx.x] = values[63 - i] * values[i ^ 5];
}
""")
    with pytest.raises(AssertionError, match="spill"):
        built(source)


def test_the_recorder_sees_what_was_launched_and_what_is_illegal() -> None:
    code = record(PLANTED)

    def fill(grid: tuple[int, ...], block: tuple[int, ...], shared: int = 0, allowed: int = 0) -> int:
        sizes = ((ctypes.c_uint * 3)(*size) for size in (grid, block))
        rest = (1, 0.0, None, 0xABC)
        return int(code.hpcprune_cuda_fill(*sizes, shared, allowed, *rest))

    # The first launch of all, before the kernel was allowed more.
    assert fill((1, 1, 1), (32, 1, 1), 64 << 10) == 9
    assert fill((5, 65535, 2), (128, 2, 1), 64 << 10, 100 << 10) == 0
    refused, made = launches(code)
    assert "cudaFuncSetAttribute" in refused.wrong
    assert "4fill" in made.kernel and not made.wrong
    assert (made.grid, made.block, made.shared, made.stream) == ((5, 65535, 2), (128, 2, 1), 64 << 10, 0xABC)
    assert fill((1, 65536, 1), (32, 1, 1)) == 9
    assert fill((1, 1, 1), (32, 33, 1)) == 9
    assert fill((0, 1, 1), (32, 1, 1)) == 9
    assert [bool(launch.wrong) for launch in launches(code)] == [True] * 3
    assert fill((1, 1, 1), (1, 1, 1), 0, (227 << 10) + 1) == 1
