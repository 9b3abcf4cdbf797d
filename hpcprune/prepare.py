"""Preparing a run: everything that can be wrong with the job, the task or the weights is found here, before any work.

Every rank prepares for itself (the model and the data are the same everywhere); a mistake on any rank is told once.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpcprune.criteria import Criterion
from hpcprune.distribution import sparsities_of_layers
from hpcprune.errors import JobError, NumericsError, TaskError
from hpcprune.evaluate import figures_of
from hpcprune.job import Job
from hpcprune.launch import check_gpus
from hpcprune.layers import check_rows, find_layers
from hpcprune.schedule import steps_of_round
from hpcprune.seeds import seed_all
from hpcprune.shards import Kind, Layer, Span, deal, shards_of_kind
from hpcprune.statistics import Calibration
from hpcprune.task import Data, Task, build_data, build_model, call_user, load_task
from hpcprune.train import Plan, plan_steps
from hpcprune.until import parse
from hpcprune.weights import fit_weights, load_weights
from hpcprune.world import World, threads_of_a_rank

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What a run works with. `train` is None where the dense weights are loaded."""

    task: Task
    model: nn.Module
    data: Data
    layers: list[Layer]
    shards: list[list[Span]]
    train: Plan | None
    retrain: Plan
    threads: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def of(self, kind: Kind) -> tuple[list[Layer], list[list[Span]]]:
        """The layers of a kind, and what of them each rank owns."""
        return shards_of_kind(self.layers, self.shards, kind)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))


def prepare(job: Job, world: World) -> Prepared:
    """Load the task, build its model and data, load the dense weights, and deal the layers. Collective.

    Raises:
        HpcpruneError: for any mistake in what was given, on every rank.
    """
    # Asking is collective, so every rank asks before any of them can fail.
    device = _choose_device(world)
    gpus = world.allgather(_name_gpu(device), "preparing: GPUs")
    threads = threads_of_a_rank(world)
    torch.set_num_threads(threads)
    return world.together(lambda: _prepare(job, world, threads, device, gpus), "preparing")


def _prepare(job: Job, world: World, threads: int, device: torch.device, gpus: list[str]) -> Prepared:
    check_gpus(job.retrain.exchange, gpus)
    task = load_task(job.task, job.folder)
    seed_all(job.seed, "model")
    model = build_model(task)
    layers = find_layers(
        model, job.prune.include, job.prune.exclude, embeddings=job.prune.embeddings, kinds=[*job.prune.criteria]
    )
    of_weights = [layer for layer in layers if layer.kind == "weights"]
    sparsities_of_layers(job.prune, of_weights, 1.0)
    if job.prune.schedule == "layer-by-layer" and job.prune.rounds > len(of_weights):
        raise JobError(
            f"prune.rounds: {job.prune.rounds} is more than the {len(of_weights)} layers that layer-by-layer goes "
            f"through; give at most {len(of_weights)}"
        )
    for kind, criterion in job.prune.criteria.items():
        criterion.check(model, [layer for layer in layers if layer.kind == kind])
    if job.prune.scope == "row":
        check_rows(model, of_weights)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TaskError(
            f"task: {type(task).__name__}.model(): none of its parameters requires a gradient, so nothing could be "
            "trained; leave requires_grad as it is on those that may change"
        )
    if job.weights_file is not None:
        fit_weights(model, load_weights(job.weights_file), job.weights_file)
    else:
        _check_finite(model, task)
    data = build_data(task, world.size)
    for part in (data.train, data.test):
        call_user(lambda part=part: part[0], f"{type(task).__name__}.data")
    assert isinstance(data.train, Sized)
    samples = len(data.train)
    dense = None
    if job.weights == "train":
        assert job.train is not None
        dense = plan_steps(job.train, samples, world.size, "train")
    retrain = _rewound(job, plan_steps(job.retrain, samples, world.size, "retrain"), dense)
    if job.prune.every_steps is not None and not steps_of_round(job.prune, job.prune.rounds, retrain.steps):
        raise JobError(
            f"prune.every_steps: {job.prune.rounds} prunings, one every {job.prune.every_steps} steps, take more than "
            f"the {retrain.steps} steps of retrain; retrain for longer, or prune less often"
        )
    model.to(device)
    _rehearse(job, task, model, layers, data)
    if dense is None or not dense.steps:
        _check_learned(job, model, layers)
    shards = deal(layers, world.size, whole_rows=job.prune.scope == "row")
    return Prepared(task, model, data, layers, shards, dense, retrain, threads)


