"""A loop of your own, over MPI alone.

mpirun -n 2 python docs/examples/survivors.py
"""

import torch
from mpi4py import MPI
from torch import nn

import hpcprune

comm = MPI.COMM_WORLD
torch.manual_seed(0)  # every rank prunes the same weights
model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))
inputs = torch.randn(2000, 20)
labels = (inputs @ torch.randn(20, 4)).argmax(1)

masks = hpcprune.prune(model, sparsity=0.9, scope="layer")  # a trained model is better pruned globally
survivors = hpcprune.Survivors(model, masks)
optimizer = torch.optim.AdamW(survivors.parameters(), lr=0.01)  # its state is as small as what survives
for _ in range(200):
    nn.functional.cross_entropy(model(inputs[comm.rank :: comm.size]), labels[comm.rank :: comm.size]).backward()
    survivors.pack_gradients()  # from the model's gradients, which it frees
    for gradient in survivors.gradients():
        comm.Allreduce(MPI.IN_PLACE, gradient.numpy())
        gradient /= comm.size
    optimizer.step()
    survivors.unpack()  # into the model

if comm.rank == 0:
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
    weights = torch.cat([model.get_parameter(name).flatten() for name in masks])
    print(f"{comm.size} ranks: accuracy {accuracy:.2f}, {(weights == 0).float().mean():.1%} of the weights are zero")
