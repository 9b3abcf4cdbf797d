"""Evaluation on one rank against torchmetrics on the whole data, and what an inference costs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hpcprune
from hpcprune.evaluate import FEWEST_RUNS, TIMED_RUNS, evaluate, inference_seconds, model_flops, timed_batch
from hpcprune.world import World
from tests.evaluating import Fives, Samples, on_the_whole


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_metrics_are_those_of_torchmetrics_whatever_the_batches(batch_size: int) -> None:
    """The loss is the mean over samples: a last batch that is smaller counts for less."""
    task, data = Fives(), Samples(50)
    model = task.model().train()
    found = evaluate(task, model, data, batch_size, World.alone())
    assert data.asked == list(range(50))
    assert found == pytest.approx(on_the_whole(model, data), rel=1e-6)
    assert all(type(value) is float for value in found.values())
    assert found == evaluate(task, model, data, batch_size, World.alone()), "metrics begin anew each time"
    assert not any(parameter.grad_fn or parameter.grad is not None for parameter in model.parameters())


def test_a_classifier_with_names_has_the_f1_of_each_class() -> None:
    class Named(Fives):
        names = tuple("abcde")

    task, data = Named(), Samples(50)
    model = task.model()
    found = evaluate(task, model, data, 7, World.alone())
    guessed = model(data.inputs).argmax(1)
    for number, name in enumerate("abcde"):
        right = int(((guessed == number) & (data.labels == number)).sum())
        both = int((guessed == number).sum()) + int((data.labels == number).sum())
        assert found[f"f1 of {name}"] == pytest.approx(2 * right / both if both else 0.0)
    assert found["f1"] == pytest.approx(sum(found[f"f1 of {name}"] for name in "abcde") / 5)


def test_nothing_but_the_loss_is_needed() -> None:
    class Bare(hpcprune.Task):
        def model(self) -> nn.Module:
            return nn.Linear(5, 1, bias=False).double()

        def data(self) -> hpcprune.Data:
            return hpcprune.Data(Samples(10), Samples(10))

        def loss(self, output: Any, batch: Any) -> Tensor:
            return output.square().mean()  # type: ignore[no-any-return]

    task, data = Bare(), Samples(10)
    model = task.model()
    expected = model(data.inputs).square().mean().item()
    assert evaluate(task, model, data, 4, World.alone()) == pytest.approx({"loss": expected})


class Timed(nn.Module):
    """Takes as long as it is told, and counts."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds, self.batches = seconds, list[int]()

    def forward(self, inputs: Tensor) -> Tensor:
        assert not self.training
        self.batches.append(len(inputs))
        time.sleep(self.seconds * (5 if len(self.batches) == 1 else 1))
        return inputs


@pytest.mark.parametrize(("samples", "batch_size", "taken"), [(5, 256, 5), (500, 256, 64), (500, 8, 8)])
def test_an_inference_is_timed_for_each_model_in_turns_without_the_first(
    samples: int, batch_size: int, taken: int
) -> None:
    slow, fast, cpu = Timed(0.004), Timed(0.001), torch.device("cpu")
    batch, count = timed_batch(Samples(samples), batch_size, cpu)
    seconds = inference_seconds(Fives(), [slow, fast], batch, cpu)
    assert count == taken and slow.batches == fast.batches == [taken] * (TIMED_RUNS + 1)
    assert seconds[0] >= 0.004 and 0.001 <= seconds[1] < seconds[0]


def test_networks_that_take_long_are_timed_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcprune.evaluate.TIMED_SECONDS", 0.0)
    model, cpu = Timed(0.001), torch.device("cpu")
    inference_seconds(Fives(), [model], timed_batch(Samples(5), 256, cpu)[0], cpu)
    assert len(model.batches) == FEWEST_RUNS + 1


class Images(Fives):
    """A convolution and a linear layer, reached through a `predict` of its own."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3 * 3 * 3, 5))

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"][:, None])


def test_flops_are_torchs_and_those_of_a_pruned_layer_its_share() -> None:
    task, data = Images(), [{"image": torch.randn(4, 4)}]
    model = task.model()
    with FlopCounterMode(display=False) as counter:
        task.predict(model, {"image": torch.randn(1, 4, 4)})
    found = model_flops(task, model, data, {"0.weight": 0.5, "2.weight": 0.25})  # type: ignore[arg-type]
    convolution, linear = 2 * 3 * 4 * 9, 2 * 27 * 5
    assert found.dense == counter.get_total_flops() == convolution + linear
    assert found.by_layer == {"0.weight": (convolution, convolution // 2), "2.weight": (linear, round(linear / 4))}
    whole = model_flops(task, model, data, {})  # type: ignore[arg-type]
    assert whole.dense == whole.survivors == found.dense > found.survivors
