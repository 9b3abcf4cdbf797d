"""Top-k: what travels, what stays behind, and that nothing is lost, against a few lines of numpy in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch

SCRIPT = """
import numpy as np, torch
from torch import nn
import hpcprune
from hpcprune.buckets import Buckets
from hpcprune.exchange.torch import TorchExchange
from hpcprune.exchange.topk import TopK
from hpcprune.survivors import Survivors
from hpcprune.world import World

world = World.of(None, timeout=30)
with world.guard():
    exchange = TorchExchange(world, torch.device("cpu"))
    torch.manual_seed(0)
    model = nn.Linear(30, 20, bias=False).double()
    masks = hpcprune.prune(model, 0.5, comm=world)
    survivors = Survivors(model, masks)
    N, MOMENTUM, SHARE, WARMUP, CLIP = 300, 0.9, 0.02, 3, 1.5


    def gradients(step):
        return [np.random.default_rng((step, rank)).standard_normal((20, 30)) for rank in range(world.size)]


    for clip in (None, CLIP):
        sender = TopK(exchange, survivors, world.size, share=SHARE, warmup=WARMUP, momentum=MOMENTUM, clip_norm=clip)
        buckets = Buckets(survivors, sender, 1 << 20)
        u, v = np.zeros((world.size, N)), np.zeros((world.size, N))
        kept = masks["weight"].numpy()
        for step in range(10):
            sender.begin_step(step)
            own = torch.from_numpy(gradients(step)[world.rank])
            before = exchange.bytes_sent
            buckets.backward((model.weight * own).sum(), "test", add=False, send=True)
            buckets.wait()
            sent = exchange.bytes_sent - before
            # The reference, for all ranks.
            share = SHARE ** min(1.0, step / (WARMUP + 1))
            count, total = max(1, round(share * N)), np.zeros(N)
            for rank, dense in enumerate(gradients(step)):
                g = dense[kept]
                if clip is not None:
                    g = g * min(1.0, clip / np.sqrt(world.size) / (np.linalg.norm(g) + 1e-6))
                u[rank] = MOMENTUM * u[rank] + g
                v[rank] += u[rank]
                top = np.argsort(np.abs(v[rank]))[N - count:] if count <= N / 2 else np.arange(N)
                total[top] += v[rank][top]
                u[rank][top] = v[rank][top] = 0
            ours = survivors.gradients()[0].numpy()
            np.testing.assert_allclose(ours, total, rtol=1e-12, atol=1e-12)
            assert sent == (8 * N if count > N / 2 else count * (8 + 4)), (step, sent, count)
            assert len({each.tobytes() for each in world.gather_arrays(ours.copy(), "test")}) == 1 or world.size == 1
            assert len({digest for digest in world.allgather(ours.tobytes(), "test")}) == 1
        state = {name: value.clone() for name, value in sender.own_state().items()}
        np.testing.assert_allclose(state["weight/residual"], v[world.rank], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state["weight/velocity"], u[world.rank], rtol=1e-12, atol=1e-12)
        again = TopK(exchange, survivors, world.size, share=SHARE, momentum=MOMENTUM, clip_norm=clip)
        again.load_own_state(state, masks)
        assert all(torch.equal(value, state[name]) for name, value in again.own_state().items())
        buckets.close()

    # In 16 bits: what rounding takes off comes later, so nothing is lost.
    sender = TopK(exchange, survivors, world.size, wire=torch.bfloat16, share=SHARE, warmup=WARMUP)
    buckets, arrived, computed = Buckets(survivors, sender, 1 << 20), np.zeros(N), np.zeros(N)
    for step in range(10):
        sender.begin_step(step)
        before = exchange.bytes_sent
        buckets.backward((model.weight * torch.from_numpy(gradients(step)[world.rank])).sum(), "", add=False, send=True)
        buckets.wait()
        count = max(1, round(sender.share() * N))
        assert exchange.bytes_sent - before == (2 * N if count > N / 2 else count * (2 + 4))
        arrived += survivors.gradients()[0].numpy()
        computed += sum(dense[kept] for dense in gradients(step))
    # A sum of all ranks in 16 bits rounds once more, which nobody knows of; the first step is one.
    held = sum(world.allgather(sender.own_state()["weight/residual"].numpy(), "test"))
    np.testing.assert_allclose(arrived + held, computed, atol=0.03 if world.size > 1 else 1e-12)
    assert np.abs(held).max() > 0.1
    buckets.close()
    exchange.close()
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_largest_travel_and_the_rest_is_kept(mpirun: Launch, tmp_path: Path, ranks: int) -> None:
    script = tmp_path / "topk.py"
    script.write_text(SCRIPT)
    done = mpirun(ranks, script)
    assert done.returncode == 0, done.stderr
