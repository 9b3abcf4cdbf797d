"""What is installed and what the machine has: versions, compiler, disk, cores, CUDA, Horovod."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import numpy as np

from hpcprune.doctor.command import answer
from hpcprune.doctor.finding import Finding
from hpcprune.errors import HpcpruneError
from hpcprune.native.library import COMPILERS
from hpcprune.version import __version__
from hpcprune.world import World, threads_of_a_rank

__all__ = ["check_cores", "check_cuda", "check_disk", "check_horovod", "check_versions"]


def check_versions(world: World) -> list[Finding]:
    import h5py
    import torch

    compiler = next((found for name in (os.environ.get("CXX", ""), *COMPILERS) if (found := shutil.which(name))), "")
    findings = [
        Finding("ok", "hpcprune", f"{__version__}, python {platform.python_version()}, {platform.platform()}"),
        Finding("ok", "libraries", f"torch {torch.__version__}, numpy {np.__version__}"),
        Finding("ok", "HDF5", f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}"),
    ]
    if world.comm is not None:
        import mpi4py
        from mpi4py import MPI

        library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip(" \0")
        findings.append(Finding("ok", "MPI", f"mpi4py {mpi4py.__version__}, {library}"))
    if compiler:
        findings.append(
            Finding("ok", "compiler", f"{compiler}: {(answer(compiler, '--version') or '?').splitlines()[0]}")
        )
    else:
        findings.append(Finding("warn", "compiler", "none found: numpy takes the kernels' place", "install g++"))
    return findings


def check_disk(world: World) -> list[Finding]:
    """Whether the current folder, where runs/ will be, can be written to, and how much room there is."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    room = f"{here}: {free / 1e9:.1f} GB free"
    if not os.access(here, os.W_OK):
        return [Finding("warn", "disk", f"{here} cannot be written to", "run elsewhere, or choose a folder with --out")]
    if free < 1e9:
        return [Finding("warn", "disk", room, "a run keeps some checkpoints: make room, or choose a disk with --out")]
    return [Finding("ok", "disk", room)]


def check_cores(world: World) -> list[Finding]:
    """How the ranks of a host share its cores."""
    bound, cores, ranks = len(os.sched_getaffinity(0)), os.cpu_count() or 1, world.local_size
    threads = threads_of_a_rank(world)
    omp = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    said = f"{ranks} rank{'s' * (ranks > 1)} on {cores} cores; this one may use {bound}, takes {threads} threads{omp}"
    if ranks > cores:
        return [Finding("warn", "cores", said, "more ranks than cores are slower: start fewer")]
    return [Finding("ok", "cores", said)]


def check_cuda(world: World) -> list[Finding]:
    """The GPUs that torch sees, and which kernels of ours there are for them."""
    import torch

    from hpcprune.native.cuda import UnavailableError, describe, library

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        try:
            library()
        except UnavailableError:
            pass  # there need not be one; `describe` says why there is none
        except HpcpruneError as error:
            return [Finding("warn", "CUDA", f"{torch.version.cuda}: {names}; no kernels", str(error))]
        return [Finding("ok", "CUDA", f"{torch.version.cuda}: {names}; kernels {describe()}")]
    if torch.version.cuda is None:
        why = "this torch is built for the CPU (an NVIDIA GPU needs another: https://pytorch.org/get-started)"
    else:
        why = f"torch is built for CUDA {torch.version.cuda}, but sees no GPU (nvidia-smi shows what the driver sees)"
    return [Finding("ok", "CUDA", f"not used: {why}")]


def check_horovod(world: World) -> list[Finding]:
    """Whether Horovod is installed: it is optional."""
    if importlib.util.find_spec("horovod") is None:
        how = "to build it: HOROVOD_WITH_PYTORCH=1 pip install --no-build-isolation horovod==0.28.1"
        return [Finding("ok", "Horovod", f"not installed, and not needed ({how})")]
    return [Finding("ok", "Horovod", importlib.metadata.version("horovod"))]
