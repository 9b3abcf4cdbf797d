"""The sparse products on a GPU as torch operators: those of CSR, bitmap tiles and BSR.

As in `ops`, `csr_linear`, `bitmap_tiles_linear` and `bsr_linear` are for inference: a gradient is refused.
`csr_survivors_linear` and `bsr_survivors_linear` are for training, with the packed survivors as weights and their own
gradient alone. They are registered for CUDA alone, with `register` for what a test has in its place.

None of this was ever run on a GPU; tests run it with the emulator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpcprune.sparse import bitmap_tiles, bsr, csr
from hpcprune.sparse.operators import (
    Operator,
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

__all__ = [
    "bitmap_tiles_linear",
    "bsr_linear",
    "bsr_survivors_linear",
    "csr_linear",
    "csr_survivors_linear",
    "register",
]


def _csr(
    x: Tensor, start: Tensor, column: Tensor, row_order: Tensor, value: Tensor, bias: Tensor | None, columns: int
) -> Tensor:
    return shaped(csr.multiply(flat(x), start, column, row_order, value, float_bias(bias), columns), x)


def _csr_survivors(
    x: Tensor,
    survivors: Tensor,
    bias: Tensor | None,
    start: Tensor,
    column: Tensor,
    row_order: Tensor,
    start_t: Tensor,
    column_t: Tensor,
    row_order_t: Tensor,
    order_t: Tensor,
) -> Tensor:
    return _csr(x, start, column, row_order, survivors, bias, start_t.shape[0] - 1)


def _bitmap_tiles(
    x: Tensor, start: Tensor, groups: Tensor, bias: Tensor | None, rows: int, columns: int, largest: int
) -> Tensor:
    return shaped(bitmap_tiles.multiply(flat(x), start, groups, float_bias(bias), rows, columns, largest), x)


def _bsr(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    return shaped(bsr.multiply(flat(x), start, column, value, float_bias(bias), rows, columns), x)


def _bsr_survivors(
    x: Tensor,
    survivors: Tensor,
    bias: Tensor | None,
    start: Tensor,
    row: Tensor,
    column: Tensor,
    order: Tensor,
    start_t: Tensor,
    column_t: Tensor,
    order_t: Tensor,
    rows: int,
    columns: int,
) -> Tensor:
    return _bsr(x, start, column, bsr.refill(order, survivors), bias, rows, columns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(each for each in inputs if not isinstance(each, int)))
    ctx.sizes = [each for each in inputs if isinstance(each, int)]


def _csr_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, survivors, bias, start, column, _, start_t, column_t, row_order_t, order_t = ctx.saved_tensors
    needs_x, needs_survivors, needs_bias, *_ = ctx.needs_input_grad
    ops = torch.ops.hpcprune
    of_x = of_survivors = of_its_bias = None
    if needs_x:
        value = survivors.index_select(0, order_t)
        of_x = ops.csr_linear(gradient, start_t, column_t, row_order_t, value, None, start.shape[0] - 1)
    if needs_survivors:
        of_survivors = ops.csr_sampled(x, gradient, start, column, x.shape[-1]).to(survivors.dtype)
    if needs_bias:
        of_its_bias = of_bias(gradient, bias)
    return of_x, of_survivors, of_its_bias, *[None] * 7


def _bsr_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, survivors, bias, _, row, column, order, start_t, column_t, order_t = ctx.saved_tensors
    needs_x, needs_survivors, needs_bias, *_ = ctx.needs_input_grad
    rows, columns = ctx.sizes
    ops = torch.ops.hpcprune
    of_x = of_survivors = of_its_bias = None
    if needs_x:
        of_x = ops.bsr_linear(gradient, start_t, column_t, bsr.refill(order_t, survivors), None, columns, rows)
    if needs_survivors:
        of_survivors = ops.bsr_sampled(x, gradient, row, column, order, survivors.shape[0]).to(survivors.dtype)
    if needs_bias:
        of_its_bias = of_bias(gradient, bias)
    return of_x, of_survivors, of_its_bias, *[None] * 9


OPERATORS: tuple[Operator, ...] = (
    (
        "csr_linear(Tensor x, Tensor start, Tensor column, Tensor row_order, Tensor value, Tensor? bias, int columns) "
        "-> Tensor",
        _csr,
        lambda x, start, *_: product_like(x, start.shape[0] - 1),
    ),
    (
        "csr_sampled(Tensor x, Tensor gradient, Tensor start, Tensor column, int columns) -> Tensor",
        of_survivors(csr.sampled),
        lambda x, gradient, start, column, columns: gradient_like(x, column.shape[0]),
    ),
    (
        "csr_survivors_linear(Tensor x, Tensor survivors, Tensor? bias, Tensor start, Tensor column, Tensor row_order, "
        "Tensor start_t, Tensor column_t, Tensor row_order_t, Tensor order_t) -> Tensor",
        _csr_survivors,
        lambda x, survivors, bias, start, *_: product_like(x, start.shape[0] - 1),
    ),
    (
        "bitmap_tiles_linear(Tensor x, Tensor start, Tensor groups, Tensor? bias, int rows, int columns, int largest) "
        "-> Tensor",
        _bitmap_tiles,
        lambda x, start, groups, bias, rows, *_: product_like(x, rows),
    ),
    (
        "bsr_linear(Tensor x, Tensor start, Tensor column, Tensor value, Tensor? bias, int rows, int columns) "
        "-> Tensor",
        _bsr,
        lambda x, start, column, value, bias, rows, columns: product_like(x, rows),
    ),
    (
        "bsr_sampled(Tensor x, Tensor gradient, Tensor row, Tensor column, Tensor order, int survivors) -> Tensor",
        of_survivors(bsr.sampled),
        lambda x, *layout: gradient_like(x, layout[-1]),
    ),
    (
        "bsr_survivors_linear(Tensor x, Tensor survivors, Tensor? bias, Tensor start, Tensor row, Tensor column, "
        "Tensor order, Tensor start_t, Tensor column_t, Tensor order_t, int rows, int columns) -> Tensor",
        _bsr_survivors,
        lambda x, *layout: product_like(x, layout[-2]),
    ),
)
_torch: Any = torch.library  # it has no types


def register(library: Any, device: str) -> None:
    """Have the operators computed on a kind of device, for as long as the torch.library.Library given lives."""
    compute_on(library, OPERATORS, device)


_library = _torch.Library("hpcprune", "FRAGMENT")
define(_library, OPERATORS)
register(_library, "CUDA")
refuse_gradients(_library, ("csr_linear", "csr_sampled", "bitmap_tiles_linear", "bsr_linear", "bsr_sampled"))
_torch.register_autograd("hpcprune::csr_survivors_linear", _csr_backward, setup_context=_keep)
_torch.register_autograd("hpcprune::bsr_survivors_linear", _bsr_backward, setup_context=_keep)

bitmap_tiles_linear = torch.ops.hpcprune.bitmap_tiles_linear
bsr_linear = torch.ops.hpcprune.bsr_linear
bsr_survivors_linear = torch.ops.hpcprune.bsr_survivors_linear
csr_linear = torch.ops.hpcprune.csr_linear
csr_survivors_linear = torch.ops.hpcprune.csr_survivors_linear
