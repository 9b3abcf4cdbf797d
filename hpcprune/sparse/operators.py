"""What sparse layers and operators share: x checked, cast, laid flat and back; how torch gets to know operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hpcprune.sparse.kernels import FLOATS, SparseError

__all__ = [
    "Operator",
    "autocast",
    "called",
    "check_last",
    "compute_on",
    "define",
    "flat",
    "float_bias",
    "gradient_like",
    "of_bias",
    "of_survivors",
    "product_like",
    "refuse_gradients",
    "seen_called",
    "shaped",
]

Operator = tuple[str, Any, Any]  # its schema, what computes it, what knows its result's shape


def autocast(x: Tensor, weights: torch.dtype) -> Tensor:
    """x as autocast has it where it is on; of the weights' dtype where that is float16, which no kernel takes."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    chosen = torch.get_autocast_dtype(x.device.type)
    return x.to(chosen if chosen in FLOATS else weights)


def check_last(x: Tensor, columns: int) -> None:
    """Raise SparseError where x is not [..., columns]: a kernel would read what is not x's."""
    if x.dim() == 0 or x.shape[-1] != columns:
        raise SparseError(f"the input is {[*x.shape]}; a layer of {columns} inputs takes [..., {columns}]")


def seen_called(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A hook that does nothing: with it torch's fused layers call a layer, where they else read its dense weight."""


def flat(x: Tensor) -> Tensor:
    """x as [rows, columns], contiguous."""
    # A small layer takes 10 us, of which calls that do nothing would be 3.
    if x.dim() == 2 and x.is_contiguous():
        return x
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped(product: Tensor, x: Tensor) -> Tensor:
    """A product with `flat(x)`, with the dimensions that x has before its last."""
    return product if x.dim() == 2 else product.view(*x.shape[:-1], product.shape[-1])


def float_bias(bias: Tensor | None) -> Tensor | None:
    """As kernels take it."""
    return None if bias is None else bias.float()


def of_bias(gradient: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias from that of the product."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)


def of_survivors(sampled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator by a kernel's `sampled`, for x of any number of dimensions: (x, gradient, *layout)."""

    def operator(x: Tensor, gradient: Tensor, *layout: Any) -> Tensor:
        return sampled(flat(x), flat(gradient.to(x.dtype)), *layout)

    return operator


def product_like(x: Tensor, rows: int) -> Tensor:
    """For fake tensors: a product's shape."""
    return x.new_empty(*x.shape[:-1], rows)


def gradient_like(x: Tensor, survivors: int) -> Tensor:
    """For fake tensors: that of the survivors' gradient."""
    return x.new_empty(survivors, dtype=torch.float32)


def called(name: str, compute: Callable[..., Tensor], others: slice) -> Callable[..., Tensor]:
    """An operator past torch's dispatcher where only a kernel on the CPU is to see the call.

    The dispatcher takes as long as a small product. It is needed by compilers, tracers, profilers, modes and gradients.

    Args:
        others: which operands after the first may, as it, be of another class or on a GPU, or want a gradient.
    """
    operator = getattr(torch.ops.hpcprune, name)

    def call(x: Tensor, *operands: Any) -> Tensor:
        seen = (
            torch.compiler.is_compiling()
            or torch._C._autograd._profiler_enabled()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or not _are_plain(x, *operands[others])
        )
        return operator(x, *operands) if seen else compute(x, *operands)

    return call


def _are_plain(*operands: Tensor | None) -> bool:
    """Whether a kernel on the CPU can take them, and no gradient is wanted of any."""
    graded = torch.is_grad_enabled()
    for each in operands:
        if each is not None and (type(each) is not Tensor or not each.is_cpu or (graded and each.requires_grad)):
            return False
    return True


def refuse_gradients(library: Any, operators: Iterable[str]) -> None:
    """Have operators raise where a gradient is asked of them, which torch would else take to be zero."""

    def refuse(name: str) -> Callable[..., None]:
        def backward(*_: Any) -> None:
            raise SparseError(
                f"hpcprune::{name} knows no gradient: run inference under torch.no_grad(), train with the dense layer "
                "or with retrain.sparse, and ask for no second derivative of a sparse layer"
            )

        return backward

    registry: Any = torch.library
    for name in operators:
        registry.register_autograd(f"hpcprune::{name}", refuse(name), lib=library)


def define(library: Any, operators: Iterable[Operator]) -> None:
    """Tell torch of operators and of their results' shapes; it forgets them when the torch.library.Library goes."""
    registry: Any = torch.library  # it has no types
    for schema, _, like in operators:
        library.define(schema)
        registry.register_fake(f"hpcprune::{_name(schema)}")(like)


def compute_on(library: Any, operators: Iterable[Operator], device: str) -> None:
    """Have operators computed on a kind of device, for as long as the torch.library.Library lives."""
    for schema, compute, _ in operators:
        library.impl(_name(schema), compute, device)


def _name(schema: str) -> str:
    return schema.partition("(")[0]
