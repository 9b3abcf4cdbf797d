"""The paths that the kernels may take, each test once on every one that this machine has."""

from __future__ import annotations

import pytest

from hpcprune.errors import HpcpruneError
from hpcprune.native.library import library
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
