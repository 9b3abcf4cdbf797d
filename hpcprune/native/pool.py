"""The threads for sparse products: OpenMP's, those that torch itself uses.

Two pools of threads take each other's cores: one still spins while the other starts. So the kernels are given the very
OpenMP library that torch has loaded into this process, by its functions' addresses. Where there is none they start
threads of their own.
"""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path

__all__ = ["pool"]

NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")  # in the order of Pool in kernels/paths.h


class _Pool(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in NAMES]


@lru_cache(maxsize=1)
def _found() -> _Pool | None:
    import torch  # noqa: F401  (its OpenMP library is to be the one that is found)

    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in sorted(set(re.findall(r"/\S*lib(?:g|i)omp\S*\.so\S*", mapped)), key=lambda path: "torch" not in path):
        try:
            code = ctypes.CDLL(path)
            return _Pool(*(ctypes.cast(getattr(code, name), ctypes.c_void_p) for name in NAMES))
        except (OSError, AttributeError):
            continue
    return None


def pool() -> int | None:
    """The address of the `Pool` that kernels take, or None."""
    found = _found()
    return None if found is None else ctypes.addressof(found)
