"""The regression: the true convolution found again, against dense least squares, and never worse than the prior."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxmerge import regression
from fxmerge.algebra import ConvMap, Geometry
from fxmerge.regression import FEW_ROWS, STRENGTHS, Regression, Wanted, patches, window_of

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
SYSTEMS = ("_Normal", "_Dual", "_Iterative")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name, images=24, seed=0):
    """A random convolution, images, and what it makes of them."""
    geometry, size = GEOMETRIES[name]
    truth = ConvMap(geometry, draw(*geometry.weight_shape, seed=seed + 1), draw(geometry.out_channels, seed=seed + 2))
    x = 0.3 + draw(images, geometry.in_channels, *size, seed=seed + 3)
    return truth, x, truth.apply(x)


def fit(geometry, fitted, held_out, weight=None, bias=None, memory=2**31):
    """One convolution fitted to (input, target), chosen by another pair."""
    weight = torch.zeros(geometry.weight_shape, dtype=torch.float64) if weight is None else weight
    bias = torch.zeros(geometry.out_channels, dtype=torch.float64) if bias is None else bias
    found = Regression(geometry, [(fitted[0], [fitted[1]])], [(held_out[0], [held_out[1]])], memory)
    return found.fit([Wanted(geometry, 0, weight, bias)])[0]


def error_of(convolution, x, target):
    mean = target.mean([0, *range(2, target.ndim)], keepdim=True)
    return float((convolution.apply(x) - target).square().sum() / (target - mean).square().sum())


def as_columns(geometry, weight, bias):
    """Weights and biases as rows of patches meet them: (groups, unknowns, outputs), the bias last."""
    shape = geometry.groups, geometry.out_channels // geometry.groups, -1
    return torch.cat([weight.reshape(shape), bias.reshape(shape)], 2).transpose(1, 2)


def as_rows(target, groups):
    return target.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@pytest.fixture(params=SYSTEMS)
def system(request, monkeypatch):
    """Every fit by one of the three systems, whatever the sizes."""
    made_by = {
        "_Normal": lambda rows, _: regression._Normal(rows),
        "_Dual": lambda rows, _: regression._Dual(rows),
        "_Iterative": regression._Iterative,
    }[request.param]

    def make(self, fitted):
        return made_by(regression._Stored(self.window, fitted, 10**9), self)

    monkeypatch.setattr(Regression, "_make", make)
    monkeypatch.setattr(regression, "_STEPS", 400)
    return request.param


# --- patches ----------------------------------------------------------------------------------------------------------


@each_geometry
def test_patches_times_weights_are_the_convolution(name):
    truth, x, y = made(name, 3)
    geometry = truth.geometry
    rows = patches(x, geometry)
    columns = as_columns(geometry, truth.weight, truth.bias)
    found = rows @ columns[:, :-1] + columns[:, -1:]
    torch.testing.assert_close(found, as_rows(y, geometry.groups), rtol=0, atol=1e-12)
    assert (rows.flip(2) @ columns[:, :-1] + columns[:, -1:] - found).abs().max() > 0.1


@pytest.mark.parametrize("name", ["2d", "stride", "dilation", "groups", "rectangular"])
def test_patches_are_those_of_unfold(name):
    geometry, size = GEOMETRIES[name]
    x = draw(3, geometry.in_channels, *size)
    options = {"dilation": geometry.dilation, "padding": geometry.left, "stride": geometry.stride}
    expected = F.unfold(x, geometry.kernel, **options).unflatten(1, (geometry.groups, -1))
    assert torch.equal(patches(x, geometry), expected.permute(1, 0, 3, 2).flatten(1, 2))


@each_geometry
def test_chosen_patches_are_rows_of_all_of_them(name):
    geometry, size = GEOMETRIES[name]
    x = draw(3, geometry.in_channels, *size)
    whole = patches(x, geometry)
    chosen = torch.tensor([0, 7, 5, whole.shape[1] - 1])
    assert torch.equal(patches(x, geometry, chosen), whole[:, chosen])


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_the_window_of_several_kernels_holds_the_patches_of_each(stride, dilation):
    kernels = [
        Geometry(2, 3, (k, k), (stride,) * 2, (dilation,) * 2, (p, p), (p, p), 1)
        for k, p in ((3, dilation), (5, 2 * dilation), (1, 0))
    ]
    window = window_of(kernels)
    assert window.kernel == (5, 5)
    x = draw(2, 2, 11, 12)
    for geometry in kernels:
        assert geometry.out_size((11, 12)) == window.out_size((11, 12))
        columns = regression._columns(window, geometry)
        assert torch.equal(patches(x, window)[..., columns], patches(x, geometry))
    other = Geometry(2, 3, (3, 3), (stride,) * 2, (dilation,) * 2, (0, 0), (2 * dilation,) * 2, 1)
    assert window_of([*kernels, other]) is not None  # further to the right
    x = draw(2, 2, 11, 12)
    wider = window_of([*kernels, other])
    assert torch.equal(patches(x, wider)[..., regression._columns(wider, other)], patches(x, other))


def test_there_is_no_window_where_grids_or_outputs_differ():
    one = Geometry(4, 4, (3,), (1,), (1,), (1,), (1,), 1)
    others = [
        replace(one, stride=(2,)),
        replace(one, dilation=(2,), left=(2,), right=(2,)),
        replace(one, groups=2),
        replace(one, right=(0,)),  # one output fewer
        replace(one, in_channels=8),
    ]
    assert [window_of([one, other]) for other in others] == [None] * len(others)


def test_kernels_that_share_a_window_are_fitted_as_if_alone(monkeypatch):
    """The same rows, two targets: what one regression gives for both is what two give."""
    monkeypatch.setattr(regression, "_ENOUGH_ROWS", 10**6)  # all of them, whatever the window
    small = Geometry(2, 3, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1)
    large = Geometry(2, 4, (5, 5), (1, 1), (1, 1), (2, 2), (2, 2), 1)
    x, held_out = draw(6, 2, 9, 9), draw(3, 2, 9, 9, seed=1)
    maps = [ConvMap(g, draw(*g.weight_shape, seed=2), draw(g.out_channels, seed=3)) for g in (small, large)]

    def targets(images, seed):
        return [m.apply(images) + draw(*m.apply(images).shape, seed=seed + k) for k, m in enumerate(maps)]

    both = Regression(window_of([small, large]), [(x, targets(x, 5))], [(held_out, targets(held_out, 8))])
    for number, geometry in enumerate((small, large)):
        nothing = torch.zeros(geometry.weight_shape), torch.zeros(geometry.out_channels)
        found = both.fit([Wanted(geometry, number, *nothing)])[0]
        alone = fit(geometry, (x, targets(x, 5)[number]), (held_out, targets(held_out, 8)[number]))
        torch.testing.assert_close(found.weight, alone.weight, rtol=0, atol=1e-10)
        assert found.error == pytest.approx(alone.error, rel=1e-10)
        assert (found.strength, found.rows_per_unknown) == (alone.strength, alone.rows_per_unknown)


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [1, 4])
def test_few_rows_have_to_be_better_by_more_the_fewer_images_say_so(held_out, monkeypatch):
    truth, x, y = made("2d", 1)  # 64 rows for 28 unknowns
    fresh = draw(held_out, 3, 8, 8, seed=30)
    outcomes = set()
    for noise in np.linspace(0, 40, 21):
        pair = (x, y + noise * draw(*y.shape, seed=31)), (fresh, truth.apply(fresh))
        with monkeypatch.context() as patch:
            patch.setattr(regression, "FEW_ROWS", 0.0)
            best = fit(truth.geometry, *pair)
        found = fit(truth.geometry, *pair)
        assert found.rows_per_unknown < FEW_ROWS
        enough = best.error < held_out / (1 + held_out) * best.prior_error
        assert (found.error, found.strength is not None) == (
            (best.error, True) if enough else (best.prior_error, False)
        )
        outcomes.add((enough, best.strength is not None))
    assert outcomes >= {(True, True), (False, True)}


@pytest.mark.parametrize(("images", "installed"), [(2, False), (3, True)])
def test_images_say_nothing_of_few_rows_that_were_fitted_to_them(images, installed):
    """128 rows for 28 unknowns, or 192."""
    truth, x, y = made("2d", images)
    found = fit(truth.geometry, (x, y), (x, y))
    assert (found.rows_per_unknown > FEW_ROWS) is installed
    assert (found.strength is not None) is installed


@each_geometry
def test_the_true_convolution_is_found_again(name, system, monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    truth, x, y = made(name, 40)
    fresh = made(name, 8, seed=10)[1]
    found = fit(truth.geometry, (x, y), (fresh, truth.apply(fresh)))
    exact = 1e-10 if system == "_Normal" else 1e-6  # the dual has many more unknowns than it needs here
    torch.testing.assert_close(found.weight, truth.weight, rtol=0, atol=exact)
    torch.testing.assert_close(found.bias, truth.bias, rtol=0, atol=exact)
    assert (found.error < 1e-11, found.strength) == (True, 1e-13)
    assert found.rows_per_unknown > FEW_ROWS
    assert found.prior_error > 0.9  # zeros are no better than the mean
    wrong = fit(truth.geometry, (x, y), made(name, 8, seed=10)[1:])
    assert wrong.error > 0.1 or wrong.strength is None  # another convolution's targets to choose by


@each_geometry
def test_what_a_side_input_adds_is_found_again_with_the_convolution(name, system, monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    truth, x, y = made(name, 40)
    matrix, channels = draw(truth.geometry.out_channels, 3, seed=9), (..., *[None] * (x.ndim - 2))
    fresh = made(name, 8, seed=10)[1]

    def pair(images, convolved, seed):
        """Side inputs that go with the brightness of an image: each alone would be taken for the other."""
        side = images.flatten(1).mean(1, keepdim=True) + 0.1 * draw(len(images), 3, seed=seed)
        return (images, side), [convolved + (side @ matrix.T)[channels]]

    found = Regression(truth.geometry, [pair(x, y, 11)], [pair(fresh, truth.apply(fresh), 12)])
    nothing = torch.zeros_like(truth.weight), torch.zeros_like(truth.bias), torch.zeros_like(matrix)
    fitted = found.fit([Wanted(truth.geometry, 0, *nothing)])[0]
    exact = 1e-9 if system == "_Normal" else 1e-4
    torch.testing.assert_close(fitted.weight, truth.weight, rtol=0, atol=exact)
    torch.testing.assert_close(fitted.side, matrix, rtol=0, atol=exact)
    kept = found.fit([Wanted(truth.geometry, 0, truth.weight, truth.bias, matrix)])[0]
    assert kept.prior_error < 1e-25
    monkeypatch.setattr(regression, "STRENGTHS", (1e3,))
    kept = found.fit([Wanted(truth.geometry, 0, truth.weight, truth.bias, matrix)])[0]
    assert kept.strength is None
    assert torch.equal(kept.side, matrix)


@each_geometry
def test_errors_are_those_of_the_convolution(name):
    truth, x, y = made(name, 6)
    target = y + draw(*y.shape, seed=7) + 5.0
    prior = ConvMap(truth.geometry, draw(*truth.weight.shape, seed=8), truth.bias + 4.0)
    found = fit(truth.geometry, (x, target), (x, target), prior.weight, prior.bias)
    assert found.prior_error == pytest.approx(error_of(prior, x, target), rel=1e-10)
    installed = ConvMap(truth.geometry, found.weight, found.bias)
    assert found.error == pytest.approx(error_of(installed, x, target), rel=1e-10)
    assert found.error < found.prior_error / 2


@pytest.mark.parametrize("towards", [False, True], ids=["zero", "prior"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_ridge_is_the_least_squares_solution_of_the_augmented_system(strength, towards, system):
    """The bias is free: a column of ones without a ridge."""
    truth, x, y = made("groups", 4)
    geometry = truth.geometry
    target = y + draw(*y.shape, seed=5)
    prior = draw(*geometry.weight_shape, seed=6)
    start = as_columns(geometry, prior, torch.zeros(geometry.out_channels, dtype=torch.float64))
    found = Regression(geometry, [(x, [target])], [(x, [target])])
    columns = torch.arange(start.shape[1] - 1)
    solutions = list(found._system.solutions([0], [start[:, :-1]], columns))
    if system == "_Iterative":
        if not towards or strength != STRENGTHS[0]:
            pytest.skip("starts from the prior, with the weakest ridge")
        _, _, weight, bias = solutions[-1]
    else:
        _, _, weight, bias = [each for each in solutions if each[0] == strength][towards]
    for group, rows in enumerate(patches(x, geometry)):
        centred = rows - rows.mean(0)
        pull = strength * float(centred.square().sum(0).mean())
        matrix = np.vstack([np.hstack([rows.numpy(), np.ones((len(rows), 1))]), np.eye(rows.shape[1] + 1)])
        matrix[len(rows) :] *= np.sqrt(np.array([pull] * rows.shape[1] + [0.0]))[:, None]
        shift = start[group].numpy() * towards
        right = np.vstack([as_rows(target, 2)[group].numpy(), matrix[len(rows) :] @ shift])
        expected = np.linalg.lstsq(matrix, right, rcond=None)[0]
        exact = {"_Normal": 1e-10, "_Dual": 1e-8}.get(system)
        if exact is None:  # it stops early, as the held-out images say
            assert np.abs(weight[group].numpy() - expected[:-1]).max() < 0.02 * np.abs(expected).max()
        else:
            np.testing.assert_allclose(weight[group].numpy(), expected[:-1], rtol=0, atol=exact)
            np.testing.assert_allclose(bias[group].numpy(), expected[-1], rtol=0, atol=exact)
            free = np.linalg.lstsq(matrix[: len(rows)], right[: len(rows)], rcond=None)[0]
            assert np.abs(weight[group].numpy() - free[:-1]).max() > 1e-6  # without the ridge it is another one


def test_of_all_strengths_the_best_on_held_out_images_is_taken(monkeypatch):
    truth, x, y = made("2d", 6)
    fresh = draw(8, 3, 8, 8, seed=9)
    pairs = (x, y + 3 * draw(*y.shape, seed=4)), (fresh, truth.apply(fresh))
    best = fit(truth.geometry, *pairs)
    errors = {}
    for strength in STRENGTHS:
        monkeypatch.setattr(regression, "STRENGTHS", (strength,))
        errors[strength] = fit(truth.geometry, *pairs).error
    assert best.error == min(errors.values()) == errors[best.strength]
    assert len(set(errors.values())) == len(STRENGTHS)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_fifteen_rows_for_an_unknown_are_drawn_from_all_batches_and_the_same_every_time():
    truth, x, y = made("2d", 40)
    batches = list(zip(x.split(10), ([t] for t in y.split(10)), strict=True))
    stored = regression._Stored(truth.geometry, batches, 15 * 27)
    first, again = (list(stored) for _ in range(2))
    assert [rows.shape[1] for rows, _ in first] == [102] * 4  # a quarter each, rounded up
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    for (rows, (target,)), (images, _) in zip(first, batches, strict=True):
        everything = patches(images, truth.geometry)[0]
        places = (everything[:, None] == rows[0][None, :5]).all(2).double().argmax(0)
        assert len(set(places.tolist())) == 5
        assert torch.equal(target[0][:5], as_rows(truth.apply(images), 1)[0][places])
    found = Regression(truth.geometry, batches, batches[:1])
    assert found._system.rows == 408
    assert found.fit([Wanted(truth.geometry, 0, truth.weight, truth.bias)])[0].rows_per_unknown == 408 / 28


@pytest.mark.parametrize(("pixels", "batches"), [(1, 3), (2, 3), (4, 3), (8, 2)])
def test_more_images_than_there_are_rows_needed_are_not_computed(pixels, batches):
    """A quarter of an image's pixels is drawn, or one where there are four or fewer."""
    asked = []

    class Pairs(list):
        def __iter__(self):
            for number, pair in enumerate(super().__iter__()):
                asked.append(number)
                yield pair

    x = draw(400, 2, pixels)
    pairs = Pairs((part, [part]) for part in x.split(50))
    rows = list(regression._rows(Geometry.pointwise(2, 2, 1), pairs, 150 if pixels < 8 else 200))
    assert asked == list(range(batches))
    assert sum(inputs.shape[1] for inputs, _ in rows) == (150 if pixels < 8 else 200)


