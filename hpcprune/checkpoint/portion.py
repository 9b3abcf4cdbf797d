"""A portion of a layer on its way into a file: the survivors' values, and the mask's bits.

It is looked at where it lies, so that a whole model is written with a chunk of memory, or copied, so that training can
go on while it is written. Both go through the same generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from hpcprune.checkpoint.bits import cut_bits, padding_clear
from hpcprune.checkpoint.format import (
    CHUNK,
    INDEX_FIELDS,
    LAYER_DTYPES,
    LAYER_FIELDS,
    Array,
    Bits,
    LayerState,
    Scalar,
    mask_bytes,
    storage,
    weights_of,
)
from hpcprune.errors import CheckpointError
from hpcprune.native.survivors import gather, popcount

__all__ = ["Portion", "check_layer", "portion_of"]


@dataclass(frozen=True)
class Portion:
    """The weights [start, stop) of layer number `order`.

    survivors: how many of them there are.
    values: theirs, in order, at most CHUNK at a time; can be taken once, unless it is a copy.
    mask: packed bits, of which `first` is that of weight `start`; None where nothing is pruned.
    """

    name: str
    order: int
    shape: tuple[int, ...]
    dtype: str
    attributes: dict[str, Scalar]
    start: int
    stop: int
    survivors: int
    values: Iterable[Array]
    mask: Bits | None
    first: int

    @property
    def weights(self) -> int:
        return self.stop - self.start

    def mask_parts(self, size: int) -> Iterator[Bits]:
        """The mask's bits, packed anew from weight `start` on, `size` bytes at a time; nothing where there is none."""
        return _bits(self.mask, self.first, self.first + self.weights, size)

    def copy(self) -> Portion:
        """The same in memory of its own."""
        values = [part.copy() if self.mask is None else part for part in self.values]  # gathered is a copy already
        mask = None if self.mask is None else cut_bits(self.mask, self.first, self.first + self.weights).copy()
        return replace(self, attributes=dict(self.attributes), values=values, mask=mask, first=0)


def portion_of(name: str, order: int, layer: LayerState, start: int, stop: int) -> Portion:
    """The weights [start, stop) of a layer, as they lie there.

    Raises:
        CheckpointError: the layer's parts do not fit each other.
    """
    check_layer(name, layer)
    survivors = stop - start
    if layer.mask is not None:
        survivors = sum(popcount(part) for part in _bits(layer.mask, start, stop, CHUNK // 8))
    return Portion(
        name,
        order,
        layer.shape,
        layer.dtype,
        layer.attributes,
        start,
        stop,
        survivors,
        _survivors(layer, start, stop),
        layer.mask,
        start,
    )


def _survivors(layer: LayerState, start: int, stop: int) -> Iterator[Array]:
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        part = layer.values[low:high]
        yield part if layer.mask is None else gather(part, cut_bits(layer.mask, low, high))


def _bits(mask: Bits | None, start: int, stop: int, size: int) -> Iterator[Bits]:
    if mask is not None:
        for low in range(start, stop, 8 * size):
            yield cut_bits(mask, low, min(low + 8 * size, stop))


def check_layer(name: str, layer: LayerState) -> None:
    """Raise CheckpointError if a layer's parts do not fit each other."""
    for key in layer.attributes:
        if key in LAYER_FIELDS or key in INDEX_FIELDS:
            raise CheckpointError(f"{name}: attribute {key!r} is the format's own; choose another name")
    weights, kind = weights_of(layer.shape), storage(layer.dtype, name, LAYER_DTYPES)
    if layer.values.shape != (weights,) or layer.values.dtype != kind:
        raise CheckpointError(
            f"{name}: values of shape {layer.values.shape} and type {layer.values.dtype} do not hold the {weights:,} "
            f"weights of {layer.shape} as {layer.dtype}; give them flat, as {kind}"
        )
    mask = layer.mask
    if mask is not None and (mask.shape != (mask_bytes(weights),) or mask.dtype != np.uint8):
        raise CheckpointError(
            f"{name}: a mask of shape {mask.shape} and type {mask.dtype} does not fit {weights:,} weights; give "
            f"{mask_bytes(weights):,} bytes of packed bits"
        )
    if mask is not None and not padding_clear(mask, weights):
        raise CheckpointError(f"{name}: the mask has bits set after its last weight; clear them")
