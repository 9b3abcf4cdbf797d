"""Calibration: the samples that a criterion looks at, dealt to the ranks batch by batch.

Which samples make a batch does not hang on the number of ranks; which rank looks at it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from hpcprune.errors import NumericsError
from hpcprune.seeds import kept_random, seed_all
from hpcprune.snapshot import load_buffers
from hpcprune.task import to_device
from hpcprune.world import World

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """What to run the model on, and how.

    samples: indices of the dataset's. run: the model on a batch, for what its layers see. loss: the mean over a batch.
    name: of its random numbers. advance: called after each turn, in which every rank has looked at a batch or none.
    """

    model: nn.Module
    dataset: Dataset[Any]
    samples: Sequence[int]
    batch_size: int
    run: Callable[[Any], object]
    loss: Callable[[Any], Tensor]
    name: tuple[int | str, ...]
    world: World
    advance: Callable[[], None] = lambda: None

    @property
    def batches(self) -> int:
        """How many there are, over all ranks; of nearly equal sizes, as a batch norm would not take a last one of 1."""
        return -(-len(self.samples) // self.batch_size)

    @property
    def turns(self) -> int:
        """How often every rank takes one, or none."""
        return -(-self.batches // self.world.size)

    def own(self) -> Iterator[list[int]]:
        """This rank's samples of each turn; none where there is no batch left for it."""
        for turn in range(self.turns):
            number = turn * self.world.size + self.world.rank
            seed_all(*self.name, "calibrate", number)
            first, last = (len(self.samples) * edge // self.batches for edge in (number, number + 1))
            yield [*self.samples[first:last]]
            self.advance()

    def batch(self, indices: Sequence[int]) -> Any:
        """Samples as a batch, where the model is."""
        device = next(self.model.parameters()).device
        return to_device(default_collate([self.dataset[index] for index in indices]), device)

    def check_finite(self, bad: str) -> None:
        """Raise NumericsError, on every rank, if one has seen what is not finite. Collective."""
        what = f"{' '.join(map(str, self.name[1:]))}: calibrating"
        found = self.world.allgather(bad, what)
        places = [f"rank {rank}: {each}" for rank, each in enumerate(found) if each]
        if places:
            raise NumericsError(
                f"{what}: NaN or infinite values on {'; '.join(places[:4])}; look at the data, or train the network "
                "anew with a lower learning rate"
            )

    @contextmanager
    def mode(self, *, training: bool) -> Iterator[None]:
        """Put the model's modules into a mode, and leave them, its buffers and what is random as they were."""
        modes = {module: module.training for module in self.model.modules()}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()} if training else {}
        self.model.train(training)
        try:
            # cuDNN knows no backward of recurrent layers in evaluation.
            with kept_random(), torch.backends.cudnn.flags(enabled=training):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            load_buffers(self.model, buffers)

    def sum_for_owner(self, values: Tensor, owner: int, what: str) -> Tensor | None:
        """The sum over all ranks of float64 `values`, for the owner alone. Collective."""
        if self.world.size == 1:
            return values
        total = self.world.reduce(np.ascontiguousarray(values.cpu().numpy()), owner, f"calibrating: {what}")
        return None if total is None else torch.from_numpy(total).to(values.device)
