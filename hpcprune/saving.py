"""Saving a run: when a checkpoint is due, what it holds, and writing it while training goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from hpcprune.agreement import check_weights
from hpcprune.checkpoint import BackgroundWriter, State, write_model
from hpcprune.folder import RunFolder
from hpcprune.host import versions
from hpcprune.job import Job
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.prepare import Prepared
from hpcprune.snapshot import load_buffers, own_buffers, snapshot
from hpcprune.stage import Carried
from hpcprune.train import average_batch_norm
from hpcprune.world import World

__all__ = ["Saver"]


class Saver:
    """Saves a run. `begin`, `advance`, `finish` and `save` are collective, as those of `BackgroundWriter`.

    The seconds in which they hold the run up go into the ledger.
    """

    def __init__(self, job: Job, prepared: Prepared, folder: RunFolder, world: World) -> None:
        self._job, self._model, self._folder, self._world = job, prepared.model, folder, world
        self._writer = BackgroundWriter(folder.checkpoints, prepared.shards, world, job.checkpoint.keep)
        self._last = time.monotonic()
        self._about = {
            "job": job.to_yaml(),
            "job_digest": job.digest(),
            "versions": versions(),
            "seed": job.seed,
            "ranks": world.size,
        }

    @property
    def done(self) -> bool:
        """Whether this rank has nothing left to write before all ranks `advance`."""
        return self._writer.done

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, on any rank."""
        return self._writer.idle

    @property
    def late(self) -> bool:
        """Whether a checkpoint is due by the clock. Only rank 0 says so: clocks differ."""
        minutes = self._job.checkpoint.every_minutes
        return self._world.rank == 0 and minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def due(self, run_step: int, late: bool) -> bool:
        """Whether a checkpoint is due after a step; `late`: rank 0 said that it is so by its clock."""
        steps = self._job.checkpoint.every_steps
        return late or (steps is not None and run_step % steps == 0)

    def begin(self, masks: Masks, ledger: Ledger, carried: Carried, *, copied: bool = True) -> None:
        """Copy the run as it stands, and begin to write it; not `copied`, it must stay so until that is finished.

        Raises:
            WorldError: the ranks' weights differ; nothing is written then.
            NumericsError: some are not finite; nothing is written then.
            CheckpointError: the checkpoint before, or the folder of this one, could not be written.
        """
        with ledger.timed("checkpoint"):
            self._writer.finish()
            self._last = time.monotonic()
            what = f"checkpoint of step {ledger.run_step}"
            if self._world.rank == 0:
                ledger.metrics_bytes = self._folder.flush_metrics()
            ledger.metrics_bytes = self._world.bcast(ledger.metrics_bytes, f"{what}: metrics")
            with self._averaged() as buffers:
                own = {f"buffers/{name}": value for name, value in buffers.items()}
                own |= {f"exchange/{name}": value for name, value in carried.own.items()}
                state = self._state(masks, ledger, {"ledger": ledger.as_dict()}, carried.optimizer, own)
            check_weights(state, self._world, what)
            self._writer.begin(ledger.run_step, state, copied=copied)

    def save(self, masks: Masks, ledger: Ledger, carried: Carried) -> None:
        """Write the run as it stands, and wait for it, which takes no copy. Raises what `begin` and `finish` do."""
        self.begin(masks, ledger, carried, copied=False)
        self.finish(ledger)

    def advance(self, ledger: Ledger) -> None:
        """Go on with what was begun, when every rank is `done`; CheckpointError if it could not be written."""
        with ledger.timed("checkpoint"):
            self._writer.advance()

    def finish(self, ledger: Ledger) -> None:
        """Wait until what was begun is complete; CheckpointError if it could not be written."""
        with ledger.timed("checkpoint"):
            self._writer.finish()

    def check(self, masks: Masks, ledger: Ledger, what: str) -> None:
        """WorldError or NumericsError, on all ranks, if their weights differ or are not finite. Collective."""
        with ledger.timed("checkpoint"):
            check_weights(self._result(masks, ledger, {}), self._world, what)

    def write_result(self, path: Path, masks: Masks, ledger: Ledger, **about: Any) -> str:
        """Write the model under its masks and what describes the run, `about` too; its sha256. Collective."""
        with ledger.timed("checkpoint"):
            return self._world.lead(
                lambda: write_model(path, self._result(masks, ledger, about)), f"writing {path.name}"
            )

    def write_early(self, path: Path, masks: Masks, ledger: Ledger) -> None:
        """Write the model in the middle of a training, which goes on as if it had not been. Collective."""
        with self._averaged():
            self.write_result(path, masks, ledger)

    @contextmanager
    def _averaged(self) -> Iterator[dict[str, Tensor]]:
        """Have batch norms with the statistics of all ranks; gives this rank's own, which are its again afterwards."""
        buffers = own_buffers(self._model)
        average_batch_norm(self._model, self._world)
        yield buffers
        load_buffers(self._model, buffers)

    def _result(self, masks: Masks, ledger: Ledger, about: Mapping[str, Any]) -> State:
        return self._state(masks, ledger, about, {}, {})

    def _state(
        self,
        masks: Masks,
        ledger: Ledger,
        more: Mapping[str, Any],
        optimizer: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> State:
        known = {"sparsity": masks.of("weights").sparsity, "mask_hash": masks.hash, "history": ledger.evaluations}
        about = {**self._about, **known, **more}
        attributes: dict[str, dict[str, str | float]] = {}
        for layer in masks.layers:
            found = attributes[layer.name] = {} if layer.kind == "weights" else {"kind": layer.kind}
            if masks.nonzeros < masks.weights:
                threshold = ledger.thresholds.get(layer.name)  # of rows there is none
                found["criterion"] = self._job.prune.criteria[layer.kind].name
                found |= {} if threshold is None else {"threshold": threshold}
        return snapshot(self._model, masks, about, attributes, optimizer, own_buffers(self._model), own)
