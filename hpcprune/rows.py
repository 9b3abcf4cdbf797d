"""Rows: pruning within each output of a layer by itself.

A row is what lies behind a layer's first dimension: the weights of one output of a Linear or Conv layer. Ranks own
whole rows, so nothing is sent to rank them; as elsewhere, exactly as many go as asked for, and the first among equals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcprune.masks import Bits
from hpcprune.schedule import pruned_count
from hpcprune.threshold import raise_nan
from hpcprune.world import World

__all__ = ["select_in_rows"]

BLOCK = 1 << 22  # scores looked at at a time


def select_in_rows(
    pieces: Iterable[Tensor],
    before: Sequence[Bits | None],
    widths: Sequence[int],
    sparsities: Sequence[float],
    names: Sequence[str],
    world: World,
) -> list[Bits]:
    """Prune each row to a sparsity. Collective: a NaN on any rank raises NumericsError on all.

    Args:
        pieces: this rank's scores, flat, of whole rows; those with the lowest go. Taken one after the other.
        before: for each piece the packed mask of what is left to choose from; None for all.
        widths, sparsities, names: for each piece its rows' length, what is to be gone of each row, what to call it.

    Returns:
        for each piece the packed mask of what survives.
    """
    found, nans = [], []
    for piece, left, width, sparsity, name in zip(pieces, before, widths, sparsities, names, strict=True):
        nans.append((name, int(piece.isnan().sum()), piece.numel()))
        found.append(_select(piece, left, width, sparsity))
    if any(world.allgather(any(count for _, count, _ in nans), "rows: NaN")):
        raise_nan(nans, world)
    return found


def _select(scores: Tensor, before: Bits | None, width: int, sparsity: float) -> Bits:
    pruned = pruned_count(width, sparsity)
    if not scores.numel() or (not pruned and before is not None):
        return np.zeros(0, np.uint8) if before is None else before
    rows = scores.view(-1, width)
    survives = np.ones(rows.shape, np.bool_)
    if before is not None:
        survives = np.unpackbits(before, count=scores.numel(), bitorder="little").view(np.bool_).reshape(rows.shape)
    step = max(1, BLOCK // width)
    for start in range(0, len(rows) if pruned else 0, step):
        left = torch.from_numpy(survives[start : start + step]).to(scores.device)
        block = rows[start : start + step].masked_fill(~left, -torch.inf)  # what went before counts, and goes first
        threshold = block.kthvalue(pruned, dim=1, keepdim=True).values
        lower, equal = block < threshold, block == threshold
        cut = pruned - lower.sum(1, keepdim=True)
        survives[start : start + step] &= (~(lower | (equal & (equal.cumsum(1) <= cut)))).cpu().numpy()
    return np.packbits(survives.reshape(-1), bitorder="little")
