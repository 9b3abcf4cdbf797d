"""What a forward pass costs in floating-point operations, and what of it the survivors need.

torch's own formulas (those of `torch.utils.flop_counter`) count each operation while one batch goes through the model.
Each operation is booked to the parameter whose values it multiplied, found by following the tensors and not the
modules: a weight that is used twice, used through `torch.nn.functional`, transposed, cut, cast or reparametrised first
is booked all the same. A layer's FLOPs then shrink with its survivors.

Counted are the products: matrix products, convolutions, recurrent cells, attention, and the messages of graphs, each
multiplied and added where it arrives. A multiply-add is two FLOPs. As in torch, biases, activations, normalisations
and lookups are not counted. `products.py` has the formulas that torch has not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from hpcprune.products import is_product, products

__all__ = ["Flops", "count_flops"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of one batch.

    `dense` is what the dense model takes, `survivors` what is left when a product with a pruned weight costs nothing.
    `by_layer` has the same pair for every parameter that was multiplied with; what no parameter takes part in (as
    attention's scores) is in the sums alone.
    """

    dense: int
    survivors: int
    by_layer: dict[str, tuple[int, int]]


def count_flops(model: nn.Module, inputs: Any, densities: Mapping[str, float]) -> Flops:
    """Count the FLOPs of `model` for one batch, in evaluation mode and without gradients.

    `inputs` is what the model is called with: a tuple is its positional arguments (so an argument that is a tuple goes
    within one), anything else its only argument; tensors must be on the model's device. `densities` says for
    parameters, by their name in `named_parameters`, which part of their weights survives, in [0, 1]; one that is not
    named is dense.
    A density is taken as a number of survivors, the nearest to density * weights, and where only a part of a parameter
    is used (the key projection within `in_proj_weight`), that part is taken to be as dense as the whole.

    The model is left as it was found: each module's mode, every buffer, the random generators. Raises ValueError for a
    name that is not a parameter and for a density outside [0, 1].
    """
    names = _names(model, densities)
    with _untouched(model), torch.no_grad(), _Ledger(names, inputs) as ledger:
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    by_layer = {}
    for owner, flops in ledger.by_owner.items():
        survivors = round(densities.get(owner.name, 1.0) * owner.weights)
        by_layer[owner.name] = flops, (2 * flops * survivors + owner.weights) // (2 * owner.weights)
    return Flops(
        dense=ledger.unowned + sum(dense for dense, _ in by_layer.values()),
        survivors=ledger.unowned + sum(survivors for _, survivors in by_layer.values()),
        by_layer=by_layer,
    )


class _Owner(NamedTuple):
    name: str
    weights: int
    prunable: bool


Owners = tuple[_Owner, ...]


def _names(model: nn.Module, densities: Mapping[str, float]) -> dict[Tensor, _Owner]:
    """Each parameter's owner; a parameter of several names goes by the one that `densities` has, else by its first."""
    aliases: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    unknown = set(densities) - {name for names in aliases.values() for name in names}
    if unknown:
        raise ValueError(f"densities: {min(unknown)!r} is not a parameter of the model; see model.named_parameters()")
    for name, density in densities.items():
        if not 0 <= density <= 1:
            raise ValueError(f"densities: {name}: {density} is not in [0, 1]; give survivors / weights")
    owners: dict[Tensor, _Owner] = {}
    for tensor, names in aliases.items():
        given = [name for name in names if name in densities]
        owners[tensor] = _Owner((given or names)[0], tensor.numel(), bool(given))
    return owners


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards modes, buffers and generators are what they were.

    Modes are set module by module, not by `model.eval()`: models override `train` and do more in it (merge weights,
    freeze parts), and a part that is frozen in a training model must stay so.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path is one opaque operation a layer; without it the same products are taken one by one.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                if module._buffers.get(name) is not buffer:
                    setattr(module, name, buffer)
                if buffer.shape != content.shape:
                    buffer.resize_(content.shape)
                buffer.copy_(content)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books the FLOPs of every operation in its block to the owners of the values that it multiplies.

    Every tensor has a tag: the owners of the parameters that it was made from, by anything but products, or none
    where the batch has a part in it. A tensor without a tag came from elsewhere (a buffer, a constant).
    """

    supports_higher_order_operators = True

    def __init__(self, owners: dict[Tensor, _Owner], inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_owner: dict[_Owner, int] = {}
        self.unowned = 0
        self._tags = WeakTensorKeyDictionary()
        self._stored: dict[int, list[tuple[int, int, _Owner]]] = {}
        for parameter, owner in owners.items():
            self._tags[parameter] = (owner,)
            if parameter.device.type != "meta":
                start, stop = _extent(parameter)
                self._stored.setdefault(parameter.untyped_storage().data_ptr(), []).append((start, stop, owner))
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._tags[leaf] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = getattr(func, "overloadpacket", func)
        counted = is_product(operation)
        if not counted and isinstance(func, torch._ops.OpOverload):
            with self:  # an operation made of others (as under inference mode): count those
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is torch.ops.higher_order.cond:
            choice, then, otherwise, operands = args
            with self:  # the branch that is taken
                return (then if choice else otherwise)(*operands)
        out = func(*args, **kwargs)
        if counted:
            for flops, operands in products(operation, args, kwargs, out):
                self._book(flops, operands)
        self._tag(out, (args, kwargs), product=counted)
        return out

    def _book(self, flops: int, operands: Sequence[Tensor]) -> None:
        """Book to the operand that has owners; of two, to the prunable one, else the later (x @ w, not x, has w's)."""
        owners: Owners = ()
        for operand in operands:
            found = self._owners(operand) or ()
            if found and any(owner.prunable for owner in found) >= any(owner.prunable for owner in owners):
                owners = found
        if not owners:
            self.unowned += flops
        weights = sum(owner.weights for owner in owners)
        before = 0
        for owner in owners:
            # Several parameters joined in one product share it by size; cut points, not parts, are rounded.
            start, before = flops * before // weights, before + owner.weights
            self.by_owner[owner] = self.by_owner.get(owner, 0) + flops * before // weights - start

    def _owners(self, tensor: Tensor) -> Owners | None:
        """Owners of a tensor; () if it is neither made of parameters nor of the batch, None if of the batch."""
        if tensor in self._tags:
            return self._tags[tensor]  # type: ignore[no-any-return]
        if tensor.device.type == "meta" or tensor.layout != torch.strided or not self._stored:
            return ()
        # Views taken before the block (`weight.data`, an RNN's flat weights) are known by their place in memory.
        start, stop = _extent(tensor)
        stored = self._stored.get(tensor.untyped_storage().data_ptr(), [])
        return tuple(owner for first, last, owner in stored if start < last and first < stop)

    def _tag(self, out: Any, given: Any, *, product: bool) -> None:
        inputs = [self._owners(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if None in inputs:
            for result in results:
                self._tags[result] = None
            return
        owners: Owners = () if product else tuple(dict.fromkeys(owner for tag in inputs for owner in tag or ()))
        for result in results:
            # A tensor of a parameter's size is that parameter, scaled, masked or cast by the others.
            same = [owner for owner in owners if owner.weights == result.numel()]
            same.sort(key=lambda owner: not owner.prunable)
            self._tags[result] = tuple(same[:1]) or owners


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of a tensor within its storage."""
    start = int(tensor.storage_offset())
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (start + (length if tensor.numel() else 0)) * tensor.element_size()
