"""The examples under docs/examples/ are run as their first lines say, and learn with nine weights in ten at zero."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Launch, launch_environment

FOLDER = ROOT / "docs/examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
# A test machine's own name may not resolve, and its cores may be shared with other work.
ONE_HOST = {"GLOO_SOCKET_IFNAME": "lo", "OMPI_MCA_mpi_yield_when_idle": "1"}


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    found = re.search(r"^2 ranks: accuracy (\S+), 90\.0% of the weights are zero$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert float(found[1]) > 0.85


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_under_mpirun(mpirun: Launch, tmp_path: Path, name: str) -> None:
    if "horovod" in name and "HPCPRUNE_NO_HOROVOD" in os.environ:
        pytest.skip("HPCPRUNE_NO_HOROVOD is set")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**ONE_HOST, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if name == "hf_trainer.py" else ONE_HOST
    check(mpirun(2, FOLDER / name, timeout=120, env={**env, "HF_HUB_OFFLINE": "1"}, forked=False))


def test_an_example_runs_under_torchrun() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        FOLDER / "ddp.py",
    ]
    environment = launch_environment(ONE_HOST)
    check(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120))


def test_the_page_on_loops_of_ones_own_explains_each_example() -> None:
    page = (ROOT / "docs/own-loop.md").read_text()
    assert set(re.findall(r"\]\(examples/(\w+\.py)\)", page)) == set(EXAMPLES)
