"""Weights files: what is read, what is refused in one line, and that a model is filled completely or not at all."""

from __future__ import annotations

import logging
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpcprune.checkpoint.format import LayerState, State, TensorState
from hpcprune.checkpoint.write import write_model
from hpcprune.errors import WeightsError
from hpcprune.weights import fit_weights, load_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.fc = nn.Linear(8, 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


class Calls:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as error:
        action()
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean += torch.rand(2)
    net.norm.num_batches_tracked += 7
    return net


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.state_dict())


# Formats

WRITERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "torch": lambda weights, path: torch.save(weights, path),
    "torch legacy": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
    "torch parameters": lambda weights, path: torch.save(
        {n: nn.Parameter(w) if w.is_floating_point() else w for n, w in weights.items()}, path
    ),
    "torch nested": lambda weights, path: torch.save({"epoch": 3, "state_dict": weights, "optimizer": {}}, path),
    "torch nested model": lambda weights, path: torch.save({"model": weights, "lr": 0.1}, path),
    "torch nested model_state_dict": lambda weights, path: torch.save({"model_state_dict": weights}, path),
    "safetensors": lambda weights, path: save_file(weights, path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_known_by_its_content(net: Net, tmp_path: Path, kind: str) -> None:
    for name in ("net.pt", "net.safetensors", "net.h5", "net"):
        WRITERS[kind](state_of(net), tmp_path / name)
        weights = load_weights(tmp_path / name)
        assert same(dict(sorted(weights.items())), dict(sorted(state_of(net).items())))
        assert not any(weight.requires_grad for weight in weights.values())


def test_a_checkpoint_of_hpcprune(net: Net, tmp_path: Path) -> None:
    state = State()
    for name, parameter in net.named_parameters():
        array = parameter.detach().numpy()
        if name == "conv.weight":  # bfloat16, as its bits
            array = parameter.detach().bfloat16().view(torch.int16).numpy().view(np.uint16)
            state.layers[name] = LayerState(array.shape, "bfloat16", array.reshape(-1))
        elif name == "fc.weight":
            mask = np.packbits(array.reshape(-1) > 0, bitorder="little")
            state.layers[name] = LayerState(array.shape, "float32", array.reshape(-1), mask)
        else:
            state.tensors[f"parameters/{name}"] = TensorState(array, "float32")
    for name, buffer in net.named_buffers():
        state.tensors[f"buffers/{name}"] = TensorState(buffer.numpy(), str(buffer.dtype).removeprefix("torch."))
    state.tensors["optimizer/0/momentum"] = TensorState(np.ones(3, np.float32), "float32")
    write_model(tmp_path / "model.h5", state)
    expected = state_of(net)
    expected["conv.weight"] = expected["conv.weight"].bfloat16()
    expected["fc.weight"] = expected["fc.weight"].clamp(min=0)
    weights = load_weights(tmp_path / "model.h5")
    assert same({name: weights[name] for name in expected}, expected) and len(weights) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    weights = {"a": torch.tensor([0, 1, 3]).to(dtype), "scalar": torch.tensor(1).to(dtype), "none": torch.zeros(0, 3)}
    WRITERS[kind](weights, tmp_path / "w")
    assert same(dict(sorted(load_weights(tmp_path / "w").items())), dict(sorted(weights.items())))


# Files that are refused


def test_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    assert refusal(lambda: load_weights(path)) == f"{path}: no such weights file; correct the path"
    (tmp_path / "other.pth").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert refusal(lambda: load_weights(path)) == f"{path}: no such weights file; there are {tmp_path / 'other.pth'}"
    assert refusal(lambda: load_weights(tmp_path)).startswith(f"{tmp_path}: a folder, not a weights file; there are ")
    assert "cannot be read" in refusal(lambda: load_weights(tmp_path / "other.pth" / "x"))
    os.mkfifo(tmp_path / "pipe")
    assert refusal(lambda: load_weights(tmp_path / "pipe")).startswith(f"{tmp_path / 'pipe'}: not a file; weights are")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty; weights are a torch state dict"),
        (b"\n <!DOCTYPE html><html>Sign in", "a web page, perhaps of a download that needed a login; weights are"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "only the pointer to a file in Git LFS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file that hpcprune did not write"),
        (b"hello", "not weights (it starts with b'hello')"),
        (bytes(8), "not weights (it starts with"),
        (pickle.dumps({"w": np.zeros(3)}), "a Python pickle that torch.save did not write: it can run code"),
        (b"PK\x03\x04 and nothing more", "cut short or damaged; copy or download it again"),
        ((1 << 40).to_bytes(8, "little") + b'{"a":', "not a whole safetensors file ("),
        ((10).to_bytes(8, "little") + b'{"a": [}  ', "not a whole safetensors file ("),
    ],
)
def test_a_file_that_is_no_weights_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    message = refusal(lambda: load_weights(path))
    assert message.startswith(f"{path}: {words}") and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("kind", ["torch", "torch legacy", "safetensors", "checkpoint"])
