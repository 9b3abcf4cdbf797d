"""Whole runs that prune at steps of one retraining: it is one retraining, and goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcprune.checkpoint import read_model
from tests.conftest import Launch
from tests.mpi.test_rewind_runs import steps_of
from tests.mpi.test_run import PACK, assert_same_weights, run

RETRAIN = ("retrain.epochs=null", "retrain.steps=30", "retrain.lr_schedule.name=cosine", PACK)
GRADUAL = ("prune.rounds=4", "prune.schedule=cubic", "prune.every_steps=7", "prune.sparsity=0.9", *RETRAIN)


@pytest.fixture(scope="module")
def gradual(tmp_path_factory: pytest.TempPathFactory, mpirun: Launch) -> Path:
    out = tmp_path_factory.mktemp("gradual") / "run"
    done = run(mpirun, out, 2, *GRADUAL)
    assert done.returncode == 0, done.stderr
    return out


def test_where_nothing_is_pruned_it_is_the_retraining_of_one_round(mpirun: Launch, tmp_path: Path) -> None:
    one = ("prune.rounds=1", "prune.schedule=one-shot", *RETRAIN)
    for name, job in (("four", GRADUAL), ("one", one)):
        done = run(mpirun, tmp_path / name, 2, *job, "prune.sparsity=0")
        assert done.returncode == 0, done.stderr
    four, of_one = (read_model(tmp_path / name / "model.h5") for name in ("four", "one"))
    for state in (four, of_one):  # batch norms are averaged over the ranks once a round, which rounds
        for key in [key for key in state.tensors if key.startswith("buffers/")]:
            del state.tensors[key]
    assert_same_weights(four, of_one)


def test_it_is_pruned_every_so_many_steps_under_one_schedule_of_learning_rates(gradual: Path) -> None:
    report = json.loads((gradual / "report.json").read_text())
    pruned = [each["sparsity"] for each in report["evaluations"] if each["when"] == "pruned"]
    wanted = [0.9 * (1 - (1 - done) ** 3) for done in (0.25, 0.5, 0.75, 1)]
    assert pruned == pytest.approx(wanted, abs=0.51 / report["model"]["prunable"])
    rounds = [steps_of(gradual, "retrain", number) for number in (1, 2, 3, 4)]
    assert [[step["step"] for step in steps] for steps in rounds] == [
        [*range(1, 8)],
        [*range(8, 15)],
        [*range(15, 22)],
        [*range(22, 31)],
    ]
    rates = [step["learning_rate"] for steps in rounds for step in steps]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 30 and rates[-1] < 0.01 * rates[0]


@pytest.mark.parametrize("step", [3, 10, 24])
def test_it_goes_on_bit_for_bit(mpirun: Launch, tmp_path: Path, gradual: Path, step: int) -> None:
    killed = run(mpirun, tmp_path / "run", 2, *GRADUAL, TINY=f"kill:1:{32 + step}")
    assert killed.returncode != 0
    again = run(mpirun, tmp_path / "run", 2, *GRADUAL)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert_same_weights(read_model(tmp_path / "run/model.h5"), read_model(gradual / "model.h5"))


def test_steps_that_are_not_there_are_refused(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 1, *GRADUAL, "prune.every_steps=10")
    assert done.returncode == 2
    assert (
        "prune.every_steps: 4 prunings, one every 10 steps, take more than the 30 steps of retrain; retrain for longer"
        in done.stderr
    )
