"""Checkpoint files: what is written is what is read, by us and by others, and nothing damaged is read."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcprune.checkpoint import LayerState, State, TensorState, format, read_model, write_model
from hpcprune.checkpoint.bits import cut_bits, join_bits, tally
from hpcprune.checkpoint.block import hash_rest
from hpcprune.checkpoint.format import escape, unescape
from hpcprune.errors import CheckpointError
from tests.checkpoint_states import BLOCK, assert_same_state, random_layer, seal, small_state

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 weights, so that small layers have many."""
    for module in ("format", "write", "pieces"):
        monkeypatch.setattr(sys.modules[f"hpcprune.checkpoint.{module}"], "CHUNK", 64)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_model(tmp_path / "model.h5", small_state())
    assert_same_state(read_model(tmp_path / "model.h5"), small_state())


@pytest.mark.parametrize("dtype", format.LAYER_DTYPES)
@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.01, 0.0])
@pytest.mark.parametrize("shape", [(0, 4), (), (1,), (63,), (64,), (65,), (7, 5, 3), (1000,)])
def test_layers_of_every_dtype_density_and_shape_come_back(
    tmp_path: Path, tiny_chunks: None, dtype: str, density: float, shape: tuple[int, ...]
) -> None:
    state = State(layers={"w": random_layer(shape, dtype, density)})
    write_model(tmp_path / "model.h5", state)
    assert_same_state(read_model(tmp_path / "model.h5"), state)


@pytest.mark.parametrize("dtype", format.STORAGE)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_tensors_of_every_dtype_and_shape_come_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(bool if dtype == "bool" else format.STORAGE[dtype])
    state = State(tensors={"buffers/x": TensorState(np.asarray(array), dtype)})
    write_model(tmp_path / "model.h5", state)
    assert_same_state(read_model(tmp_path / "model.h5"), state)


def test_values_that_are_not_finite_come_back_declared(tmp_path: Path) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 1.0], np.float32)
    half = np.array([0x7C00, 0xFC00, 0x7E01, 0x8000, 1, 0x3C00], np.uint16)
    brain = np.array([0x7F80, 0xFF80, 0x7FC1, 0x8000, 1, 0x3F80], np.uint16)
    state = State(
        layers={
            "a": LayerState((6,), "float32", odd),
            "b": LayerState((6,), "float16", half.view(np.float16)),
            "c": LayerState((6,), "bfloat16", brain),
        },
        tensors={"buffers/x": TensorState(odd, "float32")},
    )
    write_model(tmp_path / "model.h5", state)
    assert_same_state(read_model(tmp_path / "model.h5"), state)
    with h5py.File(tmp_path / "model.h5") as file:
        for name in "abc":
            assert file["layers"][name].attrs["nonfinite"] == 3
            assert file["layers"][name].attrs["nonzeros"] == 5
        assert file["buffers/x"].attrs["nonfinite"] == 3


def test_arrays_need_not_lie_in_one_piece(tmp_path: Path) -> None:
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    state = State(
        layers={"w": LayerState((12,), "float32", wide.reshape(-1)[::2])},
        tensors={"buffers/x": TensorState(wide.T, "float32")},
    )
    write_model(tmp_path / "model.h5", state)
    back = read_model(tmp_path / "model.h5")
    assert np.array_equal(back.layers["w"].values, wide.reshape(-1)[::2])
    assert np.array_equal(back.tensors["buffers/x"].array, wide.T)


def test_about_keeps_every_json_value(tmp_path: Path) -> None:
    about = {
        "empty": "",
        "text": "häß\n\u202e",
        "nul": "a\0",
        "long": "x" * 70_000,
        "half": "\ud800",
        "big": 1 << 70,
        "edge": -(1 << 63),
        "none": None,
        "list": [1, 2.5, {"a": []}],
        "weird/../key%": 1,
        "infinite": float("inf"),
        "no": False,
    }
    write_model(tmp_path / "model.h5", State(about=about))
    back = read_model(tmp_path / "model.h5").about
    assert back == about
    assert {key: type(value) for key, value in back.items()} == {key: type(value) for key, value in about.items()}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    state = small_state()
    first = write_model(tmp_path / "a.h5", state)
    state.about = dict(reversed(state.about.items()))
    state.tensors = dict(reversed(state.tensors.items()))
    second = write_model(tmp_path / "b.h5", state)
    assert first == second
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_the_text_states_the_hash_of_what_follows(tmp_path: Path) -> None:
    stated = write_model(tmp_path / "model.h5", small_state())
    data = (tmp_path / "model.h5").read_bytes()
    assert hashlib.sha256(data[BLOCK:]).hexdigest() == stated
    assert f"\nsha256 {stated}\n".encode() in data[:BLOCK]
    assert f"\nbytes {len(data) - BLOCK}\n".encode() in data[:BLOCK]
    assert data[:BLOCK].isascii()


