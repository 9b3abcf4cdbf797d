"""What disks do to runs: they fill up, and what comes back from them is cut short, has a bit flipped, or is too new."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpcprune.checkpoint import read_model
from hpcprune.checkpoint.format import FORMAT
from tests.commands import Command, process
from tests.conftest import SMALL
from tests.jobs.small.task import fill

JOB = SMALL / "job.yaml"


def assert_goes_on(hpcprune: Command, run: Path, done: Path, *says: str) -> None:
    """Run again, it ends with the weights of a run that nothing disturbed, and all that is in its folder is whole."""
    again = hpcprune("run", JOB, "--out", run)
    assert again.code == 0, again.err
    for text in says:
        assert text in again.out
    assert_ended_like(hpcprune, run, done)


def assert_ended_like(hpcprune: Command, run: Path, done: Path) -> None:
    assert hpcprune("check", run).code == 0
    ours, theirs = read_model(run / "model.h5"), read_model(done / "model.h5")
    for name, layer in theirs.layers.items():
        np.testing.assert_array_equal(ours.layers[name].values, layer.values, err_msg=name)


# Full


def test_a_full_disk_is_told_at_once(hpcprune: Command, disk: Path, done: Path) -> None:
    fill(disk / "filler", 2048)
    ended = hpcprune("run", JOB, "--out", disk / "run")
    ended.assert_refused(
        r"out: \S+/run has \d+ bytes of room, and a checkpoint needs 3,600; make room, or choose another"
    )
    assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    (disk / "run").mkdir()
    (disk / "run" / "job.new").write_text("# dig")  # what a process leaves that dies as it begins
    assert_goes_on(hpcprune, disk / "run", done)


SAYS = r"cannot be written.*(No space left on device|the disk is full).*; (make room|free some space|put that right)"
FILLED = {  # after which step, how much room is left, what is to be written then and cannot be
    "metrics": (30, 0, "every_steps=20", "metrics.jsonl"),
    "a step": (30, 8192, "every_steps=20", "rank-0000.h5"),
    "dense.h5": (60, 0, "every_steps=null", "dense.h5"),
}


@pytest.mark.parametrize("step,room,when,name", FILLED.values(), ids=FILLED)
def test_a_disk_that_fills_up_costs_a_run_nothing(
    hpcprune: Command, disk: Path, done: Path, step: int, room: int, when: str, name: str
) -> None:
    run, first = disk / "run", "checkpoints/step-00000020"
    run.mkdir()
    shutil.copy(done / "job.yaml", run)
    shutil.copy(done / "metrics.jsonl", run)
    shutil.copytree(done / first, run / first)
    command = process if name == "metrics.jsonl" else hpcprune  # Python writes what is left of it when it ends
    ended = command("run", JOB, f"checkpoint.{when}", "--out", run, FILL=f"{disk}/filler:{step - 20}:{room}")
    ended.assert_refused(rf"{run}/.*{name}: {SAYS}")
    for path in (done / first).iterdir():
        assert (run / first / path.name).read_bytes() == path.read_bytes()
    assert hpcprune("check", run).code == 0
    assert not [*run.rglob("*.partial")], "a part of a file was left"
    (disk / "filler").unlink()
    assert_goes_on(hpcprune, run, done, f"going on from {run / first} (round 0, step 20)")


@pytest.mark.parametrize("written", range(3))
def test_a_disk_that_fills_up_at_the_end_costs_a_run_nothing(
    hpcprune: Command, disk: Path, done: Path, written: int
) -> None:
    run, results = Path(shutil.copytree(done, disk / "run")), ["model.h5", "report.html", "report.json"]
    for name in results:
        (run / name).unlink()
    pages = sum(-(-(done / name).stat().st_size // 4096) for name in results[:written])
    fill(disk / "filler", 4096 * (pages + 2))
    ended = hpcprune("run", JOB, "--out", run)
    ended.assert_refused(rf"{run}/{results[written]}: {SAYS}")
    assert [name for name in results if (run / name).exists()] == results[:written]
    assert hpcprune("check", run).code == 0
    (disk / "filler").unlink()
    assert_goes_on(hpcprune, run, done, f"going on from {run}/checkpoints/step-00000121 (round 1, step 60)")


# Damaged


def flip(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut to nothing": (lambda data: b"", "is not an hpcprune checkpoint; give|the file is empty; weights are"),
    "cut in its text": (lambda data: data[:100], "its first 512 bytes are cut short or were changed; restore it"),
    "cut after its text": (lambda data: data[:512], "is cut short: 0 of .* bytes follow its first 512; copy it again"),
    "cut in half": (lambda data: data[: len(data) // 2], "is cut short: .* bytes follow its first 512; copy it again"),
    "cut by a byte": (lambda data: data[:-1], "is cut short: .* bytes follow its first 512; copy it again"),
    "a bit of its text": (lambda data: flip(data, 300), "its first 512 bytes were changed; restore it from a copy"),
    "a bit in the middle": (lambda data: flip(data, len(data) // 2), "does not match its sha256: .*; copy it again"),
    "its last bit": (lambda data: flip(data, -1), "does not match its sha256: .*; copy it again"),
    "newer": (
        lambda data: data.replace(b"format %d\n" % FORMAT, b"format %d\n" % (FORMAT + 1), 1),
        f"is of checkpoint format {FORMAT + 1}, made by a newer hpcprune; .*: upgrade hpcprune",
    ),
}


@pytest.mark.parametrize("damage,says", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(
    hpcprune: Command, tmp_path: Path, done: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    whole, bad, target = done / "model.h5", tmp_path / "bad.h5", tmp_path / "target"
    bad.write_bytes(damage(whole.read_bytes()))
    says = f"{bad}: ({says})"
    for argv in (
        ["run", JOB, f"weights={bad}", "--out", target],
        ["show", bad],
        ["diff", bad, whole],
        ["diff", whole, bad],
        ["export", bad, "--to", "safetensors", target],
    ):
        hpcprune(*argv).assert_refused(says)
        assert [path.name for path in tmp_path.iterdir()] == ["bad.h5"]
    checked = hpcprune("check", bad)
    assert (checked.code, checked.err) == (1, "")
    assert checked.out.startswith(f"BAD  {bad}: ") and checked.out.count("\n") == 1


@pytest.mark.parametrize(
    "name,how",
    [
        ("index.h5", "cut to nothing"),
        ("rank-0000.h5", "cut in half"),
        ("rank-0000.h5", "cut by a byte"),
        ("index.h5", "a bit in the middle"),
        ("rank-0000.h5", "newer"),
    ],
)
def test_a_damaged_step_is_named_and_passed_over(hpcprune: Command, cut: Path, done: Path, name: str, how: str) -> None:
    *_, before, newest = sorted((cut / "checkpoints").iterdir())
    damaged = DAMAGES[how][0]((newest / name).read_bytes())
    (newest / name).write_bytes(damaged)
    assert hpcprune("check", cut).code == 1
    # Which step that is hangs on the disk, which may have put checkpoints off. The 61st is the pruning.
    number = int(before.name.removeprefix("step-"))
    at = f"(round 0, step {number})" if number <= 60 else f"(round 1, step {number - 61})"
    again = hpcprune("run", JOB, "--out", cut)
    assert again.code == 0, again.err
    assert f"passed over: {newest / name}: " in again.out and f"going on from {before} {at}" in again.out
    if (newest / name).read_bytes() == damaged:  # this time the disk put that very step off
        assert hpcprune("check", cut).code == 1
        shutil.rmtree(newest)
    assert_ended_like(hpcprune, cut, done)
