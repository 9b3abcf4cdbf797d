"""What a job's round prunes: how much of what, and what its criterion must know of the data."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace

import torch

from hpcprune.criteria import CRITERIA
from hpcprune.distribution import sparsities_of_layers
from hpcprune.job import Job
from hpcprune.prepare import Prepared
from hpcprune.progress import Display
from hpcprune.ranking import Goal
from hpcprune.schedule import sparsity_of_round
from hpcprune.seeds import derive
from hpcprune.shards import Layer
from hpcprune.statistics import Calibration, Gathered
from hpcprune.world import World

__all__ = ["gather_statistic", "goal_of_round"]


def goal_of_round(job: Job, layers: Sequence[Layer], number: int) -> Goal:
    """What is to be gone after the pruning of a round."""
    prune, sparsity = job.prune, sparsity_of_round(job.prune, number)
    shares = sparsity if prune.scope == "global" else sparsities_of_layers(prune, layers, sparsity)
    return Goal(CRITERIA[prune.criterion], prune.scope, shares, job.seed)


def gather_statistic(job: Job, prepared: Prepared, world: World, number: int, title: str, display: Display) -> Gathered:
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
    with display.stage(title, calibration.turns) as progress:
        watched = replace(calibration, advance=lambda: progress.advance(""))
        return criterion.statistic().gather(watched, prepared.layers, prepared.shards)