def test_files_shrink_with_the_density(tmp_path: Path) -> None:
    sizes = []
    for density in (1.0, 0.5, 0.1, 0.01):
        write_model(tmp_path / "model.h5", State(layers={"w": random_layer((400_000,), "float32", density)}))
        sizes.append((tmp_path / "model.h5").stat().st_size / 1_600_000)
    assert sizes[0] < 1.01
    assert sizes[1] < 0.54
    assert sizes[2] < 0.12
    assert sizes[3] < 0.02


def test_plain_h5py_finds_values_and_mask(tmp_path: Path) -> None:
    layer = random_layer((30, 20), "float32", 0.1, criterion="magnitude", threshold=0.5)
    write_model(tmp_path / "model.h5", State({"seed": 3}, {"fc.weight": layer}))
    with h5py.File(tmp_path / "model.h5") as file:
        group = file["layers/fc.weight"]
        keep = np.unpackbits(group["mask"][()], bitorder="little", count=600).astype(bool)
        dense = np.zeros(600, np.float32)
        dense[keep] = group["values"][()]
        assert np.array_equal(dense, layer.values)
        assert group.attrs["survivors"] == keep.sum() == group.attrs["nonzeros"]
        assert group.attrs["weights"] == 600
        assert group.attrs["sparsity"] == pytest.approx(1 - keep.sum() / 600)
        assert group.attrs["criterion"] == b"magnitude"
        assert list(group.attrs["shape"]) == [30, 20]
        assert file.attrs["seed"] == 3


def test_h5dump_reads_the_file(tmp_path: Path) -> None:
    h5dump = shutil.which("h5dump")
    assert h5dump, "no h5dump to test with: apt-get install hdf5-tools"
    write_model(tmp_path / "model.h5", small_state())

    def dump(*options: str) -> str:
        command = [h5dump, *options, str(tmp_path / "model.h5")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    everything = dump()
    assert '"magnitude"' in everything
    assert '{"prune": {"sparsity": 0.5, "include": ["*"]}}' in everything
    layer = small_state().layers["out.weight"]
    printed = dump("-y", "-w", "1", "-m", "%.17g", "-d", "/layers/out.weight/values").split("DATA {")[1].split("}")[0]
    assert [float(word) for word in printed.replace(",", " ").split()] == list(layer.values)


@given(st.text(st.characters(), min_size=1, max_size=60))
def test_any_name_can_stand_in_the_file(name: str) -> None:
    escaped = escape(name)
    assert unescape(escaped) == name
    assert "/" not in escaped
    assert "@" not in escaped
    assert escaped.strip(".")
    assert escaped.encode()


@pytest.mark.parametrize(
    "text", ["a%2Fb%", "%41", "%2f", "..", ".", "a/b", "a@3", "", "%ED%A0%80x%FF", "\x1b[0m", "%C3%28", "a\u202eb", "%"]
)
def test_names_that_were_not_written_so_are_refused(text: str) -> None:
    with pytest.raises((ValueError, CheckpointError)):
        unescape(text)


def test_layers_and_tensors_may_have_odd_names(tmp_path: Path) -> None:
    names = ["a/b", "..", ".", "a@3", "100%", "größe", "\ud800", " ", "values", "\n"]
    state = State(
        layers={name: random_layer((9,), "float32", 0.5, number) for number, name in enumerate(names)},
        tensors={f"parameters/{name}": TensorState(np.arange(2.0), "float64") for name in names}
        | {f"optimizer/{name}/{name}": TensorState(np.arange(3.0), "float64") for name in names if "/" not in name},
        own={name: TensorState(np.arange(2.0), "float64") for name in names},
    )
    write_model(tmp_path / "model.h5", state)
    assert_same_state(read_model(tmp_path / "model.h5"), state)


@given(st.data())
def test_bits_are_cut_and_joined_as_numpy_does_it(data: st.DataObject) -> None:
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=1, max_size=80)))
    start = data.draw(st.integers(0, keep.size))
    stop = data.draw(st.integers(start, keep.size))
    packed = np.packbits(keep, bitorder="little")
    piece = cut_bits(packed, start, stop)
    assert piece.tobytes() == np.packbits(keep[start:stop], bitorder="little").tobytes()
    joined = np.zeros(packed.size, np.uint8)
    join_bits(joined, start, piece)
    there = np.zeros(keep.size, bool)
    there[start:stop] = keep[start:stop]
    assert joined.tobytes() == np.packbits(there, bitorder="little").tobytes()


