"""Writing a step beside other work: the ranks copy, go on, and a thread of each writes what was copied.

A step is written in two phases. First every rank's thread writes its file into a folder with a temporary name. Then
that of rank 0 writes the index, which names every file with its bytes and sha256, gives the folder its name, and
removes the oldest steps. The threads know nothing of each other and call no MPI: at a boundary of the other work, where
all ranks know that they are done (a flag on a collective that they do anyway will tell), they `advance` to the next
phase together. Whatever happens on the way, on any rank, all ranks learn of it alike, and the earlier steps stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpcprune.checkpoint.block import Block
from hpcprune.checkpoint.format import State
from hpcprune.checkpoint.parts import Index, SpanLike, take_index, take_part, write_index, write_part
from hpcprune.checkpoint.steps import give_name, prepare_folder, remove_old, step_folder
from hpcprune.errors import CheckpointError

__all__ = ["BackgroundWriter", "Ranks", "write_step"]


class Ranks(Protocol):
    """What of hpcprune.world.World is needed here."""

    rank: int
    size: int

    def allgather(self, value: Any, what: str) -> list[Any]: ...
    def bcast(self, value: Any, what: str, root: int = 0) -> Any: ...


@dataclass
class _Step:
    """A step that is being written. `index` is rank 0's; `naming` says that the second phase has begun."""

    what: str
    number: int
    partial: Path
    index: Index | None = None
    naming: bool = False


class BackgroundWriter:
    """Writes the steps of a run, one at a time. `begin`, `advance` and `finish` are collective; `done` is not."""

    def __init__(self, root: str | Path, shards: Sequence[Sequence[SpanLike]], world: Ranks, keep: int) -> None:
        """
        Args:
            root: the folder of all steps; made if it is not there.
            shards: the spans that each rank writes, the same on all ranks; together every weight once.
            keep: how many steps to keep, the newest included; older ones are removed once it is complete.
        """
        if keep < 1 or len(shards) != world.size:
            raise CheckpointError(
                f"{root}: keep={keep}, {len(shards)} shards for {world.size} ranks; keep at least 1 step, and give one "
                f"shard a rank"
            )
        self._root, self._shards, self._world, self._keep = Path(root), shards, world, keep
        self._step: _Step | None = None
        self._work: Future[Block | None] | None = None

    @property
    def done(self) -> bool:
        """Whether this rank has nothing left to do in the present phase: its thread has ended, well or not."""
        return self._work is None or self._work.done()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, on any rank: `begin` would not have to wait."""
        return self._step is None

    def begin(self, step: int, state: State, *, copied: bool = True) -> None:
        """Copy this rank's part of a step and start to write it; the state may change from then on.

        A step that is still being written is finished first, so that there is never more than one copy.

        Args:
            step: its number; a step of this number that is there already is replaced once the new one is complete.
            state: the same on all ranks, except for `own`; `about` is rank 0's.
            copied: False where it will not change until the step is finished: that takes no memory.

        Raises:
            CheckpointError: on all ranks alike, if the folder cannot be made, or the step before could not be written.
        """
        self.finish()
        what = f"checkpoint of step {step}"
        if not 0 <= step < 10**18:
            raise CheckpointError(f"{what}: number steps from 0, with at most 18 digits")
        self._step = _Step(what, step, self._prepare(step, what))
        try:
            if self._world.rank == 0:
                self._step.index = take_index(step, state)
            part = take_part(step, state, self._shards, self._world.rank, copied=copied)
        except Exception as error:
            # The others do not know of it: they learn of it with everything else that went wrong.
            self._work = Future()
            self._work.set_exception(error)
        else:
            partial = self._step.partial
            self._work = _start(lambda: write_part(partial, part))

    def _prepare(self, step: int, what: str) -> Path:
        prepared: Path | str = ""
        cause: Exception | None = None
        if self._world.rank == 0:
            try:
                prepared = prepare_folder(self._root, step)
            except Exception as error:
                prepared, cause = _describe(error), error
        prepared = self._world.bcast(prepared, what)
        if isinstance(prepared, str):
            raise CheckpointError(prepared) from cause
        return self._root / prepared.name

    def advance(self) -> None:
        """End the present phase and start the next, if there is one; to be called when every rank is `done`.

        A rank that is not done is waited for. Nothing happens where no step is being written.

        Raises:
            CheckpointError: on all ranks alike, if the phase failed on any of them. The earlier steps are untouched.
        """
        step = self._step
        if step is None:
            return
        outcome: Block | str | None = None
        cause = self._work.exception() if self._work else None
        if cause is not None:
            outcome = _describe(cause)
        elif self._work:
            outcome = self._work.result()
        self._work = None
        outcomes = self._world.allgather(outcome, step.what)
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if isinstance(text, str)]
        if failures:
            self._step = None
            if self._world.rank == 0:
                shutil.rmtree(step.partial, ignore_errors=True)
            others = f" (and {len(failures) - 1} more ranks failed)" if len(failures) > 1 else ""
            raise CheckpointError(f"{failures[0] if len(outcomes) > 1 else failures[0][8:]}{others}") from cause
        if step.naming:
            self._step = None
            return
        step.naming = True
        if step.index is not None:
            index = step.index
            self._work = _start(lambda: self._complete(step.partial, index, outcomes))

    def _complete(self, partial: Path, index: Index, blocks: Sequence[Block]) -> None:
        write_index(partial, index, blocks)
        give_name(partial, step_folder(self._root, index.step))
        remove_old(self._root, index.step, self._keep)

    def finish(self) -> None:
        """Wait until what was begun is complete; CheckpointError as in `advance`."""
        while self._step is not None:
            self.advance()


def write_step(
    root: str | Path, step: int, state: State, shards: Sequence[Sequence[SpanLike]], world: Ranks, keep: int
) -> Path:
    """Write a step, every rank its part, and wait for it; collective.

    Arguments and errors are those of `BackgroundWriter`.

    Returns:
        The step's folder.
    """
    writer = BackgroundWriter(root, shards, world, keep)
    writer.begin(step, state, copied=False)
    writer.finish()
    return step_folder(Path(root), step)


def _start(action: Callable[[], Block | None]) -> Future[Block | None]:
    """Do something in a thread. Whatever it raises is kept for whoever asks for the result."""
    pool = ThreadPoolExecutor(1, "checkpoint")
    future = pool.submit(action)
    pool.shutdown(wait=False)  # the thread ends with its work
    return future


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
