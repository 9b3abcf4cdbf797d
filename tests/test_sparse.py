"""Sparse modules against the dense ones of which they are made."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune.masks import Masks
from hpcprune.sparse import SparseConv2d, SparseLinear
from hpcprune.sparse.held import Kernel
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.modules import sparse_module
from tests.kernels.test_products import bits_of

ROWS, COLUMNS = 70, 300
KERNELS = get_args(Kernel)


def prune_to(module: nn.Module, sparsity: float = 0.8) -> Masks:
    return hpcprune.prune(module, sparsity)


def mask_for(kernel: Kernel, rows: int, columns: int) -> Tensor:
    """A mask that the kernel is made for."""
    if kernel == "blocks":
        return (
            (torch.rand(-(-rows // 16), -(-columns // 16)) < 0.3)
            .repeat_interleave(16, 0)
            .repeat_interleave(16, 1)[:rows, :columns]
        )
    if kernel == "two_of_four":
        return (torch.rand(rows, columns // 4, 4).argsort(-1) < 2).view(rows, columns)
    return torch.rand(rows, columns) < 0.2


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_a_linear_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, kernel: Kernel) -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=bias)).to(dtype)
    mask = mask_for(kernel, ROWS, COLUMNS)
    model[0].weight *= mask
    sparse = sparse_module(model[0], bits_of(mask), kernel)
    assert isinstance(sparse, SparseLinear) and sparse.kernel == kernel
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(sparse(x), model(x))
    assert torch.equal(sparse.weight, model[0].weight)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2), "bias": False},
        {"kernel_size": (5, 2), "padding": (4, 3), "stride": (1, 3), "dilation": (3, 1)},
        {"kernel_size": (17, 23)},
    ],
)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_convolution(options: dict[str, Any], batched: bool, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(6, 10, **options)).to(dtype)
    sparse = sparse_module(model[0], prune_to(model).bits("0.weight"))
    assert isinstance(sparse, SparseConv2d)
    x = torch.randn(3, 6, 17, 23, dtype=dtype) if batched else torch.randn(6, 17, 23, dtype=dtype)
    torch.testing.assert_close(sparse(x), model(x))
    last = x.to(memory_format=torch.channels_last) if batched else x
    torch.testing.assert_close(sparse(last), model(x))
    assert torch.equal(sparse.weight, model[0].weight)


@torch.no_grad()
def test_autocast_makes_bfloat16_of_it_as_of_a_dense_layer() -> None:
    model, x = nn.Sequential(nn.Linear(COLUMNS, ROWS)), torch.randn(4, COLUMNS)
    sparse = sparse_module(model[0], prune_to(model).bits("0.weight"))
    assert sparse is not None
    with torch.autocast("cpu", torch.bfloat16):
        own, dense = sparse(x), model(x)
    assert own.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(own, dense, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.float16):
        own, dense = sparse(x.half()), model(x)
    assert own.dtype == torch.float32  # as the weights: no kernel takes float16
    torch.testing.assert_close(own, dense.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(), (COLUMNS - 1,), (4, COLUMNS + 1), (COLUMNS, 4)])
def test_an_input_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(COLUMNS, ROWS)
    sparse = sparse_module(layer, prune_to(nn.Sequential(layer)).bits("0.weight"))
    assert sparse is not None
    with pytest.raises(SparseError, match=rf"the input is \[.*\]; a layer of {COLUMNS} inputs takes"):
        sparse(torch.randn(shape))


@pytest.mark.parametrize("shape", [(6, 9), (5, 9, 9), (2, 7, 9, 9), (2, 6, 2, 9), (1, 2, 6, 9, 9)])
def test_what_is_no_image_for_the_kernel_is_refused(shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d(6, 8, 3)
    sparse = sparse_module(layer, prune_to(nn.Sequential(layer)).bits("0.weight"))
    assert sparse is not None
    with pytest.raises(SparseError, match=r"this convolution takes \[images, 6, height, width\]"):
        sparse(torch.randn(shape))


@pytest.mark.parametrize(("kernel", "share"), [("panels", 0.14), ("bitmap", 0.135)])
def test_memory_falls_with_the_density(kernel: Kernel, share: float) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    sparse = sparse_module(model[0], prune_to(model, 0.9).bits("0.weight"), kernel)
    assert sparse is not None and not [*sparse.parameters()]
    held = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in sparse.buffers()}
    assert sum(held.values()) < share * model[0].weight.nbytes


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(4, 4, 3),
        nn.Linear(4, 4).double(),
        nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
    ],
)
def test_what_has_no_counterpart_stays(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    masks = prune_to(model)
    assert sparse_module(layer, masks.bits("0.weight")) is None
