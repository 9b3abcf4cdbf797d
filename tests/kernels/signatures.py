"""The plain C functions of a kernel's source, read from its text: for ctypes, and for sweeps over what they take."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Function", "Parameter", "declare", "functions"]

FUNCTION = re.compile(r"^(?:EXPORT )?(int|int64_t|void) (hpcprune_\w+)\(([^)]*)\)", re.MULTILINE)
TYPES: dict[str, Any] = {
    "void": None,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}


@dataclass(frozen=True)
class Parameter:
    """`type` is C's name without const; a pointer's is "*"."""

    name: str
    type: str

    @property
    def of_ctypes(self) -> Any:
        return ctypes.c_void_p if self.type == "*" else TYPES[self.type]


@dataclass(frozen=True)
class Function:
    name: str
    result: str
    parameters: tuple[Parameter, ...]


def functions(source: Path) -> list[Function]:
    """All that a source defines, in its order."""
    return [
        Function(name, result, tuple(map(_parameter, parameters.split(","))))
        for result, name, parameters in FUNCTION.findall(source.read_text())
    ]


def declare(code: ctypes.CDLL, *sources: Path) -> None:
    """Tell ctypes of every function, so that plain integers are passed in full."""
    for source in sources:
        for function in functions(source):
            called = getattr(code, function.name)
            called.argtypes = [parameter.of_ctypes for parameter in function.parameters]
            called.restype = TYPES[function.result]


def _parameter(text: str) -> Parameter:
    *kind, name = re.findall(r"\w+", text)
    return Parameter(name, "*" if "*" in text else kind[-1])
