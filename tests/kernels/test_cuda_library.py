"""The library of CUDA kernels: nvcc found, the library compiled once and loaded, and clear words where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcprune.native import cuda
from hpcprune.native.cuda import CudaError, UnavailableError, check, describe, find_nvcc, library

ROOT = Path(__file__).resolve().parents[2]
KERNEL = ROOT / "tests/kernels/planted.cu"

needs_nvcc = pytest.mark.skipif(find_nvcc(os.environ) is None, reason="no nvcc in CUDA_HOME, on PATH or from pip")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with hpcprune installed in it whose only kernels are those of planted.cu, of which it knows two."""
    package = tmp_path / "site" / "hpcprune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("errors.py", "lock.py", "native"):
        copy = shutil.copytree if (ROOT / "hpcprune" / name).is_dir() else shutil.copy
        copy(ROOT / "hpcprune" / name, package / name)
    kernels = package / "kernels"
    (kernels / "planted").mkdir(parents=True)
    shutil.copy(ROOT / "kernels/cuda.h", kernels)
    source = KERNEL.read_text()
    (kernels / "planted" / "planted.cu").write_text(source.replace("../../kernels/cuda.h", "../cuda.h"))
    table = package / "native/cuda_functions.py"
    head, _, rest = table.read_text().partition("FUNCTIONS: ")
    planted = """FUNCTIONS = {
    "turn_pairs": (_status, [_integer, *[_pointer] * 3]),
    "sum_blocks": (_status, [_integer, _long, *[_pointer] * 3]),
}
"""
    table.write_text(head + planted + rest[rest.index("\n\ndef ") :])
    return package.parent


