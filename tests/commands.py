"""Commands as a user gives them, in forks of one process: as good as a process each, and 50 times faster.

Imports are what takes the time, so that process has done them all before the first command comes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SERVER = """\
import json, os, signal, sys, traceback
import hpcprune.export, hpcprune.report.plots, hpcprune.run
import torch._dynamo, torchmetrics.classification
from mpi4py import MPI
from hpcprune.__main__ import main

for line in sys.stdin:
    call = json.loads(line)
    if (child := os.fork()) == 0:
        signal.alarm(120)  # a hang is a failure
        for stream in (1, 2):
            os.dup2(os.open(call["output"][stream - 1], os.O_WRONLY | os.O_TRUNC), stream)
        if call["user"]:
            os.setgroups([]), os.setgid(call["user"]), os.setuid(call["user"])
        os.environ.update(call["env"])
        sys.argv = ["hpcprune", *call["argv"]]
        code = 1
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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
def server(folder: Path) -> Iterator[Command]:
    """Run commands: `hpcprune("run", path, user=65534, HOME="/")`; keywords other than `user` are environment."""
    output = [folder / name for name in ("out", "err")]
    for path in output:
        path.touch()
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def command(*argv: str | Path, user: int | None = None, **env: str) -> Ended:
            call = {"argv": [*map(str, argv)], "user": user, "env": env, "output": [*map(str, output)]}
            print(json.dumps(call), file=stdin, flush=True)
            code = stdout.readline()
            assert code, "the server has ended; it has said why"
            out, err = (path.read_text() for path in output)
            return Ended(int(code), out, err)

        try:
            yield command
        finally:
            stdin.close()


def process(*argv: str | Path, **env: str) -> Ended:
    """Run a command in a process of its own."""
    script = Path(sys.executable).with_name("hpcprune")
    done = subprocess.run([script, *argv], env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)
