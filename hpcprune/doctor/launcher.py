"""What starts the ranks: the launcher's word about them, mpirun and Slurm, held against the MPI that mpi4py uses."""

from __future__ import annotations

import os
import re
import shutil

from hpcprune.doctor.command import answer
from hpcprune.doctor.finding import Finding
from hpcprune.errors import WorldError
from hpcprune.world import SIZE_VARIABLES, World

__all__ = ["check_launcher", "check_slurm", "compare_mpirun", "judge_srun"]


def check_launcher(world: World) -> list[Finding]:
    """What the launcher says against what MPI sees, and whether mpirun is the one of the MPI that mpi4py uses."""
    told = [f"{name}={os.environ[name]}" for name in (*SIZE_VARIABLES, "SLURM_JOB_ID") if name in os.environ]
    said = f"{', '.join(told) or 'started without a launcher'}; MPI sees {world.size} rank{'s' * (world.size > 1)}"
    try:
        world.check_size()
        findings = [Finding("ok", "launcher", said)]
    except WorldError as error:
        findings = [Finding("FAIL", "launcher", said, str(error))]
    if world.comm is None or world.rank:
        return findings
    from mpi4py import MPI

    return [*findings, compare_mpirun(shutil.which("mpirun"), MPI.Get_library_version())]


def compare_mpirun(mpirun: str | None, library: str) -> Finding:
    """Whether the `mpirun` on PATH belongs to the MPI `library` (its version text) that mpi4py has loaded."""
    ours = _mpi_name(library)
    if mpirun is None:
        fix = f"put the mpirun of {ours} on PATH, or launch with srun"
        return Finding("warn", "mpirun", "not on PATH", fix)
    theirs = _mpi_name(answer(mpirun, "--version") or "")
    if ours.split()[0] != theirs.split()[0] and "unknown" not in ours + theirs:
        fix = "each rank would be alone: put the mpirun of mpi4py's MPI first on PATH"
        return Finding("FAIL", "mpirun", f"{mpirun} is of {theirs}, mpi4py uses {ours}", fix)
    if ours != theirs:
        fix = f"if a run hangs or its ranks are alone, put the mpirun of {ours} first on PATH"
        return Finding("warn", "mpirun", f"{mpirun} is of {theirs}, mpi4py uses {ours}", fix)
    return Finding("ok", "mpirun", f"{mpirun}, of {theirs} as mpi4py")


def _mpi_name(text: str) -> str:
    """`OpenMPI 5.0.11`, `MPICH 4.2.3`: family and version out of what a library or an mpirun says of itself."""
    if found := re.search(r"(?:Open MPI\)?|OpenRTE\)?) v?(\d+[\d.]*)", text):
        return f"OpenMPI {found[1].rstrip('.')}"
    if found := re.search(r"Intel\(R\) MPI Library[^\d]*(\d+[\d.]*)", text):
        return f"IntelMPI {found[1].rstrip('.')}"
    if found := re.search(
        r"(?:MPICH Version|MVAPICH2? Version|HYDRA build details:\s*Version)\s*:\s*(\d+[\d.]*)", text
    ):
        return f"MPICH {found[1].rstrip('.')}"
    return f"unknown ({' '.join(text.split())[:60] or 'it does not say'})"


def check_slurm(world: World) -> list[Finding]:
    """Whether there is Slurm, and whether its srun can start the ranks of the MPI that mpi4py uses."""
    if world.rank:
        return []
    commands = {name: shutil.which(name) for name in ("sbatch", "srun")}
    missing = [name for name, path in commands.items() if path is None]
    if len(missing) == 2:
        return [Finding("ok", "Slurm", "none here (mpirun serves on one machine)")]
    if missing:
        return [Finding("warn", "Slurm", f"{missing[0]} is not on PATH", "install Slurm's client commands")]
    library = ""
    if world.comm is not None:
        from mpi4py import MPI

        library = MPI.Get_library_version()
    return [judge_srun(answer("srun", "--mpi=list") or "", library)]


def judge_srun(listed: str, library: str) -> Finding:
    """Which `srun --mpi` to use, from what `srun --mpi=list` says and the MPI library's version text."""
    plugins = re.findall(r"^\s+(\w+)\s*$", listed, re.MULTILINE)
    wanted = "pmix" if _mpi_name(library).startswith("OpenMPI") else "pmi2"
    found = f"sbatch and srun are there; srun --mpi has {', '.join(plugins) or 'nothing'}"
    usable = [name for name in plugins if name.startswith(wanted)]
    if usable:
        return Finding("ok", "Slurm", f"{found}: use srun --mpi={usable[0]}")
    fix = f"launch with mpirun inside the job; with srun this MPI needs --mpi={wanted}, else every rank is alone"
    return Finding("warn", "Slurm", found, fix)
