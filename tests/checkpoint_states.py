"""States to write, and ways to damage what was written; shared by the tests of checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hpcprune.checkpoint import LayerState, State, TensorState

BLOCK = 512
NUMPY_TYPES = {"float64": "f8", "float32": "f4", "float16": "f2"}


def random_layer(shape: tuple[int, ...], dtype: str, density: float, seed: int = 0, **attributes: Any) -> LayerState:
    """A layer with about `density` of its weights surviving; nothing pruned, and no mask, at density 1."""
    rng = np.random.default_rng(seed)
    weights = int(np.prod(shape))
    values = rng.standard_normal(weights).astype(np.float32)
    keep = rng.random(weights) < density
    if density < 1:
        values[~keep] = 0
    stored = (
        (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(NUMPY_TYPES[dtype])
    )
    mask = np.packbits(keep, bitorder="little") if density < 1 else None
    return LayerState(shape, dtype, stored, mask, attributes)


def small_state() -> State:
    """One of each thing that a file holds, in a few hundred bytes."""
    return State(
        about={
            "job": {"prune": {"sparsity": 0.5, "include": ["*"]}},
            "seed": 7,
            "rate": 0.5,
            "task": "mnist",
            "ok": True,
        },
        layers={
            "conv.weight": random_layer((4, 3, 3), "float32", 0.5, 1, criterion="magnitude", threshold=0.25),
            "fc.weight": random_layer((3, 7), "bfloat16", 0.08, 2),
            "out.weight": random_layer((5,), "float64", 1.0, 3),
        },
        tensors={
            "parameters/fc.bias": TensorState(np.arange(3, dtype="f4"), "float32"),
            "buffers/seen": TensorState(np.array(12), "int64"),
            "buffers/flags": TensorState(np.array([True, False, True]), "bool"),
            "optimizer/0/momentum_buffer": TensorState(np.ones(4), "float64"),
        },
        own={"running_mean": TensorState(np.arange(2, dtype="f4"), "float32")},
    )


def same_tensor(a: TensorState, b: TensorState) -> bool:
    return (
        a.dtype == b.dtype
        and a.array.dtype == b.array.dtype
        and a.array.shape == b.array.shape
        and a.array.tobytes() == b.array.tobytes()
    )


def assert_same_layers(a: dict[str, LayerState], b: dict[str, LayerState]) -> None:
    assert list(a) == list(b)
    for name, one in a.items():
        other = b[name]
        assert (one.shape, one.dtype, one.attributes) == (other.shape, other.dtype, other.attributes), name
        assert one.values.dtype == other.values.dtype, name
        assert one.values.tobytes() == other.values.tobytes(), name
        assert (one.mask is None) == (other.mask is None), name
        assert one.mask is None or one.mask.tobytes() == other.mask.tobytes(), name


def assert_same_tensors(a: dict[str, TensorState], b: dict[str, TensorState]) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert same_tensor(tensor, b[key]), key


def assert_same_state(a: State, b: State) -> None:
    assert a.about == b.about
    assert_same_layers(a.layers, b.layers)
    assert_same_tensors(a.tensors, b.tensors)
    assert_same_tensors(a.own, b.own)


def seal(path: Path) -> None:
    """Give a file whose HDF5 part was changed the length and sha256 that it now has, as a forger would."""
    data = path.read_bytes()
    kind = data.split(b"\nkind ")[1].split(b"\n")[0].decode()
    version = data.split(b"\nformat ")[1].split(b"\n")[0].decode()
    write_block(path, data[BLOCK:], kind, version)


def write_block(path: Path, rest: bytes, kind: str, version: str = "1") -> None:
    text = (
        f"hpcprune checkpoint\nformat {version}\nkind {kind}\nbytes {len(rest)}\n"
        f"sha256 {hashlib.sha256(rest).hexdigest()}\n\n"
        "The sha256 is that of all bytes after the first 512. They are an HDF5 file: h5ls, h5dump and h5py\n"
        "open this file as it is. Check it with: hpcprune check FILE\n"
    )
    path.write_bytes(text.encode().ljust(BLOCK, b"\n") + rest)
