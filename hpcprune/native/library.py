"""The C++ kernels: found, compiled once into the user's cache, loaded; and numpy in their place where that fails.

Compiling on the user's machine (`hpcprune.native.compiling`) needs no wheel a platform and fits the compiler that is
there. One library serves every CPU of an architecture: which instructions a call may use is asked of the CPU at run
time.

Every path gives the same bits of what concerns masks and survivors, so it does not matter which one a rank has come to;
sparse products differ in their last bits, as any two orders of summing do. `describe` says which path was chosen and
why. `HPCPRUNE_NATIVE` forces one of numpy, portable, avx2 and avx512; `HPCPRUNE_CACHE` moves the cache.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hpcprune.errors import HpcpruneError
from hpcprune.native.compiling import CACHE_VARIABLES, Recipe, UnavailableError, find_or_build, kernel_sources

__all__ = ["BLOCK", "CHOICES", "COMPILERS", "Library", "describe", "library", "sources", "threads_or_default"]

PATHS = ("portable", "avx2", "avx512")  # in the order of the numbers that the kernels give them
CHOICES = ("numpy", *PATHS)
PRODUCTS = ("spmm", "bitmap", "two_of_four", "blocks_product", "convolution")  # they take a Product (kernels/product.h)
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "c++", "clang++")
LONGEST_COMPILE = 180.0  # seconds
BLOCK = 1 << 20  # elements that the numpy path takes at a time; a multiple of 8


@dataclass(frozen=True)
class Library:
    """The kernels in use: `path` is numpy, portable, avx2 or avx512; `reason` says why; `code` is None for numpy."""

    path: str
    reason: str
    code: ctypes.CDLL | None

    @property
    def level(self) -> int:
        """The path's number in the kernels."""
        return PATHS.index(self.path)


def describe() -> str:
    """The path that was chosen and why, in one line."""
    chosen = library()
    return f"{chosen.path}: {chosen.reason}"


def library() -> Library:
    """The kernels in use, compiled first if need be (seconds, once a machine).

    Raises:
        HpcpruneError: HPCPRUNE_NATIVE names no path, or one that cannot be had here.
    """
    names = ("HPCPRUNE_NATIVE", *CACHE_VARIABLES, "CXX", "PATH")
    return _library(tuple((name, os.environ[name]) for name in names if name in os.environ))


@lru_cache(maxsize=8)
def _library(environment: tuple[tuple[str, str], ...]) -> Library:
    environ = dict(environment)
    forced = environ.get("HPCPRUNE_NATIVE", "")
    if forced and forced not in CHOICES:
        raise HpcpruneError(f"HPCPRUNE_NATIVE={forced}: there are {', '.join(CHOICES)}; unset it to let the CPU decide")
    if forced == "numpy":
        return Library("numpy", "forced by HPCPRUNE_NATIVE", None)
    try:
        file, built = _find_or_build(environ)
        code = _load(file)
    except UnavailableError as why:
        if forced:
            raise HpcpruneError(f"HPCPRUNE_NATIVE={forced}: {why}; unset it to go on with numpy") from None
        return Library("numpy", f"{why}; results are the same, only slower", None)
    best = PATHS[code.hpcprune_best_path()]
    if forced and PATHS.index(forced) > PATHS.index(best):
        raise HpcpruneError(
            f"HPCPRUNE_NATIVE={forced}: this CPU has {', '.join(PATHS[: PATHS.index(best) + 1])}; unset it"
        )
    why_path = "forced by HPCPRUNE_NATIVE" if forced else "the best this CPU has"
    return Library(forced or best, f"{why_path}; {built} {file}", code)


def sources(package: Path | None = None) -> list[Path]:
    """The kernels' sources: inside an installed package (`hpcprune/kernels`), or beside it in a checkout."""
    units, headers = kernel_sources(".cpp", package)
    return units + headers


def _compiler(environ: Mapping[str, str]) -> list[str] | None:
    candidates = [environ["CXX"].split()] if environ.get("CXX", "").strip() else [[name] for name in COMPILERS]
    return next((words for words in candidates if shutil.which(words[0], path=environ.get("PATH"))), None)


def _find_or_build(environ: Mapping[str, str]) -> tuple[Path, str]:
    """The library's file, and "cached in" or "compiled into"."""
    named = f"CXX={environ['CXX']} is not" if environ.get("CXX") else f"none of {', '.join(COMPILERS)} is"
    missing = f"no C++ compiler ({named} on PATH): install g++, or set CXX"
    recipe = Recipe("kernels", FLAGS, *kernel_sources(".cpp"), LONGEST_COMPILE)
    return find_or_build(recipe, environ, _compiler(environ), missing)


def _load(file: Path) -> ctypes.CDLL:
    try:
        code = ctypes.CDLL(str(file))
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        arrays = [pointer, pointer, long]
        path, array = [integer] * 2, [pointer, long]
        gradient = [long] + array * 2 + [integer, pointer]
        for name, result, arguments in (
            ("best_path", integer, []),
            ("count_around", integer, [integer] * 3 + arrays + [long] * 3 + [pointer, long, pointer, integer]),
            ("histogram", integer, [integer] * 2 + arrays + [long] * 2 + [integer, long, pointer, integer]),
            ("pack", long, [integer] * 3 + arrays + [long] * 2 + [pointer, integer]),
            ("gather", integer, [integer] * 2 + [pointer, long, pointer, pointer, integer]),
            ("scatter", integer, [integer] * 2 + [pointer, long, pointer, pointer, integer]),
            ("update", integer, [integer] * 2 + [pointer, long, pointer, pointer, integer]),
            ("popcount", long, [pointer, long]),
            ("panels_bytes", long, [pointer, long, long, integer, pointer]),
            ("panels_fill", None, [pointer, long, long, integer, long, pointer, pointer]),
            ("panels_refill", None, [pointer, long, integer, pointer, long, pointer, integer, pointer]),
            *((name, integer, [pointer]) for name in PRODUCTS),
            ("sddmm", integer, path + array * 3 + gradient),
            ("blocks_gradient", integer, path + [long] + array * 4 + gradient),
            ("bitmap_tiles_plan", long, [pointer, long, long, pointer, pointer]),
            ("bitmap_tiles_fill", None, [pointer, long, long, pointer, pointer, pointer, integer]),
        ):
            function = getattr(code, f"hpcprune_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"cannot load {file} ({error}): delete it and try again") from None
    return code


def threads_or_default(threads: int | None) -> int:
    """The threads a call may use: as many as this process has cores, unless the caller says."""
    return len(os.sched_getaffinity(0)) if threads is None else max(1, threads)
