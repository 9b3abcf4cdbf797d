"""What the proofs of training on ranks share: a float32 network, and torch's DistributedDataParallel with the masks
multiplied in, as its users write it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hpcprune
from hpcprune.exchange import Exchange
from hpcprune.masks import Masks
from hpcprune.survivors import Survivors
from hpcprune.train import Trainer, plan_steps
from hpcprune.training import Optimizer, Training
from hpcprune.world import World
from tests.training import Begun, OneRank, Remembering, Small

# Named as torch names them; both decay the weights.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
}
TORCHS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
BATCH = 12  # of all ranks together; 1, 2, 3 and 4 ranks share it evenly
SMALL_BUCKETS = 0.001  # MB, so that there are several buckets


class Net(nn.Module):
    """Convolutions, a norm, a weight used twice, a frozen one, and a layer that a step may leave out.

    Smooth: where a ReLU's input is zero but for rounding, its gradient jumps, and no bound holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 16, 3)
        self.norm = nn.LayerNorm(16)
        self.shared = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.shared.weight
        self.seldom = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.last = nn.Linear(16, 4)

    def forward(self, images: Tensor, seldom: bool) -> Any:
        hidden = self.second(self.first(images).tanh()).tanh().mean((2, 3))
        hidden = self.again(self.shared(self.norm(hidden)).tanh()).tanh()
        hidden = hidden + self.frozen(hidden)
        if seldom:
            hidden = hidden + self.seldom(hidden).tanh()
        return self.last(hidden)


class Images(Small):
    """A task of 4 classes that can be learnt. `seldom`: whether steps use the network's layer of that name."""

    seldom = True

    def model(self) -> nn.Module:
        torch.manual_seed(2)
        return Net()

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], self.seldom)


class Samples(Remembering):
    """Images of 3 channels whose class is which of the first two are bright."""

    def __init__(self) -> None:
        super().__init__(60)
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(4, (60,), generator=generator)
        self.inputs = torch.randn(60, 3, 6, 6, generator=generator)
        self.inputs[:, 0] += (self.labels % 2)[:, None, None]
        self.inputs[:, 1] += (self.labels // 2)[:, None, None]


def masks_of(sparsity: float) -> Masks:
    return hpcprune.prune(Images().model(), sparsity, scope="layer", comm=World.alone())


def begin(
    optimizer: str,
    masks: Masks,
    world: World | None = None,
    exchange: Exchange | None = None,
    *,
    task: Images | None = None,
    packing: bool = True,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Begun:
    """Begin to train under masks as a run does; alone without a world. `more`: keys of the training."""
    world, task, data = world or World.alone(), task or Images(), Samples()
    model = task.model()
    spec = Optimizer.model_validate({"name": optimizer, **OPTIMIZERS[optimizer]})
    training = Training(steps=50, batch_size=BATCH, optimizer=spec, **more)
    plan = plan_steps(training, len(data), world.size, "retrain")
    survivors = Survivors(model, masks, packing=packing)
    name = (3, "retrain", 1)
    trainer = Trainer(
        task, model, survivors, data, training, plan, world, exchange or OneRank(), name, bucket_mb=SMALL_BUCKETS
    )
    return Begun(trainer, model, data)


def step(begun: Begun, number: int) -> tuple[tuple[Tensor, Tensor], float]:
    """Do a step; this rank's batch and the mean loss."""
    before = len(begun.data.asked)
    loss = begun.trainer.step(number, False).loss
    chosen = torch.tensor(begun.data.asked[before:])
    return (begun.data.inputs[chosen], begun.data.labels[chosen]), loss


class Reference:
    """The same training by DDP, the masks multiplied into gradients and weights.

    leaves_out: whether steps leave a layer out. As in hpcprune a parameter that nobody used then has a gradient of
    zeros, not none, so that its momentum and its decay go on.
    """

    def __init__(self, optimizer: str, masks: Masks, leaves_out: bool = False) -> None:
        self.model, self.norm = Images().model(), 0.0
        self._masks, self._leaves_out = masks, leaves_out
        masks.apply(self.model)
        self._ddp = DistributedDataParallel(self.model, bucket_cap_mb=0.001, find_unused_parameters=leaves_out)
        self.optimizer = TORCHS[optimizer](self.model.parameters(), **OPTIMIZERS[optimizer])

    def step(
        self,
        batch: tuple[Tensor, Tensor],
        seldom: bool = True,
        clip_norm: float | None = None,
        autocast: bool = False,
    ) -> None:
        """A step of this rank's batch; `norm` is then the gradient's before clipping."""
        self.optimizer.zero_grad(set_to_none=not self._leaves_out)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(self._ddp(batch[0], seldom), batch[1])
        loss.backward()
        for name, parameter in self._masks.parameters(self.model).items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._masks[name])
        if clip_norm is not None:
            self.norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm))
        self.optimizer.step()
        self._masks.apply(self.model)


def largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Between any two weights."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def dense_states(begun: Begun, masks: Masks) -> Iterator[tuple[str, str, Tensor]]:
    """The optimizer's state by parameter and key, with zeros where a weight is pruned and has no place in it."""
    for name, value in begun.trainer.optimizer_state().items():
        parameter, _, key = name.rpartition("/")
        if not parameter:
            continue  # a count of steps
        shape = begun.model.get_parameter(parameter).shape
        if value.numel() != shape.numel():
            packed, value = value, torch.zeros(shape)
            value[masks[parameter]] = packed
        yield parameter, key, value.view(shape)
