"""Survivors by mask bits on a GPU: taken out of a dense tensor there, and put back (kernels/survivors/survivors.cu).

As `hpcprune.native.survivors`, for tensors on a GPU, with a mask that is taken there once. A mask takes 1 bit a weight
and 8 bytes for each 1,024 weights, where indices would take 8 bytes a survivor.

None of this was ever run on a GPU; tests run it with the emulator.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native import launching
from hpcprune.native.launching import launch
from hpcprune.native.survivors import MaskError

__all__ = ["CudaMask"]

TILE = 1024  # weights, of which the count of survivors before them is kept


class CudaMask:
    """The packed mask of `weights` weights, on a device."""

    def __init__(self, bits: npt.NDArray[np.uint8], weights: int, device: torch.device) -> None:
        """Take a mask to a device.

        Args:
            bits: (weights + 7) // 8 bytes; those beyond the last weight are 0.

        Raises:
            MaskError: there are more or fewer. UnavailableError: there are no kernels for the device.
        """
        if bits.size != (weights + 7) // 8:
            raise MaskError(f"{bits.size} bytes of mask for {weights} elements: {(weights + 7) // 8} are needed")
        launching.kernels(device)
        self.weights = weights
        self._bits = torch.from_numpy(np.array(bits)).to(device)
        tiles = -(-weights // TILE)
        self._before = torch.empty(tiles + 1, dtype=torch.int64, device=device)
        launch("survivors_before", self._bits, weights, self._before)
        self.survivors = int(self._before[-1])

    def gather(self, dense: Tensor, out: Tensor) -> None:
        """Write the survivors of a flat tensor into `out`, in order."""
        self._check(dense, out)
        launch("gather", dense.element_size(), dense, self.weights, self._bits, self._before, out)

    def update(self, dense: Tensor, packed: Tensor) -> None:
        """Write packed survivors to their places in a flat tensor; the others are not touched."""
        self._check(dense, packed)
        launch("update", dense.element_size(), dense, self.weights, self._bits, self._before, packed)

    def scatter(self, dense: Tensor, packed: Tensor) -> None:
        """Write packed survivors to their places in a flat tensor, and zeros to all others."""
        self._check(dense, packed)
        launch("scatter", dense.element_size(), dense, self.weights, self._bits, self._before, packed)

    def _check(self, dense: Tensor, packed: Tensor) -> None:
        if dense.shape != (self.weights,) or dense.element_size() not in (2, 4, 8):
            raise MaskError(
                f"shape {list(dense.shape)} of {dense.dtype}: [{self.weights}] with 2, 4 or 8 bytes each is needed"
            )
        if packed.shape != (self.survivors,) or packed.dtype != dense.dtype:
            raise MaskError(
                f"survivors {list(packed.shape)} of {packed.dtype}: [{self.survivors}] of {dense.dtype} is needed"
            )
