"""What a job's round prunes: how much of what, and what its criterion must know of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import replace

import torch
from torch import Tensor

from hpcprune.distribution import sparsities_of_layers
from hpcprune.graph import graphs_of
from hpcprune.job import Job
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.nodes import prune_nodes
from hpcprune.optimizer import FOLLOWED, followed_only
from hpcprune.packing import dense_of
from hpcprune.prepare import Prepared
from hpcprune.progress import Display
from hpcprune.prune_section import Prune
from hpcprune.ranking import Pruned, Target, prune_layers
from hpcprune.schedule import layers_of_round, name_of_round, share_of_round, sparsity_of_round
from hpcprune.seeds import derive
from hpcprune.shards import Kind, Layer, Span
from hpcprune.stage import Carried
from hpcprune.statistics import Calibration, Gathered
from hpcprune.threshold import Threshold
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
    """Find the masks of the ledger's round, which comes to a share of all sparsities. Collective; no weight changes.

    Weights and edges are ranked apart. Nodes go before edges, which then count those that went with them.
    """
    thresholds: dict[str, Threshold] = {}
    seconds: Counter[str] = Counter()
    parameters = dict(prepared.model.named_parameters())
    for kind, criterion in job.prune.criteria.items():
        layers, shards = prepared.of(kind)
        statistic = followed(layers, carried) if criterion.looks_at == "training" else None
        if criterion.calibrates:
            with ledger.timed("calibrate"):
                statistic = gather_statistic(job, prepared, kind, world, ledger.round, display)
        target = target_of_round(job, kind, layers, ledger.round, share)
        before = masks.of(kind)
        if kind == "edges" and job.prune.graph is not None and job.prune.graph.nodes is not None:
            nodes = replace(target, sparsity=job.prune.graph.nodes * share_of_graph(job.prune, ledger.round, share))
            before = prune_nodes(graphs_of(prepared.model), parameters, before, shards, nodes, world, statistic)
        found = prune_layers(parameters, before, shards, target, world, statistic)
        masks = masks.updated(found.masks)
        thresholds |= found.thresholds
        seconds.update(found.seconds)
    return Pruned(masks, thresholds, seconds)


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


def share_of_graph(prune: Prune, number: int, share: float) -> float:
    """The share of the graph's sparsities that a round comes to; a graph does not go layer by layer."""
    return number / prune.rounds if prune.schedule == "layer-by-layer" else share


def target_of_round(job: Job, kind: Kind, layers: Sequence[Layer], number: int, share: float) -> Target:
    """What of a kind of layers is to be gone after the pruning of a round, which comes to a share of all sparsities."""
    prune, criterion = job.prune, job.prune.criteria[kind]
    if kind == "edges":
        assert prune.graph is not None
        sparsity = (prune.graph.edges or 0.0) * share_of_graph(prune, number, share)
        return Target(criterion, "global", sparsity, job.seed)
    if prune.scope == "global":
        return Target(criterion, prune.scope, prune.sparsity * share, job.seed)
    shares = sparsities_of_layers(prune, layers, share)
    if prune.schedule == "layer-by-layer":
        first = layers_of_round(len(layers), prune.rounds, number)
        shares = [0.0] * first + shares[first:]
    return Target(criterion, prune.scope, shares, job.seed)


def followed(layers: Sequence[Layer], carried: Carried) -> Gathered | None:
    """What a criterion has followed in the training so far; None where none follows anything."""
    totals = followed_only(carried.optimizer)

    def of_span(span: Span) -> Tensor:
        layer = layers[span.layer]
        values = totals[f"{layer.name}/{FOLLOWED}"]
        if values.numel() != layer.weights:
            assert carried.masks is not None, "only what is pruned has fewer values than weights"
            values = dense_of(values, carried.masks.bits(layer.name), layer.weights)
        return values[span.start : span.stop].double()

    return of_span if totals else None


def gather_statistic(job: Job, prepared: Prepared, kind: Kind, world: World, number: int, display: Display) -> Gathered:
    """What a kind's criterion must know of the data before a round's pruning. Collective."""
    criterion, calibrate = job.prune.criteria[kind], job.prune.calibrate
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
        return criterion.statistic().gather(watched, *prepared.of(kind))
