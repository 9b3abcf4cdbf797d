"""Which dtypes each backend sums, and the refusal of the others."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from hpcprune.errors import JobError

__all__ = ["WIRE_DTYPES", "refuse_dtype"]

_FLOATS = frozenset({torch.float32, torch.float64})

# MPI has no 16-bit floats, and Horovod only those that MPI's users had in 2023.
WIRE_DTYPES: Mapping[str, frozenset[torch.dtype]] = MappingProxyType(
    {
        "torch": _FLOATS | {torch.bfloat16, torch.float16},
        "mpi": _FLOATS,
        "horovod": _FLOATS | {torch.float16},
    }
)


def refuse_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raise JobError if a backend, as a job file names it, does not sum gradients of a dtype."""
    if dtype in WIRE_DTYPES[backend]:
        return
    able = [other for other, dtypes in WIRE_DTYPES.items() if dtype in dtypes]
    use = f"write exchange: {' or '.join(able)}, or use" if able else "use"
    sums = ", ".join(sorted(map(_name, WIRE_DTYPES[backend])))
    raise JobError(
        f"retrain.exchange: {backend} cannot sum gradients of {_name(dtype)}, only of {sums}; {use} float32 (wire, or "
        "the model's own dtype)"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
