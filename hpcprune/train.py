"""The data-parallel loop: every rank takes its part of each global batch, and the survivors' gradients are summed.

A step is a pure function of the weights, the optimizer's state and its own number: which samples it sees and every
random number in it follow from the seed. So a run that was cut goes on with the very steps it would have done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from hpcprune.errors import JobError, NumericsError
from hpcprune.exchange import Exchange
from hpcprune.job import Optimizer, Training
from hpcprune.schedule import learning_rate_factor
from hpcprune.seeds import derive, seed_all
from hpcprune.survivors import Survivors
from hpcprune.task import Task, to_device
from hpcprune.world import World, part_of_rank

__all__ = ["Step", "Trainer", "average_batch_norm", "plan_steps"]


@dataclass(frozen=True)
class Plan:
    """How a training of a job falls into steps: samples in a global batch, steps in an epoch, steps in all."""

    batch: int
    epoch: int
    steps: int


@dataclass(frozen=True)
class Step:
    """What one step did: its mean loss over the global batch, its learning rate, its seconds, those it waited."""

    loss: float
    learning_rate: float
    seconds: float
    waited: float
    stop: bool


def plan_steps(training: Training, samples: int, ranks: int, key: str) -> Plan:
    """The steps of a training on this much data; `key` is the job's section, for the message.

    An epoch's last batch is dropped where it is not full, since every epoch is shuffled anew.
    """
    batch = training.batch_size * (ranks if training.batch_per == "rank" else 1)
    if batch < ranks:
        raise JobError(f"{key}.batch_size: {batch} is less than a sample for each of {ranks} ranks; raise it")
    batch = min(batch, samples)
    epoch = samples // batch
    steps = training.steps if training.steps is not None else round((training.epochs or 0) * epoch)
    return Plan(batch, epoch, steps)


class Trainer:
    """One training: the dense one, or the retraining after a round. `name` is that of its random numbers."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        survivors: Survivors,
        dataset: Dataset[Any],
        training: Training,
        plan: Plan,
        world: World,
        exchange: Exchange,
        name: tuple[int | str, ...],
    ) -> None:
        self.plan = plan
        self.survivors = survivors
        self._task, self._model, self._dataset, self._training = task, model, dataset, training
        self._world, self._exchange, self._name = world, exchange, name
        self._device = next(model.parameters()).device
        self._optimizer = make_optimizer(survivors.parameters(), training.optimizer)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def step(self, number: int, stop: bool) -> Step:
        """Do step `number`. `stop` says that this rank is asked to stop; the result's, that any rank is."""
        start, waited = time.perf_counter(), self._world.seconds_waited
        seed_all(*self._name, "step", number, self._world.rank)
        indices = self._indices(number)
        batch = to_device(default_collate([self._dataset[index] for index in indices]), self._device)
        self._model.train()
        loss = self._task.loss(self._task.predict(self._model, batch), batch) * (len(indices) / self.plan.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.survivors.pack_gradients()

        agreed = torch.stack([loss.detach().float(), torch.tensor(float(stop), device=self._device)])
        what = f"{self._name[1]}: all-reduce of step {number}"
        for pending in [self._exchange.begin(buffer, what) for buffer in (*self.survivors.gradients(), agreed)]:
            pending.wait()
        total, stops = agreed.tolist()
        if total != total or total in (float("inf"), float("-inf")):
            raise NumericsError(
                f"{' '.join(map(str, self._name[1:]))}: the loss is {total} in step {number}; lower the learning rate "
                "or look at the data, then run again: it goes on from the last checkpoint"
            )

        factor = learning_rate_factor(self._training.lr_schedule, number, self.plan.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.optimizer.lr * factor
        self._optimizer.step()
        self.survivors.unpack()
        return Step(
            total,
            self._training.optimizer.lr * factor,
            time.perf_counter() - start,
            self._world.seconds_waited - waited,
            stops > 0,
        )

    def _indices(self, number: int) -> list[int]:
        """This rank's samples of a step's global batch."""
        epoch, within = divmod(number, self.plan.epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive(*self._name, "order", epoch))
            samples = len(self._dataset)  # type: ignore[arg-type]
            self._order = epoch, torch.randperm(samples, generator=generator)
        first = within * self.plan.batch
        low, high = part_of_rank(self.plan.batch, self._world)
        chosen: list[int] = self._order[1][first + low : first + high].tolist()
        return chosen

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, under "<number of the packed vector>/<key>"."""
        state = self._optimizer.state_dict()["state"]
        return {
            f"{index}/{key}": value
            for index, values in state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `optimizer_state` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def make_optimizer(parameters: list[nn.Parameter], spec: Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer that a job describes."""
    if spec.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name]
    return kind(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)


def average_batch_norm(model: nn.Module, world: World) -> None:
    """Set the running statistics of batch norms, which every rank gathers from its own samples, to the ranks' mean."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    total = world.allreduce(statistic.detach().double().cpu().numpy(), "batch norm: averaging")
                    statistic.copy_(torch.from_numpy(total / world.size))
