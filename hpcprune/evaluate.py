"""Evaluation: loss and metrics on the test data, each rank on its part; and what an inference costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchmetrics import Metric

from hpcprune.flops import Flops, count_flops
from hpcprune.graph import graphs_of, with_whole_graphs
from hpcprune.task import Task, to_device
from hpcprune.world import World, part_of_rank

__all__ = ["evaluate", "figures_of", "inference_seconds", "model_flops", "timed_batch"]

TIMED_SAMPLES = 64  # samples at most in the batch whose inference is timed
TIMED_RUNS, FEWEST_RUNS = 25, 1
TIMED_SECONDS = 10.0  # after which no more than the fewest runs are made, of networks that take long


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, dataset: Dataset[Any], batch_size: int, world: World) -> dict[str, float]:
    """Mean loss, and the task's metrics, over all samples; the same numbers on every rank.

    Collective: metrics are put together over the world, whatever carries the gradients.
    """
    assert isinstance(dataset, Sized)
    device = next(model.parameters()).device
    metrics = {name: metric.to(device) for name, metric in task.metrics().items()}
    for metric in metrics.values():
        _gather_over(world, metric)
    low, high = part_of_rank(len(dataset), world)
    loss = 0.0
    model.eval()
    for start in range(low, high, batch_size):
        stop = min(start + batch_size, high)
        batch = to_device(default_collate([dataset[index] for index in range(start, stop)]), device)
        output = task.predict(model, batch)
        loss += float(task.loss(output, batch)) * (stop - start)
        task.update(metrics, output, batch)
    total = world.allreduce(np.array([loss]), "evaluate: loss")
    return {"loss": float(total[0]) / len(dataset)} | figures_of(metrics)


def figures_of(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """What metrics come to; one that gives several figures, as of each class, has their names."""
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        several = value if isinstance(value, Mapping) else {name: value}
        found |= {each: float(figure) for each, figure in several.items()}
    return found


def _gather_over(world: World, metric: Metric) -> None:
    """Make a torchmetric gather its state over a world instead of torch.distributed's group."""

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        host = state.detach().cpu()
        return [each.to(state.device) for each in world.allgather(host, "evaluate: metrics")]

    for each in metric.modules():  # a wrapper has others within
        if isinstance(each, Metric):
            each.dist_sync_fn, each.distributed_available_fn = gather, lambda: world.size > 1


def timed_batch(dataset: Dataset[Any], batch_size: int, device: torch.device) -> tuple[Any, int]:
    """The batch whose inference is timed, as large as those of an evaluation at most; and how many samples it has."""
    assert isinstance(dataset, Sized)
    samples = [dataset[index] for index in range(min(TIMED_SAMPLES, batch_size, len(dataset)))]
    return to_device(default_collate(samples), device), len(samples)


@torch.no_grad()
def inference_seconds(task: Task, models: Sequence[nn.Module], batch: Any, device: torch.device) -> list[float]:
    """Seconds that each model takes to infer a batch: the median over runs, the models in turns."""
    seconds: list[list[float]] = [[] for _ in models]
    begun = time.perf_counter()
    for turn in range(TIMED_RUNS + 1):
        if turn > FEWEST_RUNS and time.perf_counter() - begun > TIMED_SECONDS:
            break
        for model, own in zip(models, seconds, strict=True):
            model.eval()
            start = time.perf_counter()
            task.predict(model, batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            own.append(time.perf_counter() - start)
    return [float(np.median(own[1:])) for own in seconds]


def model_flops(task: Task, model: nn.Module, dataset: Dataset[Any], densities: Mapping[str, float]) -> Flops:
    """FLOPs to infer one sample, dense and as the survivors need, by layer too.

    What edges cost is counted with and without the pruned ones, which a graph leaves out itself.
    """
    batch = to_device(default_collate([dataset[0]]), next(model.parameters()).device)
    graphs = graphs_of(model)
    of_weights = {f"model.{name}": value for name, value in densities.items() if name not in graphs}
    flops = count_flops(_Predict(task, model), (batch,), of_weights)
    whole = count_flops(_Predict(task, with_whole_graphs(model)), (batch,), of_weights) if graphs else flops
    by_layer = {
        name.removeprefix("model."): (dense, flops.by_layer.get(name, (0, 0))[1])
        for name, (dense, _) in whole.by_layer.items()
    }
    return replace(flops, dense=whole.dense, by_layer=by_layer)


class _Predict(nn.Module):
    """The task's prediction as a module, so that its FLOPs can be counted however it calls the model."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Any:
        return self.task.predict(self.model, batch)
