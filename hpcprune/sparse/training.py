"""Retraining with sparse layers: forward, the input's gradient and the survivors' own, all without dense work.

A layer keeps its dense parameter, under its name, for checkpoints and evaluations; while it trains sparse it computes
with its part of the packed vector of survivors instead, which the optimizer steps on. So nothing is gathered from a
dense gradient, and nothing is scattered into a dense weight, until someone wants to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcprune.masks import Masks
from hpcprune.native import launching
from hpcprune.packing import Bits, Packed, survivors_of
from hpcprune.sparse import blocks, bsr, csr, panels
from hpcprune.sparse.choose import Call, time_in_turns, watched_inputs
from hpcprune.sparse.cuda_ops import bsr_survivors_linear, csr_survivors_linear
from hpcprune.sparse.kernels import FLOATS, SparseError
from hpcprune.sparse.layers import need_kernels_for, pruned_layers
from hpcprune.sparse.modules import on_gpu
from hpcprune.sparse.operators import autocast, check_last
from hpcprune.sparse.ops import blocks_survivors_linear, panels_survivors_linear
from hpcprune.sparse.patterns import side_of_blocks
from hpcprune.survivors import Segment, Survivors

__all__ = ["SparseTraining", "faster_layers", "operator_of"]

MARGIN = 0.9  # of the dense layer's time, below which sparse counts as faster


class SparseTraining:
    """The layers of a model that compute with `survivors`' leaves, until `close`."""

    def __init__(self, model: nn.Module, survivors: Survivors) -> None:
        self._layers: list[nn.Linear] = []
        for segment in survivors:
            if segment.leaf is not None:
                layer = model.get_submodule(segment.name.rpartition(".")[0])
                assert type(layer) is nn.Linear and isinstance(segment.packing, Packed)
                product = _product_with(segment.packing.bits, layer)
                vars(layer).update(_leaf=segment.leaf, _segment=segment, _product=product)
                layer.__class__ = _TrainsSparse
                self._layers.append(layer)

    def close(self) -> None:
        """The layers compute with their dense parameters again, which are to be unpacked before."""
        for layer in self._layers:
            layer.__class__ = nn.Linear
            for name in _TrainsSparse.OWN:
                del vars(layer)[name]
        self._layers = []


class _TrainsSparse(nn.Linear):
    """A Linear layer while it trains sparse. What is copied or saved of it is a dense one with the weights of now."""

    OWN = "_leaf", "_segment", "_product"  # of the training, and no copy's

    _leaf: Tensor
    _segment: Segment
    _product: Callable[[Tensor, Tensor | None, Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self._product(self._leaf, self.bias, input)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense parameter with the weights of now: for code that reads it, as torch's fused layers do."""
        self._segment.unpack(self._leaf)
        return self._segment.parameter

    def _save_to_state_dict(self, *arguments: Any, **named: Any) -> None:
        self._segment.unpack(self._leaf)
        super()._save_to_state_dict(*arguments, **named)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """How copy and pickle take it apart."""
        self._segment.unpack(self._leaf)
        dense = {name: value for name, value in vars(self).items() if name not in self.OWN}
        return nn.Linear, (1, 1, False, "meta"), dense  # of no weights, which would be drawn at random


def _product_with(bits: Bits, layer: nn.Linear) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """The layer's product as a function of its survivors, its bias and x."""
    operator, layouts = operator_of(bits, layer.weight.detach())

    def product(survivors: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        check_last(x, layer.in_features)
        found: Tensor = operator(autocast(x, survivors.dtype), survivors, bias, *layouts)
        return found

    return product


def operator_of(bits: Bits, weight: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The operator that trains a layer of such a weight, and its operands after the bias: the layouts of W and W^T."""
    if weight.device.type == launching.DEVICE:
        return _operator_on_gpu(bits, weight)
    rows, columns = weight.shape
    side = side_of_blocks(bits, rows, columns)
    if side is None:
        own, across = (panels.lay_out(bits, rows, columns, transposed=way) for way in (False, True))
        return panels_survivors_linear, (own.layout, own.order, across.layout, across.order, rows)
    cut, turned = (blocks.lay_out(bits, rows, columns, side, transposed=way) for way in (False, True))
    layouts = cut.start, cut.column, cut.order, turned.start, turned.column, turned.order
    return blocks_survivors_linear, (*layouts, rows)


def _operator_on_gpu(bits: Bits, weight: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Never run on a GPU, but by the emulator."""
    (rows, columns), device = weight.shape, weight.device
    side = side_of_blocks(bits, rows, columns) if weight.dtype == torch.bfloat16 else None
    if side is None:
        own, across = (csr.lay_out(bits, rows, columns, device, transposed=way) for way in (False, True))
        lines = own.start, own.column, own.row_order, across.start, across.column, across.row_order
        return csr_survivors_linear, (*lines, across.order)
    cut, turned = (bsr.lay_out(bits, rows, columns, side, device, transposed=way) for way in (False, True))
    layouts = cut.start, cut.row, cut.column, cut.order, turned.start, turned.column, turned.order
    return bsr_survivors_linear, (*layouts, rows, columns)


def faster_layers(model: nn.Module, masks: Masks, step: Callable[[], object]) -> list[str]:
    """The parameters of pruned Linear layers that train faster sparse, each by itself, forward and backward.

    Args:
        step: runs the model forward (and backward, if it likes) on what training will give it; called once in any case.
    """
    layers = {name: layer for name, layer in pruned_layers(model, masks).items() if _can_be_sparse(layer)}
    inputs = watched_inputs(layers, step)
    try:
        need_kernels_for(layers.values())
    except SparseError:
        return []
    return [name for name, layer in layers.items() if inputs[name] and _faster(layer, masks, name, inputs[name])]


def _can_be_sparse(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.requires_grad
        and (module.weight.device.type == "cpu" or on_gpu(module))
        and module.weight.dtype in FLOATS
    )


def _faster(layer: nn.Linear, masks: Masks, name: str, calls: Collection[Call]) -> bool:
    weight = layer.weight.detach().requires_grad_()
    survivors = survivors_of(weight.detach(), masks.bits(name)).requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().requires_grad_()
    product = partial(_product_with(masks.bits(name), layer), survivors, bias)

    def there_and_back(layer: Callable[[Tensor], Tensor], *parameters: Tensor) -> None:
        for call in calls:
            call.x.requires_grad_()
            y = call.of(layer)
            torch.autograd.grad(y, [call.x, *parameters], torch.ones_like(y))

    biases = [] if bias is None else [bias]

    def dense() -> None:
        there_and_back(lambda x: functional.linear(x, weight, bias), weight, *biases)

    def sparse() -> None:
        there_and_back(product, survivors, *biases)

    dense_seconds, sparse_seconds = time_in_turns(dense, sparse)
    return sparse_seconds < MARGIN * dense_seconds
