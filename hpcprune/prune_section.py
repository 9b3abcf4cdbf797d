"""What is pruned, as a job file says it: how much of what, by which criterion, over how many rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field, ValidationInfo

from hpcprune.criteria import CRITERIA, Criterion, Scope, criteria_of
from hpcprune.errors import show
from hpcprune.section import PARSED, Count, Fraction, Section, Text, refuse
from hpcprune.shards import Kind
from hpcprune.until import parse

__all__ = ["Prune"]


def _as_text(key: Any) -> Any:
    """YAML reads the name of a Sequential's module, 6, as a number."""
    return str(key) if type(key) is int else key


class Calibrate(Section):
    """The training samples that a criterion looks at, where it looks at any."""

    samples: Count = 512
    """How many of the training samples, drawn by the seed; all where there are fewer."""
    batch_size: Count = 32
    """Samples a batch; each rank takes batches of its own."""


class GraphPruning(Section):
    """What is pruned of the graph that a network works on."""

    criterion: str = Field(default="magnitude", json_schema_extra={"enum": [*criteria_of("edges")]})
    """How an edge is scored; the lowest scores go. magnitude is that of the learned mask."""
    edges: Fraction | None = None
    """The share of the edges that is gone at the end, those of nodes that went among them."""
    nodes: Fraction | None = None
    """The share of the nodes that has lost all edges at the end; those go whose edges' scores have the lowest sums."""

    @pydantic.field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, "edges")


def _one_of(criterion: str, kind: Kind) -> str:
    if criterion not in criteria_of(kind):
        raise ValueError("unknown criterion")
    return criterion


