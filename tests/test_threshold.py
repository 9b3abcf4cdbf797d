"""The threshold against numpy's stable sort in float64: every dtype, many ties, the odd values, every path."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcprune.errors import HpcpruneError, NumericsError
from hpcprune.native.library import library
from hpcprune.threshold import Limits, Threshold, ThresholdError, kth_smallest, select_survivors
from hpcprune.world import World

ALONE = World.alone()
PATHS = ("avx512", "avx2", "portable", "numpy")
DTYPES = ("float64", "float32", "float16", "bfloat16")
# Every part of the search is needed by one of these: many rounds of histograms, a bracket that misses on either side,
# and more inside the bracket than may be collected.
LIMITS = {
    "usual": None,
    "small": Limits(samples=200, bins=64, gathered=16, spare=8),
    "rounds": Limits(samples=20, bins=4, gathered=2, spare=0),
    "misses": Limits(samples=8, sigmas=0, bins=8, gathered=4, spare=0),
    "overflows": Limits(samples=40, sigmas=1, bins=16, gathered=4, spare=-(10**9)),
}


def as_dtype(values: Any, dtype: str) -> Any:
    """Scores as a user gives them, rounded to a dtype."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return np.asarray(values, dtype)
        return torch.tensor(np.asarray(values, np.float32)).to(torch.bfloat16)


def as_float64(scores: Any) -> np.ndarray:
    if isinstance(scores, torch.Tensor):
        return scores.detach().double().numpy().reshape(-1)
    return np.asarray(scores).astype(np.float64).reshape(-1)


def expect(arrays: list[Any], k: int, absolute: bool) -> tuple[Threshold, np.ndarray]:
    """The same by sorting: the threshold, and the mask of all arrays one after another."""
    scores = np.concatenate([np.empty(0), *map(as_float64, arrays)])
    scores = np.abs(scores) if absolute else scores
    order = np.argsort(scores, kind="stable")
    mask = np.ones(scores.size, bool)
    mask[order[:k]] = False
    if k == 0:
        return Threshold(-math.inf, 0, 0, 0), mask
    value = scores[order[k - 1]]
    below = int(np.count_nonzero(scores < value))
    return Threshold(float(value), below, int(np.count_nonzero(scores == value)), k - below), mask


def size_of(scores: Any) -> int:
    return int(scores.numel() if isinstance(scores, torch.Tensor) else scores.size)


def joined(masks: list[np.ndarray], arrays: list[Any]) -> np.ndarray:
    for mask, array in zip(masks, arrays, strict=True):
        assert mask.dtype == np.uint8 and mask.size == (size_of(array) + 7) // 8
        assert not size_of(array) % 8 or mask[-1] >> size_of(array) % 8 == 0
    unpacked = [np.unpackbits(m, count=size_of(a), bitorder="little") for m, a in zip(masks, arrays, strict=True)]
    return np.concatenate([np.empty(0, np.uint8), *unpacked]).astype(bool)


def check(arrays: list[Any], k: int, absolute: bool, limits: Limits | None = None, threads: int | None = None) -> None:
    threshold, mask = expect(arrays, k, absolute)
    ((found, masks),) = select_survivors([arrays], [k], ALONE, absolute=absolute, limits=limits, threads=threads)
    assert found == threshold
    assert np.array_equal(joined(masks, arrays), mask)
    assert int(np.count_nonzero(mask)) == mask.size - k


