"""DistributedDataParallel that sends survivors' gradients alone.

mpirun -n 2 python docs/examples/ddp.py
torchrun --nproc-per-node 2 docs/examples/ddp.py
"""

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpcprune

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
else:  # mpirun: rank 0 opens the store at which torch's ranks meet, and says where it is
    comm = MPI.COMM_WORLD
    host = comm.bcast(MPI.Get_processor_name())
    own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(own and own.port)
    dist.init_process_group("gloo", store=own or dist.TCPStore(host, port), rank=comm.rank, world_size=comm.size)
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # every rank prunes the same weights
model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))
inputs = torch.randn(2000, 20)
labels = (inputs @ torch.randn(20, 4)).argmax(1)

masks = hpcprune.prune(model, sparsity=0.9, scope="layer")  # a trained model is better pruned globally
ddp = DistributedDataParallel(model)
ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)  # made after pruning
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(ddp(inputs[rank::ranks]), labels[rank::ranks]).backward()
    optimizer.step()

if rank == 0:
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
    weights = torch.cat([model.get_parameter(name).flatten() for name in masks])
    print(f"{ranks} ranks: accuracy {accuracy:.2f}, {(weights == 0).float().mean():.1%} of the weights are zero")
dist.destroy_process_group()
