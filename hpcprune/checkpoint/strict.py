"""HDF5 objects, looked at before they are used: the rules that keep a made-up file from doing harm.

A file may hold links that lead out of it, datasets whose bytes lie in other files or nowhere, types that allocate what
they like, the same object under many names, and sizes without bytes behind them. HDF5 follows all of these silently.
`Node` opens an object only after its link was found to be plain, and hands out its content only after its layout, type
and size were found to be those that the writer uses. Low-level calls are used throughout, since h5py's comfortable ones
follow links and open sources by themselves; bytes without a filter are read from the file itself, where HDF5 said that
they are.
"""

from __future__ import annotations

import bisect
import math
import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

from hpcprune.checkpoint.format import BLOCK, LONGEST_NAME, MOST_SHRINKING, Array, mask_chunk, unescape
from hpcprune.errors import CheckpointError

__all__ = ["Node", "Tree"]

MOST_ATTRIBUTES = 1024
MOST_DIMENSIONS = 32
LARGEST_ATTRIBUTE = 1 << 16  # bytes, HDF5's own limit for the layout that the writer uses


class Tree:
    """The HDF5 part of one file: which objects were seen already, and how many of its bytes were spoken for."""

    def __init__(self, path: Path, fd: int, size: int, file: h5py.File) -> None:
        self.path, self.fd, self.size = path, fd, size
        self.seen: set[int] = set()
        self.taken: list[tuple[int, int]] = []  # where datasets lie, in order
        self.chunks: list[tuple[int, int]] = []  # and chunks, whose places HDF5 counts from elsewhere in some versions
        self.claimed = 0
        self.root = Node(self, "/", h5g.open(file.id, b"/"))


