"""A Slurm cluster on this machine, to try a job before it goes to the real one.

Each node has its own network, processes and mounts; the files and the cores are shared. As root:

    python3 slurm/testbed up [--nodes 4] [--cores 2] [--gpus 0] [--accounting]
    export SLURM_CONF=/tmp/hpcprune-testbed/slurm.conf      # in every shell that talks to it
    sbatch ...
    python3 slurm/testbed fail node2        # its power is gone; unplug node2: its cable
    python3 slurm/testbed recover node2
    python3 slurm/testbed rate 1gbit        # of every node; rate none: uncapped
    python3 slurm/testbed status
    python3 slurm/testbed down
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from cluster import Cluster, ClusterError

FOLDER = Path("/tmp/hpcprune-testbed")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where its files are (default: {FOLDER})")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the cluster")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--cores", type=int, default=2, help="that each node says it has")
    up.add_argument("--megabytes", type=int, default=4000, help="of memory that each node says it has")
    up.add_argument("--gpus", type=int, default=0, help="that each node says it has")
    up.add_argument("--accounting", action="store_true", help="sacct works, with MariaDB")
    commands.add_parser("down", help="end it and remove its files")
    for command, what in (
        ("fail", "take a node's power away"),
        ("unplug", "pull a node's cable out"),
        ("recover", "give a node its power and its cable back"),
    ):
        commands.add_parser(command, help=what).add_argument("node")
    commands.add_parser("rate", help="cap every node's network").add_argument("rate", help="such as 1gbit, or none")
    commands.add_parser("status", help="show nodes and jobs")
    given = parser.parse_args()
    try:
        act(Cluster(given.folder.absolute()), given)
    except (ClusterError, OSError) as error:
        sys.exit(f"testbed: error: {error}")


def act(cluster: Cluster, given: argparse.Namespace) -> None:
    """Do what the command line says."""
    if given.command == "up":
        cluster.up(given.nodes, given.cores, given.megabytes, given.gpus, given.accounting)
        print(f"{given.nodes} nodes are up\nexport SLURM_CONF={cluster.configuration}")
    elif given.command == "down":
        cluster.down()
    elif given.command == "fail":
        cluster.node(given.node).fail()
    elif given.command == "unplug":
        cluster.network.plug(cluster.node(given.node).name, False)
    elif given.command == "recover":
        cluster.network.plug(cluster.node(given.node).name, True)
        cluster.node(given.node).start()
    elif given.command == "rate":
        cluster.network.limit(parse_rate(given.rate))
    else:
        environment = {**os.environ, "SLURM_CONF": str(cluster.configuration)}
        off = [name for name in cluster.names if not cluster.node(name).on]
        print(f"without power: {', '.join(off) or 'none'}", flush=True)
        for command in (["sinfo", "-N", "-l"], ["squeue", "-l"]):
            subprocess.run(command, env=environment, check=False)


def parse_rate(text: str) -> float | None:
    """Gbit a second; None for none."""
    if text == "none":
        return None
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)(m|g)bit", text)
    if not matched or not float(matched[1]):
        raise ClusterError(f"rate {text!r}: write a number and its unit, such as 1gbit or 100mbit, or none")
    return float(matched[1]) / (1000 if matched[2] == "m" else 1)


if __name__ == "__main__":
    main()
