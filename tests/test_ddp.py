"""The DDP hook on one rank, where what it passes to torch.distributed can be looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock
from weakref import WeakSet

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hpcprune
from hpcprune import ddp as module
from hpcprune.errors import HpcpruneError
from hpcprune.masks import Masks
from hpcprune.shards import Layer
from hpcprune.tensors import dtype_name

Sent = list[Tensor]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What was passed to all-reduces."""
    sent: Sent = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor)
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return sent


def every_other(model: nn.Module, *names: str) -> Masks:
    """Masks that prune the weights with odd numbers."""
    layers = [
        Layer(name, tuple(model.get_parameter(name).shape), dtype_name(model.get_parameter(name))) for name in names
    ]
    return Masks(layers, [np.packbits(np.arange(layer.weights) % 2 == 0, bitorder="little") for layer in layers])


def hooked(model: nn.Module, masks: Masks, **options: Any) -> DistributedDataParallel:
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
    return ddp


def chain(layers: int = 3, width: int = 300) -> nn.Module:
    """Layers of 360 kB, of which DDP makes buckets of their own after the first iteration."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_survivors_keep_their_gradients_and_what_is_pruned_gets_exact_zeros(dtype: torch.dtype, sent: Sent) -> None:
    model = nn.Sequential(nn.Linear(7, 9, dtype=dtype), nn.Linear(9, 3, dtype=dtype))
    masks = every_other(model, "0.weight", "1.weight")
    masks.apply(model)
    inputs = torch.randn(4, 7, dtype=dtype)
    model(inputs).abs().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    ddp = hooked(model, masks)
    ddp(inputs).abs().sum().backward()
    for name, parameter in model.named_parameters():
        if name in masks:
            expected[name][~masks[name]] = 0
        assert torch.equal(parameter.grad, expected[name]), name
    assert sum(tensor.nbytes for tensor in sent) == (32 + 9 + 14 + 3) * dtype.itemsize


def test_a_pruned_gradient_that_is_not_finite_is_zero_too() -> None:
    model = nn.Linear(2, 1, bias=False)
    ddp = hooked(model, every_other(model, "weight"))
    for bad in (torch.inf, torch.nan):
        ddp(torch.tensor([[3.0, bad]])).backward()
        assert model.weight.grad.tolist() == [[3.0, 0.0]]
        model.zero_grad()


@pytest.mark.parametrize("view", [False, True])
def test_masks_follow_a_weights_order_in_memory(view: bool) -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.transposed = nn.Parameter(torch.randn(6, 4).t())
            self.gaps = nn.Parameter(torch.randn(4, 12)[:, ::2])

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images).mean((2, 3)) @ (self.transposed * self.gaps)

    model = Permuted()
    images = torch.randn(2, 3, 5, 5)
    model(images).square().sum().backward()
    masks = every_other(model, "conv.weight", "transposed", "gaps")
    expected = {name: parameter.grad * masks.get(name, 1) for name, parameter in model.named_parameters()}
    model.zero_grad()
    ddp = hooked(model, masks, gradient_as_bucket_view=view)
    for _ in range(2):
        ddp(images).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, expected[name]), name
        model.zero_grad()


def test_a_bucket_with_nothing_pruned_travels_without_a_copy(sent: Sent) -> None:
    model = chain()
    odd = every_other(model, "0.weight", "2.weight")
    masks = Masks(odd.layers, [odd.bits("0.weight"), Masks.full(odd.layers).bits("2.weight")])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.3)
    hook, buffers = hpcprune.ddp_hook(masks, ddp), []

    def watched(state, bucket):
        buffers.append(bucket.buffer())
        return hook(state, bucket)

    ddp.register_comm_hook(None, watched)
    for _ in range(2):
        buffers.clear()
        sent.clear()
        ddp(torch.randn(2, 300)).sum().backward()
    assert [tensor.numel() for tensor in sent] == [90_000, 90_000, 45_000], "the last bucket is the first layer's"
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(buffers, sent, strict=True)] == [True, True, False]


def test_backward_does_not_wait_for_an_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """All-reduces that end only when the last bucket's has begun: a hook that waited for one would wait for ever."""
    begun: list[tuple[torch.futures.Future[Any], Tensor]] = []

    class Pending:
        def __init__(self, tensor: Tensor) -> None:
            self.future: torch.futures.Future[Any] = torch.futures.Future()
            begun.append((self.future, tensor))
            if len(begun) == expected:
                for future, tensor in reversed(begun):
                    future.set_result([tensor])

        def get_future(self) -> torch.futures.Future[Any]:
            return self.future

    model = chain()
    masks = every_other(model, "0.weight", "1.weight", "2.weight")
    ddp = hooked(model, masks, bucket_cap_mb=0.3)
    ddp(torch.randn(2, 300)).sum().backward()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group, async_op: Pending(tensor))
    expected = 3
    for _ in range(2):
        begun.clear()
        ddp(torch.randn(2, 300)).sum().backward()
        for name, parameter in model.named_parameters():
            assert not parameter.grad[~masks[name]].any() and parameter.grad[masks[name]].all()
        model.zero_grad()


