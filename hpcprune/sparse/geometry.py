"""The geometry of a convolution: what its kernel meets where, and which images it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from hpcprune.sparse.kernels import SparseError

__all__ = ["Geometry"]


class Geometry(NamedTuple):
    """Of a convolution: pairs of height and width."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Geometry:
        """That of a module whose padding is numbers."""
        assert not isinstance(convolution.padding, str)
        return cls(convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)

    def out(self, size: Sequence[int]) -> list[int]:
        """Height and width of the output for images of this size."""
        sides = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in sides
        ]

    def check(self, x: Tensor, channels: int) -> None:
        """Raise SparseError where x is no image of so many channels that the kernel fits into."""
        fits = x.dim() in (3, 4) and x.shape[-3] == channels and min(self.out(x.shape[-2:])) > 0
        if not fits:
            raise SparseError(
                f"the input is {[*x.shape]}; this convolution takes [images, {channels}, height, width] or one image, "
                f"no smaller than its kernel {[*self.kernel]} with padding {[*self.padding]}"
            )
