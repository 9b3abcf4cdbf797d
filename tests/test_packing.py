"""Packing: the three ways into a packed vector give what boolean indexing gives, and leave alone what is pruned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcprune.packing import Masked, Packed, Whole

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def mask_of(weights: int, density: float) -> tuple[torch.Tensor, np.ndarray]:
    kept = torch.rand(weights, generator=torch.Generator().manual_seed(weights)) < density
    return kept, np.packbits(kept.numpy(), bitorder="little")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights, density", [(1, 1.0), (9, 0.5), (1000, 0.1), (5000, 0.9), (70, 0.0)])
def test_survivors_are_gathered_and_scattered(dtype: torch.dtype, weights: int, density: float) -> None:
    kept, bits = mask_of(weights, density)
    dense = torch.randn(weights).to(dtype)
    packed, masked = Packed(bits, weights, CPU), Masked(bits, weights, CPU)
    assert packed.length == int(kept.sum()) and masked.length == weights

    alone, whole = torch.empty(packed.length, dtype=dtype), torch.empty(weights, dtype=dtype)
    packed.gather(dense, alone)
    masked.gather(dense, whole)
    assert torch.equal(alone, dense[kept])
    assert torch.equal(whole, torch.where(kept, dense, 0))

    target = torch.full((weights,), 7.0, dtype=dtype)
    packed.scatter(alone, target)
    assert torch.equal(target, torch.where(kept, dense, 7))
    masked.scatter(whole, target)
    assert torch.equal(target, whole)


def test_a_part_of_a_larger_vector_is_written_and_nothing_beside_it() -> None:
    kept, bits = mask_of(100, 0.3)
    packing, dense = Packed(bits, 100, CPU), torch.randn(100)
    vector = torch.full((packing.length + 20,), 5.0)
    packing.gather(dense, vector[10:-10])
    assert torch.equal(vector[10:-10], dense[kept])
    assert (vector[:10] == 5).all() and (vector[-10:] == 5).all()


def test_a_pruned_gradient_that_is_not_finite_is_masked_to_zero() -> None:
    kept, bits = mask_of(50, 0.5)
    dense = torch.where(kept, 1.0, float("inf"))
    out = torch.empty(50)
    Masked(bits, 50, CPU).gather(dense, out)
    assert torch.equal(out, kept.float())


def test_whole_copies() -> None:
    dense, out = torch.randn(9), torch.empty(9)
    Whole(9).gather(dense, out)
    assert torch.equal(dense, out)
    Whole(9).scatter(out.neg(), dense)
    assert torch.equal(dense, -out)
