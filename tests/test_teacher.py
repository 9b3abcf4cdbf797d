"""Distillation: the loss is the published one, the dense network stays as it is; a task may have its own distance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import hpcprune
from hpcprune.errors import TaskError
from hpcprune.survivors import Survivors
from hpcprune.teacher import Teacher
from hpcprune.train import Trainer, plan_steps
from hpcprune.training import Distill, Optimizer, Training
from hpcprune.world import World
from tests.training import OneRank, Remembering, Small

SHARE, TEMPERATURE = 0.3, 4.0


@pytest.fixture
def dense(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A dense network that is not the one that is trained, and its file."""
    model = Small(norm=True).model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "dense.safetensors"
    save_file(model.state_dict(), path)
    return model.eval(), path


def test_steps_are_those_of_the_published_loss(dense: tuple[nn.Module, Path]) -> None:
    teaching, path = dense
    task, data = Small(norm=True), Remembering()
    model = task.model()
    masks = hpcprune.prune(model, 0.5, comm=World.alone())
    plain = copy.deepcopy(model)
    training = Training(steps=5, batch_size=12, optimizer=Optimizer(name="sgd", lr=0.1, momentum=0))
    teacher = Teacher(model, path, Distill(share=SHARE, temperature=TEMPERATURE))
    plan, world = plan_steps(training, len(data), 1, "retrain"), World.alone()
    trainer = Trainer(
        task, model, Survivors(model, masks), data, training, plan, world, OneRank(), (1, "retrain", 1), teacher=teacher
    )
    plain.train()
    for number in range(5):
        before = len(data.asked)
        told = trainer.step(number, stop=False).loss
        chosen = torch.tensor(data.asked[before:])
        output = plain(data.inputs[chosen])
        with torch.no_grad():
            wanted = (teaching(data.inputs[chosen]) / TEMPERATURE).softmax(1)
        soft = (wanted * (wanted.log() - (output / TEMPERATURE).log_softmax(1))).sum(1).mean()
        hard = F.cross_entropy(output, data.labels[chosen])
        loss = (1 - SHARE) * hard + SHARE * TEMPERATURE**2 * soft
        assert told == pytest.approx(loss.item())
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                if name in masks:
                    parameter *= masks[name]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name))
    assert all(p.grad is None and not p.requires_grad for p in teacher._model.parameters())
    torch.testing.assert_close(teacher._model.state_dict(), teaching.state_dict())


class Odd(Small):
    def predict(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"scores": model(batch[0])}

    distance = hpcprune.Task.distance


def test_an_output_of_which_no_distance_is_known_is_refused(dense: tuple[nn.Module, Path]) -> None:
    _, path = dense
    task = Odd(norm=True)
    teacher = Teacher(task.model(), path, Distill())
    batch = [Remembering().inputs, Remembering().labels]
    with pytest.raises(TaskError, match=r"Odd gives dict, of which no distance is known; define distance"):
        teacher.join(task, torch.zeros(()), task.predict(task.model(), batch), batch)


def test_other_tasks_have_the_mean_squared_difference() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    assert float(hpcprune.Task.distance(Small(), a, b, 2.0)) == pytest.approx(float((a - b).square().mean()))
