"""A run's folder: it knows its own run again, lets nobody else in, and keeps its metrics in step with checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from hpcprune.errors import JobError
from hpcprune.folder import RunFolder
from hpcprune.job import Job
from hpcprune.job_file import load_job

TASK = "classes = 3\n"
JOB = """
task: task.py
seed: 5
weights: dense.pt
prune: {sparsity: 0.9}
retrain: {epochs: 1, batch_size: 8}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a job and its task."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "job.yaml").write_text(JOB)
    (home / "task.py").write_text(TASK)
    return home


def job(home: Path, *overrides: str) -> Job:
    return load_job(home / "job.yaml", overrides)


def opened(path: Path, given: Job, needed: int = 0) -> RunFolder:
    """A folder as a run opens it."""
    folder = RunFolder(path)
    folder.check(given)
    folder.open(given, needed)
    return folder


def closed(folder: RunFolder) -> None:
    """Let go of a folder, as a process does that ends."""
    assert folder._lock is not None
    folder._lock.close()


# Whose run it is


def test_a_new_folder_holds_the_job_as_it_was_resolved(home: Path, tmp_path: Path) -> None:
    given = job(home, "prune.sparsity=0.8")
    path = tmp_path / "deep/er/run"
    RunFolder(path).check(given)
    assert not path.exists(), "looking changes nothing"
    folder = opened(path, given)
    assert [each.name for each in path.iterdir()] == ["job.yaml"]
    kept = load_job(path / "job.yaml")
    assert kept.digest() == given.digest() and kept.prune.sparsity == 0.8
    assert kept.task_file is not None and kept.task_file.resolve() == home / "task.py"
    assert kept.weights_file is not None and kept.weights_file.resolve() == home / "dense.pt"
    assert not folder.complete
    folder.report.write_text("{}")
    assert folder.complete


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("out=elsewhere",),
        ("evaluate.batch_size=7",),
        ("world.timeout=9",),
        ("checkpoint={every_steps: 3, keep: 1}",),
    ],
    ids=lambda value: value[0] if value else "the same",
)
def test_a_folder_is_gone_on_with_whatever_does_not_change_the_result(
    home: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    closed(opened(tmp_path / "run", job(home)))
    before = (tmp_path / "run/job.yaml").read_bytes()
    closed(opened(tmp_path / "run", job(home, *overrides)))
    moved = Path(shutil.move(home, tmp_path / "moved"))
    closed(opened(tmp_path / "run", job(moved, *overrides)))
    assert (tmp_path / "run/job.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "differs"),
    [
        (("prune.sparsity=0.8",), r"prune\.sparsity \(0\.9 there, 0\.8 here\)"),
        (("seed=6", "retrain.batch_size=9"), r"seed \(5 there, 6 here\), retrain\.batch_size \(8 there, 9 here\)"),
        (("weights=other.pt",), r"weights \(.*dense\.pt.* there, .*other\.pt.* here\)"),
    ],
)
def test_another_jobs_folder_is_refused_with_what_differs(
    home: Path, tmp_path: Path, overrides: tuple[str, ...], differs: str
) -> None:
    path = tmp_path / "run"
    closed(opened(path, job(home)))
    with pytest.raises(JobError, match=rf"^out: {path} holds the run of another job \({differs}\); .*rm -r {path}$"):
        RunFolder(path).check(job(home, *overrides))


def test_a_task_that_has_changed_makes_another_job(home: Path, tmp_path: Path) -> None:
    closed(opened(tmp_path / "run", job(home)))
    (home / "task.py").write_text(TASK + "# more\n")
    with pytest.raises(JobError, match=r"holds the run of another job \(the task's file has changed since"):
        RunFolder(tmp_path / "run").check(job(home))


# What else may be there


def test_only_an_empty_folder_or_a_run_may_be_there(home: Path, tmp_path: Path) -> None:
    given = job(home)
    for name in ("letter.txt", "job.yaml"):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        RunFolder(other).check(given)
        (other / name).write_text("Dear Sir or Madam")
        with pytest.raises(JobError, match=rf"^out: {other} is not empty and holds no run"):
            RunFolder(other).check(given)
    with pytest.raises(JobError, match=rf"^out: {home}/task\.py is not a folder"):
        RunFolder(home / "task.py").check(given)
    with pytest.raises(JobError, match=rf"^out: {home}/task\.py/run cannot be made: {home}/task\.py is not a writable"):
        RunFolder(home / "task.py/run").check(given)


def test_a_job_file_that_was_being_written_is_written_again(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    RunFolder(path)._new.write_text("# dig")
    opened(path, job(home))
    assert [each.name for each in path.iterdir()] == ["job.yaml"]


def test_what_cannot_be_made_or_does_not_fit_leaves_nothing(home: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^out: /proc/run cannot be written: "):
        RunFolder("/proc/run").open(job(home), 0)
    with pytest.raises(
        JobError, match=r"has [\d,]+ bytes of room, and a checkpoint needs 1,000,000,000,000,000,000; make"
    ):
        RunFolder(tmp_path / "run").open(job(home), 10**18)
    assert not (tmp_path / "run").exists()


HOLD = """
import sys, time
from pathlib import Path
from hpcprune.folder import RunFolder
from hpcprune.job_file import load_job
folder = RunFolder(sys.argv[1])
folder.open(load_job(Path(sys.argv[2])), 0)
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(home: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs in the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(home / "job.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_two_processes_do_not_run_in_one_folder(home: Path, tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    path, given = tmp_path / "run", job(home)
    with pytest.raises(JobError, match=rf"^out: another process is running in {path}; wait for it, or choose another"):
        opened(path, given)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    opened(path, given)


# Metrics


def line(step: int) -> dict[str, object]:
    return {"kind": "step", "step": step, "loss": 0.1 * step, "note": "größer"}


def test_metrics_go_on_where_the_checkpoint_was(home: Path, tmp_path: Path) -> None:
    folder = opened(tmp_path / "run", job(home))
    folder.open_metrics(0)
    for step in range(3):
        folder.write_metrics(line(step))
    length = folder.flush_metrics()
    assert length == folder.metrics.stat().st_size > 0
    for step in (3, 4):
        folder.write_metrics(line(step))
    folder.flush_metrics()
    assert list(folder.read_metrics()) == [line(step) for step in range(5)]
    closed(folder)

    again = opened(tmp_path / "run", job(home))
    again.open_metrics(length)
    assert list(again.read_metrics()) == [line(step) for step in range(3)], "what came after the checkpoint is cut off"
    again.write_metrics(line(3))
    again.flush_metrics()
    assert list(again.read_metrics()) == [line(step) for step in range(4)]
    again.open_metrics(10**6)
    assert len(list(again.read_metrics())) == 4, "a file that is shorter is not filled up"


def test_metrics_that_cannot_be_written_are_an_error_with_the_way_on(home: Path, tmp_path: Path) -> None:
    """The limit on a file's size stands for a disk that is full."""
    folder = opened(tmp_path / "run", job(home))
    folder.open_metrics(0)
    folder.write_metrics(line(1))
    before = folder.flush_metrics()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 10, hard))
    try:
        with pytest.raises(
            JobError, match=r"metrics\.jsonl: .*File too large; .*run the same command again: it goes on"
        ):
            for step in range(1000):
                folder.write_metrics(line(step))
                folder.flush_metrics()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    closed(folder)
    resumed = opened(tmp_path / "run", job(home))
    resumed.open_metrics(before)
    assert list(resumed.read_metrics()) == [line(1)]


def test_the_lock_is_one_that_nfs_grants(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS locks a file for writing only if it is open for writing (flock(2)); it may have to be waited for."""
    asked = []

    def flock(file: IO[str], operation: int) -> None:
        asked.append(operation)
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        if len(asked) < 3:
            raise BlockingIOError(errno.EWOULDBLOCK, "held by a host that was lost")

    monkeypatch.setattr(fcntl, "flock", flock)
    opened(tmp_path / "run", job(home))
    assert asked == [fcntl.LOCK_EX | fcntl.LOCK_NB] * 3


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_no_obstacle(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: IO[str], operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    opened(tmp_path / "run", job(home))
