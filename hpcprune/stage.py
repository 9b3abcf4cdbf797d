"""A training stage of a run, ready to step: survivors laid out as backward goes, their way to the other ranks, and the
optimizer's state.

Two choices are made once and kept in the ledger, since a run that goes on must make them as before: the order in which
backward finishes parameters (seen in the run's first step), and whether packing pays in this round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcprune.breakeven import packing_pays
from hpcprune.buckets import Sender
from hpcprune.exchange import Exchange
from hpcprune.exchange.topk import TopK
from hpcprune.exchange.wire import Wire, wire_dtype
from hpcprune.job import Job
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.prepare import Prepared
from hpcprune.progress import Display
from hpcprune.survivors import Survivors
from hpcprune.train import Trainer
from hpcprune.training import Optimizer, Training
from hpcprune.world import World

__all__ = ["Carried", "begin_stage"]


@dataclass(frozen=True)
class Carried:
    """What one stage leaves for the next, or a checkpoint for the run that goes on.

    optimizer: its tensors by name, as packed under `masks`. own: this rank's, that no other has (top-k's residuals).
    """

    optimizer: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    masks: Masks | None


def begin_stage(
    stage: str,
    job: Job,
    prepared: Prepared,
    masks: Masks,
    ledger: Ledger,
    carried: Carried,
    world: World,
    exchange: Exchange,
    display: Display,
) -> Trainer:
    """The trainer of this round's `stage`, "train" or "retrain", where the ledger stands. Collective."""
    pruned = masks if ledger.round else None
    if pruned is not None and ledger.packed is None:
        ledger.packed, why = _choose_packing(job, pruned, world, exchange, prepared.device)
        display.say(f"round {ledger.round}/{job.prune.rounds}: {why}")
    survivors = Survivors(prepared.model, pruned, order=ledger.order, packing=ledger.packed is not False)
    training, plan = (job.train, prepared.train) if stage == "train" else (job.retrain, prepared.retrain)
    assert training is not None and plan is not None
    sender, training = _sender(stage, job, training, survivors, world, exchange, ledger, carried)
    name = (job.seed, stage, ledger.round)
    bucket = int(job.retrain.bucket_mb * 1e6)
    task, model, data = prepared.task, prepared.model, prepared.data.train
    trainer = Trainer(task, model, survivors, data, training, plan, world, exchange, name, sender, bucket)
    if carried.optimizer:
        trainer.load_optimizer_state(carried.optimizer, carried.masks)
    return trainer


def _choose_packing(job: Job, masks: Masks, world: World, exchange: Exchange, device: torch.device) -> tuple[bool, str]:
    if job.retrain.top_k is not None:
        # Among how many the largest are chosen changes the result, so it must not hang on a measurement.
        return True, "survivors are packed, as top_k needs"
    if job.retrain.packing == "always":
        return True, "survivors are packed, as retrain.packing says"
    if job.retrain.packing == "never":
        return False, "all gradients are sent, as retrain.packing says"
    return packing_pays(masks, exchange, world, device)


def _sender(
    stage: str,
    job: Job,
    training: Training,
    survivors: Survivors,
    world: World,
    exchange: Exchange,
    ledger: Ledger,
    carried: Carried,
) -> tuple[Sender, Training]:
    """How gradients travel in a stage, and the training that is left for the loop to do."""
    retrain = job.retrain
    if stage == "train":
        return Wire(exchange, None), training
    if retrain.top_k is None:
        return Wire(exchange, wire_dtype(retrain)), training
    sender = TopK(
        exchange,
        survivors,
        world.size,
        share=retrain.top_k.share,
        warmup=retrain.top_k.warmup,
        momentum=retrain.optimizer.momentum,
        clip_norm=retrain.clip_norm,
    )
    if carried.own and ledger.step:
        sender.load_own_state(carried.own)
    # The velocity is the momentum, and each rank has clipped for itself.
    optimizer = Optimizer(**{**retrain.optimizer.model_dump(), "momentum": 0.0})
    return sender, training.model_copy(update={"optimizer": optimizer, "clip_norm": None})
