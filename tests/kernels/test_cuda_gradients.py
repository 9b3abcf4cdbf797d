"""Gradients of the products on a GPU, as autograd has them, against dense float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpcprune.sparse.kernels import SparseError
from tests.kernels.cuda_layers import OPERATORS, assert_near, assert_product, training


@pytest.mark.parametrize("kind,dtype", OPERATORS)
def test_gradients_are_those_of_the_dense_layer(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    layer = training(device, kind, dtype)
    given = torch.randn(2, 5, 70, device=device).to(dtype)
    layer().backward(given)
    x, dy = layer.x.detach().double().view(10, 100), given.double().view(10, 70)
    assert layer.x.grad is not None and layer.survivors.grad is not None and layer.bias.grad is not None
    assert_product(layer.x.grad.view(10, 100), dy, layer.weights.t(), None)
    kept = layer.weights != 0
    assert_near(layer.survivors.grad, (dy.t() @ x)[kept], (dy.t().abs() @ x.abs())[kept], 10)
    assert_near(layer.bias.grad, dy.sum(0), dy.abs().sum(0), 10)


@pytest.mark.parametrize("kind,dtype", OPERATORS)
@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_gets_a_gradient(
    device: torch.device,
    kind: str,
    dtype: torch.dtype,
    needed: int,
) -> None:
    layer = training(device, kind, dtype)
    leaves = layer.x, layer.survivors, layer.bias
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == needed)
    layer().sum().backward()  # type: ignore[no-untyped-call]
    assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]


def test_a_gradient_is_the_products_slope(device: torch.device) -> None:
    """By differences: the product is linear in each operand, so a step of any size will do."""
    layer = training(device, "csr", torch.float32)
    layer().sum().backward()  # type: ignore[no-untyped-call]
    for leaf in (layer.x, layer.survivors, layer.bias):
        assert leaf.grad is not None
        step, before, at = torch.randn_like(leaf), layer().double().sum(), leaf.detach().clone()
        with torch.no_grad():
            leaf += step
            slope = layer().double().sum() - before
            leaf.copy_(at)
        torch.testing.assert_close(slope, (leaf.grad.double() * step.double()).sum(), rtol=1e-3, atol=1e-2)


def test_gradients_that_are_not_known_are_refused() -> None:
    """Without that they would be zero. It is torch's part alone, and wants no GPU."""

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    x, weights = torch.empty(3, 16, device="meta", requires_grad=True), torch.empty(1, 16, 16, device="meta")
    ops = torch.ops.hpcprune
    for product in (
        ops.csr_linear(x, integers(17), integers(256), integers(16), weights.view(-1), None, 16),
        ops.bitmap_tiles_linear(x, integers(2), integers(4), None, 16, 16, 1),
        ops.bsr_linear(x, integers(2), integers(1), weights, None, 16, 16),
        ops.csr_sampled(x, x.detach(), integers(17), integers(256), 16),
        ops.bsr_sampled(x, x.detach(), integers(1), integers(1), integers(1, 16, 16), 256),
    ):
        with pytest.raises(SparseError, match="knows no gradient"):
            product.sum().backward()
