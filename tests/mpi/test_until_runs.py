"""Whole runs that prune to a goal: they end with the sparsest network that meets it, also when they were killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpcprune.checkpoint import read_model
from tests.conftest import Launch
from tests.mpi.test_run import PACK, assert_same_weights, run

GOAL = ("prune.until=accuracy >= dense - 0.1", "prune.rounds=3", "prune.sparsity=0.98", PACK)
STEPS = 32  # of the dense training, and of a round


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, mpirun: Launch) -> Path:
    out = tmp_path_factory.mktemp("found") / "run"
    done = run(mpirun, out, 2, *GOAL)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"round (\d): the goal is (met|missed)", done.stdout)[:3] == [
        ("1", "met"),
        ("2", "met"),
        ("3", "missed"),
    ]
    return out


def test_the_result_is_the_sparsest_that_meets_the_goal(found: Path) -> None:
    report = json.loads((found / "report.json").read_text())
    evaluations, dense = report["evaluations"], report["evaluations"][0]["metrics"]["accuracy"]
    rounds = [(e["sparsity"], e["metrics"]["accuracy"]) for e in evaluations if e["when"] == "retrained"]
    met = [sparsity for sparsity, accuracy in rounds if accuracy >= dense - 0.1]
    missed = [sparsity for sparsity, accuracy in rounds if accuracy < dense - 0.1]
    assert len(rounds) > 3 and met and missed
    assert max(met) < min(missed) and (1 - max(met)) / (1 - min(missed)) < 1.1
    last = evaluations[-1]
    assert (last["sparsity"], last["metrics"]["accuracy"]) == max(each for each in rounds if each[0] in met)
    state = read_model(found / "model.h5")
    weights = sum(layer.values.size for layer in state.layers.values())
    zeros = sum(int((layer.values == 0).sum()) for layer in state.layers.values())
    assert zeros == round(max(met) * weights)
    assert report["goal"]["met"] and report["goal"]["bound"] == pytest.approx(dense - 0.1)
    assert '<th scope="row">goal: accuracy &gt;= dense - 0.1</th>' in (found / "report.html").read_text()
    thresholds = {layer.attributes["threshold"] for layer in state.layers.values()}
    assert len(thresholds) == 1, "of the round whose network it is, where all layers are ranked together"


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_a_search_goes_on_bit_for_bit(mpirun: Launch, tmp_path: Path, found: Path, number: int) -> None:
    killed = run(mpirun, tmp_path / "run", 2, *GOAL, TINY=f"kill:1:{STEPS * number + 17}")
    assert killed.returncode != 0
    again = run(mpirun, tmp_path / "run", 2, *GOAL)
    assert again.returncode == 0 and f"(round {number}, step" in again.stdout, again.stderr
    assert_same_weights(read_model(tmp_path / "run/model.h5"), read_model(found / "model.h5"))


def test_a_goal_that_is_never_met_ends_with_the_nearest_and_says_so(mpirun: Launch, tmp_path: Path) -> None:
    never = ("prune.until=loss <= dense * 1e-3", "prune.rounds=3", "retrain.epochs=0.5", PACK)
    for _ in range(2):  # whether it runs, or is looked at again
        done = run(mpirun, tmp_path / "run", 2, *never)
        assert done.returncode == 3, done.stderr
        assert done.stderr.count("prune.until: loss <= dense * 1e-3 was never met; the nearest is") == 1
        assert "Traceback" not in done.stderr and "prunable weights" in done.stdout
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert not report["goal"]["met"]
    assert (tmp_path / "run/model.h5").is_file()


def test_a_metric_that_the_task_has_not_is_refused(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 2, "prune.until=acuracy >= 0.9")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "prune.until: the task has no metric 'acuracy'; did you mean accuracy? (it has: loss," in done.stderr
