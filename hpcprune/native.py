"""The C++ kernels: found, compiled once into the user's cache, loaded; and numpy in their place where that fails.

Compiling on the user's machine needs no wheel a platform and fits the compiler that is there. One library serves every
CPU of an architecture: which instructions a call may use is asked of the CPU at run time. Many ranks start at once, so
one compiles under a lock while the others wait, and a library appears under its name only when it is whole.

Every path gives the same bits, so it does not matter for a result which one a rank has come to; `describe` says which
and why. `HPCPRUNE_NATIVE` forces one of numpy, portable, avx2 and avx512; `HPCPRUNE_CACHE` moves the cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcprune.errors import HpcpruneError

__all__ = [
    "Around",
    "Library",
    "MaskError",
    "View",
    "count_around",
    "describe",
    "gather",
    "histogram",
    "library",
    "pack",
    "popcount",
    "scatter",
    "to_keys",
    "zero_pruned",
]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]

PATHS = ("portable", "avx2", "avx512")  # in the order of the numbers that the kernels give them
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "c++", "clang++")
LONGEST_COMPILE = 180.0  # seconds; also how long a rank waits for another one's compiler
BLOCK = 1 << 20  # elements that the numpy path takes at a time; a multiple of 8


class MaskError(HpcpruneError, ValueError):
    """Mask bits do not fit the values they are meant for."""


class UnavailableError(Exception):
    """Why there is no compiled library; the reason is shown by `describe`."""


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
    names = ("HPCPRUNE_NATIVE", "HPCPRUNE_CACHE", "XDG_CACHE_HOME", "HOME", "CXX", "PATH")
    return _library(tuple((name, os.environ[name]) for name in names if name in os.environ))


@lru_cache(maxsize=8)
def _library(environment: tuple[tuple[str, str], ...]) -> Library:
    environ = dict(environment)
    forced = environ.get("HPCPRUNE_NATIVE", "")
    allowed = ("numpy", *PATHS)
    if forced and forced not in allowed:
        raise HpcpruneError(f"HPCPRUNE_NATIVE={forced}: there are {', '.join(allowed)}; unset it to let the CPU decide")
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
    package = package or Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        found = sorted(folder.glob("*/*.cpp"))
        if found:
            return found + sorted(folder.glob("*.h")) + sorted(folder.glob("*/*.h"))
    raise UnavailableError(f"no kernels/*/*.cpp in {package} or beside it: reinstall hpcprune")


def _cache(environ: Mapping[str, str]) -> Path:
    if environ.get("HPCPRUNE_CACHE"):
        return Path(environ["HPCPRUNE_CACHE"])
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "hpcprune"
    home = environ.get("HOME")
    if not home:
        raise UnavailableError("no HOME to keep compiled kernels in: set HPCPRUNE_CACHE to a folder")
    return Path(home) / ".cache" / "hpcprune"


def _compiler(environ: Mapping[str, str]) -> list[str] | None:
    candidates = [environ["CXX"].split()] if environ.get("CXX", "").strip() else [[name] for name in COMPILERS]
    return next((words for words in candidates if shutil.which(words[0], path=environ.get("PATH"))), None)


def _version(compiler: Sequence[str]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=LONGEST_COMPILE)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{' '.join(compiler)} --version: {error}") from None
    return done.stdout


def _find_or_build(environ: Mapping[str, str]) -> tuple[Path, str]:
    """The library's file, and "cached in" or "compiled into"."""
    files = sources()
    content = hashlib.sha256(repr((FLAGS, platform.system(), platform.machine())).encode())
    for source in files:
        content.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = _cache(environ) / f"kernels-{platform.machine()}-{content.hexdigest()[:16]}"
    compiler = _compiler(environ)
    if compiler is None:
        # Compute nodes often lack the compiler that the login node has: what it left in a shared home serves.
        for file in sorted(folder.glob("*.so")):
            return file, "cached in"
        named = f"CXX={environ['CXX']} is not" if environ.get("CXX") else f"none of {', '.join(COMPILERS)} is"
        raise UnavailableError(f"no C++ compiler ({named} on PATH): install g++, or set CXX")
    file = folder / f"{hashlib.sha256(_version(compiler).encode()).hexdigest()[:16]}.so"
    if file.exists():
        return file, "cached in"
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _lock(folder / "lock"):
            if file.exists():
                return file, "cached in"
            _build(compiler, [source for source in files if source.suffix == ".cpp"], file)
            return file, "compiled into"
    except OSError as error:
        raise UnavailableError(
            f"cannot write compiled kernels to {folder} ({error.strerror}): set HPCPRUNE_CACHE"
        ) from None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock. Where the file system has none, go on without: two would compile the same thing twice."""
    end = time.monotonic() + LONGEST_COMPILE
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    waited = (
                        f"waited {LONGEST_COMPILE:g} s for another process to compile; is {path} held by a dead host?"
                    )
                    raise UnavailableError(waited) from None
                time.sleep(0.05)
            except OSError:
                break
        yield


def _build(compiler: Sequence[str], files: Sequence[Path], target: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=target.parent)
    os.close(handle)
    command = [*compiler, *FLAGS, *map(str, files), "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_COMPILE)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise UnavailableError(f"{' '.join(compiler)} could not compile the kernels ({first.strip()})")
        Path(name).replace(target)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{' '.join(compiler)} took longer than {LONGEST_COMPILE:g} s") from None
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()


def _load(file: Path) -> ctypes.CDLL:
    try:
        code = ctypes.CDLL(str(file))
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        arrays = [pointer, pointer, long]
        for name, result, arguments in (
            ("best_path", integer, []),
            ("count_around", integer, [integer] * 3 + arrays + [long] * 3 + [pointer, long, pointer, integer]),
            ("histogram", integer, [integer] * 2 + arrays + [long] * 2 + [integer, long, pointer, integer]),
            ("pack", long, [integer] * 3 + arrays + [long] * 2 + [pointer, integer]),
            ("gather", integer, [integer] * 2 + [pointer, long, pointer, pointer, integer]),
            ("scatter", integer, [integer] * 2 + [pointer, long, pointer, pointer, integer]),
            ("zero_pruned", integer, [integer, pointer, long, pointer, integer]),
            ("popcount", long, [pointer, long]),
        ):
            function = getattr(code, f"hpcprune_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"cannot load {file} ({error}): delete it and try again") from None
    return code


def threads_or_default(threads: int | None) -> int:
    """The threads a call may use: as many as this process has cores, unless the caller says."""
    return len(os.sched_getaffinity(0)) if threads is None else max(1, threads)


# Counting over scores. `parts` are flat arrays of one signed integer dtype: the bits of floats, or keys made of them.


class View(IntEnum):
    """What the integers of an array stand for, which says how they become keys that are ordered as the scores are."""

    SIGNED = 0  # the bits of floats, ranked by value
    ABSOLUTE = 1  # the bits of floats, ranked by magnitude
    KEYS = 2  # keys already


@dataclass(frozen=True)
class Around:
    """How many keys lie around a bracket, and those strictly inside it (None if they were more than allowed).

    If `nan`, there is a NaN among the scores and the rest means nothing.
    """

    below: int
    at_lo: int
    between: int
    at_hi: int
    nan: bool
    keys: Array | None


def to_keys(integers: Array, view: View) -> Array:
    """Integers that are ordered as the scores are: -0 equals +0, a NaN's magnitude lies above infinity's."""
    if view == View.KEYS:
        return integers
    magnitude = integers & np.iinfo(integers.dtype).max
    return magnitude if view == View.ABSOLUTE else np.where(integers < 0, -magnitude, magnitude)


def count_around(
    parts: Sequence[Array], view: View, lo: int, hi: int, infinity: int, capacity: int, threads: int | None = None
) -> Around:
    """Count keys below `lo`, at it, between and at `hi`; collect up to `capacity` of those between, in any order.

    Keys at the two ends are counted and not collected, so that ties there cost nothing. `infinity` is the largest
    magnitude that is not NaN.
    """
    dtype = parts[0].dtype if parts else np.dtype(np.int64)
    chosen = library()
    if chosen.code is not None:
        counts, keys = np.zeros(5, np.int64), np.empty(capacity, dtype)
        arrays = _Arrays(parts)
        bracket = (lo, hi, infinity, keys.ctypes.data, capacity, counts.ctypes.data)
        chosen.code.hpcprune_count_around(
            chosen.level, 8 * dtype.itemsize, view, *arrays.arguments, *bracket, threads_or_default(threads)
        )
        below, at_lo, between, at_hi, nan = counts.tolist()
        return Around(below, at_lo, between, at_hi, bool(nan), keys[:between] if between <= capacity else None)
    below = at_lo = between = at_hi = 0
    nan = False
    found: list[Array] = []
    for block in _in_blocks(parts):
        keys = to_keys(block, view)
        if view != View.KEYS:
            nan = nan or bool(((keys > infinity) | (keys < -infinity)).any())
        inside = keys[(keys > lo) & (keys < hi)]
        below += int(np.count_nonzero(keys < lo))
        at_lo += int(np.count_nonzero(keys == lo))
        at_hi += int(np.count_nonzero(keys == hi)) if hi != lo else 0
        between += inside.size
        if between <= capacity:
            found.append(inside)
    collected = np.concatenate([np.empty(0, dtype), *found]) if between <= capacity else None
    return Around(below, at_lo, between, at_hi, nan, collected)


def histogram(
    parts: Sequence[Array], view: View, lo: int, hi: int, shift: int, bins: int, threads: int | None = None
) -> npt.NDArray[np.int64]:
    """How many keys with lo <= key <= hi lie in each bin (key - lo) >> shift, of which there must be enough."""
    result = np.zeros(bins, np.int64)
    code = library().code
    if code is not None and parts:
        arrays = _Arrays(parts)
        place = (lo, hi, shift, bins, result.ctypes.data)
        code.hpcprune_histogram(8 * parts[0].itemsize, view, *arrays.arguments, *place, threads_or_default(threads))
        return result
    for block in _in_blocks(parts):
        keys = to_keys(block, view)
        inside = keys[(keys >= lo) & (keys <= hi)].astype(np.int64)
        # The difference of two 64-bit keys needs all 64 bits, so it is taken without a sign.
        distance = inside.view(np.uint64) - np.uint64(lo % (1 << 64))
        result += np.bincount((distance >> np.uint64(shift)).astype(np.int64), minlength=bins)
    return result


def pack(
    parts: Sequence[Array],
    masks: Sequence[Bits],
    view: View,
    threshold: int,
    cut: int,
    threads: int | None = None,
) -> int:
    """Write each part's mask: a bit is 1 where the key is above the threshold, or a tie after the first `cut` ties.

    Args:
        masks: ceil(size / 8) bytes for each part, contiguous; every byte is written.
        cut: counted over the parts in order; negative cuts every tie.

    Returns:
        how much of `cut` is left, for the parts that come next.
    """
    chosen = library()
    if chosen.code is not None and parts:
        arrays = _Arrays(parts)
        targets = np.array([mask.ctypes.data for mask in masks], np.uintp)
        place = (threshold, cut, targets.ctypes.data)
        return int(
            chosen.code.hpcprune_pack(
                chosen.level, 8 * parts[0].itemsize, view, *arrays.arguments, *place, threads_or_default(threads)
            )
        )
    for part, mask in zip(parts, masks, strict=True):
        for start in range(0, part.size, BLOCK):
            keys = to_keys(part[start : start + BLOCK], view)
            survives = keys > threshold
            if cut >= 0:
                ties = keys == threshold
                if cut > 0:
                    first = np.flatnonzero(ties)[:cut]
                    ties[first] = False
                    cut -= first.size
                survives |= ties
            mask[start // 8 : (start + BLOCK) // 8] = np.packbits(survives, bitorder="little")
    return cut


class _Arrays:
    """Arrays as the kernels take them: addresses, lengths, how many. Lives as long as the call that it is passed to."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self._addresses = np.array([part.ctypes.data for part in parts], np.uintp)
        self._lengths = np.array([part.size for part in parts], np.int64)
        self.arguments = (self._addresses.ctypes.data, self._lengths.ctypes.data, len(parts))


