"""Tasks: found by file or by module, and every mistake in one told with what was given and the user's own line."""

from __future__ import annotations

import re
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset
from torchmetrics import MeanAbsoluteError, Metric, R2Score

import hpcprune
from hpcprune.errors import TaskError
from hpcprune.evaluate import evaluate
from hpcprune.task import build_data, build_model, load_task, to_device
from hpcprune.world import World

BLOBS = """\
import hpcprune
import torch

class Blobs(hpcprune.Classifier):
    classes = 3
    def model(self):
        return torch.nn.Linear(2, 3)
    def data(self):
        samples = torch.utils.data.TensorDataset(torch.zeros(9, 2), torch.zeros(9, dtype=torch.long))
        return hpcprune.Data(train=samples, test=samples)
"""
OTHER = "\nclass Other(Blobs):\n    pass\n"
NO_CLASSES = BLOBS.replace("    classes = 3\n", "")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A job's folder; what is imported from it is forgotten afterwards."""
    path, modules = sys.path.copy(), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# Where a task comes from


@pytest.mark.parametrize(
    ("files", "task", "found"),
    [
        ({"task.py": BLOBS}, "task.py", "Blobs"),
        ({"task.py": BLOBS}, "task.py:Blobs", "Blobs"),
        ({"task.py": BLOBS + OTHER}, "task.py:Other", "Other"),
        ({"tasks/of mine.py": BLOBS}, "tasks/of mine.py", "Blobs"),
        ({"blobs_module.py": BLOBS}, "blobs_module", "Blobs"),
        ({"blobs_module.py": BLOBS + OTHER}, "blobs_module:Other", "Other"),
        ({"blobs_package/__init__.py": "", "blobs_package/deep.py": BLOBS}, "blobs_package.deep:Blobs", "Blobs"),
        ({"neighbour.py": BLOBS, "task.py": "from neighbour import Blobs\n" + OTHER}, "task.py", "Other"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_task_is_found(folder: Path, files: dict[str, str], task: str, found: str) -> None:
    write(folder, files)
    loaded = load_task(task, folder)
    assert type(loaded).__name__ == found
    assert isinstance(loaded, hpcprune.Classifier)
    assert isinstance(build_model(loaded), nn.Linear)
    assert len(build_data(loaded, 3).train) == 9  # type: ignore[arg-type]


SYNTAX = BLOBS.replace("classes = 3", "classes = = 3")
RAISES = BLOBS + "\nnothing = 1 / 0\n"
IN_TORCH = BLOBS + "\nmodel = torch.nn.Linear(-1, 2)\n"
EXITS = BLOBS + "\nraise SystemExit('no data here')\n"
INIT = BLOBS + "    def __init__(self):\n        raise ValueError('of two\\nlines')\n"
TWO = BLOBS + OTHER
HALF = "import hpcprune\nclass Half(hpcprune.Task):\n    def model(self): ..."
MISTAKES: dict[str, tuple[str | dict[str, str], str, str]] = {
    "no file": ({"b.py": "", "a.py": ""}, "task.py", r"no such file: {0}/task\.py; beside .*there is: a\.py, b\.py$"),
    "no file at all": ({}, "task.py", r"no such file: {0}/task\.py; no \.py file is beside the job file"),
    "no folder": ({}, "deep/task.py", r"no such file: {0}/deep/task\.py; no \.py file is beside the job file"),
    "a folder": ({"task.py/x": ""}, "task.py", r"no such file: {0}/task\.py"),
    "no class": ("x = 1", "task.py", r"task\.py has no class that derives from hpcprune\.Classifier or .*; add one"),
    "imported only": ("from hpcprune import Task", "task.py", r"task\.py has no class that derives"),
    "several": (TWO, "task.py", r"task\.py has several tasks \(Blobs, Other\); name one, as in task\.py:Blobs"),
    "nearly": (TWO, "task.py:Blob", r"task\.py has no task 'Blob'; did you mean Blobs\? \(it has: Blobs, Other\)"),
    "another": (BLOBS, "task.py:Xyz", r"task\.py has no task 'Xyz'; it has: Blobs"),
    "none": ("Xyz = 1", "task.py:Xyz", r"task\.py has no task 'Xyz'; it has: none"),
    "abstract": (HALF, "task.py", r"Half in task\.py does not define data, loss; add"),
    "no classes": (NO_CLASSES, "task.py", r"Blobs in task\.py does not say how many classes.*; add `classes = 10`"),
    "syntax": (SYNTAX, "task.py", r"invalid syntax.*{0}/task\.py:5: classes = = 3"),
    "raises": (RAISES, "task.py", r"{0}/task\.py raised ZeroDivisionError: .* \(at {0}/task\.py:12: nothing = 1 / 0"),
    "in a library": (IN_TORCH, "task.py", r"RuntimeError: .* \(at {0}/task\.py:12: model = torch\.nn\.Linear\(-1, 2"),
    "exits": (EXITS, "task.py", r"SystemExit: no data here \(at {0}/task\.py:12: raise SystemExit"),
    "made": (INIT, "task.py", r"Blobs\(\) raised ValueError: of two lines \(at {0}/task\.py:12: raise ValueError"),
    "neighbour": (
        {"task.py": "import neighbour", "neighbour.py": "\n\n1 / 0"},
        "task.py",
        r"ZeroDivisionError: .* \(at {0}/neighbour\.py:3: 1 / 0\)",
    ),
    "no module": ({}, "nowhere.at_all", r"'nowhere\.at_all' is neither a file .* \(name it with \.py\) nor an import"),
    "py forgotten": ({"blobs.task": ""}, "blobs.task", r"'blobs\.task' is neither a file"),
    "dependency": (
        {"needs_module.py": "import not_there"},
        "needs_module",
        r"importing needs_module raised ModuleNotFoundError: .*'not_there' \(at {0}/needs_module\.py:1: import not",
    ),
    "module raises": (
        {"raising_module.py": RAISES},
        "raising_module",
        r"importing raising_module raised ZeroDivisionError: .* \(at {0}/raising_module\.py:12: nothing = 1 / 0\)",
    ),
    "module without": ({"empty_module.py": ""}, "empty_module", r"empty_module has no class that derives"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(folder: Path, name: str) -> None:
    files, task, told = MISTAKES[name]
    write(folder, {"task.py": files} if isinstance(files, str) else files)
    with pytest.raises(TaskError) as caught:
        load_task(task, folder)
    assert re.match("task: .*" + told.replace("{0}", re.escape(str(folder))), str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


# What a task gives


class Given(hpcprune.Classifier):
    """A task that gives what it is told to, or raises it."""

    classes = 2

    def __init__(self, given: Any) -> None:
        self.given = given

    def model(self) -> nn.Module:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given  # type: ignore[no-any-return]

    def data(self) -> hpcprune.Data:
        return self.model()  # type: ignore[return-value]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([1])


def samples(number: int) -> TensorDataset:
    return TensorDataset(torch.zeros(number, 2))


def test_a_model_must_be_one() -> None:
    with pytest.raises(TaskError, match=r"^task: Given\.model\(\) gave list, not a torch\.nn\.Module$"):
        build_model(Given([nn.Linear(2, 2)]))
    here = rf"^task: Given\.model raised KeyError: 'x' \(at {re.escape(__file__)}:\d+: raise self\.given\)$"
    with pytest.raises(TaskError, match=here):
        build_model(Given(KeyError("x")))


@pytest.mark.parametrize(
    ("given", "ranks", "told"),
    [
        ((samples(3), samples(3)), 1, r"gave tuple; return hpcprune\.Data\(train=\.\.\., test=\.\.\.\)"),
        (
            hpcprune.Data(Endless(), samples(3)),
            1,
            r"\.train is Endless, without a length or indexing; give a map-style",
        ),
        (hpcprune.Data(samples(3), {1, 2}), 1, r"\.test is set, without a length or indexing"),  # type: ignore[arg-type]
        (hpcprune.Data(samples(0), samples(3)), 1, r"\.train has no samples; check where the data comes from"),
        (hpcprune.Data(samples(3), samples(0)), 1, r"\.test has no samples"),
        (hpcprune.Data(samples(9), samples(3)), 4, r"\.test has 3 samples for 4 ranks; use at most 3 ranks"),
        (OSError("no such digits"), 1, r"raised OSError: no such digits \(at .*test_task\.py:\d+: raise self\.given\)"),
    ],
)
def test_data_must_have_samples_for_every_rank(given: Any, ranks: int, told: str) -> None:
    with pytest.raises(TaskError, match=rf"^task: Given\.data.*{told}"):
        build_data(Given(given), ranks)


@pytest.mark.parametrize("dataset", [samples(4), [1, 2, 3, 4], "abcd"])
def test_anything_with_a_length_and_indexing_is_a_dataset(dataset: Any) -> None:
    data = hpcprune.Data(train=dataset, test=dataset)
    assert build_data(Given(data), 4) is data


# Batches


Pair = namedtuple("Pair", ["image", "label"])


def test_every_tensor_of_a_batch_goes_to_the_device() -> None:
    tensor = torch.ones(2)
    batch = {
        "pair": Pair(tensor, [tensor, "text"]),
        "deep": ({"deeper": [(tensor,)]}, None, 3, 2.5),
        "empty": ([], (), {}),
    }
    moved = to_device(batch, torch.device("meta"))
    assert type(moved["pair"]) is Pair
    for found in (moved["pair"].image, moved["pair"].label[0], moved["deep"][0]["deeper"][0][0]):
        assert found.device.type == "meta"
    assert (moved["pair"].label[1], moved["deep"][1:], moved["empty"]) == ("text", (None, 3, 2.5), ([], (), {}))
    assert tensor.device.type == "cpu" and batch["pair"].image is tensor  # type: ignore[union-attr]
    assert to_device(tensor, torch.device("meta")).device.type == "meta"


# Kinds of tasks


class Line(hpcprune.Task):
    """A regression whose samples are dictionaries, with everything of its own."""

    primary = "error"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Bilinear(3, 3, 2)

    def data(self) -> hpcprune.Data:
        generator = torch.Generator().manual_seed(0)
        left, right, wanted = (torch.randn(31, size, generator=generator) for size in (3, 3, 2))
        rows = [{"left": a, "right": b, "wanted": c} for a, b, c in zip(left, right, wanted, strict=True)]
        return hpcprune.Data(train=rows, test=rows)  # type: ignore[arg-type]

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["left"], batch["right"])

    def loss(self, output: Any, batch: Any) -> Tensor:
        return (output - batch["wanted"]).abs().pow(3).mean()

    def metrics(self) -> dict[str, Metric]:
        return {"error": MeanAbsoluteError(), "explained": R2Score()}

    def update(self, metrics: dict[str, Metric], output: Any, batch: Any) -> None:
        for metric in metrics.values():
            metric.update(output.flatten(), batch["wanted"].flatten())


def test_a_regression_is_evaluated_by_its_own_loss_and_metrics() -> None:
    task = Line()
    model, rows = build_model(task), build_data(task, 1).test
    found = evaluate(task, model, rows, 8, World.alone())
    left, right, wanted = (torch.stack([row[key] for row in rows]) for key in ("left", "right", "wanted"))  # type: ignore[attr-defined]
    off = (model(left, right) - wanted).detach().double().numpy()
    spread = wanted.double().numpy().reshape(-1)
    assert found.keys() == {"loss", "error", "explained"}
    assert found["loss"] == pytest.approx(np.mean(np.abs(off) ** 3), rel=1e-5)
    assert found["error"] == pytest.approx(np.mean(np.abs(off)), rel=1e-5)
    assert found["explained"] == pytest.approx(1 - np.sum(off**2) / np.sum((spread - spread.mean()) ** 2), rel=1e-4)


def test_a_classifier_brings_cross_entropy_and_four_metrics() -> None:
    task = Given(None)
    assert (task.primary, task.higher_is_better) == ("accuracy", True)
    assert list(task.metrics()) == ["accuracy", "f1", "precision", "recall"]
    scores = np.array([[2.0, -1.0], [0.5, 3.0], [0.0, 0.0]])
    expected = np.mean(np.log(np.exp(scores).sum(1)) - scores[[0, 1, 2], [0, 0, 1]])
    assert task.loss(torch.tensor(scores), (None, torch.tensor([0, 0, 1]))).item() == pytest.approx(expected)
    assert (hpcprune.Task.primary, hpcprune.Task.higher_is_better) == ("loss", False)
