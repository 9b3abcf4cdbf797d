"""`hpcprune.prune` in a user's script under mpirun: the same masks on any number of ranks, and those of torch.

Run by mpirun this file is that script: `test_pruning_ranks.py FOLDER` leaves the masks there.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.nn.utils import prune as torch_prune

import hpcprune
from tests.conftest import Launch

Bools = np.ndarray
Model = Callable[[], nn.Module]


def convolutions(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Layers of some sizes, none a multiple of 8 or of any number of ranks."""
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.Linear(101, 211), nn.Linear(211, 7, bias=False), nn.GRU(13, 9)
    ).to(dtype)


def one_layer() -> nn.Module:
    torch.manual_seed(12)
    return nn.Linear(97, 31)


def three_weights() -> nn.Module:
    torch.manual_seed(13)
    return nn.Linear(3, 1)


def all_equal() -> nn.Module:
    model = nn.Sequential(nn.Linear(50, 9), nn.Linear(9, 50))
    for parameter in model.parameters():
        nn.init.constant_(parameter, -0.25)
    return model


def of_several_dtypes() -> nn.Module:
    torch.manual_seed(14)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    return nn.ModuleList([nn.Linear(40, 30, dtype=dtype) for dtype in dtypes])


CASES: dict[str, tuple[Model, dict[str, Any]]] = {
    "float32": (convolutions, {}),
    "float64": (lambda: convolutions(torch.float64), {}),
    "float16": (lambda: convolutions(torch.float16), {}),
    "bfloat16": (lambda: convolutions(torch.bfloat16), {}),
    "several dtypes": (of_several_dtypes, {}),
    "layer scope": (convolutions, {"scope": "layer"}),
    "layer scope, bfloat16": (lambda: convolutions(torch.bfloat16), {"scope": "layer"}),
    "excluded": (convolutions, {"exclude": ["2"]}),
    "fewer layers than ranks": (one_layer, {}),
    "fewer weights than ranks": (three_weights, {}),
    "ties": (all_equal, {}),
    "ties, layer scope": (all_equal, {"scope": "layer"}),
}
SPARSITIES = (0, 0.25, 0.9)


def targets(model: nn.Module, exclude: tuple[str, ...] = ()) -> list[str]:
    """The prunable parameters by hand, in order: matrices, kernels and the weights of recurrent layers."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return [name for name in names if name.split(".")[0] not in exclude]


def by_numpy(model: nn.Module, names: list[str], sparsity: float, scope: str = "global") -> dict[str, Bools]:
    """The masks from a stable sort in float64: the smallest go, and of equal ones the first."""
    scores = {name: model.get_parameter(name).detach().abs().double().numpy() for name in names}
    masks = {}
    for group in [names] if scope == "global" else [[name] for name in names]:
        flat = np.concatenate([scores[name].reshape(-1) for name in group])
        mask = np.ones(flat.size, np.bool_)
        mask[np.argsort(flat, kind="stable")[: round(sparsity * flat.size)]] = False
        parts = np.split(mask, np.cumsum([scores[name].size for name in group])[:-1])
        masks |= {name: part.reshape(scores[name].shape) for name, part in zip(group, parts, strict=True)}
    return masks


def by_torch(model: nn.Module, names: list[str], sparsity: float) -> dict[str, Bools]:
    pairs = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=sparsity)
    return {
        name: getattr(module, f"{weight}_mask").bool().numpy()
        for name, (module, weight) in zip(names, pairs, strict=True)
    }


def pruned(model: nn.Module, sparsity: float, **options: Any) -> dict[str, Bools]:
    """What a user does; what is left of the model must be the weights of the masks as they were."""
    before = copy.deepcopy(model)
    masks = hpcprune.prune(model, sparsity, **options)
    for name, parameter in before.named_parameters():
        kept = parameter * masks[name] if name in masks else parameter
        assert torch.equal(model.get_parameter(name), kept), name
    return {name: mask.numpy() for name, mask in masks.items()}


def main(folder: Path) -> None:
    everybody = MPI.COMM_WORLD
    rank = everybody.Get_rank()
    found: dict[Any, Any] = {}
    for case, (model, options) in CASES.items():
        for sparsity in SPARSITIES:
            found[case, sparsity] = pruned(model(), sparsity, **options)
    found["hash"] = hpcprune.prune(convolutions(), 0.9).hash
    found["communicator"] = pruned(convolutions(), 0.9, comm=everybody)
    found["half of the ranks"] = pruned(convolutions(), 0.9, comm=everybody.Split(rank % 2))
    if rank == 0:
        found["one rank alone"] = pruned(convolutions(), 0.9, comm=MPI.COMM_SELF)
    model = convolutions()
    nn.init.constant_(model[2].weight[3:5], float("nan"))
    try:
        hpcprune.prune(model, 0.9)
    except hpcprune.HpcpruneError as error:
        found["nan"] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))


def assert_same(found: Mapping[str, Bools], expected: Mapping[str, Bools], what: object) -> None:
    assert list(found) == list(expected), what
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{what} {name}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_script_prunes_to_the_same_masks_on_any_number_of_ranks(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, __file__, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        found = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        for case, (model, options) in CASES.items():
            names = targets(model(), options.get("exclude", ()))
            for sparsity in SPARSITIES:
                expected = by_numpy(model(), names, sparsity, options.get("scope", "global"))
                assert_same(found[case, sparsity], expected, (case, sparsity, rank))
        same = by_torch(convolutions(), targets(convolutions()), 0.9)
        for case in (("float32", 0.9), "communicator", "half of the ranks", *["one rank alone"] * (rank == 0)):
            assert_same(found[case], same, (case, rank))
        assert found["hash"] == hpcprune.prune(convolutions(), 0.9, comm=hpcprune.World.alone()).hash
        assert found["nan"].startswith("NumericsError: 2.weight: 202 of ")


def test_the_numbers_that_are_compared_with_torchs_have_no_ties_at_the_threshold() -> None:
    for dtype in (torch.float32, torch.float64):
        model = convolutions(dtype)
        names = targets(model)
        assert_same(by_torch(convolutions(dtype), names, 0.9), by_numpy(model, names, 0.9), dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