class Prune(Section):
    """What is pruned, how much of it, and over how many rounds."""

    criterion: str = Field(default="magnitude", json_schema_extra={"enum": [*criteria_of("weights")]})
    """How a weight is scored; the lowest scores go."""
    sparsity: Fraction
    """The share of the prunable weights that is gone at the end; not to be given where `what` leaves weights out."""
    scope: Scope = Field(default=None, validate_default=True)
    """What is ranked together: all layers, each layer by itself, or each output (row) of each layer; where it is not
    given, row for wanda and global for the others."""
    distribution: Literal["uniform", "erk"] = "uniform"
    """scope layer and row: whether all layers have the same sparsity, or the smaller ones less (Erdos-Renyi-kernel)."""
    layers: dict[Annotated[Text, BeforeValidator(_as_text)], Fraction] = Field(default={})
    """scope layer and row: sparsities of layers of their own, by patterns like those of `include`; `sparsity` is that
    of the others."""
    rounds: Count = 1
    """How many times it is pruned and retrained."""
    schedule: Literal["one-shot", "linear", "cubic", "layer-by-layer"] = Field(default=None, validate_default=True)
    """The sparsity over the rounds; where it is not given, one-shot for 1 round and cubic for more. layer-by-layer
    prunes the last layers in the first round, and goes on towards the first."""
    include: tuple[Text, ...] = Field(default=("*",), min_length=1)
    """Which of the weights of Linear, Conv and RNN layers are prunable: patterns (`*`, `?`, `[abc]`) on the name of the
    parameter or of its module."""
    exclude: tuple[Text, ...] = ()
    """Which of the included are left alone: patterns like those of `include`."""
    every_steps: Count | None = None
    """The rounds are one retraining, of `retrain`'s length and learning rates in all, which is pruned before its first
    step and after each so many; null for a retraining a round."""
    until: Text | None = None
    """A goal: the rounds go on while a metric meets it, and where one misses it, the highest sparsity that does not is
    searched for; `sparsity` is the most that is tried."""
    rewind: Annotated[int, Field(ge=0), PARSED] | None = None
    """The step of the dense training to whose weights the survivors go back after each pruning; null for none, 0 for
    those before the first step."""
    embeddings: bool = False
    """Whether the weights of embeddings are prunable too, those that are tied to another layer among them."""
    what: tuple[Literal["weights", "edges", "nodes"], ...] = Field(default=("weights",), min_length=1)
    """What goes: weights of the network, and edges and nodes of the graph that it works on."""
    graph: GraphPruning | None = None
    """What of the graph goes, where edges or nodes do."""
    calibrate: Calibrate | None = Field(default=None, validate_default=True)
    """The samples that are looked at by sensitivity, snip, fisher, wanda and attention."""

    @property
    def criteria(self) -> dict[Kind, Criterion]:
        """How layers of each kind that is pruned are scored."""
        return _criteria(self.what, self.criterion, self.graph)

    @pydantic.field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, "weights")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _sparsity_of_weights(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("what"), (list, tuple)) and "weights" not in data["what"]:
            return {"sparsity": 0.0} | data
        return data

    @pydantic.field_validator("scope", mode="before")
    @classmethod
    def _scope_of_criterion(cls, value: Any, info: ValidationInfo) -> Any:
        criterion = CRITERIA.get(info.data.get("criterion", ""))
        if value is None:
            return "global" if criterion is None else criterion.scope  # an unknown one is told of already
        return value

    @pydantic.field_validator("calibrate", mode="before")
    @classmethod
    def _calibrate_of_criterion(cls, value: Any, info: ValidationInfo) -> Any:
        if not {"what", "criterion", "graph"} <= info.data.keys():
            return value  # what is wrong with them is told of already
        criteria = _criteria(info.data["what"], info.data["criterion"], info.data["graph"]).values()
        if any(criterion.calibrates for criterion in criteria):
            return {} if value is None else value
        if value is not None:
            looks = " and ".join(dict.fromkeys(f"{each.name} looks at {each.looks_at}" for each in criteria))
            raise refuse(f"{looks} alone, not at samples; remove calibrate")
        return None

    @pydantic.field_validator("schedule", mode="before")
    @classmethod
    def _schedule_of_rounds(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return "one-shot" if info.data.get("rounds", 1) == 1 else "cubic"
        return value

    @pydantic.model_validator(mode="after")
    def _graph_as_asked(self) -> Prune:
        if "weights" not in self.what and self.sparsity:
            raise refuse(f"sparsity: {self.sparsity:g} of the weights are to go, and what leaves them out; remove it")
        for thing in ("edges", "nodes"):
            share = None if self.graph is None else getattr(self.graph, thing)
            if thing in self.what and share is None:
                raise refuse(f"what: {thing} are to go, and nothing says how many; write graph: {{{thing}: 0.2}}")
            if thing not in self.what and share is not None:
                raise refuse(f"graph.{thing}: {share:g} are to go, and what does not name them; add {thing} to what")
        if self.graph is not None and not {"edges", "nodes"} & {*self.what}:
            raise refuse("graph: what names neither edges nor nodes; add one of them to what, or remove graph")
        return self

    @pydantic.model_validator(mode="after")
    def _sparsity_by_layer(self) -> Prune:
        if self.scope == "global" and (self.layers or self.distribution != "uniform"):
            key = "layers" if self.layers else "distribution"
            raise refuse(
                f"{key}: with scope: global the threshold gives each layer its sparsity; write scope: layer (or row), "
                f"or remove {key}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _until_a_goal(self) -> Prune:
        if self.until is None:
            return self
        if parse(self.until) is None:
            raise refuse(
                f"until: {show(self.until)} is no goal; write a metric, >= or <=, and a number or the dense network's "
                'value: "accuracy >= 0.95", "accuracy >= dense - 0.01", "rmse <= dense * 1.02"'
            )
        if self.schedule == "layer-by-layer" or not self.sparsity:
            other = "schedule: layer-by-layer" if self.sparsity else "sparsity: 0"
            raise refuse(f"until searches for a sparsity of all layers, and has none to search with {other}")
        return self

    @pydantic.model_validator(mode="after")
    def _layers_by_themselves(self) -> Prune:
        if self.schedule == "layer-by-layer" and self.scope == "global":
            raise refuse("schedule: layer-by-layer ranks no layers together; write scope: layer (or row)")
        if self.schedule == "layer-by-layer" and self.rounds == 1:
            raise refuse("rounds: 1 would prune all layers at once; write the number of layers, or schedule: one-shot")
        return self

    @pydantic.model_validator(mode="after")
    def _steps_of_one_retraining(self) -> Prune:
        if self.every_steps is None:
            return self
        if self.rounds == 1:
            raise refuse("every_steps: rounds: 1 prunes once, before the first step; give more rounds")
        for key in ("until", "rewind"):
            if getattr(self, key) is not None:
                raise refuse(f"every_steps goes on with one retraining, and {key} begins anew; remove one of them")
        return self

    @pydantic.model_validator(mode="after")
    def _one_shot_is_one(self) -> Prune:
        if self.schedule == "one-shot" and self.rounds != 1:
            raise refuse(f"one-shot is 1 round, not {self.rounds}; write schedule: cubic (or linear), or rounds: 1")
        return self


def _criteria(what: Sequence[str], criterion: str, graph: GraphPruning | None) -> dict[Kind, Criterion]:
    found: dict[Kind, Criterion] = {"weights": CRITERIA[criterion]} if "weights" in what else {}
    return found if graph is None else found | {"edges": CRITERIA[graph.criterion]}
