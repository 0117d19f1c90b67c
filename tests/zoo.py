"""The networks that the end-to-end tests and the benchmarks compress.

``NETWORKS[name](size=64, seed=0)`` builds one with seeded random weights; :func:`calibrate` gives
its batch norms the statistics of random images. Without them the output of a deep network hardly
depends on its input, and even a mirrored kernel goes unnoticed; :func:`dependence` measures that.

The classifiers are the published ones, with 1000 classes, from ``pytorchcv`` (a development
dependency: ``pip install --no-deps pytorchcv``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from pytorchcv.models.mobilenetv2 import mobilenetv2b_w1
from pytorchcv.models.preresnet import preresnet18
from pytorchcv.models.resnet import resnet18, resnet34, resnet50
from pytorchcv.models.vgg import bn_vgg16b
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NETWORKS", "DnCNN", "Factory", "calibrate", "dependence", "image_shape", "seed_images"]

STRIDE = 32
"""Every classifier divides height and width by this before its global pooling or first linear."""


class Factory(Protocol):
    """Builds a network, in eval mode, with the random weights of ``seed``.

    ``size`` is the height and width in pixels of its images, a multiple of 32.
    """

    def __call__(self, size: int = 224, seed: int = 0) -> nn.Module: ...


class DnCNN(nn.Module):
    """The grayscale denoiser DnCNN: predicts the noise in ``x`` [N, 1, H, W] and subtracts it.

    Conv-ReLU, ``depth - 2`` times conv-BN-ReLU, conv; all 3x3 (Zhang et al., "Beyond a Gaussian
    Denoiser", 2017, section III).
    """

    def __init__(self, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = self.noise(x)
        return x - noise


def _dncnn(size: int) -> nn.Module:  # noqa: ARG001 - fully convolutional: any size fits
    return DnCNN()


def _vgg16_bn(size: int) -> nn.Module:
    model: nn.Module = bn_vgg16b(in_size=(size, size))
    first = model.get_submodule("output.fc1")
    first.fc = nn.Linear(512 * (size // STRIDE) ** 2, 4096)
    return model


def _pooled(build: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    """The network of ``build`` with its last pooling, 7x7 as published, fitted to the size."""

    def fitted(size: int) -> nn.Module:
        model = build(in_size=(size, size))
        features = model.get_submodule("features")
        features.final_pool = nn.AvgPool2d(size // STRIDE, stride=1)
        return model

    return fitted


def _seeded(build: Callable[[int], nn.Module]) -> Factory:
    def factory(size: int = 224, seed: int = 0) -> nn.Module:
        if size < STRIDE or size % STRIDE:
            raise ValueError(f"size is {size}, must be a positive multiple of {STRIDE}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(size).eval()

    return factory


NETWORKS: dict[str, Factory] = {
    "vgg16_bn": _seeded(_vgg16_bn),
    "resnet18": _seeded(_pooled(resnet18)),
    "resnet34": _seeded(_pooled(resnet34)),
    "resnet50": _seeded(_pooled(resnet50)),
    "mobilenet_v2": _seeded(_pooled(mobilenetv2b_w1)),
    "preact_resnet": _seeded(_pooled(preresnet18)),
    "dncnn": _seeded(_dncnn),
}


def image_shape(name: str, batch: int, size: int = 224) -> tuple[int, int, int, int]:
    """The input shape [N, C, H, W] of the network called ``name``."""
    return batch, 1 if name == "dncnn" else 3, size, size


def seed_images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random images of ``shape`` [N, C, H, W]: independent standard normal pixels."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def calibrate(model: nn.Module, shape: tuple[int, ...], passes: int = 12, seed: int = 0) -> nn.Module:
    """Set the batch-norm statistics of ``model``, in place, to those of random images.

    They become the average over ``passes`` train-mode passes, each over fresh images of ``shape``
    [N, C, H, W]. Returns the model in eval mode; momenta and global random state stay as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average, instead of an exponential one
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for index in range(passes):
            model(seed_images(shape, seed + index))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@torch.no_grad()
def dependence(model: nn.Module, shape: tuple[int, ...], seed: int = 1000) -> float:
    """The share of the output that depends on the input: max |y - mean y| / max |y|.

    The mean is over a batch of random images of ``shape`` [N, C, H, W], N at least two.
    """
    output: Tensor = model(seed_images(shape, seed))
    return float((output - output.mean(0)).abs().max() / output.abs().max())
