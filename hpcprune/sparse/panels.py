"""Panels: a pruned weight matrix laid out for products on the CPU (kernels/panels.h).

A layout says which weight each of its entries is; the weights themselves lie beside it, so that one layout serves all
of a round's steps, in which the weights change and the masks do not.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.sparse import kernels
from hpcprune.sparse.geometry import Geometry
from hpcprune.sparse.kernels import count_survivors, is_half

__all__ = ["Panels", "convolve", "lay_out", "multiply", "refill", "sampled"]


@dataclass(frozen=True)
class Panels:
    """The layout of W [rows, columns]. layout: its bytes. order: which survivor each entry is, -1 for none; int32."""

    rows: int
    columns: int
    layout: Tensor
    order: Tensor


def lay_out(bits: npt.NDArray[np.uint8], rows: int, columns: int, *, transposed: bool = False) -> Panels:
    """Lay out W [rows, columns], or W^T.

    Args:
        bits: W's packed mask, (rows * columns + 7) // 8 bytes.

    Raises:
        SparseError: there is no compiled library, or more weights survive than 32 bits count.
    """
    code = kernels.kernels().code
    bits = np.ascontiguousarray(bits, np.uint8)
    count_survivors(bits, rows, columns)
    entries = ctypes.c_int64()
    length = code.hpcprune_panels_bytes(bits.ctypes.data, rows, columns, transposed, ctypes.byref(entries))
    layout = torch.empty(length, dtype=torch.uint8, device="cpu")
    order = torch.empty(4 * entries.value, dtype=torch.int32, device="cpu")
    code.hpcprune_panels_fill(bits.ctypes.data, rows, columns, transposed, entries, layout.data_ptr(), order.data_ptr())
    return Panels(*((columns, rows) if transposed else (rows, columns)), layout, order)


def refill(order: Tensor, survivors: Tensor) -> Tensor:
    """A layout's weights, from the packed survivors; zeros where an entry is none."""
    value, survivors = survivors.new_empty(order.shape), survivors.contiguous()
    code, _, pool = kernels.kernels()
    half, threads = is_half("W", survivors), torch.get_num_threads()
    packed = survivors.data_ptr(), survivors.numel()
    code.hpcprune_panels_refill(order.data_ptr(), order.numel(), half, *packed, value.data_ptr(), threads, pool)
    return value


def multiply(x: Tensor, layout: Tensor, value: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias [batch, rows], by the layout of `lay_out` and its weights of `refill`.

    Args:
        x: [batch, columns], float32 or bfloat16, contiguous. bias: [rows], float32.
    """
    matrix, shape = (layout.data_ptr(), layout.nbytes), x.shape
    return kernels.multiply("hpcprune_spmm", matrix, value, x, shape, bias, x.new_empty(shape[0], rows), rows)


def convolve(x: Tensor, layout: Tensor, value: Tensor, bias: Tensor | None, rows: int, geometry: Geometry) -> Tensor:
    """The convolution of images with W as its weight [rows, channels * kernel height * kernel width].

    Args:
        x: [images, channels, height, width], float32 or bfloat16, contiguous. The others as in `multiply`.

    Returns:
        [images, rows, height, width of the output], of x's dtype.
    """
    images, channels, *size = x.shape
    out = geometry.out(size)
    pairs = (size, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, out)
    sides = (ctypes.c_int64 * 13)(channels, *(side for pair in pairs for side in pair))
    y = x.new_empty(images, rows, *out)
    matrix = layout.data_ptr(), layout.nbytes, ctypes.addressof(sides)
    return kernels.multiply("hpcprune_convolution", matrix, value, x, (images, channels), bias, y, rows)


def sampled(x: Tensor, gradient: Tensor, layout: Tensor, order: Tensor, survivors: int) -> Tensor:
    """The gradient of the survivors alone, of those of gradient^T x: packed, float32.

    Args:
        x: [batch, columns]. gradient: [batch, rows], with respect to the product. Of one dtype, contiguous.
    """
    matrix = layout.data_ptr(), layout.nbytes, order.data_ptr(), order.nbytes // 4
    return kernels.sample("hpcprune_sddmm", matrix, x, gradient, survivors)
