"""Matrices that tests multiply: floats as kernels have them, masks by a law, and how close a product must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.emulated import Array, placed

__all__ = ["Exact", "Mask", "assert_close", "kept", "normal", "spoiled", "stored", "wide"]

Exact = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def stored(values: npt.ArrayLike, dtype: str) -> Array:
    """As float32, or bfloat16 in uint16, to the nearest, ties to even."""
    single = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(values: Array) -> Exact:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0, offset: int = 0) -> Array:
    """Random numbers; where they begin is for `placed`."""
    return placed(stored(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype), offset)


def spoiled(*shape: int, dtype: str = "bfloat16", offset: int = 0) -> Array:
    """What a kernel must overwrite: NaN."""
    return placed(
        np.full(shape, np.nan, np.float32) if dtype == "float32" else np.full(shape, 0x7FFF, np.uint16), offset
    )


def kept(rows: int, columns: int, law: float | str) -> Mask:
    """A mask of a sparsity, or by the name of a law; "none" and "all" say what is left."""
    shares = {"none": 0.0, "all": 1.0}
    left = 1 - law if isinstance(law, float) else shares.get(law, 0.0)
    mask: Mask = np.random.default_rng([rows, columns]).random((rows, columns)) < left
    if law == "one row":
        mask[rows // 2] = True
    if law == "one column":
        mask[:, columns // 2] = True
    if law == "one":
        mask[-1, -1] = True
    if law == "far apart":
        mask[:: max(1, rows // 3), ::3] = True
    if law == "every length":
        mask |= np.arange(columns) < columns * np.arange(rows)[:, None] // max(1, rows - 1)
    return mask


def assert_close(result: Array, exact: Exact, terms: Exact, count: Any) -> None:
    """Within what rounding may do to a float32 sum in any order, and to what is stored of it.

    Args:
        result: float32 or bfloat16.
        exact: the sums.
        terms: the sums of the terms' absolute values.
        count: how many terms they have, at most.
    """
    bound = terms * (count + 1) * 2.0**-24 * 1.01
    if result.dtype == np.uint16:
        bound = bound + (abs(exact) + bound) * 2.0**-8
    found = wide(result)
    assert found.shape == exact.shape
    assert not np.isnan(found).any(), "not everything was written"
    beyond = abs(found - exact) - bound
    assert (beyond <= 0).all(), f"{beyond.max():g} beyond the bound at {np.argwhere(beyond > 0)[:5].tolist()}"
