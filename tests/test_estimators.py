"""Importance: shares against their analytic values, distortions against a plain computation."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmerge
from fxmerge.calibration import read_calibration
from fxmerge.candidates import Candidate
from fxmerge.checks import outputs_of
from fxmerge.errors import UserError
from fxmerge.estimators import (
    Distortion,
    Estimator,
    Local,
    Magnitude,
    distance,
    get_estimator,
    of_outputs,
    remember,
)
from fxmerge.evaluate import evaluate, recorder
from fxmerge.fitting import apply_candidates
from fxmerge.graph import by_id, changed_nodes, clone
from fxmerge.passes.enumerate_segments import enumerate_segments

RELU = 1 - (1 / 4) / (1 / 2 - 1 / (2 * math.pi))


def conv(i, o, s=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Module):
    """A residual block and a long skip, with logits and a map for outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.down = conv(3, 6), conv(6, 6), conv(6, 6)[:2], conv(6, 8, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.stem(x)
        y = F.relu(y + self.b(self.a(y)))
        z = self.down(y)
        return self.fc(z.mean((2, 3))), y + F.interpolate(z, scale_factor=2.0)[:, :6]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(4):
        model(torch.randn(8, 3, 8, 8))
    return clone(fxmerge.capture(model.eval(), torch.randn(2, 3, 8, 8)))


@pytest.fixture(scope="module")
def calibration(net):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(5)]
    return read_calibration(batches, None, net, ((torch.randn(2, 3, 8, 8),), {}))


def candidates_of(gm):
    return list(dict.fromkeys(site.candidate for site in enumerate_segments(gm).sites))


# --- magnitude --------------------------------------------------------------------------------------------------------


def share(module):
    """What no affine map of its input explains, from the loss of removing the operation: 1 - r^2."""
    gm = clone(fxmerge.capture(nn.Sequential(module), torch.randn(2, 4, 6, 6)))
    gone = {"bypassed": ("0",)} if isinstance(module, nn.Conv2d) else {"removed": ("0",)}
    return 1 - math.exp(-Magnitude().prepare(gm)(Candidate("merge", "input", "0", **gone)))


def monte_carlo(module):
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = module(x)
    return 1 - np.cov(x, y)[0, 1] ** 2 / (np.var(x.numpy()) * np.var(y.numpy()))


def test_the_share_of_relu_is_the_analytic_one():
    assert share(nn.ReLU()) == pytest.approx(RELU, abs=1e-5)


def test_leaky_relu_lies_between_relu_and_the_identity():
    slope = 0.3
    mean = (1 - slope) / math.sqrt(2 * math.pi)
    analytic = 1 - ((1 + slope) / 2) ** 2 / ((1 + slope**2) / 2 - mean**2)
    assert share(nn.LeakyReLU(slope)) == pytest.approx(analytic, abs=1e-5)
    assert share(nn.LeakyReLU(1.0)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("module", [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Tanh(), nn.ReLU6()], ids=lambda m: str(m))
def test_the_share_of_other_activations_is_that_of_samples(module):
    assert share(module) == pytest.approx(monte_carlo(module), abs=2e-3)


def test_a_prelu_counts_with_the_mean_over_its_channels():
    module = nn.PReLU(4)
    module.weight.data = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert share(module) == pytest.approx(RELU / 2, abs=1e-5)


def test_the_share_of_a_convolution():
    identity = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    nn.init.dirac_(identity.weight)
    assert share(identity) == pytest.approx(0.0, abs=1e-12)
    torch.manual_seed(0)
    random = nn.Conv2d(4, 4, 3, padding=1)
    own = random.weight[range(4), range(4), 1, 1] ** 2
    assert share(random) == pytest.approx(float((1 - own / random.weight.flatten(1).square().sum(1)).detach().mean()))
    assert 0.9 < share(random) < 1.0
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    depthwise.weight.data.fill_(0.5)
    assert share(depthwise) == pytest.approx(8 / 9)
    grouped = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    grouped.weight.data = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]).reshape(4, 2, 1, 1)
    assert share(grouped) == pytest.approx((0 + 9 / 25) / 4)
    assert share(nn.Conv2d(4, 6, 3, padding=1)) == pytest.approx(1 - 1e-6)  # the most that one operation counts
    assert share(nn.Conv2d(4, 4, 2)) < 1.0
    assert share(nn.Conv2d(4, 4, 3, padding=1, dilation=2)) == pytest.approx(
        1 - 1e-6
    )  # no tap where the identity has one