def _rehearse(job: Job, task: Task, model: nn.Module, layers: Sequence[Layer], data: Data) -> None:
    """Do on a sample what would else go wrong after the dense training: watch inputs, take outputs' distance, and look
    for the goal's metric.
    """

    def run(batch: Any) -> Any:
        return task.predict(model, batch)

    def loss(batch: Any) -> Tensor:
        return task.loss(run(batch), batch)

    calibration = Calibration(model, data.train, [0], 1, run, loss, (job.seed, "rehearsal"), World.alone())
    for kind, criterion in job.prune.criteria.items():
        its = [layer for layer in layers if layer.kind == kind]
        if criterion.looks_at == "inputs":
            criterion.statistic().gather(calibration, its, deal(its, 1))
        if kind == "edges" and criterion.of_values:
            _check_used(calibration, criterion, its)
    if job.retrain.distill is None and job.prune.until is None:
        return
    with calibration.mode(training=False), torch.no_grad():
        batch = calibration.batch([0])
        output = run(batch)
        if job.retrain.distill is not None:
            task.distance(output, output, job.retrain.distill.temperature)
        if job.prune.until is not None:
            metrics = task.metrics()
            task.update(metrics, output, batch)
            _check_goal(job.prune.until, ["loss", *figures_of(metrics)])


def _check_used(calibration: Calibration, criterion: Criterion, graphs: Sequence[Layer]) -> None:
    """Raise JobError where nothing can be learned of a graph's edges, since the network does not use their numbers."""
    parameters = [calibration.model.get_parameter(layer.name) for layer in graphs]
    with calibration.mode(training=False), torch.enable_grad():
        loss = calibration.loss(calibration.batch([0]))
        found = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None]
    for layer, gradient in zip(graphs, found, strict=False):
        if gradient is None:
            raise JobError(
                f"prune.graph.criterion: {criterion.name} scores edges by what is learned of them, and the network "
                f"does not use {layer.name}; hand both that graph() gives to its layers, conv(x, *self.graph()), or "
                f"write criterion: attention (or random)"
            )


def _check_learned(job: Job, model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise JobError where edges would be ranked by magnitudes that are all the same, as nothing is trained before."""
    criterion = job.prune.criteria.get("edges")
    graphs = [model.get_parameter(layer.name) for layer in layers if layer.kind == "edges"]
    if criterion is None or not criterion.of_values or criterion.looks_at != "weights":
        return
    if all(len(torch.unique(each)) == 1 for each in graphs):
        raise JobError(
            f"prune.graph.criterion: {criterion.name} ranks edges by what was learned of them, and nothing is trained "
            "before the first pruning; train first, or write criterion: sensitivity"
        )


def _check_goal(text: str, names: Sequence[str]) -> None:
    goal = parse(text)
    if goal is not None and goal.metric not in names:
        near = difflib.get_close_matches(goal.metric, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise JobError(f"prune.until: the task has no metric {goal.metric!r}; {hint}(it has: {', '.join(names)})")


def _rewound(job: Job, retrain: Plan, dense: Plan | None) -> Plan:
    """The plan of the retraining with the learning rate of the dense training, if it is to have that."""
    if dense is not None and job.prune.rewind is not None and job.prune.rewind > dense.steps:
        raise JobError(
            f"prune.rewind: {job.prune.rewind} is behind the {dense.steps} steps of the dense training; give one of "
            "them"
        )
    if dense is None or job.retrain.lr_schedule.name != "rewind":
        return retrain
    start = job.retrain.lr_schedule.start
    if start + retrain.steps > dense.steps:
        raise JobError(
            f"retrain.lr_schedule.start: from step {start} on the dense training has {max(0, dense.steps - start)} "
            f"steps, and a round retrains for {retrain.steps}; begin earlier, or retrain for less"
        )
    return replace(retrain, lr_start=start, lr_steps=dense.steps)


def _choose_device(world: World) -> torch.device:
    """The rank's GPU, dealt by turns on each host, or the CPU. Collective."""
    place = world.local_rank
    gpus = torch.cuda.device_count()
    return torch.device("cuda", place % gpus) if gpus else torch.device("cpu")


def _name_gpu(device: torch.device) -> str:
    """A name that no other GPU of the cluster has; of the CPU, none."""
    if device.type != "cuda":
        return ""
    return f"GPU {torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}"


def _check_finite(model: nn.Module, task: Task) -> None:
    """Raise NumericsError if a weight that training would begin with is NaN or infinite."""
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise NumericsError(
                f"task: {type(task).__name__}.model(): {name}: {bad} of {parameter.numel()} weights are NaN or "
                "infinite; initialise them"
            )
