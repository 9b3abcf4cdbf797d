"""The teacher: the dense network, whose outputs the pruned one learns to give while it is retrained.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcprune.task import Task
from hpcprune.training import Distill
from hpcprune.weights import fit_weights, load_weights

__all__ = ["Teacher"]


class Teacher:
    """The dense network in evaluation. Each rank holds one, beside the network that is trained."""

    def __init__(self, model: nn.Module, dense: Path, distill: Distill) -> None:
        """A copy of `model` with the weights of the file `dense`."""
        self._model, self._distill = copy.deepcopy(model), distill
        fit_weights(self._model, load_weights(dense), dense)
        self._model.requires_grad_(False).eval()

    def join(self, task: Task, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """The loss that is trained on: the task's `loss` and the distance from what the dense network says."""
        with torch.no_grad():
            target = task.predict(self._model, batch)
        share = self._distill.share
        return (1 - share) * loss + share * task.distance(output, target, self._distill.temperature)
