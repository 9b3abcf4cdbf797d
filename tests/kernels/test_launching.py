"""Launches from Python: every function of the CUDA sources is known, with what it takes and gives there."""

from __future__ import annotations

from hpcprune.native.cuda_functions import FUNCTIONS, PREFIX
from tests.kernels.emulated import KERNELS
from tests.kernels.signatures import TYPES, functions


def test_functions_are_those_of_the_sources() -> None:
    found = {}
    for source in KERNELS.glob("*/*.cu"):
        for function in functions(source):
            takes = [each.of_ctypes for each in function.parameters]
            found[function.name.removeprefix(PREFIX)] = TYPES[function.result], takes
            if function.result == "int":
                assert (function.parameters[-1].name, function.parameters[-1].type) == ("stream", "*")
    assert found == FUNCTIONS
