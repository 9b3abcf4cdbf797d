"""A Conv2d on a GPU that holds its surviving weights alone: a product with what its kernel sees at every place.

A 1 x 1 kernel sees the pixels as they are; for others the images are unfolded, and whether that pays is measured with
the rest (`choose`). None of this was ever run on a GPU: tests run it with the emulator.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hpcprune.sparse.cuda_linear import Bits, CudaKernel, CudaLinear
from hpcprune.sparse.geometry import Geometry

__all__ = ["CudaConv2d"]


class CudaConv2d(nn.Module):
    """The convolution of which it is made; its errors are those of `CudaLinear`."""

    def __init__(self, dense: nn.Conv2d, bits: Bits, kernel: CudaKernel) -> None:
        super().__init__()
        self.geometry = Geometry.of(dense)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.product = CudaLinear(_as_linear(dense), bits, kernel)

    @property
    def kernel(self) -> CudaKernel:
        """By which its products are computed."""
        return self.product.kernel

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each call: for code that reads a layer's weight instead of calling it."""
        return self.product.weight.reshape(self.out_channels, self.in_channels, *self.geometry.kernel)

    def forward(self, input: Tensor) -> Tensor:
        self.geometry.check(input, self.in_channels)
        product: Tensor = self.product(self._seen(input.reshape(-1, *input.shape[-3:])))
        out = self.geometry.out(input.shape[-2:])
        return product.mT.reshape(*input.shape[:-3], self.out_channels, *out)

    def _seen(self, images: Tensor) -> Tensor:
        """[images, places, columns]: what the kernel sees, the channels and within them its own places."""
        kernel, stride, padding, dilation = self.geometry
        if max(kernel) == 1 and max(padding) == 0:
            return images[..., :: stride[0], :: stride[1]].flatten(-2).mT
        return functional.unfold(images, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)).mT

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.geometry.kernel)}"


def _as_linear(dense: nn.Conv2d) -> nn.Linear:
    weight = dense.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=dense.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if dense.bias is not None:
        linear.bias = nn.Parameter(dense.bias.detach(), requires_grad=False)
    return linear
