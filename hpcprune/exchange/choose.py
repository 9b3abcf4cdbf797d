"""Which backend carries the gradients, and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from hpcprune.errors import JobError
from hpcprune.exchange import Exchange
from hpcprune.exchange.dtypes import refuse_dtype
from hpcprune.world import World

__all__ = ["open_exchange"]


def open_exchange(name: str, world: World, device: torch.device, dtypes: Iterable[torch.dtype]) -> tuple[Exchange, str]:
    """Open a backend, and say in a sentence which and why. Collective.

    Args:
        name: auto, torch, mpi or horovod, as in a job file. auto is torch, or mpi where torch was built without it.
        world: the ranks.
        device: where this rank's gradients are.
        dtypes: those in which they are to travel.

    Raises:
        AgreedError: of a JobError: on some rank the backend cannot be used, or it does not sum one of the dtypes.
    """
    backend = world.together(lambda: _usable(name, dtypes), "exchange: choosing")
    exchange = _open(backend, world, device)
    if name != "auto":
        why = "as retrain.exchange says"
    elif backend == "mpi":
        why = "since this torch was built without torch.distributed"
    else:
        why = f"torch's own for {device.type}"
    return exchange, f"gradients are exchanged over {exchange.name}, {why}"


def _usable(name: str, dtypes: Iterable[torch.dtype]) -> str:
    """The backend that `name` means, once what it needs was found to be here and it was found to sum all `dtypes`."""
    backend = name if name != "auto" else "torch" if dist.is_available() else "mpi"
    if backend == "torch" and not dist.is_available():
        raise JobError(
            f"retrain.exchange: torch: this torch ({torch.__version__}) was built without torch.distributed; write "
            "exchange: mpi, or install torch's usual build"
        )
    if backend == "mpi":
        from hpcprune.exchange.mpi import refuse_few_threads

        refuse_few_threads()
    if backend == "horovod":
        try:
            import horovod.torch  # noqa: F401
        except ImportError as error:
            raise JobError(
                f"retrain.exchange: horovod: Horovod cannot be imported ({error}); build it for this environment: sh "
                "scripts/install-horovod.sh, or write exchange: auto"
            ) from None
    for dtype in sorted(dtypes, key=str):
        refuse_dtype(backend, dtype)
    return backend


def _open(backend: str, world: World, device: torch.device) -> Exchange:
    # Imported here, since each needs a library that need not be there when it is not used.
    if backend == "mpi":
        from hpcprune.exchange.mpi import MpiExchange

        return MpiExchange(world)
    if backend == "horovod":
        from hpcprune.exchange.horovod import HorovodExchange

        return HorovodExchange(world)
    from hpcprune.exchange.torch import TorchExchange

    return TorchExchange(world, device)
