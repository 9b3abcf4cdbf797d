"""The attention that a network's layers give each edge of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpcprune.errors import JobError
from hpcprune.graph import Graph, graphs_of
from hpcprune.shards import Layer, Span
from hpcprune.statistics.calibration import Calibration
from hpcprune.statistics.statistic import Gathered

__all__ = ["Attention"]

_ASKING = "return_attention_weights"  # what torch_geometric's layers call the wish to be told


class Attention:
    """The sum over batches, layers and both directions of an edge of its attention coefficient, the mean over heads.

    Of layers that can tell it, as torch_geometric's GATConv, GATv2Conv and TransformerConv can. They tell the edges
    too, the loops that they add among them, which are none of the graph's.
    """

    def check(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        if len(layers) > 1:
            raise JobError(
                f"prune.graph.criterion: attention would not know which of {len(layers)} graphs a layer attends over; "
                "choose another criterion"
            )
        if not _attending(model):
            raise JobError(
                f"prune.graph.criterion: attention is to score edges, and {type(model).__name__} has no layer that "
                f"tells it (as GATConv and GATv2Conv do, by {_ASKING}); write criterion: magnitude"
            )

    def gather(self, calibration: Calibration, layers: Sequence[Layer], shards: Sequence[Sequence[Span]]) -> Gathered:
        model = calibration.model
        (graph,) = (graph for name, graph in graphs_of(model).items() if name == layers[0].name)
        total = torch.zeros(len(graph.weight), dtype=torch.float64, device=graph.weight.device)
        seen: set[str] = set()
        with calibration.mode(training=False), torch.no_grad(), ExitStack() as hooks:
            for path, module in _attending(model).items():
                hooks.enter_context(_told(module, _adding(path, graph, total, seen)))
            for indices in calibration.own():
                if indices:
                    calibration.run(calibration.batch(indices))
        if not any(calibration.world.allgather(bool(seen), "calibrating: whether a layer attended")):
            raise JobError(
                "prune.graph.criterion: attention is to score edges, and no layer that tells it was called while the "
                "model ran on samples; choose another criterion"
            )
        calibration.check_finite("" if total.isfinite().all() else f"the attention of {min(seen)}")
        own: dict[Span, Tensor] = {}
        for owner, shard in enumerate(shards):
            for span in shard:
                found = calibration.sum_for_owner(total[span.start : span.stop], owner, layers[span.layer].name)
                if found is not None:
                    own[span] = found
        return own.__getitem__


_Told = Callable[[Tensor, Tensor], None]


def _attending(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can tell their attention, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if _ASKING in inspect.signature(type(module).forward).parameters
    }


def _adding(path: str, graph: Graph, total: Tensor, seen: set[str]) -> _Told:
    def add(edge_index: Tensor, coefficients: Tensor) -> None:
        places = graph.find(edge_index)
        strange = (places < 0) & (edge_index[0] != edge_index[1])
        if strange.any():
            source, target = edge_index[:, strange][:, 0].tolist()
            raise JobError(
                f"prune.graph.criterion: attention is to score edges, and {path} attends over one from {source} to "
                f"{target} that the graph does not have; give it those of graph(), or choose another criterion"
            )
        known = places >= 0
        total.index_add_(0, places[known], coefficients.double().flatten(1).mean(1)[known])
        seen.add(path)

    return add


@contextmanager
def _told(module: nn.Module, told: _Told) -> Iterator[None]:
    """Have a layer tell its attention in each call, besides what it gives its caller."""
    asked: list[bool] = []  # whether the caller wants to be told too, of the calls that are not over

    def ask(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        asked.append(bool(named.get(_ASKING)))
        return inputs, named | {_ASKING: True}

    def take(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        result, (edge_index, coefficients) = output
        told(edge_index, coefficients)
        return output if asked.pop() else result

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(take).remove)
        yield
