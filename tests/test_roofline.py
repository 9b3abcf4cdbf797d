"""The roofs of the CUDA kernels: what the docs quote, and some of it counted by hand."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT

WEIGHTS = 4096 * 4096


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", ROOT / "bench/roofline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_docs_have_these_tables(roofline: ModuleType) -> None:
    docs = (ROOT / "docs/kernels.md").read_text()
    assert roofline.table() in docs and roofline.passes() in docs


def test_the_dense_layer_is_counted(roofline: ModuleType) -> None:
    # 64 MiB of weights and 8,192 numbers; with 256 samples 4.29 G multiply-adds.
    assert roofline.dense_float(1).seconds(roofline.H100) == pytest.approx((4 * WEIGHTS + 4 * 8192) / 3350e9)
    assert roofline.dense_float(256).seconds(roofline.A100) == pytest.approx(2 * WEIGHTS * 256 / 19.5e12)
    assert roofline.dense_half(256).seconds(roofline.A100) == pytest.approx(2 * WEIGHTS * 256 / 312e12)


@pytest.mark.parametrize(
    "kernel,bytes_of_all",
    [
        ("CSR, float32", 8 * WEIGHTS + 8 * 4096 + 4 * 8192),
        ("CSR, bfloat16", 6 * WEIGHTS + 8 * 4096 + 2 * 8192),
        ("CSR's gradient, float32", 8 * WEIGHTS + 4 * 8192),
        ("CSR's gradient, bfloat16", 8 * WEIGHTS + 2 * 8192),
        ("bitmap tiles", (2 + 1 / 8 + 11 / 1024) * WEIGHTS + 2 * 8192),
        ("blocks of 16", (2 + 4 / 256) * WEIGHTS + 2 * 8192),
        ("blocks of 32", (2 + 4 / 1024) * WEIGHTS + 2 * 8192),
        ("blocks of 64", (2 + 4 / 4096) * WEIGHTS + 2 * 8192),
        ("gradient of blocks of 16", (4 + 8 / 256) * WEIGHTS + 2 * 8192),
        ("gradient of blocks of 32", (4 + 8 / 1024) * WEIGHTS + 2 * 8192),
        ("gradient of blocks of 64", (4 + 8 / 4096) * WEIGHTS + 2 * 8192),
        ("2:4 (torch's)", (1 + 1 / 8) * WEIGHTS + 2 * 8192),
    ],
)
def test_bytes_of_one_sample(roofline: ModuleType, kernel: str, bytes_of_all: float) -> None:
    [found] = [each for each in roofline.KERNELS if each.name == kernel]
    assert found.work(1.0, 1).memory == pytest.approx(bytes_of_all)


@pytest.mark.parametrize("side,samples", [(16, 64), (32, 32), (64, 16)])
def test_block_gradients_multiply_whole_tiles_of_samples(roofline: ModuleType, side: int, samples: int) -> None:
    [found] = [each for each in roofline.KERNELS if each.name == f"gradient of blocks of {side}"]
    assert found.work(0.5, 1).tensor == found.work(0.5, samples).tensor == WEIGHTS / 2 * samples
    assert found.work(0.5, samples + 1).tensor == WEIGHTS * samples


@pytest.mark.parametrize(
    "name,half,all_left",
    [
        # Of eight weights in a sector one survives but for 1 time in 256.
        ("gradients gathered, weights updated", 1 / 8 + 8 / 1024 + 4 * 255 / 256 + 2, 1 / 8 + 8 / 1024 + 8),
        ("the same by indices", 4 + 4 * 255 / 256 + 2, 16),
        ("survivors scattered among zeros", 1 / 8 + 8 / 1024 + 6, 1 / 8 + 8 / 1024 + 8),
        ("scores counted around a bracket, or in bins", 4, 4),
        ("masks packed", 4 + 1 / 8 + 16 / 1024, 4 + 1 / 8 + 16 / 1024),
        ("masks packed, some ties cut", 8 + 1 / 8 + 32 / 1024, 8 + 1 / 8 + 32 / 1024),
    ],
)
def test_bytes_of_a_weight_in_a_pass(roofline: ModuleType, name: str, half: float, all_left: float) -> None:
    assert roofline.PASSES[name](0.5) == pytest.approx(half)
    assert roofline.PASSES[name](1.0) == pytest.approx(all_left)


def test_break_even_is_where_both_take_as_long(roofline: ModuleType) -> None:
    for kernel in roofline.KERNELS[:3]:
        for batch in roofline.BATCHES:
            density = roofline.break_even(kernel, roofline.H100, batch)
            assert roofline.speedup(kernel, roofline.H100, density, batch) == pytest.approx(1, rel=1e-6)
            assert roofline.speedup(kernel, roofline.H100, density / 2, batch) > 1.5
