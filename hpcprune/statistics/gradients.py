"""Sums over batches, or over samples, of a function of the loss's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcprune.errors import JobError
from hpcprune.shards import Layer, Span
from hpcprune.statistics.calibration import Calibration
from hpcprune.statistics.statistic import Gathered

__all__ = ["Gradients"]


@dataclass(frozen=True)
class Gradients:
    """The mean over batches of `of` of a batch's gradient.

    by_sample: of each sample's gradient instead. training: whether the model is as in training (dropout, batch norms).

    After each turn the sums go to the layers' owners, so that a rank holds one batch's gradients and what it owns.
    """

    of: Callable[[Tensor], Tensor]
    by_sample: bool = False
    training: bool = False

    def check(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Any parameter has a gradient."""

    def gather(self, calibration: Calibration, layers: Sequence[Layer], shards: Sequence[Sequence[Span]]) -> Gathered:
        named = dict(calibration.model.named_parameters())
        parameters = [named[layer.name] for layer in layers]
        device = parameters[0].device
        sums = {
            span: torch.zeros(span.weights, dtype=torch.float64, device=device)
            for span in shards[calibration.world.rank]
        }
        with calibration.mode(training=self.training), _graded(parameters):
            for indices in calibration.own():
                self._turn(calibration, parameters, indices, layers, shards, sums)
        return sums.__getitem__

    def _turn(
        self,
        calibration: Calibration,
        parameters: Sequence[Tensor],
        indices: Sequence[int],
        layers: Sequence[Layer],
        shards: Sequence[Sequence[Span]],
        sums: dict[Span, Tensor],
    ) -> None:
        """Add a batch of each rank to its owners' sums. What it needs for that is freed before the next."""
        found, bad = self._look(calibration, parameters, indices)
        calibration.check_finite(bad)
        for owner, shard in enumerate(shards):
            for span in shard:
                total = calibration.sum_for_owner(found(span), owner, layers[span.layer].name)
                if total is not None:
                    sums[span] += total

    def _look(
        self, calibration: Calibration, parameters: Sequence[Tensor], indices: Sequence[int]
    ) -> tuple[Gathered, str]:
        """This rank's part of a turn's sum, by span; and what was not finite."""
        if not self.by_sample:
            gradients, bad = _gradients(calibration, parameters, indices)
            share = len(indices) / len(calibration.samples)
            return lambda span: self.of(_cut(gradients, parameters, span)) * share, bad
        totals = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in parameters]
        for index in indices:
            gradients, bad = _gradients(calibration, parameters, [index])
            if bad:
                return lambda span: _cut(totals, parameters, span), bad
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += self.of(gradient.double()) / len(calibration.samples)
        return lambda span: _cut(totals, parameters, span), ""


def _gradients(
    calibration: Calibration, parameters: Sequence[Tensor], indices: Sequence[int]
) -> tuple[Sequence[Tensor | None], str]:
    if not indices:
        return [None] * len(parameters), ""
    with torch.enable_grad():
        loss = calibration.loss(calibration.batch(indices))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f" of shape {[*loss.shape]}" if isinstance(loss, Tensor) else ""
            raise JobError(
                f"loss: gave {type(loss).__name__}{shape}, not the mean over the batch, a tensor of one number"
            )
        found = torch.autograd.grad(loss.reshape(()), parameters, allow_unused=True)
        gradients = [g.to_dense() if g is not None and g.layout != torch.strided else g for g in found]
    loss = loss.detach()
    finite = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
    return gradients, "" if finite and bool(loss.isfinite()) else f"the loss ({float(loss):.4g}) or its gradient"


def _cut(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], span: Span) -> Tensor:
    """The span's part, float64; zeros where the loss does not hang on the parameter."""
    gradient = gradients[span.layer]
    if gradient is None:
        return torch.zeros(span.weights, dtype=torch.float64, device=parameters[span.layer].device)
    return gradient.reshape(-1)[span.start : span.stop].double()


@contextmanager
def _graded(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Have parameters require a gradient that do not: what is not trained can be pruned all the same."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
