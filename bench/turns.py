"""Contenders timed in turns, so that what else the machine does hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

TURNS, LONGEST = 9, 1.0  # of each contender; who takes longer than this many seconds has one turn


def in_turns(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each. In each turn the second call counts, which finds its data where the first left it."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    slow = set()
    for _ in range(TURNS):
        for name, contender in contenders.items():
            if name in slow:
                continue
            taken = _time(contender)
            if taken > LONGEST:
                slow.add(name)
            seconds[name].append(taken if name in slow else _time(contender))
    return {name: statistics.median(own) for name, own in seconds.items()}


def _time(contender: Callable[[], object]) -> float:
    start = time.perf_counter()
    contender()
    return time.perf_counter() - start
