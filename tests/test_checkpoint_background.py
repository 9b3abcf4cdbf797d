"""Steps written beside other work: what is copied, when it is complete, and whose failure is told when."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hpcprune.checkpoint.background as background
from hpcprune.checkpoint import BackgroundWriter, State, TensorState, newest_step, read_step, write_step
from hpcprune.checkpoint.parts import take_index, take_part
from hpcprune.checkpoint.portion import portion_of
from hpcprune.errors import CheckpointError
from hpcprune.shards import Layer, Span, deal
from hpcprune.world import World
from tests.checkpoint_states import assert_same_layers, assert_same_tensors, random_layer, small_state
from tests.test_checkpoint_steps import CALLS, ROOT, cut_off_at


def spans_of(state: State, ranks: int = 1) -> list[list[Span]]:
    return deal([Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items()], ranks)


def writer_of(root: Path, keep: int = 2) -> BackgroundWriter:
    return BackgroundWriter(root, spans_of(small_state()), World.alone(), keep)


def taken(number: int) -> State:
    return State({"take": number}, small_state().layers)


def newest_take(root: Path) -> object:
    path, passed_over = newest_step(root)
    assert path is not None and passed_over == []
    return read_step(path).about["take"]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def wait_until_done(writer: BackgroundWriter) -> None:
    end = time.monotonic() + 20
    while not writer.done:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes its time: nothing is durable before the event is set."""
    ready, fsync = threading.Event(), os.fsync

    def slow(fd: int) -> None:
        assert ready.wait(20)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    yield ready
    ready.set()


def test_other_work_goes_on_while_the_disk_takes_its_time(tmp_path: Path, disk: threading.Event) -> None:
    disk.set()
    write_step(tmp_path, 1, taken(1), spans_of(small_state()), World.alone(), 1)
    disk.clear()
    writer = writer_of(tmp_path, keep=1)
    writer.begin(2, taken(2))
    assert not writer.done
    assert newest_take(tmp_path) == 1
    disk.set()
    wait_until_done(writer)
    assert newest_take(tmp_path) == 1, "its file is on the disk, and the step is not complete before it has an index"
    disk.clear()
    writer.advance()
    assert not writer.done
    assert newest_take(tmp_path) == 1
    disk.set()
    wait_until_done(writer)
    writer.advance()
    assert names(tmp_path) == ["step-00000002"]
    assert newest_take(tmp_path) == 2


def test_what_is_written_is_what_was_there_when_it_began(tmp_path: Path, disk: threading.Event) -> None:
    state, expected = small_state(), small_state()
    state.about["history"] = [{"loss": 1.0}]
    writer = writer_of(tmp_path)
    writer.begin(5, state)
    state.about["history"][0]["loss"] = 2.0
    for layer in state.layers.values():
        layer.values[...] = 0
        layer.attributes["criterion"] = "changed"
        if layer.mask is not None:
            layer.mask[...] = 0
    for tensor in (*state.tensors.values(), *state.own.values()):
        tensor.array[...] = 0
    disk.set()
    writer.finish()
    back = read_step(tmp_path / "step-00000005")
    assert back.about == {**expected.about, "history": [{"loss": 1.0}]}
    assert_same_layers(back.layers, expected.layers)
    assert_same_tensors(back.tensors, expected.tensors)
    assert_same_tensors(back.own[0], expected.own)


def test_a_rank_copies_what_it_writes_and_no_more() -> None:
    layers = {"a": random_layer((300, 100), "float32", 0.1, 1), "b": random_layer((999,), "bfloat16", 0.5, 2)}
    tensors = {f"optimizer/{number}": TensorState(np.ones(1000, "f4"), "float32") for number in range(8)}
    state = State({}, layers, tensors, {"own": TensorState(np.ones(10), "float64")})
    shards = spans_of(state, 4)
    for rank, spans in enumerate(shards):
        part = take_part(1, state, shards, rank)
        portions = [
            portion_of(str(span), 0, list(layers.values())[span.layer], span.start, span.stop) for span in spans
        ]
        assert sum(portion.survivors for portion in portions) == sum(
            values.size for portion in part.layers for values in portion.values
        )
        for portion in part.layers:
            assert portion.mask is not None and portion.mask.size == (portion.weights + 7) // 8
            assert not np.shares_memory(portion.mask, layers[portion.name].mask)
            assert not any(np.shares_memory(values, layers[portion.name].values) for values in portion.values)
        assert len(part.tensors) < len(tensors)
        assert not any(np.shares_memory(part.tensors[key].array, tensors[key].array) for key in part.tensors)
    assert "values" not in str(take_index(1, state).layers)


def test_a_step_that_is_due_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = []

    def note(step: int, *arguments: object, copied: bool) -> object:
        began.append((step, names(tmp_path)))
        return take_part(step, *arguments, copied=copied)  # type: ignore[arg-type]

    monkeypatch.setattr(background, "take_part", note)
    writer = writer_of(tmp_path)
    for number in (1, 2, 3):
        writer.begin(number, taken(number))
    writer.finish()
    steps = [[name for name in there if not name.startswith(".")] for _, there in began]
    assert steps == [[], ["step-00000001"], ["step-00000001", "step-00000002"]]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_where_nothing_was_begun_there_is_nothing_to_do(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    assert writer.done
    writer.advance()
    writer.finish()
    writer.begin(1, taken(1))
    writer.finish()
    writer.finish()
    writer.advance()
    assert writer.done
    assert newest_take(tmp_path) == 1


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    write_step(tmp_path, 1, taken(1), spans_of(small_state()), World.alone(), 1)
    end = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.001)


# Failures

