"""Convolutions on a GPU that hold their survivors alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hpcprune
from hpcprune.sparse import choose, sparsify
from hpcprune.sparse.cuda_convolution import CudaConv2d
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.modules import sparse_module
from tests.kernels.test_products import bits_of

HALF = torch.bfloat16
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-2}


def convolution(device: torch.device, dtype: torch.dtype, **more: int | tuple[int, int]) -> tuple[nn.Conv2d, nn.Module]:
    """A pruned convolution of 6 channels into 10, and the sparse one."""
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 10, **more)  # type: ignore[arg-type]
    mask = torch.rand(dense.weight.shape) < 0.3
    dense.weight.data *= mask
    sparse = sparse_module(dense.to(device, dtype), bits_of(mask), "csr")
    assert isinstance(sparse, CudaConv2d) and sparse.kernel == "csr" and "10, kernel_size=" in repr(sparse)
    return dense, sparse


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    "more",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": (2, 3)},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_convolution_computes_as_before(
    device: torch.device, dtype: torch.dtype, more: dict[str, int | tuple[int, int]]
) -> None:
    dense, sparse = convolution(device, dtype, **more)
    assert torch.equal(sparse.weight, dense.weight)  # type: ignore[arg-type]
    for shape in ((2, 6, 9, 11), (6, 9, 11)):
        x = torch.randn(shape, device=device, dtype=dtype)
        torch.testing.assert_close(sparse(x), dense(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_images_that_do_not_fit_are_refused(device: torch.device) -> None:
    _, sparse = convolution(device, torch.float32, kernel_size=3)
    for shape in ((2, 5, 9, 11), (6, 2, 11), (9, 11)):
        with pytest.raises(SparseError, match=r"this convolution takes \[images, 6, height, width\] or one image"):
            sparse(torch.randn(shape, device=device))


@torch.no_grad()
def test_those_that_are_faster_replace_dense_ones(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(device, HALF)
    masks, x = hpcprune.prune(model, 0.8), torch.randn(2, 3, 5, 7, device=device, dtype=HALF)
    expected = copy.deepcopy(model)(x)
    # Of csr for 70 places, of csr and bitmap_tiles for 30; then of the model, twice.
    told = iter([(1.0, 0.9), (1.0, 0.8), (1.0, 0.7), (2.0, 1.0), (1.0, 1.0)])
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: (first(), second(), next(told))[2])
    found = sparsify(model, masks, lambda: model(x))
    assert [choice.kernel for choice in found.layers] == ["csr", "bitmap_tiles"] and not found.undone
    assert [type(layer) for layer in model] == [CudaConv2d, nn.ReLU, CudaConv2d]
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert sparsify(model, masks, lambda: model(x)).layers == ()
