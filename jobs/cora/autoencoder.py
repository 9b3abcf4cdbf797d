"""Whether two papers cite each other, of citations that are held out: a graph autoencoder.

Kipf and Welling, "Variational Graph Auto-Encoders", 2016, https://arxiv.org/abs/1611.07308; the one without variation.
"""

import torch
from cora import Network, cora
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torch_geometric.nn import GCNConv
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

import hpcprune


class Autoencoder(hpcprune.Task):
    primary = "auc"
    higher_is_better = True

    def model(self) -> nn.Module:
        words, _, edges = cora()
        return Network(words, self.split(edges)[0], [GCNConv(words.shape[1], 32), GCNConv(32, 16)])

    def data(self) -> hpcprune.Data:
        words, _, edges = cora()
        pairs = torch.randint(len(words), (2, 2 * edges.shape[1]), generator=torch.Generator().manual_seed(1))
        low, high = pairs.sort(0).values
        strangers = pairs[:, (low < high) & ~torch.isin(low * len(words) + high, edges[0] * len(words) + edges[1])]
        parts = zip(self.split(edges), self.split(strangers[:, : edges.shape[1]]), strict=True)
        cites = torch.tensor([1, 0])
        found = [(torch.cat(part, 1).T, cites.repeat_interleave(part[0].shape[1])) for part in parts]
        return hpcprune.Data(*(TensorDataset(*part) for part in found))

    def split(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Nine tenths and one."""
        order = torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(0))
        held = len(order) // 10
        return pairs[:, order[held:]], pairs[:, order[:held]]

    def predict(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        return model(batch[0]).prod(1).sum(1)  # the product of their vectors

    def loss(self, output: Tensor, batch: list[Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, batch[1].float())

    def metrics(self) -> dict[str, Metric]:
        return {"auc": BinaryAUROC(), "ap": BinaryAveragePrecision()}
