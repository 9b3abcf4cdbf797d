"""The jobs under jobs/, each in a short form on two ranks: they load their data, learn something, and are pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, Launch

# A job's steps of training and retraining; the metric that its field uses, and what it must reach, above or below.
JOBS: dict[str, tuple[int, int, str, float]] = {
    "cora": (25, 5, "accuracy", 0.6),
    "cora/gat.yaml": (25, 5, "accuracy", 0.6),
    "cora/autoencoder.yaml": (25, 5, "auc", 0.7),
    "fashion": (60, 20, "accuracy", 0.65),
    "glosses": (60, 20, "accuracy", 0.3),
    "minilm": (12, 3, "accuracy", 0.5),
    "movielens": (200, 50, "rmse", 1.05),
    "news": (40, 10, "accuracy", 0.4),
}
# A task whose samples take long: a line of its own, what it is here, and what else is less.
SHORTER = {"minilm": ("LENGTH = 64 ", "LENGTH = 12 ", ["evaluate.sparse=never", "prune.calibrate.samples=64"])}


def file_of(job: str) -> Path:
    return ROOT / "jobs" / (job if job.endswith(".yaml") else f"{job}/job.yaml")


def test_every_job_is_here() -> None:
    others = {*ROOT.glob("jobs/*/*.yaml")} - {file_of("mnist"), file_of("smollm2")}  # which have tests of their own
    assert others == {file_of(job) for job in JOBS}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_in_its_short_form(mpirun: Launch, tmp_path: Path, job: str) -> None:
    train, retrain, metric, bound = JOBS[job]
    overrides = ["train.epochs=null", f"train.steps={train}", "retrain.epochs=null", f"retrain.steps={retrain}"]
    overrides += ["prune.sparsity=0.5", "prune.rounds=1", "prune.schedule=one-shot"]
    folder = Path(shutil.copytree(file_of(job).parent, tmp_path / "job"))
    if job in SHORTER:
        line, shorter, less = SHORTER[job]
        task = (folder / "task.py").read_text()
        assert line in task
        (folder / "task.py").write_text(task.replace(line, shorter))
        overrides += less
    command = ("hpcprune", "run", folder / file_of(job).name, *overrides, "--out", tmp_path / "run")
    done = mpirun(2, *command, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    last = report["evaluations"][-1]
    assert report["primary"] == metric and last["sparsity"] == pytest.approx(0.5, abs=0.01)
    if job.startswith("cora"):
        assert last["graph"]["edges"] == pytest.approx(0.2, abs=0.001)
    reached = last["metrics"][metric]
    assert reached > bound if report["higher_is_better"] else reached < bound


def test_half_of_a_language_model_goes_in_the_memory_of_its_weights(mpirun: Launch, tmp_path: Path) -> None:
    command = ("hpcprune", "run", ROOT / "jobs/smollm2/job.yaml", "task=task.py:Brief", "--out", tmp_path)
    done = mpirun(2, *command, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    dense, pruned, _ = (each["metrics"]["perplexity"] for each in report["evaluations"])
    # Of a script of a few lines without hpcprune, on one process: all inputs' norms, then each row's lower half.
    assert dense == pytest.approx(28.6, rel=0.01) and pruned == pytest.approx(67.0, rel=0.03)
    weights, imports, block = 538e6, 0.42e9, 0.1e9  # of which the head's is the largest: 256 x 49,152 logits, twice
    parsed = 0.3e9  # what reading the file's vocabulary and its largest tensor takes for a while
    assert max(rank["peak_memory_bytes"] for rank in report["rank_loads"]) < weights + imports + block + parsed
