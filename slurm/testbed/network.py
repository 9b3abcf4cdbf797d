"""Hosts on one machine: network namespaces that see each other through a bridge, at a rate of choice.

Each host has a name, an address and a network of its own, so Slurm, MPI, gloo and Horovod take processes on two of them
for processes on two machines and talk TCP; the cores, the memory and the files are shared. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Network"]

FOLDER = Path("/etc/netns")  # `ip netns exec` puts the files of FOLDER/<name> over those of /etc


class Network:
    """Hosts of these names on a bridge, at most 250. `subnet` is the first three numbers of their addresses.

    This machine is on the bridge too, as `subnet`.254. There is one network of a bridge's name on a machine at a time.
    """

    def __init__(self, bridge: str, subnet: str, names: Sequence[str]) -> None:
        self.bridge, self.subnet, self.names = bridge, subnet, list(names)
        self.outside = f"{subnet}.254"

    @staticmethod
    def possible() -> bool:
        """Whether this process may make hosts."""
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            return False
        trial = f"trial{os.getpid()}"
        made = subprocess.run(["ip", "netns", "add", trial], capture_output=True).returncode == 0
        return made and subprocess.run(["ip", "netns", "del", trial]).returncode == 0

    def address(self, name: str) -> str:
        return f"{self.subnet}.{self.names.index(name) + 1}"

    def hosts_file(self) -> str:
        """The addresses of all hosts and of this machine, as /etc/hosts has them."""
        machine = os.uname().nodename.split(".")[0]
        known = [(self.address(name), name) for name in self.names] + [(self.outside, machine)]
        return "\n".join(["127.0.0.1 localhost", *(f"{address} {name}" for address, name in known), ""])

    def up(self) -> None:
        """Make all hosts; OSError if something is refused, and then none are left."""
        self.down()  # what was left behind by somebody who was killed would be in the way
        try:
            _do(f"ip link add {self.bridge} type bridge", f"ip addr add {self.outside}/24 dev {self.bridge}")
            _do(f"ip link set {self.bridge} up")
            for name in self.names:
                self._add(name)
        except OSError:
            self.down()
            raise

    def _add(self, name: str) -> None:
        # Names are looked up in this file alone: a name server that does not answer costs 20 s at each start.
        files = FOLDER / name
        files.mkdir(parents=True, exist_ok=True)
        (files / "hosts").write_text(self.hosts_file())
        (files / "nsswitch.conf").write_text("hosts: files\n")
        _do(
            f"ip netns add {name}",
            f"ip link add {self._port(name)} type veth peer name eth0 netns {name}",
            f"ip link set {self._port(name)} master {self.bridge} up",
            f"ip -n {name} addr add {self.address(name)}/24 dev eth0",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set eth0 up",
        )

    def down(self) -> None:
        """Remove all hosts and the bridge, if there are any."""
        for name in self.names:
            for command in (f"ip link del {self._port(name)}", f"ip netns del {name}"):
                subprocess.run(command.split(), capture_output=True)
            shutil.rmtree(FOLDER / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        with contextlib.suppress(OSError):
            FOLDER.rmdir()  # only if it is empty

    def limit(self, gbit: float | None) -> None:
        """Cap what each host may send, and may receive, in a second; None lifts the cap."""
        for name in self.names:
            for control, device in ((f"tc -n {name} qdisc", "eth0"), ("tc qdisc", self._port(name))):
                if gbit is None:
                    subprocess.run(
                        f"{control} del dev {device} root".split(), capture_output=True
                    )  # maybe there is none
                else:
                    shape = f"tbf rate {round(gbit * 1000)}mbit burst 256kb latency 20ms"
                    _do(f"{control} replace dev {device} root {shape}")

    def plug(self, name: str, connected: bool) -> None:
        """Put a host's cable in, or pull it out."""
        _do(f"ip link set {self._port(name)} {'up' if connected else 'down'}")

    def _port(self, name: str) -> str:
        """The host's end on the bridge."""
        return f"{self.bridge[:8]}-{self.names.index(name) + 1}"


def _do(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")
