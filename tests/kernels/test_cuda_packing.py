"""Survivors on a GPU as the package packs them, against torch's indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcprune.native.cuda_survivors import CudaMask
from hpcprune.native.survivors import MaskError
from hpcprune.packing import Packed, dense_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mask_of(weights: int, density: float) -> tuple[torch.Tensor, np.ndarray]:
    kept = torch.rand(weights, generator=torch.Generator().manual_seed(weights)) < density
    return kept, np.packbits(kept.numpy(), bitorder="little")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [1, 1023, 1024, 5000])
def test_survivors_are_packed_and_put_back(
    device: torch.device, weights: int, density: float, dtype: torch.dtype
) -> None:
    kept, bits = mask_of(weights, density)
    kept = kept.to(device)
    dense = torch.randn(weights, device=device).to(dtype)
    packing = Packed(bits, weights, device)
    assert packing._mask is not None and packing._places is None
    packed = torch.full((packing.length,), torch.nan, dtype=dtype, device=device)
    packing.gather(dense, packed)
    assert torch.equal(packed, dense[kept])
    expected = dense.clone()
    expected[kept] = 2 * packed
    packing.scatter(2 * packed, dense)
    assert torch.equal(dense, expected)
    assert torch.equal(dense_of(2 * packed, bits, weights), expected * kept)


def test_part_of_a_tensor_will_do(device: torch.device) -> None:
    kept, bits = mask_of(2000, 0.3)
    kept, dense = kept.to(device), torch.randn(3001, device=device)
    packed = torch.zeros(int(kept.sum()) + 1, device=device)
    Packed(bits, 2000, device).gather(dense[1:2001], packed[1:])
    assert torch.equal(packed[1:], dense[1:2001][kept]) and packed[0] == 0


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    _, bits = mask_of(100, 0.5)
    mask = CudaMask(bits, 100, device)
    dense = torch.zeros(100, device=device)
    with pytest.raises(MaskError, match="12 bytes of mask for 100"):
        CudaMask(bits[:-1], 100, device)
    with pytest.raises(MaskError, match=r"shape \[99\]"):
        mask.gather(dense[1:], torch.zeros(mask.survivors, device=device))
    with pytest.raises(MaskError, match=r"survivors \[3\]"):
        mask.update(dense, torch.zeros(3, device=device))
    with pytest.raises(MaskError, match=r"survivors .* of torch.float64"):
        mask.gather(dense, torch.zeros(mask.survivors, device=device, dtype=torch.float64))
