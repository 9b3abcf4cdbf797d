"""The dense weights: read from a file that a stranger may have written, and put into the model if they fit exactly.

What a file is, is told by its first bytes, whatever it is called. Nothing in it is ever run: torch files are read with
weights_only, safetensors and hpcprune's checkpoints cannot hold code. Fitting is all or nothing: every name, shape and
value is looked at before the first weight of the model changes.
"""

from __future__ import annotations

import difflib
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hpcprune.checkpoint.format import State
from hpcprune.checkpoint.read import read_model
from hpcprune.errors import CheckpointError, WeightsError
from hpcprune.tensors import dtype_name, to_tensor

__all__ = ["AGAIN", "fit_weights", "load_weights", "reading_safetensors", "weights_of"]

log = logging.getLogger(__name__)

LISTED = 8  # names that are listed one by one before the rest is counted

NESTS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights beside epoch and optimizer
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name

_HDF5 = b"\x89HDF\r\n\x1a\n"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a pickled magic number first
_KINDS = "weights are a torch state dict (.pt, .pth), a .safetensors file, or a model.h5 of hpcprune"
AGAIN = "cut short or damaged; copy or download it again"


def load_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file by name, on the CPU, in the file's dtypes; of a checkpoint, not the optimizer's.

    Raises:
        WeightsError: there is no such file, it is damaged, holds code, or is none of the three formats.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # opening a named pipe would wait for a writer
            raise WeightsError(f"{path}: not a file; {_KINDS}")
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such weights file{_files_beside(path)}") from None
    except IsADirectoryError:
        raise WeightsError(f"{path}: a folder, not a weights file{_files_beside(path / '_')}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}; make it readable or name another") from None
    if not start:
        raise WeightsError(f"{path}: the file is empty; {_KINDS}")
    if start.startswith(b"hpcprune checkpoint\n"):
        return _load_checkpoint(path)
    if start.startswith((b"PK\x03\x04", _LEGACY)):
        return _load_torch(path, start)
    if len(start) > 8 and start[8:9] == b"{":  # 8 bytes of length, then JSON
        with reading_safetensors(path):
            return load_file(path)
    raise WeightsError(f"{path}: {_name_other(start)}; {_KINDS}")


def _files_beside(path: Path) -> str:
    suffixes = (".pt", ".pth", ".safetensors", ".h5")
    there = sorted(str(file) for file in path.parent.glob("*") if file.suffix in suffixes)[:5]
    return f"; there are {', '.join(there)}" if there else "; correct the path"


def _name_other(start: bytes) -> str:
    """What a file that is no weights file seems to be."""
    text = start.lstrip().lower()
    if text.startswith(b"<"):
        return "a web page, perhaps of a download that needed a login"
    if text.startswith(b"version https://git-lfs"):
        return "only the pointer to a file in Git LFS (run: git lfs pull)"
    if start.startswith(_HDF5):
        return "an HDF5 file that hpcprune did not write as a checkpoint"
    if start.startswith(b"\x80"):
        return "a Python pickle that torch.save did not write: it can run code when it is loaded, so it is not loaded"
    return f"not weights (it starts with {start[:8]!r})"


def _load_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        return weights_of(read_model(path))
    except CheckpointError as error:
        raise WeightsError(str(error)) from None


def weights_of(state: State) -> dict[str, Tensor]:
    """All tensors of a checkpoint's model by name: parameters and buffers, pruned or not, not the optimizer's."""
    weights = {}
    for name, layer in state.layers.items():
        weights[name] = to_tensor(layer.values, layer.dtype).reshape(layer.shape)
    for key, tensor in state.tensors.items():
        group, _, name = key.partition("/")
        if group in ("parameters", "buffers"):
            weights[name] = to_tensor(tensor.array, tensor.dtype)
    return weights


