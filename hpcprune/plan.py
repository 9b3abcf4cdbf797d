"""The plan of a run: who scores what, how much travels, and what memory a rank needs, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hpcprune.job import Job
from hpcprune.prepare import Prepared
from hpcprune.schedule import pruned_count
from hpcprune.shards import Layer, Span, deal, imbalance
from hpcprune.world import as_ranges

__all__ = ["Plan", "make_plan", "print_plan"]

MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}  # tensors that the optimizer keeps for each weight
WIRE_BYTES = {"float32": 8, "bfloat16": 2, "float16": 2}  # at most, for each gradient; float32 sends them as they are
INDEX_BYTES = 8  # of a survivor's place in its layer, where the mask's bits do not do
FLAG_BYTES = 1  # of a weight's place in a mask that is not packed


@dataclass(frozen=True)
class Plan:
    """Shards, and bytes a rank sends and holds at the job's final sparsity."""

    layers: Sequence[Layer]
    shards: Sequence[Sequence[Span]]
    imbalance: float
    mask_bytes: int
    step_bytes_dense: int
    step_bytes: int
    weight_bytes: int
    memory_bytes: int


def make_plan(job: Job, prepared: Prepared, ranks: int) -> Plan:
    """Plan the job's run on a number of ranks."""
    layers, shards = prepared.layers, deal(prepared.layers, ranks)
    trained = {name: each for name, each in prepared.model.named_parameters() if each.requires_grad}
    prunable = [trained[layer.name] for layer in layers if layer.name in trained]
    weights, packing = sum(each.numel() for each in prunable), job.retrain.packing != "never"
    edges = sum(trained[layer.name].numel() for layer in prepared.of("edges")[0] if layer.name in trained)
    of_edges = 0.0 if job.prune.graph is None else job.prune.graph.edges or 0.0
    gone = pruned_count(weights - edges, job.prune.sparsity) + pruned_count(edges, of_edges)
    share = gone / max(1, weights) if packing else 0.0
    dense, packed = _bytes(trained.values()), _bytes(trained.values()) - round(share * _bytes(prunable))
    width = WIRE_BYTES[job.retrain.wire]
    sent = _bytes(trained.values(), width) - round(share * _bytes(prunable, width))
    optimizer = job.retrain.optimizer
    moments = 0 if optimizer.name == "sgd" and not optimizer.momentum else MOMENTS[optimizer.name]
    masks = sum((layer.weights + 7) // 8 for layer in layers)
    # Dense weights and gradients; packed weights, gradients and moments, some of them the dense weights; the masks.
    memory = prepared.dense_bytes + dense + packed * (2 + moments) + masks
    memory -= dense - _bytes(prunable) if packing else dense
    if not packing:
        memory += weights * FLAG_BYTES
    elif any(each.is_cuda for each in prunable):
        memory += (weights - gone) * INDEX_BYTES
    return Plan(layers, shards, imbalance(shards), masks, dense, sent, prepared.dense_bytes, memory)


def _bytes(tensors: Iterable[Tensor], width: int = 8) -> int:
    """Bytes of tensors whose elements take `width` bytes at most."""
    return sum(each.numel() * min(each.element_size(), width) for each in tensors)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table of ranks and a few lines."""
    table = Table(title=f"{len(plan.layers)} layers over {len(plan.shards)} ranks", title_justify="left")
    for heading, justify in (("rank", "right"), ("weights", "right"), ("share", "right"), ("scores", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    total = sum(layer.weights for layer in plan.layers)
    for rank, shard in enumerate(plan.shards):
        weights = sum(span.weights for span in shard)
        table.add_row(str(rank), f"{weights:,}", f"{weights / total:.1%}", Text(_describe(shard, plan.layers)))
    console.print(table)
    sent, dense = _size(plan.step_bytes), _size(plan.step_bytes_dense)
    lines = {
        "imbalance": f"{plan.imbalance:.3f} (the largest shard over the mean)",
        "masks, each pruning": f"{_size(plan.mask_bytes)} to every rank; the threshold under 1 MB",
        "gradients, each step": f"{sent} a rank at the final sparsity; dense {dense}",
        "memory a rank": f"about {_size(plan.memory_bytes)} to retrain, without activations and data",
    }
    for name, text in lines.items():
        console.print(f"{name + ':':22} {text}", highlight=False)


def _describe(shard: Sequence[Span], layers: Sequence[Layer]) -> str:
    """The spans in words: whole layers by name, parts with their rows where they begin and end at one."""
    words = []
    for span in shard:
        layer = layers[span.layer]
        if span.weights == layer.weights:
            words.append(layer.name)
        elif span.start % layer.row == 0 and span.stop % layer.row == 0:
            rows = as_ranges(range(span.start // layer.row, span.stop // layer.row))
            words.append(f"{layer.name} rows {rows}")
        else:
            words.append(f"{layer.name} weights {span.start}-{span.stop - 1}")
    return ", ".join(words) or "nothing: there are more ranks than parts"


def _size(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 100_000 else f"{size / 1e3:,.2f} kB"
