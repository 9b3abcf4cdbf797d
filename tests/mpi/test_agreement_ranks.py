"""The ranks' weights compared before they are saved: what differs is named, with the ranks that stand out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Launch

COMPARE = """
import json, sys
import numpy as np
from hpcprune.agreement import check_weights
from hpcprune.checkpoint import TensorState
from hpcprune.errors import NumericsError, WorldError
from hpcprune.world import World
from tests.checkpoint_states import small_state

world, found = World.of(None, timeout=20), {}
for what in ("same", "survivor", "pruned", "bias", "order", "all", "buffer", "NaN", "infinite"):
    state = small_state()
    state.own = {"rank": TensorState(np.array(world.rank), "int64")}
    first, second = state.layers["conv.weight"], state.layers["out.weight"]
    alive = np.unpackbits(first.mask, bitorder="little", count=36).astype(bool)
    if what == "survivor" and world.rank == 1:
        first.values[np.flatnonzero(alive)[-1:]] += np.float32(1e-7)
    if what == "pruned" and world.rank == 1:
        first.values[~alive] = 5  # is never written
    if what == "bias" and world.rank > 0:
        state.tensors["parameters/fc.bias"].array[1] = -0.0 - world.rank
    if what == "order" and world.rank == 0:
        first.values[alive] = first.values[alive][::-1]
    if what == "all":
        first.values[:] += world.rank == 2
        second.values[0] += world.rank
    if what == "buffer":
        state.tensors["buffers/seen"].array[...] = world.rank
    if what == "NaN":
        first.values[np.flatnonzero(alive)[3]] = np.nan
        second.values[0] = -np.inf
    if what == "infinite":
        state.tensors["parameters/fc.bias"].array[1] = np.inf
    try:
        check_weights(state, world, "checkpoint of step 7")
        found[what] = ""
    except (NumericsError, WorldError) as error:
        found[what] = str(error)
everywhere = world.allgather(found, "test")
assert all(each == found for each in everywhere), everywhere
if world.rank == 0:
    print(json.dumps(found))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "compare.py"
    path.write_text(COMPARE)
    return path


def test_what_differs_is_named_with_the_ranks_that_stand_out(mpirun: Launch, script: Path) -> None:
    done = mpirun(3, script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not any(found[what] for what in ("same", "pruned", "buffer"))
    says = {
        "survivor": "conv.weight (rank 1 unlike ranks 0, 2)",
        "bias": "fc.bias (rank 1, rank 2 unlike rank 0)",
        "order": "conv.weight (rank 0 unlike ranks 1-2)",
        "all": "conv.weight (rank 2 unlike ranks 0-1), out.weight (rank 1, rank 2 unlike rank 0)",
    }
    for what, places in says.items():
        assert found[what].startswith(f"checkpoint of step 7: the ranks' weights differ in {places}; "), found[what]


def test_a_rank_alone_agrees_with_itself(mpirun: Launch, script: Path) -> None:
    done = mpirun(1, script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {what for what in found if found[what]} == {"NaN", "infinite"}


@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_that_are_not_finite_are_named(mpirun: Launch, script: Path, ranks: int) -> None:
    done = mpirun(ranks, script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["NaN"].startswith("checkpoint of step 7: NaN or infinite weights in conv.weight, out.weight; lower ")
    assert found["infinite"].startswith("checkpoint of step 7: NaN or infinite weights in fc.bias; lower the learning ")
