"""A pruned network from its checkpoint, ready for inference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from hpcprune.checkpoint.format import State
from hpcprune.checkpoint.read import read_model
from hpcprune.errors import HpcpruneError
from hpcprune.job_file import load_job
from hpcprune.masks import Masks
from hpcprune.shards import Layer
from hpcprune.sparse import sparsify
from hpcprune.task import Task, build_model, load_task
from hpcprune.weights import fit_weights, weights_of

__all__ = ["build", "load"]


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    sparse: Literal["auto", "never"] = "auto",
    infer: Callable[[nn.Module], object] | None = None,
    samples: int = 1,
) -> nn.Module:
    """The network of a `model.h5`, in evaluation mode.

    Args:
        path: the file, or the run's folder that it lies in.
        model: what takes the weights, and is returned. Without it the task of the run's job.yaml, which lies beside the
            file, builds it: that runs the task's code, as `hpcprune run` does.
        sparse: "auto" replaces the layers that are faster sparse by such, as measured here and now (`sparsify`); memory
            for their weights falls with their density.
        infer: runs the model as it will be used, `lambda model: model(batch)`, so that layers are timed on what they
            will be given, and the model as a whole after them. Without it Linear layers alone are timed, with `samples`
            rows each: convolutions stay dense, and that the whole has become faster is not made sure of.

    Raises:
        HpcpruneError: there is no such file, it is damaged, does not fit the model, or there is no model.
    """
    if sparse not in ("auto", "never"):
        raise HpcpruneError(f'sparse={sparse!r}: there are "auto" and "never"')
    path = Path(path)
    if path.is_dir():
        path = path / "model.h5"
    if not path.exists():
        raise HpcpruneError(f"{path}: no such file; give a model.h5, or the folder of a run that has ended")
    state = read_model(path)
    if model is None:
        _, model = build(path)
    fit_weights(model, weights_of(state), path)
    model.eval()
    if sparse == "auto":
        sparsify(model, _masks(state), None if infer is None else lambda: infer(model), samples=samples)
    return model


def build(path: Path) -> tuple[Task, nn.Module]:
    """The task and a new model of it, for a run's `model.h5`. Runs the task's code."""
    job_file = path.with_name("job.yaml")
    if not job_file.exists():
        raise HpcpruneError(
            f"{path}: no job.yaml beside it says which network this is; give the model: load(path, model), or "
            "put the run's job.yaml there"
        )
    job = load_job(job_file)
    task = load_task(job.task, job.folder)
    return task, build_model(task)


def _masks(state: State) -> Masks:
    layers = [Layer(name, layer.shape, layer.dtype) for name, layer in state.layers.items() if layer.mask is not None]
    return Masks(layers, [np.asarray(state.layers[layer.name].mask) for layer in layers])
