"""Hosts on one machine for benches: network namespaces that see each other through a bridge, at a rate of choice.

    python bench/netns.py down      # removes what a bench left behind that was killed

Each host has a name, an address and a network of its own, so MPI, gloo and Horovod take ranks on two of them for ranks
on two machines and talk TCP; the cores and the memory are shared. Needs root and iproute2 (ip, tc); mpirun enters a
host through a script in place of ssh.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BRIDGE, NETWORK = "hpcbench", "10.78.0"
FOLDER = Path("/etc/netns")  # `ip netns exec` puts the files of FOLDER/<name> over those of /etc

# What mpirun calls in place of ssh: agent [options] <host> <command>...
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; eval "$*"' "$host" "$@"
"""

ALLOW = {f"{name}_ALLOW_RUN_AS_ROOT{suffix}": "1" for name in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")}


def mpirun(ranks: int, command: Sequence[str], options: Sequence[str] = ()) -> str:
    """What `command` prints when it is started as ranks of MPI, free to run on any core; its errors are shown."""
    launcher = ["mpirun", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *options, "-n", str(ranks)]
    done = subprocess.run([*launcher, *command], env={**os.environ, **ALLOW}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"mpirun ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


class Hosts:
    """`count` hosts, made on entry and removed on exit. There is one set of them on a machine at a time."""

    def __init__(self, count: int) -> None:
        self.names = [f"{BRIDGE}{number}" for number in range(1, count + 1)]

    @staticmethod
    def possible() -> bool:
        """Whether this process may make hosts."""
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            return False
        made = subprocess.run(["ip", "netns", "add", f"{BRIDGE}0"], capture_output=True).returncode == 0
        return made and subprocess.run(["ip", "netns", "del", f"{BRIDGE}0"]).returncode == 0

    def __enter__(self) -> Hosts:
        down()  # what a killed bench has left would be in the way
        self._folder = tempfile.TemporaryDirectory()
        agent = Path(self._folder.name, "agent")
        agent.write_text(AGENT)
        agent.chmod(0o755)
        self._agent = str(agent)
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        down()
        self._folder.cleanup()

    def _up(self) -> None:
        _do(f"ip link add {BRIDGE} type bridge", f"ip addr add {NETWORK}.254/24 dev {BRIDGE}")
        _do(f"ip link set {BRIDGE} up")
        addresses = [f"{NETWORK}.{number} {name}" for number, name in enumerate(self.names, 1)]
        for number, name in enumerate(self.names, 1):
            # Names are looked up in this file alone: a name server that does not answer costs 20 s at each start.
            files = FOLDER / name
            files.mkdir(parents=True, exist_ok=True)
            (files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
            (files / "nsswitch.conf").write_text("hosts: files\n")
            _do(
                f"ip netns add {name}",
                f"ip link add {_port(name)} type veth peer name eth0 netns {name}",
                f"ip link set {_port(name)} master {BRIDGE} up",
                f"ip -n {name} addr add {NETWORK}.{number}/24 dev eth0",
                f"ip -n {name} link set lo up",
                f"ip -n {name} link set eth0 up",
            )

    def limit(self, gbit: float | None) -> None:
        """Cap what each host may send, and may receive, in a second; None lifts the cap."""
        for name in self.names:
            for port in (f"tc -n {name} qdisc", "tc qdisc"):
                device = "eth0" if "-n" in port else _port(name)
                if gbit is None:
                    subprocess.run(f"{port} del dev {device} root".split(), capture_output=True)  # there may be none
                else:
                    shape = f"tbf rate {round(gbit * 1000)}mbit burst 256kb latency 20ms"
                    _do(f"{port} replace dev {device} root {shape}")

    def mpirun(self, command: Sequence[str]) -> str:
        """What `command` prints when it is started as one rank a host."""
        network = f"{NETWORK}.0/24"
        options = ["--prtemca", "plm_ssh_agent", self._agent, "--prtemca", "prte_if_include", network]
        options += ["--mca", "btl_tcp_if_include", network, "--host", ",".join(f"{name}:1" for name in self.names)]
        return mpirun(len(self.names), command, options)


def down() -> None:
    """Remove all hosts and the bridge, if there are any."""
    listed = subprocess.run(["ip", "-o", "netns"], capture_output=True, text=True).stdout.splitlines()
    for name in [line.split()[0] for line in listed if line.startswith(BRIDGE)]:
        for command in (f"ip link del {_port(name)}", f"ip netns del {name}"):
            subprocess.run(command.split(), capture_output=True)
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
    with contextlib.suppress(OSError):
        FOLDER.rmdir()  # only if it is empty


def _port(name: str) -> str:
    """The host's end on the bridge."""
    return f"{name}-p"


def _do(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")


if __name__ == "__main__":
    if sys.argv[1:] != ["down"]:
        sys.exit(__doc__)
    down()
