"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture(scope="session")
def pixels():
    """scikit-learn's digits: 1,797 images of 8x8 pixels, and their labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(y)


@pytest.fixture(scope="session")
def train_on_digits(pixels):
    """Makes a network and trains it for seconds on the first 1,200 of them; the same every time."""
    x, y = pixels

    def train(make, epochs=4, size=100):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(epochs):
            for rows in torch.randperm(1200).split(size):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        return model.eval()

    return train


@pytest.fixture(scope="session")
def digits_chain(train_on_digits):
    """Six convolutions of 3x3, each with batch norm and ReLU, trained on digits; not to be changed."""

    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    def make():
        blocks = [block(1, 8), *(block(8, 8) for _ in range(5))]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))

    return train_on_digits(make)


@pytest.fixture
def one_thread():
    """As many torch threads here as workers take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
