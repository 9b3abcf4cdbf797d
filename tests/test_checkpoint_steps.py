"""Steps: complete or absent whatever is cut off when, found again, and put together from any number of files."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcprune.checkpoint import State, TensorState, newest_step, read_step, write_model, write_step
from hpcprune.checkpoint.parts import take_part, write_part
from hpcprune.errors import CheckpointError
from hpcprune.shards import Layer, Span, deal
from hpcprune.world import World
from tests.checkpoint_states import (
    assert_same_layers,
    assert_same_tensors,
    random_layer,
    seal,
    small_state,
)

ROOT = Path(__file__).resolve().parent.parent


class Fake:
    """One of several ranks that in truth come one after another: what the others say was noted before."""

    def __init__(self, rank: int, size: int, said: list[object]) -> None:
        self.rank, self.size, self.said = rank, size, said

    def allgather(self, value: object, what: str) -> list[object]:
        return [value if rank == self.rank else other for rank, other in enumerate(self.said)]

    def bcast(self, value: object, what: str, root: int = 0) -> object:
        return value


def spans_of(state: State, ranks: int) -> list[list[Span]]:
    return deal([Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items()], ranks)


def write_alone(root: Path, step: int, state: State, keep: int = 3) -> Path:
    return write_step(root, step, state, spans_of(state, 1), World.alone(), keep)


def write_as(root: Path, step: int, states: list[State], shards: list[list[Span]]) -> Path:
    """A step of several ranks, written in this process: the others' files first, then rank 0's and the index."""
    elsewhere = root / "elsewhere"
    elsewhere.mkdir(parents=True)
    ranks = len(states)
    said: list[object] = [None]
    for rank in range(1, ranks):
        said.append(write_part(elsewhere, take_part(step, states[rank], shards, rank)))

    class First(Fake):
        def allgather(self, value: object, what: str) -> list[object]:
            for path in elsewhere.iterdir():
                path.rename(next(root.glob(".step-*.partial")) / path.name)
            return super().allgather(value, what)

    folder = write_step(root, step, states[0], shards, First(0, ranks, said), 3)
    elsewhere.rmdir()
    return folder


def ranks_of(state: State, ranks: int) -> list[State]:
    own = [{"mean": TensorState(np.full(3, rank, "f4"), "float32")} for rank in range(ranks)]
    return [State(state.about, state.layers, state.tensors, own[rank]) for rank in range(ranks)]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A complete step of three ranks."""
    return write_as(tmp_path, 400, ranks_of(small_state(), 3), spans_of(small_state(), 3))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_step_of_any_number_of_ranks_comes_back_whole(tmp_path: Path, ranks: int) -> None:
    states = ranks_of(small_state(), ranks)
    folder = write_as(tmp_path, 12, states, spans_of(states[0], ranks))
    assert folder == tmp_path / "step-00000012"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.h5", *(f"rank-{rank:04d}.h5" for rank in range(ranks))]
    )
    back = read_step(folder)
    assert back.step == 12
    assert back.about == states[0].about
    assert_same_layers(back.layers, states[0].layers)
    assert_same_tensors(back.tensors, states[0].tensors)
    for state, own in zip(states, back.own, strict=True):
        assert_same_tensors(own, state.own)


