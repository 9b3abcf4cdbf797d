"""Whether a run that is killed at a random instant goes on and ends in the same weights, bit for bit.

    python bench/faults.py [--kills 100] [--seed 0] [--ranks 2]

A run of the tests' smallest job is hit by SIGKILL, one rank, all ranks or mpirun, at a random instant while it scores,
finds the threshold, exchanges masks, in backward, in an all-reduce, in evaluation, while it copies, writes or renames a
checkpoint, or writes the result; then the same command is run again. Counted are runs that went on from the newest
complete checkpoint and ended in the weights of a run that nothing disturbed, those that did not go on from it or ended
in others, and those that did not end well. How long any rank was alive after the kill is measured as well. The exit
status is 0 if all went on right and no rank outlived a kill by more than 10 s.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpcprune.checkpoint import State, newest_step, read_model
from hpcprune.errors import CheckpointError
from tests.conftest import NOT_STARTED, PYTHON, TINY, launch_command, launch_environment
from tests.mpi.test_run import assert_same_weights

Python = Sequence[str | Path]  # the command that starts it
TIMEOUT = 120.0
LONGEST_LIFE = 10.0  # seconds that a rank may live after the kill
# Each moment of tests/jobs/tiny/faults.py: how often the job comes to it (less often where the disk is slow, since a
# checkpoint is put off then), and about how many milliseconds it takes. A kill is drawn among these; one that is drawn
# for later than the moment's end falls on its end.
MOMENTS = {
    "scoring": (4, 0.05),
    "threshold": (2, 1.3),
    "masks": (2, 0.3),
    "backward": (102, 0.5),
    "all-reduce": (102, 0.2),
    "evaluation": (5, 9.0),
    "copying": (14, 0.6),
    "writing": (14, 8.0),
    "renaming": (14, 0.3),
    "result": (2, 9.0),
}
ON_RANK_0 = {"renaming", "result"}
VICTIMS = {"self": "one rank", "all": "all ranks", "mpirun": "mpirun"}


@dataclass(frozen=True)
class Fault:
    """A kill: of whom, how many milliseconds after `rank` has come to a moment for the `count`-th time."""

    moment: str
    count: int
    after: float
    who: str
    rank: int

    def __str__(self) -> str:
        return f"{self.moment}:{self.count}:{self.after:.3f}:{self.who}"

    def environment(self, record: Path) -> dict[str, str]:
        """The fault as the tests' job takes it; when it has killed is in `record` then."""
        return {"FAULT": str(self), "FAULT_RANK": str(self.rank), "FAULT_RECORD": str(record)}


@dataclass(frozen=True)
class Ended:
    """How a launch ended: mpirun's status, all that was printed, and how long any rank was alive after the kill.

    `lived` is None where nothing was killed.
    """

    status: int
    text: str
    lived: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of a run: "right", "wrong", "not resumed", "not killed" or "failed unkilled", and why."""

    fault: Fault
    kind: str
    why: str = ""
    lived: float = 0.0

    @property
    def killed(self) -> bool:
        return self.kind in ("right", "wrong", "not resumed")


def launch(out: Path, ranks: int, python: Python, fault: Fault | None = None) -> Ended:
    """Run the job until neither mpirun nor any rank is left."""
    ended = _launch(out, ranks, python, fault)
    if NOT_STARTED in ended.text:  # before any rank was there
        ended = _launch(out, ranks, python, fault)
    return ended


def _launch(out: Path, ranks: int, python: Python, fault: Fault | None) -> Ended:
    command = launch_command(ranks, "hpcprune", "run", TINY, "--out", out, python=python)
    record, printed = out.with_suffix(".killed"), out.with_suffix(".txt")
    record.write_text("")
    with printed.open("w") as text:
        environment = launch_environment(fault.environment(record) if fault else {})
        process = subprocess.Popen(command, env=environment, stdout=text, stderr=subprocess.STDOUT)
    end, gone = time.monotonic() + TIMEOUT, 0.0
    while not (gone and process.poll() is not None):
        time.sleep(0.02)
        over = process.poll() is not None or record.stat().st_size > 0
        if over and not gone and not ranks_in(out):
            gone = time.monotonic()
        if time.monotonic() > end:
            end = math.inf
            process.kill()
            for pid in ranks_in(out):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with printed.open("a") as text:
                text.write(f"\nit had to be ended after {TIMEOUT:.0f} s")
    killed = record.read_text()
    return Ended(process.returncode, printed.read_text(errors="replace"), gone - float(killed) if killed else None)


def ranks_in(out: Path) -> list[int]:
    """The process ids of the ranks whose run is in `out`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if str(out).encode() in words and b"hpcprune" in words and b"--map-by" not in words:
                found.append(int(process.name))
    return found


