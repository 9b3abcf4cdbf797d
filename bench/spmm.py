"""How fast products with a pruned matrix are, against torch's dense layer and everybody's sparse ones.

    python bench/spmm.py                 # all shapes, batches, sparsities on 1 and 2 threads: half an hour
    python bench/spmm.py --shapes 4096x4096 --batch 1,32 --sparsity 0.9,0.95 --threads 1
    python bench/spmm.py --pattern 2:4 --no-peers; python bench/spmm.py --pattern blocks
    python bench/spmm.py --backward      # the gradients of a layer: dX and that of the survivors
    python bench/spmm.py --model         # 12 MLPs of a transformer: inference, and a step of retraining
    pip install scipy sparse_dot_mkl mkl # peers; those that are missing are left out

float32; X [batch, in] and Y [batch, out] lie as F.linear has them, for all: scipy and MKL, which want both transposed,
transpose them (of MKL's ways the fastest that was found). All contenders are timed in turns in one process, so that
what else the machine does hits them alike; in each turn the second call counts, which finds its data where the first
left it. Medians are given, and how often ours (the fastest of them) goes into F.linear's time and into that of the
best of all.
"of peak": our multiply-adds with survivors over what the cores can do with numbers in registers. "of memory": the bytes
of our matrix, X and Y over what is read from memory in that time; more than 100 % comes from a cache.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("MKL_THREADING_LAYER", "GNU")  # a peer's MKL shall use the threads that torch has

import numpy as np
import torch
from matrices import SIDE, add_arguments, bits_of, numbers, pruned
from peaks import measure_peaks
from torch import Tensor, nn
from torch.nn import functional
from turns import in_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import spmm_cuda

import hpcprune
from hpcprune.masks import Masks
from hpcprune.native.library import describe
from hpcprune.sparse import sparsify
from hpcprune.sparse.held import LINEAR, Kernel, fit, hold
from hpcprune.sparse.ops import blocks_survivors_linear
from hpcprune.sparse.training import SparseTraining, operator_of
from hpcprune.survivors import Survivors


class Contenders(NamedTuple):
    """For a pattern of survivors: of ours and of the peers those that it is a matter of."""

    kernels: tuple[Kernel, ...]
    peers: tuple[str, ...]


Bytes = dict[Kernel, int]
CONTENDERS = {
    "unstructured": Contenders(("panels", "bitmap"), ("torch CSR", "torch BSR", "scipy", "MKL")),
    "blocks": Contenders(("panels", "blocks"), ("torch BSR",)),
    "2:4": Contenders(("panels", "bitmap", "two_of_four"), ("torch CSR", "scipy", "MKL")),
}


def peers(weights: Tensor, x: Tensor, names: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Everybody else's products with x, as functions."""
    found: dict[str, Callable[[], object]] = {}
    if not names:
        return found
    csr = weights.to_sparse_csr()
    found["torch CSR"] = lambda: functional.linear(x, csr)
    if all(length % SIDE == 0 for length in weights.shape):
        bsr = weights.to_sparse_bsr((SIDE, SIDE))
        found["torch BSR"] = lambda: functional.linear(x, bsr)
    try:
        from scipy.sparse import csr_matrix

        ours, given, line_up = csr_matrix(weights.numpy()), x.numpy(), np.ascontiguousarray
        found["scipy"] = lambda: line_up((ours @ given.T).T)
        from sparse_dot_mkl import dot_product_mkl

        found["MKL"] = lambda: line_up(dot_product_mkl(ours, line_up(given.T)).T)
    except (ImportError, AttributeError):  # sparse_dot_mkl without MKL has no attributes
        pass
    expected = functional.linear(x, weights)
    return {name: product for name, product in found.items() if name in names and _works(product, expected)}


def _works(product: Callable[[], object], expected: Tensor) -> bool:
    try:
        found = product()
    except (RuntimeError, ValueError):  # not every peer takes every shape
        return False
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-3)
    return True


def products(weights: Tensor, x: Tensor, kernels: Sequence[Kernel]) -> tuple[dict[str, Callable[[], object]], Bytes]:
    """Ours and the dense one; and the bytes of the matrix in each of ours."""
    rows, columns = weights.shape
    bits, survivors = bits_of(weights), weights[weights != 0]
    held = {
        kernel: [*hold(kernel, bits, rows, columns, survivors).values()]
        for kernel in fit(bits, rows, columns, x.shape[0])
        if kernel in kernels
    }
    found: dict[str, Callable[[], object]] = {"F.linear": partial(functional.linear, x, weights)}
    found |= {kernel: partial(LINEAR[kernel], x, *matrix, None, rows) for kernel, matrix in held.items()}
    for own in found.values():
        torch.testing.assert_close(own(), found["F.linear"](), rtol=1e-4, atol=1e-3)
    return found, {kernel: sum(tensor.nbytes for tensor in matrix) for kernel, matrix in held.items()}


