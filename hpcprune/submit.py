"""Submitting a job to Slurm: the text of its batch script, and sbatch.

The text is slurm/prune.sh with what was asked for written into it, so that it can be read, kept and submitted by hand:
`hpcprune submit ... --dry-run > mine.sh; sbatch mine.sh`.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcprune.errors import HpcpruneError, JobError
from hpcprune.job_file import load_job

__all__ = ["SubmitError", "Sweep", "account_flags", "batch_text", "parse_sweep", "run_folder", "sbatch", "template"]

PATIENCE = 60.0  # seconds for sbatch's answer
WHERE = ("--account", "-A", "--partition", "-p", "--qos", "-q", "--clusters", "-M", "--reservation")
# What sbatch says, and what to do about it.
FIXES = {
    "invalid partition": "sinfo shows which there are",
    "node configuration is not available": "sinfo -o '%P %D %c %m %G' shows what the nodes have",
    "more processors requested": "sinfo -o '%P %D %c' shows the partitions' nodes and their cores",
    "generic resource": "sinfo -o '%P %G' shows the GPUs that there are",
    "invalid account": "sacctmgr show assoc user=$USER shows yours",
    "time limit": "sinfo shows the partitions' limits; a job is requeued and goes on when its time is up",
    "unable to contact slurm controller": "look whether SLURM_CONF is right and the cluster is up (scontrol ping)",
    "configuration source": "SLURM_CONF names the cluster's slurm.conf, where it is not /etc/slurm/slurm.conf",
    "unrecognized option": "flags behind -- go to sbatch as they are; sbatch --help lists them",
}


class SubmitError(HpcpruneError):
    """Slurm did not take a job."""


@dataclass(frozen=True)
class Sweep:
    """A key of the job file, and the values that it takes, a run each."""

    key: str
    values: tuple[str, ...]

    def folder(self, out: str, value: str) -> str:
        """Where the run with a value goes."""
        return f"{out}/{self.key}={value}"


def parse_sweep(text: str) -> Sweep:
    """`prune.sparsity=0.8,0.9` as a sweep; JobError if it is none."""
    key, equals, values = text.partition("=")
    sweep = Sweep(key, tuple(value.strip() for value in values.split(",")))
    if not key or not equals or not all(sweep.values) or len(set(sweep.values)) != len(sweep.values):
        raise JobError(f"--sweep {text}: write a key and two values or more, as in prune.sparsity=0.8,0.9,0.95")
    return sweep


def template(name: str) -> str:
    """A script of slurm/, which lies inside an installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "slurm", package.parent / "slurm"):
        if (folder / name).is_file():
            return (folder / name).read_text()
    raise SubmitError(f"no slurm/{name} in {package} or beside it; reinstall hpcprune")


def batch_text(
    template: str, arguments: Sequence[str], flags: Sequence[str], sweep: Sweep | None = None, out: str = ""
) -> str:
    """A script of slurm/ with sbatch's flags and its own arguments written into it.

    Args:
        sweep: makes it an array with a task for each value, whose run goes into a folder of its own in `out`.
    """
    if sweep is not None:
        flags = ["--output=hpcprune-%A_%a.out", *flags, f"--array=0-{len(sweep.values) - 1}"]
    ours = [f"#SBATCH {shlex.join(flags)}"] if flags else []
    ours += ["", f"set -- {shlex.join(arguments)}"]
    if sweep is not None:
        ours += [
            f"values=({shlex.join(sweep.values)})",
            f"value={sweep.key}=${{values[$SLURM_ARRAY_TASK_ID]}}",
            f'set -- "$@" "$value" --out {shlex.quote(out)}/"$value"',
        ]
    lines = template.splitlines()
    after = 1 + max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    return "\n".join([*lines[:after], *ours, *lines[after:], ""])


def account_flags(flags: Sequence[str]) -> list[str]:
    """Those of sbatch's flags that a job needs as much as the one before it: who pays, and where it runs."""
    found: list[str] = []
    for flag, value in zip(flags, [*flags[1:], ""], strict=True):
        name = flag.partition("=")[0]
        if name in WHERE:
            found += [flag] if "=" in flag else [flag, value]
        elif flag[:2] in WHERE and not flag.startswith("--"):
            found.append(flag)
    return found


def run_folder(job: Path, overrides: Sequence[str], sweep: Sweep | None) -> str:
    """Where a job's run goes, or the runs of a sweep; JobError if the job is not right with any of the swept values."""
    out = load_job(job, overrides).out
    if sweep is None:
        return out
    for value in sweep.values:
        load_job(job, [*overrides, f"{sweep.key}={value}"])
    return f"{out}-sweep"


def sbatch(text: str, flags: Sequence[str] = ()) -> str:
    """Hand a script to sbatch; the job's number. `flags`: those that must win over SBATCH_... in the environment, too.

    Raises:
        SubmitError: there is no sbatch, or it refuses; with what it says.
    """
    if not shutil.which("sbatch"):
        raise SubmitError("sbatch is not on PATH; do this where Slurm's commands are, or print the script: --dry-run")
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *flags], input=text, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise SubmitError(
            f"sbatch has not answered for {PATIENCE:.0f} s; is the controller up? scontrol ping"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split())
        fix = next((fix for sign, fix in FIXES.items() if sign in said.lower()), "the script: --dry-run")
        raise SubmitError(f"Slurm did not take the job: {said}; {fix}")
    return done.stdout.strip().split(";")[0]
