"""The tensor core kernels, compiled for the CPU by the emulator, against numpy in float64.

Operands are bfloat16, so their products are exact in float32, and only the sums and the result's rounding to bfloat16
may differ: bounds follow from that.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
BATCHES = [1, 7, 8, 9, 33]
SEEDS = ["", "1", "2"]  # without one, threads run in order
Floats = npt.NDArray[np.float32]
Half = npt.NDArray[np.uint16]

pytestmark = pytest.mark.filterwarnings("error")


def half(values: npt.ArrayLike) -> Half:
    """To bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(values: Half) -> npt.NDArray[np.float64]:
    return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def normal(*shape: int, seed: int = 0) -> Half:
    return half(np.random.default_rng([seed, *shape]).standard_normal(shape))


def spoiled(*shape: int) -> Half:
    """What a kernel must overwrite: NaN."""
    return np.full(shape, 0x7FFF, np.uint16)


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def aligned(array: np.ndarray, off: int = 0) -> np.ndarray:
    """A copy that begins `off` bytes after a multiple of 16, as device memory begins at one, and ends where it ends."""
    memory = np.zeros(off + array.nbytes, np.uint8)
    assert memory.ctypes.data % 16 == 0
    copy = memory[off:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@lru_cache
def emulated(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    target = folder / (source.replace("/", "-") + ".so")
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread", *flags, "-I", str(KERNELS)]
    cuda = ["-DCUDA_ON_CPU", "-x", "c++"] if source.endswith(".cu") else []
    subprocess.run([*command, *cuda, str(KERNELS / source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order in which the emulator runs threads and blocks."""
    if request.param:
        monkeypatch.setenv("CUEMU_SEED", request.param)
    else:
        monkeypatch.delenv("CUEMU_SEED", raising=False)
    return str(request.param)


def assert_close(result: Half | Floats, exact: np.ndarray, terms: np.ndarray, count: int) -> None:
    """terms: the sum of the terms' absolute values; count: how many they are, at most."""
    slack = (count + 1) * 2.0**-24 * terms
    if result.dtype == np.uint16:
        result, slack = wide(result), slack + 2.0**-8 * (abs(exact) + slack)
    assert not np.isnan(result).any(), "not everything was written"
    worst = (abs(result - exact) - slack).max(initial=-1)
    assert worst <= 0, f"{worst:g} beyond the bound at {np.argwhere(abs(result - exact) > slack)[:5].tolist()}"


def check_product(y: Half, x: Half, weights: Half, bias: Floats | None) -> None:
    added = np.zeros(len(weights)) if bias is None else bias.astype(np.float64)
    exact = wide(x) @ wide(weights).T + added
    terms = abs(wide(x)) @ abs(wide(weights)).T + abs(added)
    assert_close(y, exact, terms, weights.shape[1] + 1)


# ---- the bitmap


@dataclass(frozen=True)
class Tiles:
    start: npt.NDArray[np.int32]
    groups: npt.NDArray[np.uint8]
    largest: int


def kept(rows: int, columns: int, law: str) -> npt.NDArray[np.bool_]:
    random = np.random.default_rng([rows, columns])
    mask = random.random((rows, columns)) < {"half": 0.5, "fifth": 0.2, "all": 1.0}.get(law, 0.0)
    if law == "one row":
        mask[rows // 2] = True
    if law == "one column":
        mask[:, columns // 2] = True
    if law == "one":
        mask[-1, -1] = True
    return mask


def tiles_of(code: ctypes.CDLL, weights: Half, mask: npt.NDArray[np.bool_]) -> Tiles:
    rows, columns = weights.shape
    bits, packed = np.packbits(mask.ravel(), bitorder="little"), np.ascontiguousarray(weights[mask])
    start = np.full(-(-rows // 16) * -(-columns // 64) + 1, -1, np.int32)
    largest = ctypes.c_int32(-1)
    code.hpcprune_bitmap_tiles_plan.restype = ctypes.c_int64
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    code.hpcprune_bitmap_tiles_plan.argtypes = [pointer, long, long, pointer, pointer]
    code.hpcprune_bitmap_tiles_fill.argtypes = [pointer, long, long, pointer, pointer, pointer, ctypes.c_int]
    units = code.hpcprune_bitmap_tiles_plan(address(bits), rows, columns, address(start), ctypes.byref(largest))
    assert units == start[-1] and (np.diff(start) >= 0).all() and np.diff(start).max(initial=0) == largest.value
    groups = aligned(np.full(16 * units, 0xFF, np.uint8))
    code.hpcprune_bitmap_tiles_fill(address(bits), rows, columns, address(start), address(packed), address(groups), 3)
    return Tiles(start, groups, largest.value)


def bitmap_product(code: ctypes.CDLL, tiles: Tiles, shape: tuple[int, int], x: Half, bias: Floats | None) -> Half:
    y = spoiled(len(x), shape[0])
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    code.hpcprune_cuda_bitmap.argtypes = [long, long, pointer, pointer, ctypes.c_int32, pointer, long] + [pointer] * 3
    arguments = (
        address(tiles.start),
        address(tiles.groups),
        tiles.largest,
        address(x),
        len(x),
        address(bias),
        address(y),
    )
    assert code.hpcprune_cuda_bitmap(*shape, *arguments, None) == 0
    return y


@pytest.mark.parametrize("law", ["half", "fifth", "all", "none", "one row", "one column", "one"])
@pytest.mark.parametrize("rows,columns", [(1, 1), (17, 70), (33, 520), (48, 128), (16, 1100)])
def test_bitmap(folder: Path, rows: int, columns: int, law: str) -> None:
    kernel, layout = emulated("spmm/bitmap.cu", folder), emulated("spmm/bitmap_tiles.cpp", folder)
    mask = kept(rows, columns, law)
    weights = np.where(mask, normal(rows, columns), 0).astype(np.uint16)
    tiles = tiles_of(layout, weights, mask)
    bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
    for batch in BATCHES if law == "half" else [9]:
        x = aligned(normal(batch, columns, seed=1))
        check_product(bitmap_product(kernel, tiles, weights.shape, x, bias), x, weights, bias)


@pytest.mark.parametrize("batch", [1, 16, 70])
def test_bitmap_in_any_order(folder: Path, batch: int, seed: str) -> None:
    kernel, layout = emulated("spmm/bitmap.cu", folder), emulated("spmm/bitmap_tiles.cpp", folder)
    mask = kept(40, 1300, "half")
    mask[:, 64:128] = mask[16:32] = False  # groups without a survivor
    weights = np.where(mask, normal(40, 1300), 0).astype(np.uint16)
    tiles = tiles_of(layout, weights, mask)
    for off in (0, 2):
        x = aligned(normal(batch, 1300, seed=1), off)
        check_product(bitmap_product(kernel, tiles, (40, 1300), x, None), x, weights, None)


@pytest.mark.parametrize("rows,batch", [(16 * 255, 32), (16 * 509, 64)])
def test_bitmap_strips_together(folder: Path, rows: int, batch: int) -> None:
    """Enough rows that two strips share a tile of X, and the last block has one too few."""
    kernel, layout = emulated("spmm/bitmap.cu", folder), emulated("spmm/bitmap_tiles.cpp", folder)
    mask = kept(rows, 72, "half")
    weights = np.where(mask, normal(rows, 72), 0).astype(np.uint16)
    x = aligned(normal(batch, 72, seed=1))
    check_product(bitmap_product(kernel, tiles_of(layout, weights, mask), weights.shape, x, None), x, weights, None)


def test_bitmap_tiles_keep_the_bytes_they_should(folder: Path) -> None:
    mask = kept(64, 256, "half")
    tiles = tiles_of(emulated("spmm/bitmap_tiles.cpp", folder), normal(64, 256), mask)
    counts = mask.reshape(4, 16, 4, 64).sum((1, 3)).ravel()
    assert np.diff(tiles.start).tolist() == (8 + -(-counts // 8)).tolist()


def test_no_rows_no_columns_no_samples(folder: Path) -> None:
    kernel, layout = emulated("spmm/bitmap.cu", folder), emulated("spmm/bitmap_tiles.cpp", folder)
    bias = np.arange(20, dtype=np.float32)
    for rows, columns, batch in [(0, 8, 3), (20, 0, 3), (20, 8, 0)]:
        weights, x = normal(rows, columns), aligned(normal(batch, columns))
        tiles = tiles_of(layout, weights, np.ones((rows, columns), bool))
        check_product(bitmap_product(kernel, tiles, weights.shape, x, bias[:rows]), x, weights, bias[:rows])


# ---- blocks


@dataclass(frozen=True)
class Blocks:
    side: int
    shape: tuple[int, int]
    start: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    column: npt.NDArray[np.int32]
    value: Half

    @property
    def dense(self) -> Half:
        side, (rows, columns) = self.side, self.shape
        result = np.zeros((-(-rows // side) * side, -(-columns // side) * side), np.uint16)
        for row, column, value in zip(self.row, self.column, self.value, strict=True):
            result[row * side : (row + 1) * side, column * side : (column + 1) * side] = value
        return result[:rows, :columns]

    @property
    def transposed(self) -> Blocks:
        order = np.lexsort((self.row, self.column))
        count = np.bincount(self.column, minlength=-(-self.shape[1] // self.side))
        start = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        value = aligned(self.value[order].transpose(0, 2, 1))
        return Blocks(self.side, self.shape[::-1], start, self.column[order], self.row[order], value)


def blocks_of(side: int, rows: int, columns: int, law: str, off: int = 0) -> Blocks:
    shape = -(-rows // side), -(-columns // side)
    mask = kept(*shape, law)
    row, column = (index.astype(np.int32) for index in np.nonzero(mask))
    start = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    value = normal(len(row), side, side, seed=2)
    for block, r, c in zip(value, row, column, strict=True):
        block[max(0, rows - r * side) :] = block[:, max(0, columns - c * side) :] = 0
    return Blocks(side, (rows, columns), start, row, column, aligned(value, off))


def block_product(code: ctypes.CDLL, w: Blocks, x: Half, bias: Floats | None) -> Half:
    y = aligned(spoiled(len(x), w.shape[0]))
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    code.hpcprune_cuda_block_spmm.argtypes = [ctypes.c_int, long, long] + [pointer] * 4 + [long] + [pointer] * 3
    arrays = address(w.start), address(w.column), address(w.value), address(x), len(x), address(bias), address(y), None
    assert code.hpcprune_cuda_block_spmm(w.side, *w.shape, *arrays) == 0
    return y


def block_gradient(code: ctypes.CDLL, w: Blocks, x: Half, dy: Half, off: int = 0) -> Floats:
    gradient = aligned(np.full(w.value.shape, np.nan, np.float32), off)
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    code.hpcprune_cuda_block_sddmm.argtypes = (
        [ctypes.c_int, long, long, pointer, pointer, long]
        + [pointer] * 2
        + [
            long,
            pointer,
            pointer,
        ]
    )
    arrays = address(w.row), address(w.column), len(w.row), address(x), address(dy), len(x), address(gradient), None
    assert code.hpcprune_cuda_block_sddmm(w.side, *w.shape, *arrays) == 0
    return gradient


def check_gradient(gradient: Floats, w: Blocks, x: Half, dy: Half) -> None:
    def blocks(matrix: np.ndarray) -> np.ndarray:
        side = w.side
        padded = np.zeros((-(-w.shape[0] // side) * side, -(-w.shape[1] // side) * side))
        padded[: w.shape[0], : w.shape[1]] = matrix
        cut = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side)
        return cut.transpose(0, 2, 1, 3)[w.row, w.column]

    exact, terms = wide(dy).T @ wide(x), abs(wide(dy)).T @ abs(wide(x))
    assert_close(gradient, blocks(exact), blocks(terms), len(x))


@pytest.mark.parametrize("law", ["half", "all", "none", "one row", "one column", "one"])
@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("blocks", [(1, 1), (3, 6), (2, 9)])
def test_blocks(folder: Path, side: int, blocks: tuple[int, int], law: str) -> None:
    product, gradient = emulated("blocks/spmm.cu", folder), emulated("blocks/sddmm.cu", folder)
    for less in (0, 5):  # the last blocks stand out beyond W's edges
        rows, columns = blocks[0] * side - less, blocks[1] * side - less
        w = blocks_of(side, rows, columns, law)
        bias = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
        for batch in BATCHES if law == "half" and blocks[0] == 3 else [9]:
            x, dy = aligned(normal(batch, columns, seed=1)), aligned(normal(batch, rows, seed=3))
            check_product(block_product(product, w, x, bias), x, w.dense, bias)
            check_product(block_product(product, w.transposed, dy, None), dy, np.ascontiguousarray(w.dense.T), None)
            check_gradient(block_gradient(gradient, w, x, dy), w, x, dy)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("batch", [1, 150])
def test_blocks_in_any_order(folder: Path, side: int, batch: int, seed: str) -> None:
    product, gradient = emulated("blocks/spmm.cu", folder), emulated("blocks/sddmm.cu", folder)
    for off in (0, 2):  # bytes: operands that no vector may load
        w = blocks_of(side, 2 * side, 9 * side, "half", off)
        x, dy = aligned(normal(batch, 9 * side, seed=1), off), aligned(normal(batch, 2 * side, seed=3), off)
        check_product(block_product(product, w, x, None), x, w.dense, None)
        check_gradient(block_gradient(gradient, w, x, dy, 2 * off), w, x, dy)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_wide_tiles_of_samples(folder: Path, side: int) -> None:
    """Enough block rows that a thread block takes 64 samples, or 128."""
    product = emulated("blocks/spmm.cu", folder)
    w = blocks_of(side, 64 * side, side, "all")
    for batch in (64, 130):
        x = aligned(normal(batch, side, seed=1))
        check_product(block_product(product, w, x, None), x, w.dense, None)


def test_blocks_of_nothing(folder: Path) -> None:
    product, gradient = emulated("blocks/spmm.cu", folder), emulated("blocks/sddmm.cu", folder)
    bias = np.arange(20, dtype=np.float32)
    for rows, columns, batch in [(0, 8, 3), (20, 0, 3), (20, 8, 0)]:
        w = blocks_of(16, rows, columns, "all")
        x, dy = aligned(normal(batch, columns)), aligned(normal(batch, rows))
        check_product(block_product(product, w, x, bias[:rows]), x, w.dense, bias[:rows])
        check_gradient(block_gradient(gradient, w, x, dy), w, x, dy)
    assert product.hpcprune_cuda_block_spmm(8, 1, 1, *[None] * 4, 1, *[None] * 3) == 1
    assert gradient.hpcprune_cuda_block_sddmm(8, 1, 1, None, None, 1, None, None, 1, None, None) == 1


# ---- bounds


def within_bounds(folder: Path, *flags: str) -> None:
    """A little of everything, with shapes whose ends are no multiple of anything."""
    layout, bitmap = emulated("spmm/bitmap_tiles.cpp", folder, *flags), emulated("spmm/bitmap.cu", folder, *flags)
    product, gradient = emulated("blocks/spmm.cu", folder, *flags), emulated("blocks/sddmm.cu", folder, *flags)
    for rows, columns, batch in [(17, 203, 3), (40, 136, 35)]:
        mask = kept(rows, columns, "half")
        weights = np.where(mask, normal(rows, columns), 0).astype(np.uint16)
        x, dy, bias = aligned(normal(batch, columns)), aligned(normal(batch, rows)), np.ones(rows, np.float32)
        y = bitmap_product(bitmap, tiles_of(layout, weights, mask), weights.shape, x, bias)
        check_product(y, x, weights, bias)
        for side in (16, 32, 64):
            w = blocks_of(side, rows, columns, "half")
            check_product(block_product(product, w, x, bias), x, w.dense, bias)
            check_gradient(block_gradient(gradient, w, x, dy), w, x, dy)


def test_nothing_beyond_the_ends(tmp_path: Path) -> None:
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    code = f"from pathlib import Path; from {__name__} import within_bounds as run; "
    code += f"run(Path({str(tmp_path)!r}), '-g', '-O0', '-fsanitize=address'); print('done')"
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "done", run.stderr[-3000:]
