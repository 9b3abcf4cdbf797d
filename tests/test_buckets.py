"""Buckets: gradients are packed as backward finishes them, sent in one order, and freed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hpcprune
from hpcprune.buckets import Bucket, Buckets
from hpcprune.errors import TaskError
from hpcprune.exchange import Pending
from hpcprune.survivors import Survivors
from hpcprune.world import World


@dataclass
class Recorder:
    """A sender that sums nothing: it notes which buckets were begun, and which dense gradients were there then."""

    model: nn.Module
    whole_first: bool = False
    begun: list[tuple[str, ...]] = field(default_factory=list)
    waited: int = 0
    dense_left: list[int] = field(default_factory=list)
    prepared: int = 0

    def begin_step(self, number: int) -> None:
        pass

    def prepare(self, gradients: object) -> None:
        assert not self.begun
        self.prepared += 1

    def begin(self, gradient: Tensor, bucket: Bucket, what: str) -> Pending:
        assert len(gradient) == bucket.stop - bucket.start
        self.begun.append(tuple(segment.name for segment in bucket.segments))
        self.dense_left.append(sum(p.grad is not None for p in self.model.parameters()))
        return self

    def wait(self) -> None:
        self.waited += 1

    def own_state(self) -> dict[str, Tensor]:
        return {}

    def check_sums(self, gradients: object, what: str) -> None:
        pass


class Branching(nn.Module):
    """Layers used in another order than they are registered in; one on demand, one twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.twice = nn.Linear(8, 3), nn.Linear(6, 8), nn.Linear(8, 8)
        self.seldom = nn.Linear(8, 8)
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x).tanh()))
        return self.last(self.seldom(x) if self.used else x)


def setting(size: int = 1, sparsity: float = 0.6, **more: bool) -> tuple[Branching, Survivors, Recorder, Buckets]:
    model = Branching()
    survivors = Survivors(model, hpcprune.prune(model, sparsity, comm=World.alone()))
    sender = Recorder(model, **more)
    return model, survivors, sender, Buckets(survivors, sender, size)


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    return model(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum()


def dense_gradients(*seeds: int, used: bool = True) -> dict[str, Tensor]:
    model, _, _, buckets = setting()
    buckets.close()
    model.used = used
    for seed in seeds:
        loss_of(model, seed).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_packed(survivors: Survivors, dense: dict[str, Tensor]) -> None:
    for segment in survivors:
        expected = torch.empty_like(survivors.gradient(segment))
        segment.packing.gather(dense[segment.name].reshape(-1), expected)
        torch.testing.assert_close(survivors.gradient(segment), expected)


def test_every_gradient_is_packed_and_freed_before_its_bucket_begins() -> None:
    model, survivors, sender, buckets = setting()
    buckets.backward(loss_of(model), "test", add=False, send=True)
    assert_packed(survivors, dense_gradients(1))
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(names) for names in sender.begun) == len(list(model.parameters()))
    assert sender.dense_left == [0] * len(sender.begun), "only one dense gradient is there at a time"
    buckets.wait()
    assert sender.waited == len(sender.begun)


def test_buckets_begin_in_the_vectors_order_whatever_order_backward_takes() -> None:
    model, survivors, sender, buckets = setting()
    buckets.backward(loss_of(model), "test", add=False, send=True)
    assert [name for names in sender.begun for name in names] == [segment.name for segment in survivors]
    # Registered in another order, so the layout that backward suggests is another.
    assert buckets.order != [segment.name for segment in survivors]
    again = Survivors(model, order=buckets.order)
    assert [segment.name for segment in again] == buckets.order


def test_buckets_are_as_large_as_asked_and_cut_between_parameters() -> None:
    _, survivors, _, small = setting(1)
    assert len(small._buckets) == len(list(survivors))
    _, _, _, one = setting(10**9)
    assert len(one._buckets) == 1
    model, survivors, _, buckets = setting(300)
    buckets.backward(loss_of(model), "test", add=False, send=True)
    sizes = [4 * (bucket.stop - bucket.start) for bucket in buckets._buckets]
    assert sum(sizes) == survivors.packed_bytes and all(size >= 300 for size in sizes[:-1])


def test_a_parameter_that_a_step_did_not_use_counts_as_zeros() -> None:
    model, survivors, sender, buckets = setting()
    buckets.backward(loss_of(model), "test", add=False, send=True)
    model.used = False
    buckets.backward(loss_of(model), "test", add=False, send=True)
    assert_packed(survivors, dense_gradients(1, used=False))
    assert sum(len(names) for names in sender.begun) == 2 * len(list(model.parameters()))


def test_a_parameter_that_backward_finishes_twice_is_an_error_and_not_half_a_gradient() -> None:
    shared = nn.Linear(6, 6)
    for reentrant in (False, True):
        model = nn.Sequential(shared)
        survivors = Survivors(model)
        buckets = Buckets(survivors, Recorder(model), 1)
        inputs = torch.ones(2, 6, requires_grad=True)
        for _ in range(2):
            inputs = checkpoint(shared, inputs, use_reentrant=reentrant)
        if reentrant:
            with pytest.raises(TaskError, match=r"step 3: 0\.\w+ got gradients twice .* use_reentrant=False"):
                buckets.backward(inputs.sum(), "step 3", add=False, send=True)
        else:
            buckets.backward(inputs.sum(), "step 3", add=False, send=True)
        buckets.close()


def test_a_backward_pass_of_the_tasks_own_is_an_error() -> None:
    model, _, _, buckets = setting()
    with pytest.raises(TaskError, match=r"last\.\w+ got a gradient outside .* torch\.autograd\.grad"):
        loss_of(model).backward()
    buckets.close()


def test_a_sparse_gradient_is_refused_by_its_parameters_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    buckets = Buckets(Survivors(model), Recorder(model), 1)
    with pytest.raises(TaskError, match=r"0\.weight: its gradient is torch\.sparse_coo.* with sparse=False"):
        buckets.backward(model(torch.tensor([1, 2])).sum(), "test", add=False, send=True)
    buckets.close()


def test_accumulated_gradients_are_summed_and_sent_once() -> None:
    model, survivors, sender, buckets = setting()
    for part, seed in enumerate((1, 2, 3)):
        model.used = part != 1
        buckets.backward(loss_of(model, seed), "test", add=part > 0, send=part == 2)
        assert bool(sender.begun) == (part == 2)
    expected = dense_gradients(1, 3)
    for name, more in dense_gradients(2, used=False).items():
        expected[name] += more
    assert_packed(survivors, expected)


def test_a_sender_that_looks_at_the_whole_gradient_gets_it_first() -> None:
    model, _, sender, buckets = setting(whole_first=True)
    buckets.backward(loss_of(model), "test", add=False, send=True)
    assert sender.prepared == 1 and len(sender.begun) == len(list(model.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_gradient_that_is_not_finite_is_named(value: float) -> None:
    model, _, _, buckets = setting(sparsity=0.0)
    buckets.backward(loss_of(model), "test", add=False, send=True)
    assert buckets.not_finite() is None
    with torch.no_grad():
        model.twice.bias[2] = value
    buckets.backward(loss_of(model), "test", add=False, send=True)
    assert buckets.not_finite() == buckets.order[0]


def test_closed_buckets_leave_the_model_alone() -> None:
    model, _, sender, buckets = setting()
    buckets.close()
    loss_of(model).backward()
    assert not sender.begun and all(p.grad is not None for p in model.parameters())
