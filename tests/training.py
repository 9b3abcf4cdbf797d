"""What tests of training share: a small task in float64, a dataset that remembers what was asked of it, one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import hpcprune
from hpcprune.criteria import Criterion
from hpcprune.exchange import Exchange, Gathering, Pending
from hpcprune.exchange.dtypes import WIRE_DTYPES
from hpcprune.layers import find_layers
from hpcprune.masks import Masks
from hpcprune.survivors import Survivors
from hpcprune.train import Trainer, plan_steps
from hpcprune.training import Optimizer, Training
from hpcprune.world import World

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": Optimizer(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "plain sgd": Optimizer(name="sgd", lr=0.05, momentum=0),
    "adam": Optimizer(name="adam", lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.1),
}


def torchs(name: str, parameters: Any) -> torch.optim.Optimizer:
    """The optimizers above as torch's documentation would have them written."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    if name == "plain sgd":
        return torch.optim.SGD(parameters, lr=0.05)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=name == "nesterov")


class Remembering(Dataset[Any]):
    """Samples of 6 numbers and a class of 4; `asked` are the numbers of those that were asked for, in order."""

    def __init__(self, samples: int = 50) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(4, (samples,), generator=generator)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        return self.inputs[index], self.labels[index]


class Small(hpcprune.Classifier):
    """`norm` puts a batch norm between its layers, `dropout` a dropout; `spoil` is what its loss is multiplied by."""

    classes = 4

    def __init__(self, norm: bool = False, dropout: bool = False, spoil: float = 1.0) -> None:
        self.norm, self.dropout, self.spoil = norm, dropout, spoil

    def model(self) -> nn.Module:
        torch.manual_seed(2)
        between = [nn.BatchNorm1d(12)] * self.norm + [nn.Dropout(0.3)] * self.dropout
        # In front of a batch norm a bias has no gradient but rounding errors, which Adam would make large.
        return nn.Sequential(nn.Linear(6, 12, bias=not self.norm), *between, nn.ReLU(), nn.Linear(12, 4)).double()

    def data(self) -> hpcprune.Data:
        return hpcprune.Data(train=Remembering(), test=Remembering())

    def loss(self, output: Any, batch: Any) -> Tensor:
        return super().loss(output, batch) * self.spoil


@dataclass
class Begun:
    """A training that a test steps by hand, and what it works on."""

    trainer: Trainer
    model: nn.Module
    data: Remembering


@dataclass
class _Done:
    def wait(self) -> None:
        pass


@dataclass
class _Gathered:
    buffer: Tensor

    def wait(self) -> list[Tensor]:
        return [self.buffer]


class OneRank:
    """The exchange of a rank that has nobody to exchange with."""

    name = "none"
    bytes_sent = 0
    wire_dtypes = WIRE_DTYPES["torch"]

    def begin(self, buffer: Tensor, what: str) -> Pending:
        return _Done()

    def gather(self, buffer: Tensor, what: str) -> Gathering:
        return _Gathered(buffer)

    def close(self) -> None:
        pass


def begin(
    task: Small,
    optimizer: str = "sgd",
    *,
    masks: Masks | None = None,
    model: nn.Module | None = None,
    steps: int = 12,
    batch_size: int = 12,
    seed: int = 3,
    more: Mapping[str, Any] = MappingProxyType({}),
    world: World | None = None,
    exchange: Exchange | None = None,
    survivors: Survivors | None = None,
    criterion: Criterion | None = None,
) -> Begun:
    """Begin to train the task's model, or another, as a run does. `more`: keys of the training."""
    torch.set_num_threads(1)  # of which these sizes need no more, whatever else the machine does
    world = world or World.alone()
    model = model or task.model()
    data = Remembering()
    training = Training(steps=steps, batch_size=batch_size, optimizer=OPTIMIZERS[optimizer], **more)
    plan = plan_steps(training, len(data), world.size, "retrain")
    name = (seed, "retrain", 1)
    survivors = survivors or Survivors(model, masks)
    trainer = Trainer(
        task,
        model,
        survivors,
        data,
        training,
        plan,
        world,
        exchange or OneRank(),
        name,
        layers={layer.name for layer in find_layers(model)},
        criterion=criterion,
    )
    return Begun(trainer, model, data)
