"""Starting CUDA kernels on torch tensors: on their device, on the stream that torch has there now.

A kernel is started and not waited for, as torch's own are, so what is written is there for whoever uses the same
stream. Where a kernel could not be started, the error names it with all that it was given.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from hpcprune.native.cuda import CudaError, check, library
from hpcprune.native.cuda_functions import PREFIX

__all__ = ["DEVICE", "ask", "kernels", "launch"]

DEVICE = "cuda"  # where tensors have to be


@lru_cache(maxsize=64)
def kernels(device: torch.device) -> ctypes.CDLL:
    """The library for a device, asked for once a process: a product may take 5 us.

    Raises:
        UnavailableError: there is none.
    """
    with torch.cuda.device(device):
        return library().code


def stream(device: torch.device) -> int:
    """torch's current stream there, as CUDA has it."""
    number: int = torch.cuda.current_stream(device).cuda_stream
    return number


def launch(name: str, *arguments: Tensor | int | None) -> None:
    """Start a kernel.

    Args:
        name: of its function, without the prefix.
        arguments: what that takes, without the stream; tensors for pointers, None for null.

    Raises:
        CudaError: tensors are not contiguous or not on one GPU, or the kernel could not be started.
        UnavailableError: there is no library.
    """
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    device = tensors[0].device
    if device.type != DEVICE or not all(each.device == device and each.is_contiguous() for each in tensors):
        raise CudaError(f"{_call(name, arguments)}: a kernel takes contiguous tensors of one {DEVICE} device")
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        function = getattr(kernels(device), PREFIX + name)
        addresses = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
        status = function(*addresses, stream(device))
    if status:
        check(status, _call(name, arguments))


def ask(name: str, device: torch.device, kind: int, *sizes: int) -> int:
    """What a function answers that starts nothing: how many bytes of scratch its kernel needs."""
    return int(getattr(kernels(device), PREFIX + name)(kind, *sizes))


def _call(name: str, arguments: tuple[Tensor | int | None, ...]) -> str:
    """A call as an error shows it."""
    shown = (
        f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)} on {each.device}"
        if isinstance(each, Tensor)
        else str(each)
        for each in arguments
    )
    return f"{name}({', '.join(shown)})"
