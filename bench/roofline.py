"""What a GPU's data sheet allows the CUDA kernels at most: arithmetic, nothing is measured.

    python bench/roofline.py             # the table of docs/kernels.md

A product takes at least as long as its bytes take to come from memory, its multiply-adds on the units that it uses, and
what it reads of X on the way through the L1 caches. The times of a 4096 x 4096 layer are compared so with those of the
dense one, of the same dtype, by the same counting; X and Y, or dY, are read and written once, and what stays in the L2
cache between a kernel's steps costs nothing. Break-even is the density at which both take as long: below it a kernel
can be faster, if it comes as near to its roof as the dense product does to its own. On an H100 tensor cores reach their
full rate with instructions of its own, which the kernels here do not use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIDE = 4096
BATCHES = 1, 32, 256
SPARSITIES = 0.5, 0.8, 0.9, 0.95, 0.99
FLOAT, HALF, INDEX = 4, 2, 4  # bytes


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


def blocks(density: float, batch: int) -> Work:
    """Blocks of 16, with a column each; tiles are of 16 samples at least."""
    survivors = density * SIDE * SIDE
    return Work(survivors * (HALF + INDEX / 256) + samples(batch, HALF), tensor=survivors * max(16, batch))


def two_of_four(density: float, batch: int) -> Work:
    """Half of the weights, whatever the density, with 2 bits each; tensor cores do those at twice the rate."""
    weights = SIDE * SIDE
    return Work(weights * (HALF / 2 + 1 / 8) + samples(batch, HALF), tensor=weights / 2 * max(8, batch))


def sampled(density: float, batch: int) -> Work:
    """Writes a survivor's gradient, reads its column; dY's row stays in registers, X's is read."""
    survivors = density * SIDE * SIDE
    memory = survivors * (FLOAT + INDEX) + samples(batch, FLOAT)
    return Work(memory, float32=survivors * batch, l1=survivors * batch * FLOAT)


def dense_float(batch: int) -> Work:
    return Work(SIDE * SIDE * FLOAT + samples(batch, FLOAT), float32=SIDE * SIDE * batch)


def dense_half(batch: int) -> Work:
    return Work(SIDE * SIDE * HALF + samples(batch, HALF), tensor=SIDE * SIDE * max(8, batch))


KERNELS = (
    Kernel("CSR, float32", csr(FLOAT, FLOAT), dense_float),
    Kernel("CSR's gradient, float32", sampled, dense_float),
    Kernel("CSR, bfloat16", csr(HALF, HALF), dense_half),
    Kernel("bitmap tiles", bitmap_tiles, dense_half),
    Kernel("blocks of 16", blocks, dense_half),
    Kernel("2:4 (torch's)", two_of_four, dense_half),
)


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
    """In Markdown; A100 / H100 in each cell."""
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


if __name__ == "__main__":
    print(table())
