"""The command line: each command's help, and starts that are quick because nothing is imported before it is needed."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import hpcprune as package
from hpcprune.cli import cli
from tests.commands import Command
from tests.conftest import ROOT

COMMANDS = ["check", "compare", "diff", "doctor", "export", "plan", "run", "show", "status", "submit"]
HEAVY = ("torch", "torchmetrics", "matplotlib", "mpi4py", "hpcprune.run")
# Runs a command and says what it has imported.
STARTED = f"""
import json, sys, time
from hpcprune.__main__ import main
try:
    main()
except SystemExit as ended:
    seconds = time.process_time()  # which is the time it takes where nothing else runs
    print(json.dumps([ended.code, [name for name in {HEAVY} if name in sys.modules], seconds]), file=sys.stderr)
"""


def python(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, cwd=ROOT)


def start(*argv: str | Path) -> tuple[int | None, list[str], float]:
    """A command's exit status, which of the heavy modules it imported, and its seconds."""
    code, imported, seconds = json.loads(python("-c", STARTED, *argv).stderr.splitlines()[-1])
    return code, imported, seconds


# Help


def test_the_help_lists_every_command_with_a_sentence() -> None:
    for flag in ("-h", "--help"):
        done = CliRunner().invoke(cli, [flag])
        assert done.exit_code == 0
        lines = done.output.partition("Commands:\n")[2].splitlines()
        listed = [line.split(maxsplit=1) for line in lines if line[2] != " "]
        assert [name for name, _ in listed] == COMMANDS
        assert all(len(sentence) > 20 for _, sentence in listed)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_says_what_it_takes_and_does(name: str) -> None:
    command = cli.commands[name]
    helps = [CliRunner().invoke(cli, [name, flag]) for flag in ("-h", "--help")]
    assert helps[0].output == helps[1].output and helps[0].exit_code == 0
    text = " ".join(helps[0].output.split())
    assert text.startswith("Usage: ")
    assert command.help and " ".join(command.help.split()) in text
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help and all(flag in text for flag in parameter.opts)
        else:
            assert parameter.make_metavar(click.Context(command)) in text
    assert len(helps[0].output.splitlines()[0]) <= 80


# Versions


def test_the_version_is_the_packages_however_it_is_started() -> None:
    installed = importlib.metadata.version("hpcprune")
    assert package.__version__ == installed
    said = [
        python("-m", "hpcprune", "--version"),
        subprocess.run([Path(sys.executable).with_name("hpcprune"), "--version"], capture_output=True, text=True),
    ]
    for done in said:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"hpcprune, version {installed}\n"


# Starts


def test_looking_at_files_needs_neither_torch_nor_mpi_and_half_a_second(done: Path, tmp_path: Path) -> None:
    model = done / "model.h5"
    (tmp_path / "bad.h5").write_bytes(model.read_bytes()[:-1])
    for code, *argv in (
        (0, "check", done),
        (1, "check", tmp_path / "bad.h5"),
        (0, "show", model),
        (0, "diff", model, model),
        (1, "diff", model, done / "dense.h5"),
        (2, "show", tmp_path / "bad.h5"),
    ):
        found, imported, _ = start(*argv)
        assert (found or 0, imported) == (code, []), argv
    for argv in (("check", model), ("show", model), ("diff", model, model)):
        assert min(start(*argv)[-1] for _ in range(9)) < 0.5, argv


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run", "--help"], ["export", "--help"], ["frob"]])
def test_a_question_about_the_command_line_is_answered_without_torch(argv: list[str]) -> None:
    assert start(*argv)[:2] in ((0, []), (2, []))


def test_a_mistake_in_the_job_file_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("task: task.py\nprune: {sparsity: 2}\n")
    assert start("run", tmp_path / "job.yaml")[:2] == (2, ["mpi4py"])


def test_the_package_imports_its_names_when_they_are_used() -> None:
    program = f"""
import sys, hpcprune
assert not [name for name in {HEAVY} if name in sys.modules]
assert hpcprune.HpcpruneError and hpcprune.__version__ and "torch" not in sys.modules
assert hpcprune.prune.__module__ == "hpcprune.pruning" and "torch" in sys.modules
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="module 'hpcprune' has no attribute 'prun'"):
        _ = package.prun  # type: ignore[attr-defined]


# Running


def test_verbose_shows_every_rank_with_its_number(hpcprune: Command, tmp_path: Path) -> None:
    job = [ROOT / "tests/jobs/small/job.yaml", "train.steps=2", "retrain.steps=0"]
    for flag, shown in (("-v", True), ("--verbose", True), ("--out=x", False)):
        ended = hpcprune("run", *job, "--out", tmp_path / flag, *([flag] if shown else []))
        assert ended.code == 0, ended.err
        assert ("rank 0: scored " in ended.out) == shown
