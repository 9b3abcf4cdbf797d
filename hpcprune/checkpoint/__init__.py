"""Checkpoints: HDF5 files, complete or absent, every byte under a checksum, fit to be read by strangers.

Nothing here imports torch, so that files can be checked and shown in a moment, wherever they are.
"""

from hpcprune.checkpoint.background import BackgroundWriter, write_step
from hpcprune.checkpoint.format import LayerState, State, StepState, TensorState
from hpcprune.checkpoint.read import read_model
from hpcprune.checkpoint.resume import newest_step, read_step
from hpcprune.checkpoint.write import write_model

__all__ = [
    "BackgroundWriter",
    "LayerState",
    "State",
    "StepState",
    "TensorState",
    "newest_step",
    "read_model",
    "read_step",
    "write_model",
    "write_step",
]
