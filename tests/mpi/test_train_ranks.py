"""Training on several ranks against torch's DistributedDataParallel, and against one rank with the whole batches.

Run by mpirun this file is the program of one rank: `test_train_ranks.py FOLDER`.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hpcprune
from hpcprune.errors import NumericsError
from hpcprune.exchange.torch import TorchExchange
from hpcprune.masks import Masks
from hpcprune.train import average_batch_norm
from hpcprune.world import World
from tests.conftest import Launch
from tests.training import Begun, Small, begin, torchs

COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.Get_rank(), COMM.Get_size()
NAMES = ("sgd", "adam", "adamw")
STEPS = 13  # three epochs and a bit


def masks_of(task: Small, pruned: bool) -> Masks:
    return hpcprune.prune(task.model(), 0.7) if pruned else Masks([], [])


def bits(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def assert_close(ours: nn.Module, theirs: nn.Module, what: object) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{what} {name}: {text}")


def stepped(begun: Begun, numbers: range, masks: Masks) -> Iterator[tuple[Tensor, float]]:
    """Do steps; of each, this rank's samples and the loss. What is pruned must be zero after every one of them."""
    for number in numbers:
        before = len(begun.data.asked)
        step = begun.trainer.step(number, False)
        for name in masks:
            gone = begun.model.get_parameter(name)[~masks[name]]
            assert gone.numel() and not gone.any(), (name, number)
        yield torch.tensor(begun.data.asked[before:]), step.loss


def reference_step(
    theirs: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], masks: Masks
) -> float:
    """A step as torch's users write it, the masks multiplied into gradients and weights; the loss."""
    plain = theirs.module if isinstance(theirs, DistributedDataParallel) else theirs
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(theirs(batch[0]), batch[1])
    loss.backward()
    for name in masks:
        plain.get_parameter(name).grad.mul_(masks[name])
    optimizer.step()
    masks.apply(plain)
    return loss.item()


def check_ddp(world: World, exchange: TorchExchange) -> None:
    """Equal parts, whose losses' mean is the batch's; the batch norms see their own part in both."""
    task = Small(norm=True)
    for pruned in (False, True):
        masks = masks_of(task, pruned)
        for name in NAMES:
            ours = begin(task, name, masks=masks, world=world, exchange=exchange, steps=STEPS)
            model = task.model()
            masks.apply(model)
            theirs = DistributedDataParallel(model, broadcast_buffers=False)
            optimizer = torchs(name, model.parameters())
            for chosen, loss in stepped(ours, range(STEPS), masks):
                batch = ours.data.inputs[chosen], ours.data.labels[chosen]
                mean = COMM.allreduce(reference_step(theirs, optimizer, batch, masks)) / RANKS
                assert abs(loss - mean) < 1e-5
            assert_close(ours.model, model, (name, pruned))
            average_batch_norm(ours.model, world)
            assert len(set(COMM.allgather(bits(ours.model)))) == 1, "all ranks have the same bits"


