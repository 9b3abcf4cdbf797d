"""A real Slurm on emulated nodes for the tests, and jobs on it that can be watched and disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.testbed.network import Network
from tests.conftest import ROOT

FOLDER = Path("/tmp/hpcprune-testbed-of-tests")
NODES = 15  # for six jobs on two each, of which three lose a node, at the same time
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}


def emulate(*arguments: str) -> str:
    """What `python slurm/testbed ...` prints."""
    command = [sys.executable, str(ROOT / "slurm/testbed"), "--folder", str(FOLDER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class SlurmJob:
    """A job: its number, and the file that its output goes to."""

    number: str
    output: Path
    environment: dict[str, str]

    def show(self) -> dict[str, str]:
        """What Slurm says of it."""
        done = self._slurm("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in done.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def nodes(self) -> list[str]:
        return self._slurm("scontrol", "show", "hostnames", self.show()["NodeList"]).split()

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"waited for {what}: {self.show()}\n{self.text}"
            time.sleep(0.2)

    def end(self, timeout: float = 300) -> str:
        """Wait until it is over; its state then."""
        self.wait(lambda: self.state in OVER, "the end", timeout)
        return self.state

    def signal(self, *options: str) -> None:
        self._slurm("scancel", *options, self.number)

    def update(self, *settings: str) -> None:
        self._slurm("scontrol", "update", f"JobId={self.number}", *settings)

    def _slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout


class Slurm:
    """The cluster, to submit jobs to."""

    def __init__(self, base: Path) -> None:
        site = base / "site.sh"
        site.write_text(f"source {sys.prefix}/bin/activate\n")
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(FOLDER / "slurm.conf"),
            "HPCPRUNE_SITE": str(site),
            "PYTHONPATH": str(ROOT),
        }

    def sbatch(self, out: Path, *command: str | Path, flags: tuple[str, ...] = (), **env: str) -> SlurmJob:
        """Submit a script of slurm/, from the repository's root."""
        output = out.with_suffix(".txt")
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", *flags, *map(str, command)],
            cwd=ROOT,
            env={**self.environment, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return SlurmJob(done.stdout.strip(), output, self.environment)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.environ.get("HPCPRUNE_NO_SLURM"):
        pytest.skip("HPCPRUNE_NO_SLURM is set")
    if not Network.possible():
        pytest.skip("slurm/testbed needs root, and to be allowed to make network namespaces")
    emulate("up", "--nodes", str(NODES), "--gpus", "2")
    yield Slurm(tmp_path_factory.mktemp("slurm"))
    emulate("down")


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster with all of its nodes, and afterwards without anybody's jobs."""
    yield cluster
    clear(cluster)


def clear(cluster: Slurm) -> None:
    """Cancel what runs, and give back their power and their cables to the nodes that are down."""
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, timeout=60)
    sinfo = ["sinfo", "-h", "-N", "-p", "main", "-o", "%N %t"]
    recovered: set[str] = set()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        listed = subprocess.run(sinfo, env=cluster.environment, capture_output=True, text=True, timeout=60)
        states = dict(line.split() for line in listed.stdout.splitlines())
        if set(states.values()) == {"idle"}:
            return
        for node in [node for node, state in states.items() if state.startswith("down")]:
            if node not in recovered:
                emulate("recover", node)
            recovered.add(node)
        time.sleep(0.2)
    raise AssertionError(f"the nodes did not come back:\n{emulate('status')}")
