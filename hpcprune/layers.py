"""The prunable parameters of a model: which they are, by the kind of the module that holds them.

By default these are the weights of linear, convolutional and recurrent layers, whatever the model is built from. A
weight that an embedding or a norm also uses (tied weights) is theirs and stays. Patterns from the job file narrow the
choice down; they match the parameter's name, or the name of the module that holds it, as shell patterns do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from hpcprune.errors import JobError
from hpcprune.shards import Layer
from hpcprune.tensors import dtype_name

__all__ = ["find_layers", "matching"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def find_layers(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[Layer]:
    """The prunable layers of a model, in the order of `named_parameters`, each parameter once.

    Raises:
        JobError: a pattern matches nothing, or no layer is left.
    """
    prunable = {id(parameter) for _, parameter in _weights(model)} - {id(p) for p in _spared(model)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in prunable and parameter.numel()]
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if pattern != "*" and not matching(pattern, names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise JobError(
                    f"prune.{key}: {pattern!r} matches no prunable layer; there are {len(names)}"
                    + (f", such as {', '.join(near)}" if near else "")
                )
    wanted, unwanted = ({name for pattern in p for name in matching(pattern, names)} for p in (include, exclude))
    chosen = [name for name in names if name in wanted - unwanted]
    if not chosen:
        reason = f"prune.include and prune.exclude leave none of {len(names)}" if names else _no_layers(model)
        raise JobError(f"no prunable layer: {reason}")
    parameters = dict(model.named_parameters())
    return [Layer(name, tuple(parameters[name].shape), dtype_name(parameters[name])) for name in chosen]


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of some parameters that a shell pattern names, themselves or the module that holds them."""
    return [name for name in names if _matches(pattern, name, name.rpartition(".")[0])]


def _matches(pattern: str, name: str, owner: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(owner, pattern)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (
                (isinstance(module, (nn.Linear, nn.Bilinear, *_CONVOLUTIONS)) and name == "weight")
                or (isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith("weight_"))
                or (isinstance(module, nn.MultiheadAttention) and name in _ATTENTION_WEIGHTS)
            ):
                yield name, parameter


def _spared(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from module.parameters(recurse=False)


def _no_layers(model: nn.Module) -> str:
    kinds = sorted({type(module).__name__ for module in model.modules() if module is not model})
    return f"{type(model).__name__} has no linear, convolutional or recurrent layer (it has: {', '.join(kinds) or '-'})"
