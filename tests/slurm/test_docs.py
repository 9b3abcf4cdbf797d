"""What docs/slurm.md tells its reader to type is taken by sbatch, by hpcprune and by the testbed as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.conftest import Slurm, emulate
from tests.test_readme import commands

TEXT = (ROOT / "docs/slurm.md").read_text()
LINES = commands(TEXT)
ASKED = re.findall(r"^\| ((?:`[^`]+`(?:, | or )?)+)[^|]*\| (?:as|a)", TEXT, re.MULTILINE)


def starting(*words: str) -> list[str]:
    return sorted({line for line in LINES if line.startswith(words)})


def typed(slurm: Slurm, line: str, folder: Path = ROOT) -> str:
    """What a line that must work prints. JOB stands for a job's number."""
    environment = {**slurm.environment, "PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"}
    done = subprocess.run(
        line.replace("JOB", "1"), shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("line", starting("sbatch ", "HPCPRUNE_"))
def test_sbatch_takes_it(slurm: Slurm, line: str) -> None:
    assert re.search(r"slurm/\w+\.sh", line)
    typed(slurm, re.sub(r"sbatch (--dependency=\S+)?", "sbatch --test-only ", line))


@pytest.mark.parametrize("flags", [flags for row in ASKED for flags in re.findall(r"`(-[^`]+)`", row)])
def test_sbatch_takes_the_sizes_that_are_named(slurm: Slurm, flags: str) -> None:
    ours = flags.replace("=8", "=2").replace("gpu:4", "gpu:2")  # what the nodes here have
    typed(slurm, f"sbatch --test-only {ours} slurm/prune.sh")


@pytest.mark.parametrize("line", starting("hpcprune submit"))
def test_what_submit_writes_is_taken(slurm: Slurm, line: str) -> None:
    command, _, flags = line.partition(" -- ")
    dry = command if "--dry-run" in command else f"{command} --dry-run"
    texts = typed(slurm, f"{dry} -- {flags}").split("#!/usr/bin/env bash")[1:]
    for text in texts:
        script = re.sub(r"^#SBATCH --dependency.*", "", text, flags=re.MULTILINE)
        typed(slurm, f"sbatch --test-only <<'END'\n#!/usr/bin/env bash{script}\nEND")


@pytest.mark.parametrize("line", starting("python3 slurm/testbed"))
def test_the_testbed_knows_it(slurm: Slurm, line: str) -> None:
    word = line.split()[2]
    assert re.search(rf"^    {word}\b", emulate("--help"), re.MULTILINE)


def test_there_is_something_to_try() -> None:
    assert len(starting("sbatch ")) >= 3 and len(starting("hpcprune submit")) >= 3
    assert len(starting("python3 slurm/testbed")) >= 6 and len(ASKED) >= 4
