"""Pruned layers that tests run on a GPU or the emulator, and how near to float64 what they give must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcprune.sparse import bsr, csr
from hpcprune.sparse.cuda_ops import bsr_survivors_linear, csr_survivors_linear
from tests.kernels.test_products import bits_of

FLOATS = [torch.float32, torch.bfloat16]
HALF = torch.bfloat16
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
OPERATORS = [
    pytest.param("csr", torch.float32, id="csr float32"),
    pytest.param("csr", HALF, id="csr bfloat16"),
    pytest.param("bsr", HALF, id="bsr"),
]


def pruned(device: torch.device, dtype: torch.dtype, rows: int, columns: int, side: int = 1) -> Tensor:
    """Weights of which a fifth survives, in blocks; the second row of blocks is empty, the first whole."""
    generator = torch.Generator().manual_seed(rows)
    kept = torch.rand(-(-rows // side), -(-columns // side), generator=generator) < 0.2
    kept[1:2] = False
    kept[0] = True
    kept = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
    weights = torch.randn(rows, columns, generator=generator).abs() + 0.1
    return (weights * torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1, 1) * kept).to(device, dtype)


def mask_of(weights: Tensor) -> np.ndarray:
    return bits_of(weights.cpu())


def assert_near(given: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    """Within what a float32 sum of `count` terms in any order may differ by, and the rounding of its result."""
    slack = terms * (count + 1) * 2.0**-24 * 1.01
    slack = slack + ROUNDING[given.dtype] * (exact.abs() + slack)
    difference = (given.detach().double() - exact).abs()
    assert (difference <= slack).all(), f"{(difference - slack).max():g} beyond the bound"


def assert_product(y: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    exact, terms = x.double() @ weights.double().t(), x.double().abs() @ weights.double().abs().t()
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    assert_near(y, exact, terms, weights.shape[1] + 1)


@dataclass
class Training:
    """A pruned layer with what its operator takes, and its dense twin in float64."""

    operator: Any
    x: Tensor
    survivors: Tensor
    bias: Tensor
    layout: tuple[Any, ...]
    weights: Tensor

    def __call__(self) -> Tensor:
        product: Tensor = self.operator(*self.arguments)
        return product

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.survivors, self.bias, *self.layout


def training(device: torch.device, kind: str, dtype: torch.dtype, rows: int = 70, columns: int = 100) -> Training:
    weights = pruned(device, dtype, rows, columns, 1 if kind == "csr" else 16)
    bits = mask_of(weights)
    if kind == "csr":
        own, across = (csr.lay_out(bits, rows, columns, device, transposed=way) for way in (False, True))
        tensors = (own.start, own.column, own.row_order, across.start, across.column, across.row_order, across.order)
        operator, layout = csr_survivors_linear, tensors
    else:
        own, across = (bsr.lay_out(bits, rows, columns, 16, device, transposed=way) for way in (False, True))
        tensors = (own.start, own.row, own.column, own.order, across.start, across.column, across.order)
        operator, layout = bsr_survivors_linear, (*tensors, rows, columns)
    torch.manual_seed(1)
    x = torch.randn(2, 5, columns, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(rows, device=device, dtype=dtype, requires_grad=True)
    return Training(operator, x, weights[weights != 0].requires_grad_(), bias, layout, weights)
