"""Exports, read back by other libraries than the one that wrote them; and that a target is made whole or not at all."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hpcprune.checkpoint.format import STORAGE, LayerState, State, TensorState
from hpcprune.checkpoint.write import write_model
from hpcprune.errors import CheckpointError, HpcpruneError, JobError
from hpcprune.export import FORMATS, export
from hpcprune.masks import Masks
from hpcprune.shards import Layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(8, 3).bfloat16()
        self.register_buffer("flags", torch.tensor([True, False]))


@pytest.fixture
def net() -> Net:
    """A network that is half pruned, with every kind of tensor that a model may have."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.conv.weight.clamp_(min=0)
        net.norm.num_batches_tracked += 5
    return net


@pytest.fixture
def model(net: Net, tmp_path: Path) -> Path:
    state = State({"made by": "a test"})
    conv = net.conv.weight.detach().numpy().reshape(-1)
    state.layers["conv.weight"] = LayerState((4, 1, 3, 3), "float32", conv, np.packbits(conv > 0, bitorder="little"))
    fc = net.fc.weight.detach().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    state.layers["fc.weight"] = LayerState((3, 8), "bfloat16", fc)
    for name in ("conv.bias", "norm.weight", "norm.bias"):
        state.tensors[f"parameters/{name}"] = TensorState(net.get_parameter(name).detach().numpy(), "float32")
    bias = net.fc.bias.detach().view(torch.int16).numpy().view(np.uint16)
    state.tensors["parameters/fc.bias"] = TensorState(bias, "bfloat16")
    for name, buffer in net.named_buffers():
        state.tensors[f"buffers/{name}"] = TensorState(buffer.numpy(), str(buffer.dtype).removeprefix("torch."))
    state.tensors["optimizer/0/exp_avg"] = TensorState(np.ones(3, np.float32), "float32")
    path = tmp_path / "model.h5"
    write_model(path, state)
    return path


def about(net: Net) -> dict[str, str]:
    """Sparsity and mask hash, from the network itself."""
    layers = [Layer("conv.weight", (4, 1, 3, 3), "float32"), Layer("fc.weight", (3, 8), "bfloat16")]
    conv = np.packbits(net.conv.weight.detach().numpy().reshape(-1) > 0, bitorder="little")
    zeros = int((net.conv.weight == 0).sum())
    return {"sparsity": repr(zeros / (36 + 24)), "mask_hash": Masks(layers, [conv, np.full(3, 255, np.uint8)]).hash}


def check_equal(weights: dict[str, torch.Tensor], net: Net) -> None:
    assert weights.keys() == net.state_dict().keys()
    fresh = Net()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(weights, strict=True)
    for name, value in net.state_dict().items():
        assert weights[name].dtype == value.dtype and weights[name].shape == value.shape
        assert torch.equal(weights[name], value) and torch.equal(fresh.state_dict()[name], value)


def test_safetensors(model: Path, net: Net, tmp_path: Path) -> None:
    export(model, "safetensors", tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        check_equal({name: file.get_tensor(name) for name in file.keys()}, net)  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert float(metadata["sparsity"]) == pytest.approx(float(about(net)["sparsity"]))
    assert metadata["mask_hash"] == about(net)["mask_hash"]


def test_torch(model: Path, net: Net, tmp_path: Path) -> None:
    export(model, "torch", tmp_path / "net.pt")
    check_equal(torch.load(tmp_path / "net.pt", weights_only=True), net)


def test_h5(model: Path, net: Net, tmp_path: Path) -> None:
    export(model, "h5", tmp_path / "net.h5")
    with h5py.File(tmp_path / "net.h5") as file:
        assert set(file) == set(net.state_dict())
        assert file.attrs["mask_hash"] == about(net)["mask_hash"]
        assert float(file.attrs["sparsity"]) == pytest.approx(float(about(net)["sparsity"]))
        for name, value in net.state_dict().items():
            assert file[name].attrs["dtype"] == str(value.dtype).removeprefix("torch.")
            assert file[name].shape == value.shape and file[name].chunks is None
            bits = value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()
            assert file[name].dtype == bits.dtype and np.array_equal(file[name][()], bits)


def test_names_that_hdf5_gives_a_meaning_stay_one_name(tmp_path: Path) -> None:
    layer = LayerState((1,), "float32", np.ones(1, np.float32))
    write_model(tmp_path / "m.h5", State({}, {"a/b": layer, "..": layer, "ü %": layer}))
    export(tmp_path / "m.h5", "h5", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert set(file) == {"a%2Fb", "%2E%2E", "ü %25"}
    export(tmp_path / "m.h5", "torch", tmp_path / "out.pt")
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)) == {"a/b", "..", "ü %"}


