"""Graphs as things to prune, against torch_geometric's layers on edges that are left out by hand, and numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, TransformerConv
from torch_geometric.utils import erdos_renyi_graph

from hpcprune.checkpoint import read_model
from hpcprune.criteria import CRITERIA
from hpcprune.errors import JobError, TaskError
from hpcprune.graph import Graph, graph_left
from hpcprune.job_file import load_job
from hpcprune.layers import find_layers
from hpcprune.masks import Masks
from hpcprune.nodes import prune_nodes
from hpcprune.ranking import Target, prune_layers
from hpcprune.rounds import target_of_round
from hpcprune.shards import deal
from hpcprune.statistics import Attention, Calibration
from hpcprune.weights import weights_of
from hpcprune.world import World
from tests.commands import Command
from tests.conftest import ROOT

NODES, WIDTH = 30, 5


class Model(nn.Module):
    """Layers one after the other, all over the same graph; gives what is computed of some nodes."""

    def __init__(self, graph: Graph, *layers: nn.Module, weighted: bool = False) -> None:
        super().__init__()
        self.graph, self.layers, self.weighted = graph, nn.ModuleList(layers), weighted
        self.register_buffer("inputs", torch.randn(graph.nodes, WIDTH, generator=torch.Generator().manual_seed(2)))

    def forward(self, nodes: Tensor) -> Tensor:
        x = self.inputs
        for layer in self.layers:
            x = layer(x, *(self.graph() if self.weighted else self.graph()[:1])).tanh()
        return x[nodes]


class Elsewhere(Model):
    """Works on edges of its own."""

    def forward(self, nodes: Tensor) -> Tensor:
        found: Tensor = self.layers[0](self.inputs, self.edges)
        return found[nodes]


def random_edges(*, directed: bool = False) -> Tensor:
    torch.manual_seed(4)
    return erdos_renyi_graph(NODES, 0.15, directed=directed)


def calibration(model: nn.Module) -> Calibration:
    data = TensorDataset(torch.arange(NODES))
    batches: tuple[Any, ...] = (model, data, range(NODES), 12)
    return Calibration(*batches, lambda b: model(b[0]), lambda b: model(b[0]).square().mean(), (0,), World.alone())


@pytest.mark.parametrize("directed", [False, True])
def test_pruned_edges_are_left_out_in_both_directions(directed: bool) -> None:
    edge_index = random_edges(directed=directed)
    graph = Graph(edge_index, NODES)
    assert graph.undirected != directed and len(graph.weight) == edge_index.shape[1] // (1 if directed else 2)
    assert torch.equal(graph()[0], edge_index) and bool((graph()[1] == 1).all())
    gone = torch.arange(len(graph.weight)) % 3 == 0
    with torch.no_grad():
        graph.weight[gone] = 0
    pairs = {tuple(pair) for pair in graph.ends[:, gone].T.tolist()}
    pairs |= set() if directed else {(target, source) for source, target in pairs}
    left = torch.tensor([tuple(pair) not in pairs for pair in edge_index.T.tolist()])
    assert torch.equal(graph()[0], edge_index[:, left])
    layer = GCNConv(WIDTH, 3)
    expected = layer(torch.ones(NODES, WIDTH), edge_index[:, left])
    torch.testing.assert_close(layer(torch.ones(NODES, WIDTH), *graph()), expected)


def test_an_edge_learns_what_a_factor_of_its_messages_would_below_0_too() -> None:
    edge_index = random_edges()
    graph, layer, x = Graph(edge_index, NODES), GCNConv(WIDTH, 3), torch.randn(NODES, WIDTH)
    with torch.no_grad():
        graph.weight.uniform_(0.1, 2)
        graph.weight[:2] = torch.tensor([-0.5, 0.0])
    edges, ones = graph()
    layer(x, edges, ones).square().sum().backward()
    factors = torch.ones(edges.shape[1], requires_grad=True)
    layer(x, edges, factors).square().sum().backward()
    assert graph.weight.grad is not None and factors.grad is not None
    expected = torch.zeros(len(graph.weight)).index_add_(0, graph.find(edges), factors.grad)
    assert expected[0] != 0 and expected[1] == 0
    torch.testing.assert_close(graph.weight.grad, expected)


def test_edges_are_found_by_their_ends_and_others_are_not() -> None:
    graph = Graph(torch.tensor([[0, 1, 2, 1, 2, 2], [1, 0, 1, 2, 2, 0]])[:, :5], 4)
    assert graph.undirected and graph.ends.tolist() == [[0, 1, 2], [1, 2, 2]]
    assert graph.find(torch.tensor([[1, 2, 0, 3, 2], [0, 2, 2, 3, 1]])).tolist() == [0, 2, -1, -1, 1]
    one_way = Graph(torch.tensor([[0, 2], [1, 1]]), 4)
    assert one_way.find(torch.tensor([[0, 1, 2], [1, 0, 1]])).tolist() == [0, -1, 1]
    assert "4 nodes, 2 directed edges" in repr(one_way)


@pytest.mark.parametrize(
    ("edge_index", "nodes", "says"),
    [
        (torch.tensor([[0, 1], [1, 2]]).T[:1], 3, r"int64 of shape \[1, 2\]"),
        (torch.rand(2, 3), 3, r"edge_index is float32 of shape \[2, 3\]; give int64 of shape \[2, edges\]"),
        (torch.tensor([[0, 1], [1, 3]]), 3, "names nodes from 0 to 3, and there are 3"),
        (torch.tensor([[0, -1], [1, 0]]), 3, "from -1 to 1"),
        (torch.tensor([[0, 0], [1, 1]]), 3, "an edge twice"),
    ],
)
def test_what_is_no_graph_is_refused(edge_index: Tensor, nodes: int, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        Graph(edge_index, nodes)


def test_edges_are_layers_where_they_are_asked_for() -> None:
    model = Model(Graph(random_edges(), NODES), GCNConv(WIDTH, 4), GATConv(4, 2, heads=2))
    assert [layer.name for layer in find_layers(model)] == ["layers.0.lin.weight", "layers.1.lin.weight"]
    everything = find_layers(model, exclude=["layers.0.*"], kinds=["weights", "edges"])
    assert [(layer.name, layer.kind) for layer in everything] == [
        ("graph.weight", "edges"),
        ("layers.1.lin.weight", "weights"),
    ]
    assert "graph.edge_index" not in model.state_dict(), "the task brings the edges, and checkpoints need not"
    with pytest.raises(JobError, match=r"prune.what: edges or nodes are to go, and Sequential has no graph; hold its"):
        find_layers(nn.Sequential(nn.Linear(2, 2)), kinds=["edges"])


LAYERS: list[Callable[..., nn.Module]] = [GATConv, GATv2Conv, TransformerConv]


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_is_that_which_the_layers_tell(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(1)
    graph = Graph(random_edges(), NODES)
    model = Model(graph, kind(WIDTH, 4, heads=3, dropout=0.5), kind(12, 2)).train()
    with torch.no_grad():
        graph.weight[::4] = 0
    layers = find_layers(model, kinds=["edges"])
    CRITERIA["attention"].check(model, layers)
    gathered = CRITERIA["attention"].statistic().gather(calibration(model), layers, deal(layers, 1))
    (span,) = deal(layers, 1)[0]
    number = {tuple(pair): place for place, pair in enumerate(graph.ends.T.tolist())}
    expected = np.zeros(len(graph.weight))
    x = model.eval().inputs
    for layer in model.layers:
        x, (edge_index, coefficients) = layer(x, graph()[0], return_attention_weights=True)
        x = x.tanh()
        for pair, value in zip(edge_index.T.tolist(), coefficients.mean(1).tolist(), strict=True):
            place = number.get((min(pair), max(pair)))
            if place is not None:
                expected[place] += 3 * value  # batches, of the same graph
    np.testing.assert_allclose(gathered(span).numpy(), expected, rtol=1e-6)
    assert bool((gathered(span)[::4] == 0).all()) and gathered(span).min() >= 0


def test_a_caller_that_asks_for_attention_still_gets_it_and_layers_are_left_as_they_were() -> None:
    class Asking(Model):
        def forward(self, nodes: Tensor) -> Tensor:
            x, (_, coefficients) = self.layers[0](self.inputs, self.graph()[0], return_attention_weights=True)
            return x[nodes] * coefficients.mean()

    model = Asking(Graph(random_edges(), NODES), GATConv(WIDTH, 2))
    layers = find_layers(model, kinds=["edges"])
    found = Attention().gather(calibration(model), layers, deal(layers, 1))
    assert found(deal(layers, 1)[0][0]).sum() > 0
    assert isinstance(model.layers[0](model.inputs, model.graph()[0]), Tensor)


def test_attention_without_attention_is_refused() -> None:
    edges = random_edges()
    model = Model(Graph(edges, NODES), GCNConv(WIDTH, 2))
    with pytest.raises(JobError, match=r"Model has no layer that tells it \(as GATConv .*; write criterion: magnitude"):
        Attention().check(model, find_layers(model, kinds=["edges"]))
    two = nn.ModuleList([Model(Graph(edges, NODES), GATConv(WIDTH, 2)) for _ in range(2)])
    with pytest.raises(JobError, match="which of 2 graphs a layer attends over"):
        Attention().check(two, find_layers(two, kinds=["edges"]))

    def gather(model: nn.Module) -> None:
        layers = find_layers(model, kinds=["edges"])
        Attention().gather(calibration(model), layers, deal(layers, 1))

    idle = Model(Graph(edges, NODES), GCNConv(WIDTH, 2))
    idle.unused = GATConv(WIDTH, 2)
    with pytest.raises(JobError, match="no layer that tells it was called"):
        gather(idle)
    other = Elsewhere(Graph(edges, NODES), GATConv(WIDTH, 2))
    other.edges = torch.tensor([[0], [0]])
    gather(other)  # a loop is none of the graph's
    missing = next([0, node] for node in range(1, NODES) if int(other.graph.find(torch.tensor([[0], [node]]))) < 0)
    other.edges = torch.tensor([missing]).T
    with pytest.raises(JobError, match=rf"layers.0 attends over one from {missing[0]} to {missing[1]} that the graph"):
        gather(other)


def numbers(graph: Graph, *, ties: bool) -> None:
    with torch.no_grad():
        graph.weight.copy_(torch.randn(len(graph.weight), generator=torch.Generator().manual_seed(8)))
        if ties:
            graph.weight.copy_(graph.weight.sign())


def prune(model: nn.Module, masks: Masks, nodes: float, edges: float) -> Masks:
    parameters = dict(model.named_parameters())
    shards = deal(masks.layers, 1)
    graphs = {"graph.weight": model.graph}
    target = Target(CRITERIA["magnitude"], "global", nodes)
    masks = prune_nodes(graphs, parameters, masks, shards, target, World.alone())
    target = Target(CRITERIA["magnitude"], "global", edges)
    return prune_layers(parameters, masks, shards, target, World.alone()).masks


@pytest.mark.parametrize("ties", [False, True])
def test_the_nodes_with_the_lowest_sums_lose_all_edges_and_edges_are_exactly_as_many(ties: bool) -> None:
    loops = torch.arange(NODES, NODES + 3).expand(2, 3)  # each counts once, and is all that its node has
    model = Model(Graph(torch.cat([random_edges(), loops], 1), NODES + 5), GCNConv(WIDTH, 2))  # two nodes have no edge
    numbers(model.graph, ties=ties)
    ends = model.graph.ends.numpy()
    masks = Masks.full(find_layers(model, kinds=["edges"]))
    count = NODES + 3
    for share in (0.1, 0.3):
        before = masks["graph.weight"].numpy()
        scores = np.where(before, model.graph.weight.detach().double().numpy(), 0)
        touches = [(ends[0] == node) | (ends[1] == node) for node in range(count)]
        sums = [(scores[touch].sum(), node) for node, touch in enumerate(touches) if (touch & before).any()]
        wanted = max(0, round(share * count) - (count - len(sums)))
        gone = np.any([touches[node] for _, node in sorted(sums)[:wanted]], axis=0)
        masks = prune(model, masks, share, 0.0)
        np.testing.assert_array_equal(masks["graph.weight"].numpy(), before & ~gone)
        left = graph_left(model, masks)
        bare = sum(not (touch & before & ~gone).any() for touch in touches)
        assert left is not None and left["nodes"] == (count, count - bare)
    total = len(model.graph.weight)
    masks = prune(model, masks, 0.3, 0.8)
    assert masks.weights - masks.nonzeros == round(0.8 * total), "those of nodes are among them"
    assert graph_left(nn.Linear(2, 2), Masks.full(find_layers(nn.Linear(2, 2)))) is None


JOB = ROOT / "tests/jobs/graph/job.yaml"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prune.graph.criterion=attention"], "graph.criterion: attention is to score edges, and Convolutions has no"),
        (["task=task.py:Attention"], "magnitude scores edges by what is learned of them, and the network does not use"),
        (["train.epochs=0"], "prune.graph.criterion: magnitude ranks edges by what was learned of them, and nothing"),
        (["task=../tiny/task.py"], "prune.what: edges or nodes are to go, and Sequential has no graph; hold its edges"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    hpcprune: Command, tmp_path: Path, overrides: list[str], says: str
) -> None:
    hpcprune("run", JOB, *overrides, "--out", tmp_path / "run").assert_refused(says)
    assert not (tmp_path / "run").exists()


def test_a_graph_goes_in_equal_parts_where_weights_go_layer_by_layer() -> None:
    layers = find_layers(Model(Graph(random_edges(), NODES), GCNConv(WIDTH, 2)), kinds=["edges"])
    by_layer = ["prune.scope=layer", "prune.schedule=layer-by-layer", "prune.rounds=4"]
    for overrides, number, share, expected in (
        (by_layer, 1, 1.0, 0.05),
        (by_layer, 4, 1.0, 0.2),
        ([], 1, 0.875, 0.175),
    ):
        target = target_of_round(load_job(JOB, overrides), "edges", layers, number, share)
        assert (target.scope, target.sparsity) == ("global", pytest.approx(expected))


def test_an_edge_that_does_harm_goes_before_any_that_helps() -> None:
    """A number below 0 is no magnitude: the lower, the sooner its edge goes, wherever in the graph it is."""
    graph = Graph(random_edges(), NODES)
    with torch.no_grad():
        graph.weight[:] = torch.rand(len(graph.weight)) + 0.1
        graph.weight[[5, 7, 2, 11]] = torch.tensor([-0.5, -3.0, -0.1, -2.0])
    layers = find_layers(Model(graph), kinds=["edges"])
    named = dict(Model(graph).named_parameters())
    for gone in ([7], [7, 11], [5, 7, 11], [2, 5, 7, 11]):
        target = Target(CRITERIA["magnitude"], "global", (len(gone) + 0.4) / len(graph.weight))
        pruned = prune_layers(named, Masks.full(layers), deal(layers, 1), target, World.alone())
        assert (~pruned.masks["graph.weight"]).nonzero().flatten().tolist() == gone
        assert pruned.thresholds["graph.weight"].value == graph.weight[gone].max()


def test_an_l1_term_does_not_cut_edges(hpcprune: Command, tmp_path: Path) -> None:
    done = hpcprune("run", ROOT / "tests/jobs/graph/job.yaml", "train.l1=100", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    weights = weights_of(read_model(tmp_path / "run/dense.h5"))
    assert all(bool(w.all()) for name, w in weights.items() if name == "graph.weight")
    assert any(not bool(w.any()) for name, w in weights.items() if name != "graph.weight"), "the term was of effect"
