"""What ranks tell each other beside the collectives: that they have arrived at one, and that they have failed.

Nobody can ask a rank that is not there why it is missing, so those that did arrive tell each other so; whoever was not
heard of is missing. Of ranks that fail at the same time one prints; which, they settle by the same messages.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["SETTLE", "Announcements"]

TAG = 30533  # user code is unlikely to use this tag
FAILED = -1  # what a rank announces in place of a collective's serial number
SETTLE = 0.5  # seconds that failing ranks take to learn of each other's failures
FEWEST_TRIES = 20  # to hear of other ranks' failures, however slow this rank is at the moment
PAUSE = 1e-3  # seconds between them


class Announcements:
    """Of a rank of a communicator, and those it has heard of. Of a rank alone (None) there is none."""

    def __init__(self, comm: MPI.Intracomm | None) -> None:
        self._comm = comm if comm is not None and comm.Get_size() > 1 else None
        self._heard: dict[int, int] = {}  # rank -> serial number of the latest collective it has announced
        self._failed: set[int] = set()
        self._sent: list[tuple[MPI.Request, npt.NDArray[Any]]] = []  # messages must live until they are sent, if ever

    def announce(self, serial: int) -> None:
        """Tell all others that this rank has arrived at a collective, which all ranks number alike."""
        if self._comm is None:
            return
        message = np.array([serial], np.int64)
        for other in range(self._comm.Get_size()):
            if other != self._comm.Get_rank():
                self._sent.append((self._comm.Isend(message, other, TAG), message))

    def listen(self, serial: int) -> bool:
        """Take in what was announced; whether a rank waits for this collective or a later one."""
        if self._comm is None:
            return False
        from mpi4py import MPI

        status, message, asked = MPI.Status(), np.empty(1, np.int64), False
        while self._comm.Iprobe(MPI.ANY_SOURCE, TAG, status):
            self._comm.Recv(message, status.Get_source(), TAG)
            arrived, source = int(message[0]), status.Get_source()
            if arrived == FAILED:
                self._failed.add(source)
            else:
                self._heard[source] = arrived
                asked = asked or arrived >= serial
        return asked

    def arrived(self, serial: int) -> set[int]:
        """The other ranks that were heard to have come as far as this collective."""
        return {rank for rank, arrived in self._heard.items() if arrived >= serial}

    def fail(self) -> bool:
        """Tell of this rank's failure; whether it is the one to print: none failed before it, and no lower one now."""
        if self._comm is None:
            return True
        self._listen_for(SETTLE / 10)
        if self._failed:
            return False  # and it does not announce itself: the rank that failed before it shall print
        self.announce(FAILED)
        self._listen_for(SETTLE)
        return all(rank > self._comm.Get_rank() for rank in self._failed)

    def _listen_for(self, seconds: float) -> None:
        end, tries = time.monotonic() + seconds, 0
        while time.monotonic() < end or tries < FEWEST_TRIES:
            self.listen(0)
            time.sleep(PAUSE)
            tries += 1
