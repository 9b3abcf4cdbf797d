"""A graph whose edges can be pruned, beside the weights of the network that passes messages along them.

It is a module with one parameter: a number for each edge, 1 at first, a mask that training learns beside the weights.
An edge whose number is 0 is pruned: it is left out of what the network is given, and costs nothing any more. A number
below 0 says that the edge does harm, and more so the further: it is no magnitude.

Chen et al., "A Unified Lottery Ticket Hypothesis for Graph Neural Networks", 2021, https://arxiv.org/abs/2102.06790.
There the edges' messages are multiplied with their numbers until these are cut to 0 and 1 in the end. Here they are
always multiplied with 1, while the gradient goes to the number as if it were with that (Bengio et al., "Estimating or
Propagating Gradients Through Stochastic Neurons", 2013, https://arxiv.org/abs/1308.3432). So the dense network is the
one that it would be without a mask, and the pruned one is not told another graph in training than in the end.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from hpcprune.errors import TaskError
from hpcprune.masks import Masks

__all__ = ["Graph", "graph_left", "graphs_of", "with_whole_graphs"]

Model = TypeVar("Model", bound=nn.Module)


class Graph(nn.Module):
    """A graph as a part of a model: `conv(x, *self.graph())`, or `conv(x, self.graph()[0])` where weights are not used.

    Where the reverse of every edge is there too, the graph is undirected: an edge and its reverse are one, with one
    number, and go together.
    """

    edge_index: Tensor
    of_direction: Tensor
    keys: Tensor

    def __init__(self, edge_index: Tensor, nodes: int) -> None:
        """A graph of some nodes.

        Args:
            edge_index: int64 of shape [2, directions]: each column a source and a target in [0, nodes), no two alike.

        Raises:
            TaskError: it is not that.
        """
        super().__init__()
        if edge_index.dtype != torch.int64 or edge_index.dim() != 2 or edge_index.shape[0] != 2:
            given = f"{str(edge_index.dtype).removeprefix('torch.')} of shape {[*edge_index.shape]}"
            raise TaskError(f"Graph: edge_index is {given}; give int64 of shape [2, edges], sources and targets")
        if edge_index.numel() and not (int(edge_index.min()) >= 0 and int(edge_index.max()) < nodes):
            raise TaskError(
                f"Graph: edge_index names nodes from {int(edge_index.min())} to {int(edge_index.max())}, and there are "
                f"{nodes}; number them from 0"
            )
        self.nodes = nodes
        forth, back = (self._keys(edge_index[first], edge_index[1 - first]) for first in (0, 1))
        if len(torch.unique(forth)) < len(forth):
            raise TaskError("Graph: edge_index has an edge twice; give each once (torch_geometric.utils.coalesce)")
        self.undirected = torch.equal(forth.sort().values, back.sort().values)
        one_for_both = torch.minimum(forth, back) if self.undirected else forth
        keys, of_direction = torch.unique(one_for_both, return_inverse=True)
        # The task brings them, so they need not lie in checkpoints.
        self.register_buffer("edge_index", edge_index.clone(), persistent=False)
        self.register_buffer("of_direction", of_direction, persistent=False)
        self.register_buffer("keys", keys, persistent=False)
        self.weight = nn.Parameter(torch.ones(len(keys)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The edges that survive: edge_index, [2, directions], and a 1 for each whose gradient is learned."""
        left = (self.weight != 0)[self.of_direction]
        learned = self.weight[self.of_direction[left]]
        return self.edge_index[:, left], 1 + (learned - learned.detach())

    @property
    def ends(self) -> Tensor:
        """The two nodes of each edge: int64, [2, edges], in the order of `weight`."""
        return torch.stack([self.keys // self.nodes, self.keys % self.nodes])

    def find(self, edge_index: Tensor) -> Tensor:
        """The place in `weight` of each column of an edge_index, [directions]; -1 where it is no edge of this graph."""
        forth, back = (self._keys(edge_index[first], edge_index[1 - first]) for first in (0, 1))
        wanted = torch.minimum(forth, back) if self.undirected else forth
        places = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == wanted, places, -1)

    def _keys(self, sources: Tensor, targets: Tensor) -> Tensor:
        return sources * self.nodes + targets

    def extra_repr(self) -> str:
        return f"{self.nodes} nodes, {len(self.weight)} {'undirected' if self.undirected else 'directed'} edges"


def graphs_of(model: nn.Module) -> dict[str, Graph]:
    """The graphs of a model, by the names of their parameters."""
    return {f"{path}.weight".lstrip("."): module for path, module in model.named_modules() if isinstance(module, Graph)}


def with_whole_graphs(model: Model) -> Model:
    """A copy of a model in which no edge is pruned; the model itself where it has no graph."""
    if not graphs_of(model):
        return model
    whole = copy.deepcopy(model)
    for graph in graphs_of(whole).values():
        nn.init.ones_(graph.weight)
    return whole


def graph_left(model: nn.Module, masks: Masks) -> dict[str, tuple[int, int]] | None:
    """Of all of a model's graphs: how many edges there are, and survive; how many nodes have any, and have any left.

    None where the masks prune no graph.
    """
    edges, graphs = masks.of("edges"), graphs_of(model)
    if not edges:
        return None
    ends = {name: graphs[name].ends.cpu() for name in edges}
    had = sum(len(torch.unique(each)) for each in ends.values())
    has = sum(len(torch.unique(each[:, edges[name]])) for name, each in ends.items())
    return {"edges": (edges.weights, edges.nonzeros), "nodes": (had, has)}
