"""Packing: how the weights of one parameter lie in the packed vector, and how they get there and back.

Three ways with the same methods. `Packed` keeps the survivors alone; on the CPU the mask's own bits say where they
belong (kernels/survivors), which is several times faster than indices and takes 1 bit a weight instead of 64. `Masked`
keeps every weight and clears the gradients of the pruned ones, for densities at which packing does not pay. `Whole`
keeps every weight of a parameter of which nothing is pruned.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native import launching
from hpcprune.native.cuda import UnavailableError
from hpcprune.native.cuda_survivors import CudaMask
from hpcprune.native.survivors import gather, popcount, update
from hpcprune.tensors import to_array

__all__ = ["Bits", "Masked", "Packed", "Packing", "Whole", "dense_of", "survivors_of"]

Bits = npt.NDArray[np.uint8]


class Packing(Protocol):
    """One parameter's way into a packed vector. All tensors are flat, contiguous, of one dtype and device."""

    @property
    def length(self) -> int:
        """How many elements it takes there."""
        ...

    @property
    def whole(self) -> bool:
        """Whether those are all of the parameter's, in order, so that the parameter can be a view of them."""
        ...

    def gather(self, dense: Tensor, out: Tensor) -> None:
        """Take what travels from a dense tensor; what is pruned becomes zero where it has a place at all."""
        ...

    def scatter(self, packed: Tensor, dense: Tensor) -> None:
        """Put it back; what is pruned is not touched, or set to zero."""
        ...


@dataclass(frozen=True)
class Whole:
    """Nothing is pruned."""

    length: int
    whole: bool = True

    def gather(self, dense: Tensor, out: Tensor) -> None:
        out.copy_(dense)

    def scatter(self, packed: Tensor, dense: Tensor) -> None:
        dense.copy_(packed)


class Packed:
    """The survivors alone."""

    whole = False

    def __init__(self, bits: Bits, weights: int, device: torch.device) -> None:
        """The survivors of `weights` weights by their packed mask.

        On a GPU the mask does it there, with kernels of ours; without them, and on other devices, indices do.
        """
        self.length, self._weights = popcount(bits), weights
        self.bits, self._places, self._mask = bits, None, None
        if device.type == launching.DEVICE:
            with suppress(UnavailableError):
                self._mask = CudaMask(bits, weights, device)
        if self._mask is None and device.type != "cpu":
            kept = np.unpackbits(bits, count=weights, bitorder="little")
            self._places = torch.from_numpy(np.flatnonzero(kept)).to(device)

    def gather(self, dense: Tensor, out: Tensor) -> None:
        if self._mask is not None:
            self._mask.gather(dense, out)
        elif self._places is not None:
            torch.index_select(dense, 0, self._places, out=out)
        else:
            gather(to_array(dense), self.bits, torch.get_num_threads(), to_array(out))

    def scatter(self, packed: Tensor, dense: Tensor) -> None:
        if self._mask is not None:
            self._mask.update(dense, packed)
        elif self._places is not None:
            dense.index_copy_(0, self._places, packed)
        else:
            update(to_array(dense), self.bits, to_array(packed), torch.get_num_threads())

    def spread(self, packed: Tensor) -> Tensor:
        """A new dense tensor of it; what is pruned is zero."""
        if self._mask is None:
            dense = packed.new_zeros(self._weights)
            self.scatter(packed, dense)
        else:
            dense = packed.new_empty(self._weights)
            self._mask.scatter(dense, packed)
        return dense


def survivors_of(values: Tensor, bits: Bits) -> Tensor:
    """The survivors of a tensor by its packed mask, in order, where the tensor is."""
    packing = Packed(bits, values.numel(), values.device)
    found = values.new_empty(packing.length)
    packing.gather(values.reshape(-1).contiguous(), found)
    return found


def dense_of(packed: Tensor, bits: Bits, weights: int) -> Tensor:
    """The opposite of `survivors_of`: `weights` values, flat, with zeros where the mask prunes."""
    return Packed(bits, weights, packed.device).spread(packed)


class Masked:
    """Every weight, those that are pruned as zeros."""

    whole = True

    def __init__(self, bits: Bits, weights: int, device: torch.device) -> None:
        self.length = weights
        kept = np.unpackbits(bits, count=weights, bitorder="little").view(np.bool_)
        self._pruned = torch.from_numpy(~kept).to(device)

    def gather(self, dense: Tensor, out: Tensor) -> None:
        out.copy_(dense).masked_fill_(self._pruned, 0)  # not a product: zero times infinity is NaN

    def scatter(self, packed: Tensor, dense: Tensor) -> None:
        dense.copy_(packed)
