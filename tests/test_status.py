"""The status of runs as it is seen from outside, and the beat that they leave."""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from hpcprune.beat import EVERY, Pulse, read_beat
from hpcprune.errors import JobError
from hpcprune.status import as_json, find_runs, look, print_statuses


def make_run(folder: Path, **beat: object) -> Path:
    """A run's folder as a run leaves it; `beat`: what it said last."""
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text("# digest: 00\ntask: task.py\n")
    pulse = Pulse(folder / "status.json")
    pulse.beat.round, pulse.beat.rounds, pulse.beat.sparsity, pulse.beat.metrics = 2, 4, 0.875, {"accuracy": 0.975}
    for key, value in beat.items():
        setattr(pulse.beat, key, value)
    pulse.begin("retrain", 30, 90)
    return folder


def shown(*folders: Path) -> str:
    console = Console(file=io.StringIO(), width=250)
    print_statuses(look(find_runs(folders)), console)
    return console.file.getvalue()


def test_a_beat_is_read_as_it_was_written(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "status.json")
    pulse.begin("train", 10, 40)
    assert read_beat(tmp_path / "status.json") == pulse.beat
    assert pulse.beat.left is None and pulse.beat.step == 10


def test_steps_are_written_every_few_seconds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "status.json", [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    pulse = Pulse(path)
    pulse.begin("retrain", 10, 40)
    now[0] += EVERY - 1
    pulse.advance(11, 100)
    assert read_beat(path).step == 10
    now[0] += 2
    pulse.advance(13, 100)
    found = read_beat(path)
    assert found.step == 13
    assert found.left == pytest.approx((27 + 100) / (3 / 6))  # 3 steps in 6 s


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    Pulse(tmp_path / "gone" / "status.json").begin("train")
    Pulse(None).begin("train")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "x"}'])
def test_what_is_no_beat_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_beat(tmp_path / "status.json") is None


def test_a_lock_tells_a_run_that_lives_from_one_that_was_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert [status.state for status in look([run])] == ["cut"]
    with (run / "job.yaml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [status.state for status in look([run])] == ["running"]
    (run / "report.json").write_text("{}")
    assert [status.state for status in look([run])] == ["complete"]


def test_slurm_has_the_last_word_of_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / job, slurm_job=job) for job in ("17", "18", "19")]
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text('#!/bin/sh\necho "$@" > "$0.asked"\nprintf "17 PENDING\\n18 RUNNING\\n"\n')
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{squeue.parent}{os.pathsep}{os.environ['PATH']}")
    assert [status.state for status in look(runs)] == ["pending", "running", "cut"]
    assert "--jobs=17,18,19" in Path(f"{squeue}.asked").read_text()


def test_a_line_says_it_all(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", slurm_job="17", metrics={"loss": 0.1, "accuracy": 0.975})
    step = run / "checkpoints/step-00000400"
    step.mkdir(parents=True)
    os.utime(step, (time.time() - 90, time.time() - 90))
    text = shown(tmp_path)
    for word in (str(run), "cut, job 17", "2/4 retrain 30/90", "87.50 %", "accuracy 97.50 %", "90.0 s ago"):
        assert word in text, text
    (found,) = json.loads(as_json(look([run])))
    assert found["round"] == 2 and found["checkpoint"] == "step-00000400" and found["state"] == "cut"


def test_runs_are_found_in_a_folder_of_them(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("b", "a")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/job.yaml").write_text("task: task.py\n")  # a job file, but no run's
    assert find_runs([tmp_path]) == sorted(runs)
    assert find_runs([tmp_path / "b", tmp_path / "a"]) == [tmp_path / "b", tmp_path / "a"]
    with pytest.raises(JobError, match=r"other: no run is in it; a run's folder has a job\.yaml that"):
        find_runs([tmp_path / "other"])
    with pytest.raises(JobError, match="none: no such folder; give a run's folder"):
        find_runs([tmp_path / "none"])


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a-run-in-a-folder-whose-name-is-long")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mpi4py'] = None; from hpcprune.__main__ import main; "
        f"sys.argv = ['hpcprune', 'status', {str(tmp_path)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "2/4 retrain" in done.stdout and str(run) in done.stdout  # a pipe has no width
