"""Reading a checkpoint file that a stranger may have made.

The text at the start and the sha256 come first (block.py). A right sha256 proves only that the file is as its maker
left it, so the structure is checked as if there were none: every object must be one that the writer makes, at a place
where the writer puts it, in a layout that it uses, as large as it says, and consistent with what is said about it.
Everything else is refused, by name. Counts and masks are checked chunk by chunk while the values are read, so reading
and checking are the same code and take little memory beside the result.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from hpcprune.checkpoint.block import Block, open_verified
from hpcprune.checkpoint.format import FILE_FIELDS, FORMAT, TENSOR_GROUPS, LayerState, State, TensorState
from hpcprune.checkpoint.pieces import Outline, Piece, read_outline, read_piece, read_tensor
from hpcprune.checkpoint.strict import Node, Tree
from hpcprune.errors import CheckpointError

__all__ = ["CheckpointFile", "open_checkpoint", "read_model"]


class _Source:
    """The verified descriptor as h5py sees it: a file object, whatever has become of the name since."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size, self._at = fd, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        return bytes(data[: self.readinto(memoryview(data))])

    def readinto(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.fd, [buffer[done:]], self._at + done)
            if count == 0:
                # HDF5 reads ahead a little past the end of short objects and expects zeros there.
                buffer[done:] = bytes(len(buffer) - done)
                break
            done += count
        self._at += len(buffer)
        return len(buffer)


class CheckpointFile:
    """An open, verified file: its text block, its own fields, and the parts of its content, checked when read."""

    def __init__(self, path: Path, block: Block, root: Node) -> None:
        self.path, self.block = path, block
        self.groups = root.children()
        attributes = root.attributes()
        for key, value in (("format", FORMAT), ("kind", block.kind)):
            if attributes.get(key) != value:
                root.refuse(f"says {key} {attributes.get(key)!r}, and the file's first lines say {value!r}")
        known = {
            "model": {"about", "layers", "own", *TENSOR_GROUPS},
            "shard": {"shard", "layers", "own", *TENSOR_GROUPS},
            "index": {"shards", "about", "layers"},
        }[block.kind]
        for name, node in self.groups.items():
            if name not in known:
                node.refuse(f"is not known; a {block.kind} file has {', '.join(sorted(known))}")
        self.about = self._read_about({key: value for key, value in attributes.items() if key not in FILE_FIELDS})

    def _read_about(self, scalars: dict[str, Any]) -> dict[str, Any]:
        about = dict(scalars)
        for name, node in self.members("about"):
            if name in about or name in FILE_FIELDS:
                node.refuse("is there twice")
            node.attributes(allowed=())
            try:
                about[name] = json.loads(node.text())
            except (ValueError, RecursionError) as error:
                node.refuse(f"is not JSON: {error}")
        return about

    def members(self, group: str) -> Iterator[tuple[str, Node]]:
        """The objects of one of the file's groups, by unescaped name."""
        if group in self.groups:
            self.groups[group].attributes(allowed=())
            for name, node in self.groups[group].children().items():
                yield node.unescaped(name), node

    def pieces(self) -> list[Piece]:
        """The layers, or parts of layers, in their order."""
        pieces = [read_piece(name, node) for name, node in self._layers()]
        return sorted(pieces, key=lambda piece: (piece.order, piece.start))

    def outlines(self) -> dict[str, Outline]:
        """The layers that an index describes, in their order."""
        found = [(node.unescaped(name), read_outline(node)) for name, node in self._layers()]
        return dict(sorted(found, key=lambda item: item[1].order))

    def _layers(self) -> Iterator[tuple[str, Node]]:
        if "layers" in self.groups:
            self.groups["layers"].attributes(allowed=())
            yield from self.groups["layers"].children().items()

    def tensor_nodes(self) -> Iterator[tuple[str, Node]]:
        """The other tensors by key, not read yet."""
        for group in TENSOR_GROUPS:
            for name, node in self.members(group):
                if group != "optimizer" or node.is_dataset:
                    yield f"{group}/{name}", node
                    continue
                node.attributes(allowed=())
                for key, inner in node.children().items():
                    yield f"{group}/{name}/{inner.unescaped(key)}", inner

    def tensors(self) -> dict[str, TensorState]:
        """The other tensors by key."""
        return {key: read_tensor(node) for key, node in self.tensor_nodes()}

    def own(self) -> dict[str, TensorState]:
        """The tensors of the rank that wrote the file."""
        return {name: read_tensor(node) for name, node in self.members("own")}


@contextmanager
def open_checkpoint(path: str | Path, kind: str) -> Iterator[CheckpointFile]:
    """Open a file, check its text and sha256, and give it to be read; `kind` is what it must be, or "" for any.

    Raises:
        CheckpointError: it is not such a file, or anything in it is not as the writer makes it.
    """
    path = Path(path)
    fd, block = open_verified(path)
    try:
        if kind and block.kind != kind:
            raise CheckpointError(f"{path}: is of kind {block.kind}, where one of kind {kind} belongs; give that one")
        with reading(path), h5py.File(_Source(fd, os.fstat(fd).st_size), "r", driver="fileobj") as file:
            yield CheckpointFile(path, block, Tree(path, fd, block.bytes, file).root)
    finally:
        os.close(fd)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged HDF5 part makes HDF5, zlib or numpy raise into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: the HDF5 part cannot be read ({reason}); it is damaged or made up: go back to an earlier one"
        ) from error


def read_model(path: str | Path) -> State:
    """Read a file that `write_model` has written.

    Returns:
        The state, equal to the one that was written; pruned weights are zero.

    Raises:
        CheckpointError: it is not such a file, or anything in it is not as the writer makes it.
    """
    with open_checkpoint(path, "model") as file:
        layers: dict[str, LayerState] = {}
        for piece in file.pieces():
            piece.require_whole()
            layer = piece.empty()
            piece.read_into(layer)
            layers[piece.name] = layer
        return State(file.about, layers, file.tensors(), file.own())
