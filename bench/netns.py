"""Hosts on one machine for benches: network namespaces that see each other through a bridge, at a rate of choice.

    python bench/netns.py down      # removes what a bench left behind that was killed

The hosts are those of slurm/testbed/network.py, which needs root and iproute2; mpirun enters one through a script in
place of ssh.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slurm.testbed.network import Network

BRIDGE, SUBNET = "hpcbench", "10.78.0"
MOST = 8  # hosts

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
        self._network = network(count)

    @staticmethod
    def possible() -> bool:
        """Whether this process may make hosts."""
        return Network.possible()

    def __enter__(self) -> Hosts:
        network(MOST).down()  # what a killed bench has left would be in the way
        self._folder = tempfile.TemporaryDirectory()
        agent = Path(self._folder.name, "agent")
        agent.write_text(AGENT)
        agent.chmod(0o755)
        self._agent = str(agent)
        self._network.up()
        return self

    def __exit__(self, *_: object) -> None:
        self._network.down()
        self._folder.cleanup()

    def limit(self, gbit: float | None) -> None:
        """Cap what each host may send, and may receive, in a second; None lifts the cap."""
        self._network.limit(gbit)

    def mpirun(self, command: Sequence[str]) -> str:
        """What `command` prints when it is started as one rank a host."""
        subnet, names = f"{SUBNET}.0/24", self._network.names
        options = ["--prtemca", "plm_ssh_agent", self._agent, "--prtemca", "prte_if_include", subnet]
        options += ["--mca", "btl_tcp_if_include", subnet, "--host", ",".join(f"{name}:1" for name in names)]
        return mpirun(len(names), command, options)


def network(count: int) -> Network:
    """The network of so many hosts."""
    return Network(BRIDGE, SUBNET, [f"{BRIDGE}{number}" for number in range(1, count + 1)])


if __name__ == "__main__":
    if sys.argv[1:] != ["down"]:
        sys.exit(__doc__)
    network(MOST).down()
