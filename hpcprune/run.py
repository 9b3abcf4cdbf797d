"""One run, from job to report: the stages in order, and going on where an earlier process was cut.

Round 0 trains or loads the dense network; every further round prunes and retrains. The run's whole state is the model,
the masks, the optimizer's tensors and a ledger; a checkpoint is that state, so a run that is started again takes the
newest complete checkpoint and does what is left.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from hpcprune.errors import CheckpointError, NumericsError
from hpcprune.evaluate import evaluate
from hpcprune.exchange.choose import open_exchange
from hpcprune.exchange.wire import travelling_dtypes
from hpcprune.folder import RunFolder
from hpcprune.graph import graph_left
from hpcprune.job import Job
from hpcprune.journal import Journal
from hpcprune.launch import check_code, check_folder, late_checkpoint
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.narration import evaluated, introduction, pruned
from hpcprune.optimizer import followed_only
from hpcprune.outcome import build_report, measure_costs, measure_inference, rank_load, weight_histogram
from hpcprune.prepare import prepare
from hpcprune.progress import Display
from hpcprune.report.page import write_html
from hpcprune.report.write import write_json
from hpcprune.resuming import resume
from hpcprune.rounds import next_share, prune_round
from hpcprune.saving import Saver
from hpcprune.schedule import name_of_round, steps_after_round, steps_of_round
from hpcprune.slurm import seconds_left
from hpcprune.snapshot import take_result
from hpcprune.stage import Carried, begin_stage
from hpcprune.stop import StopFlag
from hpcprune.train import Trainer, average_batch_norm
from hpcprune.until import Goal, best_round, parse, told, tried
from hpcprune.weights import fit_weights, load_weights
from hpcprune.world import World

__all__ = ["Run", "StoppedError"]

PACED = 3  # steps after which a training's pace is known


class StoppedError(Exception):
    """The run was told to stop and has written a checkpoint; the text says where it stands."""


class Run:
    """One run of a job on all ranks of a world. Everything here is collective."""

    def __init__(self, job: Job, world: World, display: Display, stop: StopFlag, folder: RunFolder) -> None:
        """Prepare the run: what is wrong with the job, the task, the weights or the folder is found here."""
        self.job, self.world, self.display, self.stop, self.folder = job, world, display, stop, folder
        odd = check_code(job, world)
        self.prepared = prepare(job, world)
        self.model = self.prepared.model
        dtypes = travelling_dtypes(self.model, job.retrain)
        self.exchange, why = open_exchange(job.retrain.exchange, world, self.prepared.device, dtypes)
        world.lead(lambda: folder.open(job, 2 * self.prepared.dense_bytes), "opening the run's folder")
        check_folder(folder.path, world)
        for line in introduction(self.prepared, world, why):
            display.say(line)
        self._warn(odd)
        self.masks = Masks.full(self.prepared.layers)
        self.ledger = Ledger()
        self.saver = Saver(job, self.prepared, folder, world)
        self.journal = Journal(folder, world, job.prune.rounds)
        self._carried = Carried({}, {}, None)
        self.goal = None if job.prune.until is None else parse(job.prune.until)

    def go(self) -> None:
        """Do all that is left of the run.

        Raises:
            StoppedError: a signal asked for it; a checkpoint is complete.
        """
        self._resume()
        try:
            self._do_rounds()
        except NumericsError as diverged:
            try:
                self.saver.finish(self.ledger)  # all ranks raise it in the same place; what was begun before is good
            except CheckpointError as error:
                raise NumericsError(f"{diverged}. Besides, {error}") from error
            raise
        self._finish()
        self.exchange.close()

    def _warn(self, odd: str | None) -> None:
        if odd is not None:
            self.display.say(f"warning: {odd}")

    # Rounds

    def _do_rounds(self) -> None:
        if not (self.ledger.round > 0 or self.ledger.complete):
            self._dense_round()
        if not self.ledger.complete:
            self._retrain()
        while (share := next_share(self.job.prune, self.ledger)) is not None:
            self._go_back()
            self._prune(share)
            self._retrain()
        self._take_best()

    def _dense_round(self) -> None:
        """Train the dense network, where it is not loaded; evaluate it, and measure what it costs."""
        plan = self.prepared.train
        if plan is not None:
            self._train("train")
        self._evaluate("dense")
        if self.job.weights_file is None:
            self.saver.write_result(self.folder.dense, self.masks, self.ledger)
        self.ledger.dense = {
            "costs": measure_costs(self.prepared, self.masks, self._dense_file),
            "histogram": weight_histogram(self.model, self.masks.of("weights")),
        }
        self._complete_round()

    def _retrain(self) -> None:
        """Do what is left of a round after its pruning."""
        self._train("retrain")
        self._evaluate("retrained")
        if self.goal is not None:
            self._look_at_goal(self.goal)
        self._complete_round()

    def _look_at_goal(self, goal: Goal) -> None:
        """Say whether the round meets the goal, and keep its network if it is the best so far."""
        self.display.say(f"{self._name}: {told(goal, self.ledger.evaluations)}")
        if self._best() == self.ledger.round:
            self.saver.write_result(self.folder.best, self.masks, self.ledger)

    def _prune(self, share: float) -> None:
        """Begin a round: prune to its share of the sparsity."""
        prune, ledger = self.job.prune, self.ledger
        ledger.round, ledger.complete = ledger.round + 1, False
        ledger.step = steps_of_round(prune, ledger.round, self.prepared.retrain.steps).start
        ledger.packed = ledger.sparse = None
        self.journal.stage("prune", ledger, self._sparsity)
        found = prune_round(self.job, self.prepared, self.masks, ledger, share, self._carried, self.world, self.display)
        if prune.rewind is not None:
            self._rewind()
        found.masks.apply(self.model)
        self.masks = found.masks
        ledger.run_step += 1
        ledger.thresholds |= {  # of layers of which nothing more goes, those from before hold
            name: threshold.value for name, threshold in found.thresholds.items() if math.isfinite(threshold.value)
        }
        for stage, seconds in found.seconds.items():
            ledger.add_seconds(stage, seconds)
        for line in pruned(self.model, self.masks):
            self.display.say(f"{self._name}: {line}")
        weights = sum(span.weights for span in self.prepared.shards[self.world.rank])
        self.display.say(f"scored {weights:,} weights in {sum(found.seconds.values()):.3f} s", every_rank=True)
        self._evaluate("pruned")

    def _best(self) -> int | None:
        """The round whose network is the best for the goal so far."""
        assert self.goal is not None
        best = best_round(self.goal, self.ledger.evaluations)
        return None if best is None else best[0]

    def _go_back(self) -> None:
        """Take the sparsest network that meets the goal, where the last round's misses it; else the dense one."""
        if self.goal is None or not (over := tried(self.goal, self.ledger.evaluations)) or over[-1].met:
            return
        self._take(self.folder.best if any(each.met for each in over) else None)

    def _take_best(self) -> None:
        """Take the result, where it is not the last round's."""
        if self.goal is not None and self._best() != self.ledger.round:
            self._take(self.folder.best)
            self._evaluate("best")

    def _take(self, best: Path | None) -> None:
        """Go on with the network of a file under its masks; with the dense one for None."""
        what = f"going back to {(best or self._dense_file).name}"
        if best is None:
            self.masks = Masks.full(self.prepared.layers)
            self.world.together(lambda: fit_weights(self.model, load_weights(self._dense_file), self._dense_file), what)
        else:
            self.masks, self.ledger.thresholds = self.world.together(
                lambda: take_result(best, self.model, self.masks), what
            )
        self.masks.agree(self.world)
        self._carried = Carried({}, {}, None)

    def _rewind(self) -> None:
        """Set the model to what it was early in the dense training; the momentum of other weights is no use to it.

        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv:1912.05671.
        """
        early = self.folder.early
        self.world.together(lambda: fit_weights(self.model, load_weights(early), early), f"going back to {early.name}")
        self._carried = Carried(followed_only(self._carried.optimizer), {}, self._carried.masks)

    def _keep_early(self, stage: str) -> None:
        """Write the network of now down where pruning will go back to it."""
        if stage == "train" and self.ledger.step == self.job.prune.rewind:
            self.saver.write_early(self.folder.early, self.masks, self.ledger)

    def _train(self, stage: str) -> None:
        """Do the steps of this round that are left."""
        ledger = self.ledger
        if stage == "retrain" and not self.prepared.retrain.steps:
            return  # not even survivors are laid out, which would take as much memory again
        decided = ledger.packed, ledger.sparse
        trainer = self._begin(stage)
        job, begun, due = self.job, ledger.step, False
        all_steps = self.prepared.retrain.steps
        steps = range(trainer.plan.steps) if stage == "train" else steps_of_round(job.prune, ledger.round, all_steps)
        later = steps_after_round(job.prune, ledger.round, all_steps)
        self.journal.stage(stage, ledger, self._sparsity, steps.stop)
        if (
            ledger.packed,
            ledger.sparse,
        ) != decided:  # kept before it has any effect: a run that goes on must not choose anew
            self.saver.save(self.masks, ledger, self._state_of(trainer))
        title = f"{self._name}: {stage}" if ledger.round else stage
        with self.display.stage(title, steps.stop, ledger.step) as progress:
            self._keep_early(stage)
            while ledger.step < steps.stop:
                sent = self.exchange.bytes_sent
                step = trainer.step(ledger.step, bool(self.stop), self.saver.done, self.saver.late)
                self.journal.step(stage, ledger, step, trainer, self.exchange.bytes_sent - sent, later)
                if not ledger.order:
                    ledger.order = self.world.bcast(trainer.buckets.order, "the order of backward")
                    self._end(trainer)
                    trainer = self._begin(stage)
                progress.advance(f"loss {step.loss:.4f}")
                self._keep_early(stage)
                if ledger.step == begun + PACED and self.world.rank == 0:
                    self._warn(
                        late_checkpoint(job.checkpoint, self.journal.pace, seconds_left(), steps.stop - ledger.step)
                    )
                if step.written:
                    self.saver.advance(ledger)
                due |= self.saver.due(ledger.run_step, step.due)
                if step.stop or (due and self.saver.idle and ledger.step < steps.stop):
                    self.saver.begin(self.masks, ledger, self._state_of(trainer))
                    due = False
                if step.stop:
                    self._stopped(f"{title}, step {ledger.step} of {steps.stop}")
        self.saver.finish(self.ledger)
        self._end(trainer)
        average_batch_norm(self.model, self.world)
        self.saver.check(self.masks, ledger, f"{stage}, after its last step")

    def _begin(self, stage: str) -> Trainer:
        return begin_stage(
            stage,
            self.job,
            self.prepared,
            self.masks,
            self.ledger,
            self._carried,
            self.world,
            self.exchange,
            self.display,
            self._dense_file,
        )

    def _end(self, trainer: Trainer) -> None:
        trainer.close()
        self._carried = self._state_of(trainer)

    def _state_of(self, trainer: Trainer) -> Carried:
        return Carried(trainer.optimizer_state(), trainer.own_state(), self.masks)

    def _evaluate(self, when: str) -> None:
        start = time.perf_counter()
        self.journal.stage("evaluate", self.ledger, self._sparsity)
        task, data = self.prepared.task, self.prepared.data
        known = when == "retrained" and not self.prepared.retrain.steps
        if known:
            metrics = self.ledger.evaluations[-1]["metrics"]  # those of the pruned network, which is still the same
        else:
            metrics = evaluate(task, self.model, data.test, self.job.evaluate.batch_size, self.world)
        seconds = time.perf_counter() - start
        graph = graph_left(self.model, self.masks)
        self.journal.evaluation(self.ledger, when, self._sparsity, graph, metrics, seconds)
        if not known:
            self.display.say(f"{self._name}: {when}: {evaluated(task, metrics)}")

    def _complete_round(self) -> None:
        self.ledger.complete = True
        if not self.ledger.round:  # the dense training's optimizer is not that of the rounds
            self._carried = Carried(followed_only(self._carried.optimizer), {}, self.masks)
        self.saver.save(self.masks, self.ledger, self._carried)
        stop = self.world.allgather(bool(self.stop), "agreeing whether to stop")
        if any(stop):
            self._stopped(f"{self._name} complete")

    def _stopped(self, where: str) -> None:
        self.saver.finish(self.ledger)
        signals = [name for name in self.world.allgather(self.stop.signal, "naming the signal") if name]
        self.exchange.close()
        raise StoppedError(
            f"stopped by {signals[0]} ({where}); the checkpoint is complete: run the same command again to go on"
        )

    # State

    def _resume(self) -> None:
        """Take the newest complete checkpoint, if there is one."""
        found = resume(self.folder.checkpoints, self.model, self.masks, self.world, self.display)
        if found is not None:
            self.ledger, self.masks, self._carried = found.ledger, found.masks, found.carried
        if self.world.rank == 0:
            self.folder.open_metrics(self.ledger.metrics_bytes)

    def _finish(self) -> None:
        """Write the result and the report."""
        prepared, ledger = self.prepared, self.ledger
        inference = self.world.lead(lambda: measure_inference(self.job, prepared, self.masks), "timing inference")
        sha256 = self.saver.write_result(self.folder.model, self.masks, ledger, inference=inference)
        loads = rank_load(prepared, ledger, self.world)

        def report() -> None:
            self.folder.flush_metrics()
            found = build_report(self.job, prepared, self.masks, ledger, self.folder, loads, inference, sha256)
            write_html(found, self.folder.html)
            write_json(found, self.folder.report)

        self.world.lead(report, "writing the report")

    @property
    def _sparsity(self) -> float:
        """Of the weights."""
        return self.masks.of("weights").sparsity

    @property
    def _name(self) -> str:
        return name_of_round(self.job.prune, self.ledger.round)

    @property
    def _dense_file(self) -> Path:
        return self.job.weights_file or self.folder.dense
