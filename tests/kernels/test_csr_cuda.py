"""Products with a pruned matrix in CSR: the CUDA sources, emulated on the CPU, against numpy in float64."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SHAPES = [(1, 1), (3, 5), (37, 64), (50, 70), (9, 300)]
BATCHES = [*range(1, 10), 31, 32, 33, 128, 130]
SPARSITIES = [0.0, 0.5, 0.9, 0.99, 1.0]
# Names of a float's type in memory, and its number in `kind`, as weights and as samples.
WEIGHTS, SAMPLES = {"float32": 0, "bfloat16": 1}, {"float32": 0, "bfloat16": 2}
DTYPES = list(WEIGHTS)

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]


def compiled(operation: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """The source of an operation, by the emulator; all that the compiler has to say about it is an error."""
    target = folder / f"{operation}.so"
    command = ["g++", "-O2", "-std=c++17", "-DCUDA_ON_CPU", "-x", "c++", "-shared", "-fPIC", f"-I{KERNELS}", *flags]
    subprocess.run([*command, str(KERNELS / operation / "csr.cu"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    getattr(library, f"hpcprune_cuda_{operation}_csr_scratch").restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def spmm(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("spmm", tmp_path_factory.mktemp("spmm"))


@pytest.fixture(scope="module")
def sddmm(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("sddmm", tmp_path_factory.mktemp("sddmm"))


@pytest.fixture(params=["", "1", "2"], ids=["in order", "seed 1", "seed 2"])
def order_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUEMU_SEED", raising=False)
    if request.param:
        monkeypatch.setenv("CUEMU_SEED", request.param)


def stored(values: Floats, dtype: str) -> Array:
    """As kernels have them in memory: bfloat16 in uint16, to the nearest, ties to even."""
    single = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(values: Array) -> Floats:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def random(*shape: int, dtype: str = "float32") -> Array:
    return stored(np.random.default_rng(shape).standard_normal(shape), dtype)


def mask(rows: int, columns: int, sparsity: float) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(7).random((rows, columns)) >= sparsity


def csr(kept: npt.NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Where rows start, columns, and the rows by their lengths, longest first."""
    lengths = kept.sum(1)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return start, np.nonzero(kept)[1].astype(np.int32), np.argsort(-lengths, kind="stable").astype(np.int32)


def scratch_for(library: ctypes.CDLL, operation: str, kind: int, rows: int, columns: int, batch: int) -> Array:
    """Scratch that holds NaN, so that what is read before it is written shows."""
    sizes = [ctypes.c_int64(size) for size in (rows, columns, batch)]
    return np.full(getattr(library, f"hpcprune_cuda_{operation}_csr_scratch")(kind, *sizes), 0xFF, np.uint8)


