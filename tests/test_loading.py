"""A network from its checkpoint, ready for inference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import hpcprune
from hpcprune.checkpoint import read_model
from hpcprune.errors import HpcpruneError
from hpcprune.sparse import SparseLinear, choose
from tests.commands import Command
from tests.conftest import SMALL
from tests.jobs.small.task import Small


@pytest.fixture
def all_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that sparse is faster."""
    monkeypatch.setattr(choose, "time_in_turns", lambda first, second: (1.0, 0.5))


def dense_model(done: Path) -> nn.Module:
    model = Small().model()
    return hpcprune.load(done, model, sparse="never")


@pytest.mark.usefixtures("all_sparse")
@pytest.mark.parametrize("name", ["", "model.h5"])
def test_the_networks_layers_are_sparse_and_it_infers_the_same(done: Path, name: str) -> None:
    model = hpcprune.load(done / name)
    assert not model.training
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    dense = dense_model(done)
    x = torch.randn(3, next(dense.parameters()).shape[1])
    torch.testing.assert_close(model(x), dense(x))


def test_the_weights_are_those_of_the_checkpoint(done: Path) -> None:
    model, state = dense_model(done), read_model(done / "model.h5")
    for name, parameter in model.named_parameters():
        if name in state.layers:
            assert torch.equal(parameter.flatten(), torch.from_numpy(state.layers[name].values))


def test_layers_are_timed_on_what_they_will_be_given(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        "hpcprune.loading.sparsify", lambda model, masks, infer, samples: given.append((infer(), samples))
    )
    model = Small().model()
    x = torch.randn(5, next(model.parameters()).shape[1])
    loaded = hpcprune.load(done, model, infer=lambda model: model(x), samples=9)
    assert loaded is model and given[0][1] == 9
    torch.testing.assert_close(given[0][0], model(x))


def test_without_a_job_beside_it_the_model_is_asked_for(done: Path, tmp_path: Path) -> None:
    shutil.copy(done / "model.h5", tmp_path)
    with pytest.raises(HpcpruneError, match=r"no job\.yaml beside it .*; give the model: load\(path, model\)"):
        hpcprune.load(tmp_path)
    assert isinstance(hpcprune.load(tmp_path, Small().model()), nn.Module)


def test_mistakes_are_told(done: Path, tmp_path: Path) -> None:
    with pytest.raises(HpcpruneError, match='sparse=\'always\': there are "auto" and "never"'):
        hpcprune.load(done, sparse="always")  # type: ignore[arg-type]
    with pytest.raises(HpcpruneError, match=r"no such file; give a model\.h5, or the folder of a run"):
        hpcprune.load(tmp_path)
    with pytest.raises(HpcpruneError, match=r"model\.h5"):
        hpcprune.load(done, nn.Linear(2, 2))


def test_a_run_says_how_its_layers_were_timed(done: Path, hpcprune: Command, tmp_path: Path) -> None:
    found = read_model(done / "model.h5").about["inference"]
    assert found["samples"] > 0 and found["threads"] > 0
    layers = found["sparse"]["layers"]
    assert [layer["name"] for layer in layers] and all(layer["dense_seconds"] > 0 for layer in layers)
    ended = hpcprune("run", SMALL / "job.yaml", "evaluate.sparse=never", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert read_model(tmp_path / "run" / "model.h5").about["inference"]["sparse"] is None