def in_process(package: Path, code: str, **environ: str) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package), **environ}
    command = [sys.executable, "-c", f"from hpcprune.native.cuda import *; {code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


DESCRIBE = "print(describe('sm_90'))"
# What docs/kernels.md has users call where nvcc is and no GPU, here for the architecture that tests have compiled.
[COMMAND] = re.findall(r'python -c "(.*library\(.*)"\n', (ROOT / "docs/kernels.md").read_text())
LOGIN_NODE = COMMAND.replace("sm_90", "sm_80")


@needs_nvcc
def test_real_kernels_are_compiled_once_and_their_errors_raised(package: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    launch = """
import ctypes
code = library("sm_80").code
none = ctypes.c_void_p()
try:
    check(code.hpcprune_cuda_turn_pairs(0, none, none, none), "turn_pairs of [2, 32]")
except CudaError as error:
    print(error)
print(describe("sm_80"))
"""
    (package / "launch.py").write_text(f"from hpcprune.native.cuda import *\n{launch}")
    first, described = in_process(package, "import launch", HPCPRUNE_CACHE=cache).splitlines()
    if not torch.cuda.is_available():
        assert first.startswith("turn_pairs of [2, 32]: CUDA error "), first
    assert described.startswith(f"sm_80: compiled into {cache}/cuda-sm_80-"), described
    assert "HPCPRUNE_CUDA=off" in described
    file = described.split()[3].rstrip(";")
    assert "sm_80: cached in" in in_process(package, "print(describe('sm_80'))", HPCPRUNE_CACHE=cache)
    assert "sm_80: cached in" in in_process(package, "print(describe('sm_80'))", HPCPRUNE_CACHE=cache, PATH="/nowhere")
    assert in_process(package, LOGIN_NODE, HPCPRUNE_CACHE=cache).strip() == file
    chosen = in_process(package, "print(describe())", HPCPRUNE_CUDA=file)
    assert chosen.startswith(f"{file}: chosen by HPCPRUNE_CUDA"), chosen


def test_nvcc_is_told_the_architecture_and_where_its_libraries_are(package: Path, tmp_path: Path) -> None:
    nvcc = script(tmp_path / "cuda/bin/nvcc", f'echo "$@" >> {tmp_path}/log; echo "error: boom" >&2; exit 1')
    (tmp_path / "cuda/lib").mkdir()
    environ = {"CUDA_HOME": str(tmp_path / "cuda"), "HPCPRUNE_CACHE": str(tmp_path / "cache")}
    described = in_process(package, f"{DESCRIBE}; {DESCRIBE}", **environ)
    assert described.count(f"none: {nvcc} -L{tmp_path}/cuda/lib could not compile the kernels (error: boom)") == 2
    compiles = [line for line in (tmp_path / "log").read_text().splitlines() if "--version" not in line]
    assert len(compiles) == 1, "what failed is not tried again"
    assert "-arch=sm_90" in compiles[0] and "planted.cu" in compiles[0]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_nvcc_is_found_in_cuda_home_before_path_before_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_pip = script(tmp_path / "site/nvidia/cu13/bin/nvcc", "")
    on_path = script(tmp_path / "path/nvcc", "")
    of_home = script(tmp_path / "home/bin/nvcc", "")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert find_nvcc({"PATH": "/nowhere"}) == of_pip
    assert find_nvcc({"PATH": str(on_path.parent)}) == on_path
    assert find_nvcc({"PATH": str(on_path.parent), "CUDA_HOME": str(tmp_path / "home")}) == of_home
    of_home.unlink()
    assert find_nvcc({"PATH": str(on_path.parent), "CUDA_HOME": str(tmp_path / "home")}) == on_path


def test_without_nvcc_or_gpu_the_reason_is_told(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HPCPRUNE_CUDA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"^no GPU \(torch .*, built .*, sees none\)$"):
        library()
    assert describe().startswith("none: no GPU (torch")
    without = in_process(package, DESCRIBE, PATH="/nowhere", HPCPRUNE_CACHE=str(tmp_path))
    if find_nvcc({"PATH": "/nowhere"}) is None:
        assert without.startswith("none: no nvcc (neither in CUDA_HOME nor on PATH): pip install"), without


def test_the_architecture_is_that_of_torchs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda._architecture() == "sm_90"


def test_the_variable_turns_kernels_off_or_names_a_library(package: Path, tmp_path: Path) -> None:
    off = in_process(package, "print(describe())", HPCPRUNE_CUDA="off")
    assert off.startswith("none: turned off by HPCPRUNE_CUDA=off"), off
    missing = in_process(package, REFUSED, HPCPRUNE_CUDA=str(tmp_path / "none.so"))
    assert missing.startswith(f"HpcpruneError HPCPRUNE_CUDA={tmp_path}/none.so: "), missing


REFUSED = "\ntry: library()\nexcept Exception as error: print(type(error).__name__, error)\nprint(describe())"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_file_without_our_functions_is_refused_with_what_it_lacks(package: Path, tmp_path: Path) -> None:
    for name, has in (("other", ""), ("older", 'extern "C" int hpcprune_cuda_turn_pairs() { return 0; }')):
        source, file = tmp_path / f"{name}.cpp", tmp_path / f"{name}.so"
        source.write_text(has)
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", file], check=True)
        raised, described = in_process(package, REFUSED, HPCPRUNE_CUDA=str(file)).splitlines()
        lacks = "sum_blocks" if has else "turn_pairs"
        told = f"HPCPRUNE_CUDA={file}: it has no function hpcprune_cuda_{lacks}, so it is no library of this version's"
        assert raised.startswith(f"HpcpruneError {told}"), raised
        assert raised.endswith("make one with this version of hpcprune (docs/kernels.md), or unset it"), raised
        assert described.startswith(f"none: {told}"), described


def test_an_error_names_the_kernel_and_its_shapes() -> None:
    check(0, "nothing")
    with pytest.raises(CudaError, match=r"^spmm of \[4, 9\]: CUDA error 9 \(a grid or a block beyond CUDA's limits\)$"):
        check(9, "spmm of [4, 9]")
    with pytest.raises(CudaError, match="CUDA error 4242"):
        check(4242, "spmm")
