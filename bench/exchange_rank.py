"""What one rank of bench/exchange.py does: trains the same network in every contender's way, in turns, and times it."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hpcprune
from hpcprune.breakeven import packing_pays
from hpcprune.exchange import Exchange
from hpcprune.exchange.horovod import HorovodExchange
from hpcprune.exchange.mpi import MpiExchange
from hpcprune.exchange.torch import TorchExchange
from hpcprune.masks import Masks
from hpcprune.survivors import Survivors
from hpcprune.train import Plan, Trainer
from hpcprune.training import Optimizer, Retraining, Training
from hpcprune.world import World

Contenders = dict[str, AbstractContextManager["Running"]]  # each is used once

CPU = torch.device("cpu")
SAMPLES = 8  # of each rank in a step: few, so that the exchange counts
BUCKET_MB: float = Retraining.model_fields["bucket_mb"].default
SGD = Optimizer(lr=1e-4, momentum=0.9)
NETWORKS = {"17M": (16, 1024), "100M": (24, 2048)}  # layers, width


@dataclass(frozen=True)
class Running:
    """A training under way. step: does one and gives the exchange's overlap with backward, where it is known."""

    step: Callable[[], float | None]
    state_bytes: Callable[[], int]


@dataclass
class Measured:
    """Of one contender: each step's seconds on the slowest rank and its overlap, where that is known; for each turn the
    bytes that rank 0 sent in a step; the optimizer's state."""

    seconds: list[float] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    bytes_sent: list[float] = field(default_factory=list)
    state_bytes: int = 0


class Perceptron(hpcprune.Classifier):
    """`layers` layers of `width` times `width`, scaled so that activations keep their size at any depth."""

    classes = 10

    def __init__(self, layers: int, width: int) -> None:
        self.layers, self.width = layers, width

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        hidden: list[nn.Module] = []
        for _ in range(self.layers):
            hidden += [nn.Linear(self.width, self.width), nn.ReLU()]
            nn.init.kaiming_normal_(hidden[-2].weight)  # type: ignore[arg-type]
        return nn.Sequential(*hidden, nn.Linear(self.width, self.classes))

    def data(self) -> hpcprune.Data:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(1024, self.width, generator=generator)
        samples = TensorDataset(inputs, torch.randint(self.classes, (1024,), generator=generator))
        return hpcprune.Data(samples, samples)


