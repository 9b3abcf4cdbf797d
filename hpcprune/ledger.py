"""The ledger: where a run stands and what it has done so far, as plain data.

It is written into every checkpoint as it is, so whatever the report needs of the past must be in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter
from typing import Any

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """A run's position and history. Everything in it is JSON."""

    round: int = 0
    """0 is the dense network's training; from 1 on, the rounds."""
    step: int = 0
    """Optimizer steps done in this round."""
    complete: bool = False
    """Whether this round is trained and evaluated."""
    order: list[str] = field(default_factory=list)
    """The parameters' names in the order in which backward finishes them; empty before the run's first step."""
    packed: bool | None = None
    """Whether this round packs survivors' gradients; None before it is decided."""
    sparse: list[str] | None = None
    """The layers that compute with survivors alone in this round's retraining; None before it is decided."""
    run_step: int = 0
    """Optimizer steps and prunings done in the run: it numbers the checkpoints."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    exchange: list[dict[str, Any]] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)
    dense: dict[str, Any] = field(default_factory=dict)
    """The dense network's costs and the histogram of its weights."""
    resumed: list[int] = field(default_factory=list)
    """The run steps from which the run was gone on with."""
    metrics_bytes: int = 0
    """How long metrics.jsonl was at this point."""

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that `as_dict` gave, of this version or an older one."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds inside to a stage of this round."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add_seconds(stage, perf_counter() - start)

    def add_seconds(self, stage: str, seconds: float) -> None:
        for entry in self.stages:
            if (entry["name"], entry["round"]) == (stage, self.round):
                entry["seconds"] += seconds
                return
        self.stages.append({"name": stage, "round": self.round, "seconds": seconds})

    def add_exchange(self, **figures: float) -> None:
        """Add one step's figures to the sums of this round (see report/format.py's RoundExchange)."""
        if not self.exchange or self.exchange[-1]["round"] != self.round:
            self.exchange.append({"round": self.round, "steps": 0, **dict.fromkeys(figures, 0)})
        entry = self.exchange[-1]
        entry["steps"] += 1
        for key, figure in figures.items():
            entry[key] += figure
