"""Weights, edges and nodes over ranks: the same masks on 1, 2 and 3; a whole run, killed and gone on with.

Run by mpirun this file is the script: `test_graph_ranks.py FOLDER` leaves the masks there.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hpcprune.checkpoint import read_model
from hpcprune.criteria import CRITERIA, criteria_of
from hpcprune.graph import graphs_of
from hpcprune.layers import find_layers
from hpcprune.masks import Masks
from hpcprune.nodes import prune_nodes
from hpcprune.ranking import Target, prune_layers
from hpcprune.shards import deal, shards_of_kind
from hpcprune.statistics import Calibration
from hpcprune.task import build_model, load_task
from hpcprune.world import World
from tests.commands import Command
from tests.conftest import ROOT, Launch
from tests.mpi.test_run import assert_same_weights

JOB = ROOT / "tests/jobs/graph/job.yaml"
CALIBRATED = [name for name, criterion in CRITERIA.items() if "edges" in criterion.kinds and criterion.calibrates]
SCORED = [name for name in criteria_of("edges") if CRITERIA[name].looks_at != "training"]


def masks_by(criterion: str, world: World) -> Masks:
    """A model's own masks: half of its weights gone, a fifth of its edges, and a tenth of its nodes."""
    torch.manual_seed(0)
    model = build_model(load_task("task.py:Attention" if criterion == "attention" else "task.py:Groups", JOB.parent))
    with torch.no_grad():
        model.graph.weight.uniform_(-0.1, 4)
    layers = find_layers(model, kinds=["weights", "edges"])
    masks, shards, chosen = Masks.full(layers), deal(layers, world.size), CRITERIA[criterion]
    nodes = torch.arange(80)
    calibration = Calibration(
        model,
        TensorDataset(nodes, nodes % 4),
        range(80),
        16,
        lambda batch: model(batch[0]),
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        (0,),
        world,
    )
    parameters = dict(model.named_parameters())
    weights = shards_of_kind(layers, shards, "weights")[1]
    target = Target(CRITERIA["magnitude"], "global", 0.5)
    masks = masks.updated(prune_layers(parameters, masks.of("weights"), weights, target, world).masks)
    of_edges, owned = shards_of_kind(layers, shards, "edges")
    found = chosen.statistic().gather(calibration, of_edges, owned) if chosen.calibrates else None
    target = Target(chosen, "global", 0.1)
    edges = prune_nodes(graphs_of(model), parameters, masks.of("edges"), owned, target, world, found)
    target = Target(chosen, "global", 0.2)
    return masks.updated(prune_layers(parameters, edges, owned, target, world, found).masks)


def main(folder: Path) -> None:
    world = World.of()
    found = {criterion: masks_by(criterion, world) for criterion in SCORED}
    arrays = {criterion: {name: mask.numpy() for name, mask in masks.items()} for criterion, masks in found.items()}
    (folder / f"{world.size}-{world.rank}.pickle").write_bytes(pickle.dumps(arrays))


