"""The break-even of packing: whether sending the survivors alone is faster than sending everything, by trying both.

Packing saves bytes and costs a pass over the gradients before the exchange and one over the weights after the step. On
a slow network it pays at any density, within a host it may not pay when nearly everything survives. How much of the
exchange passes while backward runs counts as well, so steps are tried as they will be done, on the round's own samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from hpcprune.masks import Masks
from hpcprune.snapshot import load_buffers
from hpcprune.train import Trainer
from hpcprune.world import World

__all__ = ["packing_pays"]

PAYS_UP_TO = 0.125  # the density to which packing was never slower, without compiled kernels either: nothing is tried
TRIES = 3  # steps of each kind; the first of them only warms up, so it is seldom the fastest
MARGIN = 1.1  # how many times faster sending everything must be: small differences are noise


def packing_pays(masks: Masks, begin: Callable[[bool], Trainer], model: nn.Module, world: World) -> tuple[bool, str]:
    """Whether to pack, and a sentence that says why. Collective: all ranks get the same answer.

    No weight of `model` changes, and its buffers are as they were. The fastest step of the slowest rank decides.

    Args:
        begin: makes a training of `model` under `masks` that packs (True) or sends everything (False).
    """
    if masks.density <= PAYS_UP_TO:
        return True, f"survivors are packed: {masks.density:.1%} of the weights are left"
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fastest = [_fastest(begin(packing)) for packing in (True, False)]
    load_buffers(model, buffers)
    packed, whole = world.allreduce(np.array(fastest), "packing: break-even", op="max").tolist()
    pays = packed <= MARGIN * whole
    return pays, (
        f"{'survivors are packed' if pays else 'all gradients are sent'}: at density {masks.density:.2f} a step takes "
        f"{packed * 1e3:.1f} ms packed and {whole * 1e3:.1f} ms whole"
    )


def _fastest(trainer: Trainer) -> float:
    """The seconds of its fastest step. It is gone afterwards, so that there is room for the next."""
    seconds = min(trainer.try_step(number) for number in range(TRIES))
    trainer.close()
    return seconds
