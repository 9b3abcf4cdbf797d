"""The prunable parameters of a model: which they are, by the kind of the module that holds them.

By default these are the weights of linear, convolutional and recurrent layers, whatever the model is built from; linear
layers of other libraries are known by their full names, as those libraries need not be there. A weight that an
embedding or a norm also uses (tied weights) is theirs and stays. Patterns from the job file narrow the choice down;
they match the parameter's name, or the name of the module that holds it, as shell patterns do. The edges of graphs are
layers too, where they are asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from hpcprune.errors import JobError
from hpcprune.graph import graphs_of
from hpcprune.shards import Kind, Layer
from hpcprune.tensors import dtype_name

__all__ = ["check_rows", "find_layers", "is_linear", "is_transposed_linear", "matching"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OF_ONE_WEIGHT = (nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def find_layers(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    embeddings: bool = False,
    kinds: Sequence[Kind] = ("weights",),
) -> list[Layer]:
    """The prunable layers of a model, in the order of `named_parameters`, each parameter once.

    Args:
        include, exclude: patterns on the layers of weights.
        embeddings: whether those of embeddings are too.
        kinds: of the layers.

    Raises:
        JobError: a pattern matches nothing, no layer of a kind is left, a layer's weight is computed from other
            parameters, or a shape is not known yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise JobError(f"the shape of {name} is not known yet; call the model once on a batch before")
    weights = _layers_of_weights(model, include, exclude, embeddings=embeddings) if "weights" in kinds else []
    edges = _graphs(model) if "edges" in kinds else []
    chosen: dict[str, Kind] = dict.fromkeys(weights, "weights")
    chosen |= dict.fromkeys(edges, "edges")
    return [
        Layer(name, tuple(parameter.shape), dtype_name(parameter), chosen[name])
        for name, parameter in model.named_parameters()
        if name in chosen
    ]


def _layers_of_weights(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], *, embeddings: bool
) -> list[str]:
    of_embeddings = {id(parameter) for parameter in _embedded(model)}
    weights = {id(parameter) for _, parameter in _weights(model)}
    prunable = weights | of_embeddings if embeddings else weights - of_embeddings
    computed = [*_computed(model)]
    names = [name for name, parameter in model.named_parameters() if id(parameter) in prunable and parameter.numel()]
    names += computed
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
    for name in computed:
        if name in chosen:
            module, _, weight = name.rpartition(".")
            raise JobError(
                f"prune.include: {name} is no parameter, it is computed from others (a parametrization, weight_norm or "
                f"torch.nn.utils.prune), which would bring pruned weights back; make it one (torch.nn.utils."
                f"parametrize.remove_parametrizations(model.{module or 'self'}, {weight!r}), remove_weight_norm or "
                f"prune.remove), or exclude it"
            )
    if not chosen:
        reason = f"prune.include and prune.exclude leave none of {len(names)}" if names else _no_layers(model)
        raise JobError(f"no prunable layer: {reason}")
    return chosen


def _graphs(model: nn.Module) -> list[str]:
    graphs = [name for name, graph in graphs_of(model).items() if len(graph.weight)]
    if not graphs:
        raise JobError(
            f"prune.what: edges or nodes are to go, and {type(model).__name__} has no graph; hold its edges in a "
            "hpcprune.Graph(edge_index, nodes), a part of the model (docs/graphs.md), or write what: [weights]"
        )
    return graphs


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of some parameters that a shell pattern names, themselves or the module that holds them."""
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)]


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies with its weight [outputs, inputs], as torch's and torch_geometric's Linear do."""
    return isinstance(module, nn.Linear) or _is_a(module, "torch_geometric.nn.dense.linear.Linear")


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it multiplies with its weight [inputs, outputs], as transformers' Conv1D (of GPT-2) does."""
    return _is_a(module, "transformers.pytorch_utils.Conv1D")


def check_rows(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise JobError where a layer's rows are not those of its outputs, so that they are nothing to rank within."""
    named = dict(model.named_parameters())
    rows = {id(named[layer.name]): layer.name for layer in layers}
    for module in model.modules():
        if isinstance(module, _TRANSPOSED) or is_transposed_linear(module):
            name = rows.get(id(module._parameters.get("weight")))
            if name is not None:
                raise JobError(
                    f"prune.scope: row ranks the weights of one output, and those of {name} ({type(module).__name__}) "
                    "lie by inputs; give scope: layer or global, or exclude it (prune.exclude)"
                )


def _is_a(module: nn.Module, kind: str) -> bool:
    return any(f"{each.__module__}.{each.__qualname__}" == kind for each in type(module).__mro__)


def _has_one_weight(module: nn.Module) -> bool:
    return isinstance(module, _OF_ONE_WEIGHT) or is_linear(module) or is_transposed_linear(module)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (
                (name == "weight" and _has_one_weight(module))
                or (isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith("weight_"))
                or (isinstance(module, nn.MultiheadAttention) and name in _ATTENTION_WEIGHTS)
            ):
                yield name, parameter


def _computed(model: nn.Module) -> Iterator[str]:
    """The weights that would be prunable if they were parameters."""
    for path, module in model.named_modules():
        expected: Sequence[str] = ("weight",) if _has_one_weight(module) else ()
        if isinstance(module, nn.RNNBase):
            expected = [name for name in module._flat_weights_names if name.startswith("weight_")]
        yield from (f"{path}.{name}".lstrip(".") for name in expected if name not in module._parameters)


def _embedded(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from module.parameters(recurse=False)


def _no_layers(model: nn.Module) -> str:
    kinds = sorted({type(module).__name__ for module in model.modules() if not [*module.children()]})
    text = f"{type(model).__name__} has no linear, convolutional or recurrent layer (it has: {', '.join(kinds)})"
    return f"{text}; embeddings are prunable with prune.embeddings: true" if [*_embedded(model)] else text