def address(array: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def product(
    library: ctypes.CDLL, kept: npt.NDArray[np.bool_], value: Array, x: Array, bias: Array | None = None
) -> Floats:
    (rows, columns), batch = kept.shape, len(x)
    kind = 1 * (value.dtype == np.uint16) + 2 * (x.dtype == np.uint16)
    start, column, order = csr(kept)
    y = np.full((batch, rows), 0xFFFF if kind & 2 else np.nan, x.dtype)
    scratch = scratch_for(library, "spmm", kind, rows, columns, batch)
    assert (scratch.size > 0) == (batch > 4 and rows + columns > 0)
    error = library.hpcprune_cuda_spmm_csr(
        kind, ctypes.c_int64(rows), ctypes.c_int64(columns), address(start), address(column), address(value),
        address(order), address(x), ctypes.c_int64(batch), address(bias), address(y), address(scratch), None,
    )  # fmt: skip
    assert error == 0
    return wide(y)


def sampled(library: ctypes.CDLL, kept: npt.NDArray[np.bool_], dy: Array, x: Array) -> Floats:
    (rows, columns), batch, survivors = kept.shape, len(x), int(kept.sum())
    kind = 2 * (x.dtype == np.uint16)
    start, column, _ = csr(kept)
    gradient = np.full(survivors, np.nan, np.float32)
    scratch = scratch_for(library, "sddmm", kind, rows, columns, batch)
    error = library.hpcprune_cuda_sddmm_csr(
        kind, *(ctypes.c_int64(size) for size in (rows, columns, survivors)), address(start), address(column),
        address(dy), address(x), ctypes.c_int64(batch), address(gradient), address(scratch), None,
    )  # fmt: skip
    assert error == 0
    return gradient.astype(np.float64)


def check_product(
    library: ctypes.CDLL, kept: npt.NDArray[np.bool_], value: Array, x: Array, bias: Array | None = None
) -> None:
    weights = np.zeros(kept.shape)
    weights[kept] = wide(value)
    exact, terms = wide(x) @ weights.T, abs(wide(x)) @ abs(weights.T)
    if bias is not None:
        exact, terms = exact + wide(bias), terms + abs(wide(bias))
    # A float32 sum of n terms in any order, and the rounding of what is stored.
    bound = terms * (kept.sum(1) + 1) * 2.0**-24 * 1.01
    if x.dtype == np.uint16:
        bound = bound + (abs(exact) + bound) * 2.0**-8
    assert (abs(product(library, kept, value, x, bias) - exact) <= bound).all()


def check_sampled(library: ctypes.CDLL, kept: npt.NDArray[np.bool_], dy: Array, x: Array) -> None:
    exact, terms = wide(dy).T @ wide(x), abs(wide(dy)).T @ abs(wide(x))
    bound = terms * (len(x) + 1) * 2.0**-24 * 1.01
    assert (abs(sampled(library, kept, dy, x) - exact[kept]) <= bound[kept]).all()


@pytest.mark.parametrize("of_samples", DTYPES)
@pytest.mark.parametrize("of_weights", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_products_are_right(spmm: ctypes.CDLL, sparsity: float, of_weights: str, of_samples: str) -> None:
    for rows, columns in SHAPES:
        kept = mask(rows, columns, sparsity)
        value, bias = random(int(kept.sum()), dtype=of_weights), random(rows)
        for batch in BATCHES:
            check_product(spmm, kept, value, random(batch, columns, dtype=of_samples), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_gradients_are_right(sddmm: ctypes.CDLL, sparsity: float, dtype: str) -> None:
    for rows, columns in SHAPES:
        kept = mask(rows, columns, sparsity)
        for batch in BATCHES:
            check_sampled(sddmm, kept, random(batch, rows, dtype=dtype), random(batch, columns, dtype=dtype))


def uneven(law: str) -> npt.NDArray[np.bool_]:
    kept = np.zeros((45, 333), bool)
    if law == "one row holds everything":
        kept[17] = True
    if law == "one column holds everything":
        kept[:, 200] = True
    if law == "rows far apart":
        kept[[0, 1, 30, 44], ::3] = True
    if law == "every length":
        kept |= np.arange(333) < 3 * np.arange(45)[:, None]
    return kept


LAWS = ["one row holds everything", "one column holds everything", "rows far apart", "every length"]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uneven_rows(spmm: ctypes.CDLL, sddmm: ctypes.CDLL, dtype: str, law: str, order_of_threads: None) -> None:
    for kept in (uneven(law), np.ascontiguousarray(uneven(law).T)):
        rows, columns = kept.shape
        value = random(int(kept.sum()), dtype=dtype)
        for batch in (1, 4, 6, 17, 70):
            x, dy = random(batch, columns, dtype=dtype), random(batch, rows, dtype=dtype)
            check_product(spmm, kept, value, x, random(rows))
            check_sampled(sddmm, kept, dy, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_samples_than_are_transposed_at_once(spmm: ctypes.CDLL, sddmm: ctypes.CDLL, dtype: str) -> None:
    kept = mask(5, 8, 0.5)
    x, dy = random(2100, 8, dtype=dtype), random(2100, 5, dtype=dtype)
    check_product(spmm, kept, random(int(kept.sum())), x)
    check_sampled(sddmm, kept, dy, x)
    sizes = [scratch_for(spmm, "spmm", 0, 5, 8, batch).size for batch in (1024, 2100)]
    assert sizes[0] == sizes[1], "scratch does not grow with the batch"


@pytest.mark.parametrize("columns", [300_000, 1_100_000])
def test_larger_shares_for_more_survivors(sddmm: ctypes.CDLL, columns: int) -> None:
    """A warp takes 64 of them, and the most that it may, 256."""
    check_sampled(sddmm, np.ones((2, columns), bool), random(1, 2), random(1, columns))


@pytest.mark.parametrize("rows,columns,batch", [(0, 5, 9), (5, 0, 9), (5, 0, 2), (0, 0, 1), (5, 6, 0)])
def test_nothing_at_all(spmm: ctypes.CDLL, sddmm: ctypes.CDLL, rows: int, columns: int, batch: int) -> None:
    kept = np.ones((rows, columns), bool)
    x, bias = random(batch, columns), random(rows)
    check_product(spmm, kept, random(rows * columns), x, bias)
    check_sampled(sddmm, kept, random(batch, rows), x)


def test_pruned_weights_do_not_meet_infinite_samples(spmm: ctypes.CDLL, sddmm: ctypes.CDLL) -> None:
    """Rows are filled up with nothing: a sample that a row has no weight for does not reach its sum."""
    kept = mask(40, 70, 0.8)
    kept[:, 0] = kept[:, 69] = False
    for batch in (1, 3, 6, 20, 40, 130):
        x, dy = random(batch, 70), random(batch, 40)
        x[:, [0, 69]] = np.inf
        value = random(int(kept.sum()))
        assert np.isfinite(product(spmm, kept, value, x)).all()
        assert np.isfinite(sampled(sddmm, kept, dy, x)).all()


def test_survivors_that_do_not_begin_at_128_bits(spmm: ctypes.CDLL) -> None:
    kept = mask(20, 90, 0.4)
    survivors = int(kept.sum())
    for skipped in (1, 2, 3):
        value = random(survivors + skipped)[skipped:]
        x = random(3 * 90 + skipped)[skipped:].reshape(3, 90)
        check_product(spmm, kept, value, x)
        check_product(spmm, kept, value, random(8 * 90 + skipped)[skipped:].reshape(8, 90))


def test_results_repeat_bit_by_bit(spmm: ctypes.CDLL, sddmm: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = mask(50, 120, 0.7)
    value, x, dy = random(int(kept.sum())), random(21, 120), random(21, 50)
    monkeypatch.delenv("CUEMU_SEED", raising=False)
    first = product(spmm, kept, value, x), sampled(sddmm, kept, dy, x)
    for seed in ("3", "4"):
        monkeypatch.setenv("CUEMU_SEED", seed)
        again = product(spmm, kept, value, x), sampled(sddmm, kept, dy, x)
        assert (first[0] == again[0]).all() and (first[1] == again[1]).all()


def check_bounds(folder: Path) -> None:
    """In a process of its own, with AddressSanitizer."""
    libraries = [compiled(operation, folder, "-fsanitize=address", "-O1") for operation in ("spmm", "sddmm")]
    for kept in (mask(21, 75, 0.5), uneven("one row holds everything")[:20]):
        rows, columns = kept.shape
        for dtype in DTYPES:
            value = random(int(kept.sum()), dtype=dtype)
            for batch in (1, 3, 5, 9, 33, 130):
                x = random(batch, columns, dtype=dtype)
                check_product(libraries[0], kept, value, x, random(rows))
                check_sampled(libraries[1], kept, random(batch, rows, dtype=dtype), x)


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    sanitizer = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(sanitizer).is_absolute():
        pytest.skip("g++ has no libasan.so")
    code = f"from pathlib import Path; from {__name__} import check_bounds; check_bounds(Path({str(tmp_path)!r}))"
    # Python's own allocations are not freed at its end; malloc as it is, so that arrays have redzones.
    environment = {**os.environ, "LD_PRELOAD": sanitizer, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    environment["PYTHONPATH"] = str(KERNELS.parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
