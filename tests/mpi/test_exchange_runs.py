"""Whole runs over each backend, packed or not: on two ranks the same weights bit for bit; and what is approximated."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hpcprune.checkpoint import read_model, read_step
from tests.conftest import Launch
from tests.mpi.test_run import PACK, assert_same_weights, run

TOP_K = ("retrain.optimizer={name: sgd, lr: 0.02, momentum: 0.9}", "retrain.top_k={share: 0.2, warmup: 3}")


def steps(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step" and line["stage"] == "retrain"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("retrain.exchange=mpi",),
        ("retrain.exchange=horovod",),
        ("retrain.packing=never", "retrain.bucket_mb=0.001"),
        ("retrain.packing=always", "retrain.bucket_mb=100"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_same_survivors_whatever_carries_them(
    mpirun: Launch, tmp_path: Path, uninterrupted: Path, overrides: tuple[str, ...]
) -> None:
    if "horovod" in overrides[0] and os.environ.get("HPCPRUNE_NO_HOROVOD") and not find_spec("horovod"):
        pytest.skip("HPCPRUNE_NO_HOROVOD is set")
    out = tmp_path / "run"
    done = run(mpirun, out, 2, *overrides)
    assert done.returncode == 0, done.stderr
    assert_same_weights(read_model(out / "model.h5"), read_model(uninterrupted / "model.h5"))
    metrics = [json.loads((path / "report.json").read_text())["evaluations"] for path in (out, uninterrupted)]
    assert [each["metrics"] for each in metrics[0]] == [each["metrics"] for each in metrics[1]]


def test_fewer_bytes_travel_in_16_bits_and_with_top_k(mpirun: Launch, tmp_path: Path) -> None:
    assert run(mpirun, tmp_path / "float32", 2, PACK).returncode == 0
    whole = steps(tmp_path / "float32")
    for name in ("bfloat16", "float16"):
        done = run(mpirun, tmp_path / name, 2, f"retrain.wire={name}", PACK)
        assert done.returncode == 0, done.stderr
        votes = 5 * 8  # the loss and four answers, in float64
        for ours, theirs in zip(steps(tmp_path / name), whole, strict=True):
            assert ours["bytes_sent"] - votes == (theirs["bytes_sent"] - votes) / 2
    done = run(mpirun, tmp_path / "top", 2, *TOP_K, PACK)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "top")[-1]["bytes_sent"] < 0.5 * whole[-1]["bytes_sent"]
    report = json.loads((tmp_path / "top/report.json").read_text())
    assert report["evaluations"][-1]["metrics"]["accuracy"] > 0.9


def test_a_run_with_top_k_and_accumulation_goes_on_bit_for_bit(mpirun: Launch, tmp_path: Path) -> None:
    more = (*TOP_K, "retrain.accumulate=3", "retrain.clip_norm=0.5")
    assert run(mpirun, tmp_path / "whole", 2, *more).returncode == 0
    assert run(mpirun, tmp_path / "cut", 2, *more, TINY="kill:1:130").returncode != 0
    resumed = run(mpirun, tmp_path / "cut", 2, *more)
    assert resumed.returncode == 0 and "going on from" in resumed.stdout, resumed.stderr
    assert_same_weights(read_model(tmp_path / "cut/model.h5"), read_model(tmp_path / "whole/model.h5"))


def test_a_dtype_that_a_backend_lacks_is_refused_by_name(mpirun: Launch, tmp_path: Path) -> None:
    done = run(mpirun, tmp_path / "run", 2, "retrain.exchange=mpi", "retrain.wire=float16")
    assert done.returncode == 2
    assert done.stderr.count("hpcprune: error") == 1 and "float16" in done.stderr and "torch" in done.stderr
    assert not (tmp_path / "run").exists()


def test_momentum_is_carried_from_round_to_round(mpirun: Launch, tmp_path: Path) -> None:
    """A checkpoint at the end of the first round holds the state that the second begins with."""
    out = tmp_path / "run"
    assert run(mpirun, out, 2, "checkpoint.keep=100").returncode == 0
    states = [read_step(path) for path in sorted((out / "checkpoints").glob("step-*"))]
    (ended,) = [s for s in states if s.about["ledger"]["round"] == 1 and s.about["ledger"]["complete"]]
    assert int(ended.tensors["optimizer/step"].array) == ended.about["ledger"]["step"] > 0
    later = next(s for s in states if s.about["ledger"]["round"] == 2)
    steps_of_both = ended.about["ledger"]["step"] + later.about["ledger"]["step"]
    assert int(later.tensors["optimizer/step"].array) == steps_of_both
    for name, layer in later.layers.items():
        kept = int((layer.values != 0).sum())
        assert later.tensors[f"optimizer/{name}/exp_avg"].array.size == kept


def test_what_top_k_keeps_back_is_carried_from_round_to_round(mpirun: Launch, tmp_path: Path) -> None:
    """A checkpoint stands at either side of the second pruning; between them only what was pruned is dropped."""
    out = tmp_path / "run"
    assert run(mpirun, out, 2, *TOP_K, "retrain.wire=bfloat16", "checkpoint.keep=100").returncode == 0
    states = [read_step(path) for path in sorted((out / "checkpoints").glob("step-*"))]
    (before,) = [s for s in states if s.about["ledger"]["round"] == 1 and s.about["ledger"]["complete"]]
    after = next(s for s in states if s.about["ledger"]["round"] == 2)
    assert after.about["ledger"]["step"] == 0
    for rank in range(2):
        for name in after.layers:
            for key in ("velocity", "residual"):
                key = f"exchange/{name}/{key}"
                kept, still = (
                    np.unpackbits(s.layers[name].mask, bitorder="little").view(bool) for s in (before, after)
                )
                assert still.sum() < kept.sum()
                held, holds = before.own[rank][key].array, after.own[rank][key].array
                assert np.any(holds)
                np.testing.assert_array_equal(holds, held[still[kept]])