@given(st.lists(st.integers(0, 0xFFFF), max_size=50))
def test_tally_counts_as_numpy_does(raw: list[int]) -> None:
    half = np.array(raw, np.uint16)
    brain = (half.astype(np.uint32) << 16).view(np.float32)
    for stored, dtype, numbers in ((half.view("f2"), "float16", half.view("f2")), (half, "bfloat16", brain)):
        expected = (int((numbers != 0).sum()), int((~np.isfinite(numbers)).sum()))
        assert tally(stored, dtype) == expected


# Damage


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    write_model(path, State({"seed": 1}, {"w": random_layer((9,), "float32", 0.5)}))
    data = bytearray(path.read_bytes())
    assert len(data) < 10_000
    for at in range(len(data)):
        for bit in range(8) if at < BLOCK else [at % 8]:
            data[at] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                read_model(path)
            data[at] ^= 1 << bit
    path.write_bytes(data)
    read_model(path)


def test_a_file_cut_short_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    write_model(path, State({"seed": 1}, {"w": random_layer((9,), "float32", 0.5)}))
    for length in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CheckpointError):
            read_model(path)


def test_bytes_after_the_end_are_found(tmp_path: Path) -> None:
    write_model(tmp_path / "model.h5", small_state())
    with (tmp_path / "model.h5").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="1 bytes too many"):
        read_model(tmp_path / "model.h5")


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    write_model(path, small_state())
    path.write_bytes(path.read_bytes().replace(b"\nformat 1\n", b"\nformat 2\n", 1))
    with pytest.raises(CheckpointError, match=r"newer hpcprune.*upgrade"):
        read_model(path)


