"""Checkpoints against torch.save and safetensors: bytes, seconds and extra memory at several sparsities.

    python bench/checkpoint.py [--weights 100M] [--sparsity 0 0.5 0.9 0.99] [--repeats 3] [--folder DIR]

24 float32 layers. Ours stores survivors and masks; torch and safetensors store the dense weights, so they are measured
once a round, not once a sparsity. Everything is measured in turns, in a fresh process each, with the weights in place:
`extra` is the peak of the process's memory over what it had before writing (VmHWM), in chunks of 16 MiB. Ours syncs to
the disk; the others are timed as they are, and with fsync added. Medians; ratios are those of dense torch.save.

`held up` is what a run waits for while a step is written beside its training: the weights compared and copied, all of
them here, by a rank alone. A training step (4 layers of 2048 x 2048, batch 64, all cores) is timed alone and meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hpcprune.checkpoint import State

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 24
CHUNK = 4 << 22
Times = dict[str, float]


def status(key: str) -> int:
    """A figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def timed(action: Callable[[], Any], memory: bool = False) -> tuple[float, int]:
    """Seconds that something took, and how far memory rose above what there was."""
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before hides what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is there now
    before, start = status("VmRSS"), time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - start
    risen = status("VmHWM") - before
    del kept
    return seconds, risen


