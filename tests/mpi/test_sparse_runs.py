"""Whole runs whose layers train sparse."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hpcprune.checkpoint import State, read_model
from tests.conftest import TINY, Launch
from tests.mpi.test_run import PACK, assert_same_weights

# The clock says that sparse layers are faster.
PATCH = """
from hpcprune import breakeven
from hpcprune.sparse import training

training.time_in_turns = lambda dense, sparse: (1.0, 0.5)
seconds = iter([2.0, 1.0] * 9)
breakeven._fastest = lambda trainer: (trainer.close(), next(seconds))[1]
"""


SPARSE = (PACK, "retrain.sparse=auto")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(TINY.parent, tmp_path_factory.mktemp("job") / "job"))
    with (folder / "task.py").open("a") as task:
        task.write(PATCH)
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mpirun: Launch, job: Path) -> State:
    """What a run with sparse layers ends in that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = mpirun(2, "hpcprune", "run", job, *SPARSE, "--out", out, timeout=120)
    assert done.returncode == 0, done.stderr
    said = "3 of 3 layers train sparse: a step takes 1000.0 ms so and 2000.0 ms dense"
    assert re.findall(rf"round (\d)/2: {said}", done.stdout) == ["1", "2"]
    return read_model(out / "model.h5")


@pytest.mark.parametrize("step", [55, 85])
def test_a_run_with_sparse_layers_goes_on_bit_for_bit(
    mpirun: Launch, tmp_path: Path, job: Path, whole: State, step: int
) -> None:
    command = ("hpcprune", "run", job, *SPARSE, "--out", tmp_path / "run")
    killed = mpirun(2, *command, timeout=120, env={"TINY": f"kill:1:{step}"})
    assert killed.returncode != 0
    again = mpirun(2, *command, timeout=120)
    assert again.returncode == 0, again.stderr
    assert_same_weights(read_model(tmp_path / "run/model.h5"), whole)
    assert whole.about["history"][-1]["metrics"]["accuracy"] > 0.9
    checked = mpirun(1, "hpcprune", "check", tmp_path / "run", timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_layers_train_dense_unless_they_are_asked_for(mpirun: Launch, tmp_path: Path, job: Path) -> None:
    done = mpirun(2, "hpcprune", "run", job, PACK, "--out", tmp_path / "run", timeout=120)
    assert done.returncode == 0 and "layers train" not in done.stdout
