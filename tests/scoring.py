"""What the tests of scoring share: a small network that reads digits, and estimators that workers can import."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fxmerge
from fxmerge.graph import by_id, clone
from fxmerge.passes.enumerate_segments import enumerate_segments


@functools.cache
def digits():
    """Sixteen batches of 32 images [32, 1, 8, 8] with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:512]
    return list(zip(images[order].split(32), torch.tensor(data.target)[order].split(32), strict=True))


class Dirac(nn.Conv2d):
    """A convolution that is the identity: taking it away costs nothing."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight)


@functools.cache
def trained():
    """Three convolutions that matter and, at 2, one that does not; batch norm and dropout."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Dirac(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, 10)),
    )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith("2."))
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), 3e-3)
    for _ in range(4):
        for images, labels in digits():
            optimizer.zero_grad()
            cross_entropy(net(images), (images, labels)).backward()
            optimizer.step()
    return net.requires_grad_().eval()


@functools.cache
def captured():
    return fxmerge.capture(trained(), digits()[0][0])


def graph():
    return clone(captured())


@functools.cache
def enumeration():
    return enumerate_segments(captured())


def candidates():
    order = list(by_id(captured()))
    return sorted({site.candidate: None for site in enumeration().sites}, key=lambda each: order.index(each.entry))


def cross_entropy(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


@torch.no_grad()
def accuracy(model):
    images, labels = map(torch.cat, zip(*digits()[:4], strict=True))
    return float((model(images).argmax(1) == labels).float().mean())


class Counting:
    """The number of operations that a candidate takes away, after an accident at one of them.

    ``accident`` happens at the candidate of that number: "raise" an error, or "kill" the process; with a ``flag`` only
    where that file does not exist yet, which is then written. A ``log`` gets a line a candidate.
    """

    name = "counting"

    def __init__(self, accident=None, at=0, flag=None, log=None):
        self._accident, self._at = accident, at
        self._flag, self._log = (None if path is None else str(path) for path in (flag, log))

    def prepare(self, gm, candidates):
        numbers = {candidate: number for number, candidate in enumerate(candidates)}
        operations = len(gm.graph.nodes)

        def score(candidate):
            first = self._flag is None or not Path(self._flag).exists()
            if self._accident is not None and first and numbers[candidate] == self._at:
                if self._flag is not None:
                    Path(self._flag).touch()
                if self._accident == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("an accident")
            if self._log is not None:
                with Path(self._log).open("a") as log:
                    log.write(f"{numbers[candidate]}\n")
            return (len(candidate.bypassed) + len(candidate.removed)) / operations

        return score
