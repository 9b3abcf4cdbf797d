"""Being told to stop: a signal only sets a flag, which the ranks agree on at the next step boundary.

Nothing is saved inside a handler: a checkpoint needs all ranks, and a handler may run between any two instructions.
"""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["StopFlag"]


class StopFlag:
    """Whether this process was told to stop. SIGTERM, SIGINT and a chosen signal tell it; a second SIGINT interrupts.

    NCCL and some MPI libraries use SIGUSR1 or SIGUSR2 themselves, hence the choice.
    """

    def __init__(self, chosen: str) -> None:
        """Install the handlers; `chosen` is a signal's name, such as SIGUSR1. Only in the main thread."""
        self.signal = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.Signals[chosen]):
            signal.signal(number, self._handle)

    def __bool__(self) -> bool:
        return bool(self.signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
