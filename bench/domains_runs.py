"""The runs of bench/domains.py: each a folder of its own, made where it is missing, and what their reports say.

runs/domains/JOB/constant.json              what a predictor reaches that always says the same
runs/domains/JOB/seed-1/dense/              the dense network, which all other runs of the seed prune
runs/domains/JOB/seed-1/magnitude-90/       a criterion at a sparsity
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcprune.job_file import load_job
from hpcprune.report.write import write_text
from tests.conftest import ROOT, launch_command, launch_environment

BASES = ("random", "magnitude")
PATIENCE = 60  # seconds that a run has for its checkpoint when it is told to stop


class Domain(NamedTuple):
    """A job, and what of it is measured.

    job: its folder, under jobs/. others: the criteria of which the best is taken, as found at `sought_at` on a seed.
    tolerance: how much worse than dense, in the metric's own unit, still counts as kept. given: other keys of the job.
    called: its name, where a job has several.
    """

    job: str
    others: tuple[str, ...]
    tolerance: float
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    sought_at: float = 0.9
    given: tuple[str, ...] = ()
    called: str = ""

    @property
    def file(self) -> Path:
        return ROOT / "jobs" / self.job / "job.yaml"

    @property
    def name(self) -> str:
        return self.called or Path(self.job).name


class Result(NamedTuple):
    """What a report says: the primary metric after pruning, and after retraining; NaN where it was not finite."""

    report: dict[str, Any]

    @property
    def metric(self) -> str:
        return str(self.report["primary"])

    @property
    def higher_is_better(self) -> bool:
        return bool(self.report["higher_is_better"])

    @property
    def trained(self) -> bool:
        """Whether there was any retraining."""
        return bool(self.report["exchange"]["steps"])

    @property
    def pruned(self) -> float:
        return self._reached(-2)

    @property
    def retrained(self) -> float:
        return self._reached(-1)

    def _reached(self, evaluation: int) -> float:
        value = self.report["evaluations"][evaluation]["metrics"][self.metric]
        return float("nan") if value is None else float(value)


class Runs(NamedTuple):
    """Those in a folder. Of each its report is kept, and the dense network's weights.

    hpcprune: runs `hpcprune` with some words, and gives its exit status and what it said of errors.
    """

    out: Path
    hpcprune: Callable[..., tuple[int, str]]
    say: Callable[[str], None] = print

    # Made

    def measure(self, domain: Domain, seed: int, first: int) -> None:
        """Make the runs of a seed that are missing. The best other criterion is that of seed `first`."""
        self._note_constant(domain)
        if not self._run(domain, seed, "dense", "prune.sparsity=0", "retrain.steps=null", "retrain.epochs=0"):
            return
        for other in domain.others if seed == first else ():
            self._prune(domain, seed, other, domain.sought_at)
        for criterion in self.criteria(domain, first):
            for sparsity in domain.sparsities:
                self._prune(domain, seed, criterion, sparsity)

    def _prune(self, domain: Domain, seed: int, criterion: str, sparsity: float) -> None:
        dense = (self._folder(domain, seed) / "dense/dense.h5").absolute()
        # What belongs to the job's own criterion is not that of others.
        own = ("prune.calibrate=null",) if criterion in BASES else ("prune.scope=null",)
        given = (f"prune.criterion={criterion}", *own, f"prune.sparsity={sparsity}")
        self._run(domain, seed, _name(criterion, sparsity), f"weights={dense}", *given)

    def _run(self, domain: Domain, seed: int, name: str, *overrides: str) -> bool:
        """Make a run, or what is left of it; whether it is complete."""
        out = self._folder(domain, seed) / name
        if not (out / "report.json").is_file():
            self.say(f"{domain.name}, seed {seed}: {name}")
            weights_alone = ("prune.what=[weights]", "prune.graph=null", "evaluate.sparse=never")
            one_round = ("prune.rounds=1", "prune.schedule=one-shot")
            given = (f"seed={seed}", *weights_alone, *one_round, *domain.given, *overrides)
            code, told = self.hpcprune("run", domain.file, *given, "--out", out)
            if code:
                self.say(f"{domain.name}, seed {seed}: {name} failed:\n{told[-2000:]}")
                return False
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        (out / "model.h5").unlink(missing_ok=True)
        return True

    def _note_constant(self, domain: Domain) -> None:
        file = self._constant(domain)
        if not file.is_file():  # for it takes the data
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(constant_predictor(domain)) + "\n")

    # There

    def seeds(self, domain: Domain) -> list[int]:
        """Those whose dense network is there."""
        found = (self.out / domain.name).glob("seed-*/dense/report.json")
        return sorted(int(file.parent.parent.name.removeprefix("seed-")) for file in found)

    def dense(self, domain: Domain, seed: int) -> Result:
        return Result(json.loads((self._folder(domain, seed) / "dense/report.json").read_text()))

    def pruned(self, domain: Domain, seed: int, criterion: str, sparsity: float) -> Result | None:
        """None where it is missing."""
        file = self._folder(domain, seed) / _name(criterion, sparsity) / "report.json"
        return Result(json.loads(file.read_text())) if file.is_file() else None

    def constant(self, domain: Domain) -> float | None:
        """What a predictor reaches that always says the same; None where there is none for the metric."""
        value: float | None = json.loads(self._constant(domain).read_text())
        return value

    def sought(self, domain: Domain, seed: int) -> dict[str, Result]:
        """What was tried of the other criteria, the best first."""
        found = {each: self.pruned(domain, seed, each, domain.sought_at) for each in domain.others}
        there = [(each, result) for each, result in found.items() if result is not None]
        return dict(sorted(there, key=lambda pair: pair[1].retrained * (-1 if pair[1].higher_is_better else 1)))

    def criteria(self, domain: Domain, seed: int) -> list[str]:
        """Those that are compared: random, magnitude, and the best other of a seed."""
        return [*BASES, *[*self.sought(domain, seed)][:1]]

    def _folder(self, domain: Domain, seed: int) -> Path:
        return self.out / domain.name / f"seed-{seed}"

    def _constant(self, domain: Domain) -> Path:
        return self.out / domain.name / "constant.json"


def _name(criterion: str, sparsity: float) -> str:
    return f"{criterion}-{100 * sparsity:g}"


def launch(ranks: int, *words: str | Path) -> tuple[int, str]:
    """Run hpcprune on some ranks; what ends this process ends them, with a checkpoint."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = launch_command(ranks, "hpcprune", *words)
    with subprocess.Popen(command, env=launch_environment(), **quiet) as process:  # type: ignore[call-overload]
        try:
            _, told = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate(timeout=PATIENCE)
            raise
    return process.returncode, told


def constant_predictor(domain: Domain) -> float | None:
    """What the most frequent class, or the mean value, of the training data reaches on the test data."""
    import torch

    from hpcprune.task import build_data, load_task

    job = load_job(domain.file)
    task = load_task(job.task, job.folder)
    if task.primary not in ("accuracy", "rmse"):
        return None
    data = build_data(task, 1)
    train, test = (torch.tensor([part[n][1] for n in range(len(part))]) for part in (data.train, data.test))  # type: ignore[arg-type]
    if task.primary == "accuracy":
        return float((test == train.mode().values).double().mean())
    return float((test - train.mean()).square().mean().sqrt())
