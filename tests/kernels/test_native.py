"""The compiled kernels: every path gives numpy's bits, and a missing compiler or cache never stops a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcprune import native
from hpcprune.errors import HpcpruneError
from hpcprune.native import MaskError, View

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("avx512", "avx2", "portable", "numpy")
ELEMENTS = (np.float64, np.float32, np.float16, np.uint16)
INFINITY = {np.int16: 0x7C00, np.int32: 0x7F800000, np.int64: 0x7FF << 52}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HPCPRUNE_NATIVE", request.param)
    try:
        assert native.library().path == request.param
    except HpcpruneError as error:
        pytest.skip(str(error))
    return str(request.param)


def random_bits(seed: int, count: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    kept = np.random.default_rng(seed).random(count) < density
    return kept, np.packbits(kept, bitorder="little")


def compiler(folder: Path, script: str) -> Path:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def in_process(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd="/")


DESCRIBE = "from hpcprune import native; print(native.describe())"


# Survivors


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_gather_scatter_and_zero_agree_with_boolean_indexing(path: str, element: Any, density: float) -> None:
    for count in (0, 1, 7, 8, 63, 64, 65, 200, 1000):
        kept, bits = random_bits(count, count, density)
        values = np.random.default_rng(1).integers(1, 255, count * np.dtype(element).itemsize, np.uint8).view(element)
        survivors = native.gather(values, bits)
        dense = native.scatter(survivors, bits, count)
        zeroed = values.copy()
        native.zero_pruned(zeroed, bits)
        expected = np.where(kept, values.view(f"u{values.itemsize}"), 0)
        assert survivors.dtype == element and dense.dtype == element
        assert survivors.tobytes() == values[kept].tobytes()
        assert dense.tobytes() == expected.tobytes() == zeroed.tobytes()
        assert native.popcount(bits) == np.count_nonzero(kept)


@pytest.mark.parametrize("element", [np.float16, np.float32, np.float64])
def test_threads_share_a_large_array(path: str, element: Any) -> None:
    count = 3 * (1 << 18) + 12345
    kept, bits = random_bits(5, count, 0.2)
    values = np.arange(count).astype(np.int64).view(np.float64).astype(element) + element(1)
    survivors = native.gather(values, bits, threads=3)
    assert survivors.tobytes() == values[kept].tobytes()
    assert native.scatter(survivors, bits, count, threads=3).tobytes() == np.where(kept, values, element(0)).tobytes()
    native.zero_pruned(values, bits, threads=3)
    assert not values[~kept].any() and values[kept].tobytes() == survivors.tobytes()


def test_slices_at_multiples_of_eight_are_the_whole(path: str) -> None:
    kept, bits = random_bits(3, 1001, 0.4)
    values = np.arange(1001, dtype=np.float32)
    pieces = [native.gather(values[i : i + 104], bits[i // 8 : (i + 104) // 8]) for i in range(0, 1001, 104)]
    assert np.array_equal(np.concatenate(pieces), values[kept])


def test_nothing_is_written_beyond_the_ends(path: str) -> None:
    kept, bits = random_bits(9, 203, 0.6)
    memory = np.full(300, 7, np.float32)
    native.zero_pruned(memory[10:213], bits)
    assert (memory[:10] == 7).all() and (memory[213:] == 7).all()
    assert np.array_equal(memory[10:213], np.where(kept, 7, 0))


def test_counts_that_disagree_are_refused(path: str) -> None:
    values, bits = np.ones(10, np.float32), np.array([0xFF, 0x03], np.uint8)
    with pytest.raises(MaskError, match="1 bytes of mask for 10 elements: 2 are needed"):
        native.gather(values, bits[:1])
    with pytest.raises(MaskError, match="bits set beyond the last one"):
        native.gather(values, np.array([0xFF, 0x07], np.uint8))
    with pytest.raises(MaskError, match="9 survivors for a mask with 10 bits set"):
        native.scatter(values[:9], bits, 10)
    with pytest.raises(MaskError, match="1-D array of 2, 4 or 8 bytes"):
        native.gather(np.ones(10, np.int8), bits)
    with pytest.raises(MaskError, match="1-D array of 2, 4 or 8 bytes"):
        native.zero_pruned(np.ones((2, 5), np.float32), bits)
    with pytest.raises(MaskError, match="not contiguous"):
        native.zero_pruned(np.ones(20, np.float32)[::2], bits)
    with pytest.raises(MaskError, match="uint8"):
        native.popcount(bits.astype(np.int64))


# Passes


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([np.int16, np.int32, np.int64]),
    view=st.sampled_from(list(View)),
    sizes=st.lists(st.integers(0, 200), max_size=4),
    ends=st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_passes_agree_with_numpy_on_every_path(
    bits: Any, view: View, sizes: list[int], ends: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    infinity = INFINITY[bits]
    lowest = np.iinfo(bits).min
    pool = np.array([0, lowest, 1, lowest + 1, 2, 5, infinity, infinity + lowest, 77, infinity - 1, 1000, -5], bits)
    pool[-1] = 3 if view != View.KEYS else -5  # as float bits that would be NaN
    parts = [random.choice(pool, size) for size in sizes]
    keys = native.to_keys(np.concatenate([np.empty(0, bits), *parts]), view)
    values = np.sort(np.unique(native.to_keys(pool, view))).tolist()
    lo, hi = values[ends[0] % len(values)], values[ends[1] % len(values)]
    lo, hi = min(lo, hi), max(lo, hi)
    cut = int(random.integers(-1, 20))
    ties = np.flatnonzero(keys == lo)
    survives = keys >= lo
    survives[ties[: cut if cut >= 0 else ties.size]] = False
    shift = max(0, (hi - lo).bit_length() - 3)
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPCPRUNE_NATIVE", path)
            try:
                native.library()
            except HpcpruneError:
                continue
            found = native.count_around(parts, view, lo, hi, infinity if view != View.KEYS else 0, 1000)
            inside = keys[(keys > lo) & (keys < hi)]
            assert not found.nan
            assert (found.below, found.at_lo) == (np.count_nonzero(keys < lo), np.count_nonzero(keys == lo))
            assert found.at_hi == (np.count_nonzero(keys == hi) if hi > lo else 0)
            assert found.keys is not None and found.between == inside.size
            assert np.array_equal(np.sort(found.keys), np.sort(inside))
            if inside.size:
                assert native.count_around(parts, view, lo, hi, infinity, inside.size - 1).keys is None
            counts = native.histogram(parts, view, lo, hi, shift, 8)
            offsets = [(int(key) - lo) >> shift for key in keys if lo <= key <= hi]
            assert counts.tolist() == np.bincount(np.array(offsets, np.int64), minlength=8).tolist()
            masks = [np.full((part.size + 7) // 8, 0xAA, np.uint8) for part in parts]
            left = native.pack(parts, masks, view, lo, cut)
            unpacked = [np.unpackbits(m, count=p.size, bitorder="little") for m, p in zip(masks, parts, strict=True)]
            assert np.array_equal(np.concatenate([np.empty(0, np.uint8), *unpacked]), survives)
            assert left == (max(0, cut - ties.size) if cut >= 0 else -1)
            padding = [m[-1] >> p.size % 8 for m, p in zip(masks, parts, strict=True) if p.size % 8]
            assert not any(padding)


@pytest.mark.parametrize("distinct", [7, 100_000])
@pytest.mark.parametrize("part_of_ties", [0.0, 0.01, 0.4, 0.7, 1.0])
def test_threads_cut_ties_in_order(path: str, distinct: int, part_of_ties: float) -> None:
    random = np.random.default_rng(distinct)
    parts = [random.integers(0, distinct, size).astype(np.int32) for size in (600_001, 7, 300_003)]
    keys = np.concatenate(parts)
    ties = np.flatnonzero(keys == 3)
    cut = int(part_of_ties * ties.size)
    expected = keys >= 3
    expected[ties[:cut]] = False
    masks = [np.zeros((part.size + 7) // 8, np.uint8) for part in parts]
    assert native.pack(parts, masks, View.KEYS, 3, cut, threads=3) == 0
    unpacked = [np.unpackbits(m, count=p.size, bitorder="little") for m, p in zip(masks, parts, strict=True)]
    assert np.array_equal(np.concatenate(unpacked), expected)
    assert native.pack(parts, masks, View.KEYS, 3, ties.size + 5, threads=3) == 5


def test_more_keys_than_there_is_room_for_stay_inside_the_buffer(path: str) -> None:
    code = native.library().code
    if code is None:
        pytest.skip("numpy has no buffer")
    data, buffer, counts = np.arange(9000, dtype=np.int32), np.full(9000, -7, np.int32), np.zeros(5, np.int64)
    address, length = np.array([data.ctypes.data], np.uintp), np.array([data.size], np.int64)
    arrays = (address.ctypes.data, length.ctypes.data, 1)
    room = (buffer.ctypes.data, 100, counts.ctypes.data)
    assert code.hpcprune_count_around(native.library().level, 32, View.KEYS, *arrays, 10, 8000, 0, *room, 1) == 0
    assert counts.tolist() == [10, 1, 7989, 1, 0]
    assert (buffer[100:] == -7).all()


def test_nan_is_noticed_with_either_sign(path: str) -> None:
    for position in (0, 63, 70):
        for value in (np.nan, -np.nan):
            scores = np.ones(71, np.float32)
            scores[position] = value
            for view in (View.SIGNED, View.ABSOLUTE):
                found = native.count_around([scores.view(np.int32)], view, 0, 5, INFINITY[np.int32], 100)
                assert found.nan, (position, value, view)


# Finding, compiling, loading


def test_of_two_processes_one_compiles_and_the_other_waits(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, f'echo "$@" >> {tmp_path}/log; exec g++ "$@" -O0')
    command = [
        sys.executable,
        "-c",
        DESCRIBE + "; assert native.popcount(__import__('numpy').full(3, 7, 'uint8')) == 9",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HPCPRUNE_CACHE": str(tmp_path / "cache"), "CXX": str(cxx)}
    environ.pop("HPCPRUNE_NATIVE", None)
    started = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted("compiled into" in text for text in told) == [False, True], told
    assert all(not text.startswith("numpy") for text in told)
    compiles = [line for line in (tmp_path / "log").read_text().splitlines() if "--version" not in line]
    assert len(compiles) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    # What was compiled once also serves where there is no compiler, as on many compute nodes.
    later = in_process(DESCRIBE, PATH=str(tmp_path), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert "cached in" in later.stdout and not later.stdout.startswith("numpy"), later


def test_without_a_compiler_numpy_serves(tmp_path: Path) -> None:
    done = in_process(DESCRIBE, PATH=str(tmp_path), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("numpy: no C++ compiler (none of g++, c++, clang++ is on PATH)"), done
    missing = in_process(DESCRIBE, CXX="no-such-compiler", HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert missing.stdout.startswith("numpy: no C++ compiler (CXX=no-such-compiler is not on PATH)"), missing


def test_a_compiler_that_fails_leaves_numpy_and_the_reason(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, 'case "$1" in --version) echo 1.0;; *) echo "a.cpp:1: error: boom" >&2; exit 1;; esac')
    done = in_process(DESCRIBE, CXX=str(cxx), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("numpy: ") and "(a.cpp:1: error: boom)" in done.stdout, done
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_leaves_numpy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = in_process(DESCRIBE, HPCPRUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert done.stdout.startswith("numpy: cannot write compiled kernels to "), done
    assert "set HPCPRUNE_CACHE" in done.stdout


def test_a_damaged_library_leaves_numpy(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, 'for last; do :; done; case "$1" in --version) echo 1.0;; *) echo junk > "$last";; esac')
    done = in_process(DESCRIBE, CXX=str(cxx), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("numpy: cannot load ") and "delete it" in done.stdout, done


def test_sources_are_found_inside_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "site" / "hpcprune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("native.py", "errors.py"):
        shutil.copy(ROOT / "hpcprune" / name, package)
    shutil.copytree(ROOT / "kernels", package / "kernels")
    code = "from hpcprune import native; print(native.sources()[0]); print(native.describe())"
    done = in_process(code, PYTHONPATH=str(package.parent), HPCPRUNE_CACHE=os.environ.get("HPCPRUNE_CACHE", ""))
    first, described = done.stdout.splitlines()
    assert first.startswith(str(package))
    assert described == native.describe().replace("compiled into", "cached in"), "the same sources, so the same cache"
    shutil.rmtree(package / "kernels")
    bare = in_process(DESCRIBE, PYTHONPATH=str(package.parent))
    assert bare.stdout.startswith("numpy: no kernels/"), bare


def test_a_path_that_there_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", "sse9")
    with pytest.raises(HpcpruneError, match="HPCPRUNE_NATIVE=sse9: there are numpy, portable, avx2, avx512"):
        native.library()
    monkeypatch.setenv("HPCPRUNE_NATIVE", "portable")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("HPCPRUNE_CACHE", str(tmp_path))
    with pytest.raises(HpcpruneError, match=r"HPCPRUNE_NATIVE=portable: no C\+\+ compiler"):
        native.library()
