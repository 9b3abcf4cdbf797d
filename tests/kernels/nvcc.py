"""CUDA sources compiled by the real nvcc, without a GPU: what ptxas says of each kernel, its instructions, and launches
written down.

`built(source)` is compiled for every architecture, once a session, with every warning an error. `record(source)` is its
host code over a runtime that runs nothing (recording_cudart.cpp): call its functions with any sizes and any pointers,
and `launches` says which grids they asked for.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import pytest

from hpcprune.native.cuda import find_tool
from tests.kernels.signatures import declare

__all__ = [
    "ARCHITECTURES",
    "Kernel",
    "Launch",
    "built",
    "instructions",
    "launches",
    "needs_disassembler",
    "needs_nvcc",
    "record",
    "resident",
]

NVCC, DISASSEMBLER = (find_tool(tool, os.environ) for tool in ("nvcc", "nvdisasm"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Its own runtime, whatever other one has been loaded.
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "--threads", "0", "-cudart", "none")
LINKED = ("-Xlinker", "-Bsymbolic", "-Xlinker", "-z,defs")
STRICT = ("-Xptxas", "-v,-warn-spills", "--Werror", "all-warnings")
RECORDER = Path(__file__).with_name("recording_cudart.cpp")

PACKAGES = "on PATH or from pip: pip install 'hpcprune[test]' on x86-64"
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=f"no nvcc in CUDA_HOME, {PACKAGES}")
needs_disassembler = pytest.mark.skipif(DISASSEMBLER is None, reason=f"no nvdisasm in CUDA_HOME, {PACKAGES}")


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes; `threads` and `blocks` are what __launch_bounds__ says, or None."""

    name: str
    registers: int
    spilled: int  # bytes, stored or loaded
    shared: int  # bytes, without what a launch adds
    threads: int | None
    blocks: int | None


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for; `wrong` says what CUDA would not let pass, or is empty."""

    kernel: str  # its mangled name
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    wrong: str


# Of a multiprocessor of each architecture, as CUDA's occupancy calculator has it.
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes
REGISTERS, WARPS, BLOCKS = 64 << 10, 64, 32
SCHEDULERS = 4  # to which registers and warps belong


@lru_cache(maxsize=1)
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="hpcprune-nvcc-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _run(command: Sequence[str | Path]) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@lru_cache(maxsize=64)
def _compiled(source: Path) -> tuple[Path, str]:
    """The folder of what nvcc made, and what it said."""
    assert NVCC is not None
    folder = _folder() / f"{source.parent.name}.{source.stem}"
    folder.mkdir()
    libraries = NVCC.parent.parent / "lib"  # where pip's nvcc has them
    codes = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in ARCHITECTURES]
    keep = ("--keep", "--keep-dir", str(folder))
    flags = (f"-L{libraries}", *FLAGS, *LINKED, *STRICT, *codes, *keep)
    return folder, _run([NVCC, *flags, source, RECORDER, "-o", folder / "library.so"])[1]


@lru_cache(maxsize=64)
def built(source: Path) -> dict[str, dict[str, Kernel]]:
    """The kernels of a source by architecture and by their mangled names."""
    folder, told = _compiled(source)
    bounds = _bounds(next(folder.glob(f"{source.stem}*.ptx")).read_text())
    kernels: dict[str, dict[str, Kernel]] = {architecture: {} for architecture in ARCHITECTURES}
    for text in re.split(r"Compiling entry function ", told)[1:]:
        name = re.match(r"'(\w+)' for '(\w+)'", text)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        assert name and spills and registers, text
        sizes = int(registers[1]), int(spills[1]) + int(spills[2]), int(shared[1]) if shared else 0
        kernels[name[2]][name[1]] = Kernel(name[1], *sizes, *bounds[name[1]])
    assert all(set(found) == set(bounds) for found in kernels.values())
    return kernels


def _bounds(ptx: str) -> dict[str, tuple[int | None, int | None]]:
    """What __launch_bounds__ says of each kernel."""
    bounds = {}
    for entry in re.split(r"\.entry ", ptx)[1:]:
        head = entry.partition("{")[0]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        product = prod(int(size or 1) for size in threads.groups()) if threads else None
        bounds[head.partition("(")[0].strip()] = (product, int(blocks[1]) if blocks else None)
    return bounds


@lru_cache(maxsize=1 << 16)
def resident(kernel: Kernel, threads: int, shared: int, architecture: str) -> int:
    """How many blocks of a launch a multiprocessor holds at once; `shared`: bytes that the launch adds."""
    warps = -(-threads // 32)
    of_a_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = REGISTERS // SCHEDULERS // of_a_warp * SCHEDULERS // warps
    of_a_block = 1024 + -(-(kernel.shared + shared) // 128) * 128  # the system takes the first kilobyte
    return min(BLOCKS, WARPS // warps, by_registers, SHARED[architecture] // of_a_block)


@lru_cache(maxsize=64)
def instructions(source: Path, architecture: str) -> dict[str, str]:
    """Each kernel's machine code, by its mangled name, as the disassembler writes it."""
    assert DISASSEMBLER is not None
    (binary,) = _compiled(source)[0].glob(f"{source.stem}.compute_{architecture[3:]}.cubin")
    sections = re.split(r"^\s*\.section\s+\.text\.", _run([DISASSEMBLER, binary])[0], flags=re.MULTILINE)[1:]
    return {re.match(r"\w+", section)[0]: section for section in sections}  # type: ignore[index]


@lru_cache(maxsize=64)
def record(source: Path) -> ctypes.CDLL:
    """A library whose launches are written down."""
    code = ctypes.CDLL(str(_compiled(source)[0] / "library.so"))
    code.recorded_launches.restype = ctypes.c_char_p
    declare(code, source)
    return code


def launches(code: ctypes.CDLL) -> list[Launch]:
    """The launches since this was last asked."""
    found = []
    for line in code.recorded_launches().decode().splitlines():
        kernel, *sizes, shared, stream, wrong = line.split("\t")
        grid, block = (tuple(map(int, size.split())) for size in sizes)
        found.append(Launch(kernel, grid, block, int(shared), int(stream), wrong))
    return found
