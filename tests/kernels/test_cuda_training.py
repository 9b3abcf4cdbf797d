"""Retraining with layers that are sparse on a GPU: the steps are those of dense layers, but for the order of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune.sparse import training
from hpcprune.sparse.training import faster_layers
from tests.test_sparse_training import NAMES, Blocks, Single, assert_same_losses, assert_same_weights, both, told


class There(Single):
    """The same task with its model on a device, to which a training takes its batches."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def model(self) -> nn.Module:
        return super().model().to(self.device)


@pytest.fixture
def task(device: torch.device) -> There:
    return There(device)


@pytest.fixture
def products(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of what CSR products gave, all of them on the device."""
    found: list[torch.dtype] = []
    own = training.csr_survivors_linear

    def counted(*arguments: Any) -> Tensor:
        product: Tensor = own(*arguments)
        assert all(each.device == device for each in arguments if isinstance(each, Tensor))
        found.append(product.dtype)
        return product

    monkeypatch.setattr(training, "csr_survivors_linear", counted)
    return found


def test_steps_are_those_of_dense_layers(task: There, products: list[torch.dtype]) -> None:
    ours, theirs = both(task, NAMES)
    assert_same_losses(ours, theirs, 5, 1e-4)
    assert_same_weights(ours, theirs)
    assert products == 2 * 5 * [torch.float32]


def test_autocast_computes_in_bfloat16(task: There, products: list[torch.dtype]) -> None:
    ours, theirs = both(task, NAMES, autocast=True)
    assert_same_losses(ours, theirs, 3, 2e-2)
    assert set(products) == {torch.bfloat16}


class HalfBlocks(Blocks):
    """In bfloat16, on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def model(self) -> nn.Module:
        return super().model().to(self.device, torch.bfloat16)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0].bfloat16())


def test_whole_blocks_of_bfloat16_train_as_such(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    own = training.bsr_survivors_linear
    monkeypatch.setattr(training, "bsr_survivors_linear", lambda *of: products.append(of[0].shape) or own(*of))
    ours, theirs = both(HalfBlocks(device), ["0.weight", "2.weight", "4.weight"])
    assert_same_losses(ours, theirs, 3, 2e-2)
    assert_same_weights(ours, theirs, rtol=2e-2, atol=2e-2)
    assert len(products) == 3 * 3


def test_layers_that_are_faster_by_themselves_are_found(
    task: There, products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = task.model()
    masks = hpcprune.prune(model, 0.7)
    told(monkeypatch, (1.0, 0.95), (1.0, 0.5))
    assert faster_layers(model, masks, lambda: model(torch.randn(3, 6, device=task.device))) == ["2.weight"]
    assert len(products) == 2
