"""The job: what one run is, as the job file says it.

The schema is the pydantic models below and nothing else: the messages about wrong values (see job_file.py),
docs/job-file.md and the defaults all follow from them, so that they cannot drift apart. Sections are frozen: a run
cannot change what it was asked to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationInfo
from pydantic_core import PydanticCustomError

from hpcprune.criteria import CRITERIA
from hpcprune.errors import show

__all__ = ["Job", "LrSchedule", "Optimizer", "Prune", "Training", "differences"]

# Which keys of a section belong to which `name`; a key of another name would be silently without effect.
_OPTIMIZER_KEYS = {"sgd": ("momentum", "nesterov"), "adam": ("betas",), "adamw": ("betas",)}
_LR_SCHEDULE_KEYS = {"constant": (), "linear": ("final",), "cosine": ("final",), "step": ("at", "factor")}


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text, and pydantic would take `true` for 1."""
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return float(value) if isinstance(value, str) else value


_PARSED = BeforeValidator(_number)
_Count = Annotated[int, Field(ge=1), _PARSED]
_Fraction = Annotated[float, Field(ge=0, lt=1), _PARSED]
_Positive = Annotated[float, Field(gt=0), _PARSED]
_NotNegative = Annotated[float, Field(ge=0), _PARSED]
_Text = Annotated[str, Field(min_length=1)]


def _refuse(text: str) -> PydanticCustomError:
    """An error whose text is shown as it is, after the key."""
    return PydanticCustomError("job", "{text}", {"text": text})


def _own_keys(section: BaseModel, belonging: Mapping[str, Sequence[str]]) -> None:
    name = str(getattr(section, "name"))  # noqa: B009  (BaseModel has no `name` for mypy)
    special = {key for keys_of_name in belonging.values() for key in keys_of_name}
    for key in sorted(section.model_fields_set & special - set(belonging[name])):
        names = " and ".join(other for other, its in belonging.items() if key in its)
        raise _refuse(f'{key} belongs to {names}, not to {name}; remove it (or write "name: {names.split()[0]}")')


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _empty(cls, data: Any) -> Any:
        """A section whose keys are all commented out reads as null, and means the defaults."""
        return {} if data is None else data


