"""Steps written by real ranks together: the same content on any number of them; what fails on one fails on all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpcprune.checkpoint import newest_step, read_step
from tests.checkpoint_states import assert_same_layers, assert_same_tensors, small_state
from tests.conftest import Launch

WRITE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from hpcprune.checkpoint import BackgroundWriter, TensorState, read_step, write_step
from hpcprune.errors import CheckpointError
from hpcprune.shards import Layer, deal
from hpcprune.world import World
from tests.checkpoint_states import random_layer, small_state

root, what = Path(sys.argv[1]), sys.argv[2]
world = World.of(None, timeout=20)
state = small_state()
if what == "fail":
    state.layers["large"] = random_layer((500_000,), "float32", 1.0)
state.own = {"rank": TensorState(np.array(world.rank), "int64")}
spans = deal([Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items()], world.size)
writer = BackgroundWriter(root, spans, world, 2)

def beside(step):
    # As a training loop does it: a flag on a sum that it does anyway says when all ranks are done.
    writer.begin(step, state)
    for value in state.own.values():
        value.array[...] = -1  # the loop goes on at once
    advanced = 0
    while advanced < 2:
        if world.allreduce(np.array([writer.done]) * 1.0, "a step's sum")[0] == world.size:
            writer.advance()
            advanced += 1
    state.own = {"rank": TensorState(np.array(world.rank), "int64")}

if what == "write":
    write_step(root, 1, state, spans, world, 2)
    beside(2)
    if world.rank == 0:
        assert not list(root.glob(".*"))
    beside(3)
    assert len(read_step(root / "step-00000003").own) == world.size
else:
    if what == "fail" and world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))
    if what == "odd" and world.rank == 1:
        state.layers["conv.weight"].dtype = "float8"
    if what == "index" and world.rank == 0:
        state.about["set"] = {1}
    try:
        beside(4) if what == "fail" else write_step(root, 4, state, spans, world, 2)
        outcome = "written"
    except CheckpointError as error:
        outcome = str(error)
    (root / f"outcome-{world.rank}.json").write_text(json.dumps(outcome))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "write.py"
    path.write_text(WRITE)
    return path


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_write_one_step_together(tmp_path: Path, mpirun: Launch, script: Path, ranks: int) -> None:
    root = tmp_path / "checkpoints"
    run = mpirun(ranks, script, root, "write")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    path, passed_over = newest_step(root)
    assert path == root / "step-00000003"
    assert passed_over == []
    back, expected = read_step(path), small_state()
    assert back.about == expected.about
    assert_same_layers(back.layers, expected.layers)
    assert_same_tensors(back.tensors, expected.tensors)
    assert [int(own["rank"].array) for own in back.own] == list(range(ranks))


@pytest.mark.parametrize(
    "what, message",
    [
        ("fail", "rank 1: .*rank-0001.h5: cannot be written: the file may not become that large"),
        ("odd", "rank 1: conv.weight: dtype 'float8'"),
        ("index", "rank 0: about.set: cannot be stored as JSON"),
    ],
)
def test_what_one_rank_cannot_write_fails_on_all(
    tmp_path: Path, mpirun: Launch, script: Path, what: str, message: str
) -> None:
    root = tmp_path / "checkpoints"
    assert mpirun(1, script, root, "write").returncode == 0
    run = mpirun(3, script, root, what)
    assert run.returncode == 0, run.stderr
    outcomes = [json.loads((root / f"outcome-{rank}.json").read_text()) for rank in range(3)]
    assert len(set(outcomes)) == 1
    assert re.search(message, outcomes[0])
    assert not list(root.glob(".step-*"))
    assert newest_step(root) == (root / "step-00000003", [])
