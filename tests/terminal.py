"""A terminal for commands to run on."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence


def on_a_terminal(
    command: Sequence[str], env: Mapping[str, str] | None = None, columns: int = 90, timeout: float = 60
) -> tuple[int, str]:
    """Run a command whose output is a terminal; its exit status and all that was shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    shown = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        end = time.monotonic() + timeout
        try:
            while time.monotonic() < end:
                shown += os.read(ours, 65536)
        except OSError:  # nobody has it open any more
            pass
        finally:
            process.kill() if process.poll() is None and time.monotonic() >= end else process.wait()
            os.close(ours)
    return process.returncode, shown.decode()


def plain(shown: str) -> str:
    """What was shown, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n")