# Denormals of every dtype, both zeros, both infinities, neighbours, and the largest numbers.
ODD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 5e-324, -5e-324, 1e-45, -1e-45, 6e-8, 9.2e-41, 1e-40, 65504.0]
ODD += [3.3e38, -3.3e38, 1.7e308, -1.7e308, 1.0000001, 1.001, 1.01, 0.5, -0.5, 0.1]


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(PATHS),
    absolute=st.booleans(),
    limits=st.sampled_from(list(LIMITS.values())),
)
def test_equals_a_stable_sort(
    data: st.DataObject, dtype: str, path: str, absolute: bool, limits: Limits | None
) -> None:
    value = st.sampled_from(ODD) | st.floats(allow_nan=False, width=64) | st.integers(-3, 3).map(float)
    arrays = [as_dtype(data.draw(st.lists(value, max_size=90)), dtype) for _ in range(data.draw(st.integers(0, 4)))]
    k = data.draw(st.integers(0, sum(map(size_of, arrays))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCPRUNE_NATIVE", path)
        try:
            library()
        except HpcpruneError:
            return
        check(arrays, k, absolute, limits)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_large_arrays_of_many_ties(
    monkeypatch: pytest.MonkeyPatch, path: str, dtype: str, limits: Limits | None
) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", path)
    try:
        library()
    except HpcpruneError as error:
        pytest.skip(str(error))
    random = np.random.default_rng(7)
    for step in (0.0, 0.01, 0.7, 100.0):
        values = random.standard_normal(70_003)
        values = np.round(values / step) * step if step else values
        arrays = [as_dtype(part, dtype) for part in np.split(values, [11, 30_000, 30_000])]
        for k in (1, 35_001, 66_000, 70_003):
            check(arrays, k, k % 2 == 0, limits)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_neighbouring_scores_are_told_apart(limits: Limits | None) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1, 1500, dtype=np.int32)).view(np.float32)
    for k in range(1, scores.size + 1, 17):
        check([scores], k, False, limits)


