"""Criteria: how a weight is scored. The weights with the lowest scores go.

To add one: write its class beside `magnitude.py`, one family a file, and add it to `CRITERIA`; the job file, the
command line and `hpcprune.prune` then know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from hpcprune.criteria.attention import Attention
from hpcprune.criteria.criterion import SCOPES, Criterion, Piece, Scope
from hpcprune.criteria.gradient import Fisher, Sensitivity, Snip
from hpcprune.criteria.l1 import L1
from hpcprune.criteria.lamp import Lamp
from hpcprune.criteria.magnitude import Magnitude
from hpcprune.criteria.movement import Movement
from hpcprune.criteria.random import Random
from hpcprune.criteria.wanda import Wanda

if TYPE_CHECKING:
    from hpcprune.shards import Kind

__all__ = ["CRITERIA", "SCOPES", "Criterion", "Piece", "Scope", "criteria_of"]

_ALL: tuple[Criterion, ...] = (
    Magnitude(),
    L1(),
    Lamp(),
    Random(),
    Sensitivity(),
    Snip(),
    Fisher(),
    Movement(),
    Wanda(),
    Attention(),
)

CRITERIA: Mapping[str, Criterion] = MappingProxyType({criterion.name: criterion for criterion in _ALL})


def criteria_of(kind: Kind) -> list[str]:
    """The names of those that can score layers of a kind."""
    return [name for name, criterion in CRITERIA.items() if kind in criterion.kinds]
