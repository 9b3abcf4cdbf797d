"""Criteria: how a weight is scored. The weights with the lowest scores go.

To add one: write its class beside `magnitude.py`, one family a file, and add it to `CRITERIA`; the job file, the
command line and `hpcprune.prune` then know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hpcprune.criteria.criterion import SCOPES, Criterion, Piece, Scope
from hpcprune.criteria.gradient import Fisher, Sensitivity, Snip
from hpcprune.criteria.l1 import L1
from hpcprune.criteria.lamp import Lamp
from hpcprune.criteria.magnitude import Magnitude
from hpcprune.criteria.movement import Movement
from hpcprune.criteria.random import Random
from hpcprune.criteria.wanda import Wanda

__all__ = ["CRITERIA", "SCOPES", "Criterion", "Piece", "Scope"]

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
)

CRITERIA: Mapping[str, Criterion] = MappingProxyType({criterion.name: criterion for criterion in _ALL})
