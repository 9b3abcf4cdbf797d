"""Finding the newest step that is complete, and putting it together again from the files of any number of ranks."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpcprune.checkpoint.format import BLOCK, MOST_SHRINKING, STORAGE, LayerState, StepState, mask_bytes, weights_of
from hpcprune.checkpoint.pieces import Outline, Piece, check_tensor, read_tensor
from hpcprune.checkpoint.read import CheckpointFile, open_checkpoint
from hpcprune.checkpoint.steps import INDEX, shard_name, step_folders
from hpcprune.errors import CheckpointError

__all__ = ["check_step", "newest_step", "read_step"]


@dataclass
class _Assembly:
    """A step while its shards come in: what the index promises, and what has been found of it."""

    folder: Path
    state: StepState
    outlines: dict[str, Outline]
    shards: list[tuple[int, str]]  # bytes and sha256 of each rank's file
    keep: bool
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    survivors: dict[str, int] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=set)

    def take(self, rank: int, file: CheckpointFile) -> None:
        """Read and check one rank's file."""
        if (file.block.bytes, file.block.sha256) != self.shards[rank]:
            raise CheckpointError(f"{file.path}: is not the file that the index names, but another step's or run's")
        shard = file.groups.get("shard")
        stated = {"step": self.state.step, "rank": rank, "ranks": len(self.shards)}
        if shard is None or shard.attributes(allowed=stated) != stated or shard.children():
            raise CheckpointError(f"{file.path}: does not say that it is rank {rank} of step {self.state.step}")
        for piece in file.pieces():
            self._take_piece(piece)
        for key, node in file.tensor_nodes():
            if key in self.tensors:
                node.refuse("is in another rank's file as well")
            self.tensors.add(key)
            if self.keep:
                self.state.tensors[key] = read_tensor(node)
            else:
                check_tensor(node)
        own = {}
        for key, node in file.members("own"):
            if self.keep:
                own[key] = read_tensor(node)
            else:
                check_tensor(node)
        self.state.own.append(own)

    def _take_piece(self, piece: Piece) -> None:
        outline = self.outlines.get(piece.name)
        if outline is None:
            piece.group.refuse("is not in the step's index")
        here = (piece.order, piece.shape, piece.dtype, piece.mask is not None, piece.attributes)
        there = (outline.order, outline.shape, outline.dtype, outline.masked, outline.attributes)
        if repr(here) != repr(there):  # as texts, since NaN is not equal to itself
            piece.group.refuse("is described otherwise than in the step's index")
        spans = self.spans.setdefault(piece.name, [])
        at = bisect.bisect(spans, (piece.start, piece.stop))
        if (at > 0 and spans[at - 1][1] > piece.start) or (at < len(spans) and spans[at][0] < piece.stop):
            piece.group.refuse("holds weights that another part holds as well")
        spans.insert(at, (piece.start, piece.stop))
        self.survivors[piece.name] = self.survivors.get(piece.name, 0) + piece.survivors
        if self.keep:
            piece.read_into(self.state.layers[piece.name])
        else:
            piece.check()

    def finish(self) -> None:
        """Refuse a step with weights that no rank's file holds."""
        for name, outline in self.outlines.items():
            spans = self.spans.get(name, [])
            if sum(stop - start for start, stop in spans) != weights_of(outline.shape):
                edges = [0, *(edge for span in spans for edge in span), weights_of(outline.shape)]
                gap = next((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a != b)
                outline.group.refuse(f"has the weights {gap[0]} to {gap[1]} in no rank's file")
            if self.survivors.get(name, 0) != outline.survivors:
                outline.group.refuse(
                    f"states {outline.survivors:,} survivors, and its parts have {self.survivors.get(name, 0):,}"
                )


def _assemble(folder: Path, keep: bool) -> _Assembly:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a step's folder; give one such as checkpoints/step-00000400")
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: has no {INDEX}: its writer was cut off; go back to an earlier step")
    with open_checkpoint(folder / INDEX, "index") as index:
        step, shards = _read_shards(index)
        outlines = index.outlines()
        state = StepState(step, index.about, {}, {}, [])
        assembly = _Assembly(folder, state, outlines, shards, keep)
        _check_sizes(index, folder, assembly)
        if keep:
            state.layers.update((name, _empty(outline)) for name, outline in outlines.items())
        for rank in range(len(shards)):
            with open_checkpoint(folder / shard_name(rank), "shard") as file:
                assembly.take(rank, file)
        assembly.finish()
    return assembly


def _read_shards(index: CheckpointFile) -> tuple[int, list[tuple[int, str]]]:
    group = index.groups.get("shards")
    if group is None:
        raise CheckpointError(f"{index.path}: names no rank's file; hpcprune did not write this: do not trust it")
    stated, children = group.attributes(allowed=("step", "ranks")), group.children()
    step, ranks = stated.get("step"), stated.get("ranks")
    if type(step) is not int or type(ranks) is not int or step < 0 or ranks < 1 or ranks != len(children):
        group.refuse(f"states step {step!r} and {ranks!r} ranks, and names {len(children)} files")
    shards = []
    for rank in range(ranks):
        node = children.get(shard_name(rank))
        entry = node.attributes(allowed=("bytes", "sha256")) if node is not None else {}
        size, sha256 = entry.get("bytes"), entry.get("sha256")
        if node is None or node.children() or type(size) is not int or not isinstance(sha256, str):
            group.refuse(f"does not name {shard_name(rank)} with its bytes and sha256")
        shards.append((size, sha256))
    return step, shards


def _check_sizes(index: CheckpointFile, folder: Path, assembly: _Assembly) -> None:
    """Every file is there and as long as the index says, and the layers are not larger than such files can hold."""
    for rank, (size, _) in enumerate(assembly.shards):
        path = folder / shard_name(rank)
        try:
            found = path.stat().st_size - BLOCK
        except OSError:
            raise CheckpointError(f"{path}: is missing, and the index names it; go back to an earlier step") from None
        if found != size:
            raise CheckpointError(
                f"{path}: {found:,} bytes follow its first {BLOCK}, and the index says {size:,}; go back to an earlier "
                f"step"
            )
    stored = sum(size for size, _ in assembly.shards)
    masks = sum(mask_bytes(weights_of(outline.shape)) for outline in assembly.outlines.values() if outline.masked)
    dense = sum(outline.survivors * np.dtype(STORAGE[outline.dtype]).itemsize for outline in assembly.outlines.values())
    if masks > MOST_SHRINKING * stored or dense > stored:
        raise CheckpointError(
            f"{index.path}: describes layers far larger than the {stored:,} bytes that its files hold; hpcprune did "
            f"not write this: do not trust it"
        )


def _empty(outline: Outline) -> LayerState:
    weights = weights_of(outline.shape)
    mask = np.zeros(mask_bytes(weights), np.uint8) if outline.masked else None
    values = np.zeros(weights, STORAGE[outline.dtype])
    return LayerState(outline.shape, outline.dtype, values, mask, outline.attributes)


def read_step(path: str | Path) -> StepState:
    """Read a step that `write_step` has written, on any number of ranks; not collective.

    Returns:
        The state with whole layers and all tensors, and every rank's own tensors in rank order.

    Raises:
        CheckpointError: anything in it is damaged, missing, twice there, or does not go together.
    """
    return _assemble(Path(path), keep=True).state


@dataclass(frozen=True)
class StepFacts:
    """What was found while a step was checked. layers: as the index describes them, and the shards have them."""

    step: int
    ranks: int
    layers: Mapping[str, Outline]
    tensors: int
    bytes: int


def check_step(path: str | Path) -> StepFacts:
    """Check all of a step without keeping any of it; CheckpointError as in `read_step`."""
    found = _assemble(Path(path), keep=False)
    return StepFacts(
        step=found.state.step,
        ranks=len(found.shards),
        layers=found.outlines,
        tensors=len(found.tensors),
        bytes=sum(size + BLOCK for size, _ in found.shards),
    )


def newest_step(root: str | Path) -> tuple[Path | None, list[str]]:
    """The newest step in a folder that is complete, every byte of it checked; not collective.

    Returns:
        Its folder, or None if there is none; and for each newer one, why it was passed over.
    """
    passed_over = []
    for _, folder in step_folders(Path(root)):
        try:
            check_step(folder)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over
