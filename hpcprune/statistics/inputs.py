"""The energy of each weight's input: the sum, over samples and places, of the square of what it is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcprune.errors import JobError
from hpcprune.layers import is_linear, is_transposed_linear
from hpcprune.shards import Layer, Span
from hpcprune.statistics.calibration import Calibration
from hpcprune.statistics.statistic import Gathered

__all__ = ["InputEnergy"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class InputEnergy:
    """Of Linear and Conv layers. Rows of a layer (of a group, in a grouped convolution) share their inputs' energies;
    where a row is an input, its weights do.

    A layer that several modules hold has the sum of all that they see.
    """

    def check(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        for layer, holders in zip(layers, _holders(model, layers), strict=True):
            others = sorted({type(holder).__name__ for holder in holders if not _known(holder)})
            if others or not holders:
                raise JobError(
                    f"prune.criterion: a criterion of inputs, as wanda is, scores Linear and Conv layers, and "
                    f"{layer.name} is {' and '.join(others)}'s; exclude it (prune.exclude), or choose another criterion"
                )

    def gather(self, calibration: Calibration, layers: Sequence[Layer], shards: Sequence[Sequence[Span]]) -> Gathered:
        energies: list[Tensor | None] = [None] * len(layers)
        hooks = [
            holder.register_forward_pre_hook(_watch(energies, number), with_kwargs=True)
            for number, holders in enumerate(_holders(calibration.model, layers))
            for holder in holders
        ]
        try:
            with calibration.mode(training=False), torch.no_grad():
                for indices in calibration.own():
                    if indices:
                        calibration.run(calibration.batch(indices))
        finally:
            for hook in hooks:
                hook.remove()
        return self._reduce(energies, calibration, layers, shards)

    def _reduce(
        self,
        energies: Sequence[Tensor | None],
        calibration: Calibration,
        layers: Sequence[Layer],
        shards: Sequence[Sequence[Span]],
    ) -> Gathered:
        own_shapes = [() if energy is None else tuple(energy.shape) for energy in energies]
        shapes = calibration.world.allgather(own_shapes, "calibrating: which layers were called")
        for number, layer in enumerate(layers):
            if not any(each[number] for each in shapes):
                raise JobError(
                    f"prune.criterion: {layer.name} saw no input while the model ran on samples, though its weight may "
                    "have been used (as attention's own kernels do); exclude it (prune.exclude), or choose another "
                    "criterion"
                )
        bad = [
            layer.name for layer, e in zip(layers, energies, strict=True) if e is not None and not e.isfinite().all()
        ]
        calibration.check_finite(f"the input of {bad[0]}" if bad else "")
        device = next(calibration.model.parameters()).device
        own: dict[Span, Tensor] = {}
        for owner, shard in enumerate(shards):
            for span in shard:
                shape = max(each[span.layer] for each in shapes)
                mine = energies[span.layer]
                part = torch.zeros(shape, dtype=torch.float64, device=device) if mine is None else mine
                total = calibration.sum_for_owner(part, owner, layers[span.layer].name)
                if total is not None:
                    own[span] = total
        return lambda span: _spread(own[span], layers[span.layer], span)


def _holders(model: nn.Module, layers: Sequence[Layer]) -> list[list[nn.Module]]:
    """The modules that hold each layer's parameter: more than one where it is shared."""
    named = dict(model.named_parameters())
    holders: dict[int, list[nn.Module]] = {id(named[layer.name]): [] for layer in layers}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in holders:
                holders[id(parameter)].append(module)
    return [holders[id(named[layer.name])] for layer in layers]


def _known(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS) or is_linear(module) or is_transposed_linear(module)


def _watch(energies: list[Tensor | None], number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x: Tensor = inputs[0] if inputs else named["input"]
        energy, before = _energy(module, x.detach()), energies[number]
        energies[number] = energy if before is None else before + energy

    return hook


def _energy(module: nn.Module, x: Tensor) -> Tensor:
    """[groups of rows, weights of a row], or [rows, 1] where a row is an input; float64."""
    if not isinstance(module, _CONVOLUTIONS):
        norm: Tensor = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]), dim=0, dtype=torch.float64)
        return norm.square()[:, None] if is_transposed_linear(module) else norm.square()[None]
    # What meets each weight, over all places, is what its gradient sums; so x^2 meets it in the gradient with x^2.
    probe = torch.ones(module.groups, *module.weight.shape[1:], dtype=torch.float64, device=x.device)
    with torch.enable_grad():
        y = module._conv_forward(x.double().square(), probe.requires_grad_(), None)
        (energy,) = torch.autograd.grad(y.sum(), probe)
    return energy.reshape(module.groups, -1)


def _spread(energy: Tensor, layer: Layer, span: Span) -> Tensor:
    """A number for each weight of a span."""
    first, last = span.start // layer.row, -(-span.stop // layer.row)
    rows = torch.arange(first, last, device=energy.device) * len(energy) // layer.shape[0]
    offset = first * layer.row
    return energy[rows].expand(-1, layer.row).reshape(-1)[span.start - offset : span.stop - offset]
