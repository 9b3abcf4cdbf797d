"""Launches from Python: every function of the CUDA sources is known, with the arguments that it has there."""

from __future__ import annotations

from hpcprune.native.launching import ARGUMENTS
from tests.kernels.emulated import KERNELS
from tests.kernels.signatures import functions


def test_arguments_are_those_of_the_sources() -> None:
    found = {}
    for source in KERNELS.glob("*/*.cu"):
        for function in functions(source):
            if function.result == "int":
                *parameters, stream = function.parameters
                assert (stream.name, stream.type) == ("stream", "*")
                found[function.name.removeprefix("hpcprune_cuda_")] = [each.of_ctypes for each in parameters]
    assert found == ARGUMENTS
