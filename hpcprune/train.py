"""The data-parallel loop: every rank takes its part of each global batch, and the survivors' gradients are summed.

A step is a pure function of the weights, the optimizer's state and its own number: which samples it sees and every
random number in it follow from the seed. So a run that was cut goes on with the very steps it would have done.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from hpcprune.buckets import Buckets, Sender
from hpcprune.criteria import Criterion
from hpcprune.errors import GOING_ON, JobError, NumericsError
from hpcprune.exchange import Exchange
from hpcprune.exchange.wire import Wire
from hpcprune.masks import Masks
from hpcprune.optimizer import FOLLOWED, laid_out, load_state, make_optimizer, named_state, named_vectors
from hpcprune.schedule import learning_rate_factor
from hpcprune.seeds import derive, seed_all
from hpcprune.sparse.training import SparseTraining
from hpcprune.survivors import Survivors
from hpcprune.task import Task, to_device
from hpcprune.teacher import Teacher
from hpcprune.training import BUCKET_MB, Training
from hpcprune.world import World, part_of_rank

__all__ = ["Plan", "Step", "Trainer", "average_batch_norm", "plan_steps"]


@dataclass(frozen=True)
class Plan:
    """How a training of a job falls into steps: samples in a global batch, steps in an epoch, steps in all.

    The learning rate is that of a training of `lr_steps` steps (as many as `steps` for None) from step `lr_start` on.
    """

    batch: int
    epoch: int
    steps: int
    lr_start: int = 0
    lr_steps: int | None = None


@dataclass(frozen=True)
class Step:
    """What one step did.

    loss: the mean over the global batch. seconds: of the whole step; waited: those of them in which this rank waited
    for others. overlap: the share of the exchange that passed while backward still ran. stop: whether any rank is asked
    to stop. written: whether every rank has written its part of a checkpoint. due: whether any rank says that the next
    one is due.
    """

    loss: float
    learning_rate: float
    seconds: float
    waited: float
    overlap: float
    stop: bool
    written: bool
    due: bool


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
    """One training: the dense one, or the retraining after a round."""

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
        sender: Sender | None = None,
        bucket_mb: float = BUCKET_MB,
        layers: Collection[str] = (),
        criterion: Criterion | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """Begin to train `survivors`, which pack `model`'s weights; `close` when it is over.

        name: of the training's random numbers. sender: how buckets travel over `exchange`; as they are if None.
        layers: the prunable parameters, on which `l1` pulls. criterion: what follows the steps, if it looks at them.
        teacher: the dense network, if it teaches.
        """
        self.plan = plan
        self.survivors = survivors
        self._sender = sender or Wire(exchange, None)
        self.buckets = Buckets(survivors, self._sender, int(bucket_mb * 1e6))
        self._sparse = SparseTraining(model, survivors)
        self._optimizer = make_optimizer(survivors, training.optimizer)
        self._task, self._model, self._dataset, self._training = task, model, dataset, training
        self._world, self._exchange, self._name = world, exchange, name
        self._device = next(model.parameters()).device
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._pulled = [segment for segment in survivors if segment.name in layers] if training.l1 else []
        self._criterion, self._teacher = criterion, teacher
        self._followed: dict[torch.dtype, Tensor] = {}
        if criterion is not None and criterion.looks_at == "training":
            self._followed = {dtype: torch.zeros_like(packed.data) for dtype, packed in survivors.packed.items()}

    def close(self) -> None:
        """Leave the model as a model again."""
        self.survivors.unpack(everything=True)
        self._sparse.close()
        self.buckets.close()

    def step(self, number: int, stop: bool, written: bool = False, due: bool = False) -> Step:
        """Do step `number`. `stop`, `written` and `due` are this rank's answers to what the result says of all."""
        start, waited = time.perf_counter(), self._world.seconds_waited
        what = f"{self._name[1]}: exchange of step {number}"
        loss = self._backward(number, what)
        bad = self.buckets.not_finite() or ("" if torch.isfinite(loss) else "the loss")
        votes = torch.tensor([stop, written, due, bool(bad)], dtype=loss.dtype, device=self._device)
        agreed = torch.cat([loss.reshape(1), votes])
        pending = self._exchange.begin(agreed, what)
        traffic = self.buckets.wait()
        pending.wait()
        total, stops, writers, dues, spoilt = agreed.tolist()
        if spoilt:
            self._tell_divergence(number, bad, float(loss))
        self._sender.check_sums(self.survivors.gradients(), what)

        plan = self.plan
        factor = learning_rate_factor(self._training.lr_schedule, plan.lr_start + number, plan.lr_steps or plan.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.optimizer.lr * factor
        if self._training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.survivors.parameters(), self._training.clip_norm)
        self._follow()
        self._optimizer.step()
        self._pull(self._training.optimizer.lr * factor * self._training.l1)
        self.survivors.unpack()
        return Step(
            total,
            self._training.optimizer.lr * factor,
            time.perf_counter() - start,
            self._world.seconds_waited - waited,
            traffic.overlap,
            stops > 0,
            writers == self._world.size,
            dues > 0,
        )

    def try_step(self, number: int) -> float:
        """The seconds of step `number` without the optimizer: gradients are computed and summed, no weight changes."""
        start = time.perf_counter()
        self._backward(number, f"{self._name[1]}: trying step {number}")
        self.buckets.wait()
        self.survivors.unpack()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by the parameters' names, as the survivors pack them.

        The model's own weights are those of the last step from here on until the next, sparse layers' too.
        """
        self.survivors.unpack(everything=True)
        followed = named_vectors(FOLLOWED, self._followed, self.survivors)
        return named_state(self._optimizer, self.survivors) | followed

    def own_state(self) -> dict[str, Tensor]:
        """What this rank's exchange holds back for later steps, by name."""
        return self._sender.own_state()

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], masks: Masks | None) -> None:
        """Take what `optimizer_state` gave under `masks`, of this round or an earlier one."""
        load_state(self._optimizer, self.survivors, tensors, masks)
        for dtype, followed in self._followed.items():
            followed.copy_(laid_out(FOLLOWED, dtype, self.survivors, tensors, masks))

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the criterion see a step's gradients, before the weights change."""
        for followed, weights, gradient in zip(
            self._followed.values(), self.survivors.parameters(), self.survivors.gradients(), strict=False
        ):
            assert self._criterion is not None
            followed += self._criterion.follow(weights, gradient)

    @torch.no_grad()
    def _pull(self, by: float) -> None:
        """The proximal step of the L1 term: all go towards zero by as much, and those that are nearer are zero."""
        for segment in self._pulled:
            weights = self.survivors.weights(segment)
            weights.copy_(nn.functional.softshrink(weights, by))

    def _backward(self, number: int, what: str) -> Tensor:
        """Compute the gradients of this rank's share of the batch, part by part; its part of the mean loss."""
        seed_all(*self._name, "step", number, self._world.rank)
        self._sender.begin_step(number)
        indices = self._indices(number)
        parts = min(self._training.accumulate, len(indices))
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._model.train()
        for part in range(parts):
            own = indices[part * len(indices) // parts : (part + 1) * len(indices) // parts]
            batch = to_device(default_collate([self._dataset[index] for index in own]), self._device)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._training.autocast):
                output = self._task.predict(self._model, batch)
                loss = self._task.loss(output, batch)
                if self._teacher is not None:
                    loss = self._teacher.join(self._task, loss, output, batch)
                loss = loss * (len(own) / self.plan.batch)
            self.buckets.backward(loss, what, add=part > 0, send=part == parts - 1)
            total += loss.detach()
        return total

    def _tell_divergence(self, number: int, bad: str, loss: float) -> None:
        """Raise NumericsError, on every rank, with what each of the ranks found not to be finite."""
        what = f"{' '.join(map(str, self._name[1:]))}: step {number}"
        found = self._world.allgather((bad, loss), f"{what}: naming what is not finite")
        places = [
            f"rank {rank}: "
            + (f"the loss is {its}" if name == "the loss" else f"the gradient of {name} (loss {its:.4g})")
            for rank, (name, its) in enumerate(found)
            if name
        ]
        raise NumericsError(
            f"{what}: NaN or infinite values on {'; '.join(places[:4])}; lower the learning rate, clip the gradients "
            f"(clip_norm) or look at the data. {GOING_ON}"
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


def average_batch_norm(model: nn.Module, world: World) -> None:
    """Set the running statistics of batch norms, which every rank gathers from its own samples, to the ranks' mean."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    total = world.allreduce(statistic.detach().double().cpu().numpy(), "batch norm: averaging")
                    statistic.copy_(torch.from_numpy(total / world.size))
