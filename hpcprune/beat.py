"""The beat: a few lines that a run leaves in its folder every few seconds, for whoever asks how far it is.

It is a help and nothing more: a run does not read it, and does not end because it cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

__all__ = ["Beat", "Pulse", "read_beat"]

EVERY = 5.0  # seconds


@dataclass
class Beat:
    """Where a run stands. `left`: seconds to the end of the last round at the pace of this stage; None: unknown."""

    stage: str = ""
    round: int = 0
    rounds: int = 0
    sparsity: float = 0.0
    step: int = 0
    steps: int = 0
    left: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    ranks: int = 1
    host: str = ""
    slurm_job: str = ""
    written: float = 0.0


class Pulse:
    """Writes a run's beat: at once where the stage changes, and every few seconds while its steps pass."""

    def __init__(self, path: Path | None) -> None:
        """path: of the file; None for ranks that write none."""
        self.beat = Beat(host=socket.gethostname(), slurm_job=os.environ.get("SLURM_JOB_ID", ""))
        self._path = path
        self._start = (0, time.monotonic())  # the step at which the stage was begun, or gone on with, and when

    def begin(self, stage: str, step: int = 0, steps: int = 0) -> None:
        """A stage begins, at a step of so many."""
        self.beat.stage, self.beat.step, self.beat.steps, self.beat.left = stage, step, steps, None
        self._start = (step, time.monotonic())
        self._write()

    def advance(self, step: int, steps_after: int) -> None:
        """A step is done; `steps_after` are to come in later rounds."""
        self.beat.step = step
        self.beat.left = (self.beat.steps - step + steps_after) * self.pace
        if time.time() - self.beat.written > EVERY:
            self._write()

    def evaluation(self, metrics: dict[str, float]) -> None:
        """The network was evaluated; a run's last beat is this one."""
        self.beat.metrics = metrics
        self._write()

    @property
    def pace(self) -> float:
        """Seconds a step of this stage."""
        first, start = self._start
        return (time.monotonic() - start) / max(1, self.beat.step - first)

    def _write(self) -> None:
        if self._path is None:
            return
        self.beat.written = time.time()
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(asdict(self.beat)))
            new.replace(self._path)


def read_beat(path: Path) -> Beat | None:
    """What a run has left last; None if there is nothing that can be read."""
    try:
        values = json.loads(path.read_text())
        return Beat(**{each.name: values[each.name] for each in fields(Beat)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
