"""What a job's round prunes: how much of what, and what its criterion must know of the data."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace

import torch
from torch import Tensor

from hpcprune.criteria import CRITERIA
from hpcprune.distribution import sparsities_of_layers
from hpcprune.job import Job, Prune
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.optimizer import FOLLOWED, followed_only
from hpcprune.packing import dense_of
from hpcprune.prepare import Prepared
from hpcprune.progress import Display
from hpcprune.ranking import Pruned, Target, prune_layers
from hpcprune.schedule import layers_of_round, name_of_round, share_of_round, sparsity_of_round
from hpcprune.seeds import derive
from hpcprune.shards import Layer, Span
from hpcprune.stage import Carried
from hpcprune.statistics import Calibration, Gathered
from hpcprune.until import dense_metrics, parse, sparsity_to_try, tried
from hpcprune.world import World

__all__ = ["followed", "next_share", "prune_round"]


def prune_round(
    job: Job,
    prepared: Prepared,
    masks: Masks,
    ledger: Ledger,
    share: float,
    carried: Carried,
    world: World,
    display: Display,
) -> Pruned:
    """Find the masks of the ledger's round, which comes to a share of all sparsities. Collective; no weight changes."""
    statistic = followed(prepared.layers, carried)
    if job.prune.calibrate is not None:
        with ledger.timed("calibrate"):
            statistic = gather_statistic(job, prepared, world, ledger.round, display)
    target = target_of_round(job, prepared.layers, ledger.round, share)
    return prune_layers(dict(prepared.model.named_parameters()), masks, prepared.shards, target, world, statistic)


def next_share(prune: Prune, ledger: Ledger) -> float | None:
    """The share of all sparsities that the next round is to come to; None where the last is over."""
    number = ledger.round + 1
    if prune.until is None:
        return share_of_round(prune, number) if number <= prune.rounds else None
    goal = parse(prune.until)
    assert goal is not None
    scheduled = [sparsity_of_round(prune, each) for each in range(1, prune.rounds + 1)]
    dense_met = goal.met(*[dense_metrics(ledger.evaluations)] * 2)
    sparsity = sparsity_to_try(scheduled, tried(goal, ledger.evaluations), dense_met)
    return None if sparsity is None else sparsity / prune.sparsity


def target_of_round(job: Job, layers: Sequence[Layer], number: int, share: float) -> Target:
    """What is to be gone after the pruning of a round, which comes to a share of all sparsities."""
    prune, criterion = job.prune, CRITERIA[job.prune.criterion]
    if prune.scope == "global":
        return Target(criterion, prune.scope, prune.sparsity * share, job.seed)
    shares = sparsities_of_layers(prune, layers, share)
    if prune.schedule == "layer-by-layer":
        first = layers_of_round(len(layers), prune.rounds, number)
        shares = [0.0] * first + shares[first:]
    return Target(criterion, prune.scope, shares, job.seed)


def followed(layers: Sequence[Layer], carried: Carried) -> Gathered | None:
    """What the criterion has followed in the training so far; None where it follows nothing."""
    totals = followed_only(carried.optimizer)

    def of_span(span: Span) -> Tensor:
        layer = layers[span.layer]
        values = totals[f"{layer.name}/{FOLLOWED}"]
        if values.numel() != layer.weights:
            assert carried.masks is not None, "only what is pruned has fewer values than weights"
            values = dense_of(values, carried.masks.bits(layer.name), layer.weights)
        return values[span.start : span.stop].double()

    return of_span if totals else None


def gather_statistic(job: Job, prepared: Prepared, world: World, number: int, display: Display) -> Gathered:
    """What the criterion must know of the data before a round's pruning. Collective."""
    criterion, calibrate = CRITERIA[job.prune.criterion], job.prune.calibrate
    assert calibrate is not None
    task, model, dataset = prepared.task, prepared.model, prepared.data.train
    assert isinstance(dataset, Sized)
    generator = torch.Generator().manual_seed(derive(job.seed, "calibrate"))
    samples = torch.randperm(len(dataset), generator=generator)[: calibrate.samples].tolist()
    calibration = Calibration(
        model,
        dataset,
        samples,
        calibrate.batch_size,
        lambda batch: task.predict(model, batch),
        lambda batch: task.loss(task.predict(model, batch), batch),
        (job.seed, "prune", number),
        world,
    )
    with display.stage(f"{name_of_round(job.prune, number)}: calibrate", calibration.turns) as progress:
        watched = replace(calibration, advance=lambda: progress.advance(""))
        return criterion.statistic().gather(watched, prepared.layers, prepared.shards)
