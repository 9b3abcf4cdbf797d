"""Where tests of what the package does on a GPU run: by the emulator on CPU tensors, and on a GPU where there is one.

`device` is a fixture with both. The emulator's kernels take the place of the library, the CPU that of the GPU, and the
operators that are registered for CUDA alone are computed on the CPU too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hpcprune.native import launching
from hpcprune.native.cuda import UnavailableError
from hpcprune.sparse import cuda_ops
from tests.kernels.emulated import KERNELS, load, needs_emulator

__all__ = ["device"]

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=[pytest.param("cpu", marks=needs_emulator, id="emulated"), pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    found = torch.device(request.param)
    if found.type == "cuda":
        found = torch.device("cuda", torch.cuda.current_device())
        try:
            launching.kernels(found)
        except UnavailableError as why:
            pytest.skip(str(why))
        yield found
        return
    code = load(*sorted(KERNELS.glob("*/*.cu")))
    library = torch.library.Library("hpcprune", "IMPL")  # type: ignore[no-untyped-call]
    cuda_ops.register(library, "CPU")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launching, "DEVICE", "cpu")
        patched.setattr(launching, "kernels", lambda device: code)
        patched.setattr(launching, "stream", lambda device: None)
        yield found
    library._destroy()  # type: ignore[no-untyped-call]
