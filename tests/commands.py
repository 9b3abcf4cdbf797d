"""Commands as a user gives them, in forks of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.forks import Fork

FORKS = Path(__file__).with_name("forks.py")
# What takes the time of a command's start.
IMPORTS = (
    "hpcprune.__main__",
    "hpcprune.export",
    "hpcprune.report.plots",
    "hpcprune.run",
    "torch._dynamo",
    "torchmetrics.classification",
)


@dataclass(frozen=True)
class Ended:
    """What a command has left: its exit status and what it printed."""

    code: int
    out: str
    err: str

    def assert_refused(self, says: str) -> None:
        """It ended with one line that matches `says`, and exit status 2."""
        assert re.search(says, self.err), self.err
        assert self.err.startswith("hpcprune: error: ") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err + self.out
        assert self.code == 2


class Command(Protocol):
    def __call__(self, *argv: str | Path, user: int | None = None, **env: str) -> Ended: ...


@contextmanager
def serving(socket: Path, environment: Mapping[str, str], *modules: str) -> Iterator[str]:
    """A process to fork from, with these and IMPORTS imported: its socket."""
    command = [sys.executable, FORKS, "serve", socket, *IMPORTS, *modules]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == b"ready\n", "the server has ended; it has said why"
        yield str(socket)
        process.stdin.close()


@contextmanager
def commands(folder: Path, environment: Mapping[str, str]) -> Iterator[Command]:
    """Run commands: `hpcprune("run", path, user=65534, HOME="/")`; keywords other than `user` are environment.

    MPI takes a second to initialize, so it is there before the forks.
    """
    with serving(folder / "socket", environment, "mpi4py.MPI") as socket:

        def command(*argv: str | Path, user: int | None = None, **env: str) -> Ended:
            with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
                words = ["-m", "hpcprune", *map(str, argv)]
                streams = [0, out.fileno(), err.fileno()]
                code = Fork(socket, words, {**environment, **env}, streams, user).wait(timeout=120)
                return Ended(code, *((stream.seek(0), stream.read())[1] for stream in (out, err)))

        yield command


def process(*argv: str | Path, **env: str) -> Ended:
    """Run a command in a process of its own."""
    script = Path(sys.executable).with_name("hpcprune")
    done = subprocess.run([script, *argv], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)
