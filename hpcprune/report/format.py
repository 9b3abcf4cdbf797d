"""report.json: the dict that all of a report follows from, as types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from typing_extensions import NotRequired

__all__ = ["CurvePoint", "Evaluation", "Report"]


class LayerReport(TypedDict):
    name: str
    kind: Literal["weights", "edges"]
    shape: list[int]
    dtype: str
    weights: int
    nonzeros: int
    sparsity: float
    threshold: float | None
    flops_dense: int | None  # of one sample
    flops_survivors: int | None
    seconds_dense: float | None  # of the timed batch
    seconds_sparse: float | None
    kernel: str  # that runs: dense, or which sparse one


class Evaluation(TypedDict):
    when: Literal["dense", "pruned", "retrained", "best"]
    round: int
    sparsity: float  # of the weights
    step: int
    metrics: dict[str, float | None]
    seconds: float | None
    graph: NotRequired[dict[str, float]]  # sparsity of its edges, and of its nodes


class Costs(TypedDict):
    """None: not measured."""

    nonzeros: int | None  # of all parameters
    parameters: int | None
    flops: int | None  # of one sample
    bytes_disk: int | None
    bytes_memory: int | None
    seconds_per_sample: float | None
    seconds_per_epoch: float | None


class RoundExchange(TypedDict):
    """A round's steps together. `waited`: of their seconds, those in which this rank waited for others. `overlap`: the
    sum over steps of the share of the exchange that passed while backward still ran.
    """

    round: int
    steps: int
    bytes_dense: int
    bytes_sent: int
    seconds: float
    waited: float
    overlap: float
    samples: int


class Exchange(TypedDict):
    """Bytes that one rank passed to all-reduces of gradients, and would have passed without pruning."""

    steps: int
    bytes_dense: int
    bytes_sent: int
    by_round: list[RoundExchange]


class Stage(TypedDict):
    name: str
    round: int | None
    seconds: float


class RankLoad(TypedDict):
    rank: int
    host: str
    weights_scored: int
    score_seconds: float | None
    train_seconds: float | None
    wait_seconds: float | None
    peak_memory_bytes: int | None


class CurvePoint(TypedDict):
    step: int
    stage: str
    round: int | None
    loss: float | None


class Histograms(TypedDict):
    """Counts of the prunable weights in bins; `pruned` has the survivors alone."""

    edges: list[float]
    dense: list[int]
    pruned: list[int]


class Report(TypedDict):
    """report.json, format 1. Sizes in bytes, times in seconds, shares in [0, 1]."""

    format: int
    job: dict[str, Any]
    out: str
    versions: dict[str, str]
    created: str  # ISO 8601
    host: dict[str, Any]  # cpu, cores
    ranks: int
    threads: int
    resumed: list[int]  # the steps that the run went on from
    model: dict[str, Any]  # class, parameters, prunable
    primary: str
    higher_is_better: bool
    layers: list[LayerReport]
    evaluations: list[Evaluation]
    graph: dict[str, tuple[int, int]] | None  # edges, nodes that have any: of the whole graph, and survivors
    goal: dict[str, Any] | None  # of prune.until: text, metric, bound, value, met
    costs: dict[str, Costs]  # dense, pruned
    exchange: Exchange
    stages: list[Stage]
    rank_loads: list[RankLoad]
    imbalance: float  # max over mean of the weights scored
    curve: list[CurvePoint]
    histograms: Histograms
    inference: dict[str, Any]  # of a batch: samples, threads, seconds and bytes, and what was found of sparse layers
    mask_hash: str
    model_file: dict[str, Any]  # path, bytes, sha256