FAILURES: dict[str, tuple[str, BaseException, str]] = {
    "the shard, no room": ("write_part", OSError(errno.ENOSPC, "No space left"), "OSError"),
    "the shard, no memory": ("write_part", MemoryError("too much"), "MemoryError: too much"),
    "the shard, told to exit": ("write_part", SystemExit(3), "SystemExit: 3"),
    "the copy": ("take_part", MemoryError("too much"), "MemoryError: too much"),
    "the index": ("write_index", CheckpointError("about.x: is odd"), "^about.x: is odd$"),
    "the name": ("give_name", CheckpointError("cannot be renamed"), "^cannot be renamed$"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("waiting", [False, True], ids=["advance", "finish"])
def test_a_failure_is_told_and_the_steps_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, waiting: bool
) -> None:
    function, error, message = FAILURES[name]
    writer = writer_of(tmp_path, keep=1)
    writer.begin(1, taken(1))
    writer.finish()

    def fail(*arguments: object, **named: object) -> None:
        raise error

    def end() -> None:
        while not waiting:
            wait_until_done(writer)
            writer.advance()
        writer.finish()

    with monkeypatch.context() as patch:
        patch.setattr(background, function, fail)
        writer.begin(2, taken(2))
        with pytest.raises(CheckpointError, match=message):
            end()
    assert names(tmp_path) == ["step-00000001"]
    assert newest_take(tmp_path) == 1
    writer.finish()
    writer.begin(3, taken(3))
    writer.finish()
    assert names(tmp_path) == ["step-00000003"]


def test_a_failure_is_told_when_the_next_one_begins(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    writer.begin(1, taken(1))
    writer.finish()
    bad = taken(2)
    bad.layers["conv.weight"].dtype = "float8"
    writer.begin(2, bad)
    with pytest.raises(CheckpointError, match=r"conv\.weight: dtype 'float8'"):
        writer.begin(3, taken(3))
    assert newest_take(tmp_path) == 1
    writer.begin(3, taken(3))
    writer.finish()
    assert newest_take(tmp_path) == 3


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("in the way")
    writer = writer_of(tmp_path / "steps")
    with pytest.raises(CheckpointError, match="steps: cannot be written"):
        writer.begin(1, taken(1))
    assert writer.done
    writer.finish()


def failing_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Let the `moment`-th call to the disk, and those after it, find it full; whether it came to that."""
    count = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count >= moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return call

    for home, name in CALLS:
        if name not in ("rename", "open"):  # these succeed on a full disk
            monkeypatch.setattr(home, name, counted(getattr(home, name)))
    return lambda: count >= moment


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, for tests that write some hundred steps and never lose the machine's memory."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def test_a_disk_that_is_full_from_any_moment_on_costs_no_step(tmp_path: Path, fast: None) -> None:
    moment, failed = 0, True
    while failed:
        moment += 1
        root = tmp_path / str(moment)
        writer = writer_of(root, keep=1)
        writer.begin(1, taken(1))
        writer.finish()
        with pytest.MonkeyPatch.context() as patch:
            met = failing_at(moment, patch)
            writer.begin(2, taken(2))
            try:
                writer.finish()
                failed = False
            except CheckpointError as error:
                assert "the disk is full; free some space, and run again" in str(error)
            assert met() == failed
        assert newest_take(root) in ((1, 2) if failed else (2,))
        assert not list(root.glob(".*")), moment
        writer.begin(3, taken(3))
        writer.finish()
        assert names(root) == ["step-00000003"]
    assert moment > 15


# Being cut off


def beside_work(root: Path, number: int, state: State) -> None:
    """Write a step as a training loop does: it never waits, and looks after each of its own steps."""
    writer = writer_of(root, keep=1)
    writer.begin(number, state)
    for _ in range(2):
        while not writer.done:
            time.sleep(0.0001)
        writer.advance()
    assert newest_take(root) == 2


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_at_any_moment_beside_other_work_a_complete_step_is_left(tmp_path: Path, fast: None) -> None:
    ended = False
    moment = 0
    while not ended:
        moment += 1
        root = tmp_path / str(moment)
        write_step(root, 1, taken(1), spans_of(small_state()), World.alone(), 1)
        ended = cut_off_at(moment, lambda: beside_work(root, 1, taken(2)))  # noqa: B023
        assert newest_take(root) == 2 or not ended
        writer = writer_of(root, keep=1)
        writer.begin(3, taken(3))
        writer.finish()
        assert names(root) == ["step-00000003"]
        shutil.rmtree(root)
    assert moment > 20


TRAINER = """
import sys
from pathlib import Path
import numpy as np
from hpcprune.checkpoint import BackgroundWriter, LayerState, State
from hpcprune.shards import Layer, deal
from hpcprune.world import World
weights, number, begun = np.zeros(300_000, "f4"), 0, 0
writer = BackgroundWriter(sys.argv[1], deal([Layer("w", (300_000,), "float32")], 1), World.alone(), 2)
while True:
    number += 1
    weights += 1
    if writer.done:
        writer.advance()
    if number % 7 == 0:
        writer.begin(number, State({"number": number}, {"w": LayerState((300_000,), "float32", weights)}))
        print(begun, flush=True)  # the one before is complete
        begun = number
"""


@pytest.mark.parametrize("delay", [0.0, 0.004, 0.017, 0.04])
def test_killed_by_the_clock_beside_other_work_a_step_is_whole(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline(), trainer.stdout.readline()
        time.sleep(delay)
        trainer.kill()
        done = max([7, *map(int, trainer.stdout.readlines())])
    path, passed_over = newest_step(tmp_path)
    assert path is not None
    assert passed_over == []
    back = read_step(path)
    assert back.step >= done
    assert set(back.layers["w"].values) == {back.step}, "weights of a later moment are in it"
