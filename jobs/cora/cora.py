"""Cora: 2,708 papers of 7 fields, their words and who cites whom (pip's graphdatascience), and a network on them."""

import importlib.util
from pathlib import Path

import pyarrow.parquet  # pip install '.[jobs]'
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv

import hpcprune


def cora() -> tuple[Tensor, Tensor, Tensor]:
    """Words of each paper, rows summing to 1; its field; citations, [2, 5278], each once, the lower number first."""
    package = importlib.util.find_spec("graphdatascience")  # its own imports need more than the file's
    if package is None or package.origin is None:
        raise FileNotFoundError("no graphdatascience; pip install --no-deps graphdatascience==2.2")
    papers, citations = (
        pyarrow.parquet.read_table(Path(package.origin).parent / f"resources/cora/cora_{part}.parquet.gzip")
        for part in ("nodes", "rels")
    )
    numbers = {paper: number for number, paper in enumerate(papers["nodeId"].to_pylist())}
    ends = [[numbers[p] for p in citations[f"{end}NodeId"].to_pylist()] for end in ("source", "target")]
    words = torch.tensor(papers["features"].combine_chunks().flatten().to_numpy()).float().reshape(len(papers), -1)
    fields = torch.tensor(papers["subject"].to_numpy())
    return F.normalize(words, p=1), fields, torch.tensor(ends).sort(0).values.unique(dim=1)


class Network(nn.Module):
    """Two layers of messages between papers that cite each other; gives what is computed of some papers."""

    def __init__(self, words: Tensor, edges: Tensor, layers: list[nn.Module]) -> None:
        super().__init__()
        self.graph = hpcprune.Graph(torch.cat([edges, edges.flip(0)], 1), len(words))
        self.layers = nn.ModuleList(layers)
        words = words.to_sparse_coo().coalesce()  # 18 of 1,433 a paper
        self.size = words.shape
        self.register_buffer("places", words.indices(), persistent=False)
        self.register_buffer("shares", words.values(), persistent=False)

    def forward(self, papers: Tensor) -> Tensor:
        edges = self.graph()
        if isinstance(self.layers[0], GATConv):
            edges = edges[:1]  # attention weighs them itself
        shares = F.dropout(self.shares, 0.5, self.training)
        x = torch.sparse_coo_tensor(self.places, shares, self.size, is_coalesced=True, check_invariants=False)
        x = F.dropout(F.elu(self.layers[0](x, *edges)), 0.5, self.training)
        return self.layers[1](x, *edges)[papers]
