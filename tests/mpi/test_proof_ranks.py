"""That training on ranks, only the survivors travelling, is torch's own in float32: to the last bit, or to rounding.

On two ranks it is DistributedDataParallel with the masks multiplied into gradients and weights, bit for bit, in weights
and in the optimizer's state: a sum of two is the same in any order, half of it is exact, so it does not matter that DDP
halves gradients and we halve the loss, and what an optimizer does to an element does not depend on where it lies.

Where sums are added up in another order, float32 rounds them otherwise, and weights are equal within BOUND only:

- on 1, 2, 3 and 4 ranks with the same global batch: parts of it are summed first, then those of the ranks;
- with the batch in parts (accumulate), for the same reason;
- clipped by the global norm: ours is of one packed vector, DDP's of each tensor's norm.

A step rounds each weight, and that is more than all it rounds in the update, which is much smaller. To round is to err
by at most eps / 2 (2 ** -24) of the weight, whose largest are about 1, and the steps' errors add up, so the bound is
steps * eps / 2. The largest difference seen is a seventh of that, and training changes every parameter by a thousand
times that and more.

Run by mpirun this file is the program of one rank: `test_proof_ranks.py FOLDER`.
"""

from __future__ import annotations

import copy
import gc
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpcprune.exchange.torch import TorchExchange
from hpcprune.masks import Masks
from hpcprune.world import World
from tests.conftest import Launch
from tests.mpi.proof import OPTIMIZERS, Images, Reference, begin, dense_states, largest_difference, masks_of, step
from tests.training import Begun

COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.Get_rank(), COMM.Get_size()
STEPS, SHORT = 50, 30
BOUND = SHORT * torch.finfo(torch.float32).eps / 2
CLIP_NORM = 0.5
USERS = ((True, False), (False, True), (False, False), (True, True))  # which of two ranks use a layer, step by step


def assert_same(ours: Begun, theirs: Reference, masks: Masks) -> None:
    """Every bit of the weights, pruned ones included, and of the optimizer's state; zeros where they are pruned."""
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: {(a - b).abs().max()}"
    trained = {name: each for name, each in theirs.model.named_parameters() if each.requires_grad}
    states = list(dense_states(ours, masks))
    assert {name for name, _, _ in states} == set(trained)
    for name, key, value in states:
        assert torch.equal(value, theirs.optimizer.state[trained[name]][key]), f"{key} of {name}"
    weights = [(name, "weights", ours.model.get_parameter(name)) for name in masks]
    for name, key, tensor in (*weights, *states):
        if name in masks:
            assert (gone := tensor[~masks[name]]).numel() and not gone.any(), f"{key} of {name} where it is pruned"
            assert tensor[masks[name]].any(), f"{key} of {name}"


def assert_close(ours: nn.Module, theirs: nn.Module, bound: float = BOUND) -> None:
    """Within the bound, which is small against what training does to every parameter."""
    difference = largest_difference(ours, theirs)
    assert difference <= bound, difference
    start = Images().model()
    for (name, before), after in zip(start.named_parameters(), theirs.parameters(), strict=True):
        assert not after.requires_grad or (before - after).abs().max() > 1000 * BOUND, name


def check_ranks(world: World, exchange: TorchExchange, optimizer: str) -> None:
    """Against one rank that has the whole batches and nobody to exchange with."""
    masks = masks_of(0.8)
    ours = begin(optimizer, masks, world, exchange)
    parts = [step(ours, number)[0][0] for number in range(SHORT)]
    batches, theirs = [], ours.model
    if RANK == 0:
        alone = begin(optimizer, masks)
        batches, theirs = [step(alone, number)[0][0] for number in range(SHORT)], alone.model
    batches, theirs = COMM.bcast((batches, theirs))
    for own, whole in zip(parts, batches, strict=True):
        assert torch.equal(torch.cat(COMM.allgather(own)), whole)
    assert_close(ours.model, theirs, BOUND if RANKS > 1 else 0.0)


def check_ddp(world: World, exchange: TorchExchange, optimizer: str, sparsity: float) -> None:
    """Packed, and with what is pruned travelling along as zeros."""
    masks = masks_of(sparsity)
    both = [begin(optimizer, masks, world, exchange, packing=packing) for packing in (True, False)]
    assert len(both[0].trainer.survivors) < 0.5 * len(both[1].trainer.survivors)
    theirs = Reference(optimizer, masks)
    for number in range(STEPS):
        batch, _ = step(both[0], number)
        step(both[1], number)
        theirs.step(batch)
    for ours in both:
        assert_same(ours, theirs, masks)


