"""The plain text before the HDF5 part: what the file is, and the sha256 of every byte that follows.

It is read and checked before HDF5 sees anything, so a file that was cut short or changed never reaches HDF5's parser.
The text is rendered again from what was understood and compared, so a changed bit in the text itself is found as well.
Anyone can check a file without hpcprune: `tail -c +513 model.h5 | sha256sum`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from hpcprune.checkpoint.format import BLOCK, FORMAT, KINDS
from hpcprune.errors import CheckpointError

__all__ = ["Block", "hash_rest", "open_verified", "render"]

READ = 1 << 20  # bytes hashed at a time

_TEXT = re.compile(
    rb"hpcprune checkpoint\nformat (?P<format>[1-9][0-9]{0,8})\nkind (?P<kind>[a-z]+)\n"
    rb"bytes (?P<bytes>[1-9][0-9]{0,17})\nsha256 (?P<sha256>[0-9a-f]{64})\n"
)


@dataclass(frozen=True)
class Block:
    """What the text says: format version, kind, bytes that follow, their sha256 in hexadecimal digits."""

    format: int
    kind: str
    bytes: int
    sha256: str


def render(block: Block) -> bytes:
    """The text, padded with line ends to its full length."""
    text = (
        f"hpcprune checkpoint\nformat {block.format}\nkind {block.kind}\nbytes {block.bytes}\nsha256 {block.sha256}\n"
        f"\nThe sha256 is that of all bytes after the first {BLOCK}. They are an HDF5 file: h5ls, h5dump and h5py\n"
        f"open this file as it is. Check it with: hpcprune check FILE\n"
    )
    return text.encode().ljust(BLOCK, b"\n")


def hash_rest(fd: int) -> tuple[int, str]:
    """Count and hash the bytes after the text."""
    digest, buffer, at = hashlib.sha256(), bytearray(READ), BLOCK
    view = memoryview(buffer)
    while count := os.preadv(fd, [buffer], at):
        digest.update(view[:count])
        at += count
    return at - BLOCK, digest.hexdigest()


def open_verified(path: Path) -> tuple[int, Block]:
    """Open a checkpoint file once, check text, length and sha256, and give the descriptor, which the caller closes.

    Raises:
        CheckpointError: there is no such file, it is something else, of a newer format, cut short, or changed.
    """
    try:
        # A named pipe would wait for a writer, and a device may do anything when it is opened: look first.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is not a file; give an hpcprune .h5 file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}") from None
    try:
        return fd, _verify(fd, path)
    except OSError as error:
        os.close(fd)
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except BaseException:
        os.close(fd)
        raise


def _verify(fd: int, path: Path) -> Block:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a file; give an hpcprune .h5 file")
    text = os.pread(fd, BLOCK, 0)
    match = _TEXT.match(text)
    if match is None:
        raise CheckpointError(f"{path}: {_name_other(text)}")
    version, kind = int(match["format"]), match["kind"].decode()
    block = Block(version, kind, int(match["bytes"]), match["sha256"].decode())
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: is of checkpoint format {version}, made by a newer hpcprune; this one reads up to {FORMAT}: "
            f"upgrade hpcprune"
        )
    if kind not in KINDS or text != render(block):
        raise CheckpointError(f"{path}: its first {BLOCK} bytes were changed; restore it from a copy")
    found = status.st_size - BLOCK
    if found < block.bytes:
        raise CheckpointError(
            f"{path}: is cut short: {found:,} of {block.bytes:,} bytes follow its first {BLOCK}; copy it again, or go "
            f"back to an earlier one"
        )
    if found > block.bytes:
        raise CheckpointError(f"{path}: has {found - block.bytes:,} bytes too many at its end; copy it again")
    count, digest = hash_rest(fd)
    if (count, digest) != (block.bytes, block.sha256):
        raise CheckpointError(
            f"{path}: does not match its sha256: a bit has flipped or it was changed; copy it again, or go back to an "
            f"earlier one"
        )
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise CheckpointError(f"{path}: changed while it was being read; wait until its writer is done")
    return block


def _name_other(text: bytes) -> str:
    """Say what a file is that does not begin as a checkpoint does."""
    if text.startswith(b"hpcprune checkpoint"):
        return f"its first {BLOCK} bytes are cut short or were changed; restore it from a copy"
    for start, name in (
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file that hpcprune did not write"),
        (b"PK\x03\x04", "a zip archive, perhaps of torch.save"),
        (b"\x80", "a pickle, perhaps of torch.save"),
    ):
        if text.startswith(start):
            return f"is {name}, not an hpcprune checkpoint; give a file that `hpcprune run` has written"
    return "is not an hpcprune checkpoint; give a file that `hpcprune run` has written"
