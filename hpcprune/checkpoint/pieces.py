"""A layer, or a part of one, in a file; and other tensors: read and checked in one go, a chunk at a time.

What the file says of a layer (survivors, nonzeros, values that are not finite) is counted anew as its values pass by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcprune.checkpoint.bits import join_bits, padding_clear, popcount, tally
from hpcprune.checkpoint.format import (
    CHUNK,
    INDEX_FIELDS,
    LAYER_DTYPES,
    LAYER_FIELDS,
    STORAGE,
    Array,
    Bits,
    LayerState,
    Scalar,
    TensorState,
    mask_bytes,
    sparsity,
    weights_of,
)
from hpcprune.checkpoint.strict import Node
from hpcprune.native.survivors import scatter

__all__ = ["Outline", "Piece", "check_tensor", "open_tensor", "read_outline", "read_piece", "read_tensor"]


@dataclass(frozen=True)
class Piece:
    """The weights [start, stop) of a layer, as a group of the file describes them"""

    name: str
    order: int
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    survivors: int
    nonzeros: int
    nonfinite: int
    attributes: dict[str, Scalar]
    group: Node
    values: Node
    mask: Node | None
    step: int  # weights that are read at a time

    @property
    def weights(self) -> int:
        return self.stop - self.start

    def require_whole(self) -> None:
        """Refuse a part of a layer where the whole of it belongs."""
        if (self.start, self.stop) != (0, weights_of(self.shape)):
            self.group.refuse(f"holds the weights {self.start} to {self.stop} alone, of {weights_of(self.shape)}")

    def empty(self) -> LayerState:
        """The whole layer, with nothing in it yet."""
        total = weights_of(self.shape)
        mask = None if self.mask is None else np.zeros(mask_bytes(total), np.uint8)
        return LayerState(self.shape, self.dtype, np.zeros(total, STORAGE[self.dtype]), mask, self.attributes)

    def read_into(self, layer: LayerState) -> None:
        """Put this part's values and mask bits into the whole layer, checked."""
        for low, high, bits, values in self._stream(layer.values[self.start : self.stop]):
            if bits is not None and layer.mask is not None:
                layer.values[self.start + low : self.start + high] = scatter(values, bits, high - low)
                join_bits(layer.mask, self.start + low, bits)

    def check(self) -> None:
        """Read everything, keep nothing."""
        for _ in self._stream(None):
            pass

    def _stream(self, dense: Array | None) -> Iterator[tuple[int, int, Bits | None, Array]]:
        """Pass over the part: (low, high, mask bits, survivors); without a mask the values go to `dense` if given."""
        at = nonzeros = nonfinite = 0
        for low in range(0, self.weights, self.step):
            high = min(low + self.step, self.weights)
            bits = self._bits(low, high)
            count = high - low if bits is None else popcount(bits)
            if at + count > self.survivors:
                self.group.refuse(f"has a mask with more than the {self.survivors:,} survivors that it states")
            direct = dense is not None and bits is None
            part = dense[low:high] if direct and dense is not None else np.empty(count, STORAGE[self.dtype])
            self.values.read(at, part)
            counts = tally(part, self.dtype)
            at, nonzeros, nonfinite = at + count, nonzeros + counts[0], nonfinite + counts[1]
            yield low, high, bits, part
        if at != self.survivors:
            self.group.refuse(f"has a mask with {at:,} survivors, and states {self.survivors:,}")
        if nonfinite != self.nonfinite:
            self.group.refuse(f"has {nonfinite:,} values that are NaN or infinite, and states {self.nonfinite:,}")
        if nonzeros != self.nonzeros:
            self.group.refuse(f"has {nonzeros:,} values that are not zero, and states {self.nonzeros:,}")

    def _bits(self, low: int, high: int) -> Bits | None:
        if self.mask is None:
            return None
        bits = self.mask.read_mask(low // 8, self.step // 8, mask_bytes(self.weights))
        if not padding_clear(bits, high - low):
            self.mask.refuse("has bits set after its last weight")
        return bits


def read_piece(name: str, group: Node) -> Piece:
    """Read and check what a layer's group says, without its values yet; `name` as it stands in the file."""
    given = group.attributes()
    children = group.children()
    fields = {key: given.pop(key, None) for key in LAYER_FIELDS}
    order, start, stop, survivors, nonzeros, nonfinite = (
        _count(group, fields, key) for key in ("order", "start", "stop", "survivors", "nonzeros", "nonfinite")
    )
    shape, dtype = _form(group, fields, given)
    weights = stop - start
    if not start <= stop <= weights_of(shape):
        group.refuse(f"does not hold the weights {start} to {stop} of the shape {shape}")
    if fields["weights"] != weights or not max(nonzeros, nonfinite) <= survivors <= weights:
        group.refuse("states counts of weights, survivors and nonzeros that do not go together")
    if fields["sparsity"] != sparsity(survivors, weights):
        group.refuse(f"states a sparsity of {fields['sparsity']}, which is not that of its counts")
    plain = name.partition("@")[0]
    if name != plain + (f"@{start}" if start else ""):
        group.refuse(f"is named for another part than the one from weight {start} on")
    if set(children) - {"mask"} != {"values"}:
        group.refuse(f"holds {', '.join(children) or 'nothing'}; a layer has values, and a mask if it is pruned")
    values, mask, step = children["values"], children.get("mask"), CHUNK
    values.attributes(allowed=())
    if values.shape_of(np.dtype(STORAGE[dtype])) != (survivors,):
        values.refuse(f"does not have the {survivors:,} values that its layer states")
    if mask is not None:
        mask.attributes(allowed=())
        step = 8 * mask.open_mask(mask_bytes(weights))
    elif survivors != weights:
        group.refuse("has pruned weights and no mask")
    original = group.unescaped(plain)
    return Piece(
        original, order, shape, dtype, start, stop, survivors, nonzeros, nonfinite, given, group, values, mask, step
    )


@dataclass(frozen=True)
class Outline:
    """A whole layer as an index describes it; its parts lie in the shards."""

    order: int
    shape: tuple[int, ...]
    dtype: str
    masked: bool
    survivors: int
    attributes: dict[str, Scalar]
    group: Node

    @property
    def weights(self) -> int:
        return weights_of(self.shape)


def read_outline(group: Node) -> Outline:
    """Read and check what an index says of a layer."""
    given = group.attributes()
    fields = {key: given.pop(key, None) for key in INDEX_FIELDS}
    order, weights, survivors = (_count(group, fields, key) for key in ("order", "weights", "survivors"))
    shape, dtype = _form(group, fields, given)
    masked = fields["masked"]
    if type(masked) is not bool or weights != weights_of(shape):
        group.refuse("states counts of weights and masks that do not go together")
    if survivors > weights or (survivors < weights and not masked):
        group.refuse("states counts of weights and survivors that do not go together")
    if fields["sparsity"] != sparsity(survivors, weights):
        group.refuse(f"states a sparsity of {fields['sparsity']}, which is not that of its counts")
    if group.children():
        group.refuse("holds something; an index only describes layers")
    return Outline(order, shape, dtype, masked, survivors, given, group)


def _form(group: Node, fields: dict[str, Any], given: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """A layer's shape and dtype, checked; so are the attributes that are the caller's."""
    shape, dtype = fields["shape"], fields["dtype"]
    if not isinstance(shape, tuple) or any(size < 0 for size in shape):
        group.refuse(f"has no shape, but {shape!r}")
    if dtype not in LAYER_DTYPES:
        group.refuse(f"has the dtype {dtype!r}; allowed are {', '.join(LAYER_DTYPES)}")
    if any(isinstance(value, tuple) for value in given.values()):
        group.refuse("has an attribute of a form that is not known")
    return shape, dtype


def _count(group: Node, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        group.refuse(f"has {key} {value!r}, where a count belongs")
    return value


def read_tensor(node: Node) -> TensorState:
    """Read and check a tensor."""
    dtype, shape, nonfinite = open_tensor(node)
    array = np.empty(shape, STORAGE[dtype])
    flat = array.reshape(-1)
    found = 0
    for at in range(0, flat.size, CHUNK):
        part = flat[at : at + CHUNK]
        node.read(at, part)
        found += _check_values(node, part, dtype)
    _check_nonfinite(node, found, nonfinite)
    return TensorState(array.view(np.bool_) if dtype == "bool" else array, dtype)


def check_tensor(node: Node) -> int:
    """Read and check a tensor and keep nothing; the number of its bytes."""
    dtype, shape, nonfinite = open_tensor(node)
    size = weights_of(shape)
    found = 0
    for at in range(0, size, CHUNK):
        part = np.empty(min(CHUNK, size - at), STORAGE[dtype])
        node.read(at, part)
        found += _check_values(node, part, dtype)
    _check_nonfinite(node, found, nonfinite)
    return size * np.dtype(STORAGE[dtype]).itemsize


def open_tensor(node: Node) -> tuple[str, tuple[int, ...], int]:
    """What a tensor says of itself: dtype, shape, and how many of its values are not finite."""
    given = node.attributes(allowed=("dtype", "nonfinite"))
    dtype = given.get("dtype")
    if dtype not in STORAGE:
        node.refuse(f"has the dtype {dtype!r}; allowed are {', '.join(STORAGE)}")
    shape = node.shape_of(np.dtype(STORAGE[dtype]))
    return dtype, shape, _count(node, given, "nonfinite")


def _check_values(node: Node, part: Array, dtype: str) -> int:
    if dtype == "bool" and part.max(initial=0) > 1:
        node.refuse("has values that are neither true nor false")
    return tally(part, dtype)[1]


def _check_nonfinite(node: Node, found: int, stated: int) -> None:
    if found != stated:
        node.refuse(f"has {found:,} values that are NaN or infinite, and states {stated:,}")
