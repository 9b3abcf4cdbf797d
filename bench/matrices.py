"""The pruned matrices that benchmarks of products run on: which a command line asks for, and how they are drawn."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["PATTERNS", "SIDE", "add_arguments", "bits_of", "numbers", "pruned"]

PATTERNS = ("unstructured", "blocks", "2:4")  # what the survivors form
SIDE = 16  # of blocks
SHAPES = "768x768,1024x1024,3072x768,768x3072,3072x3072,4096x4096"


def numbers(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An argument's type: several, with commas between."""
    return lambda text: [kind(each) for each in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which matrices, how many rows of X, and whether it is the gradients that are measured."""
    parser.add_argument("--shapes", type=numbers(_shape), default=SHAPES, help=f"out x in ({SHAPES})")
    parser.add_argument("--batch", type=numbers(int), default="1,8,32,256")
    parser.add_argument("--sparsity", type=numbers(_fraction), default="0.5,0.6,0.8,0.9,0.95,0.99")
    parser.add_argument("--backward", action="store_true", help="both gradients instead")


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _fraction(text: str) -> float:
    if not 0 <= (fraction := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a sparsity: at least 0 and less than 1, as 0.9 for 90 %")
    return fraction


def pruned(rows: int, columns: int, sparsity: float, pattern: str) -> Tensor:
    """Random weights, those that are pruned 0; for 2:4 it is half of them whatever `sparsity` says."""
    generator = torch.Generator().manual_seed(rows)
    if pattern == "2:4":
        kept = (torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2).view(rows, columns)
    else:
        side = SIDE if pattern == "blocks" else 1
        kept = torch.rand(-(-rows // side), -(-columns // side), generator=generator) >= sparsity
        kept = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
    weights = torch.randn(rows, columns, generator=generator)
    weights[weights == 0] = 1.0  # one in some millions, which would break its block
    return weights * kept


def bits_of(weights: Tensor) -> np.ndarray:
    """The packed mask of what is not 0."""
    return np.packbits((weights != 0).cpu().numpy().ravel(), bitorder="little")
