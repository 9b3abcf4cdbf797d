"""The sparse products as torch operators, for torch.ops.hpcprune.

They are registered with torch.library, so that autograd, torch.compile and fake tensors know them. Those named after
how a matrix is held (`panels_linear`, `bitmap_linear`, `blocks_linear`, `two_of_four_linear`, `panels_conv2d`) are for
inference: a gradient is refused. `panels_survivors_linear` and `blocks_survivors_linear` are for training: their
weights are the packed survivors, and so is their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcprune.sparse import bitmap, blocks, panels, two_of_four
from hpcprune.sparse.geometry import Geometry
from hpcprune.sparse.operators import (
    Operator,
    called,
    compute_on,
    define,
    flat,
    float_bias,
    gradient_like,
    of_bias,
    of_survivors,
    product_like,
    refuse_gradients,
    shaped,
)
from hpcprune.sparse.panels import convolve, refill

__all__ = [
    "bitmap_linear",
    "blocks_linear",
    "blocks_survivors_linear",
    "panels_conv2d",
    "panels_linear",
    "panels_survivors_linear",
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


class _Trains(NamedTuple):
    """A kernel that trains: the tensors of its layouts before `order`, and the gradient of the survivors."""

    tensors: tuple[str, ...]
    sampled: Callable[..., Tensor]

    @property
    def arguments(self) -> str:
        """Of an operator, for a layout."""
        return ", ".join(f"Tensor {name}" for name in (*self.tensors, "order"))


_TRAINS = {
    "panels": _Trains(("layout",), of_survivors(panels.sampled)),
    "blocks": _Trains(("start", "column"), of_survivors(blocks.sampled)),
}


def _survivors_linear(kernel: str) -> Callable[..., Tensor]:
    """The operator (x, survivors, bias, W's layout, W^T's layout, rows), layouts with their order."""
    linear, tensors = _LINEAR[kernel].compute, len(_TRAINS[kernel].tensors)

    def product(x: Tensor, survivors: Tensor, bias: Tensor | None, *layouts: Any) -> Tensor:
        own, order, rows = layouts[:tensors], layouts[tensors], layouts[-1]
        return linear(x, *own, refill(order, survivors), bias, rows)

    return product


def _conv2d_like(
    x: Tensor, layout: Tensor, value: Tensor, bias: Tensor | None, rows: int, *geometry: list[int]
) -> Tensor:
    return x.new_empty(*x.shape[:-3], rows, *Geometry(*geometry).out(x.shape[-2:]))


def _value_like(order: Tensor, survivors: Tensor) -> Tensor:
    return survivors.new_empty(order.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(kernel: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Of `_survivors_linear`."""
    linear, of_weights = _called_linear(kernel), called(f"{kernel}_sampled", _TRAINS[kernel].sampled, slice(1))
    refilled = called("refill", refill, slice(1))

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, survivors, bias, *layouts = ctx.saved_tensors
        needs_x, needs_survivors, needs_bias, *_ = ctx.needs_input_grad
        own, (*across, order) = layouts[: len(layouts) // 2], layouts[len(layouts) // 2 :]
        of_x = of_survivors = of_its_bias = None
        if needs_x:
            of_x = linear(gradient, *across, refilled(order, survivors), None, x.shape[-1])
        if needs_survivors:
            of_survivors = of_weights(x, gradient, *own, survivors.shape[0]).to(survivors.dtype)
        if needs_bias:
            of_its_bias = of_bias(gradient, bias)
        return of_x, of_survivors, of_its_bias, *[None] * (len(layouts) + 1)

    return backward


def _called_linear(kernel: str) -> Callable[..., Tensor]:
    return called(f"{kernel}_linear", _LINEAR[kernel].compute, slice(-3, -1))  # weights and bias


OPERATORS: tuple[Operator, ...] = (
    *(
        (
            f"{kernel}_linear(Tensor x, {held.matrix}, Tensor value, Tensor? bias, int rows) -> Tensor",
            held.compute,
            lambda x, *operands: product_like(x, operands[-1]),
        )
        for kernel, held in _LINEAR.items()
    ),
    (
        "panels_conv2d(Tensor x, Tensor layout, Tensor value, Tensor? bias, int rows, int[] kernel, int[] stride, "
        "int[] padding, int[] dilation) -> Tensor",
        _conv2d,
        _conv2d_like,
    ),
    ("refill(Tensor order, Tensor survivors) -> Tensor", refill, _value_like),
    *(
        (
            f"{kernel}_sampled(Tensor x, Tensor gradient, {trains.arguments}, int survivors) -> Tensor",
            trains.sampled,
            lambda x, *operands: gradient_like(x, operands[-1]),
        )
        for kernel, trains in _TRAINS.items()
    ),
    *(
        (
            f"{kernel}_survivors_linear(Tensor x, Tensor survivors, Tensor? bias, {trains.arguments}, "
            f"{trains.arguments.replace(',', '_t,')}_t, int rows) -> Tensor",
            _survivors_linear(kernel),
            lambda x, *operands: product_like(x, operands[-1]),
        )
        for kernel, trains in _TRAINS.items()
    ),
)
_torch: Any = torch.library  # it has no types
_library = _torch.Library("hpcprune", "DEF")
define(_library, OPERATORS)
compute_on(_library, OPERATORS, "CPU")
refuse_gradients(
    _library,
    (
        "panels_conv2d",
        "refill",
        *(f"{kernel}_linear" for kernel in _LINEAR),
        *(f"{kernel}_sampled" for kernel in _TRAINS),
    ),
)
for _kernel in _TRAINS:
    _torch.register_autograd(f"hpcprune::{_kernel}_survivors_linear", _backward(_kernel), setup_context=_keep)

panels_conv2d = torch.ops.hpcprune.panels_conv2d
panels_survivors_linear = torch.ops.hpcprune.panels_survivors_linear
blocks_survivors_linear = torch.ops.hpcprune.blocks_survivors_linear
bitmap_linear, blocks_linear, panels_linear, two_of_four_linear = map(
    _called_linear, ("bitmap", "blocks", "panels", "two_of_four")
)