def test_losses_add_and_a_convolution_takes_its_cheapest_activation_along(net):
    loss = Magnitude().prepare(net)
    merge = functools.partial(Candidate, "merge", "", "")
    relu, conv_a, conv_b = (
        loss(merge(**each)) for each in ({"removed": ("a.2",)}, {"bypassed": ("a.0",)}, {"bypassed": ("b.0",)})
    )
    assert relu == pytest.approx(-math.log(1 - RELU), abs=1e-5)
    assert loss(merge(bypassed=("a.0", "b.0"))) == pytest.approx(conv_a + conv_b)
    assert loss(merge(bypassed=("a.0",), removed=("a.2",))) == pytest.approx(conv_a)
    assert loss(merge(bypassed=("a.0",), removed=("a.2", "stem.2"))) == pytest.approx(conv_a + relu)
    assert loss(merge(kept=("a.0", "b.0"))) == 0.0


# --- distance ---------------------------------------------------------------------------------------------------------


def test_distance_of_logits_is_the_mean_divergence_in_nats():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert distance([q.log() + 3.0], [p.log()]) == pytest.approx(expected, abs=1e-7)
    assert distance([p.log()], [p.log()]) == 0.0


def test_distance_of_maps_is_relative_to_what_varies():
    reference = torch.tensor([[[11.0]], [[9.0]]])
    assert distance([reference + 0.5], [reference]) == pytest.approx(0.25)
    assert distance([reference * 0 + 10], [reference]) == pytest.approx(1.0)  # the mean explains nothing
    assert distance([reference[:1] * 0], [reference[:1]]) == pytest.approx(1.0)
    assert distance([reference + 0.5, reference], [reference, reference]) == pytest.approx(0.125)
    assert distance([torch.tensor([[3.0]])], [torch.tensor([[2.0]])]) == pytest.approx(0.25)  # one logit is a value


# --- distortion -------------------------------------------------------------------------------------------------------


def plain(gm, candidate, calibration):
    """The definition, with nothing remembered."""
    relaxed, _ = apply_candidates(gm, (candidate,), calibration)
    return np.mean([distance(outputs_of(relaxed, batch), outputs_of(gm, batch)) for batch in calibration.held_out])


@pytest.fixture(scope="module")
def expected(net, calibration):
    found = candidates_of(net)
    assert {candidate.kind for candidate in found} == {"merge", "bypass", "drop"}
    return {candidate: plain(net, candidate, calibration) for candidate in found}


