"""Buckets: the packed gradients on their way to the other ranks while backward still runs.

Backward finishes parameters one after the other. As soon as it has finished one, its survivors' gradients are gathered
into the packed vector and the dense gradient is freed; as soon as a bucket (a contiguous part of the vector) has all of
its parameters, its all-reduce starts. All ranks start buckets in the same order, the vector's, whatever the order in
which their backward passes came to them: a collective must meet its counterparts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hpcprune.errors import TaskError
from hpcprune.exchange import Pending
from hpcprune.survivors import Segment, Survivors

__all__ = ["Bucket", "Buckets", "Sender", "Traffic"]


@dataclass
class Bucket:
    """The elements [start, stop) of a dtype's packed gradient, and which of its segments are not there yet."""

    dtype: torch.dtype
    start: int
    stop: int
    segments: list[Segment]
    missing: set[str] = field(default_factory=set)


class Sender(Protocol):
    """How a bucket travels: as it is, in another dtype, or its largest elements alone.

    `whole_first` says that it looks at the whole gradient before the first bucket goes, so nothing can go earlier.
    """

    whole_first: bool

    def begin_step(self, number: int) -> None:
        """The buckets that come next are of step `number`."""
        ...

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        """Look at the whole gradient; called before the first bucket where `whole_first` is set."""
        ...

    def own_state(self) -> dict[str, Tensor]:
        """What this rank holds back from one step to the next, by name."""
        ...

    def begin(self, gradient: Tensor, bucket: Bucket, what: str) -> Pending:
        """Start to sum a bucket's gradient over all ranks, in place. NaN is no error here: other ranks do not know."""
        ...

    def check_sums(self, gradients: Sequence[Tensor], what: str) -> None:
        """Raise NumericsError, on all ranks alike, if summing made infinities of gradients that were finite."""
        ...


@dataclass(frozen=True)
class Traffic:
    """One step's exchange: seconds from the first bucket's start to the last's end, and those after backward's end."""

    span: float
    waited: float

    @property
    def overlap(self) -> float:
        """The share of the exchange that passed while backward still ran."""
        return 1 - self.waited / self.span if self.span > 0 else 0.0


class Buckets:
    """The packed gradients of `survivors`, sent in buckets of about `size` bytes.

    `order` lists the parameters' names in the order in which the last backward pass finished them.
    """

    def __init__(self, survivors: Survivors, sender: Sender, size: int) -> None:
        """Watch the survivors' parameters from now on, until `close`."""
        self.order: list[str] = []
        self._survivors, self._sender = survivors, sender
        self._buckets = _cut(survivors, size)
        self._bucket_of = {segment.name: bucket for bucket in self._buckets for segment in bucket.segments}
        self._add, self._send, self._what = False, False, ""
        self._inside = False
        self._next = 0
        self._pending: list[Pending] = []
        self._began = 0.0
        self._sums: dict[str, Tensor] = {}
        self._hooks = [
            each.source.register_post_accumulate_grad_hook(self._watch(each))  # type: ignore[no-untyped-call]
            for each in survivors
        ]

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def backward(self, loss: Tensor, what: str, *, add: bool, send: bool) -> None:
        """Run the backward pass of a batch, or of a part of one.

        Args:
            loss: a scalar.
            what: names the exchange in the message when ranks are missing.
            add: to the gradients that are there already (every part of a batch but the first).
            send: start the exchange (the last part).
        """
        self._add, self._send, self._what = add, send, what
        self._next, self._pending, self.order = 0, [], []
        if not add:
            self._sums = {}
        for bucket in self._buckets:
            bucket.missing = {segment.name for segment in bucket.segments}
        self._inside = True
        loss.backward()  # type: ignore[no-untyped-call]
        self._inside = False
        for bucket in self._buckets:
            for segment in bucket.segments:
                if segment.name in bucket.missing:  # this batch did not use it
                    self._take(segment)
        if send and self._sender.whole_first:
            self._sender.prepare(self._survivors.gradients())
            self._start()

    def not_finite(self) -> str | None:
        """The first parameter, as backward came to them, in whose own gradient there was a NaN or an infinity."""
        if not self._sums or bool(torch.isfinite(torch.stack(list(self._sums.values()))).all()):
            return None
        return next(name for name, total in self._sums.items() if not torch.isfinite(total))

    def wait(self) -> Traffic:
        """Wait until every bucket holds the sum over all ranks."""
        start = time.perf_counter()
        # The last one first: when it is there, most others are too, and waiting for them takes no core from them.
        for pending in reversed(self._pending):
            pending.wait()
        end = time.perf_counter()
        return Traffic(end - self._began if self._pending else 0.0, end - start)

    def _watch(self, segment: Segment) -> Callable[[Tensor], None]:
        def finished(_: Tensor) -> None:
            if not self._inside:
                raise TaskError(
                    f"{segment.name} got a gradient outside the training's own backward pass; where the task's predict "
                    "or loss needs one of its own, use torch.autograd.grad with respect to its inputs"
                )
            if segment.name not in self._bucket_of[segment.name].missing:
                raise TaskError(
                    f"{self._what}: {segment.name} got gradients twice in one backward pass, and the first were packed "
                    "by then: two checkpointed parts of the model share it, or one runs more than once; write "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            self.order.append(segment.name)
            self._take(segment)

        return finished

    def _take(self, segment: Segment) -> None:
        self._survivors.pack_gradient(segment, self._add)
        self._sums[segment.name] = self._survivors.gradient(segment).sum(dtype=torch.float32)
        bucket = self._bucket_of[segment.name]
        bucket.missing.discard(segment.name)
        if self._send and not self._sender.whole_first:
            self._start()

    def _start(self) -> None:
        """Start the buckets whose turn it is and that have all of their parameters."""
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            if self._next == 0:
                self._began = time.perf_counter()
            bucket = self._buckets[self._next]
            gradient = self._survivors.packed[bucket.dtype].grad
            assert gradient is not None
            self._pending.append(self._sender.begin(gradient[bucket.start : bucket.stop], bucket, self._what))
            self._next += 1


def _cut(survivors: Survivors, size: int) -> list[Bucket]:
    """Contiguous parts of about `size` bytes each, cut between parameters."""
    buckets = []
    for dtype, segments in survivors.segments.items():
        bucket: Bucket | None = None
        for segment in segments:
            if bucket is None or (bucket.stop - bucket.start) * dtype.itemsize >= size:
                bucket = Bucket(dtype, segment.start, segment.stop, [])
                buckets.append(bucket)
            bucket.segments.append(segment)
            bucket.stop = segment.stop
    return buckets
