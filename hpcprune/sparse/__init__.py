"""Sparse products that make a pruned network faster, and the choice of where they do."""

from hpcprune.sparse.choose import Choice, Sparsified, sparsify
from hpcprune.sparse.modules import SparseConv2d, SparseLinear
from hpcprune.sparse.panels import SparseError

__all__ = ["Choice", "SparseConv2d", "SparseError", "SparseLinear", "Sparsified", "sparsify"]
