"""The run's folder: what is in it, whose run it holds, and whether it can be written.

runs/mnist/
  job.yaml            the job as resolved, and the digest that tells this job's run from another's
  metrics.jsonl       a line for each step and each evaluation
  status.json         where the run stands, every few seconds (see beat.py)
  checkpoints/        the newest complete steps
  early.h5            the network at the step of the dense training that pruning goes back to, if it does
  best.h5             the best network so far, where pruning has a goal
  dense.h5 model.h5   the network before and after
  report.html         report.json is written last: a folder that has it holds a complete run
  report.json
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hpcprune.errors import JobError
from hpcprune.job import Job, differences
from hpcprune.job_file import load_job
from hpcprune.lock import hold

__all__ = ["RunFolder"]

_DIGEST = "# digest: "
PATIENCE, LOST_HOST = 3.0, 150.0  # seconds to wait for a lock, and for that of a host that was lost


class RunFolder:
    """The paths of a run, and the guard of what is already there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.job = self.path / "job.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "status.json"
        self.checkpoints = self.path / "checkpoints"
        self.early = self.path / "early.h5"
        self.best = self.path / "best.h5"
        self.dense = self.path / "dense.h5"
        self.model = self.path / "model.h5"
        self.html = self.path / "report.html"
        self.report = self.path / "report.json"
        self._lock: IO[str] | None = None
        self._raw: io.FileIO | None = None
        self._metrics: io.TextIOWrapper | None = None
        self._new = self.path / "job.new"  # job.yaml while it is being written

    @property
    def complete(self) -> bool:
        """Whether the run in it has ended."""
        return self.report.is_file()

    def check(self, job: Job) -> None:
        """Raise JobError if the folder holds anything but a run of this job, or cannot be written."""
        try:
            self._check(job)
        except OSError as error:
            raise JobError(
                f"out: {error.filename or self.path}: {error.strerror}; choose another folder with --out"
            ) from None

    def _check(self, job: Job) -> None:
        if not self.path.exists():
            parent = self._nearest()
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise JobError(
                    f"out: {self.path} cannot be made: {parent} is not a writable folder; choose another folder with "
                    "--out"
                )
            return
        if not self.path.is_dir():
            raise JobError(f"out: {self.path} is not a folder; choose another folder with --out")
        digest = self._digest()
        if digest is None:
            if any(path != self._new for path in self.path.iterdir()):
                raise JobError(
                    f"out: {self.path} is not empty and holds no run (no job.yaml of one); choose another folder with "
                    "--out"
                )
        elif digest != job.digest():
            raise JobError(
                f"out: {self.path} holds the run of another job ({self._what_differs(job)}); choose another folder "
                f"with --out, or remove it: rm -r {self.path}"
            )
        for path in (self.path, self.checkpoints, self.metrics):
            if not self.complete and path.exists() and not os.access(path, os.W_OK):
                raise JobError(f"out: {path} is not writable; choose another folder with --out")

    def open(self, job: Job, needed: int) -> None:
        """Make the folder and write job.yaml, unless they are there. `needed`: bytes that the run will write at least.

        Raises:
            JobError: it cannot be written, the disk has less room than needed, or another process runs in it.
        """
        try:
            free = shutil.disk_usage(self._nearest()).free
            if free < needed:
                raise JobError(
                    f"out: {self.path} has {free:,} bytes of room, and a checkpoint needs {needed:,}; make room, or "
                    "choose another folder with --out"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.job.exists():
                self._new.write_text(f"{_DIGEST}{job.digest()}\n{job.to_yaml(beside=self.path)}")
                self._new.replace(self.job)
            self._lock = self.job.open("r+")
            # A lost host's lock lives on for a minute and more on NFS; and somebody may be looking at this one.
            restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            if not hold(self._lock, LOST_HOST if restarted else PATIENCE):
                raise JobError(f"out: another process is running in {self.path}; wait for it, or choose another")
        except OSError as error:
            raise JobError(
                f"out: {self.path} cannot be written: {error.strerror}; choose another folder with --out"
            ) from None

    def open_metrics(self, length: int) -> None:
        """Open metrics.jsonl for more lines behind its first `length` bytes; what was behind them is cut off."""
        try:
            self._raw = io.FileIO(self.metrics, "a")
            self._raw.truncate(min(length, self.metrics.stat().st_size))
        except OSError as error:
            raise self._unwritable(error) from None
        self._metrics = io.TextIOWrapper(io.BufferedWriter(self._raw), encoding="utf-8")

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def flush_metrics(self) -> int:
        """Bring all lines to the file; its length in bytes."""
        assert self._metrics is not None
        try:
            self._metrics.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        return self.metrics.stat().st_size

    def _unwritable(self, error: OSError) -> JobError:
        """What to tell when metrics.jsonl cannot be written; the lines that are not in it yet are given up."""
        if self._raw is not None:
            self._raw.close()  # or Python would try once more at exit, and be loud about it
        return JobError(
            f"{self.metrics}: cannot be written: {error.strerror}; put that right and run the same command again: it "
            "goes on from the last checkpoint"
        )

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        with self.metrics.open() as lines:
            for line in lines:
                yield json.loads(line)

    def read_report(self) -> Any:
        """What report.json holds."""
        try:
            return json.loads(self.report.read_text())
        except (OSError, ValueError):
            raise JobError(
                f"{self.report}: damaged, or not to be read; remove it and run the same command again: it is made anew"
            ) from None

    def _nearest(self) -> Path:
        """The folder, or what is there of the path to it."""
        path = self.path.absolute()
        return next(there for there in (path, *path.parents) if there.exists())

    def _digest(self) -> str | None:
        """What job.yaml gives as its job's digest; None where there is none: a job file of a user's has no digest."""
        if not self.job.is_file():
            return None
        first = self.job.read_text(errors="replace").partition("\n")[0]
        return first.removeprefix(_DIGEST) if first.startswith(_DIGEST) else None

    def _what_differs(self, job: Job) -> str:
        try:
            different = differences(load_job(self.job), job)
        except JobError:
            return "its job.yaml cannot be read"
        return ", ".join(different[:4]) or "the task's file has changed since"
