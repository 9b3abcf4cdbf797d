"""Horovod's DistributedOptimizer with our compressor against itself without it, the masks multiplied in.

Run by mpirun this file is the program of one rank: `test_compression_ranks.py FOLDER`.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune.errors import HpcpruneError, WorldError
from hpcprune.masks import Masks
from hpcprune.world import World
from tests.conftest import Launch

STEPS = 50


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.norm = nn.LayerNorm(12)
        self.gone = nn.Linear(12, 12)
        self.hidden = nn.Linear(12, 12)
        self.last = nn.Linear(12, 4, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images).relu().mean((2, 3)))
        return self.last((self.gone(hidden) + self.hidden(hidden)).relu().double())


def model_and_masks() -> tuple[Net, Masks]:
    """80 % pruned, and all of one layer."""
    torch.manual_seed(1)
    model = Net()
    masks = hpcprune.prune(model, 0.8)
    bits = {layer.name: masks.bits(layer.name) for layer in masks.layers}
    bits["gone.weight"] = np.zeros_like(bits["gone.weight"])
    masks = Masks(masks.layers, list(bits.values()))
    masks.apply(model)
    return model, masks


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's own."""
    import horovod.torch as hvd

    generator = torch.Generator().manual_seed(100 + hvd.rank())
    for _ in range(steps):
        yield torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def distributed(model: nn.Module, kind: str = "sgd", **options: Any) -> Any:
    import horovod.torch as hvd

    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


def assert_zeros(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in masks.parameters(model).items():
        state = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
        for tensor in (parameter, parameter.grad, *state):
            assert not tensor[~masks[name]].any(), name


def check_against_horovod(kind: str, steps: int, **options: Any) -> None:
    """With two ranks a sum is the same in any order, and half of it is exact: bit for bit."""
    model, masks = model_and_masks()
    theirs = copy.deepcopy(model)
    ours = distributed(model, kind, compression=hpcprune.Compression(masks, model), **options)
    reference = distributed(theirs, kind, **options)
    passes = options.get("backward_passes_per_step", 1)
    for step, batch in enumerate(batches(steps)):
        ours.zero_grad()
        for _ in range(passes):
            backward(model, batch)
        ours.step()
        reference.zero_grad()
        for _ in range(passes):
            backward(theirs, batch)
        reference.synchronize()
        for name, parameter in masks.parameters(theirs).items():
            parameter.grad.mul_(masks[name])
        with reference.skip_synchronize():
            reference.step()
        masks.apply(theirs)
        if step in (0, 1, steps - 1):
            assert_zeros(model, masks, ours)
            for (name, a), b in zip(model.named_parameters(), theirs.parameters(), strict=True):
                assert torch.equal(a, b), (kind, options, step, name)


def check_bytes() -> None:
    """Survivors and what has no mask travel, and nothing else."""
    import horovod.torch.optimizer as module

    model, masks = model_and_masks()
    optimizer = distributed(model, compression=hpcprune.Compression(masks, model))
    parameters = dict(model.named_parameters())
    expected = sum(parameter.nbytes * masks.densities.get(name, 1.0) for name, parameter in parameters.items())
    dense = sum(parameter.nbytes for parameter in parameters.values())
    sent: list[Tensor] = []
    real = module.allreduce_async_

    def allreduce(tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor)
        return real(tensor, **options)

    for batch in batches(3):
        sent.clear()
        with mock.patch.object(module, "allreduce_async_", allreduce):
            backward(model, batch)
            optimizer.step()
        optimizer.zero_grad()
        assert sum(tensor.nbytes for tensor in sent) == round(expected) < 0.5 * dense


def check_adasum() -> None:
    """Adasum compresses what its optimizer would add to the weights, in the parameter itself."""
    import horovod.torch as hvd

    model, masks = model_and_masks()
    optimizer = distributed(model, op=hvd.Adasum, compression=hpcprune.Compression(masks, model))
    before = copy.deepcopy(model)
    for batch in batches(5):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if name in masks:
            assert not parameter[~masks[name]].any()
        moved = parameter != old
        assert moved[masks[name]].all() if name in masks else moved.any(), name


def check_what_is_refused() -> None:
    import horovod.torch as hvd

    model, masks = model_and_masks()
    with pytest.raises(HpcpruneError, match=r"last.weight of shape \(4, 12\) is not in this Linear"):
        hpcprune.Compression(Masks(masks.layers[-1:], [masks.bits("last.weight")]), nn.Linear(12, 4))
    stranger = copy.deepcopy(model)
    optimizer = distributed(stranger, compression=hpcprune.Compression(masks, model))
    with pytest.raises(HpcpruneError, match="is of no parameter of the model"):
        backward(stranger, next(batches(1)))
    del optimizer
    torch.manual_seed(hvd.rank())
    other = Net()
    with pytest.raises(WorldError, match=r"masks of rank 1 \(of 2\) are not those of rank 0"):
        hpcprune.Compression(hpcprune.prune(other, 0.8, scope="layer", comm=World.alone()), other)


def test_the_compressor_is_horovod_with_the_masks_multiplied_in(mpirun: Launch, tmp_path: Path) -> None:
    if "HPCPRUNE_NO_HOROVOD" in os.environ:
        pytest.skip("HPCPRUNE_NO_HOROVOD is set")
    # Horovod waits in a thread of its own; where cores are shared, it must let go of them for the others to come.
    done = mpirun(2, __file__, tmp_path, timeout=120, env={"OMPI_MCA_mpi_yield_when_idle": "1"})
    assert done.returncode == 0, done.stderr + "\nif Horovod is missing: sh scripts/install-horovod.sh"
    assert len(list(tmp_path.glob("done-*"))) == 2


def main(folder: Path) -> None:
    import horovod.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    check_against_horovod("sgd", STEPS)
    check_against_horovod("adamw", STEPS)
    check_against_horovod("sgd", 8, groups=3)
    check_against_horovod("adamw", 8, backward_passes_per_step=2)
    check_bytes()
    check_adasum()
    check_what_is_refused()
    (folder / f"done-{hvd.rank()}").touch()
    hvd.shutdown()


if __name__ == "__main__":
    with World.of().guard():
        main(Path(sys.argv[1]))
