"""Progress: a bar on a terminal, also behind mpirun, and in a file a line now and then; other ranks are silent.

Run as a program this file is a run of 30 steps: `test_progress.py verbose|quiet`.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from hpcprune import progress
from hpcprune.progress import Display
from hpcprune.world import World
from tests.conftest import Launch, launch_command, launch_environment
from tests.terminal import on_a_terminal, plain

STEPS = 30
WITHOUT_MPI = {name: value for name, value in os.environ.items() if not name.startswith(("PMIX_", "OMPI_"))}


def rank(number: int) -> World:
    world = World.alone()
    world.rank, world.size = number, 4
    return world


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is told to go on, and no terminal."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "_terminal_width", lambda: 0)

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


# In a file


def test_a_line_every_10_seconds_says_the_rate_and_the_time_left(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Display(rank(0)).stage("round 1/2: retrain", 100) as stage:
        for number in range(100):
            clock(0.5)
            stage.advance(f"loss {number}")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"round 1/2: retrain: {done}/100  loss {done - 1}  2.0 steps/s  {(100 - done) // 2} s left"
        for done in (20, 40, 60, 80, 100)
    ]


def test_what_was_done_before_counts_for_the_progress_and_not_for_the_rate(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Display(rank(0)).stage("train", 100, done=80) as stage:
        for _ in range(5):
            clock(4)
            stage.advance("loss 1")
    assert capsys.readouterr().out == "train: 83/100  loss 1  0.2 steps/s  68 s left\n"


def test_a_slow_step_is_told_at_once_and_a_quick_stage_not_at_all(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(rank(0))
    with display.stage("slow", 2) as stage:
        clock(600)
        stage.advance("")
        assert capsys.readouterr().out.startswith("slow: 1/2")
    with display.stage("quick", 1000) as stage:
        for _ in range(1000):
            clock(0.001)
            stage.advance("")
    with display.stage("nothing", 0):
        pass
    assert capsys.readouterr().out == ""


def test_other_ranks_are_silent_unless_they_are_asked(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 3):
        for verbose in (False, True):
            display = Display(rank(number), verbose)
            display.say("to all")
            display.say("own", every_rank=True)
            with display.stage("stage", 2) as stage:
                clock(20)
                stage.advance("")
            shown = capsys.readouterr().out
            assert ("to all\n" in shown) == ("stage: 1/2" in shown) == (number == 0)
            assert (f"rank {number}: own\n" in shown) == ("own" in shown) == verbose


def test_text_is_shown_as_it_is(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]a/b[/bold] [1, 2] :smile: " + "word " * 100
    Display(rank(0)).say(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("stdout", [None, io.StringIO()], ids=["none", "no file"])
def test_output_that_is_no_file_is_no_terminal(monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO | None) -> None:
    """A notebook's, for instance."""
    for name in ("PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    with Display(rank(0)).stage("train", 2) as stage:
        stage.advance("")
        assert stage._bar is None


# On a terminal


def assert_bar(shown: str, columns: int) -> None:
    assert "━" in shown
    text = plain(shown)
    steps = [int(done) for done in re.findall(rf"train +━*[╸╺━ ]* +(\d+)/{STEPS}", text)]
    assert len(set(steps)) > 3 and steps == sorted(steps), text
    assert re.search(r"\d:\d\d:\d\d", text) and re.search(r"loss \d+  [\d.]+ steps/s", text)
    assert all(len(line) <= columns for line in text.splitlines())
    assert f"train: 1/{STEPS}" not in text
    assert "before\n" in text and "after\n" in text
    assert shown.rindex("━") < shown.rindex("\x1b[2K") < shown.rindex("after"), "the bar goes when the stage is done"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_a_bar_with_rate_and_time_left(columns: int) -> None:
    command = [sys.executable, __file__, "quiet"]
    status, shown = on_a_terminal(command, launch_environment() | WITHOUT_MPI, columns)
    assert status == 0, shown
    assert_bar(shown, columns)


def test_a_terminal_behind_mpirun_has_one_bar_and_a_file_has_lines(mpirun: Launch) -> None:
    status, shown = on_a_terminal(launch_command(2, __file__, "quiet"), launch_environment(), 100)
    assert status == 0, shown
    assert_bar(shown, 100)
    assert "rank 0" not in shown and "rank 1" not in shown

    done = mpirun(2, __file__, "verbose")
    lines = done.stdout.replace("\r\n", "\n").splitlines()
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "━" not in done.stdout
    assert sorted(line for line in lines if line.startswith("rank")) == ["rank 0: of 2", "rank 1: of 2"]
    assert [line.split()[1] for line in lines if line.startswith("train")] == [f"{n + 1}/{STEPS}" for n in range(STEPS)]
    assert lines.count("before") == lines.count("after") == 1


def main(verbose: bool) -> None:
    progress.LINE_EVERY = 0
    world = World.of()
    display = Display(world, verbose)
    display.say("before")
    display.say(f"of {world.size}", every_rank=True)
    with display.stage("train", STEPS) as stage:
        for number in range(STEPS):
            time.sleep(0.03)
            stage.advance(f"loss {number}")
    world.barrier("test")
    display.say("after")


if __name__ == "__main__":
    main(sys.argv[1] == "verbose")
