"""The break-even of packing: which way is taken for which times, and that trying leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import hpcprune
from hpcprune.breakeven import MARGIN, PAYS_UP_TO, TRIES, packing_pays
from hpcprune.masks import Masks
from hpcprune.survivors import Survivors
from hpcprune.train import Trainer
from hpcprune.world import World
from tests.training import Small, begin


def pruned(density: float, model: nn.Module | None = None) -> Masks:
    return hpcprune.prune(model or nn.Linear(100, 100, bias=False), 1 - density, comm=World.alone())


@dataclass
class Scripted:
    """A trainer whose steps take as long as it is told."""

    seconds: Iterator[float]
    tried: list[int] = field(default_factory=list)
    closed: bool = False

    def try_step(self, number: int) -> float:
        self.tried.append(number)
        return next(self.seconds)

    def close(self) -> None:
        self.closed = True


class Counting(nn.Module):
    """A model that counts its calls in a buffer that no state dict holds."""

    calls: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, inputs: torch.Tensor) -> Any:
        self.calls += 1
        return self.model(inputs)


def decide(packed: float, whole: float) -> tuple[bool, str]:
    """What is decided where each way's first step takes a second and its fastest takes so long."""
    begun: dict[bool, Any] = {}

    def begin(packing: bool) -> Any:
        assert all(trainer.closed for trainer in begun.values()), "two of them would pack the same gradients"
        begun[packing] = Scripted(iter([1.0, packed if packing else whole, 0.9]))
        return begun[packing]

    decided = packing_pays(pruned(0.5), begin, nn.Linear(100, 100), World.alone())
    assert begun.keys() == {True, False}
    assert all(trainer.closed and trainer.tried == list(range(TRIES)) for trainer in begun.values())
    return decided


@pytest.mark.parametrize(
    ("packed", "pays"), [(0.05, True), (0.1, True), (0.1 * MARGIN - 1e-6, True), (0.1 * MARGIN + 1e-6, False)]
)
def test_everything_is_sent_only_where_that_is_clearly_faster(packed: float, pays: bool) -> None:
    what = "survivors are packed" if pays else "all gradients are sent"
    assert decide(packed, 0.1) == (
        pays,
        f"{what}: with 50% of what is prunable left a step takes {packed * 1e3:.1f} ms packed and 100.0 ms whole"
        f"{', which is too near to tell' if 0.1 < packed < 0.1 * MARGIN else ''}",
    )


def test_where_little_is_left_nothing_is_tried() -> None:
    def begin(packing: bool) -> Any:
        raise AssertionError("nothing is to be tried")

    model = nn.Linear(100, 100)
    assert packing_pays(pruned(PAYS_UP_TO), begin, model, World.alone()) == (
        True,
        "survivors are packed: 12.5% of the weights are left",
    )
    with pytest.raises(AssertionError, match="nothing is to be tried"):
        packing_pays(pruned(PAYS_UP_TO + 1e-3), begin, model, World.alone())


def test_trying_leaves_the_model_as_it_was() -> None:
    task = Small(norm=True, dropout=True)
    model = Counting(task.model())
    masks = pruned(0.5, model)
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}

    def make(packing: bool) -> Trainer:
        begun = begin(task, masks=masks, model=model, survivors=Survivors(model, masks, packing=packing))
        return begun.trainer

    _, why = packing_pays(masks, make, model, World.alone())
    assert "a step takes" in why
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert "calls" in after
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