@pytest.mark.parametrize("seed", range(20))
def test_spans_may_begin_and_end_anywhere(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("format", "portion", "write", "pieces"):
        monkeypatch.setattr(sys.modules[f"hpcprune.checkpoint.{module}"], "CHUNK", 64)
    rng = np.random.default_rng(seed)
    state = State(
        layers={
            "a": random_layer((37, 9), "float32", 0.5, seed),
            "none": random_layer((0, 9), "float32", 0.5, seed),
            "b": random_layer((211,), "bfloat16", 0.05, seed + 1),
            "c": random_layer((100,), "float16", 1.0, seed + 2),
        }
    )
    shards: list[list[Span]] = [[], [], []]
    for number, layer in enumerate(state.layers.values()):
        cuts = sorted({0, layer.values.size, *rng.integers(0, layer.values.size + 1, 6).tolist()})
        for start, stop in itertools.pairwise(cuts):
            shards[rng.integers(3)].append(Span(number, start, stop))
    folder = write_as(tmp_path, 1, ranks_of(state, 3), shards)
    assert_same_layers(read_step(folder).layers, state.layers)


def test_tensors_are_shared_out_by_their_bytes(tmp_path: Path) -> None:
    state = State(tensors={f"buffers/{n}": TensorState(np.zeros(1000 * (n + 1)), "float64") for n in range(12)})
    folder = write_as(tmp_path, 1, ranks_of(state, 3), [[], [], []])
    sizes = [(folder / f"rank-{rank:04d}.h5").stat().st_size for rank in range(3)]
    assert max(sizes) < 1.2 * min(sizes)


def test_old_steps_go_and_the_newest_stay(tmp_path: Path) -> None:
    for number in (1, 2, 10, 30, 200):
        write_alone(tmp_path, number, small_state(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000200"]


def test_a_step_is_replaced_by_another_of_its_number(tmp_path: Path) -> None:
    write_alone(tmp_path, 5, State({"take": 1}), keep=1)
    write_alone(tmp_path, 5, State({"take": 2}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert read_step(tmp_path / "step-00000005").about == {"take": 2}


def test_leftovers_are_not_steps_and_go_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000009.0badcafe.partial"
    left.mkdir()
    (left / "rank-0000.h5").write_bytes(b"half of it")
    assert newest_step(tmp_path) == (None, [])
    write_alone(tmp_path, 10, small_state())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_folder_without_steps_has_no_newest(tmp_path: Path) -> None:
    (tmp_path / "step-one").mkdir()
    (tmp_path / "step-00000001").touch()
    assert newest_step(tmp_path) == (None, [])
    assert newest_step(tmp_path / "none") == (None, [])


@pytest.mark.parametrize(
    "keep, step, shards, message",
    [
        (0, 1, 1, "keep=0, 1 shards for 1 ranks; keep at least 1 step"),
        (1, 1, 2, "2 shards for 1 ranks; keep at least 1 step, and give one shard a rank"),
        (1, -1, 1, "step -1: number steps from 0"),
    ],
)
def test_what_makes_no_step_is_refused(tmp_path: Path, keep: int, step: int, shards: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_step(tmp_path, step, State(), [[]] * shards, World.alone(), keep)


# Damage


def test_a_damaged_newest_step_is_named_and_passed_over(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_alone(tmp_path, number, State({"number": number}, small_state().layers))
    shard = tmp_path / "step-00000003" / "rank-0000.h5"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    (tmp_path / "step-00000002" / "index.h5").unlink()
    path, passed_over = newest_step(tmp_path)
    assert path == tmp_path / "step-00000001"
    assert len(passed_over) == 2
    assert str(shard) in passed_over[0]
    assert "does not match its sha256" in passed_over[0]
    assert "step-00000002: has no index.h5" in passed_over[1]


@pytest.mark.parametrize("name", ["index.h5", "rank-0000.h5", "rank-0002.h5"])
def test_a_step_with_a_file_that_is_missing_or_cut_is_refused(step: Path, name: str) -> None:
    os.truncate(step / name, (step / name).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=name):
        read_step(step)
    (step / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_step(step)


def test_a_file_of_another_step_is_refused(step: Path, tmp_path: Path) -> None:
    other = write_as(tmp_path / "other", 401, ranks_of(small_state(), 3), spans_of(small_state(), 3))
    shutil.copy(other / "rank-0001.h5", step / "rank-0001.h5")
    with pytest.raises(CheckpointError, match="is not the file that the index names"):
        read_step(step)


def reindex(step: Path, change: Callable[[h5py.File], None] | None = None, shard: int | None = None) -> None:
    """Change a file of a step as a forger would: its sha256, and what the index says of it, are made right."""
    names = ["index.h5"] if shard is None else [f"rank-{shard:04d}.h5", "index.h5"]
    if change:
        with h5py.File(step / names[0], "r+", libver=("earliest", "v110")) as file:
            change(file)
        seal(step / names[0])
    if shard is None:
        return
    text = (step / names[0]).read_bytes()[:512].decode()
    with h5py.File(step / "index.h5", "r+", libver=("earliest", "v110")) as file:
        entry = file["shards"][names[0]]
        del entry.attrs["bytes"], entry.attrs["sha256"]
        entry.attrs["bytes"] = int(text.split("\nbytes ")[1].split("\n")[0])
        digest = text.split("\nsha256 ")[1].split("\n")[0].encode()
        entry.attrs["sha256"] = np.array(digest, h5py.string_dtype("utf-8", 64))
    seal(step / "index.h5")


def set_attribute(name: str, key: str, value: object) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        del file[name].attrs[key]
        file[name].attrs[key] = value

    return apply


def swap(a: Path, b: Path) -> None:
    third = a.with_suffix(".swap")
    a.rename(third)
    b.rename(a)
    third.rename(b)


def test_swapped_ranks_are_refused(step: Path) -> None:
    swap(step / "rank-0001.h5", step / "rank-0002.h5")
    reindex(step, shard=1)
    reindex(step, shard=2)
    with pytest.raises(CheckpointError, match="does not say that it is rank 1 of step 400"):
        read_step(step)


def copied_piece(file: h5py.File) -> None:
    file.copy(file["layers/out.weight"], file["layers"], "more")


def huge(file: h5py.File) -> None:
    weights = 1 << 50
    for key, value in (
        ("shape", np.array([weights], "i8")),
        ("weights", weights),
        ("survivors", weights),
        ("sparsity", 0.0),
    ):
        set_attribute("layers/out.weight", key, value)(file)


def huge_mask(file: h5py.File) -> None:
    huge(file)
    for key, value in (("survivors", 0), ("sparsity", 1.0), ("masked", True)):
        set_attribute("layers/out.weight", key, value)(file)


def no_ranks(file: h5py.File) -> None:
    set_attribute("shards", "ranks", 0)(file)
    for name in list(file["shards"]):
        del file["shards"][name]


# A change to one of the files (None: the index), and what the message must say.
HOSTILE: dict[str, tuple[int | None, Callable[[h5py.File], None], str]] = {
    "a gap": (2, lambda file: file["layers"].pop("out.weight"), "out.weight has the weights 0 to 5 in no rank's file"),
    "an unknown layer": (
        2,
        lambda file: file.move("layers/out.weight", "layers/x"),
        "layers/x is not in the step's index",
    ),
    "another shape": (
        2,
        set_attribute("layers/out.weight", "shape", np.array([5, 1], "i8")),
        "out.weight is described otherwise",
    ),
    "another order": (2, set_attribute("layers/out.weight", "order", 7), "out.weight is described otherwise"),
    "another rank": (1, set_attribute("shard", "rank", 0), "does not say that it is rank 1"),
    "another step": (1, set_attribute("shard", "step", 399), "does not say that it is rank 1 of step 400"),
    "no rank at all": (1, lambda file: file.pop("shard"), "does not say that it is rank 1"),
    "no shards": (None, lambda file: file.pop("shards"), "names no rank's file"),
    "a shard less": (None, lambda file: file["shards"].pop("rank-0002.h5"), "states step 400 and 3 ranks"),
    "a shard elsewhere": (
        None,
        lambda file: file["shards"].move("rank-0002.h5", "..%2Frank-0002.h5"),
        "does not name rank-0002.h5",
    ),
    "other survivors": (
        None,
        lambda file: (
            set_attribute("layers/conv.weight", "survivors", 1)(file),
            set_attribute("layers/conv.weight", "sparsity", 1 - 1 / 36)(file),
        ),
        "conv.weight states 1 survivors, and its parts have",
    ),
    "a layer that is far too large": (None, huge, "describes layers far larger than"),
    "an index of a mask that is far too large": (None, huge_mask, "describes layers far larger than"),
    "something in the shard's description": (
        1,
        lambda file: file["shard"].create_group("more"),
        "does not say that it is rank 1",
    ),
    "something in a shard's entry": (
        None,
        lambda file: file["shards/rank-0001.h5"].create_group("more"),
        "does not name rank-0001.h5",
    ),
    "a length that is no integer": (
        None,
        set_attribute("shards/rank-0001.h5", "bytes", 1.0),
        "does not name rank-0001.h5",
    ),
    "a sha256 that is no text": (
        None,
        set_attribute("shards/rank-0001.h5", "sha256", 1),
        "does not name rank-0001.h5",
    ),
    "a step that is no integer": (None, set_attribute("shards", "step", 400.0), "states step 400.0 and 3 ranks"),
    "a step below zero": (None, set_attribute("shards", "step", -1), "states step -1 and 3 ranks"),
    "ranks that are no integer": (None, set_attribute("shards", "ranks", 3.0), "states step 400 and 3.0 ranks"),
    "no ranks": (None, no_ranks, "states step 400 and 0 ranks"),
    "masked that is no bool": (None, set_attribute("layers/out.weight", "masked", 0), "out.weight states counts"),
    "other weights": (None, set_attribute("layers/out.weight", "weights", 6), "counts of weights and masks"),
    "pruned and not masked": (
        None,
        lambda file: (
            set_attribute("layers/out.weight", "survivors", 4)(file),
            set_attribute("layers/out.weight", "sparsity", 1 - 4 / 5)(file),
        ),
        "out.weight states counts",
    ),
    "more survivors than weights": (
        None,
        lambda file: (
            set_attribute("layers/conv.weight", "survivors", 72)(file),
            set_attribute("layers/conv.weight", "sparsity", 1 - 72 / 36)(file),
        ),
        "conv.weight states counts",
    ),
    "another sparsity": (
        None,
        set_attribute("layers/out.weight", "sparsity", 0.25),
        "out.weight states a sparsity of 0.25",
    ),
    "values in the index": (
        None,
        lambda file: file["layers/out.weight"].create_dataset("values", data=np.ones(5)),
        "an index only describes layers",
    ),
    "a mask on one side": (
        None,
        lambda file: file["layers/out.weight"].attrs.modify("masked", True),
        "out.weight is described otherwise",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_a_hostile_step_is_refused(step: Path, name: str) -> None:
    shard, change, message = HOSTILE[name]
    reindex(step, change, shard)
    with pytest.raises(CheckpointError) as caught:
        read_step(step)
    assert message in str(caught.value)
    assert newest_step(step.parent) == (None, [str(caught.value)])


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    state = State(layers={"w": random_layer((100,), "float32", 0.5)})
    for first, second in (((0, 60), (59, 100)), ((0, 100), (0, 100)), ((10, 20), (0, 100)), ((0, 100), (10, 20))):
        folder = write_as(tmp_path, 1, ranks_of(state, 2), [[Span(0, *first)], [Span(0, *second)]])
        with pytest.raises(CheckpointError, match="holds weights that another part holds as well"):
            read_step(folder)


def test_a_tensor_in_two_files_is_refused(step: Path) -> None:
    homes = [rank for rank in range(3) if b"momentum_buffer" in (step / f"rank-{rank:04d}.h5").read_bytes()]
    other = (homes[0] + 1) % 3

    def add(file: h5py.File) -> None:
        with h5py.File(step / f"rank-{homes[0]:04d}.h5") as home:
            home.copy(home["optimizer"], file, "optimizer")

    reindex(step, add, other)
    with pytest.raises(CheckpointError, match="momentum_buffer is in another rank's file as well"):
        read_step(step)


def test_a_thing_that_is_no_step_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model.h5", small_state())
    for path in (tmp_path / "model.h5", tmp_path / "none"):
        with pytest.raises(CheckpointError, match="is not a step's folder"):
            read_step(path)


# Being cut off

CALLS = [(os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (os, "open"), (Path, "rename"), (Path, "replace")]


def cut_off_at(moment: int, action: Callable[[], object]) -> bool:
    """Run in a child that is killed at its `moment`-th call to the disk; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for home, name in CALLS:
            setattr(home, name, counted(getattr(home, name)))
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("number", [2, 1], ids=["the next step", "the same step again"])
def test_killed_at_any_moment_a_complete_step_is_left(tmp_path: Path, number: int) -> None:
    ended = False
    moment = 0
    while not ended:
        moment += 1
        root = tmp_path / str(moment)
        write_alone(root, 1, State({"take": 1}), keep=1)
        ended = cut_off_at(moment, lambda: write_alone(root, number, State({"take": 2}), keep=1))  # noqa: B023
        path, passed_over = newest_step(root)
        assert path is not None, moment
        assert passed_over == [], moment
        about = read_step(path).about
        assert about["take"] == 2 or not ended
        # The next one is written over whatever was left, and leaves nothing else.
        write_alone(root, 3, State({"take": 3}), keep=1)
        assert [entry.name for entry in root.iterdir()] == ["step-00000003"]
    assert moment > 20


WRITER = """
import sys
from pathlib import Path
import numpy as np
from hpcprune.checkpoint import LayerState, State, write_step
from hpcprune.shards import Layer, deal
from hpcprune.world import World
for number in range(1, 10000):
    state = State({"number": number}, {"w": LayerState((300_000,), "float32", np.full(300_000, number, "f4"))})
    write_step(Path(sys.argv[1]), number, state, deal([Layer("w", (300_000,), "float32")], 1), World.alone(), 2)
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.03])
def test_killed_by_the_clock_the_step_before_is_left(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.kill()
        done = 1 + len(writer.stdout.readlines())
    path, passed_over = newest_step(tmp_path)
    assert path is not None
    assert passed_over == []
    back = read_step(path)
    assert back.step in (done, done + 1)
    assert set(back.layers["w"].values) == {back.step}