class Optimizer(_Section):
    """How the weights are stepped; the names and meanings are torch.optim's."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer."""
    lr: _Positive = Field(default=None, validate_default=True)
    """The learning rate; where it is not given, 0.01 for sgd and 0.001 for adam and adamw."""
    momentum: _Fraction = 0.9
    """sgd: the share of the last step that goes on."""
    nesterov: bool = False
    """sgd: Nesterov's momentum instead of the classical; needs momentum above 0."""
    weight_decay: _NotNegative = 0.0
    """The pull of all weights to zero; pruned weights stay zero with or without it."""
    betas: tuple[_Fraction, _Fraction] = (0.9, 0.999)
    """adam and adamw: the decay of the running means of the gradient and of its square."""

    @pydantic.field_validator("lr", mode="before")
    @classmethod
    def _lr_of_name(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return 0.01 if info.data.get("name") == "sgd" else 0.001
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        _own_keys(self, _OPTIMIZER_KEYS)
        if self.nesterov and not self.momentum:
            raise _refuse("nesterov needs momentum above 0; give momentum, or remove nesterov")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _of_name(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _keep_own(handler(self), _OPTIMIZER_KEYS)


class LrSchedule(_Section):
    """The learning rate over the steps of one training; every round starts it anew."""

    name: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[int, Field(ge=0), _PARSED] = 0
    """Steps over which the learning rate rises linearly to `lr` first."""
    final: Annotated[float, Field(ge=0, le=1), _PARSED] = 0.0
    """linear and cosine: the share of `lr` that the end of the training approaches."""
    at: tuple[_Fraction, ...] = Field(default=(0.5, 0.75), min_length=1)
    """step: where the learning rate falls, as shares of the steps after the warm-up, rising."""
    factor: Annotated[float, Field(gt=0, le=1), _PARSED] = 0.1
    """step: what the learning rate is multiplied by at each of them."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> LrSchedule:
        _own_keys(self, _LR_SCHEDULE_KEYS)
        if list(self.at) != sorted(set(self.at)):
            raise _refuse(f"at: {show(self.at)} does not rise; write the shares from the smallest to the largest")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _of_name(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _keep_own(handler(self), _LR_SCHEDULE_KEYS)


def _keep_own(values: dict[str, Any], belonging: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    others = {key for its in belonging.values() for key in its} - set(belonging[values["name"]])
    return {key: value for key, value in values.items() if key not in others}


class Training(_Section):
    """How long and how to train."""

    epochs: _NotNegative | None = None
    """Passes over the training data (a round, in `retrain`); a fraction is a part of a pass, 0 is no training."""
    steps: Annotated[int, Field(ge=0), _PARSED] | None = None
    """Optimizer steps (a round, in `retrain`); give either `epochs` or `steps`."""
    batch_size: _Count = 64
    """Samples a step."""
    batch_per: Literal["global", "rank"] = "global"
    """Whether `batch_size` is that of all ranks together or of each rank."""
    optimizer: Optimizer = Optimizer()
    """How the weights are stepped."""
    lr_schedule: LrSchedule = LrSchedule()
    """The learning rate over the steps."""

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is None and self.steps is None:
            raise _refuse("how long? give epochs or steps (0 is no training)")
        if self.epochs is not None and self.steps is not None:
            raise _refuse("epochs and steps are both given; keep one (null takes the other back)")
        return self


class Prune(_Section):
    """What is pruned, how much of it, and over how many rounds."""

    criterion: str = Field(default="magnitude", json_schema_extra={"enum": list(CRITERIA)})
    """How a weight is scored; the lowest scores go."""
    sparsity: _Fraction
    """The share of the prunable weights that is gone at the end."""
    scope: Literal["global", "layer"] = "global"
    """What is ranked together: all layers, or each layer on its own (every layer then has the same sparsity)."""
    rounds: _Count = 1
    """How many times it is pruned and retrained."""
    schedule: Literal["one-shot", "linear", "cubic"] = Field(default=None, validate_default=True)
    """The sparsity over the rounds; where it is not given, one-shot for 1 round and cubic for more."""
    include: tuple[_Text, ...] = Field(default=("*",), min_length=1)
    """Which of the weights of Linear, Conv and RNN layers are prunable: patterns (`*`, `?`, `[abc]`) on the name of the
    parameter or of its module."""
    exclude: tuple[_Text, ...] = ()
    """Which of the included are left alone: patterns like those of `include`."""

    @pydantic.field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in CRITERIA:
            raise ValueError("unknown criterion")
        return value

    @pydantic.field_validator("schedule", mode="before")
    @classmethod
    def _schedule_of_rounds(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return "one-shot" if info.data.get("rounds", 1) == 1 else "cubic"
        return value

    @pydantic.model_validator(mode="after")
    def _one_shot_is_one(self) -> Prune:
        if self.schedule == "one-shot" and self.rounds != 1:
            raise _refuse(f"one-shot is 1 round, not {self.rounds}; write schedule: cubic (or linear), or rounds: 1")
        return self


class Evaluate(_Section):
    """How the model is evaluated; nothing here changes the result."""

    batch_size: _Count = 256
    """Samples a forward pass on each rank."""


class Checkpoint(_Section):
    """When a run is saved, so that the same command goes on where it was cut."""

    every_steps: _Count | None = None
    """Optimizer steps between checkpoints; null saves at the end of every training and round."""
    keep: _Count = 2
    """How many of the newest checkpoints stay."""


class WorldLimits(_Section):
    """How the ranks keep together."""

    timeout: _Positive = 300.0
    """Seconds that a collective waits before it names the ranks that are missing and ends the run."""
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGXCPU"] = "SIGUSR1"
    """The signal that, like SIGTERM, ends the run at the next step with a checkpoint."""


class Job(_Section):
    """One run, as its job file and the overrides resolve it."""

    task: _Text
    """The model and the data: a file beside the job file (`task.py`, `task.py:Name`), or what Python can import
    (`package.module`, `package.module:Name`)."""
    seed: Annotated[int, Field(ge=0, lt=2**32), _PARSED] = 0
    """Everything random follows from it."""
    out: _Text = Field(default=None, validate_default=True)
    """The run's folder, relative to the current directory; where it is not given, runs/ and the name of the job
    file's folder."""
    weights: _Text = "train"
    """Where the dense weights come from: `train`, or a file (relative to the job file): a torch state dict (.pt, .pth),
    .safetensors, or a checkpoint of hpcprune (.h5)."""
    train: Training | None = None
    """The dense training; needed, and used, when `weights` is `train`."""
    prune: Prune
    """What is pruned."""
    retrain: Training
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
            raise _refuse("train: missing, and weights is train; say how to train, or name a file in weights")
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
        """The file of the dense weights (which may not exist), or None where they are trained."""
        return None if self.weights == "train" else self.folder / self.weights

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

        Not in it: out, evaluate, checkpoint, world, where the files lie. In it: the contents of the task's file.
        """
        sha = hashlib.sha256(json.dumps(_determining(self), sort_keys=True).encode())
        if self.task_file is not None and self.task_file.is_file():
            sha.update(self.task_file.read_bytes())
        return sha.hexdigest()


def _determining(job: Job) -> dict[str, Any]:
    values = job.model_dump(mode="json", exclude={"out", "evaluate", "checkpoint", "world"})
    if job.weights_file is not None:
        values["weights"] = job.weights_file.name
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