@each_geometry
def test_chunks_add_up_to_the_whole(name, monkeypatch):
    truth, x, y = made(name)
    whole = regression._Normal(regression._Stored(truth.geometry, [(x, [y])], 10**9))
    monkeypatch.setattr(regression, "_CHUNK", 1)
    monkeypatch.setattr(regression, "_BLOCK", 5)
    parts = list(zip(x.split(7), ([t] for t in y.split(7)), strict=True))
    single = regression._Normal(regression._Stored(truth.geometry, parts, 10**9))
    assert single.rows == whole.rows == y[:, 0].numel()
    torch.testing.assert_close(single.square, whole.square, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(single.products[0], whole.products[0], rtol=1e-12, atol=1e-9)


def test_memory_and_rows_say_which_system_is_solved():
    truth, x, y = made("2d", 40)  # 27 unknowns, 405 rows drawn
    small = x[:, :, :4, :4][:1], [truth.apply(x[:1, :, :4, :4])]  # 16 rows

    def system(pairs, memory):
        return type(Regression(truth.geometry, [pairs], [pairs], memory)._system).__name__

    assert system((x, [y]), 24 * 27**2) == "_Normal"
    assert system((x, [y]), 24 * 27**2 - 1) == "_Iterative"
    assert system(small, 16 * (4 * 27 + 24 * 16)) == "_Dual"
    assert system(small, 16 * (4 * 27 + 24 * 16) - 1) == "_Iterative"
    few = x[:1], [y[:1]]  # 64 rows, which take less memory than P'P
    kept, gathered = (Regression(truth.geometry, [few], [few], 64 * 4 * 27 - less) for less in (0, 1))
    assert (kept._system.source.kept is None, gathered._system.source.kept is None) == (False, True)
    asked = Wanted(truth.geometry, 0, torch.zeros_like(truth.weight), truth.bias)
    assert torch.equal(kept.fit([asked])[0].weight, gathered.fit([asked])[0].weight)


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


@pytest.mark.parametrize("memory", [2**31, 1000], ids=["closed form", "iterative"])
@pytest.mark.parametrize("rows_per_unknown", [0.3, 1.0, 3.0])
def test_with_few_rows_the_installed_weights_are_never_worse_than_the_prior(rows_per_unknown, memory):
    """Where plain least squares is far worse; on images that had no part in the choice the mean is better, too."""
    channels, size = 8, 5
    geometry = Geometry(channels, channels, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1)
    images = max(1, round(rows_per_unknown * (9 * channels + 1) / size**2))
    installed, priors, plain = [], [], []
    for seed in range(30):
        original, prior = block(channels, seed)
        x, held_out, fresh = (draw(n, channels, size, size, seed=7 * seed + k) for k, n in enumerate((images, 3, 200)))
        found = fit(geometry, (x, original(x)), (held_out, original(held_out)), prior, memory=memory)
        missing = F.conv2d(held_out, found.weight, found.bias, padding=1) - original(held_out)
        composed = F.conv2d(held_out, prior, padding=1) - original(held_out)
        assert missing.square().sum() <= composed.square().sum() * (1 + 1e-12)
        assert found.rows_per_unknown == pytest.approx(images * size**2 / (9 * channels + 1))
        installed.append(error_of(ConvMap(geometry, found.weight, found.bias), fresh, original(fresh)))
        priors.append(error_of(ConvMap(geometry, prior, found.bias * 0), fresh, original(fresh)))
        rows, target = patches(x, geometry)[0].numpy(), as_rows(original(x), 1)[0].numpy()
        free = torch.tensor(np.linalg.lstsq(rows, target, rcond=1e-9)[0]).T.reshape(geometry.weight_shape)
        plain.append(error_of(ConvMap(geometry, free, found.bias * 0), fresh, original(fresh)))
    assert np.mean(installed) < np.mean(priors)
    # 75 held-out pixels choose, and conjugate gradients offer them sixty choices.
    assert sum(a > b for a, b in zip(installed, priors, strict=True)) <= (1 if memory > 1000 else 5)
    assert np.mean(plain) > 1.1 * np.mean(installed)


@pytest.mark.parametrize("good", [True, False])
def test_a_ridge_draws_towards_the_prior_or_towards_zero_as_held_out_images_say(good, monkeypatch):
    """So strong a ridge leaves nothing of the images: near the truth the prior is better, far from it zero is."""
    monkeypatch.setattr(regression, "STRENGTHS", (1e6,))
    truth, x, y = made("2d", 4)
    prior = truth.weight + 0.01 if good else -10 * truth.weight
    found = fit(truth.geometry, (x, y), (x, y), prior, truth.bias + 1e3)
    assert found.strength == 1e6
    torch.testing.assert_close(found.weight, prior if good else torch.zeros_like(prior), rtol=0, atol=1e-4)


def test_the_prior_stays_where_nothing_is_better():
    truth, x, y = made("2d", 4)
    found = fit(truth.geometry, (x, y + 10 * draw(*y.shape, seed=5)), (x, y), truth.weight, truth.bias)
    assert torch.equal(found.weight, truth.weight)
    assert torch.equal(found.bias, truth.bias)
    assert found.strength is None
    assert found.error == found.prior_error < 1e-14


def test_a_target_that_does_not_vary_and_an_input_without_values_give_finite_numbers(system):
    truth, x, y = made("2d", 4)
    constant = x, torch.full_like(y, 3.0)
    found = fit(truth.geometry, constant, constant, truth.weight, truth.bias)
    assert math.isfinite(found.prior_error)
    torch.testing.assert_close(found.bias, torch.full_like(found.bias, 3.0), rtol=0, atol=1e-2)
    torch.testing.assert_close(found.weight, torch.zeros_like(found.weight), rtol=0, atol=1e-2)
    dead = torch.zeros_like(x), y
    found = fit(truth.geometry, dead, dead)
    assert found.weight.isfinite().all()
    if system != "_Iterative":
        assert found.error == pytest.approx(1.0)  # the bias alone


def test_what_stands_for_the_target_may_be_a_linear_layer(monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    x, weight, bias = draw(80, 5), draw(3, 5, seed=1), draw(3, seed=2)
    pair = x[..., None], (x @ weight.T + bias)[..., None]
    found = fit(Geometry.pointwise(5, 3, 1), pair, pair)
    torch.testing.assert_close(found.weight[..., 0], weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.bias, bias, rtol=0, atol=1e-10)
