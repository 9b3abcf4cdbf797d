"""The break-evens of a round: whether sending the survivors alone pays, and computing with them alone, by trying both.

Packing saves bytes and costs a pass over the gradients before the exchange and one over the weights after the step. On
a slow network it pays at any density, within a host it may not pay when nearly everything survives. How much of the
exchange passes while backward runs counts as well, so steps are tried as they will be done, on the round's own samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.snapshot import load_buffers
from hpcprune.sparse.training import faster_layers
from hpcprune.train import Trainer
from hpcprune.world import World

__all__ = ["packing_pays", "sparse_layers"]

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
        f"{'survivors are packed' if pays else 'all gradients are sent'}: with {masks.density:.0%} of what is prunable "
        f"left a step takes {packed * 1e3:.1f} ms packed and {whole * 1e3:.1f} ms whole"
        f"{', which is too near to tell' if pays and packed > whole else ''}"
    )


def sparse_layers(
    masks: Masks, begin: Callable[[bool], Trainer], model: nn.Module, ledger: Ledger, world: World
) -> tuple[list[str], str]:
    """Which layers train sparse, and a sentence that says so. Collective: all ranks get the same answer.

    Those that are faster by themselves on every rank, if a whole step is faster with them. No weight changes.

    Args:
        begin: makes a training with the layers that the ledger says.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer = begin(True)
    own = faster_layers(model, masks, lambda: trainer.try_step(0))
    trainer.close()
    of_ranks = world.allgather(own, "sparse layers: agreeing")
    found = [name for name in own if all(name in others for others in of_ranks)]
    seconds = []
    for names in ([], found) if found else ():
        ledger.sparse = names
        seconds.append(_fastest(begin(True)))
    ledger.sparse = None
    load_buffers(model, buffers)
    if not found:
        return [], "all layers train dense: none is faster sparse"
    dense, sparse = world.allreduce(np.array(seconds), "sparse layers: break-even", op="max").tolist()
    times = f"a step takes {sparse * 1e3:.1f} ms so and {dense * 1e3:.1f} ms dense"
    if sparse >= dense:
        return [], f"all layers train dense: with {len(found)} sparse ones {times}"
    return found, f"{len(found)} of {len(masks)} layers train sparse: {times}"


def _fastest(trainer: Trainer) -> float:
    """The seconds of its fastest step. It is gone afterwards, so that there is room for the next."""
    seconds = min(trainer.try_step(number) for number in range(TRIES))
    trainer.close()
    return seconds