@pytest.mark.parametrize("memory", ["1GiB", 40_000, 1])
def test_what_is_remembered_changes_no_loss(net, calibration, expected, memory):
    """In full, in part and not at all: the very numbers of applying each candidate to a whole copy."""
    score = Distortion(calibration, memory).prepare(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert {candidate: score(candidate) for candidate in expected} == expected
    assert min(expected.values()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_only_what_lies_behind_a_candidate_is_computed(net, calibration, monkeypatch):
    score = Distortion(calibration).prepare(net)
    calls = []
    true_forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(self) or true_forward(self, x))
    score(next(c for c in candidates_of(net) if c.kind == "drop"))
    assert len(calls) == len(calibration.fit) + len(calibration.held_out)  # of four convolutions the last alone


def test_the_distortion_computed_by_hand(calibration):
    """Dropping the branch of a sum without batch norms behind it: nothing is re-estimated."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    model = Sum()
    gm = clone(fxmerge.capture(model, torch.randn(2, 3, 8, 8)))
    drop = next(c for c in candidates_of(gm) if c.kind == "drop")
    losses = []
    for (x,), _ in calibration.held_out:
        y = model(x).detach().double()
        losses.append(float((x - y).square().sum() / (y - y.mean(0)).square().sum()))
    assert Distortion(calibration).prepare(gm)(drop) == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize(("pixels", "images"), [(1, 1), (64 * 6, 1), (1, 12), (64 * 12, 1), (100_000, 32)])
def test_candidates_are_scored_on_so_many_pixels_and_images_spread_over_all(net, pixels, images, monkeypatch):
    """As are statistics: the same as if there were no others."""
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(20)]
    whole = read_calibration(batches, None, net, ((batches[0][:2],), {}))
    assert (len(whole.fit), len(whole.held_out)) == (16, 4)
    monkeypatch.setattr("fxmerge.estimators._SCORED_PIXELS", pixels)
    monkeypatch.setattr("fxmerge.estimators._SCORED_IMAGES", images)
    wanted = max(pixels // 64, images)
    of_fit, of_held_out = {1: ([0], [0]), 6: ([0], [0]), 12: ([0, 8], [0, 2])}.get(wanted, (range(16), range(4)))
    part = replace(
        whole,
        fit=tuple(whole.fit[number] for number in of_fit),
        held_out=tuple(whole.held_out[number] for number in of_held_out),
    )
    for kind in (Distortion, Local):
        score, expected = kind(whole).prepare(net), kind(part).prepare(net)
        for candidate in candidates_of(net):
            assert score(candidate) == expected(candidate)


def test_written_values_are_not_remembered(calibration):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4), conv(4, 4)

        def forward(self, x):
            y = self.a(x)
            z = y.flatten(2)
            y.mul_(2.0)
            return self.b(y), z

    torch.manual_seed(0)
    gm = clone(fxmerge.capture(InPlace().eval(), torch.randn(2, 3, 8, 8)))
    score = Distortion(calibration).prepare(gm)
    for candidate in candidates_of(gm):
        assert score(candidate) == plain(gm, candidate, calibration)


def test_statistics_in_front_of_a_change_stay_to_the_bit(net, calibration):
    candidate = next(c for c in candidates_of(net) if c.kept == ("a.0", "b.0"))
    relaxed, _ = apply_candidates(net, (candidate,), calibration)
    kept = [name for name, _ in relaxed.named_buffers() if name.startswith("stem")]
    assert len(kept) == 3
    assert all(torch.equal(relaxed.get_buffer(name), net.get_buffer(name)) for name in kept)
    assert not torch.equal(relaxed.get_buffer("down.1.running_mean"), net.get_buffer("down.1.running_mean"))
    untouched, _ = apply_candidates(net, (candidate,), None)
    assert torch.equal(untouched.get_buffer("down.1.running_mean"), net.get_buffer("down.1.running_mean"))
    assert "down.0" in {node.target for node in changed_nodes(net, relaxed)}


def test_an_empty_plan_is_a_copy(net, calibration):
    copied, _ = apply_candidates(net, (), calibration)
    assert changed_nodes(net, copied) == set()
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in copied.state_dict().items())


def test_a_distance_of_the_users_own(net, calibration):
    """One output: the two tensors; several: lists of them. What it returns is averaged over the held-out batches."""
    drop = next(c for c in candidates_of(net) if c.kind == "drop")
    relaxed, _ = apply_candidates(net, (drop,), calibration)
    pairs = [[outputs_of(gm, batch) for gm in (relaxed, net)] for batch in calibration.held_out]
    seen = []

    def farthest(outputs, reference):
        seen.append((outputs, reference))
        outputs, reference = ([x] if isinstance(x, torch.Tensor) else x for x in (outputs, reference))
        return max((a - b).abs().max() for a, b in zip(outputs, reference, strict=True))

    expected = np.mean([float(farthest(*pair)) for pair in pairs])
    seen.clear()
    assert Distortion(calibration, distance=farthest).prepare(net)(drop) == pytest.approx(expected, rel=1e-6)
    assert len(seen) == len(calibration.held_out)
    kinds = {type(each) for pair in seen for each in pair}
    assert kinds == {torch.Tensor if len(pairs[0][0]) == 1 else list}
    assert of_outputs(lambda a, b: a.shape == b.shape, [torch.ones(2)], [torch.ones(2)]) == 1.0
    assert of_outputs(lambda a, b: len(a) + len(b), [torch.ones(2)] * 3, [torch.ones(2)] * 3) == 6.0
    with pytest.raises(UserError, match=r"^distance= failed on outputs of shape \[\[2\]\]: no such loss$"):
        of_outputs(raising, [torch.ones(2)], [torch.ones(2)])
    with pytest.raises(UserError, match=r"^distance= returned nan: expected a finite number"):
        of_outputs(lambda a, b: float("nan") * (a + b).sum(), [torch.ones(2)], [torch.ones(2)])


def raising(*_):
    raise ValueError("no such loss")


# --- local ------------------------------------------------------------------------------------------------------------


def relative_error(found, expected):
    return float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())


@pytest.mark.parametrize("fit", ["compose", "refit"])
@pytest.mark.parametrize("memory", ["1GiB", 1])
def test_the_local_error_is_that_of_the_first_common_value(net, calibration, fit, memory):
    candidates = candidates_of(net)
    estimator = Local(calibration, memory, fit)
    score, network = (
        estimator.prepare(net, candidates),
        estimator._networks(net, candidates, remember(net, calibration, 1)),
    )
    nodes = by_id(net)
    order = {name: number for number, name in enumerate(nodes)}
    compared = set()
    for candidate in candidates:
        relaxed = network(candidate)
        twins = by_id(relaxed)
        behind = [name for name in nodes if order[name] >= order[candidate.exit] and name in twins]
        errors = {}
        for name in behind[:4]:
            pairs = [
                [recorder(gm, [by_id(gm)[name]])(b)[1] for gm in (relaxed.eval(), net)] for b in calibration.held_out
            ]
            values = [[next(iter(each.values())) for each in pair] for pair in pairs]
            if isinstance(values[0][0], torch.Tensor) and values[0][0].is_floating_point():
                errors[name] = np.mean([relative_error(a.double(), b.double()) for a, b in values])
        found = score(candidate)
        assert any(found == pytest.approx(error, rel=1e-3, abs=1e-9) for error in errors.values())
        compared |= {name for name, error in errors.items() if found == pytest.approx(error, rel=1e-3, abs=1e-9)}
    assert len(compared) >= 3


def test_the_local_error_computes_nothing_behind(net, calibration, monkeypatch):
    score = Local(calibration).prepare(net)
    candidate = next(c for c in candidates_of(net) if c.kept == ("a.0", "b.0"))
    calls = []
    true_forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or true_forward(self, x))
    before = len(calls)
    score(candidate)
    local = len(calls) - before
    Distortion(calibration).prepare(net)(candidate)
    assert local < len(calls) - local


# --- choice -----------------------------------------------------------------------------------------------------------


def test_estimators_by_name(calibration):
    assert isinstance(get_estimator("auto", None), Magnitude)
    assert isinstance(get_estimator("auto", calibration), Distortion)
    assert isinstance(get_estimator("magnitude", calibration), Magnitude)
    local = get_estimator("local", calibration, "refit", "1MB")
    assert (type(local), local.name, local.fit, local.memory, local.by_start) == (Local, "local", "refit", 10**6, True)
    own_distance = get_estimator("distortion", calibration, distance=raising)
    assert isinstance(own_distance, Distortion)
    assert own_distance.distance is raising
    chosen = get_estimator("auto", calibration, "refit", "1MB")
    assert (chosen.fit, chosen.memory) == ("refit", 10**6)
    assert Distortion(calibration).fit == get_estimator("distortion", calibration).fit == "compose"
    own = Magnitude()
    assert get_estimator(own, None) is own
    assert isinstance(own, Estimator)
    with pytest.raises(UserError, match=r"compares outputs on calibration inputs: pass calibration="):
        get_estimator("distortion", None)
    with pytest.raises(
        UserError, match=r"^importance='local' compares values on calibration inputs: pass calibration="
    ):
        get_estimator("local", None)
    with pytest.raises(
        UserError, match="unknown importance 'norm'; the known ones are auto, distortion, local, magnitude"
    ):
        get_estimator("norm", None)


# --- evaluation of parts ----------------------------------------------------------------------------------------------


def test_a_part_gives_the_values_of_the_whole(net):
    net.eval()
    x = torch.randn(3, 3, 8, 8)
    nodes = by_id(net)
    (output,) = net.graph.find_nodes(op="output")
    (image,) = net.graph.find_nodes(op="placeholder")
    outputs, values = recorder(net, [nodes["stem.2"], nodes["down.0"]])(((x,), {}))
    for found, expected in zip(outputs, outputs_of(net, ((x,), {})), strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(evaluate(net, nodes["down.0"], {image: x}), values[nodes["down.0"]])
        known = {nodes["stem.2"]: values[nodes["stem.2"]]}
        assert torch.equal(evaluate(net, nodes["down.0"], known), values[nodes["down.0"]])
        assert evaluate(net, nodes["stem.2"], known) is known[nodes["stem.2"]]
        whole = evaluate(net, output, {image: x})
    assert all(torch.equal(a, b) for a, b in zip(whole, outputs, strict=True))
    with pytest.raises(KeyError):
        evaluate(net, nodes["stem.0"], {})
