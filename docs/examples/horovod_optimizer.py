"""Horovod's DistributedOptimizer that sends survivors' gradients alone.

mpirun -n 2 python docs/examples/horovod_optimizer.py
"""

import horovod.torch as hvd
import torch
from mpi4py import MPI  # noqa: F401  (before hvd.init: whoever initialises MPI also ends it)
from torch import nn

import hpcprune

hvd.init()
rank, ranks = hvd.rank(), hvd.size()
torch.manual_seed(0)  # every rank prunes the same weights
model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))
inputs = torch.randn(2000, 20)
labels = (inputs @ torch.randn(20, 4)).argmax(1)

masks = hpcprune.prune(model, sparsity=0.9, scope="layer")  # a trained model is better pruned globally
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)  # made after pruning
compression = hpcprune.Compression(masks, model)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs[rank::ranks]), labels[rank::ranks]).backward()
    optimizer.step()

if rank == 0:
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
    weights = torch.cat([model.get_parameter(name).flatten() for name in masks])
    print(f"{ranks} ranks: accuracy {accuracy:.2f}, {(weights == 0).float().mean():.1%} of the weights are zero")
hvd.shutdown()