def test_masks_of_edges_and_nodes_are_the_same_on_any_number_of_ranks(mpirun: Launch, tmp_path: Path) -> None:
    for ranks in (1, 2, 3):
        done = mpirun(ranks, __file__, tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
    alone = pickle.loads((tmp_path / "1-0.pickle").read_bytes())
    for ranks in (2, 3):
        for rank in range(ranks):
            found = pickle.loads((tmp_path / f"{ranks}-{rank}.pickle").read_bytes())
            for criterion in SCORED:
                for name, mask in found[criterion].items():
                    np.testing.assert_array_equal(mask, alone[criterion][name], f"{criterion} {name}")
    assert {int((~masks["graph.weight"]).sum()) for masks in alone.values()} == {round(0.2 * 401)}
    assert {"attention", "sensitivity", "fisher"} <= {*CALIBRATED} < {*SCORED}
    others = [masks["graph.weight"].tobytes() for masks in alone.values()]
    assert len({*others}) == len(others), "criteria differ"


def run(mpirun: Launch, out: Path, ranks: int, *more: str, **env: str) -> Any:
    return mpirun(ranks, "hpcprune", "run", JOB, *more, "--out", out, timeout=120, env=env)


def test_a_run_that_is_killed_goes_on_bit_for_bit_and_reports_graph_and_weights_apart(
    mpirun: Launch, hpcprune: Command, tmp_path: Path
) -> None:
    by_gradient = "prune.graph.criterion=sensitivity"
    whole = run(mpirun, tmp_path / "whole", 2, by_gradient)
    assert whole.returncode == 0, whole.stderr
    assert "round 2/2: pruned to 69.92%, 77 of 256 weights survive" in whole.stdout
    assert "round 2/2: 321 of 401 edges survive, " in whole.stdout
    killed = run(mpirun, tmp_path / "run", 2, by_gradient, KILL="1:37")
    assert killed.returncode != 0 and not (tmp_path / "run/report.json").exists()
    again = run(mpirun, tmp_path / "run", 2, by_gradient)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    state = read_model(tmp_path / "run/model.h5")
    assert_same_weights(state, read_model(tmp_path / "whole/model.h5"))
    criteria = {name: layer.attributes["criterion"] for name, layer in state.layers.items()}
    expected = {"graph.weight": "sensitivity", "first.lin.weight": "magnitude", "last.lin.weight": "magnitude"}
    assert criteria == expected and not any(name.startswith("buffers/") for name in state.tensors)
    assert state.about["sparsity"] == 1 - 77 / 256
    report = json.loads((tmp_path / "run/report.json").read_text())
    mask = state.layers["graph.weight"].mask
    assert mask is not None
    ends = build_model(load_task("task.py:Groups", JOB.parent)).graph.ends.numpy()
    nodes = len(np.unique(ends[:, np.unpackbits(mask, count=401, bitorder="little") == 1]))
    assert report["graph"] == {"edges": [401, 321], "nodes": [159, nodes]} and nodes <= 151
    last = report["evaluations"][-1]
    assert last["sparsity"] == 1 - 77 / 256
    assert last["graph"] == {"edges": 1 - 321 / 401, "nodes": 1 - nodes / 159}
    assert report["model"]["prunable"] == sum(report["histograms"]["dense"]) == 256
    assert sum(report["histograms"]["pruned"]) == 77
    checked, shown = hpcprune("check", tmp_path / "run").out, hpcprune("show", tmp_path / "run/model.h5").out
    assert checked.count("2 layers, 256 weights, sparsity 69.92%; 321 of 401 edges: ") >= 2, "the model, and steps"
    assert re.search(r"all layers of weights +256 +77 +69\.92%", shown)
    page = (tmp_path / "run/report.html").read_text()
    assert "of which 256 in 2 layers are prunable" in page
    assert all(each in page for each in ("nodes with edges", "77 of 256 prunable weights are left; 321 of 401 edges"))
    assert f"<td>69.92 %</td><td>19.95 %</td><td>{100 - 100 * nodes / 159:.2f} %</td>" in page
    layers = {layer["name"]: layer for layer in report["layers"]}
    # Of each edge in both directions, and of the loops that the layers add: what a message adds to each of its node's
    # numbers and to its degree.
    messages = {name: 2 * (2 * edges + 160) * (16 + 4 + 1 + 1) for name, edges in (("dense", 401), ("survivors", 321))}
    graph = layers["graph.weight"]
    assert (graph["kind"], graph["nonzeros"]) == ("edges", 321)
    assert {name: graph[f"flops_{name}"] for name in messages} == messages
    products = sum(layer["flops_survivors"] for layer in layers.values() if layer["kind"] == "weights")
    assert products == 2 * 160 * 77
    assert report["costs"]["pruned"]["flops"] == products + messages["survivors"]
    assert report["costs"]["dense"]["flops"] == 2 * 160 * 256 + messages["dense"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
