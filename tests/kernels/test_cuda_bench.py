"""The bench of products on a GPU, by the emulator: that all contenders run and agree. Its clock stands still."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def bench(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if device.type == "cuda":
        pytest.skip("run the bench itself there")
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("spmm_cuda", ROOT / "bench/spmm_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def in_turns(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
        return {name: (contender(), 1e-6)[1] for name, contender in contenders.items()}

    for name, value in (("DEVICE", "cpu"), ("in_turns", in_turns), ("FLUSHED", 1 << 10)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "PATTERNS", ("unstructured", "blocks"))  # 2:4 is torch's own, on a GPU alone
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "emulated")
    return module


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("backward", [False, True])
def test_all_contenders_run(bench: ModuleType, capsys: pytest.CaptureFixture[str], backward: bool) -> None:
    bench.figures(argparse.Namespace(shapes=[(64, 128)], batch=[5], sparsity=[0.8], backward=backward))
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("emulated; ") and names.split()[:1] == ["dtype"]
    # Float32: csr; bfloat16: bitmap tiles too, forward, and blocks where they are. F.linear, and what stands for
    # cuSPARSE on the CPU, in float32.
    expected = [2, 2, 2, 3] if backward else [3, 3, 3, 4]
    assert [line.split().count("1.0") for line in rows] == expected


def test_without_a_gpu_it_says_so(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no GPU: torch .* sees none"):
        bench.run(argparse.Namespace())
