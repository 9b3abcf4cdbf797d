"""What Slurm knows of jobs: their states, and how much time is left. Nothing where there is no Slurm, or no answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

__all__ = ["job_states", "seconds_left"]

PATIENCE = 10.0  # seconds for an answer


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """PENDING, RUNNING, ... of jobs by their numbers; those that Slurm has forgotten are not in it."""
    lines = _squeue("--states=all", f"--jobs={','.join(jobs)}", "--format=%A %T") if jobs else []
    words = [line.split() for line in lines]
    return {each[0]: each[1] for each in words if len(each) == 2}


def seconds_left(environ: Mapping[str, str] = os.environ) -> float | None:
    """Until the time limit of the job that this process is in; None without one."""
    job = environ.get("SLURM_JOB_ID")
    # A job of an array may have the array's number, by which Slurm tells of all of them.
    lines = _squeue(f"--jobs={job}", "--format=%A %L") if job else []
    left = next((time for number, time in map(str.split, lines) if number == job), "")
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", left)
    if found is None:  # UNLIMITED, NOT_SET, INVALID
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(seconds + 60 * (minutes + 60 * (hours + 24 * days)))


def _squeue(*options: str) -> list[str]:
    if not shutil.which("squeue"):
        return []
    try:
        done = subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()
