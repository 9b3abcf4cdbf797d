"""hpcprune prunes trained PyTorch networks across MPI ranks, and retrains them sending the survivors alone.

The public names are imported on first use, so that what needs no torch (`hpcprune check`, `show`, `diff`) starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hpcprune.errors import HpcpruneError
from hpcprune.version import __version__

if TYPE_CHECKING:
    from hpcprune.compression import Compression
    from hpcprune.ddp import ddp_hook
    from hpcprune.graph import Graph
    from hpcprune.language import LanguageModel
    from hpcprune.loading import load
    from hpcprune.masks import Masks
    from hpcprune.pruning import prune
    from hpcprune.survivors import Survivors
    from hpcprune.task import Classifier, Data, Task
    from hpcprune.world import World

__all__ = [
    "Classifier",
    "Compression",
    "Data",
    "Graph",
    "HpcpruneError",
    "LanguageModel",
    "Masks",
    "Survivors",
    "Task",
    "World",
    "__version__",
    "ddp_hook",
    "load",
    "prune",
]

_HOMES = {
    "Classifier": "task",
    "Compression": "compression",
    "Data": "task",
    "Graph": "graph",
    "LanguageModel": "language",
    "Masks": "masks",
    "Survivors": "survivors",
    "Task": "task",
    "World": "world",
    "ddp_hook": "ddp",
    "load": "loading",
    "prune": "pruning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hpcprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hpcprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
