"""Which backend is taken and why, what is refused before any work, and the exchange of one rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Event

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn

from hpcprune.buckets import Bucket
from hpcprune.errors import JobError, NumericsError, WorldError
from hpcprune.exchange import Exchange
from hpcprune.exchange.choose import open_exchange
from hpcprune.exchange.host_copy import HostCopy
from hpcprune.exchange.mpi import MpiExchange
from hpcprune.exchange.wire import Wire, travelling_dtypes
from hpcprune.training import Retraining
from hpcprune.world import AgreedError, World
from tests.training import OneRank

CPU = torch.device("cpu")
FLOAT, BFLOAT, SHORT = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=["torch", "mpi"])
def exchange(request: pytest.FixtureRequest) -> Iterator[Exchange]:
    exchange, _ = open_exchange(request.param, World.alone(), CPU, {FLOAT})
    yield exchange
    exchange.close()


# Choosing


def chosen(name: str, wire: torch.dtype = FLOAT) -> str:
    """What is said of a backend that can be opened."""
    exchange, why = open_exchange(name, World.alone(), CPU, {FLOAT, wire})
    assert wire in exchange.wire_dtypes
    exchange.close()
    return why


def refused(name: str, wire: torch.dtype = FLOAT) -> str:
    """What is said of one that cannot; nothing may have been opened."""
    with pytest.raises(AgreedError) as found:
        open_exchange(name, World.alone(), CPU, {FLOAT, wire})
    assert isinstance(found.value.error, JobError)
    assert not dist.is_initialized()
    return str(found.value.error)


@pytest.mark.parametrize(
    ("name", "wire", "why"),
    [
        ("auto", FLOAT, "gloo, torch's own for cpu"),
        ("auto", BFLOAT, "gloo, torch's own for cpu"),
        ("torch", SHORT, "gloo, as retrain.exchange says"),
        ("mpi", FLOAT, "mpi, as retrain.exchange says"),
    ],
)
def test_a_sentence_says_what_was_taken_and_why(name: str, wire: torch.dtype, why: str) -> None:
    assert chosen(name, wire) == f"gradients are exchanged over {why}"


def test_auto_falls_back_to_mpi_where_torch_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    why = "gradients are exchanged over mpi, since this torch was built without torch.distributed"
    assert chosen("auto") == why
    assert refused("torch") == (
        f"retrain.exchange: torch: this torch ({torch.__version__}) was built without torch.distributed; write "
        "exchange: mpi, or install torch's usual build"
    )


def test_without_horovod_the_script_that_builds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    text = refused("horovod")
    assert text.startswith("retrain.exchange: horovod: Horovod cannot be imported (")
    assert text.endswith("); build it for this environment: sh scripts/install-horovod.sh, or write exchange: auto")


@pytest.mark.parametrize("level", ["THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED"])
def test_mpi_for_one_thread_is_refused(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setattr(MPI, "Query_thread", lambda: getattr(MPI, level))
    assert refused("mpi") == (
        "retrain.exchange: mpi needs THREAD_MULTIPLE, since a thread of its own calls MPI, but MPI was started with "
        f"{level}; write exchange: torch, or have MPI started with more (MPI4PY_RC_THREAD_LEVEL, your MPI's build)"
    )
    assert chosen("auto").startswith("gradients are exchanged over gloo")


@pytest.mark.parametrize(
    ("name", "wire", "sums", "able"),
    [
        ("mpi", BFLOAT, "float32, float64", "torch"),
        ("mpi", SHORT, "float32, float64", "torch or horovod"),
        ("horovod", BFLOAT, "float16, float32, float64", "torch"),
    ],
)
def test_a_wire_that_a_backend_lacks_is_refused_with_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch, name: str, wire: torch.dtype, sums: str, able: str
) -> None:
    # Horovod need not be there for what is known without it.
    monkeypatch.setitem(sys.modules, "horovod", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "horovod.torch", sys.modules[__name__])
    assert refused(name, wire) == (
        f"retrain.exchange: {name} cannot sum gradients of {str(wire).removeprefix('torch.')}, only of {sums}; write "
        f"exchange: {able}, or use float32 (wire, or the model's own dtype)"
    )


def test_every_dtype_of_a_models_gradients_is_among_those_asked_for() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).half().requires_grad_(False))
    assert travelling_dtypes(model, Retraining(steps=1)) == {FLOAT, BFLOAT}
    assert travelling_dtypes(model, Retraining(steps=1, wire="float16")) == {FLOAT, BFLOAT, SHORT}


# One rank


def test_one_rank_keeps_what_it_has(exchange: Exchange) -> None:
    buffers = [
        torch.arange(length, dtype=dtype) for dtype in sorted(exchange.wire_dtypes, key=str) for length in (0, 5)
    ]
    before = [buffer.clone() for buffer in buffers]
    for pending in [exchange.begin(buffer, "test") for buffer in buffers]:
        pending.wait()
    assert all(map(torch.equal, buffers, before))
    assert exchange.bytes_sent == sum(buffer.nbytes for buffer in buffers)


def test_what_one_rank_gathers_is_a_copy_of_its_own(exchange: Exchange) -> None:
    for dtype in (torch.int32, torch.int64, FLOAT, SHORT, BFLOAT):
        buffer = torch.arange(5).to(dtype)
        [found] = exchange.gather(buffer, "test").wait()
        assert found.dtype == dtype and torch.equal(found, buffer)
        found += 1
        assert buffer.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("dtype", "use"), [(SHORT, "bfloat16 or float32"), (BFLOAT, "float32")])
def test_a_sum_that_does_not_fit_the_wire_is_told_after_all_have_seen_it(dtype: torch.dtype, use: str) -> None:
    gradient = torch.tensor([1.0, torch.finfo(FLOAT).max])
    wire = Wire(OneRank(), dtype)
    bucket = Bucket(FLOAT, 0, 2, [])
    wire.begin(gradient, bucket, "test").wait()
    with pytest.raises(
        NumericsError, match=f"^step 3: a sum over the ranks does not fit .* write wire: {use}\\. The last"
    ):
        wire.check_sums([gradient], "step 3")
    wire.check_sums([torch.ones(2)], "step 3")
    Wire(OneRank(), None).check_sums([gradient], "step 3")


def test_a_failure_in_the_thread_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(copy: HostCopy) -> None:
        raise ArithmeticError("in the thread")

    exchange = MpiExchange(World.alone())
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_sum", fail)
        failing = exchange.begin(torch.ones(3), "test")
        with pytest.raises(ArithmeticError, match="in the thread"):
            failing.wait()
    exchange.begin(torch.ones(3), "test").wait()
    exchange.close()


def test_a_failure_of_mpi_names_what_was_summed() -> None:
    def fail(copy: HostCopy) -> None:
        raise MPI.Exception(MPI.ERR_TRUNCATE)

    exchange = MpiExchange(World.alone())
    exchange._sum = fail  # type: ignore[method-assign]
    with pytest.raises(WorldError, match=r"step 3: MPI failed \(MPI_ERR_TRUNCATE"):
        exchange.begin(torch.ones(3), "step 3").wait()
    exchange.close()


def test_closing_does_not_wait_for_ranks_that_never_come() -> None:
    enough = Event()
    exchange = MpiExchange(World.alone())
    exchange._sum = lambda copy: bool(enough.wait())  # type: ignore[assignment, method-assign, return-value]
    exchange.begin(torch.ones(3), "test")
    exchange.close()
    enough.set()


# Buffers on a device


def test_what_lies_in_the_hosts_memory_is_not_copied() -> None:
    buffer = torch.ones(3, requires_grad=True)
    copy = HostCopy(buffer)
    assert copy.ready().data_ptr() == buffer.data_ptr()
    copy.give_back()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_devices_buffer_goes_through_the_hosts_memory() -> None:
    exchange = MpiExchange(World.alone())
    buffer: Tensor = torch.arange(1000.0, device="cuda")
    copy = HostCopy(buffer)
    assert copy.ready().is_pinned() and torch.equal(copy.ready(), buffer.cpu())
    copy.ready().mul_(2)
    copy.give_back()
    exchange.begin(buffer, "test").wait()
    assert torch.equal(buffer.cpu(), 2 * torch.arange(1000.0))
    [found] = exchange.gather(buffer, "test").wait()
    assert found.is_cuda and torch.equal(found, buffer)
    exchange.close()
