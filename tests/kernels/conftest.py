"""The paths that the kernels may take, each test once on every one that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library
from hpcprune.sparse.kernels import kernels

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
