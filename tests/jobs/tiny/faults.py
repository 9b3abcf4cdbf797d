"""Faults on demand: this process, all ranks or mpirun die at a chosen moment inside hpcprune.

FAULT="<moment>:<count>:<milliseconds>:<who>": when `moment` is come to for the `count`-th time, that much later `who`
("self", "all" or "mpirun") is killed with SIGKILL. The moment lasts until then, at least. FAULT_RANK says which rank
counts. FAULT_RECORD names a file that is there already; it holds the instant of the kill afterwards, by the clock that
all processes of a host share (time.monotonic()).
"""

import importlib
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

# Where the work of each moment is done, as the module that calls it names it.
MOMENTS = {
    "calibrating": "hpcprune.statistics.calibration:Calibration.batch",
    "scoring": "hpcprune.ranking:score",
    "threshold": "hpcprune.ranking:select_survivors",
    "masks": "hpcprune.ranking:gather_masks",
    "backward": "hpcprune.buckets:Buckets.backward",
    "all-reduce": "hpcprune.buckets:Buckets.wait",
    "evaluation": "hpcprune.run:evaluate",
    "copying": "hpcprune.checkpoint.background:BackgroundWriter.begin",
    "writing": "hpcprune.checkpoint.background:write_part",
    "renaming": "hpcprune.checkpoint.background:give_name",
    "result": "hpcprune.saving:write_model",
}


def install() -> None:
    """Wrap what FAULT names, in the rank that FAULT_RANK names."""
    moment, count, milliseconds, who = os.environ["FAULT"].split(":")
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") != os.environ.get("FAULT_RANK", "0"):
        return
    module, _, path = MOMENTS[moment].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    inner, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) != int(count):
            return inner(*args, **kwargs)
        sys.setswitchinterval(1e-5)  # or the kill would wait for what runs, longer than most moments last
        killer = threading.Thread(target=kill, args=(float(milliseconds) / 1e3, who))
        killer.start()
        try:
            return inner(*args, **kwargs)
        finally:
            killer.join()

    setattr(owner, name, wrapped)


def kill(seconds: float, who: str) -> None:
    """Kill `who` after some seconds, and record when."""
    this = int(os.environ.get("STANDS_FOR_RANK", os.getpid()))  # the process that mpirun has started
    parent = int(Path(f"/proc/{this}/stat").read_text().split()[3])
    siblings = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    victims = {
        "self": [os.getpid()],
        "all": sorted(map(int, siblings), key=lambda pid: pid == this),  # oneself last
        "mpirun": [parent],
    }[who]
    record = os.open(os.environ["FAULT_RECORD"], os.O_WRONLY)
    time.sleep(seconds)
    os.write(record, str(time.monotonic()).encode())
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
