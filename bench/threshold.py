"""How long the threshold and its masks take, against torch and against only reading the weights.

    python bench/threshold.py                                    # 10M and 100M weights on 1 and 2 ranks
    python bench/threshold.py --weights 10M --ranks 1            # a quick look
    python bench/threshold.py --weights 100M --ranks 1 --huge    # also 1 B weights, time per weight against 100 M

float32 weights in 24 layers of differing scale, 90 % to be pruned by magnitude. The limit is a plain C++ sum that reads
the weights twice with as many threads; it and hpcprune are timed in turns, so that what else the machine does hits both
alike. Torch's ways run in processes of their own, whose threads and caches disturb nobody. Medians are given; what
takes longer than 5 seconds is timed once (`global_unstructured` needs a minute for 100M). Memory is the peak of a fresh
process above what it held with the weights loaded. Read the ratios: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcprune.native.library import describe
from hpcprune.threshold import select_survivors
from hpcprune.world import World

LAYERS = 24
SPARSITY = 0.9
ROUNDS = 7
OURS, KTHVALUE, TORCH, LIMIT = "hpcprune", "torch.cat + kthvalue", "global_unstructured", "read twice (limit)"

SUM = """
#include <cstdint>
#include <thread>
#include <vector>
extern "C" float sum(const float* const* arrays, const int64_t* sizes, int64_t count, int threads) {
  std::vector<std::thread> running;
  std::vector<float> sums(16 * threads);
  const auto work = [&](int t) {
    for (int64_t i = 0; i < count; ++i) {
      float lanes[128] = {};
      const int64_t start = sizes[i] / threads * t, stop = start + sizes[i] / threads;
      for (int64_t j = start; j + 128 <= stop; j += 128)
        for (int lane = 0; lane < 128; ++lane) lanes[lane] += arrays[i][j + lane];
      for (float lane : lanes) sums[16 * t] += lane;
    }
  };
  for (int t = 1; t < threads; ++t) running.emplace_back(work, t);
  work(0);
  for (std::thread& thread : running) thread.join();
  float total = 0;
  for (float part : sums) total += part;
  return total;
}
"""


def build_sum(layers: list[np.ndarray], threads: int) -> Callable[[], float]:
    """A native pass that does nothing but read all layers once."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "sum.cpp"), Path(folder, "sum.so")
        source.write_text(SUM)
        compiler = os.environ.get("CXX", "g++").split()
        subprocess.run(
            [*compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", source, "-o", target], check=True
        )
        function = ctypes.CDLL(str(target)).sum
    function.restype = ctypes.c_float
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    addresses = np.array([layer.ctypes.data for layer in layers], np.uintp)
    sizes = np.array([layer.size for layer in layers], np.int64)
    return lambda: float(function(addresses.ctypes.data, sizes.ctypes.data, len(layers), threads))


def generate(weights: int, rank: int = 0, ranks: int = 1) -> list[np.ndarray]:
    """This rank's part of the layers, generated one by one."""
    own = range(LAYERS * rank // ranks, LAYERS * (rank + 1) // ranks)
    layers = []
    for number in own:
        layer = np.random.default_rng(number).standard_normal(weights // LAYERS, dtype=np.float32)
        layer *= 0.02 * (1 + number / LAYERS)
        layers.append(layer)
    return layers


def contenders(layers: list[np.ndarray], world: World, threads: int) -> dict[str, Callable[[], Any]]:
    total = sum(layer.size for layer in layers) * world.size
    k = round(SPARSITY * total)

    def kthvalue() -> Any:
        import torch

        torch.set_num_threads(threads)
        scores = torch.cat([torch.from_numpy(layer).abs() for layer in layers])
        value = scores.kthvalue(k).values
        del scores
        return [torch.from_numpy(layer).abs() > value for layer in layers]

    def global_unstructured() -> Any:
        import torch
        from torch.nn.utils import prune

        torch.set_num_threads(threads)
        model = torch.nn.Module()
        modules = []
        for number, layer in enumerate(layers):
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(torch.from_numpy(layer))
            model.add_module(str(number), module)
            modules.append((module, "weight"))
        prune.global_unstructured(modules, prune.L1Unstructured, amount=k)
        return model

    def limit() -> Any:
        return read(), read()

    read = build_sum(layers, threads)
    return {
        OURS: lambda: select_survivors([layers], [k], world, absolute=True, threads=threads),
        KTHVALUE: kthvalue,
        TORCH: global_unstructured,
        LIMIT: limit,
    }


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    del result
    return seconds


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_memory(weights: int, contender: str) -> dict[str, Any]:
    """In a process of its own: the median seconds, and the first call's peak above what was held before it."""
    world, threads = World.alone(), cores()
    if contender in (KTHVALUE, TORCH):
        import torch.nn.utils.prune

        torch.ones(10).kthvalue(3)
    contenders([np.ones(LAYERS, np.float32)], world, threads)[OURS]()
    layers = generate(weights)
    action = contenders(layers, world, threads)[contender]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    seconds = [timed(action)]
    memory = status("VmHWM") - before
    while seconds[0] < 5 and len(seconds) < ROUNDS:
        seconds.append(timed(action))
    return {"seconds": statistics.median(seconds), "memory": memory}


def measure_seconds(weights: int, world: World) -> dict[str, Any]:
    """In turns: the median of the slowest rank's seconds, and the bytes a rank gave to collectives for ours."""
    layers = generate(weights, world.rank, world.size)
    actions = contenders(layers, world, max(1, cores() // world.size))
    seconds: dict[str, list[float]] = {OURS: [], LIMIT: []}
    reduced = 0
    for turn in range(ROUNDS + 1):
        for name in seconds:
            world.barrier("bench")
            before = world.bytes_reduced
            took = timed(actions[name])
            if name == OURS:
                reduced = world.bytes_reduced - before
            slowest = max(world.allgather(took, "bench: seconds"))
            if turn > 0:  # the first turn warms up
                seconds[name].append(slowest)
    return {"seconds": {name: statistics.median(all_) for name, all_ in seconds.items()}, "reduced": reduced}


def measure_huge() -> None:
    """1 B weights against 100 M, in turns."""
    world, threads = World.alone(), cores()
    actions = {size: contenders(generate(size), world, threads) for size in (10**8, 10**9)}
    ours: dict[int, list[float]] = {size: [] for size in actions}
    for _ in range(4):
        for size, action in actions.items():
            for _ in range(10**9 // size // 2 + 1):  # about as long for the one as for the other
                ours[size].append(timed(action[OURS]) / size)
    small, large = (statistics.median(times) for times in ours.values())
    print(f"1 B weights: {large * 1e9:.3f} ns a weight, {large / small:.2f} times that of 100 M ({small * 1e9:.3f} ns)")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def again(*arguments: str, ranks: int = 1) -> dict[str, Any]:
    """What this program prints as its last line when it is started afresh, as one process or under mpirun."""
    command = [sys.executable, __file__, *arguments]
    if ranks > 1:
        command = ["mpirun", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks), *command]
    allow = {f"{name}_ALLOW_RUN_AS_ROOT{suffix}": "1" for name in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")}
    done = subprocess.run(command, env={**os.environ, **allow}, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(weights: int, ranks: int) -> None:
    measured = again("--measure", "seconds", "--weights", str(weights), "--ranks", str(ranks), ranks=ranks)
    seconds, memory = measured["seconds"], {}
    if ranks == 1:
        for name in (OURS, KTHVALUE, TORCH):
            fresh = again("--measure", name, "--weights", str(weights))
            memory[name] = fresh["memory"]
            seconds.setdefault(name, fresh["seconds"])
    print(f"\n{weights / 1e6:g} M float32 weights, {LAYERS} layers, {ranks} rank{'s' * (ranks > 1)}, ", end="")
    print(f"{max(1, cores() // ranks)} threads a rank, {SPARSITY:.0%} pruned; {describe()}")
    print(f"{'':24}{'seconds':>10}{'/ hpcprune':>12}{'/ limit':>9}{'extra peak MB':>15}{'bytes to collectives':>22}")
    for name in (OURS, KTHVALUE, TORCH, LIMIT):
        if name in seconds:
            ratios = f"{seconds[name] / seconds[OURS]:12.2f}{seconds[name] / seconds[LIMIT]:9.2f}"
            held = f"{memory[name] / 1e6:15.1f}" if name in memory else f"{'-':>15}"
            sent = f"{measured['reduced']:22,}" if name == OURS else f"{'-':>22}"
            print(f"{name:24}{seconds[name]:10.4f}{ratios}{held}{sent}")


def count(text: str) -> int:
    return int(float(text.rstrip("MB")) * {"M": 10**6, "B": 10**9}.get(text[-1], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=count, nargs="+", default=[10**7, 10**8], metavar="N", help="such as 10M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--huge", action="store_true", help="also 1 B weights (needs 5 GB of memory)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure == "seconds":
        world = World.of() if given.ranks[0] > 1 else World.alone()
        measured = measure_seconds(given.weights[0], world)
        if world.rank == 0:
            print(json.dumps(measured))
    elif given.measure:
        print(json.dumps(measure_memory(given.weights[0], given.measure)))
    else:
        for weights in given.weights:
            for ranks in given.ranks:
                compare(weights, ranks)
        if given.huge:
            measure_huge()


if __name__ == "__main__":
    main()
