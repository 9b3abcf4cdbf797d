"""Nodes of four groups that are mostly connected within their own, by a GCN or, in `Attention`, a GAT; a second each.

KILL="<rank>:<step>": at its `step`-th batch, that rank kills itself.
"""

import os
import signal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torch_geometric.nn import GATConv, GCNConv

import hpcprune

NODES, GROUPS, WIDTH = 160, 4, 12


def edges_and_inputs():
    generator = torch.Generator().manual_seed(5)
    low, high = torch.triu_indices(NODES, NODES, offset=1)
    chance = torch.where(low % GROUPS == high % GROUPS, 0.1, 0.01)
    edges = torch.stack([low, high])[:, torch.rand(len(low), generator=generator) < chance]
    means = torch.randn(GROUPS, WIDTH, generator=generator)
    inputs = means[torch.arange(NODES) % GROUPS] + 2 * torch.randn(NODES, WIDTH, generator=generator)
    return torch.cat([edges, edges.flip(0)], 1), inputs


class Convolutions(nn.Module):
    weighted = True

    def __init__(self):
        super().__init__()
        edges, inputs = edges_and_inputs()
        self.graph = hpcprune.Graph(edges, NODES)
        self.register_buffer("inputs", inputs, persistent=False)
        self.first, self.last = self.layers()

    def layers(self):
        return GCNConv(WIDTH, 16), GCNConv(16, GROUPS)

    def forward(self, nodes):
        edges = self.graph() if self.weighted else self.graph()[:1]
        x = F.dropout(F.elu(self.first(self.inputs, *edges)), 0.2, self.training)
        return self.last(x, *edges)[nodes]


class Attentive(Convolutions):
    weighted = False

    def layers(self):
        return GATConv(WIDTH, 8, heads=2), GATConv(16, GROUPS)


class Groups(hpcprune.Classifier):
    classes = GROUPS
    batches = 0

    def model(self):
        return Convolutions()

    def data(self):
        nodes = torch.arange(NODES)
        return hpcprune.Data(*(TensorDataset(part, part % GROUPS) for part in (nodes[:80], nodes[80:])))

    def predict(self, model, batch):
        if model.training:
            self.batches += 1
            rank, step = os.environ.get("KILL", "0:0").split(":")
            if self.batches == int(step) and os.environ.get("OMPI_COMM_WORLD_RANK", "0") == rank:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(model, batch)


class Attention(Groups):
    def model(self):
        return Attentive()