def _in_blocks(parts: Sequence[Array]) -> Iterator[Array]:
    for part in parts:
        for start in range(0, part.size, BLOCK):
            yield part[start : start + BLOCK]


# Survivors by mask bits. `bits` are packed masks: bit i of byte j is element 8 j + i, 1 = survives, padding bits 0.
# A large array may be taken in pieces that start at multiples of 8.


def popcount(bits: Bits) -> int:
    """How many bits are 1 in a uint8 array."""
    bits = _as_bits(bits)
    code = library().code
    if code is not None:
        return int(code.hpcprune_popcount(bits.ctypes.data, bits.size))
    table = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
    return sum(int(table[bits[i : i + BLOCK]].sum(dtype=np.int64)) for i in range(0, bits.size, BLOCK))


def gather(values: Array, bits: Bits, threads: int | None = None) -> Array:
    """The elements of `values` whose bit is 1, in order.

    Args:
        values: 1-D, elements of 2, 4 or 8 bytes of any dtype (bfloat16 as uint16).
        bits: uint8, ceil(len(values) / 8) bytes.
        threads: as many as this process has cores if None.

    Returns:
        a new 1-D array of the same dtype, popcount(bits) long.

    Raises:
        MaskError: lengths disagree, or a padding bit is 1.
    """
    values = _as_elements(np.ascontiguousarray(values))
    bits = _check_bits(bits, values.size)
    result = np.empty(popcount(bits), values.dtype)
    chosen = library()
    if chosen.code is not None:
        chosen.code.hpcprune_gather(
            chosen.level,
            values.itemsize,
            values.ctypes.data,
            values.size,
            bits.ctypes.data,
            result.ctypes.data,
            threads_or_default(threads),
        )
        return result
    done = 0
    for start, stop, ones in _blocks(bits, values.size):
        here = values[start:stop][ones]
        result[done : done + here.size] = here
        done += here.size
    return result


