"""Snapshots: a model under masks, as the plain data that a checkpoint holds, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcprune.checkpoint import LayerState, State, StepState, TensorState, read_model
from hpcprune.masks import Masks
from hpcprune.tensors import dtype_name, to_array, to_tensor
from hpcprune.weights import fit_weights, weights_of

__all__ = ["load_buffers", "own_buffers", "restore_masks", "restore_model", "snapshot", "take_result"]


def snapshot(
    model: nn.Module,
    masks: Masks,
    about: Mapping[str, Any],
    attributes: Mapping[str, Mapping[str, str | float]],
    optimizer: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> State:
    """The state of a run as a checkpoint holds it. Arrays share the model's memory where they can.

    Args:
        about: what describes the run, in JSON's types.
        attributes: by layer, what a reader should see beside it.
        optimizer: the optimizer's tensors by name; empty in a result.
        buffers: the model's buffers, the same on every rank.
        own: this rank's own, under "buffers/<name>" (as it trains with them) and "exchange/<name>"; empty in a result.
    """
    parameters = dict(model.named_parameters())
    layers = {}
    for layer in masks.layers:
        pruned = masks.survivors[layer.name] < layer.weights
        layers[layer.name] = LayerState(
            shape=layer.shape,
            dtype=layer.dtype,
            values=to_array(parameters[layer.name]).reshape(-1),
            mask=masks.bits(layer.name) if pruned else None,
            attributes=dict(attributes.get(layer.name, {})),
        )
    tensors: dict[str, Tensor] = {f"parameters/{name}": p for name, p in parameters.items() if name not in layers}
    tensors |= {f"buffers/{name}": value for name, value in buffers.items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer.items()}
    return State(
        about=dict(about),
        layers=layers,
        tensors={name: _stored(value) for name, value in tensors.items()},
        own={name: _stored(value) for name, value in own.items()},
    )


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's buffers that a state dict would hold, copied."""
    kept = model.state_dict()
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def load_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set the model's buffers to what `own_buffers` gave."""
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def restore_masks(step: StepState | State, masks: Masks) -> Masks:
    """The masks of a step, or of a model, for the layers of `masks`."""
    bits = []
    for layer in masks.layers:
        stored = step.layers[layer.name].mask
        bits.append(masks.full([layer]).bits(layer.name) if stored is None else np.ascontiguousarray(stored))
    return Masks(masks.layers, bits)


def take_result(path: Path, model: nn.Module, masks: Masks) -> tuple[Masks, dict[str, float]]:
    """Set the model to that of a result's file; its masks, for the layers of `masks`, and its thresholds by layer."""
    state = read_model(path)
    fit_weights(model, weights_of(state), path)
    known = {name: layer.attributes.get("threshold") for name, layer in state.layers.items()}
    return restore_masks(state, masks), {name: float(each) for name, each in known.items() if each is not None}


@torch.no_grad()
def restore_model(
    step: StepState, model: nn.Module, rank: int, ranks: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Set the model's weights and buffers to a step's, and return the optimizer's tensors and this rank's exchange's.

    On as many ranks as wrote the step each takes its own buffers and what its exchange held back; on another number all
    take the agreed buffers, and nothing is held back.
    """
    for name, parameter in model.named_parameters():
        if name in step.layers:
            layer = step.layers[name]
            parameter.copy_(to_tensor(layer.values, layer.dtype).reshape(layer.shape))
        else:
            stored = step.tensors[f"parameters/{name}"]
            parameter.copy_(to_tensor(stored.array, stored.dtype))
    own = step.own[rank] if ranks == len(step.own) else {}
    load_buffers(model, _tensors(step.tensors, "buffers/") | _tensors(own, "buffers/"))
    return _tensors(step.tensors, "optimizer/"), _tensors(own, "exchange/")


def _tensors(stored: Mapping[str, TensorState], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by what follows it."""
    return {
        key.removeprefix(prefix): to_tensor(value.array, value.dtype)
        for key, value in stored.items()
        if key.startswith(prefix)
    }


def _stored(tensor: Tensor) -> TensorState:
    return TensorState(to_array(tensor), dtype_name(tensor))
