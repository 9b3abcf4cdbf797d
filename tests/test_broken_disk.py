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
    assert_goes_on(hpcprune, disk / "run", done)


_STEP, _MODEL = "checkpoints/step-00000121", "model.h5"
FILLED: dict[str, tuple[int, list[str] | None, str, str]] = {  # after which step; what still fits; what does not; then
    "metrics": (30, None, "metrics.jsonl: cannot be written: No space left", "step-00000020 (round 0, step 20)"),
    "a step": (30, [], "rank-0000.h5: cannot be written: the disk is full", "step-00000020 (round 0, step 20)"),
    "dense.h5": (60, None, "dense.h5: cannot be written: the disk is full", "step-00000040 (round 0, step 40)"),
    "model.h5": (120, [_STEP], "model.h5: cannot be written: the disk is full", "step-00000121 (round 1, step 60)"),
    "page": (120, [_STEP, _MODEL], "report.html: cannot be written .No space", "step-00000121 (round 1, step 60)"),
    "report": (120, [_STEP, _MODEL, "report.html"], "report.json: cannot be", "step-00000121 (round 1, step 60)"),
}


def size(path: Path) -> int:
    """The bytes that a file, or a folder's files, take on a disk with pages of 4 KB."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files)


@pytest.mark.parametrize("step,fits,says,at", FILLED.values(), ids=FILLED)
def test_a_disk_that_fills_up_costs_a_run_nothing(
    hpcprune: Command, disk: Path, done: Path, step: int, fits: list[str] | None, says: str, at: str
) -> None:
    run, first = disk / "run", "checkpoints/step-00000020"
    run.mkdir()
    shutil.copy(done / "job.yaml", run)
    shutil.copy(done / "metrics.jsonl", run)
    shutil.copytree(done / first, run / first)
    room = 0 if fits is None else 8192 + sum(size(done / name) for name in fits)  # and 8 KB of metrics
    command = process if "metrics" in says else hpcprune  # Python writes what is left of metrics.jsonl when it ends
    ended = command("run", JOB, "--out", run, FILL=f"{disk}/filler:{step - 20}:{room}")
    ended.assert_refused(rf"{run}/.*{says}.*; (make room|free some space|put that right)")
    for path in (done / first).iterdir():
        assert (run / first / path.name).read_bytes() == path.read_bytes()
    assert hpcprune("check", run).code == 0
    assert not [*run.rglob("*.partial")], "a part of a file was left"
    (disk / "filler").unlink()
    assert_goes_on(hpcprune, run, done, f"going on from {run}/checkpoints/{at}")


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
    (newest / name).write_bytes(DAMAGES[how][0]((newest / name).read_bytes()))
    assert hpcprune("check", cut).code == 1
    assert_goes_on(hpcprune, cut, done, f"passed over: {newest / name}: ", f"going on from {before} (round 1, step 39)")