def gradients(weights: Tensor, x: Tensor) -> tuple[dict[str, Callable[[], object]], Bytes]:
    """Of x and of the weights, of the survivors alone in ours."""
    operator, layouts = operator_of(bits_of(weights), weights)
    kernel: Kernel = "blocks" if operator is blocks_survivors_linear else "panels"
    survivors, dense = weights[weights != 0].requires_grad_(), weights.clone().requires_grad_()
    x, given = x.requires_grad_(), torch.randn(x.shape[0], weights.shape[0])
    y = operator(x, survivors, None, *layouts)
    y_dense = functional.linear(x, dense)
    held = sum(each.nbytes for each in (*layouts, survivors, survivors) if isinstance(each, Tensor))
    return {
        kernel: lambda: torch.autograd.grad(y, (x, survivors), given, retain_graph=True),
        "F.linear": lambda: torch.autograd.grad(y_dense, (x, dense), given, retain_graph=True),
    }, {kernel: held}


def layers(args: argparse.Namespace) -> None:
    """Single layers: forward, or both gradients."""
    pattern, sparsities = CONTENDERS[args.pattern], [0.5] if args.pattern == "2:4" else args.sparsity
    own = ["blocks" if args.pattern == "blocks" else "panels"]
    names = [*own, "F.linear"] if args.backward else [*pattern.kernels, "F.linear", *(pattern.peers * args.peers)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        multiply, read = measure_peaks(threads)
        print(f"\nthreads: {threads}; {multiply / 1e9:.0f} G multiply-adds/s, {read / 1e9:.1f} GB/s; milliseconds")
        head = "".join(f"{name:>12}" for name in names)
        tail = "".join(f"{name:>10}" for name in ("ratio", "best peer", "of peak", "of memory"))
        print(f"{'out x in':>10}{'batch':>6}{'sparse':>7}{head}{tail}")
        for (rows, columns), batch, sparsity in itertools.product(args.shapes, args.batch, sparsities):
            weights, x = pruned(rows, columns, sparsity, args.pattern), torch.randn(batch, columns)
            if args.backward:
                contenders, held = gradients(weights, x)
                found = in_turns(contenders)
            else:
                with torch.no_grad():
                    contenders, held = products(weights, x, pattern.kernels)
                    found = in_turns(contenders | (peers(weights, x, pattern.peers) if args.peers else {}))
            kernel = min(held, key=lambda each: found[each])
            ours = found[kernel]
            line = "".join(f"{found[name] * 1e3:12.3f}" if name in found else f"{'-':>12}" for name in names)
            best = min(seconds for name, seconds in found.items() if name not in held) / ours
            passes = 2 if args.backward else 1
            work = passes * int((weights != 0).sum()) * batch
            moved = held[kernel] + passes * 4 * batch * (rows + columns)
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
    heads = ("inference", "dense", "ratio", "of peak", "difference", "step", "dense", "ratio")
    print(f"{'threads':>8}{'sparse':>8}" + "".join(f"{name:>11}" for name in heads))
    for threads, sparsity in itertools.product(args.threads, args.sparsity):
        torch.set_num_threads(threads)
        multiply, _ = measure_peaks(threads)
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
        work = x[..., 0].numel() * masks.nonzeros
        print(
            f"{threads:8}{sparsity:8.0%}{ours * 1e3:11.2f}{dense * 1e3:11.2f}{dense / ours:11.2f}"
            f"{work / ours / multiply:11.0%}{difference:11.1e}"
            f"{step['ours'] * 1e3:11.2f}{step['dense'] * 1e3:11.2f}{step['dense'] / step['ours']:11.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="products with a pruned matrix, against dense and sparse peers")
    add_arguments(parser)
    parser.add_argument("--pattern", choices=CONTENDERS, default="unstructured", help="blocks are of 16 x 16")
    parser.add_argument("--threads", type=numbers(int), default="1,2")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="F.linear alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: as bench/spmm_cuda.py")
    parser.add_argument("--model", action="store_true", help="12 MLPs instead")
    args = parser.parse_args()
    if args.device == "cuda":
        if args.model or args.pattern != "unstructured":
            parser.error("--device cuda takes neither --model nor --pattern: it has layers alone, of every pattern")
        spmm_cuda.run(args)
        return
    print(f"kernels {describe()}; torch {torch.__version__}")
    (model if args.model else layers)(args)


if __name__ == "__main__":
    main()
