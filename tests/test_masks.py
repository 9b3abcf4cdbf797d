"""Masks: a mapping of boolean tensors over packed bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hpcprune.errors import HpcpruneError
from hpcprune.masks import Masks, gather_masks
from hpcprune.shards import Layer, Span
from hpcprune.world import World


def pack(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask.reshape(-1), bitorder="little")


def test_masks_are_a_mapping_of_boolean_tensors() -> None:
    given = {"a": np.array([[True, False, True]]), "b": np.array([False] * 9)}
    masks = Masks(
        [Layer(name, mask.shape, "float32") for name, mask in given.items()], [pack(m) for m in given.values()]
    )
    assert list(masks) == ["a", "b"]
    for name, mask in given.items():
        assert masks[name].dtype == torch.bool
        np.testing.assert_array_equal(masks[name].numpy(), mask)
    assert (masks.nonzeros, masks.weights) == (2, 12)
    assert masks.sparsity == pytest.approx(10 / 12)
    assert masks.densities == {"a": pytest.approx(2 / 3), "b": 0}
    with pytest.raises(KeyError):
        masks["c"]


def test_the_hash_depends_on_names_shapes_and_bits() -> None:
    bits = np.array([0b1011], np.uint8)
    base = Masks([Layer("a", (2, 2), "float32")], [bits]).hash
    assert Masks([Layer("a", (2, 2), "float32")], [bits.copy()]).hash == base
    assert Masks([Layer("b", (2, 2), "float32")], [bits]).hash != base
    assert Masks([Layer("a", (4, 1), "float32")], [bits]).hash != base
    assert Masks([Layer("a", (2, 2), "float32")], [bits ^ 1]).hash != base


def test_bits_of_the_wrong_length_or_behind_the_end_are_refused() -> None:
    layer = Layer("a", (3,), "float32")
    with pytest.raises(HpcpruneError, match="3 weights is 1 bytes, not 2"):
        Masks([layer], [np.zeros(2, np.uint8)])
    with pytest.raises(HpcpruneError, match="behind its last weight"):
        Masks([layer], [np.array([8], np.uint8)])


def test_apply_zeroes_what_is_pruned_and_nothing_else() -> None:
    model = nn.Linear(5, 3)
    before = model.weight.detach().clone()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    Masks([Layer("weight", (3, 5), "float32")], [pack(mask.numpy())]).apply(model)
    torch.testing.assert_close(model.weight.detach(), before * mask, rtol=0, atol=0)
    with pytest.raises(HpcpruneError, match=r"other of shape \(3, 5\) is not in this Linear"):
        Masks([Layer("other", (3, 5), "float32")], [pack(mask.numpy())]).apply(model)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_pieces_of_any_length_are_put_together(sizes: list[int], random) -> None:
    layers = [Layer(str(number), (size,), "float32") for number, size in enumerate(sizes)]
    whole = [np.array([random.random() < 0.5 for _ in range(size)]) for size in sizes]
    spans, own = [], []
    for number, mask in enumerate(whole):
        cuts = sorted({0, mask.size, *(random.randrange(mask.size + 1) for _ in range(3))})
        for start, stop in itertools.pairwise(cuts):
            spans.append(Span(number, start, stop))
            own.append(pack(mask[start:stop]))
    masks = gather_masks(layers, [spans], own, World.alone())
    for number, mask in enumerate(whole):
        np.testing.assert_array_equal(masks[str(number)].numpy(), mask)
