"""The sparse products as torch operators, for torch.ops.hpcprune.

They are registered with torch.library, so that autograd, torch.compile and fake tensors know them. Those named after
how a matrix is held (`panels_linear`, `bitmap_linear`, `blocks_linear`, `two_of_four_linear`, `panels_conv2d`) are for
inference: they know no gradient, and so take no detour. `survivors_linear` is for training: its weights are the packed
survivors, and so is their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcprune.sparse import bitmap, blocks, panels, two_of_four
from hpcprune.sparse.operators import (
    Operator,
    called,
    compute_on,
    define,
    flat,
    float_bias,
    of_bias,
    refuse_gradients,
    shaped,
)
from hpcprune.sparse.panels import Geometry, convolve, refill, sampled

__all__ = [
    "bitmap_linear",
    "blocks_linear",
    "panels_conv2d",
    "panels_linear",
    "survivors_linear",
    "two_of_four_linear",
]


def _linear(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator by a kernel's `multiply`, for x of any number of dimensions: (x, *matrix, value, bias, rows)."""

    def product(x: Tensor, *operands: Any) -> Tensor:
        bias = operands[-2]
        # A small product takes 3 us, as would calls that do nothing.
        if x.dim() == 2 and x.is_contiguous() and (bias is None or bias.dtype is torch.float32):
            return multiply(x, *operands)
        *matrix, _, rows = operands
        return shaped(multiply(flat(x), *matrix, float_bias(bias), rows), x)

    return product


class _Held(NamedTuple):
    """How a matrix is held beside its weights, as an operator's arguments; and the operator's computation."""

    matrix: str
    compute: Callable[..., Tensor]


_LINEAR = {
    "panels": _Held("Tensor layout", _linear(panels.multiply)),
    "bitmap": _Held("Tensor bits, Tensor first", _linear(bitmap.multiply)),
    "blocks": _Held("Tensor start, Tensor column", _linear(blocks.multiply)),
    "two_of_four": _Held("Tensor code", _linear(two_of_four.multiply)),
}


def _conv2d(x: Tensor, layout: Tensor, value: Tensor, bias: Tensor | None, rows: int, *geometry: list[int]) -> Tensor:
    images = x.reshape(-1, *x.shape[-3:]).contiguous()
    product = convolve(images, layout, value, float_bias(bias), rows, Geometry(*geometry))
    return product.view(*x.shape[:-3], *product.shape[-3:])


def _sampled(x: Tensor, gradient: Tensor, layout: Tensor, order: Tensor, survivors: int) -> Tensor:
    return sampled(flat(x), flat(gradient.to(x.dtype)), layout, order, survivors)


def _survivors_linear(
    x: Tensor,
    survivors: Tensor,
    bias: Tensor | None,
    layout: Tensor,
    order: Tensor,
    layout_t: Tensor,
    order_t: Tensor,
    rows: int,
) -> Tensor:
    return _LINEAR["panels"].compute(x, layout, refill(order, survivors), bias, rows)


def _product_like(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], operands[-1])


def _conv2d_like(
    x: Tensor, layout: Tensor, value: Tensor, bias: Tensor | None, rows: int, *geometry: list[int]
) -> Tensor:
    return x.new_empty(*x.shape[:-3], rows, *Geometry(*geometry).out(x.shape[-2:]))


def _value_like(order: Tensor, survivors: Tensor) -> Tensor:
    return survivors.new_empty(order.shape)


def _gradient_like(x: Tensor, gradient: Tensor, layout: Tensor, order: Tensor, survivors: int) -> Tensor:
    return x.new_empty(survivors, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, survivors, bias, layout, order, layout_t, order_t, _ = inputs
    ctx.save_for_backward(x, survivors, bias, layout, order, layout_t, order_t)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, survivors, bias, layout, order, layout_t, order_t = ctx.saved_tensors
    needs_x, needs_survivors, needs_bias, *_ = ctx.needs_input_grad
    of_x = of_survivors = of_its_bias = None
    if needs_x:
        of_x = panels_linear(gradient, layout_t, _refill_panels(order_t, survivors), None, x.shape[-1])
    if needs_survivors:
        of_survivors = _sampled_panels(x, gradient, layout, order, survivors.shape[0]).to(survivors.dtype)
    if needs_bias:
        of_its_bias = of_bias(gradient, bias)
    return of_x, of_survivors, of_its_bias, None, None, None, None, None


OPERATORS: tuple[Operator, ...] = (
    *(
        (
            f"{kernel}_linear(Tensor x, {held.matrix}, Tensor value, Tensor? bias, int rows) -> Tensor",
            held.compute,
            _product_like,
        )
        for kernel, held in _LINEAR.items()
    ),
    (
        "panels_conv2d(Tensor x, Tensor layout, Tensor value, Tensor? bias, int rows, int[] kernel, int[] stride, "
        "int[] padding, int[] dilation) -> Tensor",
        _conv2d,
        _conv2d_like,
    ),
    ("panels_refill(Tensor order, Tensor survivors) -> Tensor", refill, _value_like),
    (
        "panels_sampled(Tensor x, Tensor gradient, Tensor layout, Tensor order, int survivors) -> Tensor",
        _sampled,
        _gradient_like,
    ),
    (
        "survivors_linear(Tensor x, Tensor survivors, Tensor? bias, Tensor layout, Tensor order, Tensor layout_t, "
        "Tensor order_t, int rows) -> Tensor",
        _survivors_linear,
        _product_like,
    ),
)
_torch: Any = torch.library  # it has no types
_library = _torch.Library("hpcprune", "DEF")
define(_library, OPERATORS)
compute_on(_library, OPERATORS, "CPU")
_torch.register_autograd("hpcprune::survivors_linear", _backward, setup_context=_keep)

_WITHOUT_GRADIENT = ("panels_conv2d", "panels_refill", "panels_sampled", *(f"{kernel}_linear" for kernel in _LINEAR))
refuse_gradients(_library, _WITHOUT_GRADIENT)


panels_conv2d = torch.ops.hpcprune.panels_conv2d
survivors_linear = torch.ops.hpcprune.survivors_linear
bitmap_linear, blocks_linear, panels_linear, two_of_four_linear = (
    called(f"{kernel}_linear", _LINEAR[kernel].compute, -3) for kernel in ("bitmap", "blocks", "panels", "two_of_four")
)
_refill_panels, _sampled_panels = called("panels_refill", refill, 0), called("panels_sampled", _sampled, 0)
