"""Compiling kernels once on the user's machine, into the user's cache: what C++ and CUDA have in common.

Many ranks start at once, so one compiles under a lock while the others wait, and a library appears under its name only
when it is whole. A library's name says which sources, flags and compiler it was made with. `HPCPRUNE_CACHE` moves the
cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hpcprune.lock import hold

__all__ = ["CACHE_VARIABLES", "Recipe", "UnavailableError", "find_or_build", "kernel_sources"]

CACHE_VARIABLES = ("HPCPRUNE_CACHE", "XDG_CACHE_HOME", "HOME")


class UnavailableError(Exception):
    """Why there is no compiled library; the reason is shown to whoever asks."""


@dataclass(frozen=True)
class Recipe:
    """What a library is made of.

    `units` are compiled, `headers` read by them. `longest` is how many seconds compiling may take, and how long a rank
    waits for another one's compiler.
    """

    name: str
    flags: Sequence[str]
    units: Sequence[Path]
    headers: Sequence[Path]
    longest: float


def kernel_sources(suffix: str, package: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The kernels' sources that end in `suffix`, and all headers.

    They are inside an installed package (`hpcprune/kernels`), or beside it in a checkout.
    """
    package = package or Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        found = sorted(folder.glob(f"*/*{suffix}"))
        if found:
            return found, sorted([*folder.glob("*.*h"), *folder.glob("*/*.*h")])
    raise UnavailableError(f"no kernels/*/*{suffix} in {package} or beside it: reinstall hpcprune")


def find_or_build(
    recipe: Recipe, environ: Mapping[str, str], compiler: Sequence[str] | None, missing: str
) -> tuple[Path, str]:
    """The library's file, and "cached in" or "compiled into".

    Args:
        recipe: what it is made of.
        environ: where `CACHE_VARIABLES` are looked up.
        compiler: the words of a command; None if there is none here.
        missing: what to say then, unless somebody else has left a library.
    """
    content = hashlib.sha256(repr((tuple(recipe.flags), platform.system(), platform.machine())).encode())
    for source in (*recipe.units, *recipe.headers):
        content.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = _cache(environ) / f"{recipe.name}-{platform.machine()}-{content.hexdigest()[:16]}"
    if compiler is None:
        # Compute nodes often lack the compiler that the login node has: what it left in a shared home serves.
        for file in sorted(folder.glob("*.so")):
            return file, "cached in"
        raise UnavailableError(missing)
    file = folder / f"{hashlib.sha256(_version(compiler, recipe.longest).encode()).hexdigest()[:16]}.so"
    if file.exists():
        return file, "cached in"
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _lock(folder / "lock", recipe.longest):
            if file.exists():
                return file, "cached in"
            _build(compiler, recipe, file)
            return file, "compiled into"
    except OSError as error:
        raise UnavailableError(
            f"cannot write compiled kernels to {folder} ({error.strerror}): set HPCPRUNE_CACHE"
        ) from None


def _cache(environ: Mapping[str, str]) -> Path:
    if environ.get("HPCPRUNE_CACHE"):
        return Path(environ["HPCPRUNE_CACHE"])
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "hpcprune"
    home = environ.get("HOME")
    if not home:
        raise UnavailableError("no HOME to keep compiled kernels in: set HPCPRUNE_CACHE to a folder")
    return Path(home) / ".cache" / "hpcprune"


def _version(compiler: Sequence[str], longest: float) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=longest)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{' '.join(compiler)} --version: {error}") from None
    return done.stdout


@contextmanager
def _lock(path: Path, longest: float) -> Iterator[None]:
    """Hold a file's lock. Where the file system has none, go on without: two would compile the same thing twice."""
    with path.open("w") as file:
        with suppress(OSError):
            if not hold(file, longest):
                waited = f"waited {longest:g} s for another process to compile; is {path} held by a dead host?"
                raise UnavailableError(waited)
        yield


def _build(compiler: Sequence[str], recipe: Recipe, target: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=target.parent)
    os.close(handle)
    command = [*compiler, *recipe.flags, *map(str, recipe.units), "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=recipe.longest)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise UnavailableError(f"{' '.join(compiler)} could not compile the kernels ({first.strip()})")
        Path(name).replace(target)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{' '.join(compiler)} took longer than {recipe.longest:g} s") from None
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()