@contextmanager
def reading_safetensors(path: Path) -> Iterator[None]:
    """Raise WeightsError where a file turns out not to be whole."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({_first_line(error)}): {AGAIN}") from None


def _load_torch(path: Path, start: bytes) -> dict[str, Tensor]:
    if not start.startswith(_LEGACY):
        _check_archive(path)
    try:
        with path.open("rb") as file:  # given a path, torch would go by the file's suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise WeightsError(f"{path}: {AGAIN}") from None
        raise WeightsError(
            f"{path}: holds code or objects ({found[1]}) and not weights alone, so it is not loaded; if you trust it, "
            f"convert it: m = torch.load({path.name!r}, weights_only=False), then torch.save(m.state_dict(), 'w.pt')"
        ) from None
    except Exception as error:  # a damaged archive raises whatever its bytes lead to
        raise WeightsError(f"{path}: {AGAIN} ({_first_line(error)})") from None
    return _state_dict(content, path)


def _check_archive(path: Path) -> None:
    """Raise WeightsError if a zip archive is not one of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise WeightsError(f"{path}: {AGAIN}") from None
    if "constants.pkl" in names:
        raise WeightsError(
            f"{path}: a TorchScript program, which holds code, so it is not loaded; if you trust it, convert it: "
            f"m = torch.jit.load({path.name!r}), then torch.save(m.state_dict(), 'w.pt')"
        )
    if "data.pkl" not in names:
        raise WeightsError(f"{path}: a zip archive that torch.save did not write; {_KINDS}")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        what = f"an empty {type(content).__name__}" if content in ({}, [], ()) else f"a {type(content).__name__}"
        raise WeightsError(f"{path}: holds {what}, not a state dict; write it with torch.save(model.state_dict(), ...)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise WeightsError(
                f"{path}: {name!r} is of type {kind}, not a named tensor, and there is no {', '.join(NESTS)} beside it "
                "that holds a state dict; write the file with torch.save(model.state_dict(), ...)"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise WeightsError(
                f"{path}: {name} is sparse or quantized; save it dense: tensor.to_dense(), .dequantize()"
            )
    return {name: value.detach() for name, value in content.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `weights` into a model's parameters and buffers, converting to the model's float dtypes.

    Names must be those of `model.state_dict()`, with or without the prefix of a wrapper (module.); of parameters that
    the model ties, one is enough. Shapes must be equal. Parameters must be finite, buffers must not be NaN.
    source: what the messages begin with.

    Raises:
        WeightsError: one line per problem; the model is as it was.
    """
    targets = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    given = _unwrap(weights, targets)
    problems = _name_problems(given, targets, type(model).__name__) or [
        problem for name, value in given.items() for problem in _value_problems(name, value, targets[name])
    ]
    if problems:
        raise WeightsError("\n".join(f"{source}: {problem}" for problem in problems))
    _log_conversions(given, targets, source)
    with torch.no_grad():
        for name, value in given.items():
            targets[name].copy_(value)


def _unwrap(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights without a wrapper's prefix, unless the model's own names have it."""
    for prefix in WRAPPERS:
        own = targets and all(name.startswith(prefix) for name in targets)
        if weights and not own and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _name_problems(given: Mapping[str, Tensor], targets: Mapping[str, Tensor], model: str) -> list[str]:
    tied = {id(targets[name]) for name in given if name in targets}
    missing = [name for name, target in targets.items() if name not in given and id(target) not in tied]
    unexpected = [name for name in given if name not in targets]
    if targets and len(unexpected) == len(given):
        return [f"no name is the model's: it has {_some(unexpected)}; {model} has {_some(list(targets))}"]
    problems = []
    for name in missing[:LISTED]:
        near = difflib.get_close_matches(name, unexpected, n=1)
        hint = f"; the nearest that only the file has is {near[0]}" if near else "; is the file of another model?"
        problems.append(f"{name} is missing, which {model} has{hint}")
    if len(missing) > LISTED:
        problems.append(f"{len(missing) - LISTED} more names of {model} are missing")
    for name in unexpected[:LISTED]:
        near = difflib.get_close_matches(name, missing or list(targets), n=1)
        hint = f"; the nearest there is {near[0]}" if near else "; is the file of another model?"
        problems.append(f"{name} is not in {model}{hint}")
    if len(unexpected) > LISTED:
        problems.append(f"{len(unexpected) - LISTED} more names are not in {model}")
    return problems


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def _value_problems(name: str, value: Tensor, target: Tensor) -> list[str]:
    """What is wrong with the tensor `value` for the parameter or buffer `target`, as at most one line."""
    if value.shape != target.shape:
        return [
            f"{name} has shape {tuple(value.shape)}, the model's has {tuple(target.shape)}; is it of another model?"
        ]
    if value.is_floating_point() != target.is_floating_point() or value.is_complex() != target.is_complex():
        return [f"{name} is {dtype_name(value)}, the model's is {dtype_name(target)}; convert the file"]
    if not value.is_floating_point():
        return []
    converted = value.to(target.dtype)
    if isinstance(target, nn.Parameter):
        bad = int((~torch.isfinite(converted)).sum())
        given_bad = int((~torch.isfinite(value.to(torch.promote_types(value.dtype, torch.float32)))).sum())
        if bad > given_bad:
            return [f"{name}: {bad - given_bad} of {value.numel()} values are too large for {dtype_name(target)}"]
        if bad:
            return [f"{name}: {bad} of {value.numel()} values are NaN or infinite; take weights of a sound training"]
    elif bad := int(torch.isnan(converted).sum()):
        return [f"{name}: {bad} of {value.numel()} values are NaN; take weights of a sound training"]
    return []


def _log_conversions(given: Mapping[str, Tensor], targets: Mapping[str, Tensor], source: str | Path) -> None:
    kinds: dict[tuple[str, str], int] = {}
    for name, value in given.items():
        if value.dtype != targets[name].dtype:
            kind = dtype_name(value), dtype_name(targets[name])
            kinds[kind] = kinds.get(kind, 0) + 1
    for (theirs, ours), count in kinds.items():
        log.info("%s: %d tensors converted from %s to the model's %s", source, count, theirs, ours)
