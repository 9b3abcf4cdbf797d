"""nvcc compiles every CUDA source without a warning or a spill, and no shape makes a launch that CUDA refuses."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path

import pytest

from tests.kernels.emulated import kernel_sources
from tests.kernels.nvcc import compiled, launches, needs_nvcc, record

pytestmark = needs_nvcc

PLANTED = Path(__file__).with_name("planted.cu")
SOURCES = [PLANTED, *kernel_sources()]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS = 64 << 10  # of a multiprocessor, taken by warps in pieces of 256
SHARED, SHARED_AT_MOST = 48 << 10, 227 << 10

by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.parent.name}/{source.stem}")


@by_source
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits_its_registers_and_shared_memory(source: Path, architecture: str) -> None:
    kernels = compiled(source, architecture)
    assert kernels
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= 255, kernel
        assert kernel.shared <= SHARED, kernel
        if kernel.threads:
            of_a_warp = -(-kernel.registers * 32 // 256) * 256
            warps = -(-kernel.threads // 32) * (kernel.blocks or 1)
            assert of_a_warp * warps <= REGISTERS, kernel


EXPORTED = re.compile(r"EXPORT int (hpcprune_cuda_\w+)\(([^)]*)\)")
SIDES = (0, 1, 77, 65535, 65536)  # of a matrix, or samples
COUNTS = (0, 1, 65537, 65536**2)  # of elements
KINDS = (0, 1, 2, 3, 4, 8, 16, 32, 64)
POINTERS = (1 << 40, (1 << 40) + 4)  # with and without the alignment of vectors


def choices(parameter: str) -> list[object]:
    """What is tried for a parameter of a launcher."""
    name = re.findall(r"\w+", parameter)[-1]
    if name == "stream":
        return [ctypes.c_void_p(0x5EED)]
    if "*" in parameter:
        return [ctypes.c_void_p(address) for address in POINTERS]
    if parameter.startswith("int64_t"):
        return [ctypes.c_int64(size) for size in (SIDES if name in ("rows", "columns", "batch") else COUNTS)]
    if parameter.startswith("float"):
        return [ctypes.c_float(1.0)]
    return [ctypes.c_int(kind) for kind in KINDS]


@by_source
def test_no_shape_makes_a_launch_that_cuda_refuses(source: Path) -> None:
    code = record(source)
    kernels = {kernel.name: kernel for kernel in compiled(source, "sm_80")}
    for function, signature in EXPORTED.findall(source.read_text()):
        if function == "hpcprune_cuda_fill":  # takes its grid from its caller
            continue
        parameters = [parameter.strip() for parameter in signature.split(",")]
        pointers = [i for i, parameter in enumerate(parameters) if "*" in parameter and "stream" not in parameter]
        tried = [choices(parameter) for parameter in parameters]
        launched = 0
        for alignment in range(len(POINTERS)):
            for i in pointers:  # all alike: each on its own would be too many
                tried[i] = [choices(parameters[i])[alignment]]
            for arguments in itertools.product(*tried):
                getattr(code, function)(*arguments)
                for launch in launches(code):
                    told = f"{function}{[argument.value for argument in arguments]}: {launch}"  # type: ignore[attr-defined]
                    launched += 1
                    kernel = kernels[launch.kernel]
                    threads = launch.block[0] * launch.block[1] * launch.block[2]
                    assert not launch.wrong, told
                    assert launch.stream == 0x5EED, told
                    assert threads <= (kernel.threads or 1024), f"{told}: beyond its __launch_bounds__"
                    assert kernel.shared + launch.shared <= SHARED_AT_MOST, told
        assert launched, f"{function} never launches anything"


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
        compiled(source, "sm_80")


def test_the_recorder_sees_what_was_launched_and_what_is_illegal() -> None:
    code = record(PLANTED)

    def fill(grid: tuple[int, ...], block: tuple[int, ...], shared: int = 0, allowed: int = 0) -> int:
        sizes = ((ctypes.c_uint * 3)(*size) for size in (grid, block))
        rest = (ctypes.c_int64(1), ctypes.c_float(0), None, ctypes.c_void_p(0xABC))
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
