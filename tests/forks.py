"""Python in forks of one process that has done its imports: as good as a process each, and there in 0.1 s, not in 6.

    forks.py serve SOCKET MODULE...    the process that is forked
    forks.py rank SOCKET WORD...       what mpirun starts in place of `python WORD...`

A rank asks for a fork and stands for it: it hands over its words, environment, folder and streams, passes signals on,
and ends as the fork ends, by a signal or with a status. When it is killed, so is the fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Fork:
    """A fork that runs `words` as Python would, in `environment` and the folder that this process is in.

    streams: what is its standard input, output and error.
    user: whose it is, as a number; this process's if None.
    """

    def __init__(
        self, path: str, words: Sequence[str], environment: dict[str, str], streams: list[int], user: int | None = None
    ) -> None:
        call = {"words": words, "environment": environment, "folder": str(Path.cwd()), "user": user}
        message = json.dumps(call).encode() + b"\n"
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        sent = socket.send_fds(self._connection, [message], streams)
        self._connection.sendall(message[sent:])
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, or minus the signal that ended it; it is killed after `timeout` seconds."""
        ended, _, _ = select.select([self._connection], [], [], timeout)
        if not ended:
            self._connection.shutdown(socket.SHUT_WR)
        status = int(self._answers.readline())
        self._answers.close()
        self._connection.close()
        return status


def rank(path: str, words: list[str]) -> int:
    """Stand for a fork that runs `words`: its exit status, unless a signal ended it."""
    fork = Fork(path, words, {**os.environ, "STANDS_FOR_RANK": str(os.getpid())}, [0, 1, 2])
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(fork.pid, number))
    status = fork.wait()
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(path: str, modules: list[str]) -> None:
    """Fork for whoever connects, until standard input ends; the modules are imported beforehand."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or each fork's collector would touch, and so copy, every page of what was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while select.select([listener, 0], [], [])[0] == [listener]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                attend(connection)
            connection.close()


def attend(connection: socket.socket) -> None:
    """Fork, and tell the fork's end to whoever asked; neither process returns from here."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    if (pid := os.fork()) == 0:
        connection.close()
        become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{pid}\n".encode())
    end = os.pidfd_open(pid)
    if end not in select.select([end, connection], [], [])[0]:  # who asked is dead, or has lost patience
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.sendall(f"{status}\n".encode())
    finally:
        os._exit(0)


def become(call: dict, streams: list[int]) -> None:
    """Run what Python would run, and end as it would; MPI is finalized by whoever has initialized it."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    code = prepared(call["words"])
    has_mpi = "mpi4py.MPI" in sys.modules
    if call["user"]:
        os.setgroups([])
        os.setgid(call["user"])
        os.setuid(call["user"])
    status = 0
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As Python ends, except that it would take modules apart, for 2 s: every page of them would be copied first.
    threading._shutdown()
    atexit._run_exitfuncs()
    if (mpi := sys.modules.get("mpi4py.MPI")) and not has_mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    os._exit(status)


def prepared(words: list[str]) -> types.CodeType:
    """What `words` run (`-m PACKAGE ARGUMENT...` or `FILE ARGUMENT...`), with all set as Python sets it."""
    first, *sys.argv = words
    if first == "-m":
        sys.path[0] = str(Path.cwd())
        name = f"{sys.argv[0]}.__main__"
        loader = importlib.util.find_spec(name).loader
        code, path = loader.get_code(name), loader.path
        sys.argv[0] = path
    else:
        sys.path[0] = str(Path(first).resolve().parent)
        code, path = compile(Path(first).read_bytes(), first, "exec"), first
        sys.argv.insert(0, first)
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in filter(None, added) if path not in sys.path]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules["__main__"].__file__ = path
    return code


if __name__ == "__main__":
    what, path, *words = sys.argv[1:]
    sys.exit(rank(path, words) if what == "rank" else serve(path, words))
