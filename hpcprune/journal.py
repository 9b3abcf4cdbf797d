"""The journal of a run: what it does goes into its ledger, into metrics.jsonl, and to whoever asks from outside."""

from __future__ import annotations

from typing import Any

from hpcprune.beat import Pulse
from hpcprune.folder import RunFolder
from hpcprune.ledger import Ledger
from hpcprune.train import Step, Trainer
from hpcprune.world import World

__all__ = ["Journal"]


class Journal:
    """The journal that this rank keeps; only rank 0's goes to the disk."""

    def __init__(self, folder: RunFolder, world: World, rounds: int) -> None:
        self._folder = folder if world.rank == 0 else None
        self._pulse = Pulse(folder.status if world.rank == 0 else None)
        self._pulse.beat.ranks, self._pulse.beat.rounds = world.size, rounds

    @property
    def pace(self) -> float:
        """Seconds a step of this stage."""
        return self._pulse.pace

    def stage(self, name: str, ledger: Ledger, sparsity: float, steps: int = 0) -> None:
        """A stage of a round begins, or goes on where the ledger stands."""
        beat = self._pulse.beat
        beat.round, beat.rounds, beat.sparsity = ledger.round, max(beat.rounds, ledger.round), sparsity
        self._pulse.begin(name, ledger.step if steps else 0, steps)

    def step(self, stage: str, ledger: Ledger, step: Step, trainer: Trainer, sent: int, later: int) -> None:
        """A step is done.

        sent: bytes that this rank has given to the exchange in it. later: steps of the rounds to come.
        """
        dense, batch = trainer.survivors.dense_bytes, trainer.plan.batch
        ledger.step += 1
        ledger.run_step += 1
        ledger.add_seconds(stage, step.seconds)
        ledger.add_exchange(
            bytes_dense=dense,
            bytes_sent=sent,
            seconds=step.seconds,
            waited=step.waited,
            overlap=step.overlap,
            samples=batch,
        )
        self._log(
            "step",
            ledger,
            stage=stage,
            step=ledger.step,
            loss=step.loss,
            learning_rate=step.learning_rate,
            seconds=step.seconds,
            waited=step.waited,
            overlap=step.overlap,
            samples_per_second=batch / step.seconds,
            bytes_dense=dense,
            bytes_sent=sent,
        )
        self._pulse.advance(ledger.step, later)

    def evaluation(
        self,
        ledger: Ledger,
        when: str,
        sparsity: float,
        graph: dict[str, tuple[int, int]] | None,
        metrics: dict[str, float],
        seconds: float,
    ) -> None:
        """The network was evaluated, at a sparsity of its weights and with what is left of its graph, if it has one."""
        ledger.add_seconds("evaluate", seconds)
        found = {
            "when": when,
            "round": ledger.round,
            "sparsity": sparsity,
            "step": ledger.run_step,
            "metrics": metrics,
            "seconds": seconds,
        }
        if graph is not None:
            found["graph"] = {thing: 1 - left / had for thing, (had, left) in graph.items()}
        ledger.evaluations.append(found)
        self._pulse.evaluation(metrics)
        self._log("evaluation", ledger, **found)

    def _log(self, kind: str, ledger: Ledger, **values: Any) -> None:
        if self._folder is not None:
            line = {"kind": kind, "run_step": ledger.run_step, "round": ledger.round}
            self._folder.write_metrics(line | values)
