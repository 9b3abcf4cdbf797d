"""Whole runs that rewind, and whose dense network teaches: what they do, and that they go on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcprune.checkpoint import State, read_model
from tests.conftest import TINY, Launch
from tests.mpi.test_run import PACK, assert_same_weights, run

EARLY = 7  # of the 32 steps of the dense training
REWIND = (f"prune.rewind={EARLY}", f"retrain.lr_schedule={{name: rewind, start: {EARLY}}}", "retrain.epochs=null", PACK)


def steps_of(folder: Path, stage: str, number: int) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step" and (line["stage"], line["round"]) == (stage, number)]


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory, mpirun: Launch) -> Path:
    out = tmp_path_factory.mktemp("rewound") / "run"
    done = run(mpirun, out, 2, *REWIND, "retrain.steps=25", "train.lr_schedule.name=cosine")
    assert done.returncode == 0, done.stderr
    return out


def test_weights_go_back_to_those_of_the_step(mpirun: Launch, tmp_path: Path, rewound: Path) -> None:
    """Without a step of retraining, what survives is what a training that ends there has."""
    done = run(mpirun, tmp_path / "run", 2, *REWIND, "retrain.steps=0", "train.lr_schedule.name=cosine")
    assert done.returncode == 0, done.stderr
    early, last = (read_model(tmp_path / "run" / name) for name in ("early.h5", "model.h5"))
    assert_kept(early, last)
    assert_same_weights(early, read_model(rewound / "early.h5"))
    dense = read_model(rewound / "dense.h5")
    assert not np.array_equal(early.layers["0.weight"].values, dense.layers["0.weight"].values)


def assert_kept(early: State, last: State) -> None:
    for name, layer in last.layers.items():
        assert layer.mask is not None
        kept = np.unpackbits(layer.mask, count=layer.values.size, bitorder="little").astype(bool)
        np.testing.assert_array_equal(layer.values, np.where(kept, early.layers[name].values, 0))


def test_the_learning_rate_is_that_of_the_dense_training(rewound: Path) -> None:
    dense = [step["learning_rate"] for step in steps_of(rewound, "train", 0)]
    assert len(dense) == 32 and len(set(dense)) == 32
    for number in (1, 2):
        assert [step["learning_rate"] for step in steps_of(rewound, "retrain", number)] == dense[EARLY:]


@pytest.mark.parametrize("step", [5, 20, 45, 70])
def test_a_run_that_rewinds_goes_on_bit_for_bit(mpirun: Launch, tmp_path: Path, rewound: Path, step: int) -> None:
    command = (*REWIND, "retrain.steps=25", "train.lr_schedule.name=cosine")
    assert run(mpirun, tmp_path / "run", 2, *command, TINY=f"kill:1:{step}").returncode != 0
    again = run(mpirun, tmp_path / "run", 2, *command)
    assert again.returncode == 0, again.stderr
    assert_same_weights(read_model(tmp_path / "run/model.h5"), read_model(rewound / "model.h5"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.rewind=33"], "prune.rewind: 33 is behind the 32 steps of the dense training"),
        (
            ["retrain.lr_schedule={name: rewind, start: 20}"],
            "retrain.lr_schedule.start: from step 20 on the dense training has 12 steps, and a round retrains for 32",
        ),
    ],
)
def test_a_step_that_there_is_not_is_refused(
    mpirun: Launch, tmp_path: Path, overrides: list[str], message: str
) -> None:
    done = run(mpirun, tmp_path / "run", 2, *overrides)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_would_go_wrong_after_the_dense_training_is_told_before_it(mpirun: Launch, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY.parent, tmp_path / "job"))
    with (folder / "task.py").open("a") as task:
        task.write("""

class Odd(Tiny):
    def predict(self, model, batch):
        return {"scores": super().predict(model, batch)}

    distance = hpcprune.Task.distance


class Past(Tiny):
    def predict(self, model, batch):
        return torch.nn.functional.linear(batch[0], torch.ones(4, 20)) + 0 * model[6].bias
""")
    for name, override, message in (
        ("Odd", "retrain.distill={}", "Odd gives dict, of which no distance is known; define distance"),
        ("Past", "prune.criterion=wanda", "0.weight saw no input while the model ran on samples"),
    ):
        command = ("hpcprune", "run", folder / "job.yaml", f"task=task.py:{name}", override, "--out", tmp_path / "run")
        done = mpirun(2, *command, timeout=60)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_run_whose_dense_network_teaches_goes_on_bit_for_bit(mpirun: Launch, tmp_path: Path) -> None:
    command = ("retrain.distill={share: 0.7, temperature: 3}", PACK)
    whole = run(mpirun, tmp_path / "whole", 2, *command)
    assert whole.returncode == 0, whole.stderr
    assert run(mpirun, tmp_path / "run", 2, *command, TINY="kill:0:60").returncode != 0
    again = run(mpirun, tmp_path / "run", 2, *command)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert_same_weights(read_model(tmp_path / "run/model.h5"), read_model(tmp_path / "whole/model.h5"))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["evaluations"][-1]["metrics"]["accuracy"] > 0.8
