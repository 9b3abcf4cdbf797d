"""Which parameters are prunable, by the modules that hold them and not by names or containers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import nn
from torch_geometric.nn import GATConv, GCNConv, Linear
from transformers.pytorch_utils import Conv1D

from hpcprune.errors import JobError
from hpcprune.layers import check_rows, find_layers


class Language(nn.Module):
    """A model without nn.Sequential, with tied weights, a norm, a recurrent layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.rnn = nn.GRU(8, 8, num_layers=2, bidirectional=True)
        self.cell = nn.LSTMCell(16, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.ConvTranspose2d(3, 5, 3)
        self.odd_name = nn.Linear(8, 6)
        self.again = self.odd_name
        self.head = nn.Linear(8, 30)
        self.head.weight = self.embedding.weight
        self.free = nn.Parameter(torch.zeros(4, 4))


def names(model: nn.Module, **patterns: list[str]) -> list[str]:
    return [layer.name for layer in find_layers(model, **patterns)]


def test_weights_of_linear_conv_and_recurrent_layers_are_prunable_and_nothing_else() -> None:
    model = Language()
    expected = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in ("embedding.weight", "free") and "bias" not in name
    ]
    assert names(model) == expected
    assert "rnn.weight_hh_l1_reverse" in expected and "attention.in_proj_weight" in expected


def test_embeddings_are_prunable_where_they_are_asked_for_and_tied_weights_once() -> None:
    model = Language()
    found = [layer.name for layer in find_layers(model, embeddings=True)]
    assert set(found) - set(names(model)) == {"embedding.weight"}
    assert len(found) == len(set(found))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: nn.utils.weight_norm(nn.Conv1d(2, 3, 2)),
        lambda: torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
    ],
    ids=["parametrization", "weight_norm", "torch's pruning"],
)
def test_a_weight_that_is_computed_is_refused_by_name_and_can_be_excluded(wrap: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": wrap()})
    with pytest.raises(JobError, match=r"odd\.weight is no parameter, it is computed from others .*or exclude it"):
        find_layers(model)
    assert names(model, exclude=["odd"]) == ["plain.weight"]


def test_a_computed_weight_of_a_recurrent_layer_is_refused() -> None:
    rnn = nn.GRU(3, 4)
    nn.utils.parametrize.register_parametrization(rnn, "weight_hh_l0", nn.Identity())
    with pytest.raises(JobError, match=r"rnn\.weight_hh_l0 is no parameter"):
        find_layers(nn.ModuleDict({"rnn": rnn}))


def test_a_layer_has_its_parameters_shape_and_dtype() -> None:
    (layer,) = find_layers(nn.ModuleDict({"x": nn.Conv2d(3, 4, 5, dtype=torch.bfloat16)}))
    assert (layer.name, layer.shape, layer.dtype) == ("x.weight", (4, 3, 5, 5), "bfloat16")
    assert (layer.weights, layer.row) == (300, 75)


def test_patterns_match_parameters_and_modules() -> None:
    model = Language()
    assert names(model, include=["rnn"]) == [name for name in names(model) if name.startswith("rnn.")]
    assert names(model, include=["*hh*"], exclude=["cell"]) == [
        name for name in names(model) if "hh" in name and "cell" not in name
    ]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_what_is_near(key: str) -> None:
    with pytest.raises(JobError, match=f"prune.{key}: 'odd_nam' matches no prunable layer.*odd_name.weight"):
        find_layers(Language(), **{key: ["odd_nam"]})


def test_a_model_without_prunable_layers_is_an_error_that_says_what_it_has() -> None:
    with pytest.raises(JobError, match=r"no prunable layer: .*LayerNorm"):
        find_layers(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))
    with pytest.raises(JobError, match=r"leave none of 1"):
        find_layers(nn.Sequential(nn.Linear(3, 3)), exclude=["*"])


def test_linear_layers_of_other_libraries_are_prunable() -> None:
    class Own(Conv1D):
        pass

    model = nn.ModuleDict({"gcn": GCNConv(7, 5), "gat": GATConv(5, 4, heads=2), "gpt": Conv1D(6, 4), "own": Own(3, 2)})
    assert {layer.name: layer.shape for layer in find_layers(model)} == {
        "gcn.lin.weight": (5, 7),
        "gat.lin.weight": (8, 5),
        "gpt.weight": (4, 6),
        "own.weight": (2, 3),
    }


def test_a_layer_whose_shape_is_not_known_is_an_error_until_it_was_called() -> None:
    model = Linear(-1, 3)
    with pytest.raises(JobError, match="the shape of weight is not known yet; call the model once"):
        find_layers(model)
    model(torch.zeros(2, 5))
    assert [layer.shape for layer in find_layers(model)] == [(3, 5)]


@pytest.mark.parametrize("layer", [Conv1D(4, 3), nn.ConvTranspose1d(3, 4, 2)], ids=lambda layer: type(layer).__name__)
def test_rows_that_are_inputs_are_refused_by_name(layer: nn.Module) -> None:
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": layer})
    with pytest.raises(JobError, match=r"row ranks the weights of one output, and those of odd\.weight .* by inputs"):
        check_rows(model, find_layers(model))
    check_rows(model, find_layers(model, exclude=["odd"]))
