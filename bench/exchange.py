"""What a step of retraining costs between two hosts: hpcprune against torch's DDP and Horovod.

    python bench/exchange.py                            # 17 M and 100 M weights, at 1 Gbit/s and uncapped
    python bench/exchange.py --networks 17M --turns 1   # a quick look
    python bench/exchange.py --loopback --only 90%      # both ranks on one host
    python bench/exchange.py --tune                     # the sizes of buckets, and where packing pays
    python bench/exchange.py --scale                    # 1, 2, 4 and 8 ranks against a model, and what it says of more

Two ranks, each in a network namespace of its own (bench/netns.py: root and iproute2), so that all libraries take them
for two hosts; where namespaces cannot be made, on the loopback, uncapped, which is said. Perceptrons of 16 layers of
1024 x 1024 and of 24 layers of 2048 x 2048, 8 samples a rank, SGD with momentum, as many threads a rank as there are
cores for it. All contenders are trained in turns within one run, each built anew in each turn, so that what else the
machine does hits all alike; medians of the slower rank's steps. Bytes are those that the kernel counts as sent, headers
included. The limit is those bytes over the bandwidth. Read the ratios: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from netns import Hosts, mpirun

HERE = Path(__file__).resolve().parent
BEST_OF = "DDP", "DDP, bucket views"
RATES = 1.0, None  # Gbit/s
STEPS = {"17M": 6, "100M": 3}  # that count, of each contender in each turn
Results = dict[str, dict[str, Any]]


def on_ranks(hosts: Hosts | None, script: str, *arguments: str, ranks: int = 2) -> Any:
    """What rank 0 of a script beside this one prints as its last line."""
    command = [sys.executable, str(HERE / script), *arguments]
    printed = hosts.mpirun(command) if hosts else mpirun(ranks, command)
    return json.loads(printed.splitlines()[-1])


def title(network: str, rate: float | None, where: str) -> str:
    speed = f"{rate:g} Gbit/s" if rate else "uncapped"
    return f"\n{network} weights, {where}, {speed}, {len(os.sched_getaffinity(0))} cores in all"


def show(measured: Results, rate: float | None) -> None:
    """A table of the contenders; ratios are to the faster of DDP's two ways, where those were measured."""
    medians, sent = (
        {name: statistics.median(each[what]) for name, each in measured.items()} for what in ("seconds", "bytes_sent")
    )
    best = min((name for name in BEST_OF if name in measured), key=lambda name: medians[name], default=None)
    heads = "step ms", "DDP / it", "MB sent", "/ DDP", "limit ms", "overlap", "state / DDP"
    print(f"{'':28}" + "".join(f"{head:>12}" for head in heads))
    for name, each in measured.items():
        cells = [
            f"{medians[name] * 1e3:.1f}",
            f"{medians[best] / medians[name]:.2f}" if best else "-",
            f"{sent[name] / 1e6:.2f}",
            f"{sent[name] / sent[best]:.4f}" if best else "-",
            f"{sent[name] * 8 / rate / 1e6:.1f}" if rate else "-",
            f"{statistics.median(each['overlaps']):.2f}" if each["overlaps"] else "-",
            f"{each['state_bytes'] / measured[best]['state_bytes']:.4f}" if best else "-",
        ]
        print(f"{name:28}" + "".join(f"{cell:>12}" for cell in cells))


def compare(kind: str, networks: list[str], turns: int, only: str, loopback: bool) -> None:
    """A table for each network and rate."""
    with Hosts(2) if Hosts.possible() and not loopback else nullcontext() as hosts:
        where = "2 hosts" if hosts else f"2 ranks on one host{'' if loopback else ' (no root, or no iproute2)'}"
        for network in networks:
            for rate in RATES if hosts else (None,):
                if hosts:
                    hosts.limit(rate)
                measured = on_ranks(hosts, "exchange_rank.py", kind, network, str(turns), str(STEPS[network]), only)
                print(title(network, rate, where))
                show(measured, rate)


def scale(network: str) -> None:
    """Measured against the model for 1, 2, 4 and 8 hosts; then what the model says of more."""
    import exchange_model

    if not Hosts.possible():
        sys.exit("--scale needs network namespaces: root and iproute2")
    measured: dict[int, Any] = {}
    for ranks in (1, 2, 4, 8):
        with Hosts(ranks) as hosts:
            hosts.limit(exchange_model.RATE)
            measured[ranks] = on_ranks(hosts, "exchange_model.py", network)
    print(title(network, exchange_model.RATE, "1 to 8 hosts"))
    exchange_model.check(measured)
    exchange_model.predict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="only contenders with this in their names")
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--scale", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the hosts are removed
    if given.scale:
        scale(given.networks[0])
    elif given.tune:
        for kind in ("bucket_sizes", "packings"):
            compare(kind, given.networks, given.turns, given.only, given.loopback)
    else:
        compare("contenders", given.networks, given.turns, given.only, given.loopback)


if __name__ == "__main__":
    main()
