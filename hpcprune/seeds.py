"""Seeds that follow from what they are for, so that a resumed run needs no saved generator and repeats itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive", "kept_random", "seed_all"]


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**32) for a purpose, given as the job's seed and words and numbers: stage, epoch, step, rank."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def seed_all(*parts: int | str) -> None:
    """Set the generators that models and datasets use: torch's, numpy's and Python's."""
    seed = derive(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def kept_random() -> Iterator[None]:
    """Leave those generators as they were."""
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
