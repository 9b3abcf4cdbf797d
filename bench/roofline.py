"""What a GPU's data sheet allows the CUDA kernels at most: arithmetic, nothing is measured.

    python bench/roofline.py             # the tables of docs/kernels.md

A product takes at least as long as its bytes take to come from memory, its multiply-adds on the units that it uses, and
what it reads of X on the way through the L1 caches. The times of a 4096 x 4096 layer are compared so with those of the
dense one, of the same dtype, by the same counting; X and Y, or dY, are read and written once, and what stays in the L2
cache between a kernel's steps costs nothing. Break-even is the density at which both take as long: below it a kernel
can be faster, if it comes as near to its roof as the dense product does to its own. On an H100 tensor cores reach their
full rate with instructions of its own, which the kernels here do not use.

Passes over a matrix of weights have no dense product to be compared with: they take as long as their bytes do. Memory
comes in sectors of 32 bytes, of which one is read where any of its weights survives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIDE = 4096
BATCHES = 1, 32, 256
SIDES = 16, 32, 64  # of blocks
SPARSITIES = 0.5, 0.8, 0.9, 0.95, 0.99
FLOAT, HALF, INDEX, COUNT, SECTOR = 4, 2, 4, 8, 32  # bytes
TILE = 1024  # weights whose survivors, or ties, are counted


@dataclass(frozen=True)
class Gpu:
    """Of a data sheet: bytes a second, multiply-adds a second in float32 and of bfloat16 on tensor cores."""

    name: str
    memory: float
    float32: float
    tensor: float
    multiprocessors: int
    clock: float

    @property
    def l1(self) -> float:
        """Bytes a second that all L1 caches give: 128 a clock each."""
        return 128 * self.multiprocessors * self.clock


A100 = Gpu("A100 80 GB", 2039e9, 19.5e12 / 2, 312e12 / 2, 108, 1.41e9)
H100 = Gpu("H100 SXM", 3350e9, 67e12 / 2, 989e12 / 2, 132, 1.98e9)


@dataclass(frozen=True)
class Work:
    """What a product has to do at least."""

    memory: float  # bytes
    float32: float = 0  # multiply-adds
    tensor: float = 0
    l1: float = 0  # bytes

    def seconds(self, gpu: Gpu) -> float:
        """At least."""
        return max(self.memory / gpu.memory, self.float32 / gpu.float32, self.tensor / gpu.tensor, self.l1 / gpu.l1)


@dataclass(frozen=True)
class Kernel:
    """A kernel and the dense product in its place: their work by density and batch."""

    name: str
    work: Callable[[float, int], Work]
    dense: Callable[[int], Work]


def samples(batch: int, size: int) -> float:
    """Bytes of X and Y."""
    return 2 * batch * SIDE * size


def csr(weight: int, sample: int) -> Callable[[float, int], Work]:
    """A survivor is its value and its column; rows have a start and a place. Each reads a row of X transposed."""

    def work(density: float, batch: int) -> Work:
        survivors = density * SIDE * SIDE
        memory = survivors * (weight + INDEX) + 2 * SIDE * INDEX + samples(batch, sample)
        return Work(memory, float32=survivors * batch, l1=survivors * batch * sample)

    return work


def bitmap_tiles(density: float, batch: int) -> Work:
    """A bit a weight, 4 bytes a group of 1,024, which is filled up to 16; tiles are dense, 8 samples at least."""
    weights = SIDE * SIDE
    groups = weights / 1024
    memory = weights * (HALF * density + 1 / 8) + groups * (INDEX + 7) + samples(batch, HALF)
    return Work(memory, tensor=weights * max(8, batch))


def blocks(side: int) -> Callable[[float, int], Work]:
    """Blocks have a column each; tiles are of 16 samples at least."""

    def work(density: float, batch: int) -> Work:
        survivors = density * SIDE * SIDE
        memory = survivors * (HALF + INDEX / side**2) + samples(batch, HALF)
        return Work(memory, tensor=survivors * max(16, batch))

    return work


def blocks_sampled(side: int) -> Callable[[float, int], Work]:
    """Writes a block's gradient in float32, reads its row and its column; dY and X come from the L2 cache."""
    depth = 1024 // side  # samples that a warp multiplies at least

    def work(density: float, batch: int) -> Work:
        survivors = density * SIDE * SIDE
        memory = survivors * (FLOAT + 2 * INDEX / side**2) + samples(batch, HALF)
        return Work(memory, tensor=survivors * -(-batch // depth) * depth)

    return work


def two_of_four(density: float, batch: int) -> Work:
    """Half of the weights, whatever the density, with 2 bits each; tensor cores do those at twice the rate."""
    weights = SIDE * SIDE
    return Work(weights * (HALF / 2 + 1 / 8) + samples(batch, HALF), tensor=weights / 2 * max(8, batch))


def sampled(sample: int) -> Callable[[float, int], Work]:
    """Writes a survivor's gradient, reads its column; dY's row stays in registers, X's is read."""

    def work(density: float, batch: int) -> Work:
        survivors = density * SIDE * SIDE
        memory = survivors * (FLOAT + INDEX) + samples(batch, sample)
        return Work(memory, float32=survivors * batch, l1=survivors * batch * sample)

    return work


def dense_float(batch: int) -> Work:
    return Work(SIDE * SIDE * FLOAT + samples(batch, FLOAT), float32=SIDE * SIDE * batch)


def dense_half(batch: int) -> Work:
    return Work(SIDE * SIDE * HALF + samples(batch, HALF), tensor=SIDE * SIDE * max(8, batch))


KERNELS = (
    Kernel("CSR, float32", csr(FLOAT, FLOAT), dense_float),
    Kernel("CSR's gradient, float32", sampled(FLOAT), dense_float),
    Kernel("CSR, bfloat16", csr(HALF, HALF), dense_half),
    Kernel("CSR's gradient, bfloat16", sampled(HALF), dense_half),
    Kernel("bitmap tiles", bitmap_tiles, dense_half),
    *(Kernel(f"blocks of {side}", blocks(side), dense_half) for side in SIDES),
    *(Kernel(f"gradient of blocks of {side}", blocks_sampled(side), dense_half) for side in SIDES),
    Kernel("2:4 (torch's)", two_of_four, dense_half),
)


def touched(density: float) -> float:
    """The share of sectors in which any of eight weights survives."""
    return 1 - (1 - density) ** (SECTOR // FLOAT)


def gather(density: float) -> float:
    """A bit a weight, the count of survivors before each tile, the sectors that hold any, and the survivors."""
    return 1 / 8 + COUNT / TILE + FLOAT * (touched(density) + density)


def by_indices(density: float) -> float:
    """torch's index_select and index_copy_: an index of 64 bits for each survivor in the mask's place."""
    return density * 8 + FLOAT * (touched(density) + density)


def scatter(density: float) -> float:
    """As `gather`, but every weight is written."""
    return 1 / 8 + COUNT / TILE + FLOAT * (1 + density)


def count(density: float) -> float:
    """Each score is read; of keys inside a bracket there are few."""
    return FLOAT


def pack(density: float) -> float:
    """Each score is read, a bit of it written, and how many of a tile's ties go is written and read."""
    return FLOAT + 1 / 8 + 2 * COUNT / TILE


def pack_ties(density: float) -> float:
    """As `pack`; before, each score is read once more, and tiles' ties are written and read."""
    return pack(density) + FLOAT + 2 * COUNT / TILE


# Passes over float32 weights, or their scores, by the bytes of a weight at a density.
PASSES = {
    "gradients gathered, weights updated": gather,
    "the same by indices": by_indices,
    "survivors scattered among zeros": scatter,
    "scores counted around a bracket, or in bins": count,
    "masks packed": pack,
    "masks packed, some ties cut": pack_ties,
}


def speedup(kernel: Kernel, gpu: Gpu, density: float, batch: int) -> float:
    """The dense product's least time over the kernel's."""
    return kernel.dense(batch).seconds(gpu) / kernel.work(density, batch).seconds(gpu)


def break_even(kernel: Kernel, gpu: Gpu, batch: int) -> float:
    """The density below which the kernel's roof is the higher one; 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if speedup(kernel, gpu, middle, batch) > 1:
            low = middle
        else:
            high = middle
    return low


def table() -> str:
    """Of products, in Markdown; A100 / H100 in each cell."""
    gpus = A100, H100
    head = " | ".join(f"{sparsity:.0%}" for sparsity in SPARSITIES).replace("%", " %")
    lines = [f"| kernel | batch | dense, us | {head} | break-even density |", "|---" * 9 + "|"]
    for kernel in KERNELS:
        for batch in BATCHES:
            cells = [" / ".join(f"{kernel.dense(batch).seconds(gpu) * 1e6:.1f}" for gpu in gpus)]
            for sparsity in SPARSITIES:
                possible = kernel.work is not two_of_four or sparsity == 0.5
                found = " / ".join(f"{speedup(kernel, gpu, 1 - sparsity, batch):.1f}" for gpu in gpus)
                cells.append(found if possible else "")
            even = " / ".join(f"{break_even(kernel, gpu, batch):.0%}".replace("%", " %") for gpu in gpus)
            cells.append(even if kernel.work is not two_of_four else "")
            lines.append(f"| {kernel.name} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def passes() -> str:
    """In Markdown: microseconds at least, A100 / H100 in each cell."""
    head = " | ".join(f"{sparsity:.0%}" for sparsity in SPARSITIES).replace("%", " %")
    lines = [f"| pass | {head} |", "|---" * (1 + len(SPARSITIES)) + "|"]
    for name, bytes_of_weight in PASSES.items():
        cells = []
        for sparsity in SPARSITIES:
            work = Work(SIDE * SIDE * bytes_of_weight(1 - sparsity))
            cells.append(" / ".join(f"{work.seconds(gpu) * 1e6:.1f}" for gpu in (A100, H100)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), passes(), sep="\n\n")
