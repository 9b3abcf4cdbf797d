"""The CUDA kernels: compiled once into the user's cache for the GPU that is there, loaded, and their errors raised.

nvcc is looked for in CUDA_HOME, on PATH, and where pip's nvidia-cuda-nvcc puts it. One library holds all kernels for
one architecture; it needs neither torch's headers nor its version of CUDA, since a stream is all that the two share.
Where no library can be had, `library` says why, and the caller goes on with torch.

`HPCPRUNE_CUDA` is `off`, for no kernels of ours at all, or the file of a library to load instead, made elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hpcprune.errors import HpcpruneError
from hpcprune.native.compiling import CACHE_VARIABLES, Recipe, UnavailableError, find_or_build, kernel_sources
from hpcprune.native.cuda_functions import declare

__all__ = ["CudaError", "CudaLibrary", "UnavailableError", "check", "describe", "find_nvcc", "find_tool", "library"]

FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "--threads", "0")
LONGEST_COMPILE = 600.0  # seconds

# CUDA's numbers for what a launch meets, and what to do about it; its own names for them are in a library that need not
# be there.
ERRORS = {
    1: "invalid value",
    2: "out of memory",
    9: "a grid or a block beyond CUDA's limits",
    35: "the driver is older than nvcc: use an nvcc of the driver's version, see nvidia-smi",
    98: "invalid device function",
    100: "no GPU",
    209: "the library has no code for this GPU: delete it, or unset HPCPRUNE_CUDA",
    700: "an access out of bounds, perhaps of a kernel before",
    701: "too many registers or too much shared memory for this GPU",
    716: "a misaligned address",
    719: "the kernel failed",
}


class CudaError(HpcpruneError, RuntimeError):
    """A kernel could not be launched, or failed."""


@dataclass(frozen=True)
class CudaLibrary:
    """The kernels in use, and the file that they are in; `reason` says why these."""

    file: Path
    reason: str
    code: ctypes.CDLL


def library(architecture: str | None = None) -> CudaLibrary:
    """The CUDA kernels, compiled first if need be (a minute or less, once a machine).

    Args:
        architecture: as nvcc has it, `sm_90`; torch's current GPU's if None.

    Raises:
        UnavailableError: there is no GPU, no nvcc, or it cannot compile.
        HpcpruneError: HPCPRUNE_CUDA names a file that cannot be loaded, or that lacks a function.
    """
    environ = _environment()
    if architecture is None and not environ.get("HPCPRUNE_CUDA"):
        architecture = _architecture()
    found = _library(tuple(environ.items()), architecture)
    if isinstance(found, str):
        raise UnavailableError(found)
    return found


def describe(architecture: str | None = None) -> str:
    """The library that was chosen and why, in one line, or why there is none; and how to choose another."""
    try:
        chosen = library(architecture).reason
    except (UnavailableError, HpcpruneError) as why:
        chosen = f"none: {why}"
    return f"{chosen}; HPCPRUNE_CUDA=off takes none, HPCPRUNE_CUDA=FILE another one"


def check(status: int, what: str) -> None:
    """Raise unless a launcher returned 0.

    Args:
        status: a cudaError_t.
        what: the kernel and the shapes it was given.
    """
    if status != 0:
        raise CudaError(f"{what}: CUDA error {status} ({ERRORS.get(status, 'see cudaError_t in its manual')})")


def find_nvcc(environ: Mapping[str, str]) -> Path | None:
    """nvcc of CUDA_HOME, on PATH, or of pip's package; None if there is none."""
    return find_tool("nvcc", environ)


def find_tool(name: str, environ: Mapping[str, str]) -> Path | None:
    """A program of CUDA's, looked for as nvcc is."""
    return next((file for file in _candidates(name, environ) if os.access(file, os.X_OK)), None)


def _candidates(name: str, environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("CUDA_HOME"):
        yield Path(environ["CUDA_HOME"]) / "bin" / name
    on_path = shutil.which(name, path=environ.get("PATH"))
    if on_path:
        yield Path(on_path)
    namespace = importlib.util.find_spec("nvidia")
    for folder in (namespace.submodule_search_locations or ()) if namespace else ():
        yield from sorted(Path(folder).glob(f"cu*/bin/{name}"), reverse=True)


def _environment() -> dict[str, str]:
    names = ("HPCPRUNE_CUDA", *CACHE_VARIABLES, "CUDA_HOME", "PATH")
    return {name: os.environ[name] for name in names if name in os.environ}


def _architecture() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UnavailableError(f"no GPU (torch {torch.__version__}, {built}, sees none)")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@lru_cache(maxsize=8)
def _library(environment: tuple[tuple[str, str], ...], architecture: str | None) -> CudaLibrary | str:
    """The library, or why there is none: neither is looked for twice."""
    environ = dict(environment)
    chosen = environ.get("HPCPRUNE_CUDA", "")
    if chosen == "off":
        return "turned off by HPCPRUNE_CUDA=off"
    if chosen:
        return CudaLibrary(Path(chosen), f"{chosen}: chosen by HPCPRUNE_CUDA", _load_chosen(chosen))
    try:
        units, headers = kernel_sources(".cu")
        nvcc = find_nvcc(environ)
        flags = [*FLAGS, f"-arch={architecture}"]
        missing = "no nvcc (neither in CUDA_HOME nor on PATH): pip install nvidia-cuda-nvcc, or set CUDA_HOME"
        recipe = Recipe(f"cuda-{architecture}", flags, units, headers, LONGEST_COMPILE)
        file, built = find_or_build(recipe, environ, _command(nvcc) if nvcc else None, missing)
    except UnavailableError as why:
        return str(why)
    try:
        return CudaLibrary(file, f"{architecture}: {built} {file}", _load(str(file)))
    except (OSError, AttributeError) as error:
        return f"cannot load {file} ({error}): delete it and try again"


def _load_chosen(file: str) -> ctypes.CDLL:
    """The library that HPCPRUNE_CUDA names."""
    try:
        return _load(file)
    except OSError as error:
        raise HpcpruneError(f"HPCPRUNE_CUDA={file}: {error}; unset it, or name a library or off") from None
    except AttributeError as error:
        raise HpcpruneError(
            f"HPCPRUNE_CUDA={file}: it has no function {error.name}, so it is no library of this version's kernels; "
            "make one with this version of hpcprune (docs/kernels.md), or unset it"
        ) from None


def _load(file: str) -> ctypes.CDLL:
    code = ctypes.CDLL(file)
    declare(code)
    return code


def _command(nvcc: Path) -> list[str]:
    # pip's package keeps the libraries in lib, where nvcc looks in lib64 alone.
    libraries = nvcc.parent.parent / "lib"
    return [str(nvcc), f"-L{libraries}"] if libraries.is_dir() else [str(nvcc)]
