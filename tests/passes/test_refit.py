"""Refit: what is fitted to what, in which order, what is refused, and what it is worth on a trained network."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL,
    Add,
    Gate,
    candidates,
    captured,
    conv,
    full_merge,
    head,
    images,
    lively,
    output_error,
    random_plan,
    relaxed,
    residual,
    small,
    value_of,
)
from torch import nn

import fxmerge
from fxmerge import regression
from fxmerge.calibration import Calibration, read_calibration
from fxmerge.checks import outputs_of, relative_error
from fxmerge.estimators import distance
from fxmerge.graph import by_id, clone, convolutions, graph_meta, module_of, node_id
from fxmerge.linear import conv_geometry
from fxmerge.passes import RefitPass, RelaxPass
from fxmerge.passes import refit as module
from fxmerge.passes.fold import fold_segments
from fxmerge.passes.refit import Reuse, known_inputs, refit, refit_alone
from fxmerge.regression import FEW_ROWS, Regression, Wanted
from fxmerge.result import merge_graph


def calibration(gm, count=40, seed=3, dtype=torch.float64, shape=(3, 12, 12)):
    x = images(count, *shape, seed=seed).to(dtype)
    return read_calibration([x], None, gm, ((x[:2],), {}))


def refitted(gm, *chosen, data=None, memory="2GiB"):
    """A relaxed and refitted copy, and what was fitted."""
    found = relaxed(gm, *chosen)
    return found, RefitPass(gm, data or calibration(gm), memory)(found).fits


def composed(gm, *chosen):
    """The same with the weights that the segments compose to."""
    found = relaxed(gm, *chosen)
    fold_segments(found)
    return found


def fit_images(data):
    return torch.cat([batch[0][0] for batch in data.fit])


def weights_of(gm):
    return {name: tensor.clone() for name, tensor in gm.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- what is fitted ---------------------------------------------------------------------------------------------------


def linear_chain():
    inner = [conv(4, 5, act=False), conv(5, 5, p=0, act=False), conv(5, 6, 2, s=2, p=0, act=False), nn.ReLU()]
    return nn.Sequential(conv(3, 4), *inner, head(6))


class Blind(Regression):
    """A regression that knows no prior weights."""

    def fit(self, wanted):
        def blind(each):
            side = None if each.side is None else 0 * each.side
            return each._replace(weight=0 * each.weight, bias=0 * each.bias, side=side)

        return super().fit([blind(each) for each in wanted])


def test_a_segment_that_is_linear_already_is_found_again(monkeypatch):
    """By the regression alone, whatever the composed weights are: borders, batch norms, stride and bias included."""
    x = images(2, 3, 12, 12)
    gm = captured(lively(linear_chain()), x)
    candidate = next(c for c in candidates(gm, max_kernel=9) if c.kept == ("1.0", "2.0", "3.0") and not c.removed)

    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    with monkeypatch.context() as patch:
        patch.setattr(module, "Regression", Blind)
        found, fits = refitted(gm, candidate)
    assert fits[0].fitted
    assert fits[0].error < 1e-15
    assert output_error(found, gm, x) < 1e-8
    monkeypatch.setattr(regression, "STRENGTHS", (1e3,))
    kept, fits = refitted(gm, candidate)
    assert (fits[0].fitted, fits[0].error < 1e-15) == (False, True)  # nothing is better than what it composes to
    assert output_error(kept, gm, x) < 1e-8


@pytest.mark.parametrize(("excite", "least", "most"), [(0.0, 0.0, 1e-15), (1.0, 1e-4, 0.02)])
def test_the_fit_learns_the_weights_that_a_gate_gives_to_channels(monkeypatch, excite, least, most):
    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    x = images(2, 3, 12, 12)
    model = lively(nn.Sequential(conv(3, 4), conv(4, 6, act=False), Gate(6), conv(6, 5, 1, p=0), head(5)))
    model[2].excite.weight.data.mul_(excite)  # where it is 0 the channels of all images are weighed alike
    gm = captured(model, x)
    candidate = next(c for c in candidates(gm, max_kernel=3) if c.kept == ("1.0", "3.0") and c.cuts)
    _, fits = refitted(gm, candidate)
    assert fits[0].fitted
    assert fits[0].composed_error > 0.1
    assert least <= fits[0].error < most


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=["group", "instance"])
def test_the_fit_learns_what_a_norm_does_to_all_images(monkeypatch, norm):
    """Each image is another turned, so that the norm is one affine map: a merge without it is exact, and leaves it out."""
    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    x, draw = images(1, 3, 12, 12), torch.Generator().manual_seed(4)
    turned = torch.cat([x.flatten(2)[..., torch.randperm(144, generator=draw)].reshape(x.shape) for _ in range(40)])
    layers = nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 5, 3), nn.ReLU(), head(5)
    gm = captured(lively(nn.Sequential(*layers)), turned[:2])
    (candidate,) = (c for c in candidates(gm, norms_go=True) if c.kept == ("0", "2"))
    data = read_calibration([turned], None, gm, ((turned[:2],), {}))
    found, fits = refitted(gm, candidate, data=data)
    assert fits[0].composed_error > 0.1
    assert fits[0].error < 1e-15
    assert output_error(found, gm, turned) < 1e-8


def by_hand(gm, found, prior, name, data, *, skip=True, inputs=None):
    """The fit of one convolution from values of two whole networks: ``found`` is what was refitted, or ``inputs``."""
    node = by_id(found)[name]
    norm = next(iter(node.users))
    reader = next(iter(norm.users))
    (source,) = node.all_input_nodes
    segment_exit = by_id(gm)[node.meta["fxmerge"]["exit"]]
    geometry = conv_geometry(module_of(found, node))
    parts = []
    for batches in (data.fit, data.held_out):
        pairs = []
        for (x,), _ in batches:
            target = value_of(gm, segment_exit, x)
            if skip:
                other = next(each for each in reader.all_input_nodes if each is not norm)
                target = value_of(gm, by_id(gm)[node_id(reader)], x) - value_of(found, other, x)
            network = inputs or found
            pairs.append((value_of(network, by_id(network)[node_id(source)], x), [target]))
        parts.append(pairs)
    start = module_of(prior, by_id(prior)[name])
    return Regression(geometry, *parts).fit([Wanted(geometry, 0, start.weight, start.bias)])[0]


def two_merges():
    """A network, a merge in front, and one inside a residual block whose skip the first one changes."""
    stem = nn.Sequential(conv(3, 4), conv(4, 4))
    gm = captured(lively(nn.Sequential(stem, residual(4, 4), head(4))), images(2, 3, 12, 12))
    return gm, [merge_to(gm, "0.1.1", 2), merge_to(gm, "1.0.left.1.1", 2)]


def merge_to(gm, exit_, count):
    """The merge that ends there and keeps so many convolutions, all of its own."""
    return next(c for c in candidates(gm) if c.exit == exit_ and len(c.kept) == count and not c.bypassed)


def test_the_target_makes_good_what_went_wrong_in_the_skip():
    gm, chosen = two_merges()
    data = calibration(gm)
    found, fits = refitted(gm, *chosen, data=data)
    name = "1.0.left.0.0"
    assert [each.name for each in fits] == ["0.0.0", name, "2.2"]
    installed = module_of(found, by_id(found)[name])
    expected = by_hand(gm, found, composed(gm, *chosen), name, data)
    torch.testing.assert_close(installed.weight.detach(), expected.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(installed.bias.detach(), expected.bias, rtol=0, atol=1e-10)
    assert fits[1].error == pytest.approx(expected.error, rel=1e-8)
    without = by_hand(gm, found, composed(gm, *chosen), name, data, skip=False)
    assert (installed.weight - without.weight).abs().max() > 1e-3


def test_the_input_is_what_the_compressed_network_in_front_gives():
    gm, chosen = two_merges()
    data = calibration(gm)
    found, _ = refitted(gm, *chosen, data=data)
    name = "1.0.left.0.0"
    from_original = by_hand(gm, found, composed(gm, *chosen), name, data, inputs=gm)
    unfitted = by_hand(gm, found, composed(gm, *chosen), name, data, inputs=composed(gm, *chosen))
    installed = module_of(found, by_id(found)[name]).weight
    assert (installed - from_original.weight).abs().max() > 1e-3
    assert (installed - unfitted.weight).abs().max() > 1e-3


def test_of_two_segments_that_are_added_the_later_one_makes_good():
    both = Add(*(nn.Sequential(conv(4, 4), conv(4, 4, act=False)) for _ in range(2)))
    gm = captured(lively(nn.Sequential(conv(3, 4), both, nn.ReLU(), head(4))), images(2, 3, 12, 12))
    chosen = [merge_to(gm, f"1.{side}.1.1", 2) for side in ("right", "left")]
    data = calibration(gm)
    found, fits = refitted(gm, *chosen, data=data)
    assert {each.name for each in fits[:2]} == {"1.right.0.0", "1.left.0.0"}
    for name, skip in ((fits[0].name, False), (fits[1].name, True)):
        installed = module_of(found, by_id(found)[name]).weight.detach()
        right, wrong = (by_hand(gm, found, composed(gm, *chosen), name, data, skip=s) for s in (skip, not skip))
        torch.testing.assert_close(installed, right.weight, rtol=0, atol=1e-10)
        assert (installed - wrong.weight).abs().max() > 1e-3


class Broadcast(nn.Module):
    """A gate of one pixel that is added to a whole map: its sum is no target for it."""

    def __init__(self):
        super().__init__()
        self.pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.wide, self.last = conv(3, 4), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.last(F.relu(self.pooled(x.mean((2, 3), keepdim=True)) + self.wide(x)))


def test_a_sum_of_another_shape_is_no_target():
    gm = captured(lively(Broadcast()), images(2, 3, 12, 12))
    candidate = next(c for c in candidates(gm) if c.kept == ("pooled.0", "pooled.2"))
    _, fits = refitted(gm, candidate)
    assert fits[0].error < 0.1 * fits[0].composed_error


# --- the batch norm behind --------------------------------------------------------------------------------------------


def test_the_norm_behind_changes_nothing_and_is_folded_away():
    gm, x = small("residual")
    found, fits = refitted(gm, full_merge(gm))
    name = fits[0].name
    nodes = by_id(found)
    node, norm = nodes[name], nodes[f"{name}_norm"]
    fresh = images(8, 3, 12, 12, seed=9)
    inside, behind = value_of(found, node, fresh), value_of(found, norm, fresh)
    torch.testing.assert_close(behind, inside, rtol=0, atol=1e-10)
    layer = module_of(found, norm)
    assert (layer.weight - 1).abs().max() > 0.01  # it has something to undo
    merged = merge_graph(found)
    kinds = Counter(type(each).__name__ for each in merged.modules())
    assert kinds["BatchNorm2d"] == 0
    assert kinds["Conv2d"] == sum(1 for _ in convolutions(merge_graph(composed(gm, full_merge(gm)))))
    assert output_error(merged, found, x) < 1e-10
    layer.bias.data += 0.1
    assert output_error(merged, found, x) > 1e-3


def test_train_mode_starts_from_the_statistics_of_the_images():
    gm, _ = small("chain")
    data = calibration(gm)
    found, fits = refitted(gm, full_merge(gm), data=data)
    name = fits[0].name
    node, layer = by_id(found)[name], copy.deepcopy(found.get_submodule(f"{name}_norm"))
    inside = value_of(found, node, fit_images(data))
    torch.testing.assert_close(layer.running_mean, inside.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_var, inside.var((0, 2, 3), correction=0), rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.train()(inside), inside, rtol=0, atol=1e-8)


def test_a_name_that_is_taken_is_left_alone():
    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.conv_norm, self.pool = nn.Conv2d(4, 5, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, x):
            return self.pool(self.conv_norm(F.relu(self.second(F.relu(self.conv(x))))))

    x = images(2, 3, 12, 12)
    gm = captured(lively(Taken()), x)
    found, _ = refitted(gm, next(c for c in candidates(gm) if c.kept == ("conv", "second")))
    assert isinstance(found.conv_norm, nn.Conv2d)
    assert torch.equal(found.conv_norm.weight, gm.conv_norm.weight)
    assert isinstance(found.conv_norm_1, nn.BatchNorm2d)
    assert output_error(merge_graph(found), found, x) < 1e-10


def test_the_norm_has_as_many_axes_as_the_convolution():
    for dims, layer, norm in ((1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)):
        size = (9,) * dims
        model = nn.Sequential(layer(3, 4, 3, padding=1), nn.ReLU(), layer(4, 4, 3, stride=2), nn.ReLU(), layer(4, 2, 1))
        gm = captured(lively(model), images(2, 3, *size))
        data = calibration(gm, shape=(3, *size))
        found, fits = refitted(gm, next(c for c in candidates(gm) if c.kept == ("0", "2")), data=data)
        assert isinstance(found.get_submodule("0_norm"), norm)
        assert fits[0].error < fits[0].composed_error


# --- the last linear layer --------------------------------------------------------------------------------------------


def test_the_last_linear_layer_is_fitted_to_the_originals_outputs():
    gm, _ = small("chain")
    data = calibration(gm, 60)
    found, fits = refitted(gm, full_merge(gm), data=data)
    assert [each.name for each in fits[1:]] == ["4.2"]
    node = by_id(found)["4.2"]
    (source,) = node.all_input_nodes
    geometry = conv_geometry(nn.Conv1d(6, 5, 1))
    parts = [
        [(value_of(found, source, x)[..., None], [outputs_of(gm, ((x,), {}))[0][..., None]]) for (x,), _ in batches]
        for batches in (data.fit, data.held_out)
    ]
    old = gm.get_submodule("4.2")
    expected = Regression(geometry, *parts).fit([Wanted(geometry, 0, old.weight[..., None], old.bias)])[0]
    installed = found.get_submodule("4.2")
    torch.testing.assert_close(installed.weight.detach(), expected.weight[..., 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(installed.bias.detach(), expected.bias, rtol=0, atol=1e-10)
    assert fits[1].error < fits[1].composed_error
    assert not torch.equal(installed.weight, old.weight)


def test_a_last_layer_that_is_called_twice_or_not_alone_is_left():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Sequential(conv(3, 4), conv(4, 4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(F.relu(self.fc(self.body(x).mean((2, 3)))))

    class Two(Twice):
        def forward(self, x):
            y = self.body(x)
            return self.fc(y.mean((2, 3))), y

    for model in (Twice(), Two()):
        gm = captured(lively(model), images(2, 3, 12, 12))
        found, fits = refitted(gm, full_merge(gm))
        assert [each.name for each in fits] == ["body.0.0"]
        assert torch.equal(found.fc.weight, gm.fc.weight)


def test_last_false_leaves_the_last_layer():
    gm, _ = small("chain")
    data = calibration(gm)
    found = relaxed(gm, full_merge(gm))
    fits = refit(gm, found, known_inputs(gm, data.fit), known_inputs(gm, data.held_out), last=False)
    assert [each.name for each in fits] == ["0.0"]
    assert torch.equal(found.get_submodule("4.2").weight, gm.get_submodule("4.2").weight)


# --- kept convolutions ------------------------------------------------------------------------------------------------


def with_kept(gm, chosen, data, may=lambda _: True):
    found = relaxed(gm, *chosen)
    return found, refit(gm, found, known_inputs(gm, data.fit), known_inputs(gm, data.held_out), kept=may)


def test_kept_convolutions_behind_a_change_are_fitted_to_what_they_gave():
    gm = captured(
        lively(nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 6), conv(6, 6, g=2), head(6))), images(2, 3, 12, 12)
    )
    chosen, data = merge_to(gm, "1.1", 2), calibration(gm, 200)
    without, _ = refitted(gm, chosen, data=data)
    found, fits = with_kept(gm, [chosen], data)
    assert [each.name for each in fits] == ["0.0", "2.0", "3.0", "4.2"]
    assert all(each.fitted and each.error < each.composed_error for each in fits)
    fresh = images(60, 3, 12, 12, seed=11)
    after, before = (
        distance(outputs_of(each, ((fresh,), {})), outputs_of(gm, ((fresh,), {}))) for each in (found, without)
    )
    assert after < before
    node, old = by_id(found)["2.0"], gm.get_submodule("2.0")
    (source,) = node.all_input_nodes
    parts = [
        [(value_of(found, source, x), [value_of(gm, by_id(gm)["2.0"], x)]) for (x,), _ in batches]
        for batches in (data.fit, data.held_out)
    ]
    geometry = conv_geometry(old)
    expected = Regression(geometry, *parts).fit([Wanted(geometry, 0, old.weight, torch.zeros(6, dtype=torch.float64))])[
        0
    ]
    installed = found.get_submodule("2.0")
    torch.testing.assert_close(installed.weight.detach(), expected.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(installed.bias.detach(), expected.bias, rtol=0, atol=1e-10)  # it had none before
    assert old.bias is None
    assert isinstance(installed.bias, nn.Parameter)
    assert output_error(merge_graph(found), found, fresh) < 1e-10


def test_kept_convolutions_in_front_or_outside_of_the_limits_stay():
    gm, _ = two_merges()
    data = calibration(gm)
    chosen = merge_to(gm, "1.0.left.1.1", 2)
    found, fits = with_kept(gm, [chosen], data)
    assert [each.name for each in fits] == ["1.0.left.0.0", "2.2"]
    assert all(
        torch.equal(found.get_submodule(name).weight, gm.get_submodule(name).weight) for name in ("0.0.0", "0.1.0")
    )
    first = merge_to(gm, "0.1.1", 2)
    asked = []
    _, fits = with_kept(gm, [first], data, lambda name: asked.append(name) or name != "1.0.left.1.0")
    assert "1.0.left.1.0" in asked
    assert "1.0.left.0.0" in [each.name for each in fits]
    assert "1.0.left.1.0" not in [each.name for each in fits]


# --- what is refused --------------------------------------------------------------------------------------------------


def keeps_composed(gm, chosen, data, memory="2GiB"):
    """The reason, after a check that the weights are those of the fold, bit by bit, without a norm behind."""
    found, fits = refitted(gm, chosen, data=data, memory=memory)
    first = fits[0]
    prior = composed(gm, chosen).get_submodule(first.name)
    assert torch.equal(found.get_submodule(first.name).weight, prior.weight)
    assert torch.equal(found.get_submodule(first.name).bias, prior.bias)
    assert f"{first.name}_norm" not in dict(found.named_modules())
    assert (first.fitted, first.error) == (False, 0.0)
    return first.reason


def test_a_norm_that_returns_behind_the_segment():
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    gm = captured(lively(nn.Sequential(*layers, nn.ReLU(), head(4))), images(2, 3, 12, 12))
    candidate = next(c for c in candidates(gm) if c.norm)
    assert keeps_composed(gm, candidate, calibration(gm)) == f"the norm {candidate.norm!r} stands behind it"


def test_an_activation_that_was_put_behind_it():
    model = nn.Sequential(conv(3, 4), conv(4, 4, act=False), nn.AvgPool2d(2), head(4))
    gm = captured(lively(model), images(2, 3, 12, 12))
    candidate = next(c for c in candidates(gm, exit_activation=True) if c.activation)
    assert keeps_composed(gm, candidate, calibration(gm)) == "an activation was put behind it"


class Timed(nn.Module):
    """Two convolutions with an embedding of a second input between them, in a residual block, and a norm if wanted."""

    def __init__(self, norm=nn.Identity, act=False):
        super().__init__()
        self.stem, self.time, self.act = conv(3, 4), nn.Linear(2, 4), act
        self.first, self.norm = conv(4, 4, act=False), norm()
        self.second = nn.Conv2d(4, 4, 1)
        self.head = head(4)

    def forward(self, x, t):
        x = self.stem(x)
        y = self.norm(self.first(x) + self.time(t)[:, :, None, None])
        return self.head(F.relu(x + self.second(F.silu(y) if self.act else y)))


def timed(**options):
    """Captured, with one candidate, and calibration images with their embeddings."""
    x = images(40, 3, 12, 12), images(40, 2, seed=5)
    gm = clone(fxmerge.capture(lively(Timed(**options)), tuple(each[:2] for each in x))).eval()
    merges = candidates(gm, norms_go=True)
    candidate = next(c for c in merges if c.kept == ("first.0", "second") and not c.bypassed and c.norm is None)
    return gm, candidate, read_calibration([x], None, gm, (tuple(each[:2] for each in x), {})), x


def test_the_matrix_of_a_side_input_is_fitted_with_the_convolution(monkeypatch):
    """All of it is linear: blind, it is found again, by the sum that it goes into."""
    monkeypatch.setattr(regression, "STRENGTHS", (1e-13,))
    monkeypatch.setattr(module, "Regression", Blind)
    gm, candidate, data, x = timed()
    found, fits = refitted(gm, candidate, data=data)
    assert (fits[0].fitted, fits[0].error < 1e-15, fits[0].composed_error > 0.5) == (True, True, True)
    assert found.get_submodule("first.0_side").weight.abs().min() > 1e-3
    expected = outputs_of(gm, (x, {}))
    assert relative_error(outputs_of(found, (x, {})), expected) < 1e-8
    assert relative_error(outputs_of(found, ((x[0], x[1] + 1.0), {})), expected) > 1e-3
    assert relative_error(outputs_of(merge_graph(found), (x, {})), expected) < 1e-8


def test_with_a_side_input_a_fit_is_better_than_what_it_composes_to_and_shared_between_plans():
    gm, candidate, data, _ = timed(norm=lambda: nn.GroupNorm(2, 4), act=True)
    found, fits = refitted(gm, candidate, data=data)
    assert fits[0].fitted
    assert fits[0].error < 0.5 * fits[0].composed_error
    parts = [known_inputs(gm, part) for part in (data.fit, data.held_out)]
    assert not refit_alone(gm, [candidate], *parts)
    reuse = Reuse((candidate,))
    networks = [relaxed(gm, candidate) for _ in range(2)]
    for network in networks:
        refit(gm, network, *parts, reuse=reuse)
    assert len(reuse.fits) == 1
    assert same(weights_of(networks[0]), weights_of(networks[1]))
    assert same(weights_of(networks[0]), weights_of(found))


def test_what_does_not_fit_into_memory_is_solved_iteratively_and_about_as_well():
    gm, _ = small("chain")
    wide, fits = refitted(gm, full_merge(gm), memory="1GiB")
    narrow, tight = refitted(gm, full_merge(gm), memory=1000)
    assert [each.reason for each in (*fits, *tight)] == [""] * 4
    assert not same(weights_of(wide), weights_of(narrow))
    assert tight[0].error < min(1.1 * fits[0].error, tight[0].composed_error)


# --- one candidate alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_candidates_that_are_fitted_together_are_what_each_is_alone(name, monkeypatch):
    """The same rows for all: then only the batch norm behind, and the last layer, are not there."""
    monkeypatch.setattr(regression, "_ENOUGH_ROWS", 10**6)
    gm, x = small(name)
    data = calibration(gm, 20)
    merges = candidates(gm, "merge")
    parts = [known_inputs(gm, part) for part in (data.fit, data.held_out)]
    together = refit_alone(gm, merges, *parts)
    assert len(together) >= 2
    for candidate in merges:
        found = relaxed(gm, candidate)
        fits = refit(gm, found, *parts, last=False)
        assert (candidate in together) == (fits[0].reason == "" and candidate in together)
        if candidate in together:
            assert output_error(together[candidate], found, x) < 1e-6
    assert all(parameter.grad is None for parameter in gm.parameters())


def test_candidates_that_cannot_be_fitted_are_left_out():
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    gm = captured(lively(nn.Sequential(*layers, nn.ReLU(), head(4))), images(2, 3, 12, 12))
    merges = candidates(gm, "merge")
    data = calibration(gm)
    found = refit_alone(gm, merges, *(known_inputs(gm, part) for part in (data.fit, data.held_out)))
    assert [candidate for candidate in merges if candidate not in found] == [c for c in merges if c.norm]


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_original_and_the_images_stay_to_the_bit(training):
    """Also one in train mode, whose batch norms would learn from every forward pass."""
    model = lively(SMALL["residual"]()).train(training)
    gm = clone(fxmerge.capture(model, images(2, 3, 12, 12)))
    data = calibration(gm)
    before, inputs = weights_of(gm), fit_images(data).clone()
    found, fits = refitted(gm, full_merge(gm), data=data)
    assert fits[0].fitted
    assert same(weights_of(gm), before)
    assert torch.equal(fit_images(data), inputs)
    assert {each.training for each in gm.modules()} == {each.training for each in found.modules()} == {training}
    with torch.no_grad():
        for tensor in (*found.parameters(), *found.buffers()):
            tensor.zero_()
    assert same(weights_of(gm), before)


@pytest.mark.parametrize("name", SMALL)
def test_any_plan_is_refitted_to_the_network_that_it_composes_to(name):
    """The same convolutions when merged, so that a latency measured with composed weights holds; and twice the same."""
    gm, x = small(name)
    data = calibration(gm, 20)

    def merged_geometries(network):
        return sorted(str(conv_geometry(layer)) for _, layer in convolutions(merge_graph(network)))

    for seed in range(3):
        plan = random_plan(gm, seed)
        (found, fits), (again, same_fits) = (refitted(gm, *plan, data=data) for _ in range(2))
        assert same(weights_of(found), weights_of(again))
        assert fits == same_fits
        assert len(fits) == sum(each.kind == "merge" for each in plan) + 1
        assert merged_geometries(found) == merged_geometries(relaxed(gm, *plan))
        assert output_error(merge_graph(found), found, x) < 1e-9
        assert "segments" not in graph_meta(found)


def test_without_merged_segments_nothing_is_fitted():
    gm, _ = small("residual")
    for chosen in ((), candidates(gm, "bypass")[:1], candidates(gm, "drop")[:1]):
        found = RelaxPass(tuple(chosen))(clone(gm)).graph_module
        before = weights_of(found)
        outcome = RefitPass(gm, calibration(gm))(found)
        assert (outcome.modified, outcome.fits) == (False, ())
        assert same(weights_of(found), before)


def test_a_bfloat16_network_is_fitted_as_well_as_its_numbers_allow():
    double, _ = small("residual")
    model = lively(SMALL["residual"]()).to(torch.bfloat16)
    gm = captured(model, images(2, 3, 12, 12).bfloat16())
    data = calibration(gm, dtype=torch.bfloat16)
    found, fits = refitted(gm, full_merge(gm), data=data)
    assert {tensor.dtype for tensor in found.parameters()} == {torch.bfloat16}
    _, exact = refitted(double, full_merge(double))
    assert fits[0].error == pytest.approx(exact[0].error, rel=0.05)
    fresh = ((images(20, 3, 12, 12, seed=9).bfloat16(),), {})
    reference = outputs_of(gm, fresh)
    plain = distance(outputs_of(composed(gm, full_merge(gm)), fresh), reference)
    assert distance(outputs_of(found, fresh), reference) < plain / 3


# --- a trained network ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(pixels, train_on_digits):
    """A small ResNet, trained for seconds on scikit-learn's digits of 8x8 pixels."""

    def make():
        model = nn.Sequential(conv(1, 8), residual(8, 8), residual(8, 16, s=2), residual(16, 16), head(16))
        model[-1][-1] = nn.Linear(16, 10)
        return model

    (x, y), model = pixels, train_on_digits(make)
    gm = captured(model, x[:2])
    data = read_calibration([x[:300]], None, gm, ((x[:2],), {}))
    with torch.no_grad():
        correct = float((model(x[1200:]).argmax(1) == y[1200:]).double().mean())
    return SimpleNamespace(model=model, gm=gm, data=data, fresh=((x[1200:],), {}), labels=y[1200:], correct=correct)


