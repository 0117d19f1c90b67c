"""Three trained networks on real images, for benchmarks/quality.py and estimators.py: denoising photographs, and digits made hard.

Nothing is downloaded: photographs are those inside scikit-image and scikit-learn, the digits those of examples/digits. Digits are
turned, scaled and moved, and covered with noise, so that networks do not get all of them right.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

from data import load
from model import DigitsResNet
from own_networks import DnCNN

from fxmerge.calibration import eval_mode

__all__ = ["STEPS", "TASKS", "Task", "batches", "finetune", "photograph_crops", "trained"]

STEPS, RATE = 60, 1e-3
"""Of a short fine-tuning: optimizer steps, and the learning rate that they begin with."""

PHOTOGRAPHS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "moon.png",
    "rocket.jpg",
    "page.png",
)
COLOURED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
HELD_BACK = ("china.jpg", "flower.jpg")
SIGMA = 25 / 255
"""Standard deviation of the noise that is to be removed, for pixels in [0, 1]."""
NOISE = 1.6
"""Of the noise on digits, whose own standard deviation is 1."""


@dataclass(frozen=True, slots=True)
class Task:
    """A network, its images, and what it is judged by.

    Attributes:
        make: the untrained network.
        train: inputs and targets to train and calibrate with.
        test: fresh ones.
        calibration: inputs of the size of the test images, without targets.
        loss: of outputs and targets.
        metric: of all outputs and targets of the test images, larger is better.
        unit: of the metric.
        epochs: to train the original.
        rate: its learning rate.
        batch: images that are timed at once.
        size: images of a training step.
        polish: steps of polish; about half a minute, up to a minute where kernels are large, on one core.
        baselines_exclude: submodules in which baselines change nothing.
    """

    make: Callable[[], nn.Module]
    train: Callable[[], tuple[Tensor, Tensor]]
    test: Callable[[], tuple[Tensor, Tensor]]
    calibration: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], float]
    unit: str
    epochs: int
    rate: float
    batch: int
    size: int
    polish: int
    baselines_exclude: tuple[str, ...] = ()

    def outputs(self, model: nn.Module) -> Tensor:
        """What a network gives for the test images, in eval mode."""
        with eval_mode(model), torch.no_grad():
            return torch.cat([model(part) for part in torch.split(self.test()[0], 100)])

    def quality(self, model: nn.Module) -> float:
        """The metric of a network."""
        return self.metric(self.outputs(model), self.test()[1])


# --- photographs ------------------------------------------------------------------------------------------------------


def _photographs(names: tuple[str, ...]) -> list[Tensor]:
    """Grey images in [0, 1], at half their size."""
    import skimage.data
    from skimage.color import rgb2gray
    from skimage.io import imread
    from sklearn.datasets import load_sample_image

    folder, found = Path(skimage.data.__file__).parent, []
    for name in names:
        image = load_sample_image(name) if name in HELD_BACK else imread(folder / name)
        grey = rgb2gray(image[..., :3]) if image.ndim == 3 else image / 255.0
        found.append(F.avg_pool2d(torch.tensor(np.asarray(grey), dtype=torch.float32)[None, None], 2)[0])
    return found


def _noisy(names: tuple[str, ...], size: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = _photographs(names)
    patches = []
    for number in range(count):
        image = images[number % len(images)]
        top, left = (int(torch.randint(side - size, (1,), generator=draw)) for side in image.shape[1:])
        patches.append(image[:, top : top + size, left : left + size])
    clean = torch.stack(patches)
    return clean + SIGMA * torch.randn(clean.shape, generator=draw), clean


def photograph_crops(count: int, size: int) -> Tensor:
    """Colour crops (count, 3, size, size) of the photographs that are large enough, of about unit variance."""
    import skimage.data
    from skimage.io import imread

    folder, draw = Path(skimage.data.__file__).parent, torch.Generator().manual_seed(0)
    images = [torch.tensor(imread(folder / name)[..., :3]).movedim(2, 0).float() for name in COLOURED]
    crops = []
    for number in range(count):
        image = images[number % len(images)]
        top, left = (int(torch.randint(side - size, (1,), generator=draw)) for side in image.shape[1:])
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops) / 64 - 2


@functools.cache
def _noisy_train() -> tuple[Tensor, Tensor]:
    return _noisy(PHOTOGRAPHS, 40, 1600, 0)


@functools.cache
def _noisy_test() -> tuple[Tensor, Tensor]:
    return _noisy(HELD_BACK, 80, 60, 1)


def _noisy_calibration() -> Tensor:
    return _noisy(PHOTOGRAPHS, 80, 128, 2)[0]


def _psnr(found: Tensor, clean: Tensor) -> float:
    return -10 * math.log10(float((found - clean).square().mean()))


# --- digits -----------------------------------------------------------------------------------------------------------


def _hard(images: Tensor, seed: int) -> Tensor:
    """Digits turned by up to 40 degrees, scaled by 0.7 to 1.2, moved by up to 4 pixels, under noise."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=draw)

    angle, scale = uniform(-0.7, 0.7), 1 / uniform(0.7, 1.2)
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), uniform(-0.28, 0.28)], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(-0.28, 0.28)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    background = float(images.min())
    moved = F.grid_sample(images - background, grid, align_corners=False) + background
    return moved + NOISE * torch.randn(images.shape, generator=draw)


