"""The cluster on one machine: munge, slurmctld, and nodes with a slurmd each; accounting on demand.

Everything that it writes lies in one folder, and nothing that a system's own Slurm or MariaDB uses is touched: other
ports, other sockets, no systemd, no cgroups.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from string import Template

from network import Network
from node import Node

__all__ = ["Cluster", "ClusterError"]

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
}
ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
PMIX = "libpmix-dev"  # for its libpmix.so: Slurm's plugin looks for that name
BRIDGE, SUBNET = "hpctestbed", "10.77.0"
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller}
AccountingStoragePort=17819
AccountingStoragePass={folder}/run/munge.sock"""
DAEMON = """AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost={machine}
DbdAddr={controller}
DbdPort=17819
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=testbed
"""
PATIENCE = 30.0  # seconds in which a daemon must be there


class ClusterError(Exception):
    """The cluster cannot do what was asked; the text says what to do."""


class Cluster:
    """The cluster whose files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._shape = folder / "shape.json"
        self._environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self._machine = os.uname().nodename.split(".")[0]

    @property
    def names(self) -> list[str]:
        """The nodes' names; of a cluster that is not up, ClusterError."""
        try:
            count = int(json.loads(self._shape.read_text())["nodes"])
        except OSError:
            raise ClusterError(f"no cluster is up in {self.folder}; start one: testbed up") from None
        return [f"node{number}" for number in range(1, count + 1)]

    @property
    def network(self) -> Network:
        return Network(BRIDGE, SUBNET, self.names)

    def node(self, name: str) -> Node:
        """A node by its name."""
        if name not in self.names:
            raise ClusterError(f"no node {name!r}; there are {', '.join(self.names)}")
        return Node(name, self.folder)

    def up(self, nodes: int, cores: int, megabytes: int, gpus: int, accounting: bool) -> None:
        """Start a cluster of nodes that claim so many cores, GPUs and so much memory, and wait until all are idle."""
        self._check(accounting)
        if self._shape.exists():
            self.down()
        if Path("/sys/class/net", BRIDGE).exists():
            raise ClusterError(
                "a cluster is up on this machine; end it: testbed --folder FOLDER down (if nothing is left of it: "
                f"ip link del {BRIDGE})"
            )
        for name in ("state", "log", "run", "spool", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._shape.write_text(json.dumps({"nodes": nodes}))
        for name in self.names:
            (self.folder / "spool" / name).mkdir(exist_ok=True)
            (self.folder / "tmp" / name).mkdir(exist_ok=True)
        try:
            self.network.up()
            self._configure(cores, megabytes, gpus, accounting)
            self._start_munge()
            if accounting:
                self._start_accounting()
            self._do("slurmctld", "-f", str(self.configuration), "-c")
            for name in self.names:
                self.node(name).start()
            self._wait(lambda: len(self._idle()) == nodes, "slurmctld", "all nodes to be idle")
        except BaseException:
            self.down(keep_logs=True)
            raise

    def down(self, keep_logs: bool = False) -> None:
        """End all jobs and daemons, and remove the network and the files."""
        names = self.names
        with contextlib.suppress(subprocess.TimeoutExpired):  # of a controller that does not answer
            subprocess.run(["scancel", "--user=root"], env=self._environment, capture_output=True, timeout=5)
        for name in names:
            self.node(name).stop()
        for daemon in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._signal(daemon, signal.SIGTERM)
        end = time.monotonic() + 5
        while any(map(self._pid, ("slurmctld", "slurmdbd", "mariadbd", "munged"))) and time.monotonic() < end:
            time.sleep(0.1)
        for name in names:
            self.node(name).fail()
        for daemon in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._signal(daemon, signal.SIGKILL)
        self.network.down()
        self._shape.unlink()
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check(self, accounting: bool) -> None:
        """Raise ClusterError if this process may not, or lacks what it needs."""
        wanted = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
        missing = sorted({package for program, package in wanted.items() if not shutil.which(program)})
        if not any(Path(folder, "libpmix.so").exists() for folder in _library_folders()):
            missing.append(PMIX)
        if missing:
            raise ClusterError(
                f"missing packages; as root: apt-get install --no-install-recommends {' '.join(missing)}"
            )
        if os.geteuid():
            raise ClusterError("root is needed, for network namespaces and slurmd; start it with sudo")
        if not Network.possible():
            raise ClusterError("network namespaces cannot be made here (a container without CAP_SYS_ADMIN?)")

    def _configure(self, cores: int, megabytes: int, gpus: int, accounting: bool) -> None:
        values = {"folder": str(self.folder), "machine": self._machine, "controller": self.network.outside}
        shape = (
            f"CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory={megabytes}"
        )
        shape += f" Gres=gpu:{gpus}" if gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr={self.network.address(name)} Port=17901 {shape}"
            for name in self.names
        ]
        values["nodes"] = "\n".join(nodes)
        values["accounting"] = ACCOUNTING.format(**values) if accounting else ""
        template = Template(Path(__file__).with_name("slurm.conf").read_text())
        self.configuration.write_text(template.substitute(values))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")  # v1 needs no mount
        # There are none: files stand for them, so that numbers are dealt out.
        files = [self.folder / "run" / f"gpu{number}" for number in range(gpus)]
        for file in files:
            file.touch()
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in files))
        (self.folder / "hosts").write_text(self.network.hosts_file())
        (self.folder / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
        daemon = self.folder / "slurmdbd.conf"
        daemon.write_text(DAEMON.format(**values))
        daemon.chmod(0o600)

    def _start_munge(self) -> None:
        run = self.folder / "run"
        key = run / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": run / "munge.sock", "pid-file": run / "munged.pid"}
        files |= {"log-file": self.folder / "log/munged.log", "seed-file": run / "munged.seed"}
        self._do("munged", "--force", *(f"--{option}={path}" for option, path in files.items()))

    def _start_accounting(self) -> None:
        data, socket, run = self.folder / "db", self.folder / "run/db.sock", self.folder / "run"
        self._do("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db")
        options = [f"--datadir={data}", f"--socket={socket}", f"--pid-file={run}/mariadbd.pid", "--user=root"]
        options += ["--skip-networking", "--skip-grant-tables", "--innodb-buffer-pool-size=64M"]
        with (self.folder / "log/mariadb.log").open("ab") as log:
            subprocess.Popen(["mariadbd", "--no-defaults", *options], stdout=log, stderr=log, start_new_session=True)
        self._wait(socket.exists, "mariadb", "MariaDB's socket")
        self._environment["MYSQL_UNIX_PORT"] = str(socket)
        self._do("slurmdbd")  # its configuration lies beside slurm.conf
        self._wait(lambda: self._answers("sacctmgr", "-nP", "list", "cluster"), "slurmdbd", "slurmdbd to answer")
        self._do("sacctmgr", "-i", "add", "cluster", "testbed")

    def _idle(self) -> list[str]:
        listed = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"],
            env=self._environment,
            capture_output=True,
            text=True,
        )
        return listed.stdout.split()

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self._environment, capture_output=True).returncode == 0

    def _do(self, *command: str) -> None:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")

    def _wait(self, condition: Callable[[], bool], daemon: str, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                log = self.folder / "log" / f"{daemon}.log"
                raise ClusterError(f"waited {PATIENCE:.0f} s for {what}; look into {log}")
            time.sleep(0.1)

    def _pid(self, daemon: str) -> int | None:
        """A daemon's process id, if it lives."""
        try:
            pid = int((self.folder / "run" / f"{daemon}.pid").read_text())
            return pid if Path(f"/proc/{pid}/comm").read_text().strip().startswith(daemon[:15]) else None
        except (OSError, ValueError):
            return None

    def _signal(self, daemon: str, number: signal.Signals) -> None:
        pid = self._pid(daemon)
        if pid is not None:
            os.kill(pid, number)


def _library_folders() -> list[str]:
    return ["/usr/lib", "/usr/lib64", *map(str, Path("/usr/lib").glob("*-linux-gnu"))]
