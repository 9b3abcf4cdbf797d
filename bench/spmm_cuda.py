"""How fast products with a pruned matrix are on a GPU, against cuBLAS, cuSPARSE and torch's semi-structured tensors.

    python bench/spmm_cuda.py            # or: python bench/spmm.py --device cuda
    python bench/spmm_cuda.py --shapes 4096x4096 --batch 1,32 --sparsity 0.9,0.95
    python bench/spmm_cuda.py --backward # the gradients of a layer: dX and that of the survivors

X [batch, in] and Y [batch, out] lie as F.linear has them; cuSPARSE is given X transposed beforehand and gives Y
transposed. Weights are pruned at random; for bsr in blocks of 16, and for 2:4, at 50 % alone, two of four. Contenders
run in turns, each call between two CUDA events, after a write of more than the L2 cache holds, so that weights come
from memory; who cannot is left out. Medians are given, in microseconds, and how often the fastest of ours goes into
F.linear's time and into that of the best peer. "of memory": the bytes of our matrix, X and Y over what a copy moves in
that time.

This was never run on a GPU: it says so and ends where there is none.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matrices import PATTERNS, add_arguments, bits_of, pruned
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcprune.native.cuda import describe
from hpcprune.sparse import bsr, csr
from hpcprune.sparse.cuda_linear import CudaLinear, kernels_to_try
from hpcprune.sparse.cuda_ops import bsr_survivors_linear, csr_survivors_linear
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.operands import need_kernels
from hpcprune.sparse.patterns import side_of_blocks

TURNS = 100  # of each contender
FLUSHED = 256 << 20  # bytes, more than any L2 cache
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICE = "cuda"
Contenders = dict[str, Callable[[], object]]


def in_turns(contenders: Contenders) -> dict[str, float]:
    """The median seconds of each."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)
    for turn in range(TURNS + 1):
        for name, contender in contenders.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contender()
            end.record()
            end.synchronize()
            if turn:  # the first one warms up
                found[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    array, other = (torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * FLUSHED / in_turns({"copy": lambda: other.copy_(array)})["copy"]


def products(weights: Tensor, x: Tensor) -> tuple[Contenders, Contenders, dict[str, int]]:
    """Ours, the others', and how many bytes each of ours holds."""
    rows, columns = weights.shape
    bits = bits_of(weights)
    dense = nn.Linear(columns, rows, bias=False, dtype=weights.dtype, device=DEVICE).requires_grad_(False)
    dense.weight.copy_(weights)
    made = {kernel: CudaLinear(dense, bits, kernel) for kernel in kernels_to_try(weights, bits, {x.dtype}, x.shape[0])}
    across, sparse = x.t().contiguous(), weights.to_sparse_csr()
    others: Contenders = {"F.linear": lambda: functional.linear(x, weights), "cuSPARSE": lambda: sparse @ across}
    if "2:4" in made:
        semi = made.pop("2:4")
        others["2:4"] = lambda: semi(x)
    ours: Contenders = {kernel: lambda layer=layer: layer(x) for kernel, layer in made.items()}
    try:
        others["cuSPARSE"]()
    except (RuntimeError, NotImplementedError):
        del others["cuSPARSE"]
    tolerance = 1e-3 if weights.dtype == torch.float32 else 5e-2
    for product in ours.values():
        torch.testing.assert_close(product(), others["F.linear"](), rtol=tolerance, atol=tolerance * columns**0.5)
    held = {kernel: sum(buffer.nbytes for buffer in layer.buffers()) for kernel, layer in made.items()}
    return ours, others, held


def gradients(weights: Tensor, x: Tensor) -> tuple[Contenders, Contenders, dict[str, int]]:
    """Of x and of the weights, of the survivors alone in ours."""
    rows, columns = weights.shape
    bits = bits_of(weights)
    x, given = x.requires_grad_(), torch.randn(x.shape[0], rows, device=DEVICE, dtype=x.dtype)
    survivors, dense = weights[weights != 0].requires_grad_(), weights.clone().requires_grad_()
    own, across = (csr.lay_out(bits, rows, columns, weights.device, transposed=way) for way in (False, True))
    there = own.start, own.column, own.row_order, across.start, across.column, across.row_order, across.order
    outputs = {"csr": (csr_survivors_linear(x, survivors, None, *there), survivors)}
    side = side_of_blocks(bits, rows, columns)
    if side is not None and x.dtype == torch.bfloat16:
        held, back = (bsr.lay_out(bits, rows, columns, side, weights.device, transposed=way) for way in (False, True))
        there = held.start, held.row, held.column, held.order, back.start, back.column, back.order
        outputs["bsr"] = (bsr_survivors_linear(x, survivors, None, *there, rows, columns), survivors)
    outputs["F.linear"] = (functional.linear(x, dense), dense)

    def contender(y: Tensor, weight: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, (x, weight), given, retain_graph=True)

    found = {name: contender(*output) for name, output in outputs.items()}
    return found, {"F.linear": found.pop("F.linear")}, {}


def run(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit(f"no GPU: torch {torch.__version__} sees none; these figures need one (bench/spmm.py has the CPU's)")
    try:
        need_kernels(torch.device("cuda", torch.cuda.current_device()))
    except SparseError as why:
        sys.exit(str(why))
    figures(args)


def figures(args: argparse.Namespace) -> None:
    read = bandwidth()
    print(f"{torch.cuda.get_device_name()}; {read / 1e9:.0f} GB/s; kernels {describe()}; torch {torch.__version__}")
    names = ("csr", "bitmap_tiles", "bsr", "F.linear", "cuSPARSE", "2:4")
    head = "".join(f"{name:>13}" for name in (*names, "ratio", "best peer", "of memory"))
    print(f"{'dtype':>9}{'mask':>13}{'out x in':>10}{'batch':>6}{'sparse':>7}{head}")
    for dtype, pattern, (rows, columns), batch, sparsity in itertools.product(
        DTYPES, PATTERNS, args.shapes, args.batch, args.sparsity
    ):
        if pattern == "2:4" and sparsity != 0.5:
            continue
        weights = pruned(rows, columns, sparsity, pattern).to(DEVICE, DTYPES[dtype])
        x = torch.randn(batch, columns, device=DEVICE).to(DTYPES[dtype])
        ours, others, held = (gradients if args.backward else products)(weights, x)
        seconds = in_turns({**ours, **others})
        best = min(ours, key=lambda name: seconds[name])
        cells = [f"{seconds[name] * 1e6:13.1f}" if name in seconds else f"{'':13}" for name in names]
        cells.append(f"{seconds['F.linear'] / seconds[best]:13.2f}")
        cells.append(f"{min(seconds[name] for name in others) / seconds[best]:13.2f}")
        if best in held:
            moved = held[best] + x.nbytes + batch * rows * x.element_size()
            cells.append(f"{moved / read / seconds[best]:13.0%}")
        print(f"{dtype:>9}{pattern:>13}{f'{rows}x{columns}':>10}{batch:6}{sparsity:7.0%}{''.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="products with a pruned matrix on a GPU, against dense and sparse peers"
    )
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
