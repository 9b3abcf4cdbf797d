"""Evaluation over ranks: each looks at its own part, and every rank has the figures of the whole.

Run by mpirun this file is the program of one rank: `test_evaluate_ranks.py FOLDER` leaves what it found there.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch

from hpcprune.evaluate import evaluate
from hpcprune.exchange.torch import TorchExchange
from hpcprune.world import World
from tests.conftest import Launch
from tests.evaluating import Fives, Samples, on_the_whole

SIZES = (3, 50)
BATCH_SIZES = (7, 100)


def main(folder: Path) -> None:
    world = World.of(timeout=60)
    exchange = TorchExchange(world, torch.device("cpu"))
    task = Fives()
    model = task.model()
    found = {}
    for size in SIZES:
        for batch_size in BATCH_SIZES:
            data = Samples(size)
            found[size, batch_size] = evaluate(task, model, data, batch_size, world), data.asked
    exchange.close()
    (folder / f"{world.rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.mark.filterwarnings("ignore:No positive samples")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_metrics_are_those_of_the_whole_on_every_rank(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    """Of 50 samples, 3 ranks have unequal parts; of 3, one each; one class is on the last rank alone."""
    done = mpirun(ranks, __file__, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
    for size in SIZES:
        expected = on_the_whole(Fives().model(), Samples(size))
        for batch_size in BATCH_SIZES:
            figures, asked = zip(*(each[size, batch_size] for each in found), strict=True)
            assert figures[0] == pytest.approx(expected, rel=1e-6), (size, batch_size)
            assert all(each == figures[0] for each in figures)
            assert [index for part in asked for index in part] == list(range(size))
            assert {len(part) for part in asked} <= {size // ranks, -(-size // ranks)}


if __name__ == "__main__":
    with World.of().guard():
        main(Path(sys.argv[1]))
