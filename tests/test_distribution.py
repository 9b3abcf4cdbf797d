"""The sparsity of each layer: by pattern, alike, or by Erdos-Renyi-kernel as its paper's formula has it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcprune.distribution import erdos_renyi_kernel, sparsities_of_layers
from hpcprune.errors import JobError
from hpcprune.prune_section import Prune
from hpcprune.shards import Layer

LAYERS = [
    Layer("conv.weight", (16, 3, 3, 3), "float32"),
    Layer("body.weight", (256, 400), "float32"),
    Layer("head.weight", (10, 256), "float32"),
]


def make(**keys: Any) -> Prune:
    return Prune.model_validate({"sparsity": 0.8, "scope": "layer", **keys})


def test_all_alike_but_those_that_a_pattern_names() -> None:
    assert sparsities_of_layers(make(), LAYERS, 1.0) == [0.8, 0.8, 0.8]
    assert sparsities_of_layers(make(layers={"head": 0.4, "c*": 0}), LAYERS, 1.0) == [0, 0.8, 0.4]


def test_a_round_on_the_way_has_its_part_of_a_patterns_sparsity() -> None:
    assert sparsities_of_layers(make(layers={"head": 0.4}), LAYERS, 0.25) == [0.2, 0.2, 0.1]


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(JobError, match=r"prune\.layers: 'tail' matches no prunable layer; there are 3, such as conv"):
        sparsities_of_layers(make(layers={"tail": 0.4}), LAYERS, 1.0)


def test_two_patterns_for_one_layer_are_refused() -> None:
    with pytest.raises(
        JobError, match=r"prune\.layers: '\*' and 'head' both match head\.weight; let one of them do so"
    ):
        sparsities_of_layers(make(layers={"*": 0.5, "head": 0.2}), LAYERS, 1.0)


def test_one_layer_alone_is_pruned_in_rounds() -> None:
    assert sparsities_of_layers(make(sparsity=0, layers={"head": 0.8}), LAYERS, 0.5) == [0, 0, 0.4]


def test_densities_are_as_the_sum_of_a_layers_sides_over_their_product() -> None:
    densities = [1 - sparsity for sparsity in erdos_renyi_kernel(LAYERS, 0.95)]
    assert densities[2] / densities[1] == pytest.approx((266 / 2560) / (656 / 102400))
    assert densities[0] / densities[1] == pytest.approx((25 / 432) / (656 / 102400))
    assert sum(d * layer.weights for d, layer in zip(densities, LAYERS, strict=True)) == pytest.approx(0.05 * 105392)


def test_a_layer_that_would_be_denser_than_dense_is_whole_and_the_others_bear_it() -> None:
    found = erdos_renyi_kernel(LAYERS, 0.6)
    assert found[2] == 0
    assert sum(s * layer.weights for s, layer in zip(found, LAYERS, strict=True)) == pytest.approx(0.6 * 105392)


@given(
    st.lists(st.lists(st.integers(1, 200), min_size=2, max_size=4), min_size=1, max_size=8),
    st.floats(0, 0.999),
)
def test_any_layers_have_the_sparsity_together(shapes: list[list[int]], sparsity: float) -> None:
    layers = [Layer(str(number), tuple(shape), "float32") for number, shape in enumerate(shapes)]
    found = erdos_renyi_kernel(layers, sparsity)
    assert all(0 <= each <= 1 for each in found)
    total = sum(layer.weights for layer in layers)
    assert sum(s * layer.weights for s, layer in zip(found, layers, strict=True)) == pytest.approx(
        sparsity * total, abs=1e-9 * total
    )


def test_erk_with_patterns_is_of_the_other_layers() -> None:
    found = sparsities_of_layers(make(distribution="erk", layers={"body": 0.5}), LAYERS, 1.0)
    assert found[1] == 0.5
    assert found[0] * 432 + found[2] * 2560 == pytest.approx(0.8 * (432 + 2560))
