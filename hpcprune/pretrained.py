"""Pretrained language models of Hugging Face's kind: from a folder or a GGUF file on disk, and back into a folder.

Nothing is downloaded. A GGUF file is taken tensor by tensor into the model's own memory, where transformers would first
have all of them beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hpcprune.errors import JobError, WeightsError
from hpcprune.weights import AGAIN, reading_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model", "load_tokenizer", "save_folder"]


def load_model(source: Path) -> PreTrainedModel:
    """The causal language model of a folder (config.json and .safetensors), or of a .gguf file, in float32.

    Raises:
        WeightsError: there is none, transformers (or gguf) is not installed, a file is cut short, lacks weights that
            the model needs, or is of a kind of model that transformers does not know.
    """
    _need(source)
    if source.is_dir():
        for file in sorted(source.glob("*.safetensors")):
            with reading_safetensors(file), safe_open(file, "pt"):  # its length is held to what its header says
                pass
    return _told(source, partial(_of_folder if source.is_dir() else _of_gguf, source))  # type: ignore[no-any-return]


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the same folder or .gguf file. Raises WeightsError as `load_model` does."""
    _need(source)
    from transformers import AutoTokenizer

    return _told(source, lambda: AutoTokenizer.from_pretrained(**_place(source)))  # type: ignore[no-any-return]


def save_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Make a folder that `from_pretrained` opens, with the model as it is.

    Raises:
        JobError: the model is not one of transformers.
        OSError, RuntimeError, SafetensorError: it cannot be written.
    """
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise JobError(
            f"--to hf: the task's model is {type(model).__name__}, not one of transformers (PreTrainedModel), so that "
            "there is no config.json to write; give --to safetensors, torch or h5"
        )
    with _without_bars():
        save(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    readable = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(readable)  # safetensors' own writer ignores the umask


def _need(source: Path) -> None:
    """Raise WeightsError where nothing can be opened."""
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise WeightsError(f"{source}: {error.name} is not installed; pip install 'hpcprune[hf]'") from None
    if not (source / "config.json").is_file() and not (source.is_file() and source.suffix == ".gguf"):
        what = "a folder without config.json" if source.is_dir() else "neither a folder nor a .gguf file"
        raise WeightsError(
            f"{source}: {what}; give one on disk, as nothing is downloaded (hf download NAME --local-dir FOLDER)"
        )


def _told(source: Path, read: Callable[[], Any]) -> Any:
    """What is read; an error of transformers, of whatever class, becomes a WeightsError."""
    try:
        with _without_bars():
            return read()
    except WeightsError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source}: transformers cannot open it: {type(error).__name__}: {reason}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Have transformers draw no progress bar, which each rank would draw over the others'."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _place(source: Path) -> dict[str, Any]:
    """Where transformers is to look."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if not source.is_dir():
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    return place | {"local_files_only": True, "trust_remote_code": False}


def _of_folder(source: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(**_place(source), dtype=torch.float32, output_loading_info=True)
    model, told = opened
    _need_all(source, [*told["missing_keys"], *(each[0] for each in told["mismatched_keys"])], model)
    return model  # type: ignore[no-any-return]


def _need_all(source: Path, missing: Sequence[str], model: nn.Module) -> None:
    """Raise WeightsError where a model has weights that its file has not given; they would be anything."""
    if missing:
        others = f" and {len(missing) - 3} others" if len(missing) > 3 else ""
        raise WeightsError(
            f"{source}: has no {', '.join(sorted(missing)[:3])}{others} for a {type(model).__name__}; give the whole "
            "model (join a split file: llama-gguf-split --merge), and one for causal language modelling"
        )


@torch.no_grad()
def _of_gguf(source: Path) -> PreTrainedModel:
    """Names, and what a kind of model has turned or joined, are as transformers knows them."""
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    try:
        with source.open("rb") as file:
            if not b"GGUF".startswith(file.read(4)):
                raise WeightsError(f"{source}: no GGUF file, as it does not begin with GGUF; give another file")
        reader = GGUFReader(source)
    except OSError as error:
        raise WeightsError(f"{source}: cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError, KeyError):  # they speak of arrays inside the reader
        raise WeightsError(f"{source}: not a whole GGUF file: {AGAIN}") from None
    config = AutoConfig.from_pretrained(**_place(source))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    architecture = reader.get_field("general.architecture")
    kind: Any = TENSOR_PROCESSORS.get(architecture.contents() if architecture else "", TensorProcessor)
    processor = kind(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    weights, joined = dict(model.state_dict()), {"tensors": dict[str, Tensor]()}
    missing = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}

    def take(name: str, values: Tensor) -> None:
        if weights[name].shape != values.shape:
            raise WeightsError(f"{source}: {name} is {[*values.shape]}, and {[*weights[name].shape]} in the model")
        weights[name].copy_(values)
        missing.pop(weights[name].data_ptr(), None)

    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        found = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=joined)
        if found.name in names:
            take(names[found.name], torch.from_numpy(np.require(found.weights, requirements=("C", "W"))))
        elif found.name not in (None, "rope_freqs.weight"):  # joined below; for texts longer than it was trained on
            raise WeightsError(
                f"{source}: {tensor.name} has no place in a {type(model).__name__}, as transformers reads the file; "
                "give a folder of the model instead"
            )
    for name, joint in joined["tensors"].items():  # of experts, which a file has one by one
        take(name, joint)
    _need_all(source, [*missing.values()], model)
    return model  # type: ignore[no-any-return]
