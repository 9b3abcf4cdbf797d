"""Launches from Python: every function of the CUDA sources is known, with the arguments that it has there."""

from __future__ import annotations

import ctypes
import re

from hpcprune.native.launching import ARGUMENTS
from tests.kernels.emulated import kernel_sources

TYPES = {"int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}


def test_arguments_are_those_of_the_sources() -> None:
    found = {}
    for source in kernel_sources():
        for name, text in re.findall(r"^EXPORT int hpcprune_cuda_(\w+)\(([^)]*)\)", source.read_text(), re.MULTILINE):
            parameters = [parameter.strip() for parameter in text.split(",")]
            assert parameters.pop() == "void* stream"
            found[name] = [ctypes.c_void_p if "*" in each else TYPES[each.split()[0]] for each in parameters]
    assert found == ARGUMENTS
