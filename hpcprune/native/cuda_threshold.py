"""Counting over scores that lie on a GPU, and the masks that follow (kernels/threshold/threshold.cu).

The functions of `hpcprune.native.threshold` for tensors on one GPU: of scores nothing comes to the host but counts, the
few keys inside a bracket, and a bit each. `parts` are what `integers_there` gives.

None of this was ever run on a GPU; tests run it with the emulator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcprune.native import launching
from hpcprune.native.cuda import UnavailableError
from hpcprune.native.launching import launch
from hpcprune.native.threshold import Around, View

__all__ = ["count_around", "histogram", "integers_there", "pack"]

Bits = npt.NDArray[np.uint8]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's bytes
TILE = 1024  # scores, of which ties are counted


def integers_there(scores: Tensor) -> Tensor | None:
    """The bits of a tensor on a GPU as flat integers; None if it is elsewhere, or there are no kernels for it."""
    if scores.device.type != launching.DEVICE:
        return None
    try:
        launching.kernels(scores.device)
    except UnavailableError:
        return None
    return scores.detach().contiguous().view(-1).view(INTEGERS[scores.element_size()])


def count_around(
    parts: Sequence[Tensor], view: View, lo: int, hi: int, infinity: int, capacity: int, threads: int | None = None
) -> Around:
    """As `threshold.count_around`."""
    counts = _zeros(parts, 5)
    keys = parts[0].new_empty(capacity)
    for part in parts:
        kind = 8 * part.element_size(), view
        launch("count_around", *kind, part, part.numel(), lo, hi, infinity, keys, capacity, counts)
    below, at_lo, between, at_hi, nan = counts.tolist()
    collected = keys[:between].cpu().numpy() if between <= capacity else None
    return Around(below, at_lo, between, at_hi, bool(nan), collected)


def histogram(
    parts: Sequence[Tensor], view: View, lo: int, hi: int, shift: int, bins: int, threads: int | None = None
) -> npt.NDArray[np.int64]:
    """As `threshold.histogram`."""
    counts = _zeros(parts, bins)
    for part in parts:
        launch("histogram", 8 * part.element_size(), view, part, part.numel(), lo, hi, shift, bins, counts)
    found: npt.NDArray[np.int64] = counts.cpu().numpy()
    return found


def pack(
    parts: Sequence[Tensor],
    masks: Sequence[Bits],
    view: View,
    threshold: int,
    cut: int,
    threads: int | None = None,
) -> int:
    """As `threshold.pack`; the masks come to the host."""
    left = _zeros(parts, 1).fill_(cut)
    for part, mask in zip(parts, masks, strict=True):
        bits = part.new_empty((part.numel() + 7) // 8, dtype=torch.uint8)
        scratch = _zeros(parts, -(-part.numel() // TILE))
        launch("pack", 8 * part.element_size(), view, part, part.numel(), threshold, left, scratch, bits)
        mask[: len(bits)] = bits.cpu().numpy()
    return int(left)


def _zeros(parts: Sequence[Tensor], count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=parts[0].device)
