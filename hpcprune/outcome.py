"""The outcome of a run as one plain dict, which is report.json and what the report is drawn from."""

from __future__ import annotations

import copy
import datetime
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcprune.evaluate import inference_seconds, model_flops, timed_batch
from hpcprune.folder import RunFolder
from hpcprune.graph import graph_left, with_whole_graphs
from hpcprune.host import cpu_name, peak_memory, versions
from hpcprune.job import Job
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.prepare import Prepared
from hpcprune.report.format import Report
from hpcprune.shards import imbalance
from hpcprune.sparse import sparsify
from hpcprune.until import best_round, dense_metrics, parse
from hpcprune.world import World

__all__ = ["build_report", "measure_costs", "measure_inference", "rank_load", "weight_histogram"]

BINS = 80
WIDTH = 4.0  # the histogram ends at this many standard deviations of the dense weights


def measure_costs(prepared: Prepared, masks: Masks, file: Path) -> dict[str, Any]:
    """What the network costs as it is now, but for inference. `file` is where it lies on disk."""
    model = prepared.model
    return {
        "nonzeros": sum(int(torch.count_nonzero(parameter)) for parameter in model.parameters()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": model_flops(prepared.task, model, prepared.data.test, masks.densities).survivors,
        "bytes_disk": file.stat().st_size,
    }


def measure_inference(job: Job, prepared: Prepared, masks: Masks) -> dict[str, Any]:
    """What it takes to infer with the dense and with the pruned network, timed in turns on one batch.

    The pruned one's layers run sparse where that was measured faster; `sparse` says what was found, None where the job
    does not want it.
    """
    task, model = prepared.task, prepared.model
    dense = with_whole_graphs(model)  # dense layers take as long whatever their weights are
    pruned = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    batch, samples = timed_batch(prepared.data.test, job.evaluate.batch_size, prepared.device)
    found = None
    if job.evaluate.sparse == "auto":
        found = sparsify(pruned, masks, lambda: task.predict(pruned, batch))
    dense_seconds, pruned_seconds = inference_seconds(task, [dense, pruned], batch, prepared.device)
    return {
        "samples": samples,
        "threads": prepared.threads,
        "dense_seconds": dense_seconds,
        "pruned_seconds": pruned_seconds,
        "dense_bytes": prepared.dense_bytes,
        "pruned_bytes": sum(tensor.nbytes for tensor in (*pruned.parameters(), *pruned.buffers())),
        "sparse": None if found is None else found.as_dict(),
    }


def epoch_seconds(prepared: Prepared, folder: RunFolder) -> list[float | None]:
    """Seconds of a dense epoch and of one of retraining: as many median steps as it has; None where there was none."""
    steps: dict[str, list[float]] = {"train": [], "retrain": []}
    for line in folder.read_metrics():
        if line["kind"] == "step":
            steps[line["stage"]].append(line["seconds"])
    return [
        float(np.median(seconds)) * plan.epoch if plan is not None and seconds else None
        for plan, seconds in ((prepared.train, steps["train"]), (prepared.retrain, steps["retrain"]))
    ]


def weight_histogram(model: nn.Module, masks: Masks, edges: Iterable[float] | None = None) -> dict[str, list[Any]]:
    """How many survivors lie between edges (BINS of them if none are given); those beyond count at the ends."""
    parameters = dict(model.named_parameters())
    if edges is None:
        spread = [parameters[name].detach().double().square().sum().item() for name in masks]
        limit = WIDTH * (sum(spread) / max(1, masks.weights)) ** 0.5 or 1.0
        edges = np.linspace(-limit, limit, BINS + 1)
    borders = np.asarray(list(edges))
    counts = np.zeros(len(borders) - 1, np.int64)
    for name in masks:
        values = parameters[name].detach().cpu()[masks[name]].float().clamp(borders[0], borders[-1])
        counts += np.histogram(values.numpy(), borders)[0]
    return {"edges": borders.tolist(), "counts": counts.tolist()}


def rank_load(prepared: Prepared, ledger: Ledger, world: World) -> list[dict[str, Any]]:
    """What each rank had to do, for all ranks. Collective."""

    def seconds(*names: str) -> float:
        return float(sum(stage["seconds"] for stage in ledger.stages if stage["name"] in names))

    own = {
        "rank": world.rank,
        "host": platform.node(),
        "weights_scored": sum(span.weights for span in prepared.shards[world.rank]),
        "score_seconds": seconds("score", "threshold", "masks"),
        "train_seconds": seconds("train", "retrain"),
        "wait_seconds": world.seconds_waited,
        "peak_memory_bytes": peak_memory(),
    }
    return world.allgather(own, "report: loads")


def _goal(job: Job, ledger: Ledger) -> dict[str, Any] | None:
    """What became of the goal, if there was one."""
    goal = None if job.prune.until is None else parse(job.prune.until)
    best = None if goal is None else best_round(goal, ledger.evaluations)
    if goal is None or best is None:
        return None
    metrics = ledger.evaluations[-1]["metrics"]
    bound = goal.bound(dense_metrics(ledger.evaluations))
    told = {"text": job.prune.until, "metric": goal.metric, "bound": bound}
    return told | {"value": metrics[goal.metric], "met": best[1]}


def build_report(
    job: Job,
    prepared: Prepared,
    masks: Masks,
    ledger: Ledger,
    folder: RunFolder,
    loads: list[dict[str, Any]],
    inference: dict[str, Any],
    sha256: str,
) -> Report:
    """Put the report of a finished run together, on rank 0."""
    flops = model_flops(prepared.task, prepared.model, prepared.data.test, masks.densities)
    costs = {
        kind: known
        | {
            "bytes_memory": inference[f"{kind}_bytes"],
            "seconds_per_sample": inference[f"{kind}_seconds"] / inference["samples"],
            "seconds_per_epoch": epoch,
        }
        for (kind, known), epoch in zip(
            (("dense", ledger.dense["costs"]), ("pruned", measure_costs(prepared, masks, folder.model))),
            epoch_seconds(prepared, folder),
            strict=True,
        )
    }
    timed = {f"{layer['name']}.weight": layer for layer in (inference["sparse"] or {}).get("layers", ())}
    undone = not timed or inference["sparse"]["undone"]
    kernels = {} if undone else {name: layer["kernel"] for name, layer in timed.items()}
    histogram = weight_histogram(prepared.model, masks.of("weights"), ledger.dense["histogram"]["edges"])
    layers = []
    for layer in masks.layers:
        dense, survivors = flops.by_layer.get(layer.name, (0, 0))
        layers.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "dtype": layer.dtype,
                "weights": layer.weights,
                "nonzeros": masks.survivors[layer.name],
                "sparsity": 1 - masks.densities[layer.name],
                "threshold": ledger.thresholds.get(layer.name),
                "flops_dense": dense,
                "flops_survivors": survivors,
                "seconds_dense": timed.get(layer.name, {}).get("dense_seconds"),
                "seconds_sparse": timed.get(layer.name, {}).get("sparse_seconds"),
                "kernel": kernels.get(layer.name, "dense"),
            }
        )
    exchanges = [each for each in ledger.exchange if each["round"] > 0]
    return {
        "format": 1,
        "job": job.model_dump(mode="json"),
        "out": str(folder.path),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": {"cpu": cpu_name(), "cores": os.cpu_count() or 1},
        "ranks": len(loads),
        "threads": prepared.threads,
        "resumed": ledger.resumed,
        "model": {
            "class": type(prepared.model).__name__,
            "parameters": sum(parameter.numel() for parameter in prepared.model.parameters()),
            "prunable": masks.of("weights").weights,
        },
        "primary": prepared.task.primary,
        "higher_is_better": prepared.task.higher_is_better,
        "layers": layers,  # type: ignore[typeddict-item]
        "graph": graph_left(prepared.model, masks),
        "goal": _goal(job, ledger),
        "evaluations": ledger.evaluations,  # type: ignore[typeddict-item]
        "costs": costs,
        "exchange": {
            "steps": sum(each["steps"] for each in exchanges),
            "bytes_dense": sum(each["bytes_dense"] for each in exchanges),
            "bytes_sent": sum(each["bytes_sent"] for each in exchanges),
            "by_round": exchanges,  # type: ignore[typeddict-item]
        },
        "stages": ledger.stages,  # type: ignore[typeddict-item]
        "rank_loads": loads,  # type: ignore[typeddict-item]
        "imbalance": imbalance(prepared.shards),
        "curve": [
            {"step": line["run_step"], "stage": line["stage"], "round": line["round"], "loss": line["loss"]}
            for line in folder.read_metrics()
            if line["kind"] == "step"
        ],
        "histograms": {
            "edges": histogram["edges"],
            "dense": ledger.dense["histogram"]["counts"],
            "pruned": histogram["counts"],
        },
        "mask_hash": masks.hash,
        "inference": inference,
        "model_file": {"path": str(folder.model), "bytes": folder.model.stat().st_size, "sha256": sha256},
    }
