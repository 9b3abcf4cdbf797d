"""Masks: which weights survive, one bit a weight, the same on every rank.

Bits are kept packed, as they travel and as they are stored: bit i of byte j belongs to weight 8 j + i of the flattened
layer, and 1 means that the weight survives. Owners make the bits of their spans, `gather_masks` brings all of them to
every rank, and the ranks then compare a hash of the whole, so that no two ranks ever work with different masks.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpcprune.errors import HpcpruneError, WorldError
from hpcprune.native.survivors import popcount
from hpcprune.shards import Kind, Layer, Span
from hpcprune.world import World, as_ranges

__all__ = ["Masks", "gather_masks", "refuse_other_masks"]

Bits = npt.NDArray[np.uint8]


class Masks(Mapping[str, torch.Tensor]):
    """A mask for each pruned parameter: name -> boolean tensor of its shape, True where a weight survives.

    Immutable. The tensors are made from the packed bits when they are asked for.
    """

    def __init__(self, layers: Sequence[Layer], bits: Sequence[Bits]) -> None:
        """Masks of `layers` in global order from their packed `bits`, (weights + 7) // 8 bytes each."""
        for layer, packed in zip(layers, bits, strict=True):
            _check(layer, packed)
        self.layers = tuple(layers)
        self._bits = {layer.name: packed for layer, packed in zip(layers, bits, strict=True)}
        self._shapes = {layer.name: layer.shape for layer in layers}

    @classmethod
    def full(cls, layers: Sequence[Layer]) -> Masks:
        """Masks that prune nothing."""
        return cls(layers, [np.packbits(np.ones(layer.weights, np.bool_), bitorder="little") for layer in layers])

    def of(self, kind: Kind) -> Masks:
        """Those of the layers of a kind."""
        layers = tuple(layer for layer in self.layers if layer.kind == kind)
        return self if layers == self.layers else Masks(layers, [self._bits[layer.name] for layer in layers])

    def updated(self, others: Masks) -> Masks:
        """These, with others in place of those of the same layers."""
        if others.layers == self.layers:
            return others
        return Masks(
            self.layers, [(others if layer.name in others else self).bits(layer.name) for layer in self.layers]
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        flat = np.unpackbits(self._bits[name], count=int(np.prod(shape, dtype=np.int64)), bitorder="little")
        return torch.from_numpy(flat.view(np.bool_)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, {self.nonzeros:,} of {self.weights:,} weights survive)"

    def bits(self, name: str) -> Bits:
        """The packed bits of a layer."""
        return self._bits[name]

    @cached_property
    def survivors(self) -> Mapping[str, int]:
        """How many weights of each layer survive."""
        return {name: popcount(bits) for name, bits in self._bits.items()}

    @property
    def densities(self) -> Mapping[str, float]:
        """The part of each layer's weights that survives."""
        return {layer.name: self.survivors[layer.name] / layer.weights for layer in self.layers}

    @property
    def weights(self) -> int:
        """How many weights there are, pruned ones included."""
        return sum(layer.weights for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        """How many weights survive."""
        return sum(self.survivors.values())

    @property
    def density(self) -> float:
        return self.nonzeros / self.weights if self.weights else 1.0

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, over all names, shapes and bits."""
        return hashlib.sha256("\n".join(self._layer_hashes()).encode()).hexdigest()

    def _layer_hashes(self) -> list[str]:
        return [
            f"{layer.name} {layer.shape} {hashlib.sha256(self._bits[layer.name].data).hexdigest()}"
            for layer in self.layers
        ]

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a model that these are the masks of, by name.

        Raises:
            HpcpruneError: a mask's name is no parameter's of `model.named_parameters()`, or its shape is another.
        """
        parameters = dict(model.named_parameters())
        for name in self:
            if name not in parameters or tuple(parameters[name].shape) != self._shapes[name]:
                near = name if name in parameters else "".join(difflib.get_close_matches(name, parameters, 1, 0.4))
                raise HpcpruneError(
                    f"the masks' {name} of shape {self._shapes[name]} is not in this {type(model).__name__}"
                    + (f" (it has {near} of shape {tuple(parameters[near].shape)})" if near else "")
                    + "; use masks with the model that they were made for"
                )
        return {name: parameters[name] for name in self}

    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of a model to zero, in place."""
        with torch.no_grad():
            for name, parameter in self.parameters(model).items():
                parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def agree(self, world: World) -> None:
        """Raise WorldError, on every rank, if two ranks have different masks; the message names the layers."""
        if len(set(world.allgather(self.hash, "masks: comparing hashes"))) == 1:
            return
        everywhere = world.allgather(self._layer_hashes(), "masks: comparing layers")
        different = [hashes[0].split()[0] for hashes in zip(*everywhere, strict=False) if len(set(hashes)) > 1]
        raise WorldError(
            f"the ranks' masks differ in {', '.join(different[:5]) or 'their layers'}: their weights or their memory "
            "differ; resume from the last checkpoint"
        )


def gather_masks(layers: Sequence[Layer], shards: Sequence[Sequence[Span]], own: Sequence[Bits], world: World) -> Masks:
    """Every rank's bits brought to every rank, put together and agreed on.

    `own` holds the packed bits of this rank's spans, each span's beginning at bit 0 of its own array.
    """
    sent = np.concatenate([*own, np.empty(0, np.uint8)])
    bits = [np.zeros((layer.weights + 7) // 8, np.uint8) for layer in layers]
    for shard, received in zip(shards, world.gather_arrays(sent, "masks: owners to all ranks"), strict=True):
        offset = 0
        for span in shard:
            length = (span.weights + 7) // 8
            _place(bits[span.layer], received[offset : offset + length], span.start)
            offset += length
    masks = Masks(layers, bits)
    masks.agree(world)
    return masks


def refuse_other_masks(hashes: Sequence[str]) -> None:
    """Raise WorldError if the masks of the ranks, by their hashes in rank order, are not all the same."""
    others = [rank for rank, hash in enumerate(hashes) if hash != hashes[0]]
    if others:
        raise WorldError(
            f"the masks of rank {as_ranges(others)} (of {len(hashes)}) are not those of rank 0: their models differed "
            "when they were pruned; give all ranks the same weights before pruning, or hand rank 0's masks to all"
        )


def _place(target: Bits, piece: Bits, start: int) -> None:
    byte, shift = divmod(start, 8)
    if shift:
        piece = np.packbits(np.pad(np.unpackbits(piece, bitorder="little"), (shift, 0)), bitorder="little")
        piece = piece[: target.size - byte]
    target[byte : byte + piece.size] |= piece


def _check(layer: Layer, packed: Bits) -> None:
    wanted = (layer.weights + 7) // 8
    if packed.dtype != np.uint8 or packed.shape != (wanted,):
        raise HpcpruneError(f"{layer.name}: a mask of {layer.weights} weights is {wanted} bytes, not {packed.size}")
    if layer.weights % 8 and packed[-1] >> (layer.weights % 8):
        raise HpcpruneError(f"{layer.name}: the mask has bits set behind its last weight")
