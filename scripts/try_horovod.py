"""The smoke test of install-horovod.sh, under mpirun: two ranks sum a tensor, beside mpi4py in one process."""

# isort: off
from mpi4py import MPI  # before Horovod: whoever initialises MPI also ends it

# isort: on
import horovod.torch as hvd
import torch

hvd.init()
assert hvd.size() == MPI.COMM_WORLD.Get_size() > 1, f"Horovod sees {hvd.size()} ranks"
total = hvd.allreduce(torch.arange(4.0) + hvd.rank(), op=hvd.Sum, name="smoke")
expected = hvd.size() * torch.arange(4.0) + sum(range(hvd.size()))
assert torch.equal(total, expected), f"{total} is not {expected}"
if hvd.rank() == 0:
    print(f"horovod works: a sum over {hvd.size()} ranks is right")
hvd.shutdown()
