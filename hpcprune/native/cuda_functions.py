"""What each function of the CUDA library takes and gives, as ctypes has to know it.

A library that was made elsewhere may be any file: `declare` finds out whether it has them all, before one is called.
"""

from __future__ import annotations

import ctypes

__all__ = ["FUNCTIONS", "PREFIX", "declare"]

PREFIX = "hpcprune_cuda_"

_status = _integer = ctypes.c_int  # a cudaError_t
_word, _long, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_matrix, _batch = [_long, _long], [_pointer, _long]
_packing: list[type] = [_integer, _pointer, _long, *[_pointer] * 4]

# By their names without the prefix. Where one gives a status, its last argument is the stream.
FUNCTIONS: dict[str, tuple[type, list[type]]] = {
    "spmm_csr": (_status, [_integer, *_matrix, *[_pointer] * 4, *_batch, *[_pointer] * 4]),
    "spmm_csr_scratch": (_long, [_integer, *_matrix, _long]),
    "sddmm_csr": (_status, [_integer, *_matrix, _long, *[_pointer] * 3, *_batch, *[_pointer] * 3]),
    "sddmm_csr_scratch": (_long, [_integer, *_matrix, _long]),
    "bitmap": (_status, [*_matrix, *[_pointer] * 2, _word, *_batch, *[_pointer] * 3]),
    "block_spmm": (_status, [_integer, *_matrix, *[_pointer] * 3, *_batch, *[_pointer] * 3]),
    "block_sddmm": (_status, [_integer, *_matrix, *[_pointer] * 2, _long, _pointer, *_batch, *[_pointer] * 2]),
    "survivors_before": (_status, [_pointer, _long, *[_pointer] * 2]),
    "gather": (_status, _packing),
    "scatter": (_status, _packing),
    "update": (_status, _packing),
    "count_around": (_status, [_integer, _integer, _pointer, *[_long] * 4, _pointer, _long, *[_pointer] * 2]),
    "histogram": (_status, [_integer, _integer, _pointer, *[_long] * 3, _integer, _long, *[_pointer] * 2]),
    "pack": (_status, [_integer, _integer, _pointer, *[_long] * 2, *[_pointer] * 4]),
}


def declare(code: ctypes.CDLL) -> None:
    """Tell ctypes of every function.

    Raises:
        AttributeError: the library lacks one; `name` is which.
    """
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(code, PREFIX + name)
        function.restype, function.argtypes = result, arguments
