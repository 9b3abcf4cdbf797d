"""DDP with our hook on several ranks against DDP without it, the masks multiplied in after each backward and step.

Run by mpirun this file is the program of one rank: `test_ddp_ranks.py FOLDER`.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hpcprune
from hpcprune.errors import WorldError
from hpcprune.masks import Masks
from hpcprune.world import World
from tests.conftest import Launch

COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.Get_rank(), COMM.Get_size()
STEPS, SHORT = 50, 6
Optimizers = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.1),
}
GRAPHS: list[dict[str, Any]] = [{}, {"static_graph": True}, {"find_unused_parameters": True}]
# With two ranks a sum is the same in any order, and half of it is exact: nothing differs from DDP. With more, where an
# element lies decides in which order gloo adds it up, so the last bit may differ; Adam makes much of small gradients.
BOUNDS = {"sgd": 0.0, "adamw": 0.0} if RANKS == 2 else {"sgd": 1e-6, "adamw": 2e-4}


class Net(nn.Module):
    """Two dtypes, a permuted weight, layers that are registered in another order than used, one used at times only."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(12, 4, dtype=torch.float64)
        self.whole = nn.Linear(20, 12)
        self.gone = nn.Linear(20, 20)
        # No bias: in front of a norm its gradient is nothing but rounding errors, which Adam would make large.
        self.conv = nn.Conv2d(3, 20, 3, bias=False).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(20)
        self.frozen = nn.Linear(20, 20).requires_grad_(False)
        self.seldom = nn.Linear(20, 20)

    def forward(self, images: Tensor, seldom: bool = True) -> Tensor:
        hidden = self.norm(self.conv(images)).relu().mean((2, 3))
        hidden = hidden + self.gone(hidden) + self.frozen(hidden)
        if seldom:
            hidden = hidden + self.seldom(hidden).relu()
        return self.last(self.whole(hidden).relu().double())


def model_and_masks() -> tuple[Net, Masks]:
    """80 % pruned, but all of one layer and nothing of another."""
    torch.manual_seed(1)
    model = Net()
    masks = hpcprune.prune(model, 0.8, comm=COMM)
    bits = {layer.name: masks.bits(layer.name) for layer in masks.layers}
    bits["gone.weight"] = np.zeros_like(bits["gone.weight"])
    bits["whole.weight"] = Masks.full(masks.layers).bits("whole.weight")
    masks = Masks(masks.layers, list(bits.values()))
    masks.apply(model)
    return model, masks


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's own."""
    generator = torch.Generator().manual_seed(100 + RANK)
    for _ in range(steps):
        yield torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def wrap(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=0.001, **options)


def backward(ddp: nn.Module, batch: tuple[Tensor, Tensor], seldom: bool) -> None:
    nn.functional.cross_entropy(ddp(batch[0], seldom), batch[1]).backward()


def assert_zeros(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in masks.parameters(model).items():
        gone = ~masks[name]
        state = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
        assert state or not parameter.requires_grad
        for tensor in (parameter, parameter.grad, *state):
            assert tensor is None or not tensor[gone].any(), name


def assert_same(ours: nn.Module, theirs: nn.Module, optimizers: list[torch.optim.Optimizer], bound: float) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        states = [optimizer.state.get(parameter, {}) for optimizer, parameter in zip(optimizers, (a, b), strict=True)]
        torch.testing.assert_close(*states, rtol=bound, atol=bound)


def check_against_ddp(name: str, steps: int, hand_over_ddp: bool, options: dict[str, Any]) -> None:
    model, masks = model_and_masks()
    theirs = copy.deepcopy(model)
    ddp, plain = wrap(model, **options), wrap(theirs, **options)
    ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp if hand_over_ddp else model))
    optimizers = [OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](theirs.parameters())]
    for step, batch in enumerate(batches(steps)):
        seldom = "find_unused_parameters" not in options or (step + RANK) % 3 == 0
        backward(ddp, batch, seldom)
        backward(plain, batch, seldom)
        for layer, parameter in masks.parameters(theirs).items():
            if parameter.grad is not None:
                parameter.grad.mul_(masks[layer])
        for optimizer in optimizers:
            optimizer.step()
        masks.apply(theirs)
        if step in (0, 1, 2, steps - 1):
            assert_zeros(model, masks, optimizers[0])
            assert_same(model, theirs, optimizers, BOUNDS[name])
        for optimizer in optimizers:
            optimizer.zero_grad()


