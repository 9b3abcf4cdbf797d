"""The compiled library: found, compiled once, loaded; and a missing compiler or cache never stops a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hpcprune.errors import HpcpruneError
from hpcprune.narration import kernels_of
from hpcprune.native.library import describe, library

ROOT = Path(__file__).resolve().parents[2]


def compiler(folder: Path, script: str) -> Path:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def in_process(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd="/")


DESCRIBE = "from hpcprune.native.library import describe; print(describe())"


def test_of_two_processes_one_compiles_and_the_other_waits(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, f'echo "$@" >> {tmp_path}/log; exec g++ "$@" -O0')
    command = [
        sys.executable,
        "-c",
        DESCRIBE + "; from hpcprune.native.survivors import popcount; import numpy"
        "; assert popcount(numpy.full(3, 7, 'uint8')) == 9",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HPCPRUNE_CACHE": str(tmp_path / "cache"), "CXX": str(cxx)}
    environ.pop("HPCPRUNE_NATIVE", None)
    started = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted("compiled into" in text for text in told) == [False, True], told
    assert all(not text.startswith("numpy") for text in told)
    compiles = [line for line in (tmp_path / "log").read_text().splitlines() if "--version" not in line]
    assert len(compiles) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    # What was compiled once also serves where there is no compiler, as on many compute nodes.
    later = in_process(DESCRIBE, PATH=str(tmp_path), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert "cached in" in later.stdout and not later.stdout.startswith("numpy"), later


def test_without_a_compiler_numpy_serves(tmp_path: Path) -> None:
    done = in_process(DESCRIBE, PATH=str(tmp_path), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("numpy: no C++ compiler (none of g++, c++, clang++ is on PATH)"), done
    missing = in_process(DESCRIBE, CXX="no-such-compiler", HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert missing.stdout.startswith("numpy: no C++ compiler (CXX=no-such-compiler is not on PATH)"), missing


def test_a_compiler_that_fails_leaves_numpy_and_the_reason(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, 'case "$1" in --version) echo 1.0;; *) echo "a.cpp:1: error: boom" >&2; exit 1;; esac')
    done = in_process(DESCRIBE, CXX=str(cxx), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("numpy: ") and "(a.cpp:1: error: boom)" in done.stdout, done
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_leaves_numpy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = in_process(DESCRIBE, HPCPRUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert done.stdout.startswith("numpy: cannot write compiled kernels to "), done
    assert "set HPCPRUNE_CACHE" in done.stdout


def test_a_damaged_library_leaves_numpy(tmp_path: Path) -> None:
    cxx = compiler(tmp_path, 'for last; do :; done; case "$1" in --version) echo 1.0;; *) echo junk > "$last";; esac')
    done = in_process(DESCRIBE, CXX=str(cxx), HPCPRUNE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("numpy: cannot load ") and "delete it" in done.stdout, done


def test_sources_are_found_inside_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "site" / "hpcprune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("errors.py", "lock.py"):
        shutil.copy(ROOT / "hpcprune" / name, package)
    shutil.copytree(ROOT / "hpcprune" / "native", package / "native")
    shutil.copytree(ROOT / "kernels", package / "kernels")
    code = "from hpcprune.native.library import describe, sources; print(sources()[0]); print(describe())"
    done = in_process(code, PYTHONPATH=str(package.parent), HPCPRUNE_CACHE=os.environ.get("HPCPRUNE_CACHE", ""))
    first, described = done.stdout.splitlines()
    assert first.startswith(str(package))
    built, cached = "compiled into", "cached in"
    assert described.replace(built, cached) == describe().replace(built, cached), "the same sources, so the same cache"
    shutil.rmtree(package / "kernels")
    bare = in_process(DESCRIBE, PYTHONPATH=str(package.parent))
    assert bare.stdout.startswith("numpy: no kernels/"), bare


def test_a_path_that_there_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", "sse9")
    with pytest.raises(HpcpruneError, match="HPCPRUNE_NATIVE=sse9: there are numpy, portable, avx2, avx512"):
        library()
    monkeypatch.setenv("HPCPRUNE_NATIVE", "portable")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("HPCPRUNE_CACHE", str(tmp_path))
    with pytest.raises(HpcpruneError, match=r"HPCPRUNE_NATIVE=portable: no C\+\+ compiler"):
        library()


def test_a_run_says_which_kernels_it_has_why_and_what_chooses_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPRUNE_NATIVE", "numpy")
    on_the_cpu = "kernels numpy: forced by HPCPRUNE_NATIVE; HPCPRUNE_NATIVE=numpy|portable|avx2|avx512 forces others"
    assert kernels_of(torch.device("cpu")) == on_the_cpu
    monkeypatch.setenv("HPCPRUNE_CUDA", "off")
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    assert kernels_of(torch.device("cuda", 1)) == (
        f"{on_the_cpu}; on the GPU none: turned off by HPCPRUNE_CUDA=off; HPCPRUNE_CUDA=off takes none, "
        "HPCPRUNE_CUDA=FILE another one"
    )
    assert asked == [torch.device("cuda", 1)]
