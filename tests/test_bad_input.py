"""Mistakes of users, made for real on the command line: one line that helps, exit status 2, and nothing is touched."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Command, process
from tests.conftest import SMALL

JOB, TASK = (SMALL / "job.yaml").read_text(), (SMALL / "task.py").read_text()
NOBODY = 65534 if os.geteuid() == 0 else None  # permissions do not bind root


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A copy of the job and its task, to make mistakes in."""
    return Path(shutil.copytree(SMALL, tmp_path / "job")) / "job.yaml"


def content(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file and folder, byte for byte."""
    return {path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in folder.rglob("*")}


def assert_run_refused(hpcprune: Command, cut: Path, says: str, *argv: str | Path) -> None:
    """It is refused before it does anything, in a folder of its own and in one that holds a run."""
    new = cut.with_name("new")
    hpcprune("run", *argv, "--out", new).assert_refused(says)
    assert not new.exists()
    before = content(cut)
    hpcprune("run", *argv, "--out", cut).assert_refused("")
    assert content(cut) == before


# The command line and the job file

COMMAND_LINES = {
    "no argument": ("run", r"Missing argument 'JOB'; write: hpcprune run .* \(hpcprune run --help says more\)"),
    "unknown option": ("run {job} --frob", r"No such option:? '?--frob'?; write: hpcprune run .* JOB .*--help"),
    "unknown command": ("frob", r"No such command 'frob'; write: hpcprune .* COMMAND .*--help"),
    "bad option": ("plan {job} --ranks 0", r"--ranks.*0 is not in the range.*; write: hpcprune plan"),
    "no override": ("run {job} prune.sparsity", r"override prune\.sparsity: write it as key=value"),
    "no such job": ("run {job}x", r"no such job file: .*job\.yamlx .*; job files there: .*job\.yaml"),
    "nothing to check": ("check {job}x", r"job\.yamlx: No such file or directory; give a checkpoint file"),
    "unknown format": ("export {job} x --to pickle", r"--to pickle: no such format; there are safetensors, torch, h5"),
}


@pytest.mark.parametrize("argv,says", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_the_command_line(hpcprune: Command, job: Path, argv: str, says: str) -> None:
    hpcprune(*argv.format(job=job).split()).assert_refused(says)


JOBS = {
    "sparsity 1.2": ("0.5", "1.2", r"prune\.sparsity: 1\.2 is not in \[0, 1\)"),
    "sparsity -0.1": ("0.5", "-0.1", r"prune\.sparsity: -0\.1 is not in \[0, 1\)"),
    "sparsity ninety": ("0.5", "ninety", r'prune\.sparsity: "ninety" is not a number in \[0, 1\)'),
    "mistyped": ("keep: 9", "keep: many", r'checkpoint\.keep: "many" is not a whole number of at least 1'),
    "no number": ("0.5", "[0.5]", r"prune\.sparsity: \[0\.5\] is not a number in \[0, 1\)"),
    "unknown key": (
        "prune: {",
        "prune: {critereon: x, ",
        r"did you mean prune\.criterion\? \(keys of prune: criterion,",
    ),
    "no YAML": ("prune: {", "prune: [", r"job\.yaml:3: not valid YAML: "),
    "criterion": ("prune: {", "prune: {criterion: magnitud, ", r"one of .*magnitude.*; did you mean magnitude\?"),
    "include": ("prune: {", "prune: {include: [conv], ", r"'conv' matches no prunable layer; there are 2, such as "),
    "exclude": ("prune: {", "prune: {exclude: ['*'], ", r"prune\.include and prune\.exclude leave none of 2"),
    "no task file": ("task.py", "tusk.py", r"no such file: .*/tusk\.py; beside the job file there is: task\.py"),
    "no task": ("task.py", "task.py:Smal", r"no task 'Smal'; did you mean Small\? \(it has: Small\)"),
    "timeout": ("task: ", "world: {timeout: -1}\ntask: ", r"world\.timeout: -1 is not a number above 0"),
}


@pytest.mark.parametrize("old,new,says", JOBS.values(), ids=JOBS)
def test_the_job_file(hpcprune: Command, job: Path, cut: Path, old: str, new: str, says: str) -> None:
    job.write_text(JOB.replace(old, new, 1))
    assert_run_refused(hpcprune, cut, says, job)


def test_a_process_of_its_own_says_the_same(hpcprune: Command, job: Path, tmp_path: Path) -> None:
    for argv in (["run", job, "prune.sparsity=1.2", "--out", tmp_path / "new"], ["run", job, "--frob"]):
        assert process(*argv) == hpcprune(*argv)
    assert not (tmp_path / "new").exists()


# The task

_IMPORT, _MODEL, _DATA = "import hpcprune\n", "        return nn", "        data ="
_NAN = "nn.Linear(4, 64).apply(lambda m: nn.init.constant_(m.weight, float('nan')))"
TASKS = {
    "raises": (_IMPORT, f"{_IMPORT}open('none')\n", r"raised FileNotFound.* \(at \S+/task\.py:14: open\('none'\)\)"),
    "exits": (_IMPORT, f"{_IMPORT}exit(0)\n", r"raised SystemExit: 0 \(at \S+/task\.py:14: exit\(0\)\)"),
    "import": (_IMPORT, "import hpcprun\n", r"No module named 'hpcprun' \(at \S+/task\.py:13: import hpcprun\)"),
    "syntax": ("model(self):", "model(self:", r"SyntaxError: .* \(at \S+/task\.py:20: def model\(self:\)"),
    "null bytes": ("import os\n", "\0", r"task: \S+/task\.py raised .*null bytes"),
    "model raises": (_MODEL, f"        1 / 0\n{_MODEL}", r"Small\.model raised ZeroDivision.*/task\.py:21: 1 / 0\)"),
    "no model": ("return nn.Sequential", "return ", r"Small\.model\(\) gave tuple, not a torch\.nn\.Module"),
    "no layer": ("nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)", "nn.ReLU()", r"no linear, .* \(it has: ReLU\)"),
    "frozen": ("nn.Linear(64, 2))", "nn.Linear(64, 2)).requires_grad_(False)", r"none of its parameters requires a "),
    "lazy": ("nn.Linear(4, ", "nn.LazyLinear(", r"the shape of 0\.weight is not known yet; call the model once"),
    "NaN": ("nn.Linear(4, 64)", _NAN, r"Small\.model\(\): 0\.weight: 256 of 256 weights are NaN .*; initialise"),
    "data raises": (
        _DATA,
        f"        int('one')\n{_DATA}",
        r"Small\.data raised ValueError.*task\.py:25: int\('one'\)\)",
    ),
    "in Python": (_DATA, f"        Path('none').read_text()\n{_DATA}", r"task\.py:25: Path\('none'\)\.read_text\(\)\)"),
    "no data": ("return hpcprune.Data", "return dict", r"Small\.data\(\) gave dict; return hpcprune\.Data\(train="),
    "no train": ("train=data", "train=torch.utils.data.Subset(data, [])", r"data\(\)\.train has no samples; check"),
    "no test": ("test=data", "test=torch.utils.data.Subset(data, [])", r"data\(\)\.test has no samples; check"),
    "bad sample": ("train=data", "train=torch.utils.data.Subset(data, [64])", r"Small\.data raised IndexError: .*64"),
}


@pytest.mark.parametrize("old,new,says", TASKS.values(), ids=TASKS)
def test_the_task(hpcprune: Command, job: Path, cut: Path, old: str, new: str, says: str) -> None:
    (job.parent / "task.py").write_text(TASK.replace(old, new, 1))
    assert_run_refused(hpcprune, cut, says, job)


# The weights

Weights = dict[str, torch.Tensor]


def weights(**changed: torch.Tensor) -> Weights:
    """What fits the task's model; `_` in a name stands for `.`."""
    fitting = {"0.weight": (64, 4), "0.bias": (64,), "2.weight": (2, 64), "2.bias": (2,)}
    return {name: changed.get(f"_{name}".replace(".", "_"), torch.ones(shape)) for name, shape in fitting.items()}


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def save_half(path: Path) -> None:
    torch.save(weights(), path)
    cut_in_half(path)


def save_half_safetensors(path: Path) -> None:
    save_file(weights(), path)
    cut_in_half(path)


def save_with(**changed: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: torch.save(weights(**changed), path)


WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, r"w\.pt: no such weights file; correct the path"),
    "a folder": (Path.mkdir, r"w\.pt: a folder, not a weights file; correct the path"),
    "a pipe": (os.mkfifo, r"w\.pt: not a file; weights are a torch state dict \(\.pt, \.pth\), "),
    "empty": (Path.touch, r"w\.pt: the file is empty; weights are a torch state dict"),
    "truncated": (save_half, r"w\.pt: cut short or damaged; copy or download it again"),
    "truncated safetensors": (save_half_safetensors, r"w\.pt: not a whole safetensors file .*download it again"),
    "text": (lambda path: path.write_text("weights"), r"w\.pt: not weights \(it starts with b'weights'\); weights are"),
    "other shape": (save_with(_2_bias=torch.ones(3)), r"2\.bias has shape \(3,\), the model's has \(2,\); is it of an"),
    "NaN": (save_with(_2_bias=torch.tensor([1, torch.nan])), r"2\.bias: 1 of 2 values are NaN or infinite; take "),
    "infinite": (save_with(_2_bias=torch.tensor([1, torch.inf])), r"2\.bias: 1 of 2 values are NaN or infinite; take"),
}


