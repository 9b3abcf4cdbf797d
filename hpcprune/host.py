"""What a report says of the machine: names, versions, memory."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path

from hpcprune.version import __version__

__all__ = ["cpu_name", "peak_memory", "versions"]


def peak_memory() -> int:
    """The most memory, in bytes, that this process has had at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    found = {"hpcprune": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "h5py", "mpi4py"):
        found[package] = metadata.version(package)
    return found
