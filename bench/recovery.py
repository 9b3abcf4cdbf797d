"""What a job on a cluster loses when something happens to it, and what sending survivors alone gains there.

    python bench/recovery.py        # as root: it starts slurm/testbed

Recovery: a run on two nodes is disturbed in its first round of retraining, as in tests/slurm; measured are the seconds
until it does steps again, most of which are Slurm's own (noticing a dead node, requeueing), set short on the testbed.
Exchange: jobs/mnist on four nodes at 1 Gbit/s, one step of its last round, 95 % pruned, with survivors packed and with
everything sent, in turns. The nodes share this machine's cores: read the ratio.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcprune.beat import read_beat
from tests.conftest import ROOT
from tests.slurm.conftest import NODES, Slurm, SlurmJob, clear, emulate
from tests.slurm.test_prune import DISTURBANCES, SCRIPT, in_the_middle, submit

MNIST = ROOT / "jobs/mnist/job.yaml"
TURNS = 2
# One round to 95 %, long enough for a median.
SHORT = ("train.epochs=0.2", "retrain.epochs=0.3", "prune.rounds=1", "prune.schedule=one-shot", "prune.sparsity=0.95")


def recover(slurm: Slurm, base: Path, name: str, disturb: Callable[[Slurm, SlurmJob, Path], object]) -> float:
    """Seconds from a disturbance until the run does steps again."""
    out = base / name.replace(" ", "-")
    job = submit(slurm, out, sleep=0.2)
    in_the_middle(job, out)
    start = time.monotonic()
    disturb(slurm, job, out)
    job.wait(lambda: "going on from" in job.text, "it to go on")
    again = time.time()
    job.wait(lambda: (beat := read_beat(out / "status.json")) is not None and beat.written > again, "a step")
    seconds = time.monotonic() - start
    assert job.end() == "COMPLETED", job.text
    clear(slurm)
    return seconds


def tell(slurm: Slurm, job: SlurmJob, out: Path) -> None:
    """As Slurm does before a time limit."""
    job.signal("--signal=USR1", "--batch")


def step_seconds(slurm: Slurm, base: Path, packing: str, turn: int) -> float:
    """Of a step of the last round."""
    out = base / f"{packing}-{turn}"
    job = slurm.sbatch(
        out,
        SCRIPT,
        MNIST,
        *SHORT,
        f"retrain.packing={packing}",
        "--out",
        out,
        flags=("--nodes=4", "--ntasks-per-node=1"),
    )
    assert job.end() == "COMPLETED", job.text
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(each["seconds"] for each in found if each.get("stage") == "retrain")


def main() -> None:
    if os.geteuid():
        sys.exit("root is needed, for slurm/testbed")
    emulate("up", "--nodes", str(NODES))
    try:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder)
            slurm = Slurm(base)
            print(f"{'':56}{'seconds':>8}")
            for name, disturb in {"told to stop": tell, **DISTURBANCES}.items():
                print(f"{name:56}{recover(slurm, base, name, disturb):8.1f}", flush=True)
            emulate("rate", "1gbit")
            found: dict[str, list[float]] = {"always": [], "never": []}
            for turn in range(TURNS):
                for packing, seconds_of in found.items():
                    seconds_of.append(step_seconds(slurm, base, packing, turn))
            packed, whole = (statistics.median(each) * 1e3 for each in found.values())
            print("\njobs/mnist at 95 %, 4 nodes, 1 Gbit/s, ms a step")
            print(f"survivors packed {packed:.1f}, everything sent {whole:.1f}, ratio {whole / packed:.2f}")
    finally:
        emulate("down")


if __name__ == "__main__":
    main()
