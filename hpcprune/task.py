"""The task: what the user brings. A model and data; loss and metrics come with the kind of task.

A task is a class in a Python file beside the job file. For a classifier it is `model` and `data` and nothing else:

    class Digits(hpcprune.Classifier):
        classes = 10

        def model(self): return nn.Sequential(...)

        def data(self): return hpcprune.Data(train=TensorDataset(...), test=TensorDataset(...))

Other tasks derive from `Task` and say what their loss and metrics are.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from hpcprune.errors import HpcpruneError, TaskError

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Classifier", "Data", "Task", "divergence", "load_task"]


@dataclass(frozen=True)
class Data:
    """Map-style datasets (with `__len__` and `__getitem__`) whose items are what one sample of a batch is made of."""

    train: Dataset[Any]
    test: Dataset[Any]


class Task(ABC):
    """A model, data, a loss and metrics. Derive from `Classifier` where that is what it is."""

    primary: str = "loss"
    """The metric that the report leads with."""
    higher_is_better: bool = False
    """Whether a higher value of the primary metric is a better one."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model on the CPU. Random weights follow from the job's seed, which is set before."""

    @abstractmethod
    def data(self) -> Data:
        """The training and the test data, the same on every rank; each rank then takes its own part."""

    @abstractmethod
    def loss(self, output: Any, batch: Any) -> Tensor:
        """The mean loss over the batch's samples, a scalar."""

    def distance(self, output: Any, target: Any, temperature: float) -> Tensor:
        """How far the output is from the dense network's, where that teaches it; the mean over the batch's samples."""
        if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
            raise TaskError(
                f"task: {type(self).__name__} gives {type(output).__name__}, of which no distance is known; define "
                "distance(output, target, temperature), or remove retrain.distill"
            )
        return F.mse_loss(output, target)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch; by default for the first of the batch's parts."""
        return model(batch[0])

    def metrics(self) -> dict[str, Metric]:
        """New torchmetrics by name; the loss is always reported and need not be among them."""
        return {}

    def update(self, metrics: dict[str, Metric], output: Any, batch: Any) -> None:
        """Take a batch into the metrics; by default each compares the output with the batch's second part."""
        for metric in metrics.values():
            metric.update(output, batch[1])


class Classifier(Task):
    """A task whose samples are (input, class number) and whose model gives a score for each of `classes`.

    Cross-entropy; accuracy, and F1, precision and recall as unweighted means over the classes (macro). With `names` of
    the classes the report has the F1 of each too.
    """

    classes: int
    names: Sequence[str] = ()
    primary = "accuracy"
    higher_is_better = True

    def loss(self, output: Any, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])

    def distance(self, output: Any, target: Any, temperature: float) -> Tensor:
        return divergence(output, target, temperature)

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics import ClasswiseWrapper
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassF1Score,
            MulticlassPrecision,
            MulticlassRecall,
        )

        found: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(self.classes, average="micro"),
            "f1": MulticlassF1Score(self.classes, average="macro"),
            "precision": MulticlassPrecision(self.classes, average="macro"),
            "recall": MulticlassRecall(self.classes, average="macro"),
        }
        if self.names:
            of_each = MulticlassF1Score(self.classes, average=None)
            found["f1 of each"] = ClasswiseWrapper(of_each, [*self.names], prefix="f1 of ")
        return found