def scatter(survivors: Array, bits: Bits, count: int, threads: int | None = None) -> Array:
    """The opposite of `gather`: `count` elements, the survivors where the bit is 1, in order, and zero elsewhere.

    Args:
        survivors: 1-D, popcount(bits) elements of 2, 4 or 8 bytes of any dtype.
        bits: uint8, ceil(count / 8) bytes.
        count: the length of the dense array.
        threads: as many as this process has cores if None.

    Returns:
        a new 1-D array of the survivors' dtype, `count` long.

    Raises:
        MaskError: lengths or counts disagree, or a padding bit is 1.
    """
    survivors = _as_elements(np.ascontiguousarray(survivors))
    bits = _check_bits(bits, count)
    ones = popcount(bits)
    if ones != survivors.size:
        raise MaskError(f"{survivors.size} survivors for a mask with {ones} bits set: they must be as many")
    result = np.empty(count, survivors.dtype)
    chosen = library()
    if chosen.code is not None:
        chosen.code.hpcprune_scatter(
            chosen.level,
            result.itemsize,
            result.ctypes.data,
            count,
            bits.ctypes.data,
            survivors.ctypes.data,
            threads_or_default(threads),
        )
        return result
    done = 0
    for start, stop, kept in _blocks(bits, count):
        here = int(np.count_nonzero(kept))
        result[start:stop] = 0
        result[start:stop][kept] = survivors[done : done + here]
        done += here
    return result