def test_refitted_weights_are_far_better_on_fresh_images(digits):
    from fxmerge.fitting import apply_candidates

    assert digits.correct > 0.9
    reference = outputs_of(digits.gm, digits.fresh)
    found = {"compose": [], "refit": []}
    for candidate in candidates(digits.gm)[::3]:
        for fit, distances in found.items():
            network, _ = apply_candidates(digits.gm, (candidate,), digits.data, fit)
            distances.append(distance(outputs_of(network.eval(), digits.fresh), reference))
    better = np.mean([a < b for a, b in zip(found["refit"], found["compose"], strict=True)])
    assert len(found["refit"]) >= 10
    assert better > 0.9
    assert np.mean(found["refit"]) < np.mean(found["compose"]) / 2


def test_every_fit_is_no_worse_than_composed_on_the_held_out_images(digits):
    for seed in range(3):
        for each in refitted(digits.gm, *random_plan(digits.gm, seed), data=digits.data)[1]:
            assert each.error <= each.composed_error
            assert each.fitted == (each.error < each.composed_error)


@pytest.mark.parametrize(("count", "fitted"), [(2, False), (40, True)])
def test_one_batch_that_cannot_be_split_serves_as_both_where_it_has_rows_enough(count, fitted):
    gm, _ = small("chain")
    batch = ((images(count, 3, 12, 12),), {})
    _, fits = refitted(gm, full_merge(gm), data=Calibration((batch,), (batch,), count, truncated=False))
    assert (fits[0].rows_per_unknown > FEW_ROWS, fits[0].fitted) == (fitted, fitted)
    assert fits[0].fitted is (fits[0].error < fits[0].composed_error)
