"""Progress: what rank 0 shows while a run runs. A bar on a terminal; in a file, a line now and then.

Open MPI gives every rank a terminal of its own making, whatever mpirun's output is, so a rank that mpirun started looks
at mpirun's output instead of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpcprune.world import World

__all__ = ["Display", "Stage"]

LINE_EVERY = 10.0  # seconds between two lines of progress in a file


class Stage:
    """One stage's progress: `advance` once a step."""

    def __init__(self, display: Display, name: str, total: int, done: int) -> None:
        self.total, self.done, self._first = total, done, done
        self._display, self._name = display, name
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None

    def advance(self, note: str) -> None:
        """One more step is done; `note` stands beside it (the loss)."""
        self.done += 1
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, note=f"{note}  {rate:.1f} steps/s")
        elif now - self._last >= LINE_EVERY:
            self._last = now
            left = (self.total - self.done) / rate
            self._display.say(f"{self._name}: {self.done}/{self.total}  {note}  {rate:.1f} steps/s  {left:.0f} s left")


class Display:
    """What is shown: lines of text and stages. Ranks other than 0 are silent unless it is verbose."""

    def __init__(self, world: World, verbose: bool = False) -> None:
        width = _terminal_width()
        self.console = Console(force_terminal=width > 0, width=width or 100, highlight=False, emoji=False)
        self._world, self._verbose = world, verbose

    def say(self, text: str, every_rank: bool = False) -> None:
        """Print a line from rank 0; with `every_rank`, when verbose, from every rank with its number."""
        if self._verbose and every_rank:
            self.console.print(f"rank {self._world.rank}: {text}", markup=False, soft_wrap=True)
        elif self._world.rank == 0 and not every_rank:
            self.console.print(text, markup=False, soft_wrap=True)
        self.console.file.flush()

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """Show the progress of `total` steps, of which `done` were done before."""
        stage = Stage(self, name, total, done)
        if self._world.rank != 0 or not self.console.is_terminal:
            yield stage
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(name, total=total, completed=done, note="")
            stage._bar = bar
            yield stage


def _terminal_width() -> int:
    """Columns of the terminal that the output ends on; 0 if it is none."""
    of_mpirun = None
    try:
        if "PMIX_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
            of_mpirun = os.open(f"/proc/{os.getppid()}/fd/1", os.O_WRONLY | os.O_NOCTTY)
        return os.get_terminal_size(sys.stdout.fileno() if of_mpirun is None else of_mpirun).columns or 80
    except (OSError, AttributeError):  # a notebook's output is no file, and there may be none at all
        return 0
    finally:
        if of_mpirun is not None:
            os.close(of_mpirun)
