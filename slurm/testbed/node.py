"""A node of the cluster on one machine: namespaces of its own, and a slurmd in them.

The first process of a node is a shell that starts slurmd, again if it crashes (22.05 does now and then), and takes up
orphans, as an init does. When the process that holds the namespaces is killed, the kernel kills everything in them at
once: a power failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

__all__ = ["Node"]

INIT = """
hostname "$1"
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
ulimit -c 0
trap 'kill $!; wait $!; exit' TERM
trap 'kill $!; wait $!' HUP
while true; do
    slurmd -D -f "$2/slurm.conf" -N "$1" &
    wait $!
    sleep 1
done
"""


class Node:
    """The node `name` of the cluster in `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self._record = folder / "run" / f"{name}.pid"

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return self._holder() is not None

    def start(self) -> None:
        """Switch it on. If it is, its slurmd starts anew, for otherwise Slurm does not look at it again for minutes."""
        if self.on:
            self._signal(signal.SIGHUP)
            return
        namespaces = "--mount --uts --ipc --pid --fork --kill-child"
        command = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", *namespaces.split()]
        with (self._folder / "log" / f"{self.name}.out").open("ab") as output:
            holder = subprocess.Popen(
                [*command, "bash", "-c", INIT, "init", self.name, str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._record.write_text(str(holder.pid))

    def fail(self) -> None:
        """Take its power away: slurmd, the steps and the tasks on it are gone at once."""
        holder = self._holder()
        if holder is not None:
            os.kill(holder, signal.SIGKILL)
        self._record.unlink(missing_ok=True)

    def stop(self) -> None:
        """Shut it down: slurmd ends by itself, then the rest."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        """To its first process, if it has power."""
        holder = self._holder()
        if holder is not None:
            with contextlib.suppress(OSError, ValueError):
                (init,) = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
                os.kill(int(init), number)

    def _holder(self) -> int | None:
        """The process that holds the namespaces, if it lives."""
        try:
            pid = int(self._record.read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if self.name.encode() in words.split(b"\0") else None