@contextmanager
def counted() -> Iterator[list[Tensor]]:
    """What is passed to all-reduces."""
    sent: list[Tensor] = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor)
        return real(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield sent


def check_bytes() -> None:
    """Survivors and what has no mask travel, in the same bytes each step, and nothing else."""
    model, masks = model_and_masks()
    ddp = wrap(model)
    ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    dense = sum(parameter.nbytes for parameter in trained.values())
    expected = sum(parameter.nbytes * masks.densities.get(name, 1.0) for name, parameter in trained.items())
    buckets = []
    for batch in batches(3):
        with counted() as sent:
            backward(ddp, batch, True)
        assert sum(tensor.nbytes for tensor in sent) == round(expected) < 0.6 * dense
        buckets.append(len(sent))
    assert buckets[0] != buckets[1] == buckets[2] > 4, "DDP has rebuilt its buckets"


def check_accumulation() -> None:
    """no_sync: what was gathered without communication is averaged by the pass that communicates."""
    for view in (False, True):
        model, masks = model_and_masks()
        theirs = copy.deepcopy(model)
        ddp, plain = wrap(model, gradient_as_bucket_view=view), wrap(theirs, gradient_as_bucket_view=view)
        ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
        for batch in batches(2):
            for module in (ddp, plain):
                with module.no_sync():
                    backward(module, batch, True)
                backward(module, batch, True)
            for name, a in model.named_parameters():
                b = theirs.get_parameter(name).grad
                if b is not None and name in masks:
                    b.mul_(masks[name])
                torch.testing.assert_close(a.grad, b, rtol=BOUNDS["sgd"], atol=BOUNDS["sgd"])


def check_uneven_inputs() -> None:
    """DDP's join: ranks that have run out of batches send zeros, packed as the others pack."""
    model, masks = model_and_masks()
    ddp = wrap(model)
    ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with ddp.join():
        for batch in batches(3 + RANK):
            backward(ddp, batch, True)
            optimizer.step()
            assert_zeros(model, masks, optimizer)
            optimizer.zero_grad()


def model_and_masks_of_one() -> tuple[Net, Masks]:
    torch.manual_seed(1)
    model = Net()
    return model, hpcprune.prune(model, 0.8, comm=World.alone())


def check_own_group() -> None:
    """DDP over ranks 0 and 1 of three: taken from the DDP module, or as the hook's state."""
    group = dist.new_group([0, 1])
    if RANK == 2:
        return
    for state in (None, group):
        model, masks = model_and_masks_of_one()
        ddp = wrap(model, process_group=group)
        ddp.register_comm_hook(state, hpcprune.ddp_hook(masks, ddp if state is None else model))
        backward(ddp, next(batches(1)), True)
        for parameter in model.parameters():
            if parameter.grad is not None:
                both = [torch.empty_like(parameter.grad) for _ in range(2)]
                dist.all_gather(both, parameter.grad, group=group)
                assert torch.equal(*both)


def check_other_masks_are_refused() -> None:
    torch.manual_seed(RANK // (RANKS - 1))  # the last rank has another model
    model = Net()
    masks = hpcprune.prune(model, 0.8, scope="layer", comm=World.alone())
    ddp = wrap(model)
    ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
    with pytest.raises(WorldError, match=rf"masks of rank {RANKS - 1} \(of {RANKS}\) are not those of rank 0"):
        backward(ddp, next(batches(1)), True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_hook_is_ddp_with_the_masks_multiplied_in(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, tmp_path, timeout=120, env={"GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("done-*"))) == ranks


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=RANK, world_size=RANKS)
    for name, (number, graph) in product(OPTIMIZERS, enumerate(GRAPHS)):
        view = (number + (name == "sgd")) % 2 == 0
        try:
            check_against_ddp(name, SHORT if graph else STEPS, view, {**graph, "gradient_as_bucket_view": view})
        except AssertionError as error:
            raise AssertionError(f"{name}, {graph}, view {view}: {error}") from error
    check_bytes()
    check_accumulation()
    check_uneven_inputs()
    if RANKS == 3:
        check_own_group()
    check_other_masks_are_refused()
    gc.collect()  # DDP modules are in cycles and hold the group, whose threads must end before Python does
    dist.destroy_process_group()
    (folder / f"done-{RANK}").touch()


if __name__ == "__main__":
    with World.of().guard():
        main(Path(sys.argv[1]))
