"""The break-even of packing: whether sending the survivors alone is faster than sending everything, by trying both.

Packing saves bytes and costs a pass over the gradients before the exchange and one over the weights after the step. On
a slow network it pays at any density, within a host it may not pay when nearly everything survives.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from hpcprune.exchange import Exchange
from hpcprune.masks import Masks
from hpcprune.packing import Masked, Packed
from hpcprune.world import World

__all__ = ["SURE", "packing_pays"]

SURE = 0.125  # up to this density packing was never slower, without compiled kernels either: nothing is measured
TRIES = 5
CLEARLY = 1.2  # sending everything must be this many times faster: small differences are noise


def packing_pays(masks: Masks, exchange: Exchange, world: World, device: torch.device) -> tuple[bool, str]:
    """Whether to pack, and a sentence that says why. Collective: all ranks get the same answer.

    Gradients of the masked layers are packed, summed over the ranks and unpacked, and are masked and summed whole, a
    few times in turns; the slowest rank's best times decide.
    """
    if masks.density <= SURE:
        return True, f"survivors are packed: {masks.density:.1%} of the weights are left"
    seconds = {kind: min(times) for kind, times in _measure(masks, exchange, world, device).items()}
    slowest = world.allreduce(np.array([seconds[Packed], seconds[Masked]]), "packing: break-even", op="max")
    packed, whole = slowest.tolist()
    pays = packed <= CLEARLY * whole
    return pays, (
        f"{'survivors are packed' if pays else 'all gradients are sent'}: at density {masks.density:.2f} a step's "
        f"exchange takes {packed * 1e3:.1f} ms packed and {whole * 1e3:.1f} ms whole"
    )


def _measure(
    masks: Masks, exchange: Exchange, world: World, device: torch.device
) -> dict[type[Packed] | type[Masked], list[float]]:
    kinds: tuple[type[Packed] | type[Masked], ...] = (Packed, Masked)
    ways = {kind: [kind(masks.bits(layer.name), layer.weights, device) for layer in masks.layers] for kind in kinds}
    dense = torch.zeros(max(layer.weights for layer in masks.layers), device=device)
    buffers = {kind: torch.zeros(sum(way.length for way in ways[kind]), device=device) for kind in kinds}
    seconds: dict[type[Packed] | type[Masked], list[float]] = {kind: [] for kind in kinds}
    for _ in range(TRIES):
        for kind in kinds:
            parts = torch.split(buffers[kind], [way.length for way in ways[kind]])
            world.barrier("packing: break-even")
            start = time.perf_counter()
            for way, part, layer in zip(ways[kind], parts, masks.layers, strict=True):
                way.gather(dense[: layer.weights], part)
            exchange.begin(buffers[kind], "packing: break-even").wait()
            for way, part, layer in zip(ways[kind], parts, masks.layers, strict=True):
                if not way.whole:
                    way.scatter(part, dense[: layer.weights])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[kind].append(time.perf_counter() - start)
    return seconds
