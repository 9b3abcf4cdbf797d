"""Whether a run that is killed at a random instant goes on and ends in the same weights, bit for bit.

    python bench/faults.py [--kills 100] [--seed 0] [--ranks 2]

A run of the tests' smallest job is killed with SIGKILL, one rank, all ranks or mpirun, at a random instant while it
scores, finds the threshold, exchanges masks, in backward, in an all-reduce, in evaluation, while it copies, writes or
renames a checkpoint, or writes the result; then the same command is run again until it is complete. Counted are runs
that went on and ended in the weights of a run that nothing disturbed, those that ended in others, and those that did
not end. How long the ranks lived after the kill is measured as well. The exit status is 0 if all went on right.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcprune.checkpoint import State, read_model
from hpcprune.errors import CheckpointError
from tests.conftest import ROOT, launch_command, launch_environment

JOB = ROOT / "tests/jobs/tiny/job.yaml"
TIMEOUT = 120.0
# How often each moment is come to in the job, on the rank that comes to it least: a kill is drawn among these.
OCCASIONS = {
    "scoring": 3,
    "threshold": 2,
    "masks": 2,
    "backward": 90,
    "all-reduce": 90,
    "evaluation": 5,
    "copying": 8,
    "writing": 8,
    "renaming": 8,
    "result": 2,
}
ON_RANK_0 = {"renaming", "result"}


def launch(out: Path, ranks: int, fault: dict[str, str]) -> tuple[int, float]:
    """Run the job; mpirun's exit status, and how many seconds any rank has outlived mpirun."""
    command = launch_command(ranks, "hpcprune", "run", str(JOB), "--out", str(out))
    done = subprocess.run(
        command, env=launch_environment(fault), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=TIMEOUT
    )
    start = time.monotonic()
    while alive(out) and time.monotonic() - start < TIMEOUT:
        time.sleep(0.05)
    return done.returncode, time.monotonic() - start


def alive(out: Path) -> bool:
    """Whether a rank of the run in `out` is still there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"hpcprune" in words and b"--map-by" not in words:
            return True
    return False


def same(one: State, other: State) -> bool:
    """Whether two results hold the same masks and weights, bit for bit."""
    return one.layers.keys() == other.layers.keys() and all(
        np.array_equal(a.values, other.layers[name].values) and np.array_equal(a.mask, other.layers[name].mask)  # type: ignore[arg-type]
        for name, a in one.layers.items()
    )


def draw(chance: random.Random, ranks: int) -> dict[str, str]:
    """A fault, as the tests' job takes it from its environment."""
    moment = chance.choice(list(OCCASIONS))
    count, after = chance.randint(1, OCCASIONS[moment]), chance.uniform(0, 5)
    who = chance.choices(("self", "all", "mpirun"), (6, 2, 2))[0]
    rank = 0 if moment in ON_RANK_0 else chance.randrange(ranks)
    return {"FAULT": f"{moment}:{count}:{after:.3f}:{who}", "FAULT_RANK": str(rank)}


def try_one(fault: dict[str, str], ranks: int, folder: Path, expected: State) -> tuple[str, float]:
    """Kill a run and go on: "right", "wrong", "stuck" or "not killed"; and how long the ranks lived after the kill."""
    out = folder / "run"
    try:
        status, lived = launch(out, ranks, fault)
        if status == 0:
            return "not killed", lived
        status, _ = launch(out, ranks, {})
    except subprocess.TimeoutExpired:
        return "stuck", TIMEOUT
    if status != 0:
        return "stuck", lived
    try:
        return ("right" if same(read_model(out / "model.h5"), expected) else "wrong"), lived
    except CheckpointError:
        return "wrong", lived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    os.environ.pop("FAULT", None)
    chance, outcomes, moments = random.Random(given.seed), Counter[str](), Counter[str]()
    longest, number = 0.0, 0
    with tempfile.TemporaryDirectory() as base:
        if launch(Path(base, "undisturbed"), given.ranks, {})[0] != 0:
            sys.exit("the undisturbed run failed; run it by hand: hpcprune run tests/jobs/tiny/job.yaml")
        expected = read_model(Path(base, "undisturbed", "model.h5"))
        while sum(outcomes.values()) - outcomes["not killed"] < given.kills:
            number += 1
            fault = draw(chance, given.ranks)
            folder = Path(base, str(number))
            folder.mkdir()
            outcome, lived = try_one(fault, given.ranks, folder, expected)
            outcomes[outcome] += 1
            if outcome != "not killed":
                moments[fault["FAULT"].partition(":")[0]] += 1
                longest = max(longest, lived)
            print(f"{number:4} {fault['FAULT']:32} rank {fault['FAULT_RANK']}  {outcome}", flush=True)
    print(f"\nkilled {given.kills} times: " + ", ".join(f"{name} {count}" for name, count in sorted(moments.items())))
    print(f"resumed right {outcomes['right']}, resumed wrong {outcomes['wrong']}, not resumed {outcomes['stuck']}")
    print(f"the longest that a rank outlived mpirun: {longest:.1f} s")
    sys.exit(0 if outcomes["right"] == given.kills else 1)


if __name__ == "__main__":
    main()
