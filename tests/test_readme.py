"""The README and the pages under docs/ are run: what they tell a newcomer to type works, in a copy of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, launch_environment

README = (ROOT / "README.md").read_text()
KERNELS = (ROOT / "docs/kernels.md").read_text()
CRITERIA = (ROOT / "docs/criteria.md").read_text()
BIN = Path(sys.executable).parent
# What a test cannot do again from inside: make the environment it runs in, and run itself.
NOT_RUN = {"source .venv/bin/activate", "make test"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """What a page tells its reader to type."""
    lines = [line.partition("  #")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files without what was built in it."""
    target = tmp_path_factory.mktemp("copy") / "hpcprune"
    built = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=built)
    return target


def test_the_readme_has_the_two_commands_and_more() -> None:
    found = commands(README)
    assert set(found) >= NOT_RUN | {"make demo", "hpcprune doctor"}
    for name in ("run", "plan", "check", "show", "diff", "export"):
        assert any(f"hpcprune {name} " in line for line in found), name


@pytest.mark.timeout(900)
def test_the_readmes_commands_work_one_after_the_other(copy: Path) -> None:
    environment = launch_environment({"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"})
    environment["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    for line in commands(README):
        if line in NOT_RUN:
            continue
        # The environment is there: make must use this one, and believe that it is up to date.
        typed = line.replace("make demo", f"make demo VENV={BIN.parent} -o {BIN.parent}/.demo")
        done = subprocess.run(typed, shell=True, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
        different = 1 if line.startswith("hpcprune diff") else 0
        assert done.returncode == different, f"{line}\n{done.stdout}\n{done.stderr}"
    report = json.loads((copy / "runs/mnist/report.json").read_text())
    accuracy = [each["metrics"]["accuracy"] for each in report["evaluations"]]
    assert report["evaluations"][-1]["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert accuracy[-1] > accuracy[0] - 0.01, "the pruned network is more than a point worse than the dense one"
    assert (copy / "runs/mnist/report.html").stat().st_size > 50_000


@pytest.mark.parametrize("text", [*blocks(README, "python"), *blocks(KERNELS, "python"), *blocks(CRITERIA, "python")])
def test_the_pages_python_runs(tmp_path: Path, text: str) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(text)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


OF_GRAPH = "sparsity: 0.5, what: [weights, edges, nodes], graph: {edges: 0.2, nodes: 0.05}"


@pytest.mark.parametrize(
    "page, number, prune, primary",
    [
        ("task", 0, "sparsity: 0.5", "accuracy"),
        ("task", 1, "sparsity: 0.5", "error"),
        ("graphs", 0, OF_GRAPH, "accuracy"),
    ],
)
def test_the_documented_tasks_can_be_pruned(tmp_path: Path, page: str, number: int, prune: str, primary: str) -> None:
    (tmp_path / "task.py").write_text(blocks((ROOT / f"docs/{page}.md").read_text(), "python")[number])
    job = tmp_path / "job.yaml"
    job.write_text(f"task: task.py\ntrain: {{epochs: 3}}\nprune: {{{prune}}}\nretrain: {{epochs: 1}}\n")
    command = [sys.executable, "-m", "hpcprune", "run", job, "--out", tmp_path / "run"]
    done = subprocess.run(command, env=launch_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["primary"] == primary
    assert report["evaluations"][-1]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_every_page_that_is_linked_to_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text()):
            link = "".join(target)
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
