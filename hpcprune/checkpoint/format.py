"""What a checkpoint holds, and the numbers and names that writer and reader must agree on.

One format serves three kinds of file: the result of a run (`model`), one rank's part of a step (`shard`), and the list
of a step's parts (`index`). In memory all of it is a `State`: names, plain arrays and scalars, nothing that needs a
class of the user's, so that nothing is ever pickled. docs/checkpoint-format.md describes the bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcprune.errors import CheckpointError

__all__ = ["LayerState", "State", "StepState", "TensorState", "escape", "unescape"]

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]
Scalar = str | int | float | bool

FORMAT = 1
KINDS = ("model", "shard", "index")
BLOCK = 512  # bytes of plain text before the HDF5 part: the smallest user block that HDF5 allows
CHUNK = 1 << 22  # weights that are written, read or checked at a time; a multiple of 8
DENSE_ENOUGH = 1 / 8  # masks of layers with a larger share of survivors are stored as they are: deflating gains little
MOST_SHRINKING = 8  # Huffman codes alone take a bit for a byte at least, so nothing honest shrinks more than this
LONGEST_NAME = 1024  # bytes of a name in the file
LONGEST_TEXT = 4096  # bytes of an attribute; longer texts are stored as JSON (HDF5 ends attributes at 64 KiB)

# How each dtype is stored. numpy has no bfloat16 and HDF5 no bool: their bits are stored, and the name stands beside.
STORAGE = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int8": "|i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "|u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "bool": "|u1",
}

LAYER_DTYPES = ("float64", "float32", "float16", "bfloat16")

# The attributes of a layer that the format itself needs; the rest of a layer's attributes are the caller's.
LAYER_FIELDS = (
    "order",
    "shape",
    "dtype",
    "start",
    "stop",
    "weights",
    "survivors",
    "sparsity",
    "nonzeros",
    "nonfinite",
)
# The same in an index, where a layer is described and its parts lie in the shards.
INDEX_FIELDS = ("order", "shape", "dtype", "masked", "weights", "survivors", "sparsity")
# The attributes of the file that the format itself needs; the rest are `State.about`.
FILE_FIELDS = ("format", "kind")
TENSOR_GROUPS = ("parameters", "buffers", "optimizer")


@dataclass
class LayerState:
    """A prunable layer: all of its weights, and which of them survive.

    shape: of the parameter.
    dtype: a name of `LAYER_DTYPES`.
    values: the weights, dense and flat in C order, of the dtype's storage type (uint16 for bfloat16). What the mask
        prunes is not stored, and read back as zero.
    mask: one bit a weight, packed as `numpy.packbits(..., bitorder="little")` does it, 1 where the weight survives;
        None where nothing is pruned.
    attributes: what else a reader should see beside the layer, such as its criterion and threshold.
    """

    shape: tuple[int, ...]
    dtype: str
    values: Array
    mask: Bits | None = None
    attributes: dict[str, Scalar] = field(default_factory=dict)


@dataclass
class TensorState:
    """Any other tensor: `array` in its shape and storage type (uint16 for bfloat16, numpy's bool for bool)."""

    array: Array
    dtype: str


@dataclass
class State:
    """All that a checkpoint holds.

    about: what describes the run; any JSON (str, int, float, bool, None, lists, dicts with str keys).
    layers: the prunable layers by parameter name, in global order.
    tensors: the others, under "parameters/<name>", "buffers/<name>", "optimizer/<which>/<key>" or
        "optimizer/<key>".
    own: tensors that differ from rank to rank, under any name: this rank's.
    """

    about: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, LayerState] = field(default_factory=dict)
    tensors: dict[str, TensorState] = field(default_factory=dict)
    own: dict[str, TensorState] = field(default_factory=dict)


@dataclass
class StepState:
    """A step as all of its ranks wrote it: a State with whole layers, and `own` once for each rank, in rank order."""

    step: int
    about: dict[str, Any]
    layers: dict[str, LayerState]
    tensors: dict[str, TensorState]
    own: list[dict[str, TensorState]]


def storage(dtype: str, what: str, allowed: Iterable[str] = STORAGE) -> np.dtype[Any]:
    """The stored type of a dtype; CheckpointError for one that the format does not know or that is not allowed here."""
    if dtype not in allowed:
        raise CheckpointError(f"{what}: dtype {dtype!r} cannot be stored here; allowed are {', '.join(allowed)}")
    return np.dtype(STORAGE[dtype])


def weights_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def sparsity(survivors: int, weights: int) -> float:
    """The pruned part of the weights, 0 where there are none."""
    return 1 - survivors / weights if weights else 0.0


def mask_bytes(weights: int) -> int:
    return (weights + 7) // 8


def mask_chunk(size: int) -> int:
    """Bytes per chunk of a deflated mask of `size` bytes: even parts, for HDF5 pads the last chunk to full length."""
    parts = -(-size // (CHUNK // 8))
    return -(-size // parts)


# Characters that cannot or should not stand in a name: what HDF5 or the format gives a meaning (/ % @), control
# characters, those that hide or reorder text on a terminal, and halves of surrogate pairs.
_SPECIAL = re.compile(
    "[/%@\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", re.DOTALL
)


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def escape(name: str) -> str:
    """A name as it stands in the file: one component of a path, whatever characters it has. Undone by `unescape`.

    Raises:
        CheckpointError: the name is empty, or longer than the format allows.
    """
    escaped = _percent(name) if set(name) == {"."} else _SPECIAL.sub(lambda match: _percent(match[0]), name)
    if not 0 < len(escaped.encode()) <= LONGEST_NAME:
        raise CheckpointError(f"the name {name[:40]!r} cannot be stored: names have 1 to {LONGEST_NAME} bytes")
    return escaped


def unescape(text: str) -> str:
    """The name that `escape` gave `text` for; ValueError where there is none."""
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    name = raw.decode("utf-8", "surrogatepass")
    if not name or escape(name) != text:
        raise ValueError(f"{text[:80]!r} is not a name that hpcprune writes")
    return name


def tensor_path(key: str) -> list[str]:
    """Where a tensor of `State.tensors` stands in the file: the group's name and its escaped components."""
    group, _, rest = key.partition("/")
    parts = rest.split("/", 1) if group == "optimizer" else [rest]
    if group not in TENSOR_GROUPS or not all(parts):
        raise CheckpointError(
            f"a tensor cannot be stored as {key!r}: use parameters/<name>, buffers/<name>, optimizer/<which>/<key> or "
            f"optimizer/<key>"
        )
    return [group, *map(escape, parts)]
