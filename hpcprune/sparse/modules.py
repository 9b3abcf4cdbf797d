"""Modules that hold their surviving weights alone: in place of Linear and Conv2d, for inference."""

from __future__ import annotations

from typing import TypeGuard, cast, get_args

import torch
from torch import Tensor, nn

from hpcprune.native import launching
from hpcprune.packing import survivors_of
from hpcprune.sparse.cuda_convolution import CudaConv2d
from hpcprune.sparse.cuda_linear import CudaKernel, CudaLinear
from hpcprune.sparse.geometry import Geometry
from hpcprune.sparse.held import LINEAR, Bits, Kernel, hold
from hpcprune.sparse.kernels import FLOATS
from hpcprune.sparse.operators import autocast, check_last, seen_called
from hpcprune.sparse.ops import panels_conv2d

__all__ = ["SparseConv2d", "SparseLinear", "is_plain_convolution", "on_gpu", "sparse_module"]


class _Sparse(nn.Module):
    """A pruned weight matrix [rows, columns], as a kernel holds it, and a bias."""

    def __init__(self, dense: nn.Linear | nn.Conv2d, bits: Bits, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        weight = dense.weight.detach()
        self.rows, self.columns = weight.shape[0], weight[0].numel()
        held = hold(kernel, bits, self.rows, self.columns, survivors_of(weight, bits))
        for name, tensor in held.items():
            self.register_buffer(name, tensor)
        self._held = tuple(held)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().float())
        self.value: Tensor
        self.bias: Tensor | None
        self._shape = tuple(weight.shape)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each call: for code that reads a layer's weight instead of calling it."""
        identity = torch.eye(self.columns, dtype=self.value.dtype, device=self.value.device)
        return self._product(identity, None).t().reshape(self._shape)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        held = (getattr(self, name) for name in self._held)
        product: Tensor = LINEAR[self.kernel](x, *held, bias, self.rows)
        return product


class SparseLinear(_Sparse):
    """x [..., columns] -> x W^T + bias [..., rows], as the Linear of which it is made."""

    def __init__(self, dense: nn.Linear, bits: Bits, kernel: Kernel) -> None:
        super().__init__(dense, bits, kernel)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_forward_pre_hook(seen_called)

    def forward(self, input: Tensor) -> Tensor:
        check_last(input, self.columns)
        return self._product(autocast(input, self.value.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.columns}, out_features={self.rows}, bias={self.bias is not None}, kernel={self.kernel}"
        )


class SparseConv2d(_Sparse):
    """The convolution of which it is made."""

    def __init__(self, dense: nn.Conv2d, bits: Bits) -> None:
        super().__init__(dense, bits, "panels")
        self.geometry = Geometry.of(dense)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels

    def forward(self, input: Tensor) -> Tensor:
        self.geometry.check(input, self.in_channels)
        product: Tensor = panels_conv2d(
            autocast(input, self.value.dtype), self.layout, self.value, self.bias, self.rows, *map(list, self.geometry)
        )
        return product

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.rows}, kernel_size={tuple(self.geometry.kernel)}, stride={self.geometry.stride}"
        )


def sparse_module(
    dense: nn.Module, bits: Bits, kernel: Kernel | CudaKernel = "panels"
) -> SparseLinear | SparseConv2d | CudaLinear | CudaConv2d | None:
    """The sparse module that computes what a dense one does, or None; on the CPU convolutions have panels only.

    Subclasses are left alone: what they do with their weight is not known. A layer on a GPU takes a CudaKernel.
    """
    there = on_gpu(dense)
    if there and kernel not in get_args(CudaKernel):
        return None
    if type(dense) is nn.Linear:
        if there:
            return CudaLinear(dense, bits, cast(CudaKernel, kernel))
        return SparseLinear(dense, bits, cast(Kernel, kernel)) if _fits(dense.weight) else None
    if is_plain_convolution(dense):
        if there:
            return CudaConv2d(dense, bits, cast(CudaKernel, kernel))
        return SparseConv2d(dense, bits) if _fits(dense.weight) else None
    return None


def is_plain_convolution(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a Conv2d that is a product with every place of an image, zeros around it."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def on_gpu(layer: nn.Module) -> bool:
    """Whether a layer's weight is there, and CUDA kernels are what it takes."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.device.type == launching.DEVICE


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in FLOATS
