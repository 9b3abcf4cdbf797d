"""Agreement: before a checkpoint is begun, every rank must have the same weights, bit for bit, and all must be finite.

They compute the same sums from the same gradients, so a difference means that something is broken: a memory, a kernel
that rounds in its own way on one kind of processor, hosts that loaded different files. Each would go unseen, for every
rank writes another part of the checkpoint, and the whole would be the weights of no rank. A weight that became infinite
shows in the next step's loss; a checkpoint must not be between the two, for the run would go on from it.

The digest is CRC-32: it finds every change of up to 32 neighbouring bits and all but one in 4 billion of the others, at
4 GB/s a core. sha256 takes more than twice as long, and nobody forges these.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from hpcprune.checkpoint import State
from hpcprune.checkpoint.format import Array, weights_of
from hpcprune.checkpoint.portion import portion_of
from hpcprune.errors import GOING_ON, NumericsError, WorldError
from hpcprune.tensors import to_tensor
from hpcprune.world import World, as_ranges

__all__ = ["check_weights"]


class _Digest(NamedTuple):
    name: str
    crc: int
    finite: bool


def check_weights(state: State, world: World, what: str) -> None:
    """Look at the survivors of each layer and at the other parameters. Collective.

    Args:
        what: what is about to be written.

    Raises:
        WorldError: on every rank: they differ between ranks; it names them and the ranks.
        NumericsError: on every rank: some are NaN or infinite.
    """
    digests = _digests(state)
    if len(set(world.allgather(zlib.crc32(repr(digests).encode()), f"{what}: comparing weights"))) > 1:
        _tell_difference(world.allgather(digests, f"{what}: comparing parameters"), what)
    spoilt = [digest.name for digest in digests if not digest.finite]
    if spoilt:
        raise NumericsError(
            f"{what}: NaN or infinite weights in {', '.join(spoilt[:4])}{' and others' if spoilt[4:] else ''}; lower "
            f"the learning rate or clip the gradients (clip_norm). {GOING_ON}"
        )


def _tell_difference(everywhere: Sequence[Sequence[_Digest]], what: str) -> None:
    places = []
    for each in zip(*everywhere, strict=False):
        groups: dict[_Digest, list[int]] = {}
        for rank, digest in enumerate(each):
            groups.setdefault(digest, []).append(rank)
        if len(groups) > 1:
            most, *others = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks))
            places.append(f"{each[0].name} ({', '.join(map(_name, others))} unlike {_name(most)})")
    raise WorldError(
        f"{what}: the ranks' weights differ in {', '.join(places[:5]) or 'their layers'}; use hosts of one kind with "
        "the same files, look at the memory of those that stand out, and run the same command again: it goes on from "
        "the last checkpoint, which is whole"
    )


def _digests(state: State) -> list[_Digest]:
    """Of the survivors of each layer, and of each other parameter."""
    digests = []
    for order, (name, layer) in enumerate(state.layers.items()):
        portion = portion_of(name, order, layer, 0, weights_of(layer.shape))
        digests.append(_digest(name, portion.values, layer.dtype))
    for key, tensor in state.tensors.items():
        group, _, name = key.partition("/")
        if group == "parameters":
            digests.append(_digest(name, [tensor.array], tensor.dtype))
    return digests


def _digest(name: str, parts: Iterable[Array], dtype: str) -> _Digest:
    crc, finite = 0, True
    for part in parts:
        crc = zlib.crc32(part.data, crc)
        values = to_tensor(part, dtype)
        total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))  # 16 bits might not hold a sum
        finite &= bool(torch.isfinite(total))
    return _Digest(name, crc, finite)


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {as_ranges(ranks)}"