def layers(weights: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    edges = np.linspace(0, weights, LAYERS + 1).astype(int)
    return [rng.standard_normal(stop - start, np.float32) for start, stop in itertools.pairwise(edges)]


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def pruned(weights: int, sparsity: float) -> State:
    from hpcprune.checkpoint import LayerState, State

    rng, state = np.random.default_rng(1), State()
    for number, values in enumerate(layers(weights)):
        mask = None
        if sparsity:
            bits = [rng.random(min(1 << 22, values.size - at), np.float32) for at in range(0, values.size, 1 << 22)]
            keep = np.concatenate([part >= sparsity for part in bits])
            values *= keep
            mask = np.packbits(keep, bitorder="little")
        state.layers[f"layer{number}.weight"] = LayerState((values.size,), "float32", values, mask)
    return state


def ours(folder: Path, weights: int, sparsity: float) -> Times:
    from hpcprune.checkpoint import LayerState, State, read_model, write_model
    from hpcprune.checkpoint.verify import verify

    state = pruned(weights, sparsity)
    path = folder / "model.h5"
    tiny = LayerState((64,), "float32", np.ones(64, np.float32), np.full(8, 3, np.uint8))
    write_model(path, State(layers={"warm": tiny}))
    read_model(path)
    write, extra = timed(lambda: write_model(path, state))
    state.layers.clear()
    read, risen = timed(lambda: read_model(path))
    check, checked = timed(lambda: verify(path))
    assert verify(path).ok
    return {
        "bytes": path.stat().st_size,
        "write": write,
        "synced": write,
        "read": read,
        "check": check,
        "extra": extra,
        "read_extra": risen - 4 * weights - (weights // 8 if sparsity else 0),
        "check_extra": checked,
    }


def torch_save(folder: Path, weights: int, sparsity: float) -> Times:
    import torch

    state = {f"layer{number}.weight": torch.from_numpy(values) for number, values in enumerate(layers(weights))}
    path = folder / "model.pt"
    torch.save({"warm": torch.ones(3)}, path)
    torch.load(path, weights_only=True)
    write, extra = timed(lambda: torch.save(state, path))
    synced = write + timed(lambda: sync(path))[0]
    state.clear()
    read, risen = timed(lambda: torch.load(path, weights_only=True))
    return {
        "bytes": path.stat().st_size,
        "write": write,
        "synced": synced,
        "read": read,
        "extra": extra,
        "read_extra": risen - 4 * weights,
    }


def safetensors(folder: Path, weights: int, sparsity: float) -> Times:
    from safetensors.numpy import load_file, save_file

    state = {f"layer{number}.weight": values for number, values in enumerate(layers(weights))}
    path = folder / "model.safetensors"
    save_file({"warm": np.ones(3)}, path)
    load_file(path)
    write, extra = timed(lambda: save_file(state, path))
    synced = write + timed(lambda: sync(path))[0]
    state.clear()
    read, risen = timed(lambda: load_file(path))
    return {
        "bytes": path.stat().st_size,
        "write": write,
        "synced": synced,
        "read": read,
        "extra": extra,
        "read_extra": risen - 4 * weights,
    }


class Two:
    """Two ranks that are one: the other one says the same."""

    rank, size = 0, 2

    def allgather(self, value: Any, what: str) -> list[Any]:
        return [value, value]


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def held(folder: Path, weights: int, sparsity: float) -> Times:
    import torch

    from hpcprune.agreement import check_weights
    from hpcprune.checkpoint import BackgroundWriter
    from hpcprune.shards import Layer, deal
    from hpcprune.world import World

    state = pruned(weights, sparsity)
    spans = deal([Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items()], 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(4)))
    optimizer, batch = torch.optim.SGD(model.parameters(), 1e-3, 0.9), torch.randn(64, 2048)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    writer = BackgroundWriter(folder / "steps", spans, World.alone(), 1)
    writer.begin(0, state)
    writer.finish()  # what is written next has a step to replace, as in a run
    compare = seconds(lambda: check_weights(state, Two(), ""))  # type: ignore[arg-type]
    alone = [seconds(step) for _ in range(30)][10:]
    copy, meanwhile = seconds(lambda: writer.begin(1, state)), []
    for _ in range(2):
        while not writer.done:
            meanwhile.append(seconds(step))
        writer.advance()
    write = seconds(lambda: writer.begin(2, state)) + seconds(writer.finish)
    shutil.rmtree(folder / "steps")
    times = {"compare": compare, "copy": copy, "write": write, "beside": sum(meanwhile), "steps": len(meanwhile)}
    return {**times, "alone": statistics.median(alone), "meanwhile": statistics.median(meanwhile)}


CONTENDERS = {"ours": ours, "torch": torch_save, "safetensors": safetensors, "held": held}


def measure(name: str, sparsity: float, weights: int, folder: Path) -> Times:
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        str(sparsity),
        "--weights",
        str(weights),
        "--folder",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    for file in folder.iterdir():
        file.unlink()
    os.sync()
    return dict(found)


def start_up(folder: Path) -> None:
    """How long the commands take on a small file, Python's own start included."""
    from hpcprune.checkpoint import LayerState, State, write_model

    path = folder / "small.h5"
    write_model(path, State({"seed": 1}, {"w": LayerState((9,), "float32", np.ones(9, np.float32))}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (["check", str(path)], ["show", str(path)], ["diff", str(path), str(path)]):
        command = [sys.executable, "-m", "hpcprune", *words]
        run = partial(subprocess.run, command, check=True, capture_output=True, env=environment)
        print(f"hpcprune {words[0]:<5} {statistics.median(seconds(run) for _ in range(7)):.2f} s")


def print_held(turns: list[Times]) -> None:
    row = {key: statistics.median(times[key] for times in turns) for key in turns[0]}
    share = (row["compare"] + row["copy"]) / (row["compare"] + row["write"])
    print(
        f"held up at 90%: weights compared {row['compare']:.3f} s, copied {row['copy']:.3f} s: {share:.2f} of the whole"
    )
    print(f"a training step: {row['alone'] * 1e3:.1f} ms alone, {row['meanwhile'] * 1e3:.1f} ms meanwhile", end="")
    print(f" ({row['steps']:.0f} steps in {row['beside']:.3f} s; waited for, the write takes {row['write']:.3f} s)\n")


def number(text: str) -> int:
    scale = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1], 1)
    return int(float(text.rstrip("kMG")) * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=number, default=number("100M"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.5, 0.9, 0.99])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, sparsity = options.one
        print(json.dumps(CONTENDERS[name](options.folder, options.weights, float(sparsity))))
        return
    rows = [("torch", 0.0), ("safetensors", 0.0), *(("ours", sparsity) for sparsity in options.sparsity)]
    found: dict[tuple[str, float], list[Times]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for turn in range(options.repeats):
            for row in rows if turn % 2 == 0 else rows[::-1]:
                found[row].append(measure(*row, options.weights, Path(folder)))
        middle = {
            row: {key: statistics.median(times[key] for times in turns) for key in turns[0]}
            for row, turns in found.items()
        }
        dense = middle["torch", 0.0]
        print(f"{options.weights:,} float32 weights in {LAYERS} layers, medians of {options.repeats}; x: of torch's\n")
        head = f"{'':<17}{'MB':>6}{'of dense':>10}{'write s':>10}{'x':>7}{'+fsync s':>10}{'x':>7}{'read s':>10}{'x':>7}"
        print(f"{head}{'check s':>10}  extra chunks (write, read, check)")
        for (name, sparsity), row in middle.items():
            label = f"ours {sparsity:.0%}" if name == "ours" else f"{name} dense"
            check = f"{row['check']:10.3f}" if "check" in row else " " * 10
            extra = ", ".join(
                f"{max(0.0, row[key]) / CHUNK:.2f}" for key in ("extra", "read_extra", "check_extra") if key in row
            )
            print(
                f"{label:<17}{row['bytes'] / 1e6:6.1f}{row['bytes'] / (4 * options.weights):10.3f}"
                f"{row['write']:10.3f}{row['write'] / dense['write']:7.2f}"
                f"{row['synced']:10.3f}{row['synced'] / dense['synced']:7.2f}"
                f"{row['read']:10.3f}{row['read'] / dense['read']:7.2f}{check}  {extra}"
            )
        print()
        print_held([measure("held", 0.9, options.weights, Path(folder)) for _ in range(options.repeats)])
        start_up(Path(folder))


if __name__ == "__main__":
    main()
