"""Torch tensors as the arrays that checkpoints hold, and back: bfloat16, which numpy lacks, as its bits in uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["dtype_name", "to_array", "to_tensor"]


def dtype_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as files and messages write it: float32, bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def to_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor's values on the CPU, in its shape; memory is shared where that is possible."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def to_tensor(array: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """The tensor of dtype `dtype` that `to_array` took the array from; memory is shared where that is possible."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.asarray(array, order="C").view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array, order="C"))
