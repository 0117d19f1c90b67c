"""The test networks are the published ones, seeded, and their outputs depend on their inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import NETWORKS, calibrate, dependence, image_shape, seed_images

PARAMETERS = {
    "vgg16_bn": 138_365_992,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_503_872,  # 3,504,872 with the bias that pytorchcv leaves out of its classifier
    "preact_resnet": 11_687_848,
    "dncnn": 556_097,
}
CONVOLUTIONS = {
    "vgg16_bn": 13,
    "resnet18": 20,
    "resnet34": 36,
    "resnet50": 53,
    "mobilenet_v2": 53,  # its classifier is a convolution
    "preact_resnet": 20,
    "dncnn": 17,
}


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_published_one(name):
    with torch.device("meta"):
        model = NETWORKS[name]()
        output = model(torch.empty(image_shape(name, 2)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(convolutions(model)) == CONVOLUTIONS[name]
    assert output.shape == ((2, 1, 224, 224) if name == "dncnn" else (2, 1000))
    assert not model.training


@pytest.mark.parametrize("name", NETWORKS)
def test_calibrated_output_depends_on_the_input_and_shows_a_mirrored_kernel(name):
    shape = image_shape(name, 2, size=64)
    model = calibrate(NETWORKS[name](size=64), shape, passes=4)
    # DnCNN's output is its input less a noise estimate: the estimate is what must depend on it.
    assert dependence(model.noise if name == "dncnn" else model, shape) > 0.05

    images = seed_images(shape, seed=7)
    spatial = [conv for conv in convolutions(model) if conv.kernel_size != (1, 1)]
    with torch.no_grad():
        expected = model(images)
        spatial[len(spatial) // 2].weight.copy_(spatial[len(spatial) // 2].weight.flip(-1))
        change = (model(images) - expected).abs().max()
    assert change / (expected - expected.mean(0)).abs().max() > 0.01


def test_dependence_tells_an_uncalibrated_network_apart():
    # Under torch's default weights and fresh statistics activations shrink from layer to layer.
    noise = NETWORKS["dncnn"](size=32).noise
    shape = image_shape("dncnn", 2, size=32)
    assert dependence(noise, shape) < 1e-4
    assert dependence(calibrate(noise, shape, passes=4), shape) > 0.05


def test_same_seed_gives_the_same_network_and_leaves_the_global_state():
    before = torch.get_rng_state()
    one, same, other = (NETWORKS["resnet18"](size=32, seed=seed) for seed in (3, 3, 4))
    shape = image_shape("resnet18", 2, size=32)
    for model in (one, same, other):
        calibrate(model, shape, passes=2)
    images = seed_images(shape)
    assert torch.equal(one(images), same(images))
    assert not torch.allclose(one(images), other(images))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, seed_images(shape))
    assert not torch.equal(images, seed_images(shape, seed=1))


def test_calibrate_averages_batch_statistics_with_equal_weight():
    norm = nn.BatchNorm2d(3, momentum=0.3)
    shape = (4, 3, 8, 8)
    calibrate(norm, shape, passes=3, seed=50)  # earlier statistics must leave no trace
    assert calibrate(norm, shape, passes=5, seed=2) is norm
    batches = [seed_images(shape, seed) for seed in range(2, 7)]
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(norm.running_var, variance, atol=1e-6, rtol=0)
    assert norm.momentum == 0.3
    assert not norm.training


def test_dependence_is_the_largest_deviation_over_the_largest_output():
    class Offset(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)) + 10

    shape = (2, 1, 4, 4)
    a, b = seed_images(shape, seed=1000).mean((1, 2, 3)).tolist()
    assert dependence(Offset(), shape) == pytest.approx(abs(a - b) / 2 / (10 + max(a, b)), rel=1e-4)


@pytest.mark.parametrize("size", [0, 100])
def test_size_must_be_a_multiple_of_32(size):
    with pytest.raises(ValueError, match=f"size is {size}, must be a positive multiple of 32"):
        NETWORKS["resnet18"](size=size)


def test_networks_need_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; import zoo"
    subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parent, check=True
    )