@pytest.mark.parametrize("make,says", WEIGHTS.values(), ids=WEIGHTS)
def test_the_weights(hpcprune: Command, job: Path, cut: Path, make: Callable[[Path], object], says: str) -> None:
    make(job.with_name("w.pt"))
    assert_run_refused(hpcprune, cut, says, job, "weights=w.pt")


class Bomb:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_code_in_the_weights_does_not_run(
    hpcprune: Command, job: Path, cut: Path, save: Callable[[object, Path], object]
) -> None:
    crater, path = cut.with_name("crater"), job.with_name("w.pt")
    save({"0.weight": Bomb(crater)}, path)
    assert_run_refused(hpcprune, cut, r"w\.pt: .*code.* so it is not loaded", job, "weights=w.pt")
    assert not crater.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert crater.exists(), "the code should run where it is let"


# The run's folder

PLACES = {
    "below a file": ("{job}/run", r"out: {job}/run cannot be made: {job} is not a writable folder"),
    "a file": ("{job}", r"out: {job} is not a folder"),
    "a device": ("/dev/null", r"out: /dev/null is not a folder"),
    "in /proc": ("/proc/self/run", r"out: /proc/self/run cannot be (made|written): .*"),
    "too long": (f"/tmp/{'n' * 300}", r"out: /tmp/n+: File name too long"),
    "the job's own": ("{folder}", r"out: {folder} is not empty and holds no run \(no job\.yaml of one\)"),
    "something else's": ("{folder}/..", r"out: {folder}/\.\. is not empty and holds no run \(no job\.yaml of one\)"),
}


