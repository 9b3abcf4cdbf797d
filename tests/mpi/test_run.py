"""Whole runs on several ranks: cut, killed, told to stop, and gone on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from hpcprune.beat import read_beat
from hpcprune.checkpoint import State, newest_step, read_model, read_step
from tests.conftest import TINY, Launch, launch_command, launch_environment

STOPPED = 75
PACK = "retrain.packing=always"  # nothing is tried then, so that batches are steps


def run(mpirun: Launch, out: Path, ranks: int = 2, *more: str, timeout: float = 120, **env: str):
    return mpirun(ranks, "hpcprune", "run", TINY, *more, "--out", out, timeout=timeout, env=env)


def assert_same_weights(a: State, b: State) -> None:
    assert a.layers.keys() == b.layers.keys()
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.layers:
        np.testing.assert_array_equal(a.layers[name].values, b.layers[name].values, err_msg=name)
        np.testing.assert_array_equal(a.layers[name].mask, b.layers[name].mask, err_msg=name)
    for name in a.tensors:
        np.testing.assert_array_equal(a.tensors[name].array, b.tensors[name].array, err_msg=name)


def test_a_run_leaves_its_result_and_its_report(uninterrupted: Path) -> None:
    assert {path.name for path in uninterrupted.iterdir()} == {
        "job.yaml",
        "metrics.jsonl",
        "status.json",
        "checkpoints",
        "dense.h5",
        "model.h5",
        "report.html",
        "report.json",
    }
    state = read_model(uninterrupted / "model.h5")
    weights = sum(layer.values.size for layer in state.layers.values())
    zeros = sum(int((layer.values == 0).sum()) for layer in state.layers.values())
    assert zeros == round(0.9 * weights)
    assert all(layer.attributes["criterion"] == "magnitude" for layer in state.layers.values())


def test_its_status_ends_with_the_result(uninterrupted: Path) -> None:
    last = json.loads((uninterrupted / "report.json").read_text())["evaluations"][-1]
    beat = read_beat(uninterrupted / "status.json")
    assert beat is not None and beat.metrics == last["metrics"]


def test_running_again_says_that_it_is_complete(mpirun: Launch, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    again = run(mpirun, uninterrupted)
    assert again.returncode == 0
    assert "complete" in again.stdout
    assert f"rm -r {uninterrupted}" in again.stdout.replace("\r\n", "")
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


def test_another_jobs_folder_is_refused(mpirun: Launch, uninterrupted: Path) -> None:
    refused = run(mpirun, uninterrupted, 2, "prune.sparsity=0.8")
    assert refused.returncode == 2
    assert refused.stderr.count("hpcprune: error") == 1
    assert "prune.sparsity (0.9 there, 0.8 here)" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("rank,step", [(1, 3), (0, 25), (1, 41), (0, 75), (1, 90)])
def test_a_rank_killed_ends_all_and_the_run_goes_on_bit_for_bit(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path, rank: int, step: int
) -> None:
    out = tmp_path / "run"
    killed = run(mpirun, out, TINY=f"kill:{rank}:{step}")
    assert killed.returncode != 0
    assert not (out / "report.json").exists()
    resumed = run(mpirun, out)
    assert resumed.returncode == 0, resumed.stderr
    assert ("going on from" in resumed.stdout) == (step > 10)
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))
    lines = (out / "metrics.jsonl").read_text().count('"kind": "step"')
    assert lines == (uninterrupted / "metrics.jsonl").read_text().count('"kind": "step"')


def test_a_slow_disk_holds_no_step_up(mpirun: Launch, tmp_path: Path, uninterrupted: Path) -> None:
    """The checkpoint of step 40 is on the disk after that of step 60 is due: a loop that waited for it would hang."""
    out = tmp_path / "run"
    done = run(mpirun, out, 2, "checkpoint.every_steps=20", PACK, TINY_DISK="39:63")
    assert done.returncode == 0, done.stderr
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


def test_killed_while_a_checkpoint_is_written_the_run_goes_on_from_the_one_before(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    killed = run(mpirun, out, 2, "checkpoint.every_steps=20", PACK, TINY_DISK="38:59", TINY="kill:1:45")
    assert killed.returncode != 0
    assert list((out / "checkpoints").glob(".step-00000040.*.partial/.rank-0000.h5.*.partial"))
    assert newest_step(out / "checkpoints") == (out / "checkpoints/step-00000033", [])
    resumed = run(mpirun, out, 2, PACK)
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000033" in resumed.stdout
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))
    assert not list((out / "checkpoints").glob(".*"))


def test_a_disk_that_fills_up_beside_the_training_ends_it_and_the_run_goes_on_bit_for_bit(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    full = run(mpirun, out, TINY="full:1:15")
    assert full.returncode == 2
    assert full.stderr.count("hpcprune: error") == 1
    assert re.search(r"rank 1: \S+rank-0001\.h5: cannot be written: the file may not become that large", full.stderr)
    assert "Traceback" not in full.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000010"]
    resumed = run(mpirun, out)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


def test_what_was_chosen_for_a_round_is_kept_before_its_first_step(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path
) -> None:
    """Which way is faster hangs on the moment: a run that goes on must not try again."""
    out = tmp_path / "run"
    killed = run(mpirun, out, TINY="kill:1:39")  # 32 steps, 3 tries of either way, and the first step
    assert killed.returncode != 0 and "ms packed and" in killed.stdout
    path, _ = newest_step(out / "checkpoints")
    assert path == out / "checkpoints/step-00000033"
    assert read_step(path).about["ledger"]["packed"] is ("survivors are packed" in killed.stdout)
    resumed = run(mpirun, out)
    assert resumed.returncode == 0, resumed.stderr
    assert "ms packed and" not in resumed.stdout
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


def assert_obeyed(mpirun: Launch, message: str, out: Path, *more: str) -> None:
    """What a run that diverged says of a changed job works."""
    assert "A changed job needs a folder of its own (--out), and can begin with this one's dense network" in (
        " ".join(message.split())
    )
    changed = (*more, "retrain.clip_norm=1", f"weights={out / 'dense.h5'}")
    assert "the run of another job" in " ".join(run(mpirun, out, 2, *changed).stderr.split())
    done = run(mpirun, out.with_name("changed"), 2, *changed)
    assert done.returncode == 0, done.stderr


def test_weights_that_are_not_finite_are_never_saved(mpirun: Launch, tmp_path: Path) -> None:
    """They became so in the last step, so that no loss shows it."""
    out = tmp_path / "run"
    spoilt = run(mpirun, out, 2, "train.epochs=null", "train.steps=1", "train.optimizer={lr: 3e38, weight_decay: 1000}")
    assert spoilt.returncode == 2 and spoilt.stderr.count("hpcprune: error") == 1
    assert "train, after its last step: NaN or infinite weights in 0.weight, " in " ".join(spoilt.stderr.split())
    assert not list(out.rglob("*.h5"))


def test_packing_may_change_in_the_middle_of_a_round(mpirun: Launch, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "run"
    assert run(mpirun, out, 2, PACK, TINY="kill:0:50").returncode != 0
    resumed = run(mpirun, out, 2, "retrain.packing=never")
    assert resumed.returncode == 0, resumed.stderr
    assert "round 1/2: all gradients are sent, as retrain.packing says" in resumed.stdout
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


@pytest.mark.parametrize(
    "more",
    [(), ("retrain.wire=bfloat16",), ("retrain.optimizer={name: sgd, lr: 0.02}", "retrain.top_k={share: 0.2}")],
    ids=["float32", "bfloat16", "top-k"],
)
def test_nan_on_one_rank_ends_all_with_its_place_and_the_checkpoint_under_way_is_kept(
    mpirun: Launch, tmp_path: Path, more: tuple[str, ...]
) -> None:
    out, more = tmp_path / "run", (*more, PACK)
    spoilt = run(mpirun, out, 2, *more, TINY="nan:1:47", TINY_DISK="39:47")
    assert spoilt.returncode == 2, spoilt.stderr
    assert spoilt.stderr.count("hpcprune: error") == 1 and "Traceback" not in spoilt.stderr
    said = "retrain 1: step 14: NaN or infinite values on rank 1: the gradient of 6.bias (loss nan); lower the learning"
    assert said in " ".join(spoilt.stderr.split())
    assert_obeyed(mpirun, spoilt.stderr, out, *more)
    assert newest_step(out / "checkpoints") == (out / "checkpoints/step-00000040", [])
    resumed = run(mpirun, out, 2, *more)
    assert resumed.returncode == 0, resumed.stderr
    assert "step-00000040" in resumed.stdout


def test_weights_that_differ_between_ranks_are_never_saved(mpirun: Launch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spoilt = run(mpirun, out, TINY="spoil:1:15")
    assert spoilt.returncode == 2
    # At step 20, or later where the disk is slow.
    said = re.findall(
        r"checkpoint of step (\d+): the ranks' weights differ in 6\.bias \(rank 1 unlike rank 0\); ", spoilt.stderr
    )
    assert len(said) == 1 and int(said[0]) >= 20
    assert newest_step(out / "checkpoints") == (out / "checkpoints/step-00000010", [])


def test_a_run_that_is_saved_by_the_clock_goes_on_bit_for_bit(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path
) -> None:
    out, clock = tmp_path / "run", ("checkpoint.every_steps=null", "checkpoint.every_minutes=0.003")
    assert run(mpirun, out, 2, *clock, TINY="kill:0:30", TINY_SLEEP="0.05").returncode != 0
    path, _ = newest_step(out / "checkpoints")
    assert path is not None
    resumed = run(mpirun, out, 2, *clock)
    assert resumed.returncode == 0, resumed.stderr
    assert path.name in resumed.stdout
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


@pytest.mark.parametrize("to_ranks", [False, True], ids=["SIGUSR1 to mpirun", "SIGTERM to the ranks"])
def test_a_signal_stops_with_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path, to_ranks: bool
) -> None:
    out = tmp_path / "run"
    command = launch_command(2, "hpcprune", "run", TINY, "--out", out)
    with subprocess.Popen(
        command,
        env=launch_environment({"TINY_SLEEP": "0.05"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: (out / "checkpoints/step-00000040").exists(), process)
        targets = children(process.pid)[:1] if to_ranks else [process.pid]
        for target in targets:
            os.kill(target, signal.SIGTERM if to_ranks else signal.SIGUSR1)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == STOPPED, stderr
    assert "stopped by " + ("SIGTERM" if to_ranks else "SIGUSR1") in stdout
    assert "run the same command again" in stdout
    path, passed_over = newest_step(out / "checkpoints")
    assert path is not None and not passed_over
    assert read_step(path).about["ledger"]["run_step"] % 10, (
        "the signal should have fallen between two regular checkpoints"
    )
    resumed = run(mpirun, out)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, mpirun: Launch) -> Path:
    """The folder of a run on 2 ranks that was killed in its first round."""
    out = tmp_path_factory.mktemp("killed") / "run"
    assert run(mpirun, out, TINY="kill:1:60").returncode != 0
    return out


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks(mpirun: Launch, tmp_path: Path, killed: Path, ranks: int) -> None:
    out = Path(shutil.copytree(killed, tmp_path / "run"))
    path, _ = newest_step(out / "checkpoints")
    assert path is not None
    before = read_step(path)
    assert before.about["ledger"]["round"] == 1
    resumed = run(mpirun, out, ranks)
    assert resumed.returncode == 0, resumed.stderr
    after = read_model(out / "model.h5")
    for name, layer in after.layers.items():
        kept, mask = before.layers[name].mask, layer.mask
        assert mask is not None
        assert kept is None or not np.any(mask & ~kept), "a weight that was pruned is back"
    weights = sum(layer.values.size for layer in after.layers.values())
    assert sum(int((layer.values == 0).sum()) for layer in after.layers.values()) == round(0.9 * weights)


def test_the_masks_do_not_depend_on_the_number_of_ranks(mpirun: Launch, tmp_path: Path, uninterrupted: Path) -> None:
    hashes = set()
    for ranks in (1, 2, 3, 5):
        out = tmp_path / f"run{ranks}"
        done = run(mpirun, out, ranks, f"weights={uninterrupted / 'dense.h5'}", "retrain.epochs=0")
        assert done.returncode == 0, done.stderr
        hashes.add(read_model(out / "model.h5").about["mask_hash"])
    assert len(hashes) == 1


def test_a_rank_that_raises_ends_all_with_its_traceback_once(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 3, TINY="raise:1:30")
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert text.count("Traceback") == 1
    assert "failed (rank 1)" in text
    assert "ArithmeticError: this rank was told to raise" in text
    assert "tests/jobs/tiny/task.py" in text


def test_a_rank_that_raises_ends_the_others_within_5_seconds(mpirun: Launch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = launch_command(2, "hpcprune", "run", TINY, "--out", out)
    with subprocess.Popen(
        command,
        env=launch_environment({"TINY": "raise:1:30"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        seen = 0.0
        for line in process.stderr:
            if "Traceback" in line:
                seen = time.monotonic()
                break
        assert seen
        process.communicate(timeout=30)
        assert time.monotonic() - seen < 5


def test_a_rank_that_never_arrives_is_named(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 3, "world.timeout=4", TINY="hang:2:30")
    assert done.returncode == 2
    assert done.stderr.count("waited 4 s for rank 2 (of 3)") == 1
    assert "Traceback" not in done.stderr


def wait_for(condition, process: subprocess.Popen[str], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "the run did not come so far"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