def zero_pruned(values: Array, bits: Bits, threads: int | None = None) -> None:
    """Set the elements of `values` whose bit is 0 to zero, in place (see `gather`; `values` must be contiguous)."""
    if not values.flags.c_contiguous or not values.flags.writeable:
        raise MaskError("values that are not contiguous or not writeable cannot be zeroed in place: pass a copy")
    values = _as_elements(values)
    bits = _check_bits(bits, values.size)
    code = library().code
    if code is not None:
        code.hpcprune_zero_pruned(
            values.itemsize, values.ctypes.data, values.size, bits.ctypes.data, threads_or_default(threads)
        )
        return
    for start, stop, kept in _blocks(bits, values.size):
        values[start:stop][~kept] = 0


def _blocks(bits: Bits, count: int) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    for start in range(0, count, BLOCK):
        stop = min(count, start + BLOCK)
        ones = np.unpackbits(bits[start // 8 : (stop + 7) // 8], count=stop - start, bitorder="little")
        yield start, stop, ones.view(np.bool_)


def _as_elements(array: Array) -> Array:
    if array.ndim != 1 or array.itemsize not in (2, 4, 8):
        raise MaskError(f"shape {array.shape} of {array.dtype}: a 1-D array of 2, 4 or 8 bytes an element is needed")
    return array


def _as_bits(bits: Bits) -> Bits:
    if bits.dtype != np.uint8 or bits.ndim != 1:
        raise MaskError(f"mask of shape {bits.shape} and {bits.dtype}: packed bits are a 1-D uint8 array")
    return np.ascontiguousarray(bits)


def _check_bits(bits: Bits, count: int) -> Bits:
    bits = _as_bits(bits)
    if bits.size != (count + 7) // 8:
        raise MaskError(f"{bits.size} bytes of mask for {count} elements: {(count + 7) // 8} are needed")
    if count % 8 and bits[-1] >> count % 8:
        raise MaskError(f"mask for {count} elements has bits set beyond the last one: they must be 0")
    return bits
