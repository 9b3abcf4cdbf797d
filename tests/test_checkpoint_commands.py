"""check, show and diff: what they verify, say and answer."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hpcprune.checkpoint import State, TensorState, write_model, write_step
from hpcprune.checkpoint.diff import compare, diff
from hpcprune.checkpoint.show import show
from hpcprune.checkpoint.verify import print_findings, verify
from hpcprune.errors import CheckpointError
from hpcprune.shards import Layer, deal
from hpcprune.world import World
from tests.checkpoint_states import random_layer, small_state

ROOT = Path(__file__).resolve().parent.parent


def write_run(folder: Path) -> Path:
    """A run's folder with a result and two steps."""
    folder.mkdir()
    state = small_state()
    write_model(folder / "model.h5", state)
    spans = deal([Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items()], 1)
    for step in (100, 200):
        write_step(folder / "checkpoints", step, state, spans, World.alone(), 3)
    return folder


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)


def shown(path: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(path, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_a_run_is_checked_with_all_that_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    report = verify(run)
    assert print_findings(report, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == report.lines()
    assert all(line.startswith("ok   ") for line in lines)
    for name in ("model.h5", "step-00000100", "step-00000200"):
        assert any(name in line for line in lines)


def test_what_is_damaged_does_not_hide_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    damage(run / "checkpoints" / "step-00000100" / "rank-0000.h5")
    report = verify(run)
    assert not print_findings(report, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [finding["path"] for finding in found["findings"] if not finding["ok"]] == [
        str(run / "checkpoints" / "step-00000100")
    ]
    assert {finding["path"] for finding in found["findings"] if finding["ok"]} == {
        str(run / "model.h5"),
        str(run / "checkpoints" / "step-00000200"),
    }
    damage(run / "model.h5")
    assert sum(line.startswith("BAD") for line in verify(run).lines()) == 2


@pytest.mark.parametrize("name", ["model.h5", "checkpoints", "checkpoints/step-00000100"])
def test_parts_of_a_run_can_be_checked_alone(tmp_path: Path, name: str) -> None:
    assert verify(write_run(tmp_path / "run") / name).ok


@pytest.mark.parametrize("name", ["index.h5", "rank-0000.h5"])
def test_single_files_of_a_step_can_be_checked(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path / "run") / "checkpoints" / "step-00000100" / name
    assert verify(path).ok
    damage(path)
    assert not verify(path).ok


def test_nothing_to_check_is_a_mistake_of_usage(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "has no model.h5"), (tmp_path / "none", "No such file")):
        with pytest.raises(CheckpointError, match=message) as caught:
            verify(path)
        assert caught.value.exit_code == 2
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04")
    assert not verify(tmp_path / "model.pt").ok


def test_empty_and_fully_pruned_things_pass(tmp_path: Path) -> None:
    state = State(
        layers={"gone": random_layer((100,), "float32", 0.0), "none": random_layer((0, 3), "float16", 0.5)},
        tensors={
            "buffers/num_batches_tracked": TensorState(np.array(5), "int64"),
            "buffers/empty": TensorState(np.zeros((0,), bool), "bool"),
        },
    )
    write_model(tmp_path / "model.h5", state)
    assert verify(tmp_path / "model.h5").ok
    write_model(tmp_path / "model.h5", State())
    assert verify(tmp_path / "model.h5").ok


def test_show_names_layers_counts_and_attributes(tmp_path: Path) -> None:
    state = small_state()
    state.about["history"] = [{"round": 1, "metrics": {"accuracy": 0.75}}, {"round": 2, "metrics": {"accuracy": 0.5}}]
    state.about["job"] = "task: task.py\nprune:\n  sparsity: 0.9\n"
    write_model(tmp_path / "model.h5", state)
    text = shown(tmp_path / "model.h5")
    assert "\njob:\n  task: task.py\n  prune:\n    sparsity: 0.9\n" in text
    keep = int(np.unpackbits(state.layers["conv.weight"].mask, bitorder="little").sum())  # type: ignore[arg-type]
    row = next(line for line in text.splitlines() if line.startswith("conv.weight"))
    assert row.split() == f"conv.weight 4 x 3 x 3 float32 36 {keep} {1 - keep / 36:.2%} magnitude 0.25".split()
    for words in (
        "model, checkpoint format 1",
        "seed",
        "mnist",
        "accuracy",
        "0.75",
        "bfloat16",
        "buffers/seen",
        "own/",
    ):
        assert words in text


def test_show_reads_steps_and_runs_and_hides_control_characters(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "index, checkpoint format 1" in shown(run / "checkpoints" / "step-00000100")
    assert "model, checkpoint format 1" in shown(run)
    assert "shard, checkpoint format 1" in shown(run / "checkpoints" / "step-00000100" / "rank-0000.h5")
    write_model(
        tmp_path / "evil.h5", State({"task": "\x1b[31mred[bold]"}, {"\x1b]x[red]": random_layer((3,), "float32", 1)})
    )
    text = shown(tmp_path / "evil.h5")
    assert "\x1b" not in text
    assert "[bold]" in text
    assert "[red]" in text


def test_show_refuses_what_is_damaged(tmp_path: Path) -> None:
    write_model(tmp_path / "model.h5", small_state())
    damage(tmp_path / "model.h5")
    with pytest.raises(CheckpointError):
        show(tmp_path / "model.h5")


def test_diff_finds_nothing_in_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert diff(run / "model.h5", run / "model.h5") == 0
    assert capsys.readouterr().out == "both hold the same\n"
    assert diff(run / "checkpoints" / "step-00000100", run / "checkpoints" / "step-00000200") == 0


def test_diff_counts_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_state()
    other = copy.deepcopy(state)
    other.about["seed"] = 8
    del other.about["rate"]
    conv = other.layers["conv.weight"]
    assert conv.mask is not None
    keep = np.unpackbits(conv.mask, bitorder="little", count=36).astype(bool)
    first, gone = np.flatnonzero(~keep)[0], np.flatnonzero(keep)[:2]
    before, kept = keep.copy(), conv.values.copy()
    keep[gone], keep[first] = False, True
    conv.values[gone], conv.values[first] = 0, 100
    conv.mask = np.packbits(keep, bitorder="little")
    other.layers["out.weight"].values[1] += 0.5
    other.layers["fc.weight"].attributes["threshold"] = 0.5
    other.layers["extra"] = random_layer((3,), "float32", 1)
    other.tensors["buffers/seen"] = TensorState(np.array(15), "int64")
    other.tensors["parameters/fc.bias"] = TensorState(np.zeros(4, "f4"), "float32")
    write_model(tmp_path / "a.h5", state)
    write_model(tmp_path / "b.h5", other)
    assert diff(tmp_path / "a.h5", tmp_path / "b.h5") == 1
    lines = capsys.readouterr().out.splitlines()
    both, either = int((before & keep).sum()), int((before | keep).sum())
    largest = max(100.0, float(np.abs(kept[gone]).max()))
    assert lines == [
        f"about rate: only in {tmp_path / 'a.h5'}",
        "about seed: 7 and 8",
        f"layer conv.weight: masks differ in 3 of 36 weights (Jaccard {both / either:.4f}; "
        f"{before.sum()} and {keep.sum()} survivors)",
        f"layer conv.weight: 3 of 36 values differ, by {largest:.6g} at most",
        "layer fc.weight: threshold: None and 0.5",
        "layer out.weight: 1 of 5 values differ, by 0.5 at most",
        f"layer extra: only in {tmp_path / 'b.h5'}",
        "buffers/seen: 1 of 1 values differ, by 3 at most",
        "parameters/fc.bias: float32 of (3,) and float32 of (4,)",
    ]


def test_diff_takes_bfloat16_as_numbers_and_sees_order(tmp_path: Path) -> None:
    a = State(layers={"x": random_layer((4,), "bfloat16", 1), "y": random_layer((4,), "float32", 1)})
    b = copy.deepcopy(a)
    a.layers["x"].values[0], b.layers["x"].values[0] = 0x3F80, 0x4040  # 1 and 3
    b.layers = dict(reversed(b.layers.items()))
    write_model(tmp_path / "a.h5", a)
    write_model(tmp_path / "b.h5", b)
    assert compare(tmp_path / "a.h5", tmp_path / "b.h5") == [
        "layers: the same, in another order",
        "layer x: 1 of 4 values differ, by 2 at most",
    ]


def test_the_documented_way_to_read_a_file_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "checkpoint-format.md").read_text()
    program = text.split("## Reading a file yourself\n\n")[1].split("\nText attributes")[0]
    monkeypatch.chdir(tmp_path)
    for density in (1.0, 0.5, 0.05):
        layer = random_layer((7, 9), "float32", density)
        write_model("model.h5", State(layers={"fc1.weight": layer}))
        names: dict[str, Any] = {}
        exec(textwrap.dedent(program), names)
        assert names["dense"].shape == (7, 9)
        assert names["dense"].tobytes() == layer.values.tobytes()


def test_the_documented_way_to_check_a_file_without_hpcprune_works(tmp_path: Path) -> None:
    stated = write_model(tmp_path / "model.h5", small_state())
    command = "tail -c +513 model.h5 | sha256sum"
    assert f"`{command}`" in (ROOT / "docs" / "checkpoint-format.md").read_text()
    run = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split()[0] == stated
