"""The sparse operators against torch's dense layers; what they refuse, and who hears of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import hpcprune
from hpcprune.sparse.held import LINEAR, Kernel, hold
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.ops import panels_conv2d, panels_linear
from hpcprune.sparse.training import operator_of
from tests.kernels.test_products import bits_of, laid_out
from tests.test_sparse import COLUMNS, KERNELS, ROWS, mask_for


@pytest.fixture
def weights() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS) * (torch.rand(ROWS, COLUMNS) < 0.2)


@pytest.fixture(params=["panels", "blocks"])
def trained(request: pytest.FixtureRequest) -> Tensor:
    """Weights for each kernel that trains."""
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS) * mask_for(request.param, ROWS, COLUMNS)


def operands(weights: Tensor) -> tuple[Any, ...]:
    """The operator that trains a layer, and what it takes, from x on; the first three have a gradient."""
    operator, layouts = operator_of(bits_of(weights), weights)
    x, bias = torch.randn(2, 5, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    return operator, x, weights[weights != 0].requires_grad_(), bias, *layouts


def dense_gradients(weights: Tensor, given: Sequence[Any]) -> list[Tensor]:
    x, dense, bias = (each.detach().clone().requires_grad_() for each in (given[0], weights, given[2]))
    functional.linear(x, dense, bias).square().sum().backward()
    return [x.grad, dense.grad[weights != 0], bias.grad]  # type: ignore[index, list-item]


def test_gradients_are_those_of_the_dense_layer(trained: Tensor) -> None:
    operator, *given = operands(trained)
    operator(*given).square().sum().backward()
    for own, dense in zip(given[:3], dense_gradients(trained, given), strict=True):
        torch.testing.assert_close(own.grad, dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_gets_a_gradient(trained: Tensor, needed: int) -> None:
    operator, *given = operands(trained)
    for i in range(3):
        given[i].requires_grad_(i == needed)
    operator(*given).square().sum().backward()
    assert [each.grad is not None for each in given[:3]] == [i == needed for i in range(3)]
    torch.testing.assert_close(given[needed].grad, dense_gradients(trained, given)[needed], rtol=1e-5, atol=1e-4)


def held_of(kernel: Kernel, dtype: torch.dtype) -> list[Tensor]:
    mask = mask_for(kernel, ROWS, COLUMNS)
    return [*hold(kernel, bits_of(mask), ROWS, COLUMNS, torch.randn(int(mask.sum())).to(dtype)).values()]


def test_torch_finds_nothing_wrong_with_the_operators_that_train(trained: Tensor) -> None:
    operator, *given = operands(trained)
    x, survivors, _, *layouts = (each.detach() if isinstance(each, Tensor) else each for each in given)
    kernel, gradient, own = operator.__name__.partition("_")[0], torch.randn(2, 5, ROWS), layouts[: len(layouts) // 2]
    for each, arguments in (
        (operator, given),
        (torch.ops.hpcprune.refill, (own[-1], survivors)),
        (getattr(torch.ops.hpcprune, f"{kernel}_sampled"), (x, gradient, *own, len(survivors))),
    ):
        assert set(torch.library.opcheck(each.default, arguments).values()) == {"SUCCESS"}


def test_torch_finds_nothing_wrong_with_the_operators(weights: Tensor) -> None:
    ops, x, bias = torch.ops.hpcprune, torch.randn(2, 5, COLUMNS), torch.randn(ROWS)
    images, (of_images, convolved) = torch.randn(2, 30, 9, 11), laid_out(weights)
    for operator, arguments in (
        *(
            (getattr(ops, f"{kernel}_linear"), (x, *held_of(kernel, dtype), each, ROWS))
            for kernel in KERNELS
            for each in (bias, None)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (ops.panels_conv2d, (images, of_images.layout, convolved, bias, ROWS, [2, 5], [1, 2], [0, 1], [2, 1])),
    ):
        assert set(torch.library.opcheck(operator.default, arguments).values()) == {"SUCCESS"}


def test_they_compile_into_one_graph(trained: Tensor) -> None:
    operator, *given = operands(trained)
    compiled = torch.compile(lambda *of: operator(*of).relu() * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), operator(*given).relu() * 2)
    compiled(*given).square().sum().backward()
    own = [each.grad.clone() for each in given[:3]]
    for each in given[:3]:
        each.grad = None
    (operator(*given).relu() * 2).square().sum().backward()
    for gradient, each in zip(own, given[:3], strict=True):
        torch.testing.assert_close(gradient, each.grad)


def test_other_dtypes_are_refused(weights: Tensor) -> None:
    layout, value = laid_out(weights)
    with pytest.raises(
        hpcprune.HpcpruneError,
        match=r"W is torch\.float32 and x is torch\.float64; sparse products take float32 and bfloat16",
    ):
        panels_linear(torch.randn(3, COLUMNS).double(), layout.layout, value, None, ROWS)
    with pytest.raises(
        hpcprune.HpcpruneError,
        match=r"W is torch\.float16 and x is torch\.float32; sparse products take float32 and bfloat16",
    ):
        panels_linear(torch.randn(3, COLUMNS), layout.layout, value.half(), None, ROWS)
    operator, x, survivors, *more = operands(weights)
    with pytest.raises(hpcprune.HpcpruneError, match=r"W is torch\.float64; sparse products take float32 and bfloat16"):
        operator(x, survivors.double(), *more)


def shorter(operands: Sequence[Any], which: int) -> list[Any]:
    """Operands of which one is not as long as it should be: images in channels, others in their last dimension.

    By 20, since what is held in sixteens does not know where within the last a matrix ends.
    """
    found, longer = list(operands), operands[which]
    dimension = 1 if longer.dim() == 4 else longer.dim() - 1
    found[which] = longer.narrow(dimension, 0, max(0, longer.shape[dimension] - 20)).contiguous()
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_operands_that_do_not_fit_are_refused(kernel: Kernel) -> None:
    torch.manual_seed(0)
    given = [torch.randn(3, COLUMNS), *held_of(kernel, torch.float32), torch.randn(ROWS), ROWS]
    LINEAR[kernel](*given)
    for which in range(len(given) - 1):
        with pytest.raises(SparseError, match=r"x \[3, \d+\], .* do not fit each other and the layout"):
            LINEAR[kernel](*shorter(given, which))
    for rows in (ROWS - 1, ROWS + 1, 0):
        with pytest.raises(SparseError, match="do not fit"):
            LINEAR[kernel](*given[:-1], rows)


def test_images_and_gradients_that_do_not_fit_are_refused(weights: Tensor, trained: Tensor) -> None:
    (own, value), geometry = laid_out(weights), ([2, 5], [1, 2], [0, 1], [2, 1])
    images = [torch.randn(2, 30, 9, 11), own.layout, value, None, ROWS]
    for given in (shorter(images, 0), shorter(images, 1), shorter(images, 2), [*images[:-1], ROWS + 1]):
        with pytest.raises(SparseError, match="do not fit"):
            panels_conv2d(*given, *geometry)
    with pytest.raises(SparseError, match="do not fit"):
        panels_conv2d(*images, [2, 5], [1, 2], [0, 1], [0, 1])
    operator, x, survivors, _, *layouts = operands(trained)
    sampled = getattr(torch.ops.hpcprune, operator.__name__.replace("survivors_linear", "sampled"))
    layout, count = layouts[: len(layouts) // 2], len(survivors)
    right = [x.detach(), torch.randn(2, 5, ROWS), *layout]
    sampled(*right, count)
    for which in range(len(right)):
        with pytest.raises(SparseError, match="do not fit"):
            sampled(*shorter(right, which), count)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_and_biases_may_have_strides(kernel: Kernel) -> None:
    x, bias = torch.randn(3, COLUMNS), torch.randn(ROWS)
    *matrix, value = held_of(kernel, torch.float32)
    product = LINEAR[kernel](x, *matrix, value, bias, ROWS)
    assert torch.equal(LINEAR[kernel](x, *matrix, strided(value), strided(bias), ROWS), product)


def test_survivors_may_have_strides(trained: Tensor) -> None:
    operator, x, survivors, *more = operands(trained)
    assert torch.equal(operator(x, strided(survivors), *more), operator(x, survivors, *more))


def test_orders_of_other_blocks_are_refused() -> None:
    """By which a gradient would be written beyond its end."""
    few, many = (operands(torch.ones(side, side))[4:] for side in (17, 32))
    *own, _ = few[: len(few) // 2]
    with pytest.raises(SparseError, match="do not fit"):
        torch.ops.hpcprune.blocks_sampled(torch.randn(3, 17), torch.randn(3, 17), *own, many[2], 17 * 17)


def test_torchs_default_device_is_not_theirs(trained: Tensor) -> None:
    with torch.device("meta"):
        _, layouts = operator_of(bits_of(trained), trained)
        held = hold("panels", bits_of(trained), ROWS, COLUMNS, trained[trained != 0])
    assert {each.device.type for each in (*layouts[:-1], *held.values())} == {"cpu"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_that_are_not_known_are_refused(kernel: Kernel) -> None:
    """Without that they would be zero, and nobody would notice."""
    x = torch.randn(3, COLUMNS, requires_grad=True)
    product = LINEAR[kernel](x, *held_of(kernel, torch.float32), None, ROWS)
    with pytest.raises(SparseError, match=f"hpcprune::{kernel}_linear knows no gradient: run inference under"):
        product.sum().backward()
    bias = torch.randn(ROWS, requires_grad=True)
    with pytest.raises(SparseError, match="knows no gradient"):
        LINEAR[kernel](x.detach(), *held_of(kernel, torch.float32), bias, ROWS).sum().backward()
    with torch.no_grad():
        assert not LINEAR[kernel](x, *held_of(kernel, torch.float32), None, ROWS).requires_grad


def test_a_second_derivative_is_refused(trained: Tensor) -> None:
    operator, x, *given = operands(trained)
    (gradient,) = torch.autograd.grad(operator(x, *given).square().sum(), x, create_graph=True)
    with pytest.raises(SparseError, match="ask for no second derivative of a sparse layer"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kernel", KERNELS)
def test_who_listens_to_torch_hears_of_products(kernel: Kernel) -> None:
    """They go past the dispatcher only where nobody does."""
    given = [torch.randn(3, COLUMNS), *held_of(kernel, torch.float32), None, ROWS]
    heard = []

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            heard.append(operator.name())
            return operator(*arguments, **(named or {}))

    with Listens():
        product = LINEAR[kernel](*given)
    assert f"hpcprune::{kernel}_linear" in heard
    with torch.profiler.profile() as profiled:
        LINEAR[kernel](*given)
    assert f"hpcprune::{kernel}_linear" in {each.key for each in profiled.key_averages()}
    traced = torch.jit.trace(lambda x: LINEAR[kernel](x, *given[1:]), given[0], check_trace=False)
    assert f"hpcprune::{kernel}_linear" in str(traced.graph)
    assert torch.equal(traced(given[0]), product) and torch.equal(LINEAR[kernel](*given), product)
