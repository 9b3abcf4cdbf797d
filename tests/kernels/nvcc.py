"""CUDA sources compiled by the real nvcc, without a GPU: what ptxas says of each kernel, and launches written down.

`record(source)` gives a library of the real host code over a runtime that runs nothing (recording_cudart.cpp); call its
functions with any sizes and any pointers, and `launches` says which grids they asked for.
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
from pathlib import Path

import pytest

from hpcprune.native.cuda import find_nvcc

__all__ = ["Kernel", "Launch", "compiled", "launches", "needs_nvcc", "record"]

NVCC = find_nvcc(os.environ)
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
STRICT = ("-Xptxas", "-v,-warn-spills", "--Werror", "all-warnings")
RECORDER = Path(__file__).with_name("recording_cudart.cpp")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME, on PATH or from pip")


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


@lru_cache(maxsize=1)
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="hpcprune-nvcc-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _run(arguments: Sequence[str | Path]) -> str:
    assert NVCC is not None
    libraries = NVCC.parent.parent / "lib"  # where pip's nvcc has them
    done = subprocess.run([NVCC, f"-L{libraries}", *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


@lru_cache(maxsize=64)
def compiled(source: Path, architecture: str) -> tuple[Kernel, ...]:
    """The kernels of a source, compiled with every warning an error."""
    folder = _folder() / f"{source.parent.name}.{source.stem}.{architecture}"
    folder.mkdir(exist_ok=True)
    keep = ("--keep", "--keep-dir", folder)
    told = _run([*FLAGS, *STRICT, *keep, f"-arch={architecture}", source, "-o", folder / "library.so"])
    bounds = {}
    for entry in re.split(r"\.entry ", next(folder.glob("*.ptx")).read_text())[1:]:
        head = entry.partition("{")[0]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        product = 1
        for size in threads.groups() if threads else ():
            product *= int(size or 1)
        bounds[head.partition("(")[0].strip()] = (product if threads else None, int(blocks[1]) if blocks else None)
    kernels = []
    for text in re.split(r"Compiling entry function ", told)[1:]:
        name = re.match(r"'(\w+)'", text)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        shared = re.search(r"(\d+) bytes smem", text)
        assert name and spills and registers, text
        spilled = int(spills[1]) + int(spills[2])
        kernels.append(Kernel(name[1], int(registers[1]), spilled, int(shared[1]) if shared else 0, *bounds[name[1]]))
    assert {kernel.name for kernel in kernels} == set(bounds)
    return tuple(kernels)


@lru_cache(maxsize=64)
def record(source: Path) -> ctypes.CDLL:
    """A library whose launches are written down."""
    file = _folder() / f"{source.parent.name}.{source.stem}.recorded.so"
    # Its own runtime, whatever other one has been loaded.
    own = ["-cudart", "none", "-Xlinker", "-Bsymbolic", "-Xlinker", "-z,defs"]
    _run([*FLAGS, *own, "-arch=sm_80", source, RECORDER, "-o", file])
    code = ctypes.CDLL(str(file))
    code.recorded_launches.restype = ctypes.c_char_p
    return code


def launches(code: ctypes.CDLL) -> list[Launch]:
    """The launches since this was last asked."""
    found = []
    for line in code.recorded_launches().decode().splitlines():
        kernel, *sizes, shared, stream, wrong = line.split("\t")
        grid, block = (tuple(map(int, size.split())) for size in sizes)
        found.append(Launch(kernel, grid, block, int(shared), int(stream), wrong))
    return found
