"""Seeds that follow from what they are for, so that a resumed run needs no saved generator and repeats itself."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

__all__ = ["derive", "seed_all"]


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**32) for a purpose, given as the job's seed and words and numbers: stage, epoch, step, rank."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def seed_all(*parts: int | str) -> None:
    """Set the generators that models and datasets use: torch's, numpy's and Python's."""
    seed = derive(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