def check_clipping(world: World, exchange: TorchExchange, optimizer: str, packing: bool) -> None:
    """In some steps the norm is above the limit, in some below."""
    masks = masks_of(0.8)
    ours = begin(optimizer, masks, world, exchange, packing=packing, more={"clip_norm": CLIP_NORM})
    theirs = Reference(optimizer, masks)
    norms = []
    for number in range(SHORT):
        batch, _ = step(ours, number)
        theirs.step(batch, clip_norm=CLIP_NORM)
        norms.append(theirs.norm)
    assert min(norms) < CLIP_NORM < max(norms)
    assert_close(ours.model, theirs.model)


def check_accumulation(world: World, exchange: TorchExchange, optimizer: str, packing: bool) -> None:
    """The batch in three parts, after the last of which as much is sent as for the whole."""
    masks, sent = masks_of(0.8), [exchange.bytes_sent]
    both = [begin(optimizer, masks, world, exchange, packing=packing, more={"accumulate": parts}) for parts in (3, 1)]
    for ours in both:
        for number in range(SHORT):
            step(ours, number)
        sent.append(exchange.bytes_sent)
    assert sent[1] - sent[0] == sent[2] - sent[1] > 0
    assert_close(both[0].model, both[1].model)


def check_autocast(world: World, exchange: TorchExchange, optimizer: str, packing: bool) -> None:
    """Layers compute in bfloat16, forward and backward; weights, their gradients and the optimizer do not."""
    masks = masks_of(0.8)
    ours = begin(optimizer, masks, world, exchange, packing=packing, more={"autocast": True})
    theirs = Reference(optimizer, masks)
    computed: set[torch.dtype] = set()
    for layer in map(ours.model.get_submodule, ("second", "shared")):
        layer.register_forward_hook(lambda *args: computed.add(args[-1].dtype))
        layer.register_full_backward_hook(lambda *args: computed.add(args[-1][0].dtype))
    losses = []
    for number in range(STEPS):
        batch, loss = step(ours, number)
        theirs.step(batch, autocast=True)
        losses.append(loss)
    assert computed == {torch.bfloat16}
    assert {tensor.dtype for tensor in (*ours.model.parameters(), *ours.trainer.survivors.gradients())} == {
        torch.float32
    }
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert_same(ours, theirs, masks)


def check_unused(world: World, exchange: TorchExchange, optimizer: str, packing: bool) -> None:
    """A layer used by both ranks, by one or by none; a weight used twice; a frozen one, which has no state."""
    masks, task = masks_of(0.8), Images()
    ours = begin(optimizer, masks, world, exchange, task=task, packing=packing)
    frozen = copy.deepcopy(ours.model.get_submodule("frozen"))
    theirs = Reference(optimizer, masks, leaves_out=True)
    for number in range(SHORT):
        task.seldom = USERS[number % len(USERS)][RANK]
        batch, _ = step(ours, number)
        theirs.step(batch, task.seldom)
    assert_same(ours, theirs, masks)
    assert ours.model.get_parameter("again.weight") is ours.model.get_parameter("shared.weight")
    assert largest_difference(ours.model.get_submodule("frozen"), frozen) == 0
    assert not any(name.startswith("frozen") for name in ours.trainer.optimizer_state())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_training_on_ranks_is_torchs_to_the_last_bit_or_rounding(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("done-*"))) == ranks


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = World.of(timeout=60)
    exchange = TorchExchange(world, torch.device("cpu"))
    for optimizer in OPTIMIZERS:
        check_ranks(world, exchange, optimizer)
    if RANKS == 2:
        for optimizer, sparsity in product(OPTIMIZERS, (0.7, 0.9)):
            check_ddp(world, exchange, optimizer, sparsity)
        for optimizer, packing in product(OPTIMIZERS, (True, False)):
            check_clipping(world, exchange, optimizer, packing)
            check_accumulation(world, exchange, optimizer, packing)
            check_autocast(world, exchange, optimizer, packing)
            check_unused(world, exchange, optimizer, packing)
    gc.collect()  # DDP modules are in cycles and hold the group, whose threads must end before Python does
    exchange.close()
    (folder / f"done-{RANK}").touch()


if __name__ == "__main__":
    with World.of().guard():
        main(Path(sys.argv[1]))
