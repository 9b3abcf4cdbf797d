"""The doctor: all is well on a machine where it is, and each thing that is broken here is found and has a fix."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hpcprune.checkpoint import read
from hpcprune.checkpoint.format import LayerState, State
from hpcprune.doctor import machine, trial, visit
from hpcprune.doctor.finding import Finding, exit_code, print_findings
from hpcprune.doctor.launcher import check_launcher, check_slurm, compare_mpirun, judge_srun
from hpcprune.doctor.visit import run_doctor
from hpcprune.errors import HpcpruneError, WorldError
from hpcprune.world import SIZE_VARIABLES, World
from tests.conftest import Launch

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11, repo rev: v5.0.11"
MPICH = "MPICH Version:      4.2.3\nMPICH Release date: Thu Oct  3 2024\n"
INTEL = "Intel(R) MPI Library 2021.10 for Linux* OS\n"


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's word about ranks, whoever runs the tests; and the environment's own tools first."""
    for name in (*SIZE_VARIABLES, "SLURM_JOB_ID", "HPCPRUNE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Make a command that prints a text, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)
        return path

    return make


def about(findings: list[Finding], what: str) -> list[Finding]:
    return [finding for finding in findings if finding.what == what]


def printed(findings: list[Finding], width: int = 80) -> str:
    text = io.StringIO()
    print_findings(findings, Console(file=text, width=width))
    return text.getvalue()


def test_all_is_well_here() -> None:
    findings = run_doctor(World.alone())
    assert [finding for finding in findings if finding.status == "FAIL"] == [] and exit_code(findings) == 0
    for what in ("libraries", "HDF5", "compiler", "launcher", "collective", "gloo group", "native kernels"):
        assert about(findings, what), what
    for what in ("HDF5 round trip", "disk", "cores", "CUDA", "Slurm", "Horovod"):
        assert about(findings, what), what
    assert about(findings, "collective") == [Finding("ok", "collective", "a sum over 1 rank is right")]
    assert f"numpy {np.__version__}" in about(findings, "libraries")[0].found
    assert all(bool(finding.fix) == (finding.status != "ok") for finding in findings)


def test_every_rank_takes_part(mpirun: Launch, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys\n"
        "from mpi4py import MPI\n"
        "if MPI.COMM_WORLD.rank == 1: os.environ['HPCPRUNE_NATIVE'] = 'numpy'\n"
        "from hpcprune.doctor.finding import *\n"
        "from hpcprune.doctor.visit import *\n"
        "from rich.console import Console\n"
        "findings = run_doctor()\n"
        "assert all(other == findings for other in MPI.COMM_WORLD.allgather(findings))\n"
        "if MPI.COMM_WORLD.rank == 0: print_findings(findings, Console(width=200, force_terminal=False))\n"
        "sys.exit(exit_code(findings))\n"
    )
    done = mpirun(2, str(script))
    assert done.returncode == 0, done.stderr
    lines = [line.strip().split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["ok", "collective       a sum over 2 ranks is right"] in lines
    assert ["ok", "gloo group       an all-reduce over 2 ranks is right"] in lines
    at = next(i for i, line in enumerate(lines) if line[0] == "ok" and line[1].startswith("native kernels"))
    assert lines[at + 1] == ["warn", "native kernels   rank 1: numpy: forced by HPCPRUNE_NATIVE"]
    assert done.stdout.count("rank 1:") == 1  # what is well there is not repeated
    assert "MPI sees 2 ranks" in done.stdout and ", of OpenMPI " in done.stdout and "mpi4py" in done.stdout


# What is broken is found


def test_ranks_that_were_promised_and_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    findings = run_doctor(World.alone())
    (finding,) = about(findings, "launcher")
    assert (finding.status, finding.found) == ("FAIL", "OMPI_COMM_WORLD_SIZE=4; MPI sees 1 rank")
    assert "srun --mpi=pmix" in finding.fix and exit_code(findings) == 1


def test_no_mpi_is_one_failure_and_the_rest_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(timeout: float) -> World:
        raise WorldError("mpi4py finds no MPI library (libmpi.so: cannot open)")

    monkeypatch.setattr(World, "of", fail)
    monkeypatch.setattr(visit, "check_native", lambda world: [])  # needs no MPI, but asks World.of
    findings = run_doctor()
    assert findings[0].status == "FAIL" and "no MPI library" in findings[0].found and "openmpi" in findings[0].fix
    assert about(findings, "HDF5 round trip")[0].status == "ok" and exit_code(findings) == 1


@pytest.mark.parametrize("error", [RuntimeError("out of\nluck"), HpcpruneError("out of luck"), OSError("out of luck")])
def test_a_check_that_raises_hides_no_other(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(world: World) -> list[Finding]:
        raise error

    monkeypatch.setattr(visit, "check_group", fail)
    findings = run_doctor(World.alone())
    (finding,) = about(findings, "gloo group")
    assert (finding.status, finding.found) == ("FAIL", "out of luck") and finding.fix
    assert about(findings, "Horovod") and exit_code(findings) == 1


def test_a_wrong_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "allreduce", lambda self, array, what: array + 1)
    (finding,) = trial.check_collective(World.alone())
    assert finding.status == "FAIL" and "is 2, not 1" in finding.found and finding.fix


def test_a_kernel_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "gather", lambda values, bits: values[::2])
    (finding,) = trial.check_native(World.alone())
    assert finding.status == "FAIL" and "HPCPRUNE_NATIVE=numpy" in finding.fix


def test_numpy_in_the_kernels_place_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", "numpy")
    (finding,) = trial.check_native(World.alone())
    assert finding.status == "warn" and finding.found.startswith("numpy: ") and "g++" in finding.fix


def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = about(machine.check_versions(World.alone()), "compiler")
    assert finding.status == "warn" and "install g++" in finding.fix


def test_values_that_come_back_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = State({}, {"weight": LayerState((8, 8), "float32", np.zeros(64, np.float32))})
    monkeypatch.setattr(read, "read_model", lambda path: wrong)
    (finding,) = trial.check_checkpoint(World.alone())
    assert finding.status == "FAIL" and "other values" in finding.found


def test_a_flipped_bit_that_is_not_noticed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = State({}, {"weight": LayerState((8, 8), "float32", np.arange(64, dtype=np.float32))})
    monkeypatch.setattr(read, "read_model", lambda path: right)
    (finding,) = trial.check_checkpoint(World.alone())
    assert finding.status == "FAIL" and "flipped bit" in finding.found


def test_a_full_or_read_only_folder_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5e8})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert machine.check_disk(World.alone())[0].status == "warn"
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert "cannot be written" in machine.check_disk(World.alone())[0].found


