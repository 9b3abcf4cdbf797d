"""Whole runs by criteria that look at data or at training: killed in the middle, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpcprune.checkpoint import read_model
from tests.conftest import Launch
from tests.mpi.test_run import PACK, assert_same_weights, run

# A batch of 16 of 96 samples: 3 turns of 2 ranks a round, so that the 5th is in the second round's.
CALIBRATE = ("prune.criterion=fisher", "prune.calibrate.samples=96", "prune.calibrate.batch_size=16", PACK)
CASES = {
    "fisher": (CALIBRATE, {"FAULT": "calibrating:66:0:self"}),
    "wanda": (("prune.criterion=wanda", *CALIBRATE[1:]), {"FAULT": "calibrating:5:0:self"}),
    "movement": (("prune.criterion=movement", PACK), {"TINY": "kill:1:45"}),
    "l1": (("prune.criterion=l1", "train.l1=1e-3", "retrain.l1=1e-3", PACK), {"TINY": "kill:1:20"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_goes_on_bit_for_bit(mpirun: Launch, tmp_path: Path, case: str) -> None:
    overrides, fault = CASES[case]
    whole = run(mpirun, tmp_path / "whole", 2, *overrides)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "record").touch()
    record = {"FAULT_RECORD": str(tmp_path / "record"), "FAULT_RANK": "1"} if "FAULT" in fault else {}
    killed = run(mpirun, tmp_path / "run", 2, *overrides, **fault, **record)
    assert killed.returncode != 0 and not (tmp_path / "run/report.json").exists()
    if record:
        assert (tmp_path / "record").read_text(), "the kill was in the calibration"
    resumed = run(mpirun, tmp_path / "run", 2, *overrides)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stdout
    state = read_model(tmp_path / "run/model.h5")
    assert_same_weights(state, read_model(tmp_path / "whole/model.h5"))
    assert all(layer.attributes["criterion"] == case for layer in state.layers.values())
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["evaluations"][-1]["metrics"]["accuracy"] > 0.8
    if case == "wanda":
        for layer in state.layers.values():
            assert layer.mask is not None
            kept = np.unpackbits(layer.mask, count=layer.values.size, bitorder="little").reshape(layer.shape)
            assert set(kept.sum(1)) == {layer.shape[1] - round(0.9 * layer.shape[1])}


def test_layers_by_pattern_and_erk_have_their_sparsities(mpirun: Launch, tmp_path: Path) -> None:
    overrides = ("prune.scope=layer", "prune.distribution=erk", 'prune.layers={"6": 0.25}', "retrain.epochs=0")
    done = run(mpirun, tmp_path / "run", 2, *overrides)
    assert done.returncode == 0, done.stderr
    layers = read_model(tmp_path / "run/model.h5").layers
    gone = {name: int((layer.values == 0).sum()) for name, layer in layers.items()}
    assert gone["6.weight"] == 48
    assert gone["0.weight"] + gone["4.weight"] == pytest.approx(0.9 * (960 + 2304), abs=1)
    density = {name: 1 - gone[name] / layers[name].values.size for name in gone}
    assert density["0.weight"] / density["4.weight"] == pytest.approx((68 / 960) / (96 / 2304), rel=0.02)


LAYERS = ("prune.scope=layer", "prune.schedule=layer-by-layer", "prune.rounds=3", PACK)


def test_layer_by_layer_goes_from_the_last_to_the_first_and_on_when_killed(mpirun: Launch, tmp_path: Path) -> None:
    whole = run(mpirun, tmp_path / "whole", 2, *LAYERS)
    assert whole.returncode == 0, whole.stderr
    gone = [round(0.9 * weights) for weights in (192, 2304, 960)]
    for number in (1, 2, 3):
        left = 3456 - sum(gone[:number])
        assert f"round {number}/3: pruned to {1 - left / 3456:.2%}, {left:,} of 3,456" in whole.stdout
    killed = run(mpirun, tmp_path / "run", 2, *LAYERS, TINY="kill:1:75")
    assert killed.returncode != 0
    again = run(mpirun, tmp_path / "run", 2, *LAYERS)
    assert again.returncode == 0 and "(round 2, step" in again.stdout
    state = read_model(tmp_path / "run/model.h5")
    assert_same_weights(state, read_model(tmp_path / "whole/model.h5"))
    for name, pruned in zip(("6.weight", "4.weight", "0.weight"), gone, strict=True):
        assert int((state.layers[name].values == 0).sum()) == pruned


def test_more_rounds_than_layers_are_refused(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 2, *LAYERS[:2], "prune.rounds=4")
    assert done.returncode == 2 and "prune.rounds: 4 is more than the 3 layers that layer-by-layer" in done.stderr


def test_a_pattern_that_names_nothing_is_refused_before_any_work(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 2, "prune.scope=layer", "prune.layers={tail: 0.25}")
    assert done.returncode == 2 and "prune.layers: 'tail' matches no prunable layer" in done.stderr
    assert not (tmp_path / "run").exists() and "Traceback" not in done.stderr