def test_a_file_cut_short_anywhere(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net"
    if kind == "checkpoint":
        write_model(path, State({}, {"w": LayerState((4,), "float32", np.ones(4, np.float32))}))
    else:
        WRITERS[kind]({"w": torch.ones(20), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 1 + len(whole) // 150), len(whole) - 1, len(whole) - 4}:
        path.write_bytes(whole[:length])
        message = refusal(lambda: load_weights(path))
        assert message.startswith(f"{path}: ") and "\n" not in message, length


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path: Path, legacy: bool) -> None:
    path, made = tmp_path / "net.pt", tmp_path / "made"
    torch.save({"w": torch.ones(2), "x": Calls(made)}, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(lambda: load_weights(path))
    assert message.startswith(
        f"{path}: holds code or objects (posix.mkdir) and not weights alone, so it is not loaded; "
    )
    assert "torch.save(m.state_dict(), 'w.pt')" in message and "\n" not in message
    path.write_bytes(pickle.dumps(Calls(made)))
    assert "it can run code when it is loaded, so it is not loaded" in refusal(lambda: load_weights(path))
    path.write_bytes(pickle.dumps(Calls(made), protocol=0))
    refusal(lambda: load_weights(path))
    assert not made.exists()


def test_a_whole_pickled_model_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(nn.Linear(2, 2), path)
    message = refusal(lambda: load_weights(path))
    assert "(torch.nn.modules.linear.Linear)" in message and "m = torch.load('net.pt', weights_only=False)" in message


def test_archives_that_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "a TorchScript program, which holds code" in refusal(lambda: load_weights(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "hello")
    assert "a zip archive that torch.save did not write" in refusal(lambda: load_weights(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict; write it with torch.save(model.state_dict(), ...)"),
        ([1], "holds a list, not a state dict"),
        ({}, "holds an empty dict, not a state dict"),
        ({"state_dict": {}}, "holds an empty dict, not a state dict"),
        ({"epoch": 3, "weights": {}}, "'epoch' is of type int, not a named tensor, and there is no state_dict, model_"),
        ({1: torch.ones(1)}, "1 is of type Tensor, not a named tensor"),
        ({"w": torch.eye(3).to_sparse()}, "w is sparse or quantized; save it dense"),
    ],
)
def test_a_torch_file_that_holds_something_else(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "net.pt"
    torch.save(content, path)
    message = refusal(lambda: load_weights(path))
    assert message.startswith(f"{path}: {words}") and "\n" not in message


# Fitting


def test_a_model_is_filled_exactly(net: Net) -> None:
    torch.manual_seed(1)
    other = Net()
    before = {name: value.data_ptr() for name, value in other.state_dict().items()}
    fit_weights(other, state_of(net), "net.pt")
    assert same(state_of(other), state_of(net))
    assert {name: value.data_ptr() for name, value in other.state_dict().items()} == before
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrappers_prefix_is_taken_off(net: Net, prefix: str) -> None:
    other = Net()
    fit_weights(other, {prefix + name: value for name, value in net.state_dict().items()}, "net.pt")
    assert same(state_of(other), state_of(net))


def test_a_prefix_on_some_names_only_stays() -> None:
    weights = {"module.weight": torch.ones(2, 2), "bias": torch.ones(2)}
    assert "module.weight is not in Linear" in refusal(lambda: fit_weights(nn.Linear(2, 2), weights, "w"))


def test_a_prefix_that_is_the_models_own_stays() -> None:
    source, target = Wrapped(), Wrapped()
    fit_weights(target, state_of(source), "w")
    assert same(state_of(target), state_of(source))


@pytest.mark.parametrize("given", ["embed.weight", "head.weight"])
def test_one_name_of_tied_parameters_is_enough(given: str) -> None:
    model = Tied()
    fit_weights(model, {given: torch.full((5, 4), 2.0)}, "w")
    assert model.head.weight is model.embed.weight and torch.all(model.embed.weight == 2)


def broken(net: Net, **changes: Tensor | None) -> dict[str, Tensor]:
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    return weights


CASES: list[tuple[dict[str, Tensor | None], list[str]]] = [
    ({"fc__bias": None}, ["fc.bias is missing, which Net has; is the file of another model?"]),
    (
        {"fc__weight": None, "fc__weigth": torch.ones(3, 8)},
        [
            "fc.weight is missing, which Net has; the nearest that only the file has is fc.weigth",
            "fc.weigth is not in Net; the nearest there is fc.weight",
        ],
    ),
    ({"extra": torch.ones(1)}, ["extra is not in Net; is the file of another model?"]),
    (
        {"fc__weight": torch.ones(8, 3), "conv__bias": torch.ones(())},
        [
            "fc.weight has shape (8, 3), the model's has (3, 8); is it of another model?",
            "conv.bias has shape (), the model's has (2,); is it of another model?",
        ],
    ),
    (
        {"fc__bias": torch.tensor([1.0, math.nan, -math.inf])},
        ["fc.bias: 2 of 3 values are NaN or infinite; take weights of a sound training"],
    ),
    (
        {"norm__running_var": torch.tensor([math.nan, 1.0])},
        ["norm.running_var: 1 of 2 values are NaN; take weights of a sound training"],
    ),
    (
        {"fc__bias": torch.tensor([1e300, 1.0, -1e300], dtype=torch.float64)},
        ["fc.bias: 2 of 3 values are too large for float32"],
    ),
    ({"fc__bias": torch.tensor([1, 2, 3])}, ["fc.bias is int64, the model's is float32; convert the file"]),
    (
        {"norm__num_batches_tracked": torch.tensor(1.5)},
        ["norm.num_batches_tracked is float32, the model's is int64; convert the file"],
    ),
    (
        {"norm__num_batches_tracked": torch.tensor(1 + 1j)},
        ["norm.num_batches_tracked is complex64, the model's is int64; convert the file"],
    ),
    ({"fc__bias": torch.ones(3, dtype=torch.complex64)}, ["fc.bias is complex64, the model's is float32"]),
]


@pytest.mark.parametrize(("changes", "lines"), CASES)
def test_what_does_not_fit_is_named_and_changes_nothing(
    net: Net, changes: dict[str, Tensor | None], lines: list[str]
) -> None:
    torch.manual_seed(2)
    other = Net()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    message = refusal(lambda: fit_weights(other, broken(net, **changes), "net.pt"))
    given = message.splitlines()
    assert len(given) == len(lines)
    assert all(line.startswith(f"net.pt: {words}") for line, words in zip(given, lines, strict=True))
    assert same(state_of(other), before)


def test_another_models_file_is_one_line(net: Net) -> None:
    weights = {f"layer{i}.w": torch.ones(1) for i in range(50)}
    message = refusal(lambda: fit_weights(net, weights, "net.pt"))
    assert message == (
        "net.pt: no name is the model's: it has layer0.w, layer1.w, layer2.w and 47 more; "
        "Net has conv.weight, conv.bias, norm.weight and 6 more"
    )
    assert "it has nothing; Net has conv.weight" in refusal(lambda: fit_weights(net, {}, "net.pt"))


def test_many_problems_of_a_kind_are_counted(net: Net) -> None:
    weights = broken(net) | {f"layer{i}.w": torch.ones(1) for i in range(50)}
    lines = refusal(lambda: fit_weights(net, weights, "net.pt")).splitlines()
    assert len(lines) == 9 and lines[-1] == "net.pt: 42 more names are not in Net"
    big = nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)])
    lines = refusal(lambda: fit_weights(big, {"0.weight": torch.ones(1, 1)}, "net.pt")).splitlines()
    assert len(lines) == 9 and lines[-1] == "net.pt: 31 more names of Sequential are missing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_are_converted_with_a_note(
    net: Net, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in net.state_dict().items()}
    other = Net()
    with caplog.at_level(logging.INFO):
        fit_weights(other, weights, "net.pt")
    name = str(dtype).removeprefix("torch.")
    assert caplog.messages == [f"net.pt: 8 tensors converted from {name} to the model's float32"]
    assert torch.equal(other.fc.weight, net.fc.weight.to(dtype).float())
    caplog.clear()
    fit_weights(other, state_of(net), "net.pt")
    assert caplog.messages == []


def test_infinities_in_a_buffer_are_no_mistake() -> None:
    model = nn.Module()
    model.register_buffer("bias_mask", torch.zeros(2))
    fit_weights(model, {"bias_mask": torch.tensor([0.0, -math.inf])}, "w")
    assert torch.equal(model.get_buffer("bias_mask"), torch.tensor([0.0, -math.inf]))


def test_numbers_beyond_half_precision_are_found(net: Net) -> None:
    half = Net().half()
    weights = broken(net, fc__bias=torch.tensor([1.0, 1e6, 2.0]))
    assert "fc.bias: 1 of 3 values are too large for float16" in refusal(lambda: fit_weights(half, weights, "w"))
