"""Criteria that look at data, over ranks: the same masks on 1, 2 and 3, and the statistics at their owners alone.

Run by mpirun this file is the script: `test_criteria_ranks.py FOLDER` leaves the masks there.
"""

from __future__ import annotations

import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

import hpcprune
from hpcprune.criteria import CRITERIA, criteria_of
from hpcprune.layers import find_layers
from hpcprune.shards import deal
from hpcprune.statistics import Calibration
from tests.conftest import Launch
from tests.test_criteria import loss, network, samples

SCOPES = ("global", "layer", "row")
NEEDY = ("sensitivity", "snip", "fisher", "wanda")


def calibration(model: nn.Module) -> Calibration:
    data = samples()
    return Calibration(
        model, data, range(len(data)), 4, lambda b: model(b[0]), lambda b: loss(model, b), (0,), hpcprune.World.of()
    )


def main(folder: Path) -> None:
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    found: dict[Any, Any] = {}
    for criterion, scope in itertools.product(criteria_of("weights"), SCOPES):
        options = {"data": samples(), "loss": loss} if criterion in (*NEEDY, "movement") else {}
        masks = hpcprune.prune(network(), 0.7, criterion=criterion, scope=scope, batch_size=4, **options)
        found[criterion, scope] = {name: mask.numpy() for name, mask in masks.items()}
    model = network()
    layers = find_layers(model)
    shards = deal(layers, size)
    for criterion in NEEDY:
        gathered = CRITERIA[criterion].statistic().gather(calibration(model), layers, shards)
        found[criterion] = {span: gathered(span).numpy() for span in shards[rank]}
        for span in {span for shard in shards for span in shard} - set(shards[rank]):
            try:
                gathered(span)
            except KeyError:
                continue
            raise AssertionError(f"rank {rank} holds the statistic of {span}, which is another's")
    bad = samples()
    bad.tensors[0][-1] = torch.nan  # in the last batch, which is one rank's alone
    for criterion in NEEDY:
        try:
            hpcprune.prune(network(), 0.7, criterion=criterion, data=bad, loss=loss, batch_size=4)
        except hpcprune.HpcpruneError as error:
            found[criterion, "nan"] = f"{type(error).__name__}: {error}"
    try:
        hpcprune.prune(network(), 0.7, criterion="wanda", data=samples(20 + 4 * rank), batch_size=4)
    except hpcprune.HpcpruneError as error:
        found["parts"] = f"{type(error).__name__}: {error}"
    (folder / f"{size}-{rank}.pickle").write_bytes(pickle.dumps(found))


def test_masks_are_the_same_on_any_number_of_ranks(mpirun: Launch, tmp_path: Path) -> None:
    for ranks in (1, 2, 3):
        done = mpirun(ranks, __file__, tmp_path, timeout=180)
        assert done.returncode == 0, done.stderr
    alone = pickle.loads((tmp_path / "1-0.pickle").read_bytes())
    whole = {(criterion, span.layer): value for criterion in NEEDY for span, value in alone[criterion].items()}
    for ranks in (2, 3):
        for rank in range(ranks):
            found = pickle.loads((tmp_path / f"{ranks}-{rank}.pickle").read_bytes())
            for criterion, scope in itertools.product(criteria_of("weights"), SCOPES):
                for name, mask in found[criterion, scope].items():
                    np.testing.assert_array_equal(mask, alone[criterion, scope][name], f"{criterion} {scope} {name}")
            assert "the number of samples" in found["parts"] and "rank 1: ('wanda', 'row', 24," in found["parts"]
            for criterion in NEEDY:
                for span, values in found[criterion].items():
                    expected = whole[criterion, span.layer][span.start : span.stop]
                    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-15)
                assert found[criterion, "nan"].startswith("NumericsError"), found[criterion, "nan"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
