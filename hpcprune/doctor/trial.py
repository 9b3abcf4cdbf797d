"""Small pieces of a run, done for real: a collective, a gradient's all-reduce, the kernels, a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from hpcprune.doctor.finding import Finding
from hpcprune.errors import CheckpointError
from hpcprune.native.library import describe, library
from hpcprune.native.survivors import gather
from hpcprune.world import World

__all__ = ["check_checkpoint", "check_collective", "check_group", "check_native"]


def check_collective(world: World) -> list[Finding]:
    """A sum over all ranks whose value is known."""
    total = int(world.allreduce(np.array([world.rank + 1], np.int64), "doctor: sum")[0])
    expected = world.size * (world.size + 1) // 2
    if total != expected:
        fix = "check that all ranks use the same MPI library"
        return [Finding("FAIL", "collective", f"the sum over {world.size} ranks is {total}, not {expected}", fix)]
    return [Finding("ok", "collective", f"a sum over {world.size} rank{'s' * (world.size > 1)} is right")]


def check_group(world: World) -> list[Finding]:
    """The group of ranks that carries gradients: formed, used once, and left."""
    import torch

    from hpcprune.exchange.torch import TorchExchange

    exchange = TorchExchange(world, torch.device("cpu"))
    try:
        buffer = torch.full((1000,), float(world.rank + 1))
        exchange.begin(buffer, "doctor: gloo").wait()
    finally:
        exchange.close()
    expected = world.size * (world.size + 1) / 2
    if not torch.all(buffer == expected):
        fix = "check that all ranks have the same torch"
        return [Finding("FAIL", "gloo group", f"the sum is {buffer[0].item():g}, not {expected:g}", fix)]
    return [Finding("ok", "gloo group", f"an all-reduce over {world.size} rank{'s' * (world.size > 1)} is right")]


def check_native(world: World) -> list[Finding]:
    """The k-th smallest of a few thousand numbers, and their survivors, against numpy."""
    from hpcprune.threshold import kth_smallest

    scores = np.random.default_rng(0).standard_normal(5001).astype(np.float32)
    value = kth_smallest([scores], 2500, World.alone()).value
    bits = np.packbits(scores > value, bitorder="little")
    same = value == float(np.sort(scores)[2499]) and np.array_equal(gather(scores, bits), scores[scores > value])
    chosen = describe()
    if not same:
        fix = "set HPCPRUNE_NATIVE=numpy, and report this with the compiler's version"
        return [Finding("FAIL", "native kernels", f"numpy finds another result than {chosen}", fix)]
    if library().code is None:
        return [Finding("warn", "native kernels", chosen, "install g++ for speed; results are the same without it")]
    return [Finding("ok", "native kernels", f"equal to numpy; {chosen}")]


def check_checkpoint(world: World) -> list[Finding]:
    """A small model.h5 written and read back; and refused once a bit of it is flipped."""
    from hpcprune.checkpoint.format import LayerState, State
    from hpcprune.checkpoint.read import read_model
    from hpcprune.checkpoint.write import write_model

    values = np.arange(64, dtype=np.float32)
    mask = np.packbits(values > 0, bitorder="little")
    with tempfile.TemporaryDirectory(prefix="hpcprune-doctor-") as folder:
        path = Path(folder) / "model.h5"
        write_model(path, State({"made by": "doctor"}, {"weight": LayerState((8, 8), "float32", values, mask)}))
        if not np.array_equal(read_model(path).layers["weight"].values, values):
            fix = "reinstall h5py: pip install --force-reinstall h5py"
            return [Finding("FAIL", "HDF5 round trip", "other values came back than were written", fix)]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        try:
            read_model(path)
        except CheckpointError:
            return [Finding("ok", "HDF5 round trip", f"values come back, a flipped bit is found ({folder})")]
    return [Finding("FAIL", "HDF5 round trip", "a flipped bit was not found", "reinstall hpcprune")]
