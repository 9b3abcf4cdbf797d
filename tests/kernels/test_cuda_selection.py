"""Thresholds and masks of scores that lie on a GPU, against a sort; and a model there, pruned in rounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpcprune
from hpcprune.criteria import CRITERIA
from hpcprune.errors import NumericsError
from hpcprune.native import cuda_threshold, threshold
from hpcprune.ranking import Target, prune_layers
from hpcprune.shards import deal
from hpcprune.threshold import Limits, kth_smallest, select_survivors
from hpcprune.world import World

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# A search that meets a miss of its bracket, histograms, and keys that were not collected.
NARROW = Limits(samples=8, sigmas=0.0, bins=16, gathered=4, spare=0)


@pytest.fixture
def counted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes over the device that were made."""
    made: list[str] = []
    for name in ("count_around", "histogram", "pack"):
        own = getattr(cuda_threshold, name)

        def passing(*arguments: object, name: str = name, own: object = own) -> object:
            made.append(name)
            return own(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(cuda_threshold, name, passing)
    return made


def scores(device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = (3000, 1, 0, 500)) -> list[Tensor]:
    """With ties: few different numbers, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(size, generator=generator).mul(20).round().div(16) for size in sizes]
    return [(part * torch.where(part.abs() < 0.1, -1, 1)).to(device, dtype) for part in drawn]


def expected(parts: Sequence[Tensor], k: int, absolute: bool) -> tuple[float, list[np.ndarray]]:
    """The k-th smallest, and which are left when the first k go, by a stable sort."""
    flat = torch.cat([part.double().cpu() for part in parts]).numpy()
    ranked = abs(flat) if absolute else flat
    order = np.argsort(ranked, kind="stable")
    kept = np.ones(len(flat), bool)
    kept[order[:k]] = False
    ends = np.cumsum([part.numel() for part in parts])[:-1]
    return float(ranked[order[k - 1]]), [np.packbits(own, bitorder="little") for own in np.split(kept, ends)]


@pytest.mark.parametrize("limits", [None, NARROW], ids=["usual", "narrow"])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_right_ones_survive(
    device: torch.device, counted: list[str], dtype: torch.dtype, absolute: bool, limits: Limits | None
) -> None:
    parts = scores(device, dtype)
    for k in (1, 1234, 3501):
        value, masks = expected(parts, k, absolute)
        [(found, own)] = select_survivors([parts], [k], World.alone(), absolute=absolute, limits=limits)
        assert found.value == value
        for mask, right in zip(own, masks, strict=True):
            np.testing.assert_array_equal(mask, right)
    assert {"count_around", "pack"} <= set(counted)
    assert limits is None or "histogram" in counted


def test_dtypes_and_places_may_differ(device: torch.device, counted: list[str]) -> None:
    parts = [*scores(device, torch.float32), *scores(device, torch.bfloat16)]
    arrays = [*parts[:-1], parts[-1].float().cpu().numpy()]
    value, masks = expected(parts, 4000, True)
    [(found, own)] = select_survivors([arrays], [4000], World.alone(), absolute=True)
    assert found.value == value and "pack" in counted
    for mask, right in zip(own, masks, strict=True):
        np.testing.assert_array_equal(mask, right)


def test_a_nan_is_found(device: torch.device) -> None:
    parts = scores(device, torch.float32)
    parts[0][5] = torch.nan
    with pytest.raises(NumericsError, match="first: 1 of 3000 scores are NaN"):
        kth_smallest(parts, 7, World.alone(), names=["first", "second", "third", "fourth"])


def test_a_model_is_pruned_in_rounds_as_on_the_host(
    device: torch.device, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for there in (True, False):
        model.load_state_dict(dense)
        model.to(device if there else "cpu")
        if not there:
            monkeypatch.setattr(cuda_threshold, "integers_there", lambda scores: None)
        masks = hpcprune.prune(model, sparsity=0.5)
        shards = deal(masks.layers, 1)
        given = masks, shards, Target(CRITERIA["magnitude"], "global", 0.8), World.alone()
        found.append([masks, prune_layers(dict(model.named_parameters()), *given).masks])
        assert bool(counted) == there
        counted.clear()
    for own, other in zip(*found, strict=True):
        assert all(torch.equal(own[name].cpu(), other[name]) for name in own.densities)


def test_the_passes_take_what_those_of_the_host_take() -> None:
    from inspect import signature

    for name in ("count_around", "histogram", "pack"):
        assert list(signature(getattr(cuda_threshold, name)).parameters) == list(
            signature(getattr(threshold, name)).parameters
        )
