"""Which layers run sparse: those that were measured faster so, with the inputs and the threads that they will have.

Pruning saves time only where a sparse product beats the dense one, and that depends on the shape, the sparsity, how
many samples come at once and the machine. So every layer is timed both ways, in turns, on inputs of the shapes that it
is given by the model; and the model as a whole is timed after that, and left dense if it has not become faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from hpcprune.masks import Masks
from hpcprune.sparse.cuda_linear import CudaKernel, kernels_to_try
from hpcprune.sparse.geometry import Geometry
from hpcprune.sparse.held import Bits, Kernel, fit
from hpcprune.sparse.kernels import FLOATS, SparseError
from hpcprune.sparse.layers import check_zeros, masks_of_dense, need_kernels_for, pruned_layers
from hpcprune.sparse.modules import is_plain_convolution, on_gpu, sparse_module

__all__ = ["Call", "Choice", "Sparsified", "sparsify", "time_in_turns", "watched_inputs"]

TURNS = 9  # of each contender; more disturb each other less than they disturb the user
LEAST = 2e-3  # seconds that a turn takes at least, so that the clock can tell
MARGIN = 0.97  # of the dense time, below which sparse counts as faster


@dataclass(frozen=True)
class Call:
    """A call of a layer: noise in the shape and dtype of its input, and the dtype of autocast where that was on."""

    x: Tensor
    autocast: torch.dtype | None = None

    def of(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """What the layer makes of it, under the same autocast."""
        with torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None):
            return layer(self.x)


@dataclass(frozen=True)
class Choice:
    """How a layer runs: "dense", or by which sparse kernel.

    calls: the shapes of its inputs in one inference. Seconds are those of all its calls; sparse: of the best kernel.
    """

    name: str
    sparsity: float
    calls: tuple[tuple[int, ...], ...]
    dense_seconds: float
    sparse_seconds: float
    kernel: str


@dataclass(frozen=True)
class Sparsified:
    """What `sparsify` found. Seconds are those of one inference, None where it was not told how one is done.

    undone: layers were faster alone and the model as a whole was not, so that all of them are dense again.
    reason: why nothing was tried, None where it was.
    """

    layers: tuple[Choice, ...]
    threads: int
    dense_seconds: float | None
    sparse_seconds: float | None
    undone: bool
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def sparsify(
    model: nn.Module, masks: Masks, infer: Callable[[], object] | None = None, *, samples: int = 1
) -> Sparsified:
    """Replace, in place, the pruned Linear and Conv2d layers of `model` that are faster sparse; for inference alone.

    Args:
        infer: runs the model once on what it will be given, as `lambda: model(batch)`. Without it Linear layers are
            tried with `samples` rows, and the model as a whole is not timed.

    The weights of a layer that was replaced take memory for its survivors only. A layer is replaced at all of its
    names, and stays dense where its weight is another module's too. The result says for each layer what was measured;
    what has no sparse counterpart is not listed, nor what is sparse already. Nothing is replaced where there are no
    compiled kernels, nor where the model is the layer itself, which nothing holds that could hold another: the result
    says so (`reason`).

    Raises:
        HpcpruneError: the masks are not of this model, or weights that they prune are not zero.
    """
    masks = masks_of_dense(model, masks)
    layers = pruned_layers(model, masks)
    check_zeros(model, masks, layers)
    try:
        if type(model) in (nn.Linear, nn.Conv2d) and "weight" in layers:
            raise SparseError(
                f"the model is a {type(model).__name__} itself, and nothing holds it that could hold a sparse one; "
                "prune and give nn.Sequential(layer) instead"
            )
        need_kernels_for(layers.values())
    except SparseError as why:
        return Sparsified((), torch.get_num_threads(), None, None, False, str(why))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        inputs = _rows(layers, samples) if infer is None else watched_inputs(layers, infer)
        choices, replaced = _choose(layers, masks, inputs)
        found = _swap_if_faster(model, replaced, infer)
    finally:
        for module, training in modes.items():
            module.training = training
    return Sparsified(tuple(choices), torch.get_num_threads(), *found)


def _choose(
    layers: Mapping[str, nn.Module], masks: Masks, inputs: Mapping[str, Sequence[Call]]
) -> tuple[list[Choice], dict[nn.Module, nn.Module]]:
    """What was measured of each layer, and for each that is faster so the sparse one."""
    choices, replaced = [], {}
    for name, dense in layers.items():
        calls = inputs.get(name, [])
        bits = masks.bits(name)
        timed: list[tuple[float, float, str, nn.Module]] = []
        for kernel in _kernels_to_try(dense, bits, calls) if calls else ():
            sparse = sparse_module(dense, bits, kernel)
            if sparse is not None:
                timed.append((*_time_layer(dense, sparse.eval(), calls), kernel, sparse))
        if not timed:
            continue
        dense_seconds, sparse_seconds, best, module = min(timed, key=lambda each: each[1] / each[0])
        faster = sparse_seconds < MARGIN * dense_seconds
        shapes = tuple(tuple(call.x.shape) for call in calls)
        choices.append(
            Choice(
                name.removesuffix(".weight"),
                1 - masks.densities[name],
                shapes,
                dense_seconds,
                sparse_seconds,
                best if faster else "dense",
            )
        )
        if faster:
            replaced[dense] = module
    return choices, replaced


def _kernels_to_try(dense: nn.Module, bits: Bits, calls: Sequence[Call]) -> Sequence[Kernel | CudaKernel]:
    if is_plain_convolution(dense):
        if not on_gpu(dense):
            return ("panels",)
        geometry = Geometry.of(dense)
        samples = max(call.x[..., 0, 0, 0].numel() * math.prod(geometry.out(call.x.shape[-2:])) for call in calls)
    elif isinstance(dense, nn.Linear):
        samples = max(call.x[..., 0].numel() for call in calls)
        if not on_gpu(dense):
            return fit(bits, dense.out_features, dense.in_features, samples)
    else:
        return ()
    return kernels_to_try(dense.weight.flatten(1), bits, {call.x.dtype for call in calls}, samples)


def _rows(layers: Mapping[str, nn.Module], samples: int) -> dict[str, list[Call]]:
    return {
        name: [Call(_noise((samples, layer.in_features), layer.weight))]
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
    }


def _noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """Of a generator of its own: what else draws random numbers must not see whether layers are timed."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def watched_inputs(layers: Mapping[str, nn.Module], infer: Callable[[], object]) -> dict[str, list[Call]]:
    """The calls of each layer, with noise for their inputs."""
    found: dict[str, list[Call]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def called(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = (*arguments, *named.values())
            if len(given) == 1 and isinstance(given[0], Tensor) and given[0].dtype in FLOATS:
                x, kind = given[0], given[0].device.type
                autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
                found[name].append(Call(_noise(x.shape, x), autocast))

        return called

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        infer()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _time_layer(dense: nn.Module, sparse: nn.Module, calls: Sequence[Call]) -> tuple[float, float]:
    """Seconds of all calls, dense and sparse."""

    def runner(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call.of(module)

        return run

    return time_in_turns(runner(dense), runner(sparse))


def time_in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """The median seconds of two contenders that are run in turns, each turn at least LEAST long."""
    repeats, seconds = [], ([], [])  # type: list[int], tuple[list[float], list[float]]
    for contender in (first, second):
        contender()
        start = _now()
        contender()
        repeats.append(max(1, round(LEAST / max(1e-7, _now() - start))))
    for _ in range(TURNS):
        for contender, count, own in zip((first, second), repeats, seconds, strict=True):
            start = _now()
            for _ in range(count):
                contender()
            own.append((_now() - start) / count)
    return median(seconds[0]), median(seconds[1])


def _now() -> float:
    """Seconds, when a GPU that is in use has done what it was told."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def _swap_if_faster(
    model: nn.Module, replaced: Mapping[nn.Module, nn.Module], infer: Callable[[], object] | None
) -> tuple[float | None, float | None, bool]:
    """Swap layers in, and out again if an inference has not become faster: its seconds, and whether they are out."""
    # Those that a model holds more than once have as many names.
    dense = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if layer in replaced}
    sparse = {name: replaced[layer] for name, layer in dense.items()}
    if infer is None:
        _put(model, sparse)
        return None, None, False

    def with_layers(layers: Mapping[str, nn.Module]) -> Callable[[], object]:
        def run() -> object:
            _put(model, layers)
            return infer()

        return run

    undone = True
    try:
        dense_seconds, sparse_seconds = time_in_turns(with_layers(dense), with_layers(sparse))
        undone = bool(sparse) and sparse_seconds >= dense_seconds
    finally:
        _put(model, dense if undone else sparse)
    return dense_seconds, sparse_seconds, undone


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
