"""The digits example: its data, its checkpoint and its training loop."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

from data import accuracy, batches, calibration, load
from model import DigitsResNet, pretrained
from train import shift, train


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ("train", [784, 882, 805, 828, 789, 679, 811, 882, 755, 785]),
        ("calibration", [83, 110, 95, 129, 96, 75, 100, 106, 93, 113]),
        ("test", [217, 245, 186, 204, 191, 184, 203, 188, 189, 193]),
    ],
)
def test_split_has_its_images_and_labels(split, counts):
    images, labels = load(split)
    assert images.shape == (sum(counts), 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == counts
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_no_test_digit_is_a_training_digit():
    train_digits = {image.numpy().tobytes() for image in load("train")[0]}
    test_digits = {image.numpy().tobytes() for image in load("test")[0]}
    assert len(train_digits) == 8000
    assert len(test_digits) == 2000
    assert not train_digits & test_digits


def test_batches_are_seeded_and_reshuffled_every_epoch():
    data = batches("calibration", size=300, seed=5)
    first, second = (torch.cat([labels for _, labels in data]) for _ in range(2))
    again = torch.cat([labels for _, labels in batches("calibration", size=300, seed=5)])
    assert [len(labels) for _, labels in data] == [300, 300, 300, 100]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, load("calibration")[1].sort().values)


def test_calibration_batches_are_the_first_images_without_labels():
    parts = calibration()
    assert [part.shape for part in parts] == [(32, 1, 28, 28)] * 5
    assert torch.equal(torch.cat(parts), load("calibration")[0][:160])


def test_shift_moves_each_image_and_fills_with_background():
    image = torch.zeros(1, 1, 28, 28)
    image[..., 10, 12] = 1.0
    moved = shift(image.expand(200, -1, -1, -1) - 0.5, torch.Generator().manual_seed(0))
    _, _, rows, columns = (moved > 0).nonzero(as_tuple=True)
    assert len(rows) == 200
    assert rows.unique().tolist() == [8, 9, 10, 11, 12]
    assert columns.unique().tolist() == [10, 11, 12, 13, 14]
    assert moved.unique().tolist() == [-0.5, 0.5]


def test_network_has_21_convolutions():
    convolutions = [m for m in DigitsResNet().modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 21
    assert sum(p.numel() for p in DigitsResNet().parameters()) == 272_186


def test_checkpoint_has_the_stated_accuracy():
    model = pretrained().train()
    assert accuracy(model, "test") > 0.987  # the README states 98.95 %
    assert model.training
    nn.init.zeros_(model.classifier.weight)
    assert accuracy(model, "test") < 0.2


@torch.no_grad()
def loss_with_batch_statistics(model, images, labels):
    return float(F.cross_entropy(copy.deepcopy(model).train()(images), labels))


def test_one_short_epoch_lowers_the_loss():
    torch.manual_seed(0)
    model = DigitsResNet(width=4)
    images, labels = (tensor[:320] for tensor in load("train"))
    data = DataLoader(TensorDataset(images, labels), batch_size=16)

    before = loss_with_batch_statistics(model, images, labels)
    (mean,) = train(model, data, epochs=1, rate=0.1)
    after = loss_with_batch_statistics(model, images, labels)
    assert 2.2 < before < 2.8  # chance is log 10 = 2.30
    assert after < before - 0.3
    assert after < mean < before
