"""What tests of evaluation share: a classifier with a metric that keeps all scores, and torchmetrics on the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

import hpcprune


class Samples(Dataset[Any]):
    """Inputs that tell of their class of 5 a little; `asked` are the numbers of those that were asked for."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        # The last class is in the last tenth alone, so that most ranks never see it.
        self.labels = torch.randint(4, (number,), generator=generator)
        self.labels[number - number // 10 :] = 4
        self.inputs = torch.randn(number, 5, generator=generator, dtype=torch.float64)
        self.inputs += nn.functional.one_hot(self.labels, 5)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        return self.inputs[index], self.labels[index]


class Fives(hpcprune.Classifier):
    """Has a dropout, and a metric that cannot be summed: it needs the scores of all samples together."""

    classes = 5

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)).double()
        nn.init.eye_(model[0].weight)
        return model

    def data(self) -> hpcprune.Data:
        return hpcprune.Data(train=Samples(10), test=Samples(10))

    def metrics(self) -> dict[str, Metric]:
        return super().metrics() | {"auroc": MulticlassAUROC(5, thresholds=None)}


@torch.no_grad()
def on_the_whole(model: nn.Module, data: Samples) -> dict[str, float]:
    """Every metric of `Fives` by torchmetrics from all samples at once."""
    scores = model.eval()(data.inputs)
    found = {
        "loss": nn.functional.cross_entropy(scores, data.labels),
        "accuracy": multiclass_accuracy(scores, data.labels, 5, average="micro"),
        "f1": multiclass_f1_score(scores, data.labels, 5, average="macro"),
        "precision": multiclass_precision(scores, data.labels, 5, average="macro"),
        "recall": multiclass_recall(scores, data.labels, 5, average="macro"),
        "auroc": multiclass_auroc(scores, data.labels, 5, thresholds=None),
    }
    return {name: value.item() for name, value in found.items()}
