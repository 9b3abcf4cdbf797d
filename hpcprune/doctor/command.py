"""Asking a command of the machine what it has to say."""

from __future__ import annotations

import subprocess

__all__ = ["PATIENCE", "answer"]

PATIENCE = 30.0  # seconds that a rank waits for the others, or for a command to answer


def answer(*command: str) -> str | None:
    """What a command prints, on either stream; None if it cannot be run or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr
