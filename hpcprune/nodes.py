"""Nodes as things to prune: those whose edges' scores have the lowest sums lose all of their edges.

Every rank gets the scores of all edges and sums them in their global order, so that the sums are the same bit for bit
on any number of ranks; the nodes are then ranked as all else is, by the exact threshold over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from hpcprune.graph import Graph
from hpcprune.masks import Masks
from hpcprune.ranking import Target, score
from hpcprune.schedule import pruned_count
from hpcprune.shards import Span
from hpcprune.statistics import Gathered
from hpcprune.threshold import select_survivors
from hpcprune.world import World, part_of_rank

__all__ = ["prune_nodes"]

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def prune_nodes(
    graphs: Mapping[str, Graph],
    parameters: Mapping[str, torch.Tensor],
    masks: Masks,
    shards: Sequence[Sequence[Span]],
    target: Target,
    world: World,
    statistic: Gathered | None = None,
) -> Masks:
    """Prune the edges of nodes, until `target.sparsity` of those that have an edge at all have none. Collective.

    Exactly as many go as are still wanted; a node that loses its last edge with a neighbour is gone beyond them. The
    nodes of all graphs are ranked together, equal ones in the order of graphs and nodes.

    Args:
        graphs: by the names of their parameters, those of `masks` among them.
        statistic: what the criterion asked for; None where it looks at weights alone.
    """
    assert isinstance(target.sparsity, (int, float))
    scores = _scores(parameters, masks, shards, target, world, statistic)
    sums, had, has = [], [], []
    for layer in masks.layers:
        graph, mask = graphs[layer.name], masks[layer.name].numpy()
        sums.append(_sum(graph, np.where(mask, scores[layer.name], 0)))
        had.append(_sum(graph, np.ones(layer.weights)) > 0)
        has.append(_sum(graph, mask.astype(np.float64)) > 0)
    total, left = int(np.concatenate(had).sum()), np.flatnonzero(np.concatenate(has))
    count = max(0, pruned_count(total, target.sparsity) - (total - len(left)))
    stay = np.ones(sum(graphs[layer.name].nodes for layer in masks.layers), np.bool_)
    stay[left] = _select(np.concatenate(sums)[left], count, world)
    bits, first = [], 0
    for layer in masks.layers:
        graph, kept = graphs[layer.name], masks[layer.name].numpy().copy()
        stays = stay[first : first + graph.nodes]
        bits.append(np.packbits(kept & stays[graph.ends.cpu().numpy()].all(0), bitorder="little"))
        first += graph.nodes
    return Masks(masks.layers, bits)


def _scores(
    parameters: Mapping[str, torch.Tensor],
    masks: Masks,
    shards: Sequence[Sequence[Span]],
    target: Target,
    world: World,
    statistic: Gathered | None,
) -> dict[str, Floats]:
    """The scores of all edges of all ranks."""
    own = [score(parameters, masks.layers[s.layer], s, target, statistic).double() for s in shards[world.rank]]
    flat = np.concatenate([np.empty(0), *(each.cpu().numpy() for each in own)])
    line = np.concatenate(world.gather_arrays(flat, "scores of edges"))
    edges = np.cumsum([layer.weights for layer in masks.layers])
    return dict(zip((layer.name for layer in masks.layers), np.split(line, edges[:-1]), strict=True))


def _sum(graph: Graph, of_edges: Floats) -> Floats:
    """The sum over each node's edges; a loop is one of them."""
    sources, targets = graph.ends.cpu().numpy()
    found = np.zeros(graph.nodes)
    np.add.at(found, sources, of_edges)
    np.add.at(found, targets, np.where(sources == targets, 0, of_edges))
    return found


def _select(scores: Floats, count: int, world: World) -> Flags:
    """Which stay where the `count` lowest go."""
    low, high = part_of_rank(len(scores), world)
    ((_, (bits,)),) = select_survivors([[scores[low:high]]], [count], world, names=[["the nodes"]])
    own = np.unpackbits(bits, count=high - low, bitorder="little")
    return np.concatenate(world.gather_arrays(own, "masks of nodes")).view(np.bool_)
