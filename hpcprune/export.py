"""A result for other programs: the dense weights of model.h5 as safetensors, as a torch state dict, or as plain HDF5.

The pruned weights are written as zeros, so what is written is as large as the dense network. Files appear under their
name only when they are whole, and never replace one that is there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from hpcprune.checkpoint.file import Sink, disk_error, sync_folder
from hpcprune.checkpoint.format import State, TensorState, escape, weights_of
from hpcprune.checkpoint.read import read_model
from hpcprune.errors import CheckpointError, JobError
from hpcprune.masks import Masks
from hpcprune.shards import Layer
from hpcprune.tensors import to_tensor
from hpcprune.version import __version__
from hpcprune.weights import fit_weights

__all__ = ["FORMATS", "export"]

Tensors = Mapping[str, TensorState]
About = Mapping[str, str]

SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def export(source: Path, to: str, target: Path) -> None:
    """Write the weights of a model.h5 for other programs.

    source: a file that a run has made; it is verified first.
    to: `safetensors`, `torch` (a state dict for torch.load with weights_only), `h5` (one dataset a tensor), or `hf` (a
        folder for transformers, which needs the task: the job.yaml beside the source says which it is).
    target: the file or folder to make. Names are those of the model's state dict (in `h5`, / % and @ in them as %2F
        %25 %40), dtypes are kept; sparsity and mask hash go along where the format has a place for them.

    Raises:
        JobError: there is no such format, or the target is already there.
        CheckpointError: the source is damaged, or the target cannot be written; nothing is left of it then.
    """
    if to not in (*FORMATS, "hf"):
        raise JobError(f"--to {to}: no such format; there are {', '.join(FORMATS)}, hf")
    if os.path.lexists(target):
        raise JobError(f"{target}: is already there; remove it, or give another name")
    state = read_model(source)
    if to == "hf":
        from hpcprune.loading import build  # they import torch's data loading and more, which only this needs
        from hpcprune.pretrained import save_folder

        task, model = build(source)
        fit_weights(model, _dense(_tensors(state)), source)
        with _appearing(target) as partial:
            save_folder(model, getattr(task, "tokenizer", None), partial)
        return
    with _appearing(target) as partial:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            FORMATS[to](fd, _tensors(state), _about(state))
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A name beside the target's to write to, file or folder; the target appears when all is written, or nothing does.

    Raises:
        CheckpointError: it could not be written.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise disk_error(target, error) from error
    except (RuntimeError, SafetensorError) as error:  # torch's word for a failing disk, and safetensors'
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{target}: cannot be written: {reason}; is the disk full? nothing was left") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _tensors(state: State) -> dict[str, TensorState]:
    """All tensors of the model in their shapes, dense, under their names in the model's state dict."""
    tensors = {
        name: TensorState(layer.values.reshape(layer.shape), layer.dtype) for name, layer in state.layers.items()
    }
    for key, tensor in state.tensors.items():
        group, _, name = key.partition("/")
        if group in ("parameters", "buffers"):
            tensors[name] = tensor
    return tensors


def _dense(tensors: Tensors) -> dict[str, Tensor]:
    return {name: to_tensor(stored.array, stored.dtype) for name, stored in tensors.items()}


def _about(state: State) -> dict[str, str]:
    layers = [Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items()]
    full = [np.packbits(np.ones(weights_of(layer.shape), np.bool_), bitorder="little") for layer in layers]
    masks = Masks(layers, [full[i] if (m := s.mask) is None else m for i, s in enumerate(state.layers.values())])
    sparsity = state.about.get("sparsity", masks.sparsity)  # which is of weights alone, where there are edges too
    return {"hpcprune": __version__, "sparsity": repr(sparsity), "mask_hash": masks.hash}


def _safetensors(fd: int, tensors: Tensors, about: About) -> None:
    """The published format: the header's length in 8 bytes, the header in JSON, the values one after the other.

    Written here since the library's own writer puts the metadata in any order and ignores the umask.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].array.itemsize, item[0]))  # all are aligned then
    end = 0
    for name, stored in ordered:
        start, end = end, end + stored.array.nbytes
        kind = SAFETENSORS_NAMES[stored.dtype]
        header[name] = {"dtype": kind, "shape": list(stored.array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, stored in ordered:
            file.write(np.ascontiguousarray(stored.array).reshape(-1).view(np.uint8).data)


def _torch(fd: int, tensors: Tensors, about: About) -> None:
    with os.fdopen(os.dup(fd), "wb") as file:
        torch.save(_dense(tensors), file)


def _h5(fd: int, tensors: Tensors, about: About) -> None:
    sink = Sink(fd)  # HDF5 must not meet a failing disk itself
    with h5py.File(sink, "w", driver="fileobj", libver=("earliest", "v110")) as file:
        file.attrs.update(about)
        for name, tensor in tensors.items():
            file.create_dataset(escape(name), data=tensor.array).attrs["dtype"] = tensor.dtype
    sink.check()


FORMATS: Mapping[str, Callable[[int, Tensors, About], None]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "h5": _h5,
}
