"""Runs killed at random instants: each goes on from its newest checkpoint and ends in the same weights, bit for bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.faults import LONGEST_LIFE, VICTIMS, try_many
from hpcprune.checkpoint import read_model

# Chosen so that every moment and every victim is among the kills.
SEED = 25


@pytest.mark.timeout(900)
def test_15_runs_killed_at_random_instants_go_on_bit_for_bit(
    tmp_path: Path, uninterrupted: Path, forks: list[str | Path]
) -> None:
    expected = read_model(uninterrupted / "model.h5")
    # A draw whose moment never comes is no kill: how many checkpoints there are hangs on the disk.
    outcomes = [outcome for outcome in try_many(15, SEED, 2, tmp_path, expected, forks) if outcome.kind != "not killed"]
    assert Counter(outcome.kind for outcome in outcomes) == {"right": 15}, "\n".join(
        f"{outcome.fault} on rank {outcome.fault.rank}: {outcome.kind}: {outcome.why}"
        for outcome in outcomes
        if outcome.kind != "right"
    )
    assert max(outcome.lived for outcome in outcomes) <= LONGEST_LIFE
    assert {outcome.fault.who for outcome in outcomes} == set(VICTIMS)
    assert len({outcome.fault.moment for outcome in outcomes}) >= 8
