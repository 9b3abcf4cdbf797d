"""The job: what one run is, as the job file says it.

The schema is the pydantic models below and nothing else: the messages about wrong values (see job_file.py),
docs/job-file.md and the defaults all follow from them, so that they cannot drift apart. Sections are frozen: a run
cannot change what it was asked to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, PrivateAttr, ValidationInfo

from hpcprune.errors import show
from hpcprune.prune_section import Prune
from hpcprune.section import PARSED, Count, Positive, Section, Text, refuse
from hpcprune.training import Retraining, Training

__all__ = ["Job", "differences"]


class Evaluate(Section):
    """How the model is evaluated; nothing here changes the result."""

    batch_size: Count = 256
    """Samples a forward pass on each rank."""
    sparse: Literal["auto", "never"] = "auto"
    """How the pruned network is timed at the end: `auto` with sparse kernels in the layers that are faster so, as
    measured; `never` as a dense one."""


class Checkpoint(Section):
    """When a run is saved, so that the same command goes on where it was cut."""

    every_steps: Count | None = None
    """Optimizer steps between checkpoints; null saves after every pruning and every training alone."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints, by the clock of rank 0; may be given beside `every_steps`."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""


class WorldLimits(Section):
    """How the ranks keep together."""

    timeout: Positive = 300.0
    """Seconds that a collective waits before it names the ranks that are missing and ends the run."""
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGXCPU"] = "SIGUSR1"
    """The signal that, like SIGTERM, ends the run at the next step with a checkpoint."""


class Job(Section):
    """One run, as its job file and the overrides resolve it."""

    task: Text
    """The model and the data: a file beside the job file (`task.py`, `task.py:Name`), or what Python can import
    (`package.module`, `package.module:Name`)."""
    seed: Annotated[int, Field(ge=0, lt=2**32), PARSED] = 0
    """Everything random follows from it."""
    out: Text = Field(default=None, validate_default=True)
    """The run's folder, relative to the current directory; where it is not given, runs/ and the name of the job
    file's folder."""
    weights: Text = "train"
    """Where the dense weights come from: `train`; `task`, where its model brings them; or a file (relative to the job
    file): a torch state dict (.pt, .pth), .safetensors, or a checkpoint of hpcprune (.h5)."""
    train: Training | None = None
    """The dense training; needed, and used, when `weights` is `train`."""
    prune: Prune
    """What is pruned."""
    retrain: Retraining
    """The training after each round; `epochs: 0` for none."""
    evaluate: Evaluate = Evaluate()
    """How the model is evaluated."""
    checkpoint: Checkpoint = Checkpoint()
    """When the run is saved."""
    world: WorldLimits = WorldLimits()
    """How long ranks wait for one another, and what stops them."""
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @pydantic.field_validator("out", mode="before")
    @classmethod
    def _out_of_folder(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            folder: Path = (info.context or {}).get("folder", Path.cwd())
            return f"runs/{folder.resolve().name or 'job'}"
        return value

    @pydantic.model_validator(mode="after")
    def _dense_weights(self) -> Job:
        if self.weights == "train" and self.train is None:
            raise refuse("train: missing, and weights is train; say how to train, or name a file in weights, or task")
        return self

    @pydantic.model_validator(mode="after")
    def _rewinds_what_is_trained(self) -> Job:
        if self.weights != "train":
            if self.prune.rewind is not None:
                raise refuse(f"prune.rewind: weights is {self.weights}, so no step is trained to go back to; remove it")
            if self.retrain.lr_schedule.name == "rewind":
                raise refuse(
                    f"retrain.lr_schedule.name: weights is {self.weights}, so there is no dense training to rewind to; "
                    "write constant, linear, cosine or step"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _criterion_can_work(self) -> Job:
        for kind, criterion in self.prune.criteria.items():
            refusal = criterion.refusal(self)
            if refusal:
                raise refuse(f"prune.{'graph.' if kind == 'edges' else ''}criterion: {refusal}")
        return self

    def model_post_init(self, context: Any, /) -> None:
        if context:
            self._folder = context["folder"]

    @property
    def folder(self) -> Path:
        """The job file's folder, which task and weights are relative to (of a job made in Python: the current one)."""
        return self._folder

    @property
    def task_file(self) -> Path | None:
        """The task's file (which may not exist), or None where the task is an importable name."""
        name = self.task.split(":")[0]
        return self.folder / name if name.endswith(".py") else None

    @property
    def weights_file(self) -> Path | None:
        """The file of the dense weights (which may not exist), or None where they are trained or the task's."""
        return None if self.weights in ("train", "task") else self.folder / self.weights

    def to_yaml(self, beside: Path | None = None) -> str:
        """The resolved job as YAML that `load_job` reads back to an equal job.

        beside: the folder the text will lie in; paths are made relative to it (default: the job file's own folder).
        """
        values = self.model_dump(mode="json")
        if beside is not None:
            if self.task_file is not None:
                name, colon, attribute = self.task.partition(":")
                values["task"] = os.path.relpath(self.folder / name, beside) + colon + attribute
            if self.weights_file is not None:
                values["weights"] = os.path.relpath(self.weights_file, beside)
        return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def digest(self) -> str:
        """sha256 (hex) over what determines the result: a folder of an equal digest may be gone on with.

        Not in it: out, evaluate, checkpoint, world, how gradients are carried (but for bucket_mb with top_k), where the
        files lie. In it: the contents of the task's file.
        """
        sha = hashlib.sha256(json.dumps(_determining(self), sort_keys=True).encode())
        if self.task_file is not None and self.task_file.is_file():
            sha.update(self.task_file.read_bytes())
        return sha.hexdigest()


def _determining(job: Job) -> dict[str, Any]:
    carriage = {"exchange", "bucket_mb", "packing"}
    if job.retrain.top_k is not None:
        carriage.remove("bucket_mb")  # what is largest is chosen within a bucket
    others = {"out", "evaluate", "checkpoint", "world"}
    values = job.model_dump(mode="json", exclude={**dict.fromkeys(others, True), "retrain": carriage})
    if job.weights_file is not None:
        values["weights"] = job.weights_file.name
    if job.weights != "train":
        values["train"] = None
    if job.task_file is not None:
        values["task"] = Path(job.task).name
    return dict(_flat(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(theirs: Job, ours: Job) -> list[str]:
    """The keys that determine the result and differ, each as `prune.sparsity (0.9 there, 0.95 here)`.

    Empty although the digests differ: the task's file has changed.
    """
    a, b = _determining(theirs), _determining(ours)
    return [f"{k} ({show(a.get(k))} there, {show(b.get(k))} here)" for k in {**a, **b} if a.get(k) != b.get(k)]
