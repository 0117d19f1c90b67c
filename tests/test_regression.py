"""The regression: the true convolution found again, against dense least squares, and never worse than the prior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxmerge import regression
from fxmerge.algebra import ConvMap, Geometry
from fxmerge.regression import FEW_ROWS, STRENGTHS, Moments, fit_convolution, moments_bytes, patches

GEOMETRIES = {
    "1d": (Geometry(3, 4, (5,), (1,), (1,), (2,), (2,), 1), (20,)),
    "2d": (Geometry(3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (8, 8)),
    "3d": (Geometry(2, 3, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1), (5, 4, 6)),
    "stride": (Geometry(3, 4, (3, 3), (2, 3), (1, 1), (1, 1), (1, 1), 1), (13, 13)),
    "dilation": (Geometry(3, 4, (3, 2), (1, 2), (2, 3), (2, 0), (2, 0), 1), (10, 11)),
    "groups": (Geometry(6, 4, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 2), (8, 8)),
    "depthwise": (Geometry(4, 8, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 4), (8, 8)),
    "rectangular": (Geometry(3, 4, (1, 5), (1, 1), (1, 1), (0, 2), (0, 2), 1), (7, 9)),
    "asymmetric": (Geometry(3, 4, (3, 3), (1, 2), (1, 1), (2, 0), (0, 1), 1), (8, 9)),
    "crop": (Geometry(3, 4, (2, 2), (1, 1), (1, 1), (-1, 1), (1, -2), 1), (9, 9)),
}
each_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name, images=24, seed=0):
    """A random convolution, images, and what it makes of them."""
    geometry, size = GEOMETRIES[name]
    truth = ConvMap(geometry, draw(*geometry.weight_shape, seed=seed + 1), draw(geometry.out_channels, seed=seed + 2))
    x = 0.3 + draw(images, geometry.in_channels, *size, seed=seed + 3)
    return truth, x, truth.apply(x)


def moments(geometry, x, target):
    found = Moments(geometry)
    found.add(x, target)
    return found


def as_columns(geometry, weight, bias):
    """Weights as Moments has them: (groups, unknowns, outputs), the bias last."""
    shape = geometry.groups, geometry.out_channels // geometry.groups, -1
    return torch.cat([weight.reshape(shape), bias.reshape(shape)], 2).transpose(1, 2)


# --- patches ----------------------------------------------------------------------------------------------------------


@each_geometry
def test_patches_times_weights_are_the_convolution(name):
    truth, x, y = made(name, 3)
    geometry = truth.geometry
    rows = patches(x, geometry)
    columns = as_columns(geometry, truth.weight, truth.bias)
    found = rows @ columns[:, :-1] + columns[:, -1:]
    expected = y.flatten(2).unflatten(1, (geometry.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (rows.flip(2) @ columns[:, :-1] + columns[:, -1:] - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["2d", "stride", "dilation", "groups", "rectangular"])
def test_patches_are_those_of_unfold(name):
    geometry, size = GEOMETRIES[name]
    x = draw(3, geometry.in_channels, *size)
    options = {"dilation": geometry.dilation, "padding": geometry.left, "stride": geometry.stride}
    expected = F.unfold(x, geometry.kernel, **options).unflatten(1, (geometry.groups, -1))
    assert torch.equal(patches(x, geometry), expected.permute(1, 0, 3, 2).flatten(1, 2))


# --- the fit ----------------------------------------------------------------------------------------------------------


@each_geometry
def test_the_true_convolution_is_found_again(name):
    truth, x, y = made(name, 40)
    _, fresh, fresh_y = made(name, 8, seed=10)
    held_out = moments(truth.geometry, fresh, truth.apply(fresh))
    fitted = moments(truth.geometry, x, y)
    assert fitted.rows / fitted.inputs.shape[1] > FEW_ROWS
    nothing = torch.zeros_like(truth.weight), torch.zeros_like(truth.bias)
    fit = fit_convolution(fitted, held_out, *nothing, strengths=(1e-13,))
    torch.testing.assert_close(fit.weight, truth.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(fit.bias, truth.bias, rtol=0, atol=1e-10)
    assert (fit.error < 1e-15, fit.strength) == (True, 1e-13)
    assert fit.prior_error > 0.9  # zeros are no better than the mean
    wrong = fit_convolution(fitted, moments(truth.geometry, fresh, fresh_y), *nothing, strengths=(1e-13,))
    assert wrong.error > 0.1 or wrong.strength is None  # another convolution's targets to choose by


@each_geometry
def test_chunks_add_up_to_the_whole(name, monkeypatch):
    truth, x, y = made(name)
    whole = moments(truth.geometry, x, y)
    parts = Moments(truth.geometry)
    for part, target in zip(x.split(7), y.split(7), strict=True):
        parts.add(part, target)
    monkeypatch.setattr(regression, "_CHUNK", 1)
    single = moments(truth.geometry, x, y)
    for other in (parts, single):
        assert other.rows == whole.rows == y[:, 0].numel()
        for one, two in (
            (other.inputs, whole.inputs),
            (other.products, whole.products),
            (other.targets, whole.targets),
        ):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-10)


@each_geometry
def test_the_error_is_the_squared_error_of_the_convolution(name):
    truth, x, _ = made(name, 6)
    target = truth.apply(x) + draw(*truth.apply(x).shape, seed=7) + 5.0
    other = ConvMap(truth.geometry, draw(*truth.weight.shape, seed=8), truth.bias + 4.0)
    found = moments(truth.geometry, x, target).error(as_columns(truth.geometry, other.weight, other.bias))
    mean = target.mean([0, *range(2, target.ndim)], keepdim=True)
    expected = (other.apply(x) - target).square().sum() / (target - mean).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-10)
    shifted = moments(truth.geometry, x, target).error(as_columns(truth.geometry, other.weight, other.bias + 0.1))
    assert abs(shifted - found) > 1e-3


@pytest.mark.parametrize("towards", [False, True], ids=["zero", "prior"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_ridge_is_the_least_squares_solution_of_the_augmented_system(strength, towards):
    truth, x, y = made("groups", 4)
    geometry = truth.geometry
    target = y + draw(*y.shape, seed=5)
    prior = as_columns(geometry, draw(*geometry.weight_shape, seed=6), draw(geometry.out_channels, seed=7))
    found = moments(geometry, x, target).solve(strength, prior if towards else None)
    wanted = target.flatten(2).unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    for group, rows in enumerate(patches(x, geometry)):
        pull = strength * float(rows.square().sum(0).mean())
        strengths = np.sqrt([pull] * rows.shape[1] + [1e-9 * pull])
        matrix = np.vstack([np.hstack([rows.numpy(), np.ones((len(rows), 1))]), np.diag(strengths)])
        start = prior[group].numpy() if towards else np.zeros(tuple(prior[group].shape))
        right = np.vstack([wanted[group].numpy(), strengths[:, None] * start])
        expected = np.linalg.lstsq(matrix, right, rcond=None)[0]
        np.testing.assert_allclose(found[group].numpy(), expected, rtol=0, atol=1e-10)
        free = np.linalg.lstsq(matrix[: len(rows)], right[: len(rows)], rcond=None)[0]
        assert np.abs(found[group].numpy() - free).max() > 1e-6  # without the ridge it is another one


def test_of_all_strengths_the_best_on_held_out_images_is_taken():
    truth, x, y = made("2d", 6)
    geometry = truth.geometry
    fitted = moments(geometry, x, y + 3 * draw(*y.shape, seed=4))
    fresh = draw(8, 3, 8, 8, seed=9)
    held_out = moments(geometry, fresh, truth.apply(fresh))
    nothing = torch.zeros_like(truth.weight), torch.zeros_like(truth.bias)
    fit = fit_convolution(fitted, held_out, *nothing)
    errors = {s: fit_convolution(fitted, held_out, *nothing, strengths=(s,)).error for s in STRENGTHS}
    assert fit.error == min(errors.values()) == errors[fit.strength]
    assert len(set(errors.values())) == len(STRENGTHS)


def test_moments_take_the_bytes_that_were_promised():
    for geometry, _ in GEOMETRIES.values():
        found = Moments(geometry)
        real = sum(t.numel() * t.element_size() for t in (found.inputs, found.products, found.targets))
        assert moments_bytes(geometry) == real


# --- few rows ---------------------------------------------------------------------------------------------------------


def block(channels, seed):
    """Two convolutions with a ReLU between, and what they compose to without it, cut down to the inner kernel."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False).double() for _ in range(2)]
    first, second = (layer.weight.detach() * 2**0.5 for layer in layers)
    whole = F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2).transpose(0, 1)

    def original(x):
        return F.conv2d(F.relu(F.conv2d(x, first, padding=1)), second, padding=1)

    return original, 0.5 * whole[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("rows_per_unknown", [0.3, 1.0, 3.0])
def test_with_few_rows_the_installed_weights_are_never_worse_than_the_prior(rows_per_unknown):
    """Where plain least squares is far worse; on images that had no part in the choice the mean is better, too."""
    channels, size = 8, 5
    geometry = Geometry(channels, channels, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1)
    images = max(1, round(rows_per_unknown * (9 * channels + 1) / size**2))
    installed, priors, plain = [], [], []
    for seed in range(30):
        original, prior = block(channels, seed)
        x, held_out, fresh = (draw(n, channels, size, size, seed=7 * seed + k) for k, n in enumerate((images, 3, 200)))
        fitted, chooser, judge = (moments(geometry, each, original(each)) for each in (x, held_out, fresh))
        fit = fit_convolution(fitted, chooser, prior, torch.zeros(channels))
        found = F.conv2d(held_out, fit.weight, fit.bias, padding=1) - original(held_out)
        composed = F.conv2d(held_out, prior, padding=1) - original(held_out)
        assert found.square().sum() <= composed.square().sum() * (1 + 1e-12)
        assert fit.rows_per_unknown == pytest.approx(images * size**2 / (9 * channels + 1))
        installed.append(judge.error(as_columns(geometry, fit.weight, fit.bias)))
        priors.append(judge.error(as_columns(geometry, prior, torch.zeros(channels))))
        plain.append(judge.error(fitted.solve(1e-9)))
    assert np.mean(installed) < np.mean(priors)
    assert sum(a > b for a, b in zip(installed, priors, strict=True)) <= 1
    assert np.mean(plain) > 1.1 * np.mean(installed)


@pytest.mark.parametrize("good", [True, False])
def test_a_ridge_draws_towards_the_prior_or_towards_zero_as_held_out_images_say(good):
    """So strong a ridge leaves nothing of the images: near the truth the prior is better, far from it zero is."""
    truth, x, y = made("2d", 4)
    prior = truth.weight + 0.01 if good else -10 * truth.weight
    fitted = moments(truth.geometry, x, y)
    fit = fit_convolution(fitted, fitted, prior, truth.bias + 1e3, strengths=(1e6,))
    assert fit.strength == 1e6
    torch.testing.assert_close(fit.weight, prior if good else torch.zeros_like(prior), rtol=0, atol=1e-4)


def test_the_prior_stays_where_nothing_is_better():
    truth, x, y = made("2d", 4)
    noisy = moments(truth.geometry, x, y + 10 * draw(*y.shape, seed=5))
    fit = fit_convolution(noisy, moments(truth.geometry, x, y), truth.weight, truth.bias)
    assert torch.equal(fit.weight, truth.weight)
    assert torch.equal(fit.bias, truth.bias)
    assert fit.strength is None
    assert fit.error == fit.prior_error < 1e-14


def test_a_target_that_does_not_vary_and_an_input_without_values_give_finite_numbers():
    truth, x, y = made("2d", 4)
    constant = moments(truth.geometry, x, torch.full_like(y, 3.0))
    fit = fit_convolution(constant, constant, truth.weight, truth.bias)
    assert math.isfinite(fit.prior_error)
    torch.testing.assert_close(fit.weight, torch.zeros_like(fit.weight), rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.bias, torch.full_like(fit.bias, 3.0), rtol=0, atol=1e-6)
    dead = moments(truth.geometry, torch.zeros_like(x), y)
    fit = fit_convolution(dead, dead, truth.weight, truth.bias)
    assert fit.weight.isfinite().all()
    assert fit.error == pytest.approx(1.0)  # the bias alone


def test_what_stands_for_the_target_may_be_a_linear_layer():
    x, weight, bias = draw(80, 5), draw(3, 5, seed=1), draw(3, seed=2)
    pointwise = Geometry.pointwise(5, 3, 1)
    found = moments(pointwise, x[..., None], (x @ weight.T + bias)[..., None])
    fit = fit_convolution(found, found, torch.zeros(3, 5, 1), torch.zeros(3), strengths=(1e-13,))
    torch.testing.assert_close(fit.weight[..., 0], weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(fit.bias, bias, rtol=0, atol=1e-10)
