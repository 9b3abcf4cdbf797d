"""A Linear layer on a GPU that holds its surviving weights alone, for inference; and which kernels are tried for one.

Which of them fit is a matter of the mask and the dtype; which is fastest is measured (`choose`). None of this was ever
run on a GPU: tests run it with the emulator, but for 2:4, which is torch's own and wants a GPU.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import to_sparse_semi_structured

from hpcprune.packing import survivors_of
from hpcprune.sparse import bitmap_tiles, bsr, csr
from hpcprune.sparse.cuda_ops import bitmap_tiles_linear, bsr_linear, csr_linear
from hpcprune.sparse.kernels import FLOATS, SparseError
from hpcprune.sparse.operators import autocast, check_last, seen_called
from hpcprune.sparse.patterns import side_of_blocks, two_of_four

__all__ = ["CudaKernel", "CudaLinear", "kernels_to_try"]

Bits = npt.NDArray[np.uint8]
CudaKernel = Literal["csr", "bitmap_tiles", "bsr", "2:4"]

FEW = 64  # rows of X at a time, up to which tensor cores wait for the weights and a bitmap is worth a try
SEMI_STRUCTURED = 32, 64  # what torch wants rows and columns of bfloat16 to be multiples of


def kernels_to_try(weight: Tensor, bits: Bits, dtypes: Collection[torch.dtype], samples: int) -> list[CudaKernel]:
    """The kernels that can do what a layer on a GPU does.

    Args:
        weight: [rows, columns]. dtypes: of its inputs. samples: rows of X at most at once.
    """
    if weight.dtype not in FLOATS:
        return []
    found: list[CudaKernel] = ["csr"]
    if weight.dtype == torch.bfloat16 and set(dtypes) == {torch.bfloat16}:
        if samples <= FEW:
            found.append("bitmap_tiles")
        if side_of_blocks(bits, *weight.shape) is not None:
            found.append("bsr")
        whole = all(side % unit == 0 for side, unit in zip(weight.shape, SEMI_STRUCTURED, strict=True))
        if whole and two_of_four(bits, *weight.shape):
            found.append("2:4")
    return found


class CudaLinear(nn.Module):
    """x [..., columns] -> x W^T + bias [..., rows], as the Linear of which it is made."""

    def __init__(self, dense: nn.Linear, bits: Bits, kernel: CudaKernel) -> None:
        """Take over a dense layer by its packed mask.

        Raises:
            SparseError: the kernel does not fit the mask or the weights' dtype.
        """
        super().__init__()
        self.kernel = kernel
        weight = dense.weight.detach()
        self.rows, self.columns = weight.shape
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.layout: list[str] = []  # names of the buffers, as the operator wants them
        self.largest = 0
        bias = None if dense.bias is None else dense.bias.detach()
        if kernel == "2:4":
            kept = torch.from_numpy(np.unpackbits(bits, count=weight.numel(), bitorder="little")).to(weight.device)
            self._hold(value=to_sparse_semi_structured(weight * kept.view(weight.shape)))
        else:
            bias = None if bias is None else bias.float()
            self._lay_out(weight, bits, kernel)
        self.register_buffer("bias", bias)
        self.register_forward_pre_hook(seen_called)
        self.bias: Tensor | None

    def _lay_out(self, weight: Tensor, bits: Bits, kernel: CudaKernel) -> None:
        device, shape = weight.device, (self.rows, self.columns)
        survivors = survivors_of(weight, bits)
        if kernel == "csr":
            own = csr.lay_out(bits, *shape, device)
            self._hold(start=own.start, column=own.column, row_order=own.row_order, value=survivors)
        elif kernel == "bitmap_tiles":
            tiles = bitmap_tiles.lay_out(bits, *shape, survivors)
            self._hold(start=tiles.start, groups=tiles.groups)
            self.largest = tiles.largest
        else:
            side = side_of_blocks(bits, *shape)
            if side is None:
                raise SparseError(f"{self.rows} x {self.columns} weights survive in no whole blocks; use csr")
            blocks = bsr.lay_out(bits, *shape, side, device)
            self._hold(start=blocks.start, column=blocks.column, value=bsr.refill(blocks.order, survivors))

    def _hold(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
            self.layout.append(name)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' own: a bitmap's bytes are bfloat16 whatever the module is cast to."""
        return self.get_buffer("value").dtype if "value" in self.layout else torch.bfloat16

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each call: for code that reads a layer's weight instead of calling it."""
        some = self.get_buffer(self.layout[0])
        identity = torch.eye(self.columns, dtype=self.dtype, device=some.device)
        return self._product(identity, None).t()

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        held = [self.get_buffer(name) for name in self.layout]
        product: Tensor
        if self.kernel == "csr":
            product = csr_linear(x, *held, bias, self.columns)
        elif self.kernel == "bitmap_tiles":
            product = bitmap_tiles_linear(x, *held, bias, self.rows, self.columns, self.largest)
        elif self.kernel == "bsr":
            product = bsr_linear(x, *held, bias, self.rows, self.columns)
        else:
            product = functional.linear(x, held[0], bias)
        return product

    def forward(self, input: Tensor) -> Tensor:
        check_last(input, self.columns)
        return self._product(autocast(input, self.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.columns}, out_features={self.rows}, bias={self.bias is not None}, kernel={self.kernel}"
        )
