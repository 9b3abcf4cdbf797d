"""`hpcprune diff`: how two checkpoints differ, in layers, masks, values and what they say about themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpcprune.checkpoint.bits import popcount
from hpcprune.checkpoint.format import CHUNK, Array, Bits, LayerState, State, TensorState, weights_of
from hpcprune.checkpoint.read import read_model
from hpcprune.checkpoint.resume import read_step

__all__ = ["compare", "diff"]


def diff(first: str | Path, second: str | Path) -> int:
    """Print how two checkpoints differ, a line each; the exit status: 0 if they hold the same, 1 if not.

    Raises:
        CheckpointError: one of them is damaged, or not a checkpoint.
    """
    lines = compare(first, second)
    for line in lines or ["both hold the same"]:
        print("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line))
    return 1 if lines else 0


def compare(first: str | Path, second: str | Path) -> list[str]:
    """How two checkpoints differ, each a model's file or a step's folder; nothing if they hold the same, bit for bit.

    Raises:
        CheckpointError: one of them is damaged, or not a checkpoint.
    """
    a, b = _read(Path(first)), _read(Path(second))
    lines = []
    for key in sorted(a.about.keys() | b.about.keys()):
        if key not in a.about or key not in b.about:
            lines.append(f"about {key}: only in {first if key in a.about else second}")
        elif repr(a.about[key]) != repr(b.about[key]):
            lines.append(f"about {key}: {_short(a.about[key])} and {_short(b.about[key])}")
    if list(a.layers) != list(b.layers) and a.layers.keys() == b.layers.keys():
        lines.append("layers: the same, in another order")
    for name in [*a.layers, *(name for name in b.layers if name not in a.layers)]:
        if name in a.layers and name in b.layers:
            lines.extend(f"layer {name}: {text}" for text in _compare_layers(a.layers[name], b.layers[name]))
        else:
            lines.append(f"layer {name}: only in {first if name in a.layers else second}")
    for one, other in ((a.tensors, b.tensors), (a.own, b.own)):
        for key in sorted(one.keys() | other.keys()):
            if key in one and key in other:
                lines.extend(f"{key}: {text}" for text in _compare_tensors(one[key], other[key]))
            else:
                lines.append(f"{key}: only in {first if key in one else second}")
    return lines


def _read(path: Path) -> State:
    if not path.is_dir():
        return read_model(path)
    step = read_step(path)
    own = {f"rank {rank}: {key}": tensor for rank, tensors in enumerate(step.own) for key, tensor in tensors.items()}
    return State(step.about, step.layers, step.tensors, own)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _compare_layers(a: LayerState, b: LayerState) -> list[str]:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return [f"{a.dtype} of {a.shape} and {b.dtype} of {b.shape}"]
    lines = []
    for key in sorted(a.attributes.keys() | b.attributes.keys()):
        if repr(a.attributes.get(key)) != repr(b.attributes.get(key)):
            lines.append(f"{key}: {_short(a.attributes.get(key))} and {_short(b.attributes.get(key))}")
    weights = weights_of(a.shape)
    if a.mask is None and b.mask is None:
        return lines + _compare_values(a.values, b.values, a.dtype)
    one, other = _mask(a, weights), _mask(b, weights)
    differing = popcount(one ^ other)
    if differing:
        union = popcount(one | other)
        lines.append(
            f"masks differ in {differing:,} of {weights:,} weights (Jaccard {popcount(one & other) / union:.4f}; "
            f"{popcount(one):,} and {popcount(other):,} survivors)"
        )
    return lines + _compare_values(a.values, b.values, a.dtype)


def _mask(layer: LayerState, weights: int) -> Bits:
    """The packed mask; one of all ones where nothing is pruned."""
    if layer.mask is not None:
        return layer.mask
    return np.packbits(np.ones(weights, np.bool_), bitorder="little")


def _compare_tensors(a: TensorState, b: TensorState) -> list[str]:
    if (a.array.shape, a.dtype) != (b.array.shape, b.dtype):
        return [f"{a.dtype} of {a.array.shape} and {b.dtype} of {b.array.shape}"]
    return _compare_values(a.array.reshape(-1), b.array.reshape(-1), a.dtype)


def _compare_values(a: Array, b: Array, dtype: str) -> list[str]:
    """Compare bit for bit, a chunk at a time; the size of the difference is taken as numbers."""
    differing, largest = 0, 0.0
    raw = np.dtype(f"u{a.dtype.itemsize}")
    for at in range(0, a.size, CHUNK):
        one, other = a[at : at + CHUNK], b[at : at + CHUNK]
        where = np.flatnonzero(one.view(raw) != other.view(raw))
        if where.size:
            differing += where.size
            with np.errstate(invalid="ignore"):
                gaps = np.abs(_numbers(one[where], dtype) - _numbers(other[where], dtype))
            largest = max(largest, float(np.nan_to_num(gaps, nan=np.inf).max()))
    return [f"{differing:,} of {a.size:,} values differ, by {largest:.6g} at most"] if differing else []


def _numbers(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float64)
