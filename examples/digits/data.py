"""Ten thousand handwritten digits of MNIST: 8,000 to train with, 2,000 to test with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["ARCHIVE", "SPLITS", "Split", "accuracy", "batches", "calibration", "load"]

ARCHIVE = Path(__file__).with_name("mnist.npz")
Split = Literal["train", "calibration", "test"]
SPLITS: dict[Split, slice] = {
    "train": slice(0, 8000),
    "calibration": slice(0, 1000),
    "test": slice(8000, 10000),
}
"""Which images of the archive, already in random order; calibration is a part of train."""

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, scaled to [0, 1]


def load(split: Split) -> tuple[Tensor, Tensor]:
    """The normalised float32 images [N, 1, 28, 28] of ``split`` and their int64 labels [N]."""
    with np.load(ARCHIVE) as archive:
        images = torch.from_numpy(archive["images"][SPLITS[split]])
        labels = torch.from_numpy(archive["labels"][SPLITS[split]])
    return (images[:, None].float() / 255 - MEAN) / STD, labels.long()


def batches(split: Split, size: int = 64, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """The images and labels of ``split`` in shuffled batches; each iteration is one new epoch."""
    return DataLoader(
        TensorDataset(*load(split)),
        batch_size=size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


def calibration() -> tuple[Tensor, ...]:
    """160 images of the split ``calibration`` in batches of 32, no labels: for fxmerge on the command line."""
    images, _ = load("calibration")
    return images[:160].chunk(5)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split = "test") -> float:
    """The share of the digits of ``split`` that ``model`` classifies right in eval mode."""
    images, labels = load(split)
    training = model.training
    model.eval()
    predictions = torch.cat([model(part).argmax(1) for part in images.chunk(10)])
    model.train(training)
    return float((predictions == labels).float().mean())