@pytest.mark.parametrize("out,says", PLACES.values(), ids=PLACES)
def test_a_place_that_is_no_place_for_a_run(hpcprune: Command, job: Path, out: str, says: str) -> None:
    names = {"job": job, "folder": job.parent}
    before = content(job.parent)
    ended = hpcprune("run", job, "--out", out.format(**names))
    ended.assert_refused(says.format(**names) + "; choose another folder with --out")
    assert content(job.parent) == before


@pytest.fixture
def lent() -> Iterator[Path]:
    """A folder that an ordinary user can reach and write to, which is not so of tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("mode", [0o555, 0])
@pytest.mark.parametrize("closed", [".", "run", "run/checkpoints", "run/metrics.jsonl"])
def test_a_folder_that_may_not_be_written(hpcprune: Command, lent: Path, cut: Path, closed: str, mode: int) -> None:
    shutil.copytree(SMALL, lent / "job")
    shutil.copytree(cut, lent / "to" / "run")
    for path in (lent / "to").rglob("*"):
        path.chmod(0o777)
    before = content(lent)
    (lent / "to" / closed).chmod(mode)
    out = lent / "to" / ("new" if closed == "." else "run")
    ended = hpcprune("run", lent / "job" / "job.yaml", "--out", out, user=NOBODY)
    (lent / "to" / closed).chmod(0o777)
    ended.assert_refused(rf"out: {lent}/to.* (not writable|not a writable folder|Permission denied); choose another")
    assert content(lent) == before


def test_the_folder_of_another_run(hpcprune: Command, done: Path, cut: Path) -> None:
    for run in (done, cut):
        before = content(run)
        ended = hpcprune("run", SMALL / "job.yaml", "prune.sparsity=0.6", "--out", run)
        ended.assert_refused(
            rf"out: {run} holds the run of another job \(prune\.sparsity \(0\.5 there, 0\.6 here\)\); "
            r"choose another folder with --out, or remove it: rm -r "
        )
        assert content(run) == before


def test_a_damaged_report(hpcprune: Command, cut: Path) -> None:
    (cut / "report.json").write_text("{")
    before = content(cut)
    ended = hpcprune("run", SMALL / "job.yaml", "--out", cut)
    ended.assert_refused(r"report\.json: damaged, .*; remove it and run the same command again: it is made anew")
    assert content(cut) == before
    (cut / "report.json").unlink()
    assert hpcprune("run", SMALL / "job.yaml", "--out", cut).code == 0
