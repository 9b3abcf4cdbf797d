"""The compressor for Horovod without its ranks: what it makes of gradients, and how it finds whose they are."""

from __future__ import annotations

import os
import runpy
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune.errors import HpcpruneError
from hpcprune.masks import Masks
from hpcprune.shards import Layer
from hpcprune.tensors import dtype_name

needs_horovod = pytest.mark.skipif("HPCPRUNE_NO_HOROVOD" in os.environ, reason="HPCPRUNE_NO_HOROVOD is set")


def model_and_masks(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Masks]:
    """Three layers of one shape; of the first two the weights with odd numbers are pruned."""
    model = nn.Sequential(*(nn.Linear(5, 5, dtype=dtype) for _ in range(3)))
    layers = [Layer(f"{number}.weight", (5, 5), dtype_name(model[number].weight)) for number in range(3)]
    odd = np.packbits(np.arange(25) % 2 == 0, bitorder="little")
    return model, Masks(layers, [odd, odd, Masks.full(layers).bits("2.weight")])


def with_gradients(model: nn.Module) -> dict[str, Tensor]:
    """A gradient for each parameter, in the order in which backward finishes them, and which it is."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return {name: parameter.grad for name, parameter in reversed(list(model.named_parameters()))}


@needs_horovod
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_survivors_travel_and_come_back_among_zeros(dtype: torch.dtype) -> None:
    model, masks = model_and_masks(dtype)
    compression = hpcprune.Compression(masks, model)
    for _ in range(2):
        gradients = with_gradients(model)
        gradients["0.weight"][0, 1] = torch.nan  # pruned
        for name, gradient in gradients.items():
            sent, context = compression.compress(gradient)
            if name in ("0.weight", "1.weight"):
                assert torch.equal(sent, gradient[masks[name]])
                dense = compression.decompress(sent * 2, context)
                assert torch.equal(dense, torch.where(masks[name], 2 * gradient, 0))
            else:
                assert sent is gradient, "nothing pruned: no copy"
                assert compression.decompress(sent, context) is sent


@needs_horovod
def test_gradients_are_told_apart_in_any_order() -> None:
    model, masks = model_and_masks()
    compression = hpcprune.Compression(masks, model)
    for seed in range(20):
        gradients = list(with_gradients(model).items())
        torch.manual_seed(seed)
        for place in torch.randperm(6).tolist()[: 6 - seed % 3]:
            name, gradient = gradients[place]
            kept = gradient[masks[name]] if name in masks else gradient
            assert torch.equal(compression.compress(gradient)[0].flatten(), kept.flatten()), name


@needs_horovod
def test_a_gradient_of_another_model_travels_unless_it_may_be_one_with_a_mask() -> None:
    model, masks = model_and_masks()
    compression = hpcprune.Compression(masks, model)
    with_gradients(model)
    other = torch.randn(7, 5)
    assert compression.compress(other)[0] is other
    with pytest.raises(HpcpruneError, match=r"shape \(5, 5\) is of no parameter .* but 0.weight has that shape"):
        compression.compress(torch.randn(5, 5))


@needs_horovod
def test_it_is_one_of_horovods_compressors() -> None:
    from horovod.torch.compression import Compressor

    assert issubclass(hpcprune.Compression, Compressor)


def test_without_horovod_the_script_that_builds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "horovod", None)
    model, masks = model_and_masks()
    without = runpy.run_path(hpcprune.__path__[0] + "/compression.py")
    with pytest.raises(HpcpruneError, match=r"Horovod cannot be imported .*: sh scripts/install-horovod\.sh"):
        without["Compression"](masks, model)
