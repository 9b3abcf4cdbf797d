"""Batch scripts as a pure function of what was asked for, pinned by golden files; and what sbatch refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
from difflib import unified_diff
from pathlib import Path

import pytest

from hpcprune.errors import JobError
from hpcprune.submit import SubmitError, Sweep, account_flags, batch_text, parse_sweep, run_folder, sbatch, template
from tests.conftest import ROOT, Command

GOLDEN = ROOT / "tests/golden"
SCRIPTS = {
    "plain": (["jobs/mnist/job.yaml"], ["--nodes=4"], None),
    "flags": (
        ["my jobs/job.yaml", "prune.sparsity=0.9", "retrain.top_k={share: 0.01}"],
        ["--ntasks-per-node=2", "--comment=it's mine", "--mem", "4G"],
        None,
    ),
    "sweep": (["jobs/mnist/job.yaml"], ["--nodes=2"], Sweep("prune.sparsity", ("0.8", "0.9", "0.95"))),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_text_is_the_golden_one(name: str) -> None:
    """To make them anew after a change that is meant: HPCPRUNE_GOLDEN=1 pytest tests/test_submit.py"""
    arguments, flags, sweep = SCRIPTS[name]
    script = template("prune.sh")
    text = batch_text(script, arguments, flags, sweep, "runs/mnist-sweep")
    # What differs from slurm/prune.sh, where in it, and nothing else: the script is not kept in copies.
    difference = "".join(unified_diff(script.splitlines(True), text.splitlines(True), "slurm/prune.sh", name))
    golden = GOLDEN / f"submit-{name}.diff"
    if os.environ.get("HPCPRUNE_GOLDEN"):
        golden.write_text(difference)
    assert difference == golden.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_gets_the_arguments_that_were_given(name: str) -> None:
    arguments, flags, sweep = SCRIPTS[name]
    script = batch_text('#SBATCH --requeue\nprintf "%s\\n" "$@"\n', arguments, flags, sweep, "runs/a b")
    for task, value in enumerate(sweep.values if sweep else [""]):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
        more = [f"{sweep.key}={value}", "--out", f"runs/a b/{sweep.key}={value}"] if sweep else []
        assert done.stdout.splitlines() == [*arguments, *more], done.stderr


def test_the_comparison_runs_where_the_sweep_runs() -> None:
    flags = ["-A", "mine", "--time=5", "--partition=big", "-qlong", "--exclusive", "--qos", "high", "-N", "2"]
    assert account_flags(flags) == ["-A", "mine", "--partition=big", "-qlong", "--qos", "high"]
    assert account_flags(["--exclusive"]) == []


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_the_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", ROOT / "slurm" / script]).returncode == 0


def test_the_command_prints_slurms_script_with_the_job_in_it(hpcprune: Command) -> None:
    printed = hpcprune(
        "submit", "jobs/mnist/job.yaml", "prune.sparsity=0.9", "--nodes", "4", "--dry-run", "--", "--time=5"
    )
    text = template("prune.sh")
    ours = "#SBATCH --nodes=4 --time=5\n\nset -- jobs/mnist/job.yaml prune.sparsity=0.9\n"
    head, rest = text.split('cd "$SLURM_SUBMIT_DIR"')
    assert printed.out == f'{head}{ours}cd "$SLURM_SUBMIT_DIR"{rest}'


@pytest.mark.parametrize("text", ["", "prune.sparsity", "=1,2", "prune.sparsity=", "prune.sparsity=0.9,", "a=1,1"])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(JobError, match=r"--sweep .*: write a key and two values or more, as in prune\.sparsity=0\.8,"):
        parse_sweep(text)


def test_a_job_is_looked_at_before_it_waits_in_a_queue() -> None:
    job = ROOT / "jobs/mnist/job.yaml"
    assert run_folder(job, ["out=x"], None) == "x"
    assert run_folder(job, ["out=x"], parse_sweep("seed=1,2")) == "x-sweep"
    with pytest.raises(JobError, match=r"prune\.sparsity=1\.9: 1\.9 is not in \[0, 1\)"):
        run_folder(job, [], parse_sweep("prune.sparsity=0.5,1.9"))


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    folder.joinpath("sbatch").write_text(f"#!/bin/sh\n{text}\n")
    folder.joinpath("sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_script_goes_to_sbatch_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch, f"cat > {shlex.quote(str(tmp_path))}/got; echo '17;cluster'")
    assert sbatch("the script\n") == "17"
    assert (tmp_path / "got").read_text() == "the script\n"


def test_what_sbatch_says_is_shown_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(
        SubmitError, match=r"Slurm did not take the job: .*invalid partition.*; sinfo shows which there"
    ):
        sbatch("")


def test_without_slurm_the_script_can_still_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match=r"sbatch is not on PATH; .* --dry-run"):
        sbatch("")