def test_files_of_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, name in ((b"PK\x03\x04abc", "zip archive"), (b"\x80\x02}q", "pickle"), (b"", "not an hpcprune")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_model(path)
    path.unlink()
    with h5py.File(path, "w"):
        pass
    with pytest.raises(CheckpointError, match="HDF5 file that hpcprune did not write"):
        read_model(path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_model(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_model(tmp_path / "none.h5")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    write_model(path, small_state())
    path.write_bytes(path.read_bytes().replace(b"\nkind model\n", b"\nkind shard\n", 1))
    seal(path)
    with pytest.raises(CheckpointError, match="kind shard"):
        read_model(path)
    path.write_bytes(path.read_bytes().replace(b"\nkind shard\n", b"\nkind other\n", 1))
    seal(path)
    with pytest.raises(CheckpointError, match="its first 512 bytes were changed"):
        read_model(path)


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.h5"
    write_model(path, small_state())

    def hash_and_touch(fd: int) -> tuple[int, str]:
        os.utime(path, (1, 1))
        return hash_rest(fd)

    monkeypatch.setattr("hpcprune.checkpoint.block.hash_rest", hash_and_touch)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        read_model(path)


def test_a_file_that_takes_the_name_of_a_verified_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "model.h5", tmp_path / "other.h5"
    write_model(path, State({"which": "verified"}))
    write_model(other, State({"which": "other"}))

    def hash_and_swap(fd: int) -> tuple[int, str]:
        found = hash_rest(fd)
        other.replace(path)
        return found

    monkeypatch.setattr("hpcprune.checkpoint.block.hash_rest", hash_and_swap)
    assert read_model(path).about == {"which": "verified"}


# What cannot be written

BAD_STATES = {
    "dtype 'complex64'": State(tensors={"buffers/x": TensorState(np.ones(2, "c8"), "complex64")}),
    "dtype 'int8' cannot": State(layers={"w": LayerState((2,), "int8", np.ones(2, "i1"))}),
    "does not hold float32": State(tensors={"buffers/x": TensorState(np.ones(2), "float32")}),
    "do not hold the 3 weights": State(layers={"w": LayerState((3,), "float32", np.ones(2, "f4"))}),
    "as float32; give them flat": State(layers={"w": LayerState((2,), "float32", np.ones(2))}),
    "does not fit 9 weights": State(layers={"w": LayerState((9,), "float32", np.ones(9, "f4"), np.ones(1, np.uint8))}),
    "bits set after": State(layers={"w": LayerState((2,), "float32", np.ones(2, "f4"), np.array([7], np.uint8))}),
    "attribute 'stop' is the format's own": State(
        layers={"w": LayerState((2,), "float32", np.ones(2, "f4"), None, {"stop": 3})}
    ),
    "attribute 'masked' is the format's own": State(
        layers={"w": LayerState((2,), "float32", np.ones(2, "f4"), None, {"masked": True})}
    ),
    "the format's own": State(layers={"w": LayerState((2,), "float32", np.ones(2, "f4"), None, {"shape": 3})}),
    "an attribute is": State(layers={"w": LayerState((2,), "float32", np.ones(2, "f4"), None, {"a": "x" * 5000})}),
    "keeps this name": State(about={"format": 3}),
    "as JSON": State(about={"x": {1, 2}}),
    "names have 1 to": State(layers={"": random_layer((2,), "float32", 1.0)}),
    "use parameters/<name>": State(tensors={"weights/x": TensorState(np.ones(2), "float64")}),
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_what_the_format_does_not_hold_is_refused_and_leaves_nothing(tmp_path: Path, message: str) -> None:
    write_model(tmp_path / "model.h5", small_state())
    before = (tmp_path / "model.h5").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        write_model(tmp_path / "model.h5", BAD_STATES[message])
    assert [path.name for path in tmp_path.iterdir()] == ["model.h5"]
    assert (tmp_path / "model.h5").read_bytes() == before


def test_folders_that_cannot_be_written_to_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*; make it"):
        write_model(tmp_path / "none" / "model.h5", small_state())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        write_model(tmp_path / "file" / "model.h5", small_state())


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "open"])
@pytest.mark.filterwarnings("error")
def test_a_disk_that_fills_up_at_any_moment_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "model.h5"
    write_model(path, small_state())
    before, real = path.read_bytes(), getattr(os, call)
    for moment in range(1, 1000):
        count = 0

        def fail(*arguments: object) -> object:
            nonlocal count
            count += 1
            if count >= moment:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                write_model(path, State({"other": 1}))
                break
            except CheckpointError as error:
                assert "the disk is full" in str(error)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.h5"]
        assert path.read_bytes() == before or read_model(path).about == {"other": 1}
    assert moment > 1
    assert read_model(path).about == {"other": 1}


FULL_DISK = """
import os, resource, subprocess, sys
from pathlib import Path
import numpy as np
from hpcprune.checkpoint import LayerState, State, read_model, write_model
from hpcprune.errors import CheckpointError

folder, how = Path(sys.argv[1]), sys.argv[2]
if how == "tmpfs":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    write_model(folder / "model.h5", State({"first": 1}))
    before = (folder / "model.h5").read_bytes()
    try:
        write_model(folder / "model.h5", State(layers={"w": LayerState((1 << 19,), "float32", np.ones(1 << 19, "f4"))}))
        print("written")
    except CheckpointError as error:
        print(error)
    assert os.listdir(folder) == ["model.h5"]
    assert (folder / "model.h5").read_bytes() == before
finally:
    if how == "tmpfs":
        subprocess.run(["umount", folder], check=True)
"""


@pytest.mark.parametrize("how", ["tmpfs", "limit"] if os.geteuid() == 0 else ["limit"])
def test_a_disk_that_is_really_full(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), how]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    expected = "the disk is full" if how == "tmpfs" else "may not become that large"
    assert expected in run.stdout
    assert "nothing that was there is lost" in run.stdout


def test_leftovers_of_writers_that_died_go_and_of_the_living_stay(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".model.h5.01234567.partial", tmp_path / ".model.h5.89abcdef.partial"
    dead.touch()
    with alive.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_model(tmp_path / "model.h5", small_state())
        assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "model.h5"]


def test_writing_takes_a_chunk_of_memory_at_most() -> None:
    program = """
import resource, sys, tempfile
from pathlib import Path
import numpy as np
from hpcprune.checkpoint import LayerState, State, read_model, write_model

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

weights, chunk = 1 << 25, 4 << 22
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.h5"
    tiny = State(layers={"w": LayerState((64,), "float32", np.ones(64, "f4"), np.full(8, 3, "u1"))})
    write_model(path, tiny), read_model(path)
    values, mask = np.ones(weights, "f4"), np.full(weights // 8, 0b10101011, "u1")
    before = peak()
    write_model(path, State(layers={"w": LayerState((weights,), "float32", values, mask)}))
    print((peak() - before) / chunk)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 2


def test_torch_is_not_imported() -> None:
    modules = ["format", "read", "write", "resume", "background", "verify", "show", "diff"]
    program = "import sys\n" + "".join(f"import hpcprune.checkpoint.{module}\n" for module in modules)
    program += (
        "import json; print(json.dumps([name for name in ('torch', 'mpi4py', 'pydantic') if name in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(run.stdout) == []


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    write_model(tmp_path / "model.h5", small_state())
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        read_model(tmp_path / "model.h5")
        write_model(tmp_path / "model.h5", small_state())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
