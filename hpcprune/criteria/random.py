"""Random: the control that every comparison needs. A criterion that is no better is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcprune.criteria.criterion import Criterion, Piece

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Random"]

_STREAMS = 4  # numbers that the generator makes at once


class Random(Criterion):
    """Uniform in [0, 1): a function of the seed, the layer's name and the weight's place, and of nothing else."""

    name = "random"
    of_values = False

    def scores(self, piece: Piece) -> Tensor:
        import numpy as np
        import torch

        from hpcprune.seeds import derive

        generator = np.random.Philox(key=derive(piece.seed, "random", piece.layer.name))
        turns, ahead = divmod(piece.span.start, _STREAMS)
        generator.advance(turns)
        drawn = np.random.Generator(generator).random(ahead + piece.span.weights)[ahead:]
        return torch.from_numpy(drawn).to(piece.parameter.device)
