"""What goes into a checkpoint file, and in which layout: layers and their parts, other tensors, what describes the run.

Values lie in one piece without a filter: nothing reads or writes faster, every tool understands it, and a declared size
is a stored size. HDF5's own checksums (fletcher32) were measured to make writing six times slower and reading four
times, and the sha256 over the whole file finds more. Masks of sparse layers are deflated with Huffman codes alone,
which packs scattered bits tighter than full deflate does, twice as fast, and cannot shrink them more than 8 times, so
there is no room for a bomb. Everything is stored in sorted order, so the same content gives the same bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcprune.checkpoint.bits import tally
from hpcprune.checkpoint.file import Sink, write_file
from hpcprune.checkpoint.format import (
    CHUNK,
    DENSE_ENOUGH,
    FILE_FIELDS,
    FORMAT,
    LONGEST_TEXT,
    Array,
    LayerState,
    State,
    TensorState,
    escape,
    mask_bytes,
    mask_chunk,
    sparsity,
    storage,
    tensor_path,
    weights_of,
)
from hpcprune.checkpoint.portion import Portion, check_layer, portion_of
from hpcprune.errors import CheckpointError
from hpcprune.native.survivors import popcount

__all__ = ["describe_layer", "put_about", "put_attributes", "put_layer", "put_own", "put_tensors", "write_model"]


def write_model(path: str | Path, state: State) -> str:
    """Write a whole state as one file, complete or not at all.

    Returns:
        The sha256 of everything after the file's first 512 bytes, in hexadecimal digits.

    Raises:
        CheckpointError: the state holds something that the format does not, or the disk is full or not writable.
    """

    def fill(file: h5py.File, sink: Sink) -> None:
        put_attributes(file, {"format": FORMAT, "kind": "model"})
        put_about(file, state.about)
        for order, (name, layer) in enumerate(state.layers.items()):
            put_layer(file, sink, portion_of(name, order, layer, 0, weights_of(layer.shape)))
        put_tensors(file, sink, state.tensors)
        put_own(file, sink, state.own)

    return write_file(Path(path), "model", fill).sha256


def put_about(file: h5py.File, about: Mapping[str, Any]) -> None:
    """Store what describes the run: scalars as attributes of the file, the rest as JSON in the group `about`."""
    for key, value in sorted(about.items()):
        value = value.item() if isinstance(value, np.generic) else value
        if key in FILE_FIELDS:
            raise CheckpointError(f"about.{key}: the format keeps this name for itself; choose another")
        if _is_attribute(value):
            put_attributes(file, {key: value})
            continue
        try:
            text = json.dumps(value, separators=(", ", ": "), ensure_ascii=True).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"about.{key}: cannot be stored as JSON: {error}; use plain values") from None
        file.require_group("about").create_dataset(escape(key), data=_fixed(text))


def _is_attribute(value: object) -> bool:
    if isinstance(value, str):
        try:
            return len(value.encode()) <= LONGEST_TEXT and "\0" not in value
        except UnicodeEncodeError:
            return False
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, float)


def put_attributes(place: h5py.Group | h5py.Dataset, values: Mapping[str, Any]) -> None:
    """Store scalars, and tuples of integers, as attributes."""
    for key, value in sorted(values.items()):
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, tuple):
            data: Any = np.array(value, "<i8")
        elif not _is_attribute(value):
            raise CheckpointError(
                f"{place.name}: attribute {key!r} is {str(value)[:40]!r}; an attribute is a text of at most "
                f"{LONGEST_TEXT} bytes, an integer of 64 bits, a float or a bool"
            )
        elif isinstance(value, str):
            data = _fixed(value.encode())
        else:
            data = np.array(value, {bool: "?", int: "<i8", float: "<f8"}[type(value)])
        place.attrs.create(escape(key), data)


def _fixed(text: bytes) -> Array:
    """A text of fixed length in UTF-8: unlike one of any length it lies where it belongs, and any tool prints it."""
    return np.array(text, h5py.string_dtype("utf-8", max(1, len(text))))


def put_layer(file: h5py.File, sink: Sink, portion: Portion) -> None:
    """Store a layer, or a portion of one."""
    name, start, stop, survivors = portion.name, portion.start, portion.stop, portion.survivors
    group = file.require_group("layers").create_group(escape(name) + (f"@{start}" if start else ""))
    values = group.create_dataset("values", (survivors,), storage(portion.dtype, name))
    nonzeros = nonfinite = at = 0
    for part in portion.values:
        counts = tally(part, portion.dtype)
        nonzeros, nonfinite = nonzeros + counts[0], nonfinite + counts[1]
        if part.size:
            values[at : at + part.size] = part
        at += part.size
        sink.check()
    if portion.mask is not None:
        _put_mask(group, sink, portion)
    place = {"order": portion.order, "shape": portion.shape, "dtype": portion.dtype, "start": start, "stop": stop}
    stated = {"survivors": survivors, "nonzeros": nonzeros, "nonfinite": nonfinite}
    share = {"weights": portion.weights, "sparsity": sparsity(survivors, portion.weights)}
    put_attributes(group, {**place, **stated, **share, **portion.attributes})


def describe_layer(name: str, order: int, layer: LayerState) -> dict[str, Any]:
    """What an index says of a whole layer; its values lie in the shards."""
    check_layer(name, layer)
    weights = weights_of(layer.shape)
    survivors = weights if layer.mask is None else popcount(layer.mask)
    fields = {
        "order": order,
        "shape": layer.shape,
        "dtype": layer.dtype,
        "masked": layer.mask is not None,
        "weights": weights,
        "survivors": survivors,
        "sparsity": sparsity(survivors, weights),
    }
    return {**fields, **layer.attributes}


def _put_mask(group: h5py.Group, sink: Sink, portion: Portion) -> None:
    total, at = mask_bytes(portion.weights), 0
    if not (total and portion.survivors <= DENSE_ENOUGH * portion.weights):
        dataset = group.create_dataset("mask", (total,), np.uint8)
        for part in portion.mask_parts(CHUNK // 8):
            dataset[at : at + part.size] = part
            at += part.size
            sink.check()
        return
    size = mask_chunk(total)
    dataset = group.create_dataset("mask", (total,), np.uint8, chunks=(size,), compression="gzip", compression_opts=1)
    for part in portion.mask_parts(size):
        packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
        packed = packer.compress(part.data) + packer.compress(bytes(size - part.size)) + packer.flush()
        dataset.id.write_direct_chunk((at,), packed)
        at += size
        sink.check()


def put_tensors(file: h5py.File, sink: Sink, tensors: Mapping[str, TensorState]) -> None:
    """Store other tensors under their keys."""
    for key, tensor in sorted(tensors.items()):
        _put_tensor(file, sink, key, tensor_path(key), tensor)


def put_own(file: h5py.File, sink: Sink, own: Mapping[str, TensorState]) -> None:
    """Store a rank's own tensors."""
    for key, tensor in sorted(own.items()):
        _put_tensor(file, sink, key, ["own", escape(key)], tensor)


def _put_tensor(file: h5py.File, sink: Sink, key: str, path: Iterable[str], tensor: TensorState) -> None:
    kind, array = storage(tensor.dtype, key), _stored(np.asarray(tensor.array))
    if array.dtype != kind:
        raise CheckpointError(f"{key}: an array of type {tensor.array.dtype} does not hold {tensor.dtype}; give {kind}")
    *parents, name = path
    group = file
    for parent in parents:
        group = group.require_group(parent)
    dataset = group.create_dataset(name, array.shape, kind)
    if array.size:
        flat: Array = array.reshape(-1)
        nonfinite = tally(flat, tensor.dtype)[1]
        dataset[...] = array
    else:
        nonfinite = 0
    sink.check()
    put_attributes(dataset, {"dtype": tensor.dtype, "nonfinite": nonfinite})


def _stored(array: Array) -> Array:
    """The bytes as they are stored: numpy's bool is stored as 0 and 1."""
    return array.view(np.uint8) if array.dtype == np.bool_ else array
