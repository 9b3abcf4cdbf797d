"""What is done with sparse modules beside calling them: they are compiled, copied, saved, and given nothing at all."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hpcprune.sparse.held import Kernel
from hpcprune.sparse.modules import sparse_module
from tests.kernels.test_products import bits_of
from tests.test_sparse import COLUMNS, KERNELS, ROWS, mask_for

OF_ALL = pytest.mark.parametrize("kernel", [*KERNELS, "convolution"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def network(kernel: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A dense network, the sparse one that computes the same, and the shape of a sample."""
    torch.manual_seed(0)
    layer: nn.Linear | nn.Conv2d
    shape: tuple[int, ...]
    if kernel == "convolution":
        layer, mask, shape = nn.Conv2d(6, 10, (3, 2), padding=1), torch.rand(10, 6, 3, 2) < 0.2, (6, 9, 11)
    else:
        layer, mask, shape = nn.Linear(COLUMNS, ROWS), mask_for(cast(Kernel, kernel), ROWS, COLUMNS), (COLUMNS,)
    layer.weight.data *= mask
    layer.to(dtype)
    sparse = sparse_module(layer, bits_of(mask), "panels" if kernel == "convolution" else cast(Kernel, kernel))
    assert sparse is not None
    return nn.Sequential(layer, nn.ReLU()).eval(), nn.Sequential(sparse, nn.ReLU()).eval(), shape


@OF_ALL
@torch.no_grad()
def test_it_compiles_into_one_graph_for_any_number_of_samples(kernel: str) -> None:
    _, sparse, shape = network(kernel)
    for autocast in (False, True):
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend=graphs)
        for samples in (5, 3, 64):
            x = torch.randn(samples, *shape)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                expected, product = sparse(x), compiled(x)
            assert product.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert torch.equal(product, expected)
        assert graphs.frame_count == 1


@torch.no_grad()
def test_inductor_takes_it() -> None:
    _, sparse, shape = network("panels")
    x = torch.randn(4, *shape)
    assert torch.equal(torch.compile(sparse[0], fullgraph=True)(x), sparse[0](x))  # type: ignore[index]


def pickled(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@OF_ALL
@pytest.mark.parametrize("taken", [copy.deepcopy, pickled, saved])
@torch.no_grad()
def test_a_copy_computes_the_same_and_shares_nothing(kernel: str, taken: Callable[[nn.Module], nn.Module]) -> None:
    _, sparse, shape = network(kernel)
    other, x = taken(sparse), torch.randn(4, *shape)
    expected = sparse(x)
    assert torch.equal(other(x), expected)
    own = {buffer.data_ptr() for buffer in sparse.buffers()}
    assert own and not own & {buffer.data_ptr() for buffer in other.buffers()}


@OF_ALL
@torch.no_grad()
def test_a_state_dict_brings_weights_to_a_network_of_the_same_mask(kernel: str) -> None:
    _, sparse, shape = network(kernel)
    other, x = copy.deepcopy(sparse), torch.randn(4, *shape)
    other[0].value.zero_()  # type: ignore[index]
    assert not torch.equal(other(x), sparse(x))
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), sparse(x))


@OF_ALL
@DTYPES
@torch.no_grad()
def test_nothing_is_made_of_no_samples(kernel: str, dtype: torch.dtype) -> None:
    dense, sparse, shape = network(kernel, dtype)
    x = torch.empty(0, *shape, dtype=dtype)
    product = sparse(x)
    assert product.shape == dense(x).shape and product.dtype == dtype
    if kernel != "convolution":
        x = torch.empty(3, 0, *shape, dtype=dtype)
        assert sparse(x).shape == dense(x).shape


@OF_ALL
@DTYPES
def test_it_infers_in_inference_mode(kernel: str, dtype: torch.dtype) -> None:
    dense, sparse, shape = network(kernel, dtype)
    x = torch.randn(4, *shape, dtype=dtype)
    with torch.inference_mode():
        product = sparse(x)
        torch.testing.assert_close(product, dense(x))
    assert product.is_inference() and torch.equal(sparse(x), product)
