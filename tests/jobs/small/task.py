"""A task of half a second for the tests, which can fill a disk on demand.

FILL="<file>:<step>:<room>": at its `step`-th batch it fills the file's disk but for `room` bytes.
"""

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpcprune


class Small(hpcprune.Classifier):
    classes = 2
    batches = 0

    def model(self):
        return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))

    def data(self):
        inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
        return hpcprune.Data(train=data, test=data)

    def predict(self, model, batch):
        self.batches += model.training
        path, step, room = os.environ.get("FILL", ":0:").split(":")
        if self.batches == int(step) and model.training and os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
            fill(path, int(room))
        return model(batch[0])


def fill(path, room):
    with Path(path).open("wb", 0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - room))
