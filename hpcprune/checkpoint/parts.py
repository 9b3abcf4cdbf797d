"""The parts of a step: what each rank writes, and the index; copied where what they come from may change.

A rank holds only what it writes itself: the survivors of its spans with their masks' bits, its share of the other
tensors, and its own. So a copied step costs memory for one copy of the survivors over all ranks together, not for each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from hpcprune.checkpoint.block import Block
from hpcprune.checkpoint.file import Sink, write_file
from hpcprune.checkpoint.format import FORMAT, STORAGE, State, TensorState, escape
from hpcprune.checkpoint.portion import Portion, check_layer, portion_of
from hpcprune.checkpoint.steps import INDEX, shard_name
from hpcprune.checkpoint.write import describe_layer, put_about, put_attributes, put_layer, put_own, put_tensors

__all__ = ["Index", "Part", "SpanLike", "take_index", "take_part", "write_index", "write_part"]


class SpanLike(Protocol):
    """The weights `start` to `stop` of layer number `layer` in global order."""

    @property
    def layer(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class Part:
    """What one rank writes into a step."""

    step: int
    rank: int
    ranks: int
    layers: list[Portion]
    tensors: dict[str, TensorState]
    own: dict[str, TensorState]


def take_part(step: int, state: State, shards: Sequence[Sequence[SpanLike]], rank: int, *, copied: bool = True) -> Part:
    """What a rank writes; with `copied`, in memory of its own.

    Raises:
        CheckpointError: a layer's parts do not fit each other.
    """
    names = list(state.layers)
    for name in names:
        check_layer(name, state.layers[name])
    layers = []
    for number, start, stop in _merge(shards[rank]):
        name = names[number]
        portion = portion_of(name, number, state.layers[name], start, stop)
        layers.append(portion.copy() if copied else portion)
    tensors, own = _deal_tensors(state, shards)[rank], state.own
    if copied:
        tensors, own = _copied(tensors), _copied(own)
    return Part(step, rank, len(shards), layers, tensors, own)


def write_part(folder: Path, part: Part) -> Block:
    """Write a rank's file into a step's folder; what its first lines say."""

    def fill(file: h5py.File, sink: Sink) -> None:
        put_attributes(file, {"format": FORMAT, "kind": "shard"})
        put_attributes(file.create_group("shard"), {"step": part.step, "rank": part.rank, "ranks": part.ranks})
        for portion in part.layers:
            put_layer(file, sink, portion)
        put_tensors(file, sink, part.tensors)
        put_own(file, sink, part.own)

    return write_file(folder / shard_name(part.rank), "shard", fill)


@dataclass(frozen=True)
class Index:
    """What the index says beside the ranks' files: what describes the run, and its layers."""

    step: int
    about: dict[str, Any]
    layers: dict[str, dict[str, Any]]


def take_index(step: int, state: State) -> Index:
    """Copy what the index says of a state."""
    layers = {name: describe_layer(name, order, layer) for order, (name, layer) in enumerate(state.layers.items())}
    return Index(step, copy.deepcopy(state.about), layers)


def write_index(folder: Path, index: Index, blocks: Sequence[Block]) -> None:
    """Write the index into a step's folder; `blocks` are what `write_part` gave on each rank."""

    def fill(file: h5py.File, sink: Sink) -> None:
        put_attributes(file, {"format": FORMAT, "kind": "index"})
        put_about(file, index.about)
        for name, fields in index.layers.items():
            put_attributes(file.require_group("layers").create_group(escape(name)), fields)
        shards = file.create_group("shards")
        put_attributes(shards, {"step": index.step, "ranks": len(blocks)})
        for rank, block in enumerate(blocks):
            put_attributes(shards.create_group(shard_name(rank)), {"bytes": block.bytes, "sha256": block.sha256})

    write_file(folder / INDEX, "index", fill)


def _merge(spans: Sequence[SpanLike]) -> list[tuple[int, int, int]]:
    """The spans as (layer, start, stop), in order, those that touch made one."""
    merged: list[tuple[int, int, int]] = []
    for span in sorted((span.layer, span.start, span.stop) for span in spans if span.start < span.stop):
        if merged and merged[-1][0] == span[0] and merged[-1][2] == span[1]:
            merged[-1] = (span[0], merged[-1][1], span[2])
        else:
            merged.append(span)
    return merged


def _deal_tensors(state: State, shards: Sequence[Sequence[SpanLike]]) -> list[dict[str, TensorState]]:
    """Which rank writes which of the other tensors: the largest first, to whom has the least to write so far."""
    sizes = [np.dtype(STORAGE[layer.dtype]).itemsize for layer in state.layers.values()]
    loads = [sum((span.stop - span.start) * sizes[span.layer] for span in shard) for shard in shards]
    parts: list[dict[str, TensorState]] = [{} for _ in shards]
    for key, tensor in sorted(state.tensors.items(), key=lambda item: (-item[1].array.nbytes, item[0])):
        rank = min(range(len(parts)), key=lambda rank: (loads[rank], rank))
        parts[rank][key] = tensor
        loads[rank] += tensor.array.nbytes
    return parts


def _copied(tensors: dict[str, TensorState]) -> dict[str, TensorState]:
    return {key: TensorState(np.array(tensor.array), tensor.dtype) for key, tensor in tensors.items()}
