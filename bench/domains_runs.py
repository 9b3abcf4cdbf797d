"""The runs of bench/domains.py: those that are missing are made, and of each a line is kept.

docs/results.jsonl                          what every run reached, with the page that is made of it
runs/domains/JOB/seed-1/dense/              the dense network, which all other runs of the seed prune
runs/domains/JOB/seed-1/magnitude-90/       a criterion at a sparsity, until it is complete
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
DENSE = "dense"
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
    """A run, and what its report says: the primary metric after pruning and after retraining, None where not finite.

    constant: with a dense network, what a predictor reaches that always says the same; None where there is none.
    """

    job: str
    seed: int
    run: str
    metric: str
    higher_is_better: bool
    pruned: float | None
    retrained: float | None
    trained: bool  # whether there was any retraining
    parameters: int
    prunable: int
    ranks: int
    cpu: str
    torch: str
    constant: float | None = None

    @classmethod
    def of(cls, domain: Domain, seed: int, run: str, report: dict[str, Any]) -> Result:
        metric = report["primary"]
        pruned, retrained = (each["metrics"][metric] for each in report["evaluations"][-2:])
        model, trained = report["model"], bool(report["exchange"]["steps"])
        return cls(
            *(domain.name, seed, run, metric, report["higher_is_better"], pruned, retrained, trained),
            *(model["parameters"], model["prunable"]),
            *(report["ranks"], report["host"]["cpu"], report["versions"]["torch"]),
        )


class Results:
    """The lines of a file. What is added is there at once, so that no figure is lost with the process."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        found = [Result(**json.loads(line)) for line in lines]
        self._found = {(each.job, each.seed, each.run): each for each in found}

    def get(self, domain: Domain, seed: int, run: str) -> Result | None:
        return self._found.get((domain.name, seed, run))

    def add(self, result: Result) -> None:
        self._write({**self._found, (result.job, result.seed, result.run): result})

    def forget(self, domain: Domain, seed: int) -> None:
        """Of a seed nothing is left."""
        self._write({key: each for key, each in self._found.items() if key[:2] != (domain.name, seed)})

    def of(self, domain: Domain, run: str) -> list[Result]:
        """Of all seeds that have it."""
        return [each for (job, _, name), each in sorted(self._found.items()) if (job, name) == (domain.name, run)]

    def seeds(self, domain: Domain) -> list[int]:
        """Those whose dense network was measured."""
        return [each.seed for each in self.of(domain, DENSE)]

    def sought(self, domain: Domain, seed: int) -> dict[str, Result]:
        """What was tried of the other criteria, the best first."""
        found = {each: self.get(domain, seed, run_name(each, domain.sought_at)) for each in domain.others}
        there = [(each, result) for each, result in found.items() if result is not None]
        return dict(sorted(there, key=lambda pair: _loss(pair[1])))

    def criteria(self, domain: Domain, seed: int) -> list[str]:
        """Those that are compared: random, magnitude, and the best other of a seed."""
        return [*BASES, *[*self.sought(domain, seed)][:1]]

    def _write(self, found: dict[tuple[str, int, str], Result]) -> None:
        self._found = dict(sorted(found.items(), key=lambda item: item[0][:2]))
        write_text(self._file, "".join(json.dumps(each._asdict()) + "\n" for each in self._found.values()))


class Runs(NamedTuple):
    """Those in a folder, which are forgotten once they are in the results; of a seed the dense network is kept.

    hpcprune: runs `hpcprune` with some words, and gives its exit status and what it said of errors.
    """

    out: Path
    results: Results
    hpcprune: Callable[..., tuple[int, str]]
    say: Callable[[str], None] = print

    def measure(self, domain: Domain, seed: int, first: int) -> None:
        """Make the runs of a seed that are missing. The best other criterion is that of seed `first`."""
        failed: set[tuple[str, float]] = set()
        while missing := [each for each in self._missing(domain, seed, first) if each not in failed]:
            criterion, sparsity = missing[0]
            if criterion != DENSE and not self._dense(domain, seed).is_file():
                self.results.forget(domain, seed)  # for all are to prune one network
            elif not self._run(domain, seed, criterion, sparsity):
                if criterion == DENSE:
                    return
                failed.add(missing[0])

    def _missing(self, domain: Domain, seed: int, first: int) -> list[tuple[str, float]]:
        """Criteria and sparsities. More may be missing after those: the others are tried before the best is known."""
        others = [(other, domain.sought_at) for other in domain.others if seed == first]
        compared = [(c, s) for c in self.results.criteria(domain, first) for s in domain.sparsities]
        wanted = [(DENSE, 0.0), *others, *compared]
        return [each for each in wanted if self.results.get(domain, seed, run_name(*each)) is None]

    def _run(self, domain: Domain, seed: int, criterion: str, sparsity: float) -> bool:
        """Make a run, or what is left of it; whether it is complete."""
        name = run_name(criterion, sparsity)
        out = self._folder(domain, seed) / name
        self.say(f"{domain.name}, seed {seed}: {name}")
        weights_alone = ("prune.what=[weights]", "prune.graph=null", "evaluate.sparse=never")
        one_round = ("prune.rounds=1", "prune.schedule=one-shot")
        given = (f"seed={seed}", *weights_alone, *one_round, *domain.given, f"prune.sparsity={sparsity}")
        if criterion == DENSE:
            own: tuple[str, ...] = ("retrain.steps=null", "retrain.epochs=0")
        else:
            # What belongs to the job's own criterion is not that of others.
            unset = "prune.calibrate=null" if criterion in BASES else "prune.scope=null"
            own = (f"weights={self._dense(domain, seed).absolute()}", f"prune.criterion={criterion}", unset)
        code, told = self.hpcprune("run", domain.file, *given, *own, "--out", out)
        if code:
            self.say(f"{domain.name}, seed {seed}: {name} failed:\n{told[-2000:]}")
            return False
        result = Result.of(domain, seed, name, json.loads((out / "report.json").read_text()))
        if criterion == DENSE:
            result = result._replace(constant=constant_predictor(domain))
        self.results.add(result)
        if criterion != DENSE:
            shutil.rmtree(out)
        return True

    def _dense(self, domain: Domain, seed: int) -> Path:
        return self._folder(domain, seed) / DENSE / "dense.h5"

    def _folder(self, domain: Domain, seed: int) -> Path:
        return self.out / domain.name / f"seed-{seed}"


def run_name(criterion: str, sparsity: float) -> str:
    """As in the results."""
    return f"{criterion}-{100 * sparsity:g}" if criterion != DENSE else DENSE


def _loss(result: Result) -> float:
    """What is least for the best."""
    if result.retrained is None:
        return float("inf")
    return -result.retrained if result.higher_is_better else result.retrained


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