@pytest.mark.parametrize("layers", [1, 3])
def test_threads_do_not_change_the_answer(layers: int) -> None:
    random = np.random.default_rng(layers)
    arrays = [np.round(random.standard_normal(900_001 // layers), 3).astype(np.float32) for _ in range(layers)]
    for threads in (1, 2, 3):
        check(arrays, 500_001, True, threads=threads)


@settings(max_examples=40, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    absolute=st.booleans(),
    limits=st.sampled_from(list(LIMITS.values())),
    seed=st.integers(0, 99),
)
def test_differing_dtypes_are_compared_exactly(
    dtypes: list[str], absolute: bool, limits: Limits | None, seed: int
) -> None:
    random = np.random.default_rng(seed)
    arrays = [as_dtype(random.choice(ODD, random.integers(0, 300)), dtype) for dtype in dtypes]
    k = int(random.integers(0, sum(map(size_of, arrays)) + 1))
    check(arrays, k, absolute, limits)


@pytest.mark.parametrize("empty", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_empty_has_no_say_in_the_format(dtype: str, empty: str) -> None:
    check([as_dtype([], empty), as_dtype(ODD, dtype), as_dtype([], empty)], 9, False)


def test_differing_dtypes_longer_than_a_block() -> None:
    random = np.random.default_rng(0)
    arrays = [as_dtype(np.round(random.standard_normal(300_001), 2), dtype) for dtype in ("bfloat16", "float32")]
    check(arrays, 400_000, True)


def test_groups_are_ranked_apart() -> None:
    random = np.random.default_rng(0)
    groups = [[random.standard_normal((i, 5)).astype(np.float32)] * (i % 3) for i in range(40)]
    ks = [sum(map(size_of, arrays)) // 2 for arrays in groups]
    for arrays, k, (threshold, masks) in zip(groups, ks, select_survivors(groups, ks, ALONE), strict=True):
        expected, mask = expect(arrays, k, False)
        assert threshold == expected and np.array_equal(joined(masks, arrays), mask)


def test_kinds_of_arrays() -> None:
    plain = np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 20)
    parameter = torch.nn.Parameter(torch.from_numpy(plain.copy()))
    bits = (plain.view(np.uint32) >> 16).astype(np.uint16)
    expected = kth_smallest([plain], 10, ALONE)
    assert expected.value == np.sort(plain.ravel())[9]
    assert kth_smallest([parameter], 10, ALONE) == kth_smallest([parameter.detach()], 10, ALONE) == expected
    truncated = (bits.astype(np.uint32) << 16).view(np.float32)
    assert kth_smallest([(bits, "bfloat16")], 10, ALONE) == kth_smallest([truncated], 10, ALONE)
    assert kth_smallest([plain[:, ::2]], 10, ALONE) == kth_smallest([plain[:, ::2].copy()], 10, ALONE)
    assert kth_smallest([parameter.T], 10, ALONE) == expected
    assert kth_smallest([], 0, ALONE) == kth_smallest([plain], 0, ALONE) == Threshold(-math.inf, 0, 0, 0)


def test_masks_equal_torch_global_unstructured() -> None:
    from torch.nn.utils import prune

    torch.manual_seed(0)
    layers = [torch.nn.Linear(30, 40), torch.nn.Conv2d(3, 8, 5), torch.nn.Linear(7, 1)]
    weights = [layer.weight.detach().clone() for layer in layers]
    count = sum(weight.numel() for weight in weights)
    ((_, masks),) = select_survivors([weights], [round(0.8 * count)], ALONE, absolute=True)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=round(0.8 * count))
    theirs = np.concatenate([layer.weight_mask.numpy().ravel().astype(bool) for layer in layers])
    assert np.array_equal(joined(masks, weights), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 4096])
@pytest.mark.parametrize("absolute", [False, True])
def test_nan_names_the_layer_and_the_count(dtype: str, k: int, absolute: bool) -> None:
    values = np.zeros(4096)
    values[[0, 77, 4095]] = [np.nan, -np.nan, np.nan]
    arrays = [as_dtype(np.ones(9), dtype), as_dtype(values, dtype)]
    with pytest.raises(NumericsError, match=r"^fc1.weight: 3 of 4096 scores are NaN; such weights cannot be ranked"):
        kth_smallest(arrays, k, ALONE, names=["conv.weight", "fc1.weight"], absolute=absolute)
    with pytest.raises(NumericsError, match=r"^array 1: 3 of 4096 scores are NaN"):
        kth_smallest(arrays, k, ALONE, absolute=absolute)
    with pytest.raises(NumericsError, match=r"^b: 3 of 8192 scores are NaN \(and 1 more like it\)"):
        halves = [np.ones(4096), values]
        select_survivors([halves, [values]], [1, 1], ALONE, names=[["b"], ["c"]])


def test_what_cannot_be_ranked_is_refused() -> None:
    scores = np.ones(10, np.float32)
    with pytest.raises(ThresholdError, match=r"k: 11 is not in 0 ... 10") as caught:
        kth_smallest([scores], 11, ALONE)
    assert isinstance(caught.value, ValueError) and caught.value.exit_code == 2
    with pytest.raises(ThresholdError, match=r"k: -1 is not in 0 ... 10"):
        kth_smallest([scores], -1, ALONE)
    with pytest.raises(ThresholdError, match=r"k: 1 is not in 0 ... 0"):
        kth_smallest([], 1, ALONE)
    with pytest.raises(ThresholdError, match=r"k: 2.5 is not an integer"):
        kth_smallest([scores], 2.5, ALONE)  # type: ignore[arg-type]
    with pytest.raises(ThresholdError, match=r"array 0: ndarray of int64 cannot be ranked; give numpy"):
        kth_smallest([np.arange(4)], 1, ALONE)
    with pytest.raises(ThresholdError, match=r"array 1: list of no dtype"):
        kth_smallest([scores, [1.0, 2.0]], 1, ALONE)
    with pytest.raises(ThresholdError, match=r"w: Tensor of int32"):
        kth_smallest([torch.ones(3, dtype=torch.int32)], 1, ALONE, names=["w"])
    with pytest.raises(ThresholdError, match=r"2 names for 3 arrays"):
        kth_smallest([scores] * 3, 1, ALONE, names=["a", "b"])
    with pytest.raises(ThresholdError, match=r"1 groups, 2 ks"):
        select_survivors([[scores]], [1, 2], ALONE)
