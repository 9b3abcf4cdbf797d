"""A compressor for Horovod's DistributedOptimizer that sends survivors' gradients alone.

Horovod asks its compressor for what is to travel of each gradient, all-reduces that while backward goes on, and asks
for the dense gradient back. No indices travel: every rank has the same masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcprune.errors import HpcpruneError
from hpcprune.masks import Masks, refuse_other_masks
from hpcprune.packing import Packed

try:
    import horovod.torch as hvd
    from horovod.torch.compression import Compressor

    MISSING = None
except ImportError as error:
    # Whoever makes a Compression is told; whoever only looks at what hpcprune has need not have Horovod.
    MISSING, Compressor = error, object

__all__ = ["Compression"]

Context = tuple[Packed, torch.Size]  # how a gradient was packed, and its shape


class Compression(Compressor):  # type: ignore[misc]  # Horovod has no types
    """What `hvd.DistributedOptimizer` takes as its `compression`: survivors travel, pruned gradients become zero.

        optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), compression=hpcprune.Compression(masks, model)
        )

    A weight that is zero, with a gradient of zero and an optimizer state of zero, stays zero. Make the optimizer after
    pruning; one that had momentum before moves pruned weights, so call `masks.apply(model)` after each of its steps.
    On a single rank Horovod compresses nothing: there `masks.apply(model)` after each step is needed too.
    """

    def __init__(self, masks: Masks, model: nn.Module) -> None:
        """A compressor of the gradients of `model`. After `hvd.init()` it is collective: the ranks compare their masks.

        Args:
            masks: of parameters by their names in `model.named_parameters()`.
            model: holds the parameters of the optimizer, itself and not a copy of it.

        Raises:
            HpcpruneError: Horovod is missing, or a mask is of no parameter of the model, or of another shape.
            WorldError: ranks have different masks.
        """
        if Compressor is object:
            raise HpcpruneError(
                f"Horovod cannot be imported ({MISSING}); build it for this environment: sh scripts/install-horovod.sh"
            )
        self._masks = masks
        self._masked = {
            parameter: name
            for name, parameter in masks.parameters(model).items()
            if masks.survivors[name] < parameter.numel()
        }
        self._parameters = list(model.parameters())[::-1]  # in the order in which their gradients are expected
        self._next = 0  # the place of the parameter whose gradient is expected
        self._packings: dict[str, Packed] = {}
        if hvd.is_initialized() and hvd.size() > 1:
            refuse_other_masks(hvd.allgather_object(masks.hash, name="hpcprune: comparing masks"))

    def compress(self, tensor: Tensor) -> tuple[Tensor, Context | None]:
        """The survivors of a gradient, and what `decompress` needs. A gradient with nothing pruned travels as it is."""
        parameter = self._find(tensor)
        if parameter is None:
            self._refuse_if_masked(tensor)
            return tensor, None
        name = self._masked.get(parameter)
        if name is None:
            return tensor, None
        if name not in self._packings:
            self._packings[name] = Packed(self._masks.bits(name), tensor.numel(), tensor.device)
        packing = self._packings[name]
        packed = tensor.new_empty(packing.length)
        packing.gather(tensor.detach().reshape(-1), packed)
        return packed, (packing, tensor.shape)

    def decompress(self, tensor: Tensor, ctx: Context | None) -> Tensor:
        """The dense gradient: the sums of its survivors, and zeros elsewhere."""
        if ctx is None:
            return tensor
        packing, shape = ctx
        dense = tensor.new_zeros(shape)
        packing.scatter(tensor, dense.view(-1))
        return dense

    def _find(self, gradient: Tensor) -> nn.Parameter | None:
        """The parameter whose gradient this is. Horovod tells no name, but hands over `parameter.grad` itself.

        (With Adasum it is the parameter.) Backward takes the parameters in nearly the same order each time, so the
        search begins after the one found last, and what is found out of order changes places with what was expected.
        """
        count = len(self._parameters)
        for step in range(count):
            place = (self._next + step) % count
            parameter = self._parameters[place]
            if parameter.grad is gradient or parameter is gradient:
                self._parameters[place] = self._parameters[self._next]
                self._parameters[self._next] = parameter
                self._next = (self._next + 1) % count
                return parameter
        return None

    def _refuse_if_masked(self, gradient: Tensor) -> None:
        """Raise HpcpruneError if a gradient of no parameter we know may be one that has a mask nevertheless."""
        names = [name for parameter, name in self._masked.items() if parameter.shape == gradient.shape]
        if names:
            raise HpcpruneError(
                f"a gradient of shape {tuple(gradient.shape)} is of no parameter of the model, but {names[0]} has that "
                "shape and a mask; give Compression the model whose parameters the optimizer has, and leave "
                "sparse_as_dense off for parameters with masks"
            )
