"""The products that an operation of torch takes, and what they cost: by torch's formulas, by ours where it has none.

Ours are for fused recurrent layers (oneDNN, cuDNN, MIOpen), products with a vector or a sparse matrix, attention on the
CPU, bilinear forms, and additions by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["is_product", "products"]

aten = torch.ops.aten

# FLOPs, and the tensors that are multiplied with one another.
Product = tuple[int, Sequence[Tensor]]


def is_product(operation: Any) -> bool:
    """Whether there is a formula for an operation."""
    return operation in _OWN or operation in flop_registry


def products(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    """The products that an operation takes: mostly one, by torch's formula for it."""
    if operation in _OWN:
        return _OWN[operation](args, out)
    operands = args[1:3] if operation in (aten.addmm, aten.baddbmm) else args[:2]  # without what is only added
    if operands[0].layout != torch.strided:
        return _of_sparse(operands, out)
    return [(flop_registry[operation](*args, **kwargs, out_val=out), operands)]


def _with_vector(args: tuple[Any, ...], out: Tensor) -> list[Product]:
    """mv, addmv, dot: every element of the first factor is used once."""
    *_, matrix, vector = (arg for arg in args[:3] if isinstance(arg, Tensor))
    return [(2 * matrix.numel(), (matrix, vector))]


def _batches(args: tuple[Any, ...], out: Tensor) -> list[Product]:
    """addbmm: the sum over batches of (m, k) @ (k, n)."""
    left, right = args[1:3]
    return [(2 * left.numel() * right.shape[2], (left, right))]


def _attention(args: tuple[Any, ...], out: Any) -> list[Product]:
    """Attention on the CPU, as torch counts it on other devices: every query with every key, causal or not."""
    query, key, value = args[:3]
    flops = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return [(flops, (query, key, value))]


def _bilinear(args: tuple[Any, ...], out: Tensor) -> list[Product]:
    """nn.Bilinear, x1[b, i] * w[o, i, j] * x2[b, j]: two multiplications and an addition a term."""
    left, weight, right = args[:3]
    return [(3 * left.shape[0] * weight.numel(), (left, weight, right))]


def _recurrent(args: tuple[Any, ...], out: Any) -> list[Product]:
    """Fused recurrent layers: every matrix (input, hidden, projection; all gates) is used once a step and sequence."""
    steps, *rest = args
    weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:2]
    used = math.prod(steps.shape[:-1])
    return [(2 * used * weight.numel(), (weight,)) for weight in weights if weight.dim() == 2]


def _of_sparse(args: tuple[Any, ...], out: Tensor) -> list[Product]:
    """A sparse matrix times a dense one: every value that is stored, with a row."""
    sparse, dense = args[-2:]  # without what is only added
    return [(2 * sparse._nnz() * dense.shape[-1], (sparse, dense))]


def _messages(args: tuple[Any, ...], out: Tensor) -> list[Product]:
    """What is added by index, as messages to the nodes that they go to; booked to the graph that the index is of."""
    _, _, index, added = args[:4]
    return [(2 * added.numel(), (index,))]


_OWN: Mapping[Any, Callable[[tuple[Any, ...], Any], list[Product]]] = {
    aten.mv: _with_vector,
    aten.addmv: _with_vector,
    aten.dot: _with_vector,
    aten.addbmm: _batches,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._trilinear: _bilinear,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent,
    aten.miopen_rnn: _recurrent,
    aten._sparse_addmm: _of_sparse,
    aten.scatter_add: _messages,
    aten.scatter_add_: _messages,
    aten.index_add: _messages,
    aten.index_add_: _messages,
}
