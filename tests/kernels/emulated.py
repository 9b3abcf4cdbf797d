"""CUDA sources on the CPU: compiled against kernels/emulator, loaded, and run under sanitizers.

A test gives `launch` a library of `load` and numpy's arrays. `under("address", check, 37, 64)` runs the function
`check` of a test module again in a process of its own, where `load` gives a library that AddressSanitizer watches: a
sanitizer must be there before Python is. "address" sees accesses out of bounds and vectors that are not aligned,
"thread" races. Every library is built once a session.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.kernels.signatures import declare

__all__ = [
    "KERNELS",
    "Array",
    "SanitizerError",
    "address",
    "launch",
    "load",
    "needs_emulator",
    "placed",
    "succeed",
    "under",
]

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
COMPILER = shutil.which("g++")
FLAGS = ("-O1", "-g1", "-std=c++17", "-DCUDA_ON_CPU", "-fdata-sections", "-shared", "-fPIC")
SHARED = f"-Wl,-T,{KERNELS / 'emulator/shared.ld'}"
FLAVOURS = {
    "plain": (),
    "address": (
        "-O0",  # optimised it compiles three times as long
        "-fsanitize=address,alignment",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ),
    "thread": ("-fsanitize=thread",),
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "PYTHONMALLOC": "malloc",  # so that AddressSanitizer knows where an array ends
    "OPENBLAS_NUM_THREADS": "1",  # threads that ThreadSanitizer has not seen beginning
}
FLAVOUR, FOLDER = "HPCPRUNE_EMULATED", "HPCPRUNE_EMULATED_FOLDER"  # what a process under a sanitizer is told

needs_emulator = pytest.mark.skipif(
    COMPILER is None or os.uname().machine != "x86_64", reason="the emulator of CUDA needs g++ and an x86-64 CPU"
)

Array = npt.NDArray[Any]


class SanitizerError(AssertionError):
    """A function failed under a sanitizer; the message is what it wrote."""


def load(*sources: Path) -> ctypes.CDLL:
    """A library of these sources, of the sanitizer flavour that this process runs under."""
    code = ctypes.CDLL(str(_built(sources, os.environ.get(FLAVOUR, "plain"))))
    code.cuemu_error.restype = ctypes.c_char_p
    declare(code, *sources)
    return code


def launch(code: ctypes.CDLL, operation: str, *arguments: float | Array | None) -> None:
    """Call hpcprune_cuda_<operation> on the default stream; fail with the emulator's own words unless it succeeded."""
    given = [address(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    succeed(code, getattr(code, f"hpcprune_cuda_{operation}")(*given, None))


def succeed(code: ctypes.CDLL, status: int) -> None:
    """Fail with the emulator's own words unless a launch succeeded."""
    assert status == 0, f"error {status}: {code.cuemu_error().decode()}"


def address(array: Array) -> int:
    return array.ctypes.data


def placed(array: Array, offset: int = 0) -> Array:
    """A copy that begins `offset` bytes after a multiple of 16, as device memory does, and ends where memory ends."""
    memory = np.empty(offset + array.nbytes, np.uint8)
    assert memory.ctypes.data % 16 == 0
    copy = memory[offset:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def under(flavour: str, function: Callable[..., object], *arguments: object, seed: int | None = None) -> None:
    """Call a function of a module, with arguments that JSON can hold, under a sanitizer.

    Raises:
        SanitizerError: it found something, or the function raised.
    """
    assert COMPILER is not None
    runtime = subprocess.run(
        [COMPILER, f"-print-file-name={RUNTIMES[flavour]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    program = (
        "import importlib, json, sys; "
        f"importlib.import_module({function.__module__!r}).{function.__name__}(*json.loads(sys.argv[1]))"
    )
    environ = {**os.environ, **OPTIONS, "LD_PRELOAD": str(Path(runtime).resolve()), "PYTHONPATH": str(ROOT)}
    environ |= {FLAVOUR: flavour, FOLDER: str(_folder())}
    if seed is not None:
        environ["CUEMU_SEED"] = str(seed)
    # ThreadSanitizer cannot start where the kernel scatters memory too widely.
    fixed = ["setarch", "-R"] if flavour == "thread" and shutil.which("setarch") else []
    command = [*fixed, sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    if done.returncode != 0:
        raise SanitizerError(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")


@lru_cache(maxsize=1)
def _folder() -> Path:
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    made = Path(tempfile.mkdtemp(prefix="hpcprune-emulated-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@lru_cache(maxsize=64)
def _built(sources: Sequence[Path], flavour: str) -> Path:
    assert COMPILER is not None
    file = _folder() / f"{'+'.join(source.parent.name + '.' + source.stem for source in sources)}.{flavour}.so"
    if not file.exists():
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        command = [COMPILER, *FLAGS, SHARED, *FLAVOURS[flavour], "-x", "c++", *map(str, sources), "-o", str(unfinished)]
        # The loader needs nothing of a sanitizer that is preloaded here, and the compiler is not to run under it.
        environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(file)
    return file