def test_masks_of_buckets_are_made_once_and_again_when_ddp_has_rebuilt_its_buckets() -> None:
    model = chain()
    ddp = hooked(model, every_other(model, "0.weight", "1.weight", "2.weight"), bucket_cap_mb=0.3)
    made = []
    for _ in range(4):
        with mock.patch.object(module, "Packed", wraps=module.Packed) as packed:
            ddp(torch.randn(2, 300)).sum().backward()
        made.append(packed.call_count)
    assert made[1:] == [3, 0, 0]
    assert made[0] in (1, 2, 3), "the buckets before"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
        lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    ],
)
def test_compiled_models_are_looked_into(wrap: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(4, 3)
    masks = every_other(model, "weight")
    ddp = wrap(model)
    ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
    ddp(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model.weight.grad, masks["weight"].float())


def test_masks_that_do_not_fit_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    ddp = DistributedDataParallel(model)
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5))
    for given in (model, ddp):
        with pytest.raises(
            HpcpruneError, match=r"0.weight of shape \(5, 4\) is not in this Sequential \(it has 0.weight"
        ):
            hpcprune.ddp_hook(every_other(other, "0.weight"), given)
        with pytest.raises(HpcpruneError, match=r"1.weight of shape \(5, 5\) is not in this Sequential"):
            hpcprune.ddp_hook(every_other(other, "1.weight"), given)


def test_a_sparse_gradient_travels_unless_it_has_a_mask() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4, sparse=True)
            self.head = nn.Linear(4, 2)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.embedding(words))

    words = torch.tensor([1, 4])
    model = Words()
    masks = every_other(model, "head.weight")
    ddp = hooked(model, masks)
    ddp(words).sum().backward()
    assert model.embedding.weight.grad.is_sparse
    assert model.embedding.weight.grad.to_dense()[words].all()
    assert not model.head.weight.grad[~masks["head.weight"]].any()
    ddp = hooked(model, every_other(model, "embedding.weight"))
    with pytest.raises(HpcpruneError, match=r"embedding.weight has a mask and a sparse gradient.*sparse=False"):
        ddp(words).sum().backward()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_stay_zero_unless_the_optimizer_had_a_state_before_pruning(kind: type[torch.optim.Optimizer]) -> None:
    """Momentum and weight decay of zeros are zeros. Momentum from before is not; then masks are applied each step."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    for before, apply, zero in ((False, False, True), (True, False, False), (True, True, True)):
        model = nn.Linear(6, 4)
        masks = every_other(model, "weight")
        ddp = hooked(model, masks)
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)  # type: ignore[call-arg]
        if before:
            model(torch.randn(3, 6)).square().sum().backward()
            optimizer.step()
        masks.apply(model)
        for _ in range(10):
            optimizer.zero_grad()
            ddp(torch.randn(3, 6)).square().sum().backward()
            optimizer.step()
            if apply:
                masks.apply(model)
        assert (not model.weight[~masks["weight"]].any()) == zero, (before, apply)
        if not before:
            for key, value in optimizer.state[model.weight].items():
                assert value.ndim == 0 or not value[~masks["weight"]].any(), key
        assert model.weight[masks["weight"]].all()


def test_a_process_ends_when_the_callbacks_of_its_last_step_are_released() -> None:
    class Callback:
        pass

    held = [Callback()]
    callbacks = WeakSet(held)
    release = threading.Timer(0.2, held.clear)
    release.start()
    start = time.monotonic()
    module._wait_for_release(callbacks)
    assert 0.2 <= time.monotonic() - start < module.LONGEST_RELEASE
    assert not callbacks