class Node:
    """One object of the file: a group or a dataset, `where` for messages."""

    def __init__(self, tree: Tree, where: str, oid: Any) -> None:
        self.tree, self.where, self.oid = tree, where, oid
        self._children: dict[str, Node] | None = None
        address = h5o.get_info(oid).addr
        if address in tree.seen:
            self.refuse("is there under several names")
        tree.seen.add(address)

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.tree.path}: {self.where} {why}; hpcprune did not write this: do not trust it")

    def unescaped(self, name: str) -> str:
        """The name that stands behind an object's escaped name."""
        try:
            return unescape(name)
        except (ValueError, CheckpointError) as error:
            self.refuse(f"has a name that leaves its place or is not one of ours ({error})")

    def children(self) -> dict[str, Node]:
        """The objects of a group, by name as it stands in the file."""
        if self._children is None:
            if not isinstance(self.oid, h5g.GroupID):
                self.refuse("is not a group")
            raw: list[bytes] = []
            self.oid.links.iterate(raw.append)
            self._children = {self._decode(name): self._open(name) for name in raw}
        return self._children

    def _decode(self, raw: bytes) -> str:
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            self.refuse(f"holds a name that is not text: {raw[:40]!r}")
        if len(raw) > LONGEST_NAME + 24:
            self.refuse(f"holds a name of {len(raw)} bytes")
        return name

    def _open(self, raw: bytes) -> Node:
        where = f"{self.where.rstrip('/')}/{raw.decode()}"
        kind = self.oid.links.get_info(raw).type
        if kind != h5l.TYPE_HARD:
            names = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link, out of the file"}
            raise CheckpointError(
                f"{self.tree.path}: {where} is {names.get(kind, 'a link of an unknown kind')}; hpcprune did not write "
                f"this: do not trust it"
            )
        child = Node(self.tree, where, h5o.open(self.oid, raw))
        if not isinstance(child.oid, (h5g.GroupID, h5d.DatasetID)):
            child.refuse("is a named type; only groups and datasets are allowed")
        return child

    # Attributes

    def attributes(self, allowed: Collection[str] | None = None) -> dict[str, Any]:
        """The attributes: texts, integers, floats, bools, and tuples of integers; no others than `allowed` if given."""
        count = h5a.get_num_attrs(self.oid)
        if count > MOST_ATTRIBUTES:
            self.refuse(f"has {count} attributes, more than {MOST_ATTRIBUTES}")
        values = {}
        for index in range(count):
            attribute = h5a.open(self.oid, index=index)
            name = attribute.name if isinstance(attribute.name, str) else self._decode(attribute.name)
            name = self.unescaped(name)
            if allowed is not None and name not in allowed:
                self.refuse(f"has an attribute {name!r} that is not known")
            values[name] = self._value(attribute, name)
        return values

    def _value(self, attribute: Any, name: str) -> Any:
        kind, space = attribute.get_type(), attribute.get_space()
        size = kind.get_size() * space.get_simple_extent_npoints()
        extent = space.get_simple_extent_type()
        if kind.committed() or size > LARGEST_ATTRIBUTE or extent not in (h5s.SCALAR, h5s.SIMPLE):
            self.refuse(f"has an attribute {name!r} of a form that is not known")
        if extent == h5s.SIMPLE:
            shape = space.get_simple_extent_dims()
            if len(shape) != 1 or shape[0] > MOST_DIMENSIONS or not kind.equal(h5t.STD_I64LE):
                self.refuse(f"has an attribute {name!r} of a form that is not known")
            numbers = np.empty(shape, "<i8")
            if numbers.size:
                attribute.read(numbers)
            return tuple(numbers.tolist())
        if isinstance(kind, h5t.TypeStringID) and not kind.is_variable_str():
            text = np.empty((), f"S{kind.get_size()}")
            attribute.read(text, kind)
            return self._text(bytes(text[()]), name)
        if kind.equal(h5t.py_create(np.dtype("?"), logical=True)):
            return self._bool(attribute, kind, name)
        form = "<i8" if kind.equal(h5t.STD_I64LE) else "<f8"
        if not kind.equal(h5t.py_create(np.dtype(form))):
            self.refuse(f"has an attribute {name!r} of a type that is not known")
        value = np.empty((), form)
        attribute.read(value)
        return value.item()

    def _bool(self, attribute: Any, kind: Any, name: str) -> bool:
        value = np.empty((), np.int8)
        attribute.read(value, kind)
        if value not in (0, 1):
            self.refuse(f"has an attribute {name!r} that is neither true nor false")
        return bool(value)

    def _text(self, raw: bytes, name: str) -> str:
        try:
            return raw.rstrip(b"\0").decode()
        except UnicodeDecodeError:
            self.refuse(f"has a text {name!r} that is not UTF-8")

    # Datasets

    @property
    def is_dataset(self) -> bool:
        return isinstance(self.oid, h5d.DatasetID)

    def _layout(self) -> int:
        """Whether the dataset lies in one piece or in chunks; anything else is refused before it is touched."""
        if not self.is_dataset:
            self.refuse("is not a dataset")
        plan = self.oid.get_create_plist()
        layout = plan.get_layout()
        if layout == h5d.VIRTUAL:
            self.refuse("is a virtual dataset: its values lie elsewhere")
        if plan.get_external_count():
            self.refuse("has its values in external storage, out of the file")
        if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED):
            self.refuse("is stored in a layout that hpcprune does not use")
        filters = [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]
        if filters != ([h5z.FILTER_DEFLATE] if layout == h5d.CHUNKED else []):
            self.refuse("is stored through filters that hpcprune does not use")
        return int(layout)

    def _type(self) -> Any:
        kind = self.oid.get_type()
        if kind.committed():
            self.refuse("is of a named type")
        return kind

    def _extent(self) -> tuple[int, ...]:
        space = self.oid.get_space()
        extent = space.get_simple_extent_type()
        if extent == h5s.SCALAR:
            return ()
        if extent != h5s.SIMPLE:
            self.refuse("has no shape")
        shape: tuple[int, ...] = space.get_simple_extent_dims()
        if space.get_simple_extent_dims(True) != shape:
            self.refuse("may grow")
        return shape

    def _claim(self, declared: int, stored: int) -> None:
        """Hold what a dataset declares against the bytes that are there, for itself and for all datasets in sum."""
        self.tree.claimed += stored
        if declared > stored or self.tree.claimed > self.tree.size:
            self.refuse(f"declares {declared:,} bytes, far more than are stored")

    def shape_of(self, kind: np.dtype[Any]) -> tuple[int, ...]:
        """The shape of a dataset of this type that lies in one piece, all of it in this file; allows `read`."""
        if self._layout() != h5d.CONTIGUOUS:
            self.refuse("is stored in chunks, which hpcprune does for masks alone")
        if not self._type().equal(h5t.py_create(kind)):
            self.refuse(f"is not of the type {kind}, which belongs here")
        shape = self._extent()
        self._place(math.prod(shape) * kind.itemsize)
        return shape

    def _place(self, size: int) -> None:
        self._claim(size, self.oid.get_storage_size())
        self.offset = self.oid.get_offset() if size else 0
        if self.offset is None or not 0 <= self.offset <= self.tree.size + BLOCK - size:
            self.refuse("lies outside of the file")
        self._take(self.tree.taken, self.offset, size)

    def _take(self, taken: list[tuple[int, int]], offset: int, size: int) -> None:
        """Note that bytes of the file are this dataset's alone."""
        here = (offset, offset + size)
        at = bisect.bisect(taken, here)
        if size and ((at > 0 and taken[at - 1][1] > here[0]) or (at < len(taken) and taken[at][0] < here[1])):
            self.refuse("lies where another dataset lies")
        if size:
            taken.insert(at, here)

    def read(self, first: int, out: Array) -> None:
        """Fill `out` (one-dimensional) with the elements from `first` on, counted flat; after `shape_of`."""
        view, done, at = memoryview(out.view(np.uint8).data), 0, self.offset + first * out.itemsize
        while done < len(view):
            count = os.preadv(self.tree.fd, [view[done:]], at + done)
            if count == 0:
                self.refuse("ends before its time")
            done += count

    def text(self) -> str:
        """The text of a dataset that holds one of fixed length."""
        if self._layout() != h5d.CONTIGUOUS:
            self.refuse("is stored in chunks, which hpcprune does for masks alone")
        kind = self._type()
        if not isinstance(kind, h5t.TypeStringID) or kind.is_variable_str() or self._extent() != ():
            self.refuse("is not a text of fixed length")
        self._place(kind.get_size())
        raw = np.empty(kind.get_size(), np.uint8)
        self.read(0, raw)
        return self._text(raw.tobytes(), self.where)

    # Masks

    def open_mask(self, size: int) -> int:
        """Check a dataset of `size` bytes of packed bits; how many `read_mask` is to be asked for at a time."""
        layout = self._layout()
        if layout == h5d.CONTIGUOUS:
            if self.shape_of(np.dtype(np.uint8)) != (size,):
                self.refuse(f"does not have the {size:,} bytes that its layer's mask takes")
            self.deflated = False
            return mask_chunk(size) if size else 1
        if not self._type().equal(h5t.STD_U8LE) or self._extent() != (size,) or size == 0:
            self.refuse(f"does not have the {size:,} bytes that its layer's mask takes")
        chunk = mask_chunk(size)
        if self.oid.get_create_plist().get_chunk() != (chunk,):
            self.refuse(f"is not stored in chunks of {chunk:,} bytes")
        self._claim(-(-size // MOST_SHRINKING), self.oid.get_storage_size())
        self.deflated = True
        return chunk

    def read_mask(self, at: int, size: int, total: int) -> Array:
        """The mask's next `size` bytes, or what is left of all `total`; `size` and steps of `at` are `open_mask`'s."""
        if not self.deflated:
            bits = np.empty(min(size, total - at), np.uint8)
            self.read(at, bits)
            return bits
        info = self.oid.get_chunk_info_by_coord((at,))
        if info.filter_mask or info.size > size + size // 512 + 64:
            self.refuse("has a chunk larger than its content")
        self._take(self.tree.chunks, info.byte_offset, info.size)
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(self.oid.read_direct_chunk((at,))[1], size + 1)
        if len(raw) != size or not unpacker.eof or unpacker.unused_data:
            self.refuse("has a chunk of another length than it declares")
        if any(raw[total - at :]):
            self.refuse("has bits set after its last weight")
        return np.frombuffer(raw, np.uint8)[: total - at]
