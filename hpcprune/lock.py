"""A file's lock, held by one process on one host or several; and doing without where the disk has no locks."""

from __future__ import annotations

import errno
import fcntl
import time
from typing import IO

__all__ = ["hold"]

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
PAUSE = 0.1  # seconds between two tries


def hold(file: IO[str], patience: float) -> bool:
    """Lock a file for this process until it is closed; at once where files cannot be locked.

    Args:
        file: open for writing, without which NFS gives no lock (flock(2)).
        patience: seconds to wait for another process.

    Returns:
        Whether it is held; False if another process still has it.
    """
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return True
