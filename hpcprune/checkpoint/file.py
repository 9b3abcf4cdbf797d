"""A file that is whole or absent, whatever the disk does: a temporary name, the disk's say-so, then its own name.

HDF5 does not survive a failing disk well (a failed close leaks the file and prints its own traceback), so it never
meets one: it writes through `Sink`, which keeps the first error to itself, lets HDF5 finish, and has it raised after.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py

from hpcprune.checkpoint.block import Block, hash_rest, render
from hpcprune.checkpoint.format import BLOCK, FORMAT
from hpcprune.errors import CheckpointError

__all__ = ["Sink", "disk_error", "sync_folder", "write_file"]


class Sink:
    """The file as HDF5 sees it: the methods that h5py asks of a file object, on a descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.error: OSError | None = None
        self._at = 0
        self._end = 0

    def check(self) -> None:
        """Raise the first error that a write has met."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: bytes | memoryview) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view) and self.error is None:
                done += os.pwrite(self.fd, view[done:], self._at + done)
        except OSError as error:
            self.error = error
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def read(self, size: int) -> bytes:
        data = os.pread(self.fd, size, self._at).ljust(size, b"\0")
        self._at += size
        return data

    def readinto(self, buffer: memoryview) -> int:
        buffer[:] = self.read(len(buffer))
        return len(buffer)

    def truncate(self, size: int) -> int:
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            self.error = self.error or error
        self._end = size
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""


def write_file(path: Path, kind: str, fill: Callable[[h5py.File, Sink], None]) -> Block:
    """Write a checkpoint file: `fill` puts its content in, and may ask the sink whether it is worth going on.

    Until the file is whole and on the disk, whatever was at `path` stays; so it does if anything fails.

    Returns:
        What the file's first lines say: kind, bytes, sha256.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, ...
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _remove_leftovers(path)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            block = _write(fd, kind, fill)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise  # HDF5 raises these for mistakes of ours; the disk's own have a number
        raise disk_error(path, error) from error
    return block


def _write(fd: int, kind: str, fill: Callable[[h5py.File, Sink], None]) -> Block:
    sink = Sink(fd)
    with h5py.File(sink, "w", driver="fileobj", libver=("earliest", "v110"), userblock_size=BLOCK) as file:
        fill(file, sink)
    sink.check()
    # The disk takes its time to write, and hashing does too: both at once.
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, fd)
        block = Block(FORMAT, kind, *hash_rest(fd))
        synced.result()
    os.pwrite(fd, render(block), 0)
    os.fsync(fd)
    return block


def _remove_leftovers(path: Path) -> None:
    """Remove the partial files of writers that died: those that nobody holds a lock on."""
    for leftover in path.parent.glob(f".{_literal(path.name)}.*.partial"):
        try:
            with leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except OSError:
            continue  # it is being written, or somebody else has removed it


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_error(path: Path, error: OSError) -> CheckpointError:
    """What to tell the user when `path` could not be written; what was there before is whole in every case."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EFBIG: "the file may not become that large; raise the limit (ulimit -f)",
        errno.ENOENT: f"there is no folder {path.parent}; make it",
        errno.ENOTDIR: f"{path.parent} is not a folder; choose another output folder",
        errno.EACCES: f"the folder {path.parent} may not be written to; choose another output folder",
        errno.EROFS: f"the folder {path.parent} is read-only; choose another output folder",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror or error}; look at the disk")
    return CheckpointError(f"{path}: cannot be written: {reason}, and run again (nothing that was there is lost)")
