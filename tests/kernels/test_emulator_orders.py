"""What the emulator's seed decides: the order of threads and blocks, how far a warp runs ahead, when a copy lands."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.emulated import Array, needs_emulator
from tests.kernels.test_emulator import count_values, launch

pytestmark = needs_emulator

SEEDS = range(1, 9)


@pytest.mark.parametrize("bug", ["LAST_BLOCK_WINS", "LAST_THREAD_WINS"])
def test_an_order_that_matters_is_seen_with_another_seed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caught = 0
    for seed in SEEDS:
        monkeypatch.setenv("CUEMU_SEED", str(seed))
        try:
            count_values(bug)
        except AssertionError:
            caught += 1
    assert caught >= 4


def farthest_ahead() -> int:
    farthest = np.zeros(1, np.uint32)
    launch("watch_warps", 40, farthest)
    return int(farthest[0])


def test_with_a_seed_a_warp_runs_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUEMU_SEED", raising=False)
    assert farthest_ahead() <= 1
    found = []
    for seed in SEEDS:
        monkeypatch.setenv("CUEMU_SEED", str(seed))
        found.append(farthest_ahead())
    assert sum(ahead > 20 for ahead in found) >= 3, found


def copied() -> tuple[Array, Array]:
    """What lanes find where their copies go, before they wait and after."""
    values = np.arange(1, 129, dtype=np.float32)
    early, late = np.zeros(128, np.float32), np.zeros(128, np.float32)
    launch("look_early", values, early, late)
    assert (late == values).all()
    return early.reshape(32, 4), values.reshape(32, 4)


def test_with_a_seed_some_copies_land_at_once_and_others_when_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUEMU_SEED", raising=False)
    assert np.isnan(copied()[0]).all()
    for seed in SEEDS:
        monkeypatch.setenv("CUEMU_SEED", str(seed))
        early, values = copied()
        there = ~np.isnan(early).any(1)
        assert 4 < there.sum() < 28 and (early[there] == values[there]).all() and np.isnan(early[~there]).all()
