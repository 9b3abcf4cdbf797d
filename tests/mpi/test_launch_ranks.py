"""The launch on several hosts: what differs between them is named before any work. Hosts are ranks here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TINY, Launch

SCRIPT = """
import json, socket, sys, time
from pathlib import Path
from unittest import mock
from hpcprune import launch
from hpcprune.errors import WorldError
from hpcprune.job_file import load_job
from hpcprune.world import World

world, what, folder = World.of(None, timeout=30), sys.argv[1], Path(sys.argv[2])
World.local_size = 1
socket.gethostname = lambda: f"node{world.rank}"
launch.PATIENCE = 1.0
job = load_job(Path(sys.argv[3]))
launch.versions = lambda: {"hpcprune": "1.0", "torch": "2.8" if what == "torch" and world.rank else "2.9"}
if what == "task" and world.rank == 1:
    type(job).digest = lambda self: "another"
now = time.time
if what == "clock" and world.rank == 1:
    time.time = lambda: now() - 40
if what == "folder" and world.rank == 1:
    folder = folder / "of-its-own"
try:
    said = launch.check_code(job, world)
    launch.check_folder(folder, world)
except WorldError as error:
    said = str(error)
everywhere = world.allgather((said or "").replace("/of-its-own", ""), "test")
assert len(set(everywhere)) == 1, everywhere
if world.rank == 0:
    print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", None),
        ("torch", "torch differs between hosts (2.9 on node0, 2.8 on node1); install the same on all"),
        ("task", "task.py differs between hosts ("),
        ("clock", "the clock of node1 is 40 s behind that of node"),
        (
            "folder",
            " on node1 is not the folder that it is on node0, where rank 0 is; choose one on a disk that all hosts",
        ),
    ],
)
def test_what_differs_between_hosts_is_named(mpirun: Launch, tmp_path: Path, what: str, said: str | None) -> None:
    script = tmp_path / "launch.py"
    script.write_text(SCRIPT)
    (tmp_path / "run").mkdir()
    done = mpirun(2, script, what, tmp_path / "run", TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found is None if said is None else said in found
    assert not list((tmp_path / "run").iterdir())
