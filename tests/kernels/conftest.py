"""The paths that kernels may take on a CPU, each test once on every one that there is; and the emulator's orders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library
from hpcprune.sparse.kernels import kernels
from tests.kernels.devices import device as device

PATHS = ("avx512", "avx2", "portable", "numpy")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HPCPRUNE_NATIVE", request.param)
    try:
        assert library().path == request.param
    except HpcpruneError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(params=[path for path in PATHS if path != "numpy"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A path on which there are products."""
    monkeypatch.setenv("HPCPRUNE_NATIVE", request.param)
    kernels.cache_clear()
    try:
        kernels()
    except HpcpruneError as error:
        pytest.skip(str(error))
    yield request.param
    kernels.cache_clear()


@pytest.fixture(params=[None, 1, 2], ids=["in order", "seed 1", "seed 2"])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which the emulator runs threads and blocks."""
    if request.param is None:
        monkeypatch.delenv("CUEMU_SEED", raising=False)
    else:
        monkeypatch.setenv("CUEMU_SEED", str(request.param))
