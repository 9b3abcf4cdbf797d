"""A task of a second for the tests: blobs to tell apart, batch norm and dropout, and a rank that misbehaves on demand.

TINY="<what>:<rank>:<step>": at its `step`-th batch, that rank raises an error, kills itself, hangs, has no more room on
its disk, has a weight that no other rank has, or computes NaN. TINY_DISK="<first>:<last>": what is written from the
`first` batch on is on the disk at the `last` only. FAULT: see faults.py.
"""

import os
import resource
import signal
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpcprune

if "FAULT" in os.environ:
    import faults

    faults.install()


class Tiny(hpcprune.Classifier):
    classes = 4
    batches = 0

    def model(self):
        return nn.Sequential(
            nn.Linear(20, 48),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(48, 48),
            nn.ReLU(),
            nn.Linear(48, 4),
        )

    def data(self):
        if "TINY_DISK" in os.environ:
            self.hold_disk(*map(int, os.environ["TINY_DISK"].split(":")))
        generator = torch.Generator().manual_seed(5)
        centres = 2 * torch.randn(4, 20, generator=generator)
        labels = torch.arange(512) % 4
        inputs = centres[labels] + 2 * torch.randn(512, 20, generator=generator)
        parts = [slice(0, 384), slice(384, 512)]
        return hpcprune.Data(*(TensorDataset(inputs[part], labels[part]) for part in parts))

    def predict(self, model, batch):
        if model.training:
            self.batches += 1
            time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
            what, rank, step = os.environ.get("TINY", "nothing:0:0").split(":")
            if self.batches == int(step) and os.environ.get("OMPI_COMM_WORLD_RANK", "0") == rank:
                if what == "raise":
                    raise ArithmeticError("this rank was told to raise")
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "hang":
                    time.sleep(1000)
                if what == "full":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
                if what == "spoil":
                    model[6].bias.data[0] += 1
                if what == "nan":
                    return super().predict(model, batch) * float("nan")
        return super().predict(model, batch)

    def hold_disk(self, first, last):
        fsync = os.fsync

        def held(fd):
            end = time.monotonic() + 100
            while first <= self.batches < last:
                assert time.monotonic() < end, "the training waits for the disk"
                time.sleep(0.001)
            fsync(fd)

        os.fsync = held
