"""Trains the ResNet-20 on the digits and writes resnet20.safetensors: python train.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from data import accuracy, batches
from model import CHECKPOINT, DigitsResNet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.data import DataLoader

__all__ = ["shift", "train"]


def shift(images: Tensor, generator: torch.Generator, by: int = 2) -> Tensor:
    """Each image [N, 1, H, W] moved by up to ``by`` pixels each way, background moving in."""
    height, width = images.shape[2:]
    padded = F.pad(images, (by, by, by, by), value=float(images.min()))
    corners = torch.randint(2 * by + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack(
        [image[:, top : top + height, left : left + width] for image, (top, left) in zip(padded, corners, strict=True)]
    )


def train(
    model: nn.Module,
    data: DataLoader[tuple[Tensor, ...]],
    epochs: int,
    rate: float = 0.2,
    seed: int = 0,
) -> Iterator[float]:
    """Train ``model`` in place for ``epochs``; yields the mean loss of each epoch as it ends.

    SGD with Nesterov momentum, the learning rate rising to ``rate`` and falling to almost zero.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs=epochs, steps_per_epoch=len(data))
    model.train()
    for _ in range(epochs):
        losses = []
        for images, labels in data:
            loss = F.cross_entropy(model(shift(images, generator)), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield sum(losses) / len(losses)


def main(epochs: int = 12) -> None:
    """Train with fixed seeds, report, and save the checkpoint."""
    torch.set_num_threads(2)  # the order of sums, and with it the last digits, depends on it
    torch.manual_seed(0)
    # Convolutions train faster channels-last on a CPU.
    model = DigitsResNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's signatures lack it
    for epoch, loss in enumerate(train(model, batches("train"), epochs), start=1):
        print(f"epoch {epoch:2d} of {epochs}  loss {loss:.4f}", flush=True)
    print(f"accuracy on the test digits: {accuracy(model):.2%}")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, CHECKPOINT)


if __name__ == "__main__":
    main()
