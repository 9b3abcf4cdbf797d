"""The threshold on several ranks: the same masks bit for bit as on one, little traffic, and errors on every rank.

Run by mpirun this file is the program of one rank: `test_threshold_ranks.py FOLDER` leaves what it found there.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcprune.errors import NumericsError
from hpcprune.threshold import Limits, Threshold, ThresholdError, kth_smallest, select_survivors
from hpcprune.world import World

SIZES = (5, 40_000, 1, 0, 9_999, 64, 30_003, 2)
LIMITS = {
    "usual": None,
    "misses": Limits(samples=30, sigmas=0, bins=16, gathered=8),
    "overflows": Limits(samples=300, sigmas=1, bins=256, gathered=8, spare=-(10**9)),
}
Found = list[tuple[Threshold, list[np.ndarray]]]


def layers(case: str) -> list[np.ndarray]:
    """The scores of a whole model, the same on every rank."""
    random = np.random.default_rng(4)
    scores = [random.standard_normal(size) for size in SIZES]
    if case == "ties":
        scores = [np.round(layer) for layer in scores]
    if case == "zeros":
        scores = [np.where(random.random(layer.size) < 0.7, -0.0, layer) for layer in scores]
    if case == "mixed":
        return [layer.astype(("float16", "float32", "float64")[i % 3]) for i, layer in enumerate(scores)]
    return [layer.astype("float64" if case == "wide" else "float32") for layer in scores]


CASES = ("distinct", "ties", "zeros", "mixed", "wide")


def edges(size: int, ranks: int, even: bool) -> list[int]:
    """Where contiguous shards begin: fair ones, or all on the first ranks so that others have nothing."""
    if even:
        return [size * rank // ranks for rank in range(ranks + 1)]
    return [0, *[min(size, 60_000 + 7 * rank) for rank in range(ranks - 1)], size]


def shard(scores: list[np.ndarray], rank: int, ranks: int, even: bool) -> list[list[np.ndarray]]:
    """This rank's part of each layer; nothing for a layer that it has no part of."""
    cuts = edges(sum(SIZES), ranks, even)
    parts, start = [], 0
    for layer in scores:
        first, last = (min(max(cut - start, 0), layer.size) for cut in (cuts[rank], cuts[rank + 1]))
        parts.append([layer[first:last]] if last > first else [])
        start += layer.size
    return parts


def select(parts: list[list[np.ndarray]], scores: list[np.ndarray], comm: World, limits: Limits | None) -> list[Found]:
    """Global and per layer, few and many."""
    total = sum(SIZES)
    found = [
        select_survivors([[array for part in parts for array in part]], [k], comm, absolute=k % 2 == 0, limits=limits)
        for k in (0, 1, total // 3, total * 9 // 10, total)
    ]
    for density in (0.1, 0.5):
        ks = [round(density * layer.size) for layer in scores]
        found.append(select_survivors(parts, ks, comm, absolute=True, limits=limits))
    return found


class Counting(World):
    """A world that counts its collectives."""

    collectives = 0

    def allreduce(self, *args: Any, **kwargs: Any) -> Any:
        self.collectives += 1
        return super().allreduce(*args, **kwargs)

    def gather_arrays(self, *args: Any, **kwargs: Any) -> Any:
        self.collectives += 1
        return super().gather_arrays(*args, **kwargs)


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (NumericsError, ThresholdError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: Path) -> None:
    world = World.of()
    rank, ranks = world.rank, world.size
    found: dict[Any, Any] = {}
    for case in CASES:
        scores = layers(case)
        for even in (True, False):
            for name, limits in LIMITS.items():
                found[case, even, name] = select(shard(scores, rank, ranks, even), scores, world, limits)

    before = world.bytes_reduced
    big = np.random.default_rng(rank).standard_normal(1_000_000)
    kth_smallest([big], 700_000 * ranks, world)
    found["bytes"] = world.bytes_reduced - before

    counting = Counting(world.comm)
    select_survivors([[big[:100]]] * 2, [50] * 2, counting)
    few, counting.collectives = counting.collectives, 0
    select_survivors([[big[i : i + 100]] for i in range(50)], [50] * 50, counting)
    found["collectives"] = few, counting.collectives

    spoilt = np.ones(4096, np.float32)
    spoilt[: 3 if rank == ranks - 1 else 0] = np.nan
    own = [[spoilt] if group == rank else [] for group in range(ranks)]
    names = [[f"layer{group}"] for group in range(ranks)]
    found["errors"] = [
        error_of(lambda: kth_smallest([spoilt], 5, world, names=["fc1.weight"])),
        error_of(lambda: select_survivors(own, [5] * ranks, world, names=names)),
        error_of(lambda: kth_smallest([big[:10]], 10 * ranks + 1, world)),
        error_of(lambda: kth_smallest([big[:10]], 3 + rank, world)),
        error_of(lambda: select_survivors([[big[:10]]] * (1 + rank), [3] * (1 + rank), world)),
    ]
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))


def unpacked(parts: list[list[np.ndarray]], found: Found) -> np.ndarray:
    arrays = [array for part in parts for array in part]
    masks = [mask for _, group in found for mask in group]
    bits = [np.unpackbits(m, count=a.size, bitorder="little") for m, a in zip(masks, arrays, strict=True)]
    return np.concatenate([np.empty(0, np.uint8), *bits])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_find_the_same_masks_as_one(mpirun: Any, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
    for case in CASES:
        scores = layers(case)
        whole = shard(scores, 0, 1, True)
        alone = select(whole, scores, World.alone(), None)
        for even in (True, False):
            shards = [shard(scores, rank, ranks, even) for rank in range(ranks)]
            for name in LIMITS:
                for number, expected in enumerate(alone):
                    theirs = [results[case, even, name][number] for results in found]
                    for result in theirs:
                        assert [threshold for threshold, _ in result] == [threshold for threshold, _ in expected]
                    # Shards are contiguous, so the ranks' masks in order are the model's, layer by layer.
                    joined = np.concatenate([unpacked(s, r) for s, r in zip(shards, theirs, strict=True)])
                    assert np.array_equal(joined, unpacked(whole, expected)), (case, even, name, number)

    assert all(results["bytes"] < 1_000_000 for results in found), found[0]["bytes"]
    few, many = found[0]["collectives"]
    assert 0 < many <= few + 3, "collectives must not grow with the number of groups"

    everywhere = [results["errors"] for results in found]
    assert all(errors == everywhere[0] for errors in everywhere)
    nan, layer_nan, too_many, disagree, groups = everywhere[0]
    assert nan.startswith(f"NumericsError: fc1.weight: 3 of {4096 * ranks} scores are NaN")
    assert layer_nan.startswith(f"NumericsError: layer{ranks - 1}: 3 of 4096 scores are NaN")
    assert too_many.startswith(f"ThresholdError: k: {10 * ranks + 1} is not in 0 ... {10 * ranks}")
    if ranks > 1:
        assert "ranks disagree about k" in disagree and "rank 1: 1 groups, k = [4]" in disagree
        assert "ranks disagree about k" in groups and "rank 1: 2 groups" in groups


if __name__ == "__main__":
    with World.of().guard():
        main(Path(sys.argv[1]))