def test_more_ranks_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_local", (0, 4096))
    assert machine.check_cores(World.alone())[0].status == "warn"


def test_where_gpus_are_the_kernels_for_them_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("HPCPRUNE_CUDA", "off")
    (finding,) = machine.check_cuda(World.alone())
    assert finding.status == "ok" and "kernels none: turned off by HPCPRUNE_CUDA=off" in finding.found
    monkeypatch.setenv("HPCPRUNE_CUDA", "/no/such/file")
    (finding,) = machine.check_cuda(World.alone())
    assert finding.status == "warn" and finding.fix.startswith("HPCPRUNE_CUDA=/no/such/file: ")


# Launchers


@pytest.mark.parametrize(
    ("says", "library", "status", "words"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/", OPEN_MPI, "ok", "of OpenMPI 5.0.11"),
        ("mpirun (Open MPI) 4.1.4", OPEN_MPI, "warn", "is of OpenMPI 4.1.4, mpi4py uses OpenMPI 5.0.11"),
        ("HYDRA build details:\n    Version:      4.2.3\n", OPEN_MPI, "FAIL", "is of MPICH 4.2.3, mpi4py uses OpenMPI"),
        ("HYDRA build details:\n    Version:      4.2.3\n", MPICH, "ok", "of MPICH 4.2.3"),
        ("mpirun (Open MPI) 5.0.11", MPICH, "FAIL", "is of OpenMPI 5.0.11, mpi4py uses MPICH 4.2.3"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.10 Build 20230619", INTEL, "ok", "of IntelMPI 2021.10"),
        ("something else", OPEN_MPI, "warn", "is of unknown (something else)"),
    ],
)
def test_mpirun_is_held_against_mpi4pys_library(
    command: Callable[[str, str], Path], says: str, library: str, status: str, words: str
) -> None:
    finding = compare_mpirun(str(command("mpirun", says)), library)
    assert finding.status == status and words in finding.found and bool(finding.fix) == (status != "ok")


def test_no_mpirun_is_a_warning() -> None:
    finding = compare_mpirun(None, OPEN_MPI)
    assert finding.status == "warn" and "OpenMPI 5.0.11" in finding.fix


def test_the_mpirun_of_this_environment_fits() -> None:
    findings = check_launcher(World.of(None))
    assert [finding.status for finding in findings] == ["ok", "ok"]


LISTED = "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\n\tpmix_v4"


@pytest.mark.parametrize(
    ("listed", "library", "status", "words"),
    [
        (LISTED, OPEN_MPI, "ok", "use srun --mpi=pmix"),
        (LISTED, MPICH, "ok", "use srun --mpi=pmi2"),
        ("MPI plugin types are...\n\tnone\n\tcray_shasta", OPEN_MPI, "warn", "srun --mpi has none, cray_shasta"),
        ("", OPEN_MPI, "warn", "srun --mpi has nothing"),
    ],
)
def test_the_srun_that_fits_is_named(listed: str, library: str, status: str, words: str) -> None:
    finding = judge_srun(listed, library)
    assert finding.status == status and words in finding.found and bool(finding.fix) == (status != "ok")


def test_slurm_whole_and_in_part(command: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(command("srun", LISTED).parent))  # this machine may have a Slurm
    (finding,) = check_slurm(World.of(None))
    assert finding.status == "warn" and "sbatch is not on PATH" in finding.found
    command("sbatch", "")
    (finding,) = check_slurm(World.of(None))
    assert (finding.status, finding.found.split(": ")[-1]) == ("ok", "use srun --mpi=pmix")


# What is printed


def test_the_fix_stands_below_what_it_fixes() -> None:
    text = printed([Finding("ok", "a", "fine"), Finding("FAIL", "b", "[bold]broken", "mend it")])
    assert [line.split() for line in text.splitlines()] == [
        ["ok", "a", "fine"],
        ["FAIL", "b", "[bold]broken"],
        ["fix:", "mend", "it"],
        ["hpcprune", "cannot", "run", "as", "it", "should", "here:", "1", "ok,", "0", "warn,", "1", "FAIL"],
    ]
    assert "\x1b" not in text


def test_a_warning_is_no_failure() -> None:
    findings = [Finding("warn", "a", "slow", "hurry")]
    assert exit_code(findings) == 0 and printed(findings).endswith("hpcprune can run here: 0 ok, 1 warn, 0 FAIL\n")
