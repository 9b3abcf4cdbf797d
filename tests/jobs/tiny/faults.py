"""Faults on demand: this process, all ranks or mpirun die at a chosen moment inside hpcprune.

FAULT="<moment>:<count>:<milliseconds>:<who>": when `moment` is come to for the `count`-th time, that much later `who`
("self", "all" or "mpirun") is killed with SIGKILL. FAULT_RANK says which rank counts.
"""

import importlib
import os
import signal
import threading
import time
from pathlib import Path

# Where the work of each moment is done, as the module that calls it names it.
MOMENTS = {
    "scoring": "hpcprune.pruning:_scores",
    "threshold": "hpcprune.pruning:select_survivors",
    "masks": "hpcprune.pruning:gather_masks",
    "backward": "hpcprune.buckets:Buckets.backward",
    "all-reduce": "hpcprune.buckets:Buckets.wait",
    "evaluation": "hpcprune.run:evaluate",
    "copying": "hpcprune.checkpoint.background:BackgroundWriter.begin",
    "writing": "hpcprune.checkpoint.background:write_part",
    "renaming": "hpcprune.checkpoint.background:give_name",
    "result": "hpcprune.run:write_model",
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
    inner, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == int(count):
            threading.Thread(target=die, args=(float(milliseconds) / 1e3, who), daemon=True).start()
            time.sleep(0)  # let it start
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def die(seconds: float, who: str) -> None:
    time.sleep(seconds)
    parent = os.getppid()
    if who == "mpirun":
        os.kill(parent, signal.SIGKILL)
    elif who == "all":
        siblings = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for pid in sorted(map(int, siblings), key=lambda pid: pid == os.getpid()):  # oneself last
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
