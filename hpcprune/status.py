"""The status of runs, seen from outside: by their folders, and by Slurm where there is one.

Whether a run is alive is told by the lock that its rank 0 holds, and by Slurm's word of its job. Nothing here imports
torch or MPI, so that it works on a login node, while the run runs.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcprune.beat import Beat, read_beat
from hpcprune.checkpoint.steps import step_folders
from hpcprune.errors import JobError
from hpcprune.report.units import DASH, as_metric, as_percent, as_seconds, plain
from hpcprune.slurm import job_states

__all__ = ["Status", "as_json", "find_runs", "look", "print_statuses"]

STALE = 60.0  # seconds without a beat, after which a run on a disk without locks is taken for cut


@dataclass(frozen=True)
class Status:
    """One run: `state` is complete, running, cut, or what Slurm calls its job's. `checkpoint`: the newest, by name."""

    path: Path
    state: str
    beat: Beat
    checkpoint: str | None
    checkpoint_age: float | None


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs among and directly in these.

    Raises:
        JobError: one of them is no folder, or there is no run in it.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise JobError(f"{folder}: no such folder; give a run's folder, or one with runs in it")
        inside = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.iterdir()))
        if not inside:
            raise JobError(f"{folder}: no run is in it; a run's folder has a job.yaml that hpcprune run has written")
        found += inside
    return found


def _is_run(folder: Path) -> bool:
    try:
        with (folder / "job.yaml").open(errors="replace") as job:
            return job.readline().startswith("# digest: ")
    except OSError:
        return False


def look(paths: Iterable[Path]) -> list[Status]:
    """How far runs are."""
    beats = {path: read_beat(path / "status.json") or Beat() for path in paths}
    jobs = job_states(sorted({beat.slurm_job for beat in beats.values() if beat.slurm_job}))
    return [_status(path, beat, jobs) for path, beat in beats.items()]


def _status(path: Path, beat: Beat, jobs: dict[str, str]) -> Status:
    folders = step_folders(path / "checkpoints")
    newest = folders[0][1] if folders else None
    age = _age(newest) if newest else None
    if (path / "report.json").is_file():
        state = "complete"
        beat.left = None
    else:
        alive = _alive(path / "job.yaml", beat)
        state = jobs.get(beat.slurm_job, "RUNNING" if alive else "cut").lower()
        if state == "running" and not alive and time.time() - beat.written > STALE:
            state = "cut"  # in a job that goes on, such as salloc's
    return Status(path, state, beat, newest.name if newest else None, age)


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:  # a newer one has come, and this one is gone
        return None


def _alive(job: Path, beat: Beat) -> bool:
    try:
        with job.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return time.time() - beat.written < STALE
    return False


def print_statuses(statuses: Sequence[Status], console: Console) -> None:
    """A line a run."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("run", "state", "stage", "sparsity", "metric", "left", "saved"):
        table.add_column(heading, overflow="fold", min_width=16 if heading == "run" else None)
    for status in statuses:
        beat = status.beat
        name, value = next(((k, v) for k, v in beat.metrics.items() if k != "loss"), ("", None))
        steps = f" {beat.step}/{beat.steps}" if beat.steps else ""
        cells = [
            str(status.path),
            status.state + (f", job {beat.slurm_job}" if beat.slurm_job else ""),
            f"{beat.round}/{beat.rounds} {beat.stage}{steps}" if beat.stage else DASH,
            as_percent(beat.sparsity) if beat.stage else DASH,
            f"{name} {as_metric(value, name)}" if name else DASH,
            as_seconds(beat.left) if status.state == "running" else DASH,
            f"{as_seconds(status.checkpoint_age)} ago" if status.checkpoint_age is not None else "never",
        ]
        table.add_row(*(Text(plain(cell)) for cell in cells))
    console.print(table)


def as_json(statuses: Sequence[Status]) -> str:
    """The same for programs."""
    return json.dumps(
        [
            {
                "run": str(status.path),
                "state": status.state,
                "checkpoint": status.checkpoint,
                "checkpoint_age": status.checkpoint_age,
                **vars(status.beat),
            }
            for status in statuses
        ]
    )