@functools.cache
def _digits(split: str) -> tuple[Tensor, Tensor]:
    images, labels = load("train" if split == "train" else "test")
    return _hard(images, 20 if split == "train" else 10), labels


def _accuracy(found: Tensor, labels: Tensor) -> float:
    return 100 * float((found.argmax(1) == labels).double().mean())


class MobileNet(nn.Module):
    """MobileNetV2 of half width for images of 28x28: eleven inverted residual blocks, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        plan = [(1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 3, 2), (6, 32, 3, 1), (6, 48, 2, 1)]
        layers: list[nn.Module] = [_conv(1, 16, 3)]
        width = 16
        for expand, channels, repeats, stride in plan:
            for number in range(repeats):
                layers.append(Inverted(width, channels, expand, stride if number == 0 else 1))
                width = channels
        self.features = nn.Sequential(*layers, _conv(width, 160, 1))
        self.classifier = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 28, 28] to logits [N, 10]."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class Inverted(nn.Module):
    """Sandler et al. 2018, figure 4: expand, depthwise 3x3, project; a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expand
        front = [_conv(inputs, wide, 1)] if expand > 1 else []
        project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.body = nn.Sequential(*front, _conv(wide, wide, 3, stride, wide), project)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y: Tensor = self.body(x)
        return x + y if self.skips else y


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


# --- training ---------------------------------------------------------------------------------------------------------

_DIGITS = (
    lambda: _digits("train"),
    lambda: _digits("test"),
    lambda: _digits("train")[0][:2048],
    F.cross_entropy,
    _accuracy,
    "%",
)

TASKS: dict[str, Task] = {
    "DnCNN": Task(
        lambda: DnCNN(depth=12, width=32),
        _noisy_train,
        _noisy_test,
        _noisy_calibration,
        F.mse_loss,
        _psnr,
        "dB",
        8,
        2e-3,
        1,
        16,
        100,
        ("noise.32",),  # of all that they can make of it, returning the noisy image is nearest to its outputs
    ),
    "ResNet-20": Task(DigitsResNet, *_DIGITS, 5, 3e-3, 16, 64, 300),
    "MobileNetV2": Task(MobileNet, *_DIGITS, 6, 3e-3, 16, 64, 300),
}


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in a new order."""
    images, targets = task.train()
    for rows in torch.split(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)), task.size):
        yield images[rows], targets[rows]


def finetune(network: nn.Module, task: Task, seed: int) -> None:
    """A short pass with targets, in place: what every method gets that is compared; the network is left in eval mode."""
    parameters = list(network.parameters())
    if not parameters:  # all of it was dropped
        return
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    network.train()
    for images, targets in itertools.islice(batches(task, 7777 + seed), STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(network(images), targets))
        optimizer.step()
        schedule.step()
    network.eval()


def trained(name: str, seed: int, folder: Path) -> nn.Module:
    """The network of a task, trained with that seed; its weights are kept in ``folder``."""
    task, path = TASKS[name], folder / f"{name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model: nn.Module = task.make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's signatures lack it
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    steps = task.epochs * sum(1 for _ in batches(task, 0))
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=steps)
    for epoch in range(task.epochs):
        for images, targets in batches(task, 1000 * seed + epoch):
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model(images), targets))
            optimizer.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model.eval()
