"""A training stage of a run, ready to step: survivors laid out as backward goes, their way to the other ranks, and the
optimizer's state.

Three choices are made once and kept in the ledger, since a run that goes on must make them as before: the order in
which backward finishes parameters (seen in the run's first step), whether packing pays in this round, and which layers
train sparse in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hpcprune.breakeven import packing_pays, sparse_layers
from hpcprune.buckets import Sender
from hpcprune.exchange import Exchange
from hpcprune.exchange.topk import TopK
from hpcprune.exchange.wire import Wire, wire_dtype
from hpcprune.job import Job
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.prepare import Prepared
from hpcprune.progress import Display
from hpcprune.schedule import name_of_round
from hpcprune.survivors import Survivors
from hpcprune.teacher import Teacher
from hpcprune.train import Trainer
from hpcprune.training import Optimizer, Training
from hpcprune.world import World

__all__ = ["Carried", "begin_stage"]


@dataclass(frozen=True)
class Carried:
    """What one stage leaves for the next, or a checkpoint for the run that goes on.

    optimizer: its tensors by name. own: this rank's, that no other has (top-k's velocities and residuals). Both are as
    packed under `masks`, which may have fewer survivors by the time that they are taken up.
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
    dense: Path,
) -> Trainer:
    """The trainer of this round's `stage`, "train" or "retrain", where the ledger stands. Collective.

    dense: the file of the dense network, which may teach.
    """
    training, plan = (job.train, prepared.train) if stage == "train" else (job.retrain, prepared.retrain)
    assert training is not None and plan is not None
    if stage == "retrain" and job.retrain.lr_schedule.name == "rewind":
        assert job.train is not None
        optimizer = training.optimizer.model_copy(update={"lr": job.train.optimizer.lr})
        training = training.model_copy(update={"optimizer": optimizer, "lr_schedule": job.train.lr_schedule})
    pruned = masks if ledger.round else None
    distill, teacher = job.retrain.distill if stage == "retrain" else None, None
    if distill is not None and plan.steps:
        teacher = world.together(lambda: Teacher(prepared.model, dense, distill), "reading the dense network")

    def begin(packing: bool) -> Trainer:
        sparse = ledger.sparse if packing and ledger.sparse else ()
        survivors = Survivors(prepared.model, pruned, order=ledger.order, packing=packing, sparse=sparse)
        sender, left = _sender(stage, job, training, survivors, world, exchange, carried)
        # Rounds that share a retraining share its samples' order too.
        name = (job.seed, stage, ledger.round if job.prune.every_steps is None else min(ledger.round, 1))
        task, model, data = prepared.task, prepared.model, prepared.data.train
        bucket_mb = job.retrain.bucket_mb
        layers = {layer.name for layer in prepared.layers if layer.kind == "weights"}
        criterion = next((each for each in job.prune.criteria.values() if each.looks_at == "training"), None)
        return Trainer(
            task,
            model,
            survivors,
            data,
            left,
            plan,
            world,
            exchange,
            name,
            sender,
            bucket_mb,
            layers,
            criterion,
            teacher,
        )

    if pruned is not None and plan.steps:
        chosen = _choose_packing(job)
        if chosen is None and ledger.packed is None:
            chosen = packing_pays(pruned, begin, prepared.model, world)
        if chosen is not None and chosen[0] != ledger.packed:
            ledger.packed, why = chosen
            display.say(f"{name_of_round(job.prune, ledger.round)}: {why}")
        if job.retrain.sparse == "auto" and ledger.packed and ledger.sparse is None:
            ledger.sparse, why = sparse_layers(pruned, begin, prepared.model, ledger, world)
            display.say(f"{name_of_round(job.prune, ledger.round)}: {why}")
    trainer = begin(ledger.packed is not False)
    if carried.optimizer:
        trainer.load_optimizer_state(carried.optimizer, carried.masks)
    return trainer


def _choose_packing(job: Job) -> tuple[bool, str] | None:
    """Whether to pack, and a sentence that says why; None where that is to be tried, unless it was in this round."""
    if job.retrain.top_k is not None:
        return True, "survivors are packed, as top_k needs"
    if job.retrain.packing == "always":
        return True, "survivors are packed, as retrain.packing says"
    if job.retrain.packing == "never":
        return False, "all gradients are sent, as retrain.packing says"
    if job.retrain.clip_norm is not None:
        # In which order the norm's squares are summed changes its last bits, which must not hang on a measurement.
        return True, "survivors are packed: clip_norm is given, and its result would hang on the choice"
    return None


def _sender(
    stage: str,
    job: Job,
    training: Training,
    survivors: Survivors,
    world: World,
    exchange: Exchange,
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
        wire=wire_dtype(retrain),
        share=retrain.top_k.share,
        warmup=retrain.top_k.warmup,
        momentum=retrain.optimizer.momentum,
        clip_norm=retrain.clip_norm,
    )
    if carried.own:
        sender.load_own_state(carried.own, carried.masks)
    # The velocity is the momentum, and each rank has clipped for itself.
    optimizer = Optimizer(**{**training.optimizer.model_dump(), "momentum": 0.0})
    return sender, training.model_copy(update={"optimizer": optimizer, "clip_norm": None})
