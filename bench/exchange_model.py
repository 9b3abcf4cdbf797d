"""How an exchange's time depends on the number of ranks: a model, and the measured points that it is checked against.

A ring all-reduce of B bytes over n ranks is 2 (n - 1) messages one after the other, each of B / n bytes, so with a
latency of `a` seconds a message and a bandwidth of `w` bytes a second a bucket takes

    2 (n - 1) a + 2 (n - 1) / n B / w

A tree (recursive halving and doubling) has 2 log2(n) messages in place of 2 (n - 1) and moves the same bytes. Buckets
follow one another. Of a step, the exchange can hide behind what is left of backward when the first bucket goes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RATE = 0.25  # Gbit/s: low enough that 8 hosts are held up by the network, not by one machine's cores
SPARSITIES = 0.0, 0.9, 0.99
REPEATS = 7
MB = 1e6

# What is predicted: a network of 1 B float32 weights, of which backward is two thirds of a step's computing.
WEIGHTS, COMPUTE, HIDDEN = 1e9, 0.5, 2 / 3
RANKS = 16, 64, 256, 1024, 4096
NETWORKS = {"10 Gbit/s Ethernet": (30e-6, 1.25e9), "200 Gbit/s InfiniBand": (5e-6, 25e9)}  # seconds, bytes a second
BUCKETS = 2 * MB, 32 * MB  # retrain.bucket_mb: its default, and one for many ranks
DENSE_BUCKET = 25 * MB  # DDP's


def seconds(ranks: int, size: float, buckets: int, latency: float, bandwidth: float, tree: bool = False) -> float:
    """An exchange of `size` bytes in `buckets` parts."""
    if ranks == 1:
        return 0.0
    messages = 2 * math.log2(ranks) if tree else 2 * (ranks - 1)
    return buckets * messages * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def step(exchange: float, compute: float = COMPUTE) -> float:
    """A step's seconds: what of the exchange does not fit behind backward is waited for."""
    return compute + max(0.0, exchange - HIDDEN * compute)


def check(measured: dict[int, Any]) -> None:
    """Print measured and modelled times side by side; the latency is that of 2 ranks' smallest all-reduce."""
    latency = measured[2]["smallest"] / 2
    print(f"latency {latency * 1e6:.0f} us (from the smallest all-reduce of 2 ranks), bandwidth {RATE:g} Gbit/s")
    heads = "ranks", "sparsity", "buckets", "packed MB", "MB sent", "model", "ms", "model", "ms / model"
    print("".join(f"{head:>11}" for head in heads))
    for ranks, each in measured.items():
        for sparsity, (size, buckets, sent, took) in zip(SPARSITIES, each["exchanges"], strict=True):
            modelled = seconds(ranks, size, buckets, latency, RATE * 1e9 / 8)
            cells = [f"{ranks}", f"{sparsity:.0%}", f"{buckets}", f"{size / MB:.2f}", f"{sent / MB:.2f}"]
            cells += [f"{2 * (ranks - 1) / ranks * size / MB:.2f}", f"{took * 1e3:.1f}", f"{modelled * 1e3:.1f}"]
            print("".join(f"{cell:>11}" for cell in [*cells, f"{took / modelled:.2f}" if modelled else "-"]))


def predict() -> None:
    """Print what the model says of ranks that were not there."""
    for name, (latency, bandwidth) in NETWORKS.items():
        print(f"\nMODEL, not measured: {WEIGHTS / 1e9:g} B float32 weights, {name}, {latency * 1e6:g} us a message,")
        print(f"{COMPUTE:g} s of computing a step: step seconds (exchange seconds), dense step / this step")
        print(f"{'':24}" + "".join(f"{f'{ranks} ranks':>22}" for ranks in RANKS))
        for tree in (False, True):
            dense = [_exchange(ranks, 1.0, DENSE_BUCKET, latency, bandwidth, tree) for ranks in RANKS]
            for density, bucket in ((1.0, DENSE_BUCKET), *itertools.product((0.1, 0.01), BUCKETS)):
                took = [_exchange(ranks, density, bucket, latency, bandwidth, tree) for ranks in RANKS]
                cells = [
                    f"{step(its):.2f} ({its:.3f}) {step(whole) / step(its):6.2f}"
                    for its, whole in zip(took, dense, strict=True)
                ]
                row = f"{'tree' if tree else 'ring'}, {1 - density:.0%}, {bucket / MB:g} MB"
                print(f"{row:24}" + "".join(f"{cell:>22}" for cell in cells))


def _exchange(ranks: int, density: float, bucket: float, latency: float, bandwidth: float, tree: bool) -> float:
    size = WEIGHTS * 4 * density
    return seconds(ranks, size, math.ceil(size / bucket), latency, bandwidth, tree)


def measure(network: str) -> None:
    """On each rank: print, as JSON, the smallest all-reduce's seconds, and each sparsity's bytes, buckets, time."""
    import torch
    from exchange_rank import BUCKET_MB, Bench, wire_bytes

    from hpcprune.survivors import Survivors
    from hpcprune.world import World

    world = World.of()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
    bench = Bench(network, world)
    one = torch.zeros(1)

    def slowest(action: Callable[[], None]) -> float:
        times = []
        for _ in range(REPEATS):
            world.barrier("bench")
            start = time.perf_counter()
            action()
            times.append(max(world.allgather(time.perf_counter() - start, "bench")))
        return statistics.median(times[1:])

    def smallest() -> None:
        for _ in range(20):
            bench.exchange.begin(one, "bench").wait()

    latency = slowest(smallest) / 20
    exchanges = []
    for sparsity in SPARSITIES:
        model = bench.task.model()
        survivors = Survivors(model, bench.masks(sparsity) if sparsity else None)
        parts = survivors.gradients()[0].split(int(BUCKET_MB * MB / 4))

        def exchange(parts: Any = parts) -> None:
            for pending in [bench.exchange.begin(part, "bench") for part in parts]:
                pending.wait()

        before = wire_bytes(world)
        took = slowest(exchange)
        sent = (wire_bytes(world) - before) / REPEATS
        exchanges.append((survivors.packed_bytes, len(parts), sent, took))
    if world.rank == 0:
        print(json.dumps({"smallest": latency, "exchanges": exchanges}))


if __name__ == "__main__":
    measure(sys.argv[1])
