"""Fashion-MNIST: 60,000 images of clothes (Debian's dataset-fashion-mnist), and a residual network with batch norms."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hpcprune

FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Residual(nn.Module):
    """Two convolutions beside a shortcut; the first halves the image."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Conv2d(channels, out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class Fashion(hpcprune.Classifier):
    classes = 10
    names = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Residual(16, 32),
            Residual(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def data(self) -> hpcprune.Data:
        if not FOLDER.is_dir():
            raise FileNotFoundError(f"{FOLDER}; as root: apt install dataset-fashion-mnist")
        return hpcprune.Data(*(read(part) for part in ("train", "t10k")))


def read(part: str) -> TensorDataset:
    """Images [samples, 1, 28, 28] about 0, and their classes."""
    images, labels = (
        np.frombuffer(gzip.decompress((FOLDER / f"{part}-{kind}-ubyte.gz").read_bytes()), np.uint8)
        for kind in ("images-idx3", "labels-idx1")
    )
    pixels = torch.tensor(images[16:]).reshape(-1, 1, 28, 28).float()  # behind headers of 16 and 8 bytes
    return TensorDataset((pixels / 255 - 0.286) / 0.353, torch.tensor(labels[8:]).long())
