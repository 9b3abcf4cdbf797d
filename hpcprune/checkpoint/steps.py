"""A step of a run on disk: a folder with one file a rank and an index, complete or absent.

The ranks write their files into a folder with a temporary name; rank 0 then writes the index, which names every file
with its bytes and sha256, and gives the folder its name. Whatever happens on the way, on any rank, all ranks learn of
it alike, and the earlier steps stay. A reader puts the whole layers together again from any number of files.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from hpcprune.checkpoint.block import Block
from hpcprune.checkpoint.file import Sink, disk_error, sync_folder, write_file
from hpcprune.checkpoint.format import FORMAT, STORAGE, State, TensorState
from hpcprune.checkpoint.write import (
    check_layer,
    put_about,
    put_attributes,
    put_index_layer,
    put_layer,
    put_own,
    put_tensors,
)
from hpcprune.errors import CheckpointError

__all__ = ["Ranks", "SpanLike", "shard_name", "step_folders", "write_shard", "write_step"]

INDEX = "index.h5"
_STEP = re.compile(r"step-(\d{8,18})(\.replaced)?")


class SpanLike(Protocol):
    """The weights `start` to `stop` of layer number `layer` in global order."""

    @property
    def layer(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Ranks(Protocol):
    """What of hpcprune.world.World is needed here."""

    rank: int
    size: int

    def allgather(self, value: Any, what: str) -> list[Any]: ...
    def bcast(self, value: Any, what: str, root: int = 0) -> Any: ...


def shard_name(rank: int) -> str:
    return f"rank-{rank:04d}.h5"


def write_step(
    root: str | Path, step: int, state: State, shards: Sequence[Sequence[SpanLike]], world: Ranks, keep: int
) -> Path:
    """Write a step, every rank its part; collective.

    Args:
        root: the folder of all steps; made if it is not there.
        step: its number; a step of this number that is there already is replaced once the new one is complete.
        state: the same on all ranks, except for `own`; `about` is rank 0's.
        shards: the spans that each rank writes, the same on all ranks; together every weight once.
        keep: how many steps to keep, this one included; older ones are removed once this one is complete.

    Returns:
        The step's folder.

    Raises:
        CheckpointError: on all ranks alike, if any of them failed. The earlier steps are untouched.
    """
    root, what = Path(root), f"checkpoint of step {step}"
    if keep < 1 or not 0 <= step < 10**18 or len(shards) != world.size:
        raise CheckpointError(
            f"{what}: keep={keep}, {len(shards)} shards for {world.size} ranks; keep at least 1 step, number them from "
            f"0, and give one shard a rank"
        )
    target = root / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial = root / world.bcast(partial.name, what)

    _on_rank_0(world, what, lambda: _prepare(root, partial))
    cause: Exception | None = None
    try:
        outcome: Block | str = write_shard(partial, step, state, shards, world)
    except Exception as error:
        outcome, cause = _describe(error), error
    outcomes = world.allgather(outcome, what)
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if isinstance(text, str)]
    if failures:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        others = f" (and {len(failures) - 1} more ranks failed)" if len(failures) > 1 else ""
        raise CheckpointError(f"{failures[0] if world.size > 1 else failures[0][8:]}{others}") from cause

    def finish() -> None:
        write_file(partial / INDEX, "index", lambda file, _: _fill_index(file, step, state, outcomes))
        _give_name(root, partial, target)
        _remove_old(root, step, keep)

    _on_rank_0(world, what, finish, partial)
    return target


def _on_rank_0(world: Ranks, what: str, action: Callable[[], None], partial: Path | None = None) -> None:
    """Do something on rank 0; if it fails, raise on all ranks, after removing `partial`."""
    failure: str | None = None
    cause: Exception | None = None
    if world.rank == 0:
        try:
            action()
        except Exception as error:
            failure, cause = _describe(error), error
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
    failure = world.bcast(failure, what)
    if failure is not None:
        raise CheckpointError(failure) from cause


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _prepare(root: Path, partial: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise disk_error(root, error) from error


def write_shard(folder: Path, step: int, state: State, shards: Sequence[Sequence[SpanLike]], world: Ranks) -> Block:
    """Write one rank's file into a step's folder; what its first lines say."""
    names = list(state.layers)
    for name in names:
        check_layer(name, state.layers[name])
    tensors = _deal_tensors(state, shards)[world.rank]

    def fill(file: h5py.File, sink: Sink) -> None:
        put_attributes(file, {"format": FORMAT, "kind": "shard"})
        put_attributes(file.create_group("shard"), {"step": step, "rank": world.rank, "ranks": world.size})
        for number, start, stop in _merge(shards[world.rank]):
            put_layer(file, sink, names[number], number, state.layers[names[number]], start, stop)
        put_tensors(file, sink, tensors)
        put_own(file, sink, state.own)

    return write_file(folder / shard_name(world.rank), "shard", fill)


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


def _fill_index(file: h5py.File, step: int, state: State, blocks: Sequence[Block]) -> None:
    put_attributes(file, {"format": FORMAT, "kind": "index"})
    put_about(file, state.about)
    for order, (name, layer) in enumerate(state.layers.items()):
        put_index_layer(file, name, order, layer)
    shards = file.create_group("shards")
    put_attributes(shards, {"step": step, "ranks": len(blocks)})
    for rank, block in enumerate(blocks):
        put_attributes(shards.create_group(shard_name(rank)), {"bytes": block.bytes, "sha256": block.sha256})


def _give_name(root: Path, partial: Path, target: Path) -> None:
    try:
        sync_folder(partial)
        replaced = target.with_name(f"{target.name}.replaced")
        if target.exists():
            # Between the two renames the old folder is still a step that readers find.
            _remove(replaced)
            target.rename(replaced)
        partial.rename(target)
        sync_folder(root)
        _remove(replaced)
    except OSError as error:
        raise disk_error(target, error) from error


def _remove(folder: Path) -> None:
    """Remove a step's folder so that it is never seen in part."""
    if folder.exists():
        going = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _remove_old(root: Path, step: int, keep: int) -> None:
    older = [folder for number, folder in step_folders(root) if number <= step]
    for folder in older[keep:]:
        _remove(folder)


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """The steps in a folder by number, newest first; complete or not is for the reader to find out."""
    found = []
    for folder in root.glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), match[2] is None, folder))
    return [(number, folder) for number, _, folder in sorted(found, reverse=True)]
