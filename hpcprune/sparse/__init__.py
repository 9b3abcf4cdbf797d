"""Sparse products that make a pruned network faster, and the choice of where they do."""

from hpcprune.sparse.choose import Choice, Sparsified, sparsify
from hpcprune.sparse.kernels import SparseError
from hpcprune.sparse.modules import SparseConv2d, SparseLinear

__all__ = ["Choice", "SparseConv2d", "SparseError", "SparseLinear", "Sparsified", "sparsify"]
