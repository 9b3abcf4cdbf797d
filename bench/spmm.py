"""How fast products with a pruned matrix are, against torch's dense layer and everybody's sparse ones.

    python bench/spmm.py                 # all shapes, batches, sparsities on 1 and 2 threads: half an hour
    python bench/spmm.py --shapes 4096x4096 --batch 1,32 --sparsity 0.9,0.95 --threads 1
    python bench/spmm.py --backward      # the gradients of a layer: dX and that of the survivors
    python bench/spmm.py --model         # 12 MLPs of a transformer: inference, and a step of retraining
    pip install scipy sparse_dot_mkl     # peers; those that are missing are left out

float32; X [batch, in] and Y [batch, out] lie as F.linear has them, for ours and for torch's; scipy and MKL are given X
transposed beforehand and give Y transposed. All contenders are timed in turns in one process, so that what else the
machine does hits them alike; in each turn the second call counts, which finds its data where the first left it. Medians
are given, and how often ours (the faster of its two) goes into F.linear's time and into that of the best of all.
"of peak": our multiply-adds with survivors over what the cores can do with numbers in registers. "of memory": the bytes
of our matrix, X and Y over what is read from memory in that time; more than 100 % comes from a cache.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("MKL_THREADING_LAYER", "GNU")  # a peer's MKL shall use the threads that torch has

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spmm_cuda

import hpcprune
from hpcprune.masks import Masks
from hpcprune.native.library import describe
from hpcprune.sparse import sparsify
from hpcprune.sparse.bitmap import bitmap_of
from hpcprune.sparse.choose import FEW
from hpcprune.sparse.ops import bitmap_linear, panels_linear, survivors_linear
from hpcprune.sparse.panels import lay_out, refill
from hpcprune.sparse.training import SparseTraining
from hpcprune.survivors import Survivors

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
SHAPES = "768x768,1024x1024,3072x768,768x3072,3072x3072,4096x4096"
TURNS, LONGEST = 9, 1.0  # of each contender; who takes longer than this many seconds has one turn

PEAKS = """
#include "paths.h"
using hpcprune::in_threads;
typedef float Vector __attribute__((vector_size(64)));
extern "C" float multiply_add(int64_t count, int threads) {
  std::vector<float> sums(16 * threads);
  in_threads(threads, [&](int64_t t) {
    Vector sum[12] = {}, a = {}, b = {};
    a += 1.0f + t, b += 1e-9f;
    for (Vector& each : sum) asm volatile("" : "+v"(each));  // the compiler shall not know what is in them
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < 12; ++j) sum[j] = a * sum[j] + b;
    for (Vector& each : sum) {
      asm volatile("" : "+v"(each));
      sums[16 * t] += each[0];
    }
  });
  return sums[0];
}
extern "C" float read(const float* array, int64_t size, int threads) {
  std::vector<float> sums(16 * threads);
  in_threads(threads, [&](int64_t t) {
    Vector sum[8] = {};
    for (int64_t i = size / threads * t; i + 128 <= size / threads * (t + 1); i += 128)
      for (int j = 0; j < 8; ++j) sum[j] += *reinterpret_cast<const Vector*>(array + i + 16 * j);
    for (Vector& each : sum) for (int k = 0; k < 16; ++k) sums[16 * t] += each[k];
  });
  return sums[0];
}
"""


def measure_peaks(threads: int) -> tuple[float, float]:
    """Multiply-adds and bytes read a second."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peaks.cpp", Path(folder) / "peaks.so"
        source.write_text(PEAKS)
        command = ["g++", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([*command, f"-I{KERNELS}", source, "-o", library], check=True)
        code = ctypes.CDLL(str(library))
    array = torch.zeros(64 << 20)
    start = (-array.data_ptr()) % 64 // 4
    pointer, size = ctypes.c_void_p(array[start:].data_ptr()), ctypes.c_int64(array.numel() - 16)
    count = 3_000_000
    found = in_turns(
        {
            "multiply": lambda: code.multiply_add(ctypes.c_int64(count), threads),
            "read": lambda: code.read(pointer, size, threads),
        }
    )
    return count * 12 * 16 * threads / found["multiply"], array.nbytes / found["read"]


def in_turns(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    slow = set()
    for _ in range(TURNS):
        for name, contender in contenders.items():
            if name in slow:
                continue
            taken = _time(contender)
            if taken > LONGEST:
                slow.add(name)
            seconds[name].append(taken if name in slow else _time(contender))
    return {name: statistics.median(own) for name, own in seconds.items()}


def _time(contender: Callable[[], object]) -> float:
    start = time.perf_counter()
    contender()
    return time.perf_counter() - start


def pruned(rows: int, columns: int, sparsity: float) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    return torch.randn(rows, columns, generator=generator) * kept


def bits_of(weights: Tensor) -> np.ndarray:
    return np.packbits((weights != 0).numpy().ravel(), bitorder="little")


def peers(weights: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    """Everybody else's products with x, as functions."""
    found: dict[str, Callable[[], object]] = {}
    csr = weights.to_sparse_csr()
    found["torch CSR"] = lambda: functional.linear(x, csr)
    if all(side % 16 == 0 for side in weights.shape):
        bsr = weights.to_sparse_bsr((16, 16))
        found["torch BSR"] = lambda: functional.linear(x, bsr)
    try:
        from scipy.sparse import csr_matrix

        ours, across = csr_matrix(weights.numpy()), np.ascontiguousarray(x.numpy().T)
        found["scipy"] = lambda: ours @ across
        from sparse_dot_mkl import dot_product_mkl

        found["MKL"] = lambda: dot_product_mkl(ours, across)
    except ImportError:
        pass
    return {name: product for name, product in found.items() if _works(product)}


def _works(product: Callable[[], object]) -> bool:
    try:
        product()
    except Exception:
        return False
    return True


def products(weights: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    """Ours and the dense one."""
    rows, columns = weights.shape
    layout = lay_out(bits_of(weights), rows, columns)
    value = refill(layout.order, weights[weights != 0])
    found = {
        "panels": lambda: panels_linear(x, layout.layout, value, None, rows),
        "F.linear": lambda: functional.linear(x, weights),
    }
    if x.shape[0] <= FEW:
        held = bitmap_of(bits_of(weights), rows, columns, weights[weights != 0])
        found["bitmap"] = lambda: bitmap_linear(x, held.bits, held.first, held.value, None)
    for own in found.values():
        torch.testing.assert_close(own(), found["F.linear"](), rtol=1e-4, atol=1e-3)
    return found


def gradients(weights: Tensor, x: Tensor) -> dict[str, Callable[[], object]]:
    """Of x and of the weights, of the survivors alone in ours."""
    rows, columns = weights.shape
    own, across = (lay_out(bits_of(weights), rows, columns, transposed=transposed) for transposed in (False, True))
    survivors, dense = weights[weights != 0].requires_grad_(), weights.clone().requires_grad_()
    x, given = x.requires_grad_(), torch.randn(x.shape[0], rows)
    y = survivors_linear(x, survivors, None, own.layout, own.order, across.layout, across.order, rows)
    y_dense = functional.linear(x, dense)
    return {
        "panels": lambda: torch.autograd.grad(y, (x, survivors), given, retain_graph=True),
        "F.linear": lambda: torch.autograd.grad(y_dense, (x, dense), given, retain_graph=True),
    }


def layers(args: argparse.Namespace) -> None:
    """Single layers: forward, or both gradients."""
    names = ["panels"] if args.backward else ["panels", "bitmap"]
    names += ["F.linear"] if args.backward or not args.peers else ["F.linear", "torch CSR", "torch BSR", "scipy", "MKL"]
    for threads in args.threads:
        torch.set_num_threads(threads)
        multiply, read = measure_peaks(threads)
        print(f"\nthreads: {threads}; {multiply / 1e9:.0f} G multiply-adds/s, {read / 1e9:.1f} GB/s; milliseconds")
        head = "".join(f"{name:>10}" for name in names)
        tail = "".join(f"{name:>10}" for name in ("ratio", "best peer", "of peak", "of memory"))
        print(f"{'out x in':>10}{'batch':>6}{'sparse':>7}{head}{tail}")
        for (rows, columns), batch, sparsity in itertools.product(args.shapes, args.batch, args.sparsity):
            weights, x = pruned(rows, columns, sparsity), torch.randn(batch, columns)
            survivors = int((weights != 0).sum())
            passes, each = (2, 9) if args.backward else (1, 5)  # bytes a survivor: its weight, its column, its order
            if args.backward:
                found = in_turns(gradients(weights, x))
            else:
                with torch.no_grad():
                    found = in_turns(products(weights, x) | (peers(weights, x) if args.peers else {}))
            ours = min(found["panels"], found.get("bitmap", math.inf))
            line = "".join(f"{found[name] * 1e3:10.3f}" if name in found else f"{'-':>10}" for name in names)
            best = min(found[name] for name in found if name not in ("panels", "bitmap")) / ours
            work, moved = passes * survivors * batch, passes * (each * survivors + 4 * batch * (rows + columns))
            print(
                f"{f'{rows}x{columns}':>10}{batch:6}{sparsity:7.0%}{line}{found['F.linear'] / ours:10.2f}{best:10.2f}"
                f"{work / ours / multiply:10.0%}{moved / ours / read:10.0%}",
                flush=True,
            )


class MLP(nn.Module):
    """The feed-forward part of a transformer's layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + down


def retraining(network: nn.Module, masks: Masks, x: Tensor) -> dict[str, float]:
    """Seconds of a step: with all pruned layers sparse, and as torch does it, with a momentum for every weight."""
    sparse, dense = network, copy.deepcopy(network)
    survivors = Survivors(sparse, masks, sparse=list(masks))
    layers = SparseTraining(sparse, survivors)
    packed = torch.optim.SGD(survivors.parameters(), lr=1e-6, momentum=0.9)
    whole = torch.optim.SGD(dense.parameters(), lr=1e-6, momentum=0.9)

    def ours() -> None:
        sparse(x).square().mean().backward()
        survivors.pack_gradients()
        packed.step()
        survivors.unpack()

    def torchs() -> None:
        dense(x).square().mean().backward()
        whole.step()
        whole.zero_grad()

    found = in_turns({"ours": ours, "dense": torchs})
    survivors.unpack(everything=True)
    layers.close()
    return found


def model(args: argparse.Namespace) -> None:
    """A network as a whole."""
    print("\n12 MLPs of 768 and 3072, 1 sequence of 128, ms")
    heads = ("inference", "dense", "ratio", "difference", "step", "dense", "ratio")
    print(f"{'threads':>8}{'sparse':>8}" + "".join(f"{name:>11}" for name in heads))
    for threads, sparsity in itertools.product(args.threads, args.sparsity):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        network, x = nn.Sequential(*(MLP(768, 3072) for _ in range(12))).eval(), torch.randn(1, 128, 768)
        masks = hpcprune.prune(network, sparsity, scope="layer")
        step = retraining(network, masks, x)
        infer = partial(network, x)
        with torch.no_grad():
            expected = infer()
            found = sparsify(network, masks, infer)
            difference = float((infer() - expected).abs().max())
        ours, dense = found.sparse_seconds or math.nan, found.dense_seconds or math.nan
        print(
            f"{threads:8}{sparsity:8.0%}{ours * 1e3:11.2f}{dense * 1e3:11.2f}{dense / ours:11.2f}{difference:11.1e}"
            f"{step['ours'] * 1e3:11.2f}{step['dense'] * 1e3:11.2f}{step['dense'] / step['ours']:11.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="products with a pruned matrix, against dense and sparse peers")

    def numbers(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
        return lambda text: [kind(each) for each in text.split(",")]

    def shape(text: str) -> tuple[int, int]:
        rows, _, columns = text.partition("x")
        return int(rows), int(columns)

    parser.add_argument("--shapes", type=numbers(shape), default=SHAPES, help=f"out x in ({SHAPES})")
    parser.add_argument("--batch", type=numbers(int), default="1,8,32,256")
    parser.add_argument("--sparsity", type=numbers(float), default="0.5,0.6,0.8,0.9,0.95,0.99")
    parser.add_argument("--threads", type=numbers(int), default="1,2")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="F.linear alone")
    parser.add_argument("--backward", action="store_true", help="both gradients instead")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: as bench/spmm_cuda.py")
    parser.add_argument("--model", action="store_true", help="12 MLPs instead")
    args = parser.parse_args()
    if args.device == "cuda":
        spmm_cuda.run(args)
        return
    print(f"kernels {describe()}; torch {torch.__version__}")
    (model if args.model else layers)(args)


if __name__ == "__main__":
    main()
