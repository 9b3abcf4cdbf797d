"""hpcprune submit and status on a real Slurm: sweeps, what is refused, and what is seen of a run while it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcprune.checkpoint import read_model
from tests.conftest import ROOT, TINY
from tests.mpi.test_run import PACK
from tests.slurm.conftest import Slurm, SlurmJob
from tests.slurm.test_prune import in_the_middle
from tests.slurm.test_prune import submit as submit_tiny

pytestmark = pytest.mark.timeout(600)


def hpcprune(slurm: Slurm, folder: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as on a login node."""
    command = [sys.executable, "-m", "hpcprune", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**slurm.environment, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_sweep_ends_in_one_table_and_one_plot(slurm: Slurm, tmp_path: Path) -> None:
    """Also if one of its runs is told to stop on the way: that one alone starts again."""
    sweep = ("submit", TINY, "out=runs/tiny", "--sweep", "prune.sparsity=0.5,0.7,0.9", "--", "--ntasks=1")
    done = hpcprune(slurm, tmp_path, *sweep, TINY_SLEEP="0.1")
    assert done.returncode == 0, done.stderr
    array, last = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)
    tasks = [SlurmJob(f"{array}_{n}", tmp_path / f"hpcprune-{array}_{n}.out", slurm.environment) for n in range(3)]
    in_the_middle(tasks[2], tmp_path / "runs/tiny-sweep/prune.sparsity=0.9")
    tasks[2].signal("--signal=USR1", "--batch")
    comparison = SlurmJob(last, tmp_path / f"hpcprune-compare-{last}.out", slurm.environment)
    assert comparison.end() == "COMPLETED", comparison.text
    assert [int(task.show()["Restarts"]) for task in tasks] == [0, 0, 1]
    runs = tmp_path / "runs/tiny-sweep"
    for sparsity in (0.5, 0.7, 0.9):
        found = read_model(runs / f"prune.sparsity={sparsity}/model.h5").about["sparsity"]
        assert found == pytest.approx(sparsity, abs=1e-3)
        assert f"prune.sparsity {sparsity} " in comparison.text
    page = (runs / "comparison.html").read_text()
    assert page.count("<svg") == 1 and page.count("<tr>") == 4
    assert hpcprune(slurm, tmp_path, "status", runs).stdout.count("complete, job ") == 3


def test_a_run_is_seen_from_outside_while_it_runs(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    one_round = (PACK, "prune.rounds=1", "prune.sparsity=0.5")
    job = submit_tiny(slurm, out, more=one_round, sleep=0.3)  # a beat is written every 5 s

    found: dict[str, Any] = {}

    def retraining() -> bool:
        done = hpcprune(slurm, tmp_path, "status", "--json", out)
        found.update(json.loads(done.stdout)[0] if done.returncode == 0 else {})
        return found.get("round") == 1 and found["step"] > 0 and found["left"] is not None

    job.wait(retraining, "a step of the first round")
    assert found["state"] == "running" and found["slurm_job"] == job.number and found["ranks"] == 2
    assert found["left"] > 0 and 0 < found["sparsity"] < 1 and found["metrics"]["accuracy"] > 0.5
    assert job.end() == "COMPLETED"
    assert not retraining() and found["state"] == "complete"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--partition=gpu"], r"invalid partition specified: gpu.*; sinfo shows which there are"),
        (["--nodes=99"], r"More processors requested than permitted; sinfo -o '%P %D %c' shows"),
        (["--mem=900G"], r"node configuration is not available; sinfo -o '%P %D %c %m %G'"),
        (["--gres=fpga:1"], r"[Ii]nvalid generic resource.*; sinfo -o '%P %G' shows"),
        (["--frobnicate"], r"unrecognized option.*--frobnicate.*; flags behind -- go to sbatch"),
    ],
)
def test_what_slurm_refuses_is_shown_with_what_to_do(slurm: Slurm, tmp_path: Path, flags: list[str], says: str) -> None:
    done = hpcprune(slurm, tmp_path, "submit", TINY, "--", *flags)
    assert done.returncode == 2 and done.stderr.startswith("hpcprune: error: Slurm did not take the job: ")
    assert re.search(says, done.stderr), done.stderr


def test_flags_with_spaces_and_quotes_reach_slurm(slurm: Slurm, tmp_path: Path) -> None:
    flags = ("--hold", '--comment=it\'s "mine" alone', "--time", "7")
    done = hpcprune(slurm, tmp_path, "submit", TINY, "--", *flags, SBATCH_TIMELIMIT="9")
    (number,) = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)
    job = SlurmJob(number, tmp_path / "none", slurm.environment)
    assert 'Comment=it\'s "mine" alone' in job._slurm("scontrol", "--oneliner", "show", "job", number)
    assert job.show()["TimeLimit"] == "00:07:00"


def test_a_folder_that_not_all_nodes_see_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    """/dev/shm is each node's own."""
    job = slurm.sbatch(
        tmp_path / "run", ROOT / "slurm/prune.sh", TINY, "--out", "/dev/shm/run", flags=("-N2", "--ntasks-per-node=1")
    )
    assert job.end(60) == "FAILED"
    assert re.search(r"out: /dev/shm/run on node2 is not the folder that it is on node1, where rank 0 is", job.text)


def test_a_wrong_mpi_is_named(slurm: Slurm, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "srun",
            "-n2",
            "--mpi=none",
            sys.executable,
            "-m",
            "hpcprune",
            "run",
            str(TINY),
            "--out",
            str(tmp_path / "run"),
        ],
        env=slurm.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert (
        "=2 ranks were launched, but MPI sees 1: each would prune alone. Launch with `srun --mpi=pmix`" in done.stderr
    )
    assert not (tmp_path / "run").exists()
