"""Agreement: before a checkpoint is begun, every rank must have the same weights, bit for bit.

They compute the same sums from the same gradients, so a difference means that something is broken: a memory, a kernel
that rounds in its own way on one kind of processor, hosts that loaded different files. Each would go unseen, for every
rank writes another part of the checkpoint, and the whole would be the weights of no rank.

The digest is CRC-32: it finds every change of up to 32 neighbouring bits and all but one in 4 billion of the others, at
4 GB/s a core. sha256 takes more than twice as long, and nobody forges these.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from hpcprune.checkpoint import State
from hpcprune.checkpoint.format import weights_of
from hpcprune.checkpoint.portion import portion_of
from hpcprune.errors import WorldError
from hpcprune.world import World, as_ranges

__all__ = ["agree_on_weights"]

Digests = list[tuple[str, int]]


def agree_on_weights(state: State, world: World, what: str) -> None:
    """Raise WorldError, on every rank, if two ranks' survivors or other parameters differ; it names them and the ranks.

    Collective. `what` is what is about to be written.
    """
    if world.size == 1:
        return
    digests = _digests(state)
    if len(set(world.allgather(zlib.crc32(repr(digests).encode()), f"{what}: comparing weights"))) == 1:
        return
    everywhere = world.allgather(digests, f"{what}: comparing parameters")
    places = []
    for each in zip(*everywhere, strict=False):
        groups: dict[tuple[str, int], list[int]] = {}
        for rank, digest in enumerate(each):
            groups.setdefault(digest, []).append(rank)
        if len(groups) > 1:
            most, *others = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks))
            places.append(f"{each[0][0]} ({', '.join(map(_name, others))} unlike {_name(most)})")
    raise WorldError(
        f"{what}: the ranks' weights differ in {', '.join(places[:5]) or 'their layers'}; use hosts of one kind with "
        "the same files, look at the memory of those that stand out, and run the same command again: it goes on from "
        "the last checkpoint, which is whole"
    )


def _digests(state: State) -> Digests:
    """A digest of the survivors of each layer, and of each other parameter."""
    digests: Digests = []
    for order, (name, layer) in enumerate(state.layers.items()):
        digest = 0
        for part in portion_of(name, order, layer, 0, weights_of(layer.shape)).values:
            digest = zlib.crc32(part.data, digest)
        digests.append((name, digest))
    for key, tensor in state.tensors.items():
        group, _, name = key.partition("/")
        if group == "parameters":
            digests.append((name, zlib.crc32(tensor.array.data)))
    return digests


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {as_ranges(ranks)}"