def check_unequal_parts(world: World, exchange: TorchExchange) -> None:
    """A batch that the ranks cannot share evenly, against one rank that has all of it."""
    task = Small()
    for name in NAMES:
        masks = masks_of(task, name != "sgd")
        ours = begin(task, name, masks=masks, world=world, exchange=exchange, steps=STEPS, batch_size=11)
        theirs = task.model()
        masks.apply(theirs)
        optimizer = torchs(name, theirs.parameters())
        for own, loss in stepped(ours, range(STEPS), masks):
            parts = COMM.allgather(own)
            assert {len(part) for part in parts} == {11 // RANKS, -(-11 // RANKS)}
            chosen = torch.cat(parts)
            batch = ours.data.inputs[chosen], ours.data.labels[chosen]
            assert abs(loss - reference_step(theirs, optimizer, batch, masks)) < 1e-5
        assert_close(ours.model, theirs, name)


def check_samples(world: World, exchange: TorchExchange) -> None:
    """Together the ranks see each sample of an epoch once, the same ones as any number of ranks."""
    ours, alone = begin(Small(), world=world, exchange=exchange, batch_size=10), begin(Small(), batch_size=10)
    for number in range(10):
        before = len(ours.data.asked)
        ours.trainer.step(number, False)
        alone.trainer.step(number, False)
        asked = COMM.allgather(ours.data.asked[before:])
        assert list(chain(*asked)) == alone.data.asked[-10:], "the global batch, in rank order"
    for epoch in (0, 1):
        length = len(ours.data.asked) // 2
        asked = COMM.allgather(ours.data.asked[epoch * length : (epoch + 1) * length])
        assert sorted(chain(*asked)) == list(range(50))


def check_batch_norm(world: World) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6).double())
    for number in (0, 2):
        statistics = model[number].running_mean, model[number].running_var
        torch.manual_seed(RANK)
        for statistic in statistics:
            statistic.copy_(torch.rand(6))
        expected = [np.mean(COMM.allgather(statistic.double().numpy()), axis=0) for statistic in statistics]
        average_batch_norm(model[number], world)
        for statistic, mean in zip(statistics, expected, strict=True):
            np.testing.assert_allclose(statistic.numpy(), mean, rtol=1e-7 if number == 0 else 1e-15)


def check_repeats(world: World, exchange: TorchExchange) -> None:
    """Cut and gone on with, and the same seed again, give the same bits; another seed does not. With dropout."""
    task = Small(norm=True, dropout=True)
    masks = masks_of(task, True)
    found = {}
    for what, seed in (("first", 3), ("again", 3), ("other", 4)):
        run = begin(task, "adamw", masks=masks, world=world, exchange=exchange, seed=seed)
        for number in range(12):
            run.trainer.step(number, False)
        found[what] = bits(run.model)
    cut = begin(task, "adamw", masks=masks, world=world, exchange=exchange)
    for number in range(5):
        cut.trainer.step(number, False)
    cut.trainer.close()
    model = copy.deepcopy(cut.model)
    resumed = begin(task, "adamw", masks=masks, model=model, world=world, exchange=exchange)
    resumed.trainer.load_optimizer_state(cut.trainer.optimizer_state(), masks)
    for number in range(5, 12):
        resumed.trainer.step(number, False)
    assert found["first"] == found["again"] == bits(resumed.model) != found["other"]
    assert len(set(COMM.allgather(bits(cut.model)))) == RANKS, "each rank has its own statistics and dropout"


def check_agreement(world: World, exchange: TorchExchange) -> None:
    """What one rank knows all ranks do: that it is told to stop, and that its loss is no number."""
    begun = begin(Small(), world=world, exchange=exchange)
    assert [begun.trainer.step(number, number == RANK).stop for number in range(RANKS + 1)] == [True] * RANKS + [False]
    spoilt = begin(Small(spoil=float("nan") if RANK == RANKS - 1 else 1.0), world=world, exchange=exchange)
    before = bits(spoilt.model)
    with pytest.raises(NumericsError, match=rf"retrain 1: step 0: NaN or infinite values on rank {RANKS - 1}: "):
        spoilt.trainer.step(0, False)
    assert bits(spoilt.model) == before


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_on_ranks_is_ddp_and_zeros_stay_zero(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("done-*"))) == ranks


def main(folder: Path) -> None:
    world = World.of(timeout=60)
    exchange = TorchExchange(world, torch.device("cpu"))
    check_ddp(world, exchange)
    check_unequal_parts(world, exchange)
    check_samples(world, exchange)
    check_batch_norm(world)
    check_repeats(world, exchange)
    check_agreement(world, exchange)
    exchange.close()
    (folder / f"done-{RANK}").touch()


if __name__ == "__main__":
    with World.of().guard():
        main(Path(sys.argv[1]))