def test_a_model_without_prunable_layers(tmp_path: Path) -> None:
    write_model(tmp_path / "m.h5", State({}, {}, {"parameters/a": TensorState(np.ones((), np.float64), "float64")}))
    for to in FORMATS:
        export(tmp_path / "m.h5", to, tmp_path / f"out.{to}")
    value = torch.load(tmp_path / "out.torch", weights_only=True)["a"]
    assert value.shape == () and value.dtype == torch.float64 and value == 1


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_model_gives_the_same_bytes(model: Path, tmp_path: Path, to: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(model, to, tmp_path / name / "net")
        assert [path.name for path in (tmp_path / name).iterdir()] == ["net"]
    assert (tmp_path / "a" / "net").read_bytes() == (tmp_path / "b" / "net").read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a" / "net").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_every_dtype_arrives(tmp_path: Path, dtype: str, to: str) -> None:
    if dtype == "bfloat16":
        array = torch.tensor([0.5, -3.0, 1.0]).bfloat16().view(torch.int16).numpy().view(np.uint16)
        expected = torch.tensor([0.5, -3.0, 1.0]).bfloat16()
    else:
        array = np.array([0, 1, 3]).astype(dtype)
        expected = torch.tensor([0, 1, 3]).to(getattr(torch, dtype))
    odd = TensorState(np.ones(3, np.int8), "int8")  # three bytes, so that alignment is put to the test
    write_model(tmp_path / "m.h5", State({}, {}, {"buffers/b": odd, "buffers/w": TensorState(array, dtype)}))
    export(tmp_path / "m.h5", to, tmp_path / "net")
    weights = load_file(tmp_path / "net") if to == "safetensors" else torch.load(tmp_path / "net", weights_only=True)
    assert weights["w"].dtype == expected.dtype and torch.equal(weights["w"], expected)
    assert weights["b"].tolist() == [1, 1, 1]
    if to == "safetensors":  # readers that map the file want each tensor at a multiple of its element's size
        data = (tmp_path / "net").read_bytes()
        length = int.from_bytes(data[:8], "little")
        start = 8 + length + json.loads(data[8 : 8 + length])["w"]["data_offsets"][0]
        assert start % array.itemsize == 0


# Refusals


def test_an_unknown_format_names_those_that_there_are(model: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^--to onnx: no such format; there are safetensors, torch, h5, hf$"):
        export(model, "onnx", tmp_path / "x")


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "source"])
def test_nothing_is_replaced(model: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target = model
    before = model.read_bytes()
    with pytest.raises(JobError, match=r"is already there; remove it, or give another name$"):
        export(model, "torch", target)
    assert model.read_bytes() == before and (kind != "file" or target.read_text() == "mine")


@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_source_leaves_nothing(model: Path, tmp_path: Path, to: str) -> None:
    data = bytearray(model.read_bytes())
    data[-9] ^= 4
    model.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.h5"):
        export(model, to, tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["model.h5"]


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HpcpruneError, match=r"none.h5"):
        export(tmp_path / "none.h5", "torch", tmp_path / "net")


@pytest.mark.parametrize("to", FORMATS)
def test_a_target_in_no_folder(model: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(CheckpointError, match=r"net: cannot be written: there is no folder .*/no; make it"):
        export(model, to, tmp_path / "no" / "net")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 100, 60_000])
@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], to: str, size: int
) -> None:
    layer = LayerState((40_000,), "float32", np.ones(40_000, np.float32))
    write_model(tmp_path / "model.h5", State({}, {"w": layer}))
    with pytest.raises(CheckpointError) as error, file_size_limit(size):
        export(tmp_path / "model.h5", to, tmp_path / "net")
    assert str(error.value).startswith(f"{tmp_path / 'net'}: cannot be written: ") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.h5"]
    assert capfd.readouterr() == ("", "")