def divergence(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence of softened scores [samples, classes, ...], times the temperature's square.

    With that, gradients are as large at any temperature. Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015, https://arxiv.org/abs/1503.02531
    """
    found, wanted = (F.log_softmax(scores / temperature, dim=1) for scores in (output, target))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


def load_task(task: str, folder: Path) -> Task:
    """The task that a job names: `task.py`, `task.py:Name` (beside the job file) or `package.module[:Name]`.

    Raises:
        TaskError: there is no such file, module or class, or the file raises when it is run.
    """
    source, _, wanted = task.partition(":")
    module = _run_file(folder / source) if source.endswith(".py") else _import(source, folder)
    tasks = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Task)}
    # A task may be named that the file has from elsewhere; one that is not named is the file's own, and no base of it.
    own = {name: value for name, value in tasks.items() if value.__module__ == module.__name__}
    found = tasks if wanted in tasks else {n: v for n, v in own.items() if not inspect.isabstract(v)} or own
    if not wanted and len(found) == 1:
        wanted = next(iter(found))
    if wanted not in found:
        have = ", ".join(found) or "none"
        if wanted:
            near = difflib.get_close_matches(wanted, found, n=1)
            hint = f"did you mean {near[0]}? (it has: {have})" if near else f"it has: {have}"
            raise TaskError(f"task: {source} has no task {wanted!r}; {hint}")
        if found:
            raise TaskError(f"task: {source} has several tasks ({have}); name one, as in {source}:{next(iter(found))}")
        raise TaskError(f"task: {source} has no class that derives from hpcprune.Classifier or hpcprune.Task; add one")
    if inspect.isabstract(found[wanted]):
        missing = ", ".join(sorted(found[wanted].__abstractmethods__))
        raise TaskError(f"task: {wanted} in {source} does not define {missing}; add it")
    if issubclass(found[wanted], Classifier) and not isinstance(getattr(found[wanted], "classes", None), int):
        raise TaskError(f"task: {wanted} in {source} does not say how many classes there are; add `classes = 10`")
    return call_user(found[wanted], f"{wanted}()")  # type: ignore[no-any-return]


def call_user(function: Any, name: str) -> Any:
    """Call the user's code; what it raises becomes a TaskError that shows the user's own line."""
    try:
        return function()
    except HpcpruneError:  # says what to do already
        raise
    except (Exception, SystemExit) as error:  # a task that says sys.exit() would end the run without a word
        raise TaskError(f"task: {name} raised {_own_line(error)}") from error


def build_model(task: Task) -> nn.Module:
    """The task's model, checked to be one."""
    model = call_user(task.model, f"{type(task).__name__}.model")
    if not isinstance(model, nn.Module):
        raise TaskError(f"task: {type(task).__name__}.model() gave {type(model).__name__}, not a torch.nn.Module")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise TaskError(
            f"task: {type(task).__name__}.model(): the shape of {lazy[0]} is not known yet; call the model once on a "
            "batch before it is returned"
        )
    return model


def build_data(task: Task, ranks: int) -> Data:
    """The task's data, checked to have a sample a rank at least."""
    name = f"{type(task).__name__}.data"
    data = call_user(task.data, name)
    if not isinstance(data, Data):
        raise TaskError(f"task: {name}() gave {type(data).__name__}; return hpcprune.Data(train=..., test=...)")
    for part, dataset in (("train", data.train), ("test", data.test)):
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TaskError(
                f"task: {name}().{part} is {type(dataset).__name__}, without a length or indexing; give a map-style "
                "dataset, such as torch.utils.data.TensorDataset"
            )
        if len(dataset) == 0:
            raise TaskError(f"task: {name}().{part} has no samples; check where the data comes from")
        if len(dataset) < ranks:
            raise TaskError(
                f"task: {name}().{part} has {len(dataset)} samples for {ranks} ranks; use at most {len(dataset)} ranks"
            )
    return data


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f"beside the job file there is: {', '.join(near)}" if near else "no .py file is beside the job file"
        raise TaskError(f"task: no such file: {path}; {hint}")
    name = f"hpcprune_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task: {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))  # as for a script: a task may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError(f"task: {path} raised {_own_line(error)}") from error
    return module


def _import(name: str, folder: Path) -> ModuleType:
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TaskError(
                f"task: {name!r} is neither a file beside the job file (name it with .py) nor an importable module"
            ) from error
        raise TaskError(f"task: importing {name} raised {_own_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise TaskError(f"task: importing {name} raised {_own_line(error)}") from error


def _own_line(error: BaseException) -> str:
    """The error with the innermost line that is neither Python's nor an installed package's: the user's own."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{type(error).__name__}: {error.msg} (at {error.filename}:{error.lineno}: {(error.text or '').strip()})"
    ours, python = Path(__file__).resolve().parent, Path(sysconfig.get_path("stdlib"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.lineno and not f.filename.startswith("<")]
    frames = [f for f in frames if not Path(f.filename).resolve().is_relative_to(ours)]
    own = [f for f in frames if "site-packages" not in f.filename and not Path(f.filename).is_relative_to(python)]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    where = (own or frames)[-1:]
    return f"{text} (at {where[0].filename}:{where[0].lineno}: {where[0].line})" if where else text


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors, in whatever tuples, lists and dicts, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
