"""A paper's field, by a GCN or a GAT, from 20 examples of each field and the words of all papers."""

import torch
from cora import Network, cora
from torch import nn
from torch.utils.data import TensorDataset
from torch_geometric.nn import GATConv, GCNConv

import hpcprune


class GCN(hpcprune.Classifier):
    """Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", 2017,
    https://arxiv.org/abs/1609.02907
    """

    classes = 7

    def model(self) -> nn.Module:
        words, _, edges = cora()
        return Network(words, edges, [GCNConv(words.shape[1], 16), GCNConv(16, self.classes)])

    def data(self) -> hpcprune.Data:
        _, fields, _ = cora()
        order = torch.randperm(len(fields), generator=torch.Generator().manual_seed(0))
        train = torch.cat([order[fields[order] == field][:20] for field in range(self.classes)])
        test = order[~torch.isin(order, train)][:1000]
        return hpcprune.Data(*(TensorDataset(papers, fields[papers]) for papers in (train, test)))


class GAT(GCN):
    """Velickovic et al., "Graph Attention Networks", 2018, https://arxiv.org/abs/1710.10903"""

    def model(self) -> nn.Module:
        words, _, edges = cora()
        layers = [GATConv(words.shape[1], 8, heads=8, dropout=0.5), GATConv(64, self.classes, dropout=0.5)]
        return Network(words, edges, layers)
