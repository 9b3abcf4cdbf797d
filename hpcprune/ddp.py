"""A hook for torch's DistributedDataParallel (DDP) that sends survivors' gradients alone.

DDP hands each bucket of gradients to its hook as soon as backward has filled it. This hook gathers the survivors'
gradients of the bucket, and all those of parameters without a mask, into a packed vector, starts that vector's
all-reduce and returns at once, so that backward goes on meanwhile. When the sum has come, it is scattered back and what
is pruned gets a gradient of exactly zero. No indices travel: every rank has the same masks, which is checked once.

What survives of a bucket is kept as one packed mask of the bucket, 1 bit a gradient, in the order of its memory.
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations with classes, and that makes them strings.

import atexit
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpcprune.errors import HpcpruneError
from hpcprune.masks import Masks, refuse_other_masks
from hpcprune.packing import Packed

__all__ = ["ddp_hook"]

LONGEST_RELEASE = 2.0  # seconds that the process waits at its end for callbacks to be released
RELEASE_OF_TENSORS = 0.05  # seconds that gloo's threads have to release what they were given, which takes microseconds

Hook = Callable[[dist.ProcessGroup | None, GradBucket], Future[Tensor]]


def ddp_hook(masks: Masks, model: nn.Module) -> Hook:
    """A communication hook that averages survivors' gradients over the ranks and makes pruned ones zero.

        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))

    A weight that is zero, with a gradient of zero and an optimizer state of zero, stays zero. Make the optimizer after
    pruning; one that had momentum before moves pruned weights, so call `masks.apply(model)` after each of its steps.
    DDP takes one hook: after pruning further, wrap the model anew.

    Args:
        masks: of parameters by their names in `named_parameters()` of the model that DDP wraps.
        model: the DDP module, or the model that it wraps. Only the former tells on which process group DDP works: with
            the latter that is the default group, or the one that `register_comm_hook` was given in place of None.

    Raises:
        HpcpruneError: a mask is of no parameter of the model, or of another shape. In the first backward pass:
            WorldError, if ranks have different masks; HpcpruneError, if a parameter with a mask has a sparse gradient.
    """
    return _Reduction(masks, model).all_reduce


@dataclass(frozen=True)
class _Bucket:
    """The parameters in one of DDP's buckets, in its order, and how it is packed: None if nothing in it is pruned."""

    parameters: list[Tensor]
    packing: Packed | None
    packed: Tensor

    def holds(self, parameters: list[Tensor]) -> bool:
        """Whether these are the bucket's parameters, the very same ones."""
        return len(parameters) == len(self.parameters) and all(map(lambda a, b: a is b, parameters, self.parameters))


class _Reduction:
    """The all-reduces of one model's buckets."""

    def __init__(self, masks: Masks, model: nn.Module) -> None:
        self._masks = masks
        self._group: dist.ProcessGroup | None = None
        wrapped: Any = model
        while isinstance(wrapped, DistributedDataParallel) or hasattr(wrapped, "_orig_mod"):
            if isinstance(wrapped, DistributedDataParallel):
                self._group, wrapped = wrapped.process_group, wrapped.module
            else:
                wrapped = wrapped._orig_mod  # torch.compile's wrapper
        parameters = masks.parameters(wrapped)
        # A tensor's hash is its identity, and a key is kept alive: no other tensor is ever taken for it.
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in parameters.items() if masks.survivors[name] < parameter.numel()
        }
        self._buckets: dict[int, _Bucket] = {}
        self._agreed = False
        self._callbacks: WeakSet[Callable[[Future[Any]], Tensor]] = WeakSet()
        atexit.register(_wait_for_release, self._callbacks)

    def all_reduce(self, group: dist.ProcessGroup | None, bucket: GradBucket) -> Future[Tensor]:
        """The hook: start the all-reduce of a bucket; the future is the bucket's averaged gradients."""
        group = group or self._group or dist.group.WORLD
        assert group is not None, "DDP needs a process group, so there is one"
        buffer: Tensor = bucket.buffer()
        if not self._agreed:
            self._agree(group, buffer.device)
        known = self._known(bucket)
        packing, sent = known.packing, buffer
        if packing is not None:
            sent = known.packed
            packing.gather(buffer, sent)
        # Scaled before the sum, as DDP does without a hook: 16-bit sums do not overflow, and the bits are DDP's own.
        sent.mul_(1 / group.size())
        work = dist.all_reduce(sent, group=group, async_op=True)
        assert work is not None, "this rank is of the group"

        def finish(future: Future[Any]) -> Tensor:
            total: Tensor = future.value()[0]
            if packing is None:
                return total
            packing.scatter(total, buffer.zero_())
            return buffer

        self._callbacks.add(finish)
        averaged: Future[Tensor] = work.get_future().then(finish)
        return averaged

    def _agree(self, group: dist.ProcessGroup, device: torch.device) -> None:
        own = torch.frombuffer(bytearray.fromhex(self._masks.hash), dtype=torch.uint8).to(device)
        hashes = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(hashes, own, group=group)
        refuse_other_masks([bytes(hash.tolist()).hex() for hash in hashes])
        self._agreed = True

    def _known(self, bucket: GradBucket) -> _Bucket:
        """What is known of a bucket. After the first iteration DDP fills its buckets in another order, once."""
        parameters, index = bucket.parameters(), bucket.index()
        known = self._buckets.get(index)
        if known is None or not known.holds(parameters):
            if known is not None:
                self._buckets.clear()  # the others are no longer what they were either
            known = self._buckets[index] = self._look_at(bucket, parameters)
        return known

    def _look_at(self, bucket: GradBucket, parameters: list[Tensor]) -> _Bucket:
        buffer: Tensor = bucket.buffer()
        names = [self._names[parameter] for parameter in parameters if parameter in self._names]
        if not names:
            return _Bucket(parameters, None, buffer.new_empty(0))
        if buffer.is_sparse:
            raise HpcpruneError(
                f"{names[0]} has a mask and a sparse gradient, whose survivors are in no fixed place; build its "
                "module with sparse=False, or exclude it from pruning"
            )
        reals = 2 if parameters[0].is_complex() and not buffer.is_complex() else 1  # DDP may lay complex out as pairs
        kept = np.zeros(buffer.numel() // reals, np.bool_)
        for parameter, gradient in zip(parameters, bucket.gradients(), strict=True):
            start = gradient.storage_offset() - buffer.storage_offset()
            here = kept[start : start + parameter.numel()]
            name = self._names.get(parameter)
            here[:] = True if name is None else _in_memory_order(self._masks[name], parameter).numpy()
        packing = Packed(np.packbits(kept.repeat(reals), bitorder="little"), buffer.numel(), buffer.device)
        return _Bucket(parameters, packing, buffer.new_empty(packing.length))


def _in_memory_order(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask flattened as DDP lays out a parameter's gradient: as the parameter lies in memory, if it has no gaps."""
    strides = parameter.stride()
    outermost_first = sorted(range(len(strides)), key=lambda dimension: -strides[dimension])
    dense = parameter.permute(outermost_first).is_contiguous()
    return (mask.permute(outermost_first) if dense else mask).reshape(-1)


def _wait_for_release(callbacks: Sized) -> None:
    """Let gloo's threads come to rest before Python ends.

    After the last step of a training they still release the callback, and need Python's lock for it: a process that
    ends in that instant is aborted, after all its work (as happens with any hook that is written in Python).
    """
    end = time.monotonic() + LONGEST_RELEASE
    while len(callbacks) and time.monotonic() < end:
        time.sleep(1e-3)
    time.sleep(RELEASE_OF_TENSORS)
