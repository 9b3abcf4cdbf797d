"""What a run tells on the terminal of itself: what runs on what, what pruning left, how good the network is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hpcprune.graph import graph_left, graphs_of
from hpcprune.masks import Masks
from hpcprune.native import cuda, library
from hpcprune.prepare import Prepared
from hpcprune.task import Task
from hpcprune.world import World

__all__ = ["evaluated", "introduction", "kernels_of", "pruned"]


def introduction(prepared: Prepared, world: World, exchange: str) -> Iterator[str]:
    """What runs on what, and what was chosen on its own. exchange: which, and why."""
    model, (layers, _) = prepared.model, prepared.of("weights")
    weights = sum(layer.weights for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    several = "s" if world.size > 1 else ""
    yield (
        f"{type(model).__name__} of {total:,} parameters, {weights:,} of them prunable in {len(layers)} layers, on "
        f"{world.size} rank{several} with {prepared.threads} thread{'s' if prepared.threads > 1 else ''} each"
    )
    for layer in prepared.of("edges")[0]:
        graph = graphs_of(model)[layer.name]
        yield f"its graph has {graph.nodes:,} nodes and {len(graph.weight):,} edges, prunable too"
    yield f"{exchange}; {kernels_of(prepared.device)}"


def pruned(model: nn.Module, masks: Masks) -> Iterator[str]:
    """What is left after a round's pruning."""
    of_weights = masks.of("weights")
    if of_weights:
        yield (
            f"pruned to {of_weights.sparsity:.2%}, {of_weights.nonzeros:,} of {of_weights.weights:,} weights survive"
        )
    graph = graph_left(model, masks)
    if graph is not None:
        (edges, edges_left), (nodes, nodes_left) = graph["edges"], graph["nodes"]
        yield f"{edges_left:,} of {edges:,} edges survive, {nodes_left:,} of {nodes:,} nodes have any"


def evaluated(task: Task, metrics: Mapping[str, float]) -> str:
    """The metrics, without those of each class."""
    shown = {"loss", *task.metrics()}
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name in shown)


def kernels_of(device: torch.device) -> str:
    """Which compiled kernels run, why these, and how to choose others."""
    of_the_cpu = f"kernels {library.describe()}; HPCPRUNE_NATIVE={'|'.join(library.CHOICES)} forces others"
    if device.type != "cuda":
        return of_the_cpu
    with torch.cuda.device(device):
        return f"{of_the_cpu}; on the GPU {cuda.describe()}"