class Bench:
    """One network on the ranks of a world, and the ways to train it."""

    def __init__(self, network: str, world: World) -> None:
        self.world = world
        self.task = Perceptron(*NETWORKS[network])
        self.exchange = TorchExchange(world, CPU)
        self._model, self._data = self.task.model(), self.task.data().train
        self._masks: dict[float, Masks] = {}

    def contenders(self) -> Contenders:
        """Every way to train that is compared."""
        found: Contenders = {
            "DDP": self.ddp(),
            "DDP, bucket views": self.ddp(gradient_as_bucket_view=True),
            "DDP, fp16": self.ddp(lambda _: (None, default_hooks.fp16_compress_hook)),
            "DDP, PowerSGD": self.ddp(_power_sgd, bucket_cap_mb=10**4),
        }
        found |= {f"hpcprune, {sparsity:.0%}": self.ours(sparsity) for sparsity in (0.0, 0.5, 0.9, 0.99)}
        found["hpcprune, 90%, ddp_hook"] = self.ddp(self._own_hook)
        found["hpcprune, 90%, mpi"] = self.ours(0.9, MpiExchange)
        if importlib.util.find_spec("horovod"):
            import horovod.torch as hvd

            found["hpcprune, 90%, horovod"] = self.ours(0.9, HorovodExchange)
            found["Horovod"] = self.horovod(hvd.Compression.none)
            found["Horovod, fp16"] = self.horovod(hvd.Compression.fp16)
        return found

    def bucket_sizes(self) -> Contenders:
        """For the default of retrain.bucket_mb."""
        sizes, sparsities = (0.5, 1.0, 2.0, 4.0, 16.0), (0.0, 0.9, 0.99)
        return {
            f"{sparsity:.0%}, buckets of {size:4g} MB": self.ours(sparsity, bucket_mb=size)
            for sparsity in sparsities
            for size in sizes
        }

    def packings(self) -> Contenders:
        """For the density up to which packing is not measured but chosen."""
        return {
            f"density {density:.0%}, {'packed' if packing else 'whole'}": self.ours(1 - density, packing=packing)
            for density in (0.1, 0.25, 0.5, 0.75, 0.9)
            for packing in (True, False)
        }

    def masks(self, sparsity: float) -> Masks:
        if sparsity not in self._masks:
            self._masks[sparsity] = hpcprune.prune(copy.deepcopy(self._model), sparsity, comm=self.world)
        return self._masks[sparsity]

    @contextmanager
    def ddp(
        self, hook: Callable[[DistributedDataParallel], tuple[Any, Any]] | None = None, **options: Any
    ) -> Iterator[Running]:
        """torch's DistributedDataParallel; `hook` makes a state and a communication hook."""
        model = DistributedDataParallel(copy.deepcopy(self._model), **options)
        if hook is not None:
            model.register_comm_hook(*hook(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=SGD.lr, momentum=SGD.momentum)
        yield Running(self._dense_step(model, optimizer), lambda: _state_bytes(optimizer))

    @contextmanager
    def horovod(self, compression: Any) -> Iterator[Running]:
        """Horovod's DistributedOptimizer."""
        import horovod.torch as hvd

        hvd.init()
        model = copy.deepcopy(self._model)
        named = list(model.named_parameters())
        plain = torch.optim.SGD(model.parameters(), lr=SGD.lr, momentum=SGD.momentum)
        optimizer = hvd.DistributedOptimizer(plain, named_parameters=named, compression=compression)
        yield Running(self._dense_step(model, optimizer), lambda: _state_bytes(optimizer))
        hvd.shutdown()  # its thread would disturb the others

    @contextmanager
    def ours(
        self,
        sparsity: float,
        backend: Callable[[World], Exchange] | None = None,
        bucket_mb: float = BUCKET_MB,
        packing: bool | None = None,
    ) -> Iterator[Running]:
        """hpcprune's own loop, as a run's retraining does it."""
        model = copy.deepcopy(self._model)
        masks = self.masks(sparsity) if sparsity else None
        exchange = backend(self.world) if backend else self.exchange
        training = Training(steps=10**6, batch_size=SAMPLES, batch_per="rank", optimizer=SGD)
        plan = Plan(SAMPLES * self.world.size, 1024 // (SAMPLES * self.world.size), 10**6)

        def begin(packing: bool) -> Trainer:
            survivors, name = Survivors(model, masks, packing=packing), (0, "retrain", 1)
            return Trainer(
                self.task, model, survivors, self._data, training, plan, self.world, exchange, name, None, bucket_mb
            )

        if packing is None:
            packing = masks is None or packing_pays(masks, begin, model, self.world)[0]
        trainer = begin(packing)
        number = iter(range(10**6))

        def state_bytes() -> int:
            return sum(t.numel() * t.element_size() for t in trainer.optimizer_state().values())

        yield Running(lambda: trainer.step(next(number), stop=False).overlap, state_bytes)
        trainer.close()
        if exchange is not self.exchange:
            exchange.close()

    def _own_hook(self, model: DistributedDataParallel) -> tuple[Any, Any]:
        masks = self.masks(0.9)
        masks.apply(model.module)
        return None, hpcprune.ddp_hook(masks, model)

    def _dense_step(self, model: nn.Module, optimizer: Any) -> Callable[[], None]:
        """The loop that torch's and Horovod's documentation writes, on this rank's samples of each step."""
        number = iter(range(10**6))

        def step() -> None:
            first = (next(number) * self.world.size + self.world.rank) * SAMPLES % 1024
            batch = torch.utils.data.default_collate([self._data[index] for index in range(first, first + SAMPLES)])
            optimizer.zero_grad()
            self.task.loss(model(batch[0]), batch).backward()
            optimizer.step()

        return step

    def measure(self, contenders: Contenders, into: dict[str, Measured], steps: int) -> None:
        """One turn: every contender, one after the other, does a few steps to warm up and `steps` that count."""
        for name, contender in contenders.items():
            with contender as running:
                for _ in range(3):  # DDP sorts its buckets after the first
                    running.step()
                self.world.barrier("bench")
                found, seconds, before = into.setdefault(name, Measured()), [], wire_bytes(self.world)
                for _ in range(steps):
                    start = time.perf_counter()
                    overlap = running.step()
                    seconds.append(time.perf_counter() - start)
                    found.overlaps += [] if overlap is None else [overlap]
                self.world.barrier("bench")
                found.bytes_sent.append((wire_bytes(self.world) - before) / steps)
                found.state_bytes = running.state_bytes()
            gc.collect()
            found.seconds += [max(each) for each in zip(*self.world.allgather(seconds, "bench"), strict=True)]


def _power_sgd(_: DistributedDataParallel) -> tuple[Any, Any]:
    """Rank 1 and from the second step on, the least and the soonest that it can do.

    It needs all gradients in one bucket with gloo: it begins all-reduces in gloo's threads, which with several buckets
    happens in another order on each rank.
    """
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    return state, powerSGD_hook.powerSGD_hook


def _state_bytes(optimizer: Any) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def wire_bytes(world: World) -> float:
    """Bytes that this rank has sent so far, headers included, as the kernel counts them."""
    sent = {}
    for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]:
        device, counts = line.split(":")
        sent[device.strip()] = int(counts.split()[8])
    loopback = sent.pop("lo", 0)
    return loopback / world.size if world.local_size == world.size else float(sum(sent.values()))


def main() -> None:
    """Print name -> what was measured, as JSON, on rank 0. Arguments: kind of contenders, network, turns, steps."""
    kind, network, turns, steps = sys.argv[1:5]
    world = World.of()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
    bench, measured = Bench(network, world), dict[str, Measured]()
    for _ in range(int(turns)):
        chosen = {name: each for name, each in getattr(bench, kind)().items() if "".join(sys.argv[5:6]) in name}
        bench.measure(chosen, measured, int(steps))
    if world.rank == 0:
        print(json.dumps({name: vars(each) for name, each in measured.items()}))


if __name__ == "__main__":
    main()
