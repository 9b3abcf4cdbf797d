"""The layers of a model that may run or train sparse: those whose weight is pruned, and nobody else's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from hpcprune.masks import Masks
from hpcprune.sparse.cuda_convolution import CudaConv2d
from hpcprune.sparse.cuda_linear import CudaLinear
from hpcprune.sparse.kernels import SparseError, kernels
from hpcprune.sparse.modules import SparseConv2d, SparseLinear, on_gpu
from hpcprune.sparse.operands import need_kernels

__all__ = ["check_zeros", "masks_of_dense", "need_kernels_for", "pruned_layers"]


def pruned_layers(model: nn.Module, masks: Masks) -> dict[str, nn.Module]:
    """The modules whose `weight` is pruned, by its name; not those whose weight is another module's too."""
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    named = {f"{name}.weight".removeprefix("."): module for name, module in model.named_modules()}
    return {name: module for name, module in named.items() if name in masks and holders[id(module.weight)] == 1}


def masks_of_dense(model: nn.Module, masks: Masks) -> Masks:
    """The masks of a model but for those of layers that are sparse already.

    Raises:
        HpcpruneError: they are not of this model.
    """
    sparse = (SparseLinear, SparseConv2d, CudaLinear, CudaConv2d)
    done = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, sparse)}
    left = [layer for layer in masks.layers if layer.name not in done]
    found = Masks(left, [masks.bits(layer.name) for layer in left])
    found.parameters(model)
    return found


def check_zeros(model: nn.Module, masks: Masks, names: Iterable[str]) -> None:
    """Raise SparseError where weights that are pruned are not zero: without them a layer would be another one."""
    for name in names:
        weight = model.get_parameter(name).detach()
        left = int(weight.masked_fill(masks[name].to(weight.device), 0).count_nonzero())
        if left:
            raise SparseError(
                f"{name}: {left:,} of the weights that its mask prunes are not zero; set them to zero "
                "(masks.apply(model)), or give the masks that the model was pruned with"
            )


def need_kernels_for(layers: Iterable[nn.Module]) -> None:
    """Raise SparseError where there are no kernels for layers, those of the CPU or of the GPU that they are on."""
    kernels()
    for device in {layer.get_parameter("weight").device for layer in layers if on_gpu(layer)}:
        need_kernels(device)