def draw(chance: random.Random, ranks: int) -> Fault:
    """A kill at a random instant."""
    moment = chance.choice(list(MOMENTS))
    occasions, milliseconds = MOMENTS[moment]
    who = chance.choices(list(VICTIMS), (6, 2, 2))[0]
    rank = 0 if moment in ON_RANK_0 else chance.randrange(ranks)
    return Fault(moment, chance.randint(1, occasions), chance.uniform(0, milliseconds), who, rank)


def expected_words(out: Path) -> str:
    """What the command must say that goes on in `out`; nothing where there is nothing to go on from."""
    if (out / "report.json").exists():  # the ranks ended the run without mpirun
        return f"{out} holds this run, complete"
    newest, _ = newest_step(out / "checkpoints")
    return f"going on from {newest} (" if newest else ""


def try_one(fault: Fault, ranks: int, out: Path, expected: State, python: Python) -> Outcome:
    """Kill a run, run the same command again, and compare."""
    cut = launch(out, ranks, python, fault)
    if cut.lived is None:
        return Outcome(fault, "not killed") if cut.status == 0 else Outcome(fault, "failed unkilled", cut.text)
    expects = expected_words(out)
    again = launch(out, ranks, python)
    if again.status != 0:
        return Outcome(fault, "not resumed", again.text, cut.lived)
    if cut.status == 0:
        return Outcome(fault, "wrong", "mpirun's exit status was 0 all the same", cut.lived)
    if expects not in again.text or ("going on from" in again.text) != ("going on from" in expects):
        return Outcome(fault, "wrong", f"it should have said {expects!r}: {again.text}", cut.lived)
    try:
        assert_same_weights(read_model(out / "model.h5"), expected)
    except (AssertionError, CheckpointError) as error:
        return Outcome(fault, "wrong", str(error), cut.lived)
    return Outcome(fault, "right", "", cut.lived)


def undisturbed(ranks: int, out: Path) -> State:
    """What a run ends in that nothing disturbs."""
    ended = launch(out, ranks, PYTHON)
    if ended.status != 0:
        sys.exit(f"{ended.text}\nthe undisturbed run failed; run it by hand: hpcprune run {TINY}")
    return read_model(out / "model.h5")


def try_many(
    kills: int, seed: int, ranks: int, base: Path, expected: State, python: Python = PYTHON
) -> Iterator[Outcome]:
    """What became of runs in `base`, until so many were killed; draws whose moment never came are among them."""
    chance, killed = random.Random(seed), 0
    for number in range(1, 2 * kills + 1):
        if killed == kills:
            return
        outcome = try_one(draw(chance, ranks), ranks, base / str(number), expected, python)
        killed += outcome.killed
        yield outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    os.environ.pop("FAULT", None)
    outcomes = []
    with tempfile.TemporaryDirectory() as base:
        expected = undisturbed(given.ranks, Path(base) / "undisturbed")
        for number, outcome in enumerate(try_many(given.kills, given.seed, given.ranks, Path(base), expected), 1):
            outcomes.append(outcome)
            lived = f"  ranks gone after {outcome.lived:.2f} s" if outcome.killed else ""
            print(f"{number:4} {outcome.fault!s:32} rank {outcome.fault.rank}  {outcome.kind:11}{lived}", flush=True)
            if outcome.why:
                print(outcome.why, flush=True)
    sys.exit(0 if summarize(outcomes, given.kills) else 1)


def summarize(outcomes: list[Outcome], kills: int) -> bool:
    """Print the counts; whether all went right."""
    killed = [outcome for outcome in outcomes if outcome.killed]
    kinds = Counter(outcome.kind for outcome in outcomes)
    longest = max((outcome.lived for outcome in killed), default=0.0)
    print(f"\nkilled {len(killed)} times: {_counts([outcome.fault.moment for outcome in killed])}")
    print(f"killed were {_counts([VICTIMS[outcome.fault.who] for outcome in killed])}")
    print(f"resumed right {kinds['right']}, resumed wrong {kinds['wrong']}, not resumed {kinds['not resumed']}")
    print(f"the longest that a rank was alive after the kill: {longest:.2f} s")
    for kind in ("not killed", "failed unkilled"):
        if kinds[kind]:
            print(f"besides, {kind}: {kinds[kind]}")
    return kinds["right"] == kills and not kinds["failed unkilled"] and longest <= LONGEST_LIFE


def _counts(names: list[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items()))


if __name__ == "__main__":
    main()
