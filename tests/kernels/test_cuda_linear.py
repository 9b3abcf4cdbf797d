"""Layers on a GPU that hold their survivors alone, and the choice of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune.masks import Masks
from hpcprune.native import launching
from hpcprune.native.cuda import UnavailableError
from hpcprune.sparse import choose, sparsify
from hpcprune.sparse.cuda_linear import CudaKernel, CudaLinear, kernels_to_try
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.modules import sparse_module

HALF = torch.bfloat16
ROWS, COLUMNS = 64, 128


def layer_of(device: torch.device, dtype: torch.dtype, law: str, bias: bool = True) -> tuple[nn.Linear, np.ndarray]:
    """A Linear layer whose mask has a pattern, and the mask's bits."""
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS, bias=bias)
    kept = torch.rand(ROWS, COLUMNS) < 0.3
    if law == "blocks":
        kept = kept[::16, ::16].repeat_interleave(16, 0).repeat_interleave(16, 1)
    if law == "2:4":
        kept = torch.tensor([True, False, False, True]).repeat(ROWS, COLUMNS // 4)
    with torch.no_grad():
        layer.weight *= kept
    return layer.to(device, dtype), np.packbits(kept.numpy().ravel(), bitorder="little")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kernel,law,dtype",
    [
        ("csr", "any", torch.float32),
        ("csr", "any", HALF),
        ("bitmap_tiles", "any", HALF),
        ("bsr", "blocks", HALF),
        pytest.param("2:4", "2:4", HALF, marks=pytest.mark.gpu),
    ],
)
@torch.no_grad()
def test_a_layer_computes_as_before(
    device: torch.device, kernel: str, law: str, dtype: torch.dtype, bias: bool
) -> None:
    if kernel == "2:4" and device.type == "cpu":
        pytest.skip("2:4 is torch's own, on a GPU alone")
    dense, bits = layer_of(device, dtype, law, bias)
    sparse = sparse_module(dense, bits, kernel)  # type: ignore[arg-type]
    assert isinstance(sparse, CudaLinear) and sparse.kernel == kernel and f"kernel={kernel}" in repr(sparse)
    x = torch.randn(3, 5, COLUMNS, device=device, dtype=dtype)
    tolerance = {torch.float32: 1e-5, HALF: 2e-2}[dtype]
    torch.testing.assert_close(sparse(x), dense(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("kernel,law", [("csr", "any"), ("bitmap_tiles", "any"), ("bsr", "blocks")])
def test_memory_falls_with_the_density(device: torch.device, kernel: str, law: str) -> None:
    dense, bits = layer_of(device, HALF, law)
    density = np.unpackbits(bits).mean()
    sparse = sparse_module(dense, bits, kernel)  # type: ignore[arg-type]
    assert sparse is not None
    held = sum(buffer.nbytes for buffer in sparse.buffers())
    # Of a survivor its value and, in CSR, its column; of a bitmap's weight a bit, and groups are filled up.
    least = {"csr": 6 * density, "bitmap_tiles": 2 * density + 1 / 8, "bsr": 2 * density}[kernel]
    assert least * ROWS * COLUMNS <= held <= least * ROWS * COLUMNS + 16 * ROWS


def test_kernels_that_fit_are_tried(device: torch.device) -> None:
    for dtype, law, dtypes, samples, expected in (
        (torch.float32, "blocks", {HALF}, 64, ["csr"]),
        (torch.float64, "any", {HALF}, 64, []),
        (HALF, "any", {HALF}, 64, ["csr", "bitmap_tiles"]),
        (HALF, "any", {HALF}, 65, ["csr"]),
        (HALF, "any", {HALF, torch.float32}, 64, ["csr"]),
        (HALF, "blocks", {HALF}, 65, ["csr", "bsr"]),
        (HALF, "2:4", {HALF}, 65, ["csr", "2:4"]),
    ):
        dense, bits = layer_of(device, dtype, law)
        assert kernels_to_try(dense.weight, bits, dtypes, samples) == expected


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    dense, bits = layer_of(device, HALF, "any")
    with pytest.raises(SparseError, match="no whole blocks; use csr"):
        CudaLinear(dense, bits, "bsr")
    assert sparse_module(dense, bits, "panels") is None
    assert sparse_module(nn.Conv2d(8, 8, 1, groups=2).to(device), bits, "csr") is None


@torch.no_grad()
def test_autocast_casts_inputs(device: torch.device) -> None:
    dense, bits = layer_of(device, torch.float32, "any")
    sparse, x = CudaLinear(dense, bits, "csr"), torch.randn(3, COLUMNS, device=device)
    with torch.autocast(device.type, dtype=HALF):
        assert sparse(x).dtype == HALF
        torch.testing.assert_close(sparse(x), dense(x), rtol=2e-2, atol=2e-2)
    with torch.autocast(device.type, dtype=torch.float16):
        assert sparse(x).dtype == torch.float32


@pytest.mark.parametrize("kernel,law", [("csr", "any"), ("bitmap_tiles", "any"), ("bsr", "blocks")])
@torch.no_grad()
def test_inputs_of_another_width_are_refused(device: torch.device, kernel: CudaKernel, law: str) -> None:
    dense, bits = layer_of(device, HALF, law)
    sparse = CudaLinear(dense, bits, kernel)
    for x in (torch.zeros(COLUMNS, 3, device=device, dtype=HALF), torch.zeros((), device=device, dtype=HALF)):
        with pytest.raises(
            SparseError, match=rf"the input is .*; a layer of {COLUMNS} inputs takes \[\.\.\., {COLUMNS}\]"
        ):
            sparse(x)


@torch.no_grad()
def test_a_layer_that_is_cast_has_the_dtype_of_its_weights(device: torch.device) -> None:
    dense, bits = layer_of(device, torch.float32, "any")
    sparse = CudaLinear(dense, bits, "csr").to(HALF)
    assert sparse.dtype == sparse.weight.dtype == HALF
    assert torch.equal(sparse.weight, dense.to(HALF).weight)
    tiles = CudaLinear(dense, bits, "bitmap_tiles").float()
    assert tiles.dtype == tiles.weight.dtype == HALF  # its bytes stay as they are


def stack(device: torch.device) -> tuple[nn.Sequential, Masks, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.ReLU(), nn.Linear(ROWS, 16)).to(device, HALF)
    return model, hpcprune.prune(model, sparsity=0.8), torch.randn(9, COLUMNS, device=device, dtype=HALF)


@torch.no_grad()
def test_the_fastest_kernel_replaces_a_layer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks, x = stack(device)
    expected = copy.deepcopy(model)(x)
    # Of csr and bitmap_tiles, for each of two layers; then of the model.
    told = iter([(1.0, 0.9), (1.0, 0.8), (1.0, 0.7), (1.0, 0.8), (2.0, 1.0)])
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: (first(), second(), next(told))[2])
    found = sparsify(model, masks, lambda: model(x))
    assert [choice.kernel for choice in found.layers] == ["bitmap_tiles", "csr"] and not found.undone
    assert [type(layer) for layer in model] == [CudaLinear, nn.ReLU, CudaLinear]
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_real_times_are_taken_without_an_inference_too(device: torch.device) -> None:
    model, masks, _ = stack(device)
    found = sparsify(model, masks, samples=3)
    assert [choice.calls for choice in found.layers] == [((3, COLUMNS),), ((3, ROWS),)]
    assert all(choice.dense_seconds > 0 and choice.sparse_seconds > 0 for choice in found.layers)


def test_nothing_is_replaced_without_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: torch.device) -> None:
        raise UnavailableError("no nvcc")

    model, masks, x = stack(device)
    monkeypatch.setattr(launching, "kernels", none)
    found = sparsify(model, masks, lambda: model(x))
    assert found.layers == () and found.reason is not None and found.reason.endswith("need the CUDA kernels: no nvcc")


def test_on_the_cpu_no_kernel_of_a_gpu_is_tried() -> None:
    assert launching.DEVICE == "cuda"
    dense, bits = layer_of(torch.device("cpu"), HALF, "any")
    assert not isinstance(sparse_module(dense, bits), CudaLinear)
