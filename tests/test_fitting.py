"""Which weights are installed, from the choice of the fit to the report of a whole compression."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmerge
from fxmerge import fitting
from fxmerge.calibration import read_calibration, reestimate_batch_norms
from fxmerge.candidates import Limits
from fxmerge.checks import outputs_of
from fxmerge.errors import UserError
from fxmerge.estimators import Distortion, distance, get_estimator
from fxmerge.fitting import FITS, apply_candidates, install, resolve_fit
from fxmerge.graph import changed_nodes, clone, graph_meta, node_id
from fxmerge.passes import EnumerateSegmentsPass, RefitPass, RelaxPass
from fxmerge.report import Report


def conv(i, o, s=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.down = conv(3, 8), conv(8, 8), conv(8, 8)[:2], conv(8, 12, 2)
        self.tail, self.fc = conv(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        y = self.stem(x)
        y = F.relu(y + self.b(self.a(y)))
        return self.fc(self.tail(self.down(y)).mean((2, 3)))


def draw(count, seed):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def make_net():
    torch.manual_seed(0)
    net = Net().train()
    for seed in range(4):
        net(draw(16, seed))
    with torch.no_grad():
        net.fc.weight *= 20  # outputs that depend on the image
    return net.eval()


@pytest.fixture
def net():
    return make_net()


@pytest.fixture(scope="module")
def gm():
    return clone(fxmerge.capture(make_net(), draw(2, 0)))


@pytest.fixture(scope="module")
def calibration(gm):
    return read_calibration([draw(60, 5)], None, gm, ((draw(2, 0),), {}))


def candidates(gm, kind="merge"):
    found = EnumerateSegmentsPass()(gm).enumeration.sites
    return [each for each in dict.fromkeys(site.candidate for site in found) if each.kind == kind]


def weights_of(gm):
    return {name: tensor.clone() for name, tensor in gm.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- the choice -------------------------------------------------------------------------------------------------------


def test_auto_is_refit_where_there_is_calibration_data():
    assert FITS == ("auto", "compose", "refit")
    assert [resolve_fit("auto", calibrated=each) for each in (False, True)] == ["compose", "refit"]
    assert [resolve_fit("compose", calibrated=each) for each in (False, True)] == ["compose", "compose"]
    assert resolve_fit("refit", calibrated=True) == "refit"
    with pytest.raises(UserError, match=r"^fit='refit' fits weights on calibration inputs: pass calibration=\.\.\.$"):
        resolve_fit("refit", calibrated=False)
    with pytest.raises(UserError, match=r"^unknown fit 'ridge'; the known ones are auto, compose, refit$"):
        resolve_fit("ridge", calibrated=True)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_refit_applies_the_passes_and_compose_reestimates(gm, calibration):
    (chosen, *_) = candidates(gm)
    found, fits = apply_candidates(gm, (chosen,), calibration, "refit")
    expected = RelaxPass((chosen,))(clone(gm)).graph_module
    outcome = RefitPass(gm, calibration)(expected)
    assert outcome.modified
    assert fits == outcome.fits
    assert same(weights_of(found), weights_of(expected))
    composed, nothing = apply_candidates(gm, (chosen,), calibration)
    assert nothing == ()
    assert graph_meta(composed)["segments"]
    assert not torch.equal(composed.get_buffer("tail.1.running_mean"), gm.get_buffer("tail.1.running_mean"))
    assert torch.equal(found.get_buffer("tail.1.running_mean"), gm.get_buffer("tail.1.running_mean"))


def test_without_a_merge_refit_does_what_compose_does(gm, calibration):
    for chosen in candidates(gm, "drop") + candidates(gm, "bypass"):
        found, fits = apply_candidates(gm, (chosen,), calibration, "refit")
        composed, _ = apply_candidates(gm, (chosen,), calibration, "compose")
        assert fits == ()
        assert same(weights_of(found), weights_of(composed))


@pytest.mark.parametrize(("batches", "used"), [(6, [0, 2, 4]), (4, [0, 1, 2]), (2, [0, 1])])
def test_statistics_are_of_enough_images_spread_evenly(gm, batches, used):
    (chosen, *_) = candidates(gm)
    images = [draw(200, seed) + seed for seed in range(batches)]  # 512 are enough
    found, expected = (RelaxPass((chosen,))(clone(gm)).graph_module for _ in range(2))
    (name,) = (node_id(node) for node in gm.graph.find_nodes(op="placeholder"))
    install(gm, found, "compose", [{name: each} for each in images], [], 2**31)
    reestimate_batch_norms(expected, changed_nodes(gm, expected), [((images[number],), {}) for number in used])
    assert same(weights_of(found), weights_of(expected))
    assert not same(weights_of(found), weights_of(RelaxPass((chosen,))(clone(gm)).graph_module))


def test_without_calibration_or_candidates_nothing_is_fitted(gm, calibration):
    (chosen, *_) = candidates(gm)
    for given in (((chosen,), None, "refit"), ((), calibration, "refit")):
        found, fits = apply_candidates(gm, *given)
        assert fits == ()
        assert same(weights_of(found), weights_of(RelaxPass(given[0])(clone(gm)).graph_module))


@pytest.mark.parametrize(
    ("limits", "fitted"),
    [
        (None, True),
        (Limits(), True),
        (Limits(exclude=("stem",)), True),
        (Limits(exclude=("fc",)), False),
        (Limits(include=("a", "b", "down")), False),
        (Limits(include=("a", "b", "fc")), True),
    ],
    ids=["none", "all", "stem-excluded", "head-excluded", "body-included", "head-included"],
)
def test_a_last_layer_outside_of_the_limits_keeps_its_weights(gm, calibration, limits, fitted):
    chosen = next(each for each in candidates(gm) if each.kept == ("a.0", "b.0"))
    found, fits = apply_candidates(gm, (chosen,), calibration, "refit", limits=limits)
    assert [each.name for each in fits] == ["a.0", "fc"][: 1 + fitted]
    assert torch.equal(found.fc.weight, gm.fc.weight) == (not fits[-1].fitted or not fitted)


def test_memory_bounds_what_a_fit_holds(gm, calibration):
    """With little of it the system is solved iteratively: about as well, with other weights."""
    (chosen, *_) = candidates(gm)
    (little, few), (much, many) = (
        apply_candidates(gm, (chosen,), calibration, "refit", memory) for memory in (1000, 2**30)
    )
    assert not same(weights_of(little), weights_of(much))
    assert few[0].fitted
    assert few[0].error < 1.1 * many[0].error


# --- importance -------------------------------------------------------------------------------------------------------


def losses(gm, calibration, fit, memory=2**31, chosen=None):
    """Each candidate's loss, with the weights of that fit but the last layer's own."""
    found = {}
    for each in chosen or candidates(gm):
        relaxed = RelaxPass((each,))(clone(gm)).graph_module.eval()
        parts = [[{"x": batch[0][0]} for batch in part] for part in (calibration.fit, calibration.held_out)]
        fitting.install(gm, relaxed, fit, *parts, memory, last=False)
        pairs = [(outputs_of(relaxed, batch), outputs_of(gm, batch)) for batch in calibration.held_out]
        found[each] = np.mean([distance(*pair) for pair in pairs])
    return found


def test_importance_is_that_of_the_weights_that_will_be_installed(gm, calibration):
    (image,) = gm.graph.find_nodes(op="placeholder")
    assert node_id(image) == "x"
    before = weights_of(gm)
    refitted, composed = (losses(gm, calibration, fit) for fit in ("refit", "compose"))
    for fit, expected in (("refit", refitted), ("compose", composed)):
        score = Distortion(calibration, "1GiB", fit).prepare(gm)
        assert {chosen: score(chosen) for chosen in expected} == pytest.approx(expected, rel=1e-5)
    assert np.mean([refitted[each] < composed[each] / 1.2 for each in refitted]) > 0.8
    assert same(weights_of(gm), before)


def test_the_bound_on_memory_holds_for_importance_as_for_the_result(gm, calibration):
    (chosen, *_) = candidates(gm)
    small, large = (get_estimator("auto", calibration, "refit", memory).prepare(gm) for memory in (1000, "1GiB"))
    expected = losses(gm, calibration, "refit", 1000, (chosen,))
    assert {chosen: small(chosen)} == pytest.approx(expected, rel=1e-5)
    assert abs(large(chosen) - small(chosen)) > 1e-6


# --- the whole pipeline -----------------------------------------------------------------------------------------------


def compress(net, budget=0.5, fit="refit", **options):
    return fxmerge.compress(net, draw(2, 0), budget, runtime="macs", fit=fit, **options)


def test_calibrated_networks_are_refitted_and_the_report_says_so(net, tmp_path):
    before = weights_of(net)
    result = compress(net, calibration=[draw(60, 5)])
    report = result.report
    merges = sum(each.kind == "merge" for each in result.plan.candidates)
    assert merges
    assert len(report.fits) == merges + 1
    assert report.fits[-1].name == "fc"
    assert sum(each.fitted for each in report.fits) >= merges
    assert report.data == (
        "Calibrated on 60 images: importance is distortion, merged convolutions refitted, verified selection (60 s)."
    )
    fitted = sum(each.fitted for each in report.fits)
    text = " ".join(str(report).split())
    assert (
        f"fitted: {fitted} of {merges + 1}; {merges + 1 - fitted} are better composed; held-out error at most" in text
    )
    assert "rows for an unknown" in text
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    result.save(tmp_path / "net")
    loaded = fxmerge.load(tmp_path / "net")
    assert loaded.report == report
    x = draw(4, 9)
    assert torch.equal(loaded.model.eval()(x), result.model.eval()(x))
    torch.testing.assert_close(loaded.merge()(x), result.model(x), rtol=0, atol=1e-4)
    assert same(weights_of(net), before)


def test_refit_is_closer_to_the_original_than_compose(net):
    x = draw(200, 9)
    found = {fit: compress(net, fit=fit, calibration=[draw(60, 5)]) for fit in ("auto", "refit", "compose")}
    with torch.no_grad():
        distances = {fit: distance([each.model.eval()(x)], [net(x)]) for fit, each in found.items()}
    assert distances["auto"] == distances["refit"]
    assert found["auto"].plan == found["refit"].plan
    assert distances["refit"] < distances["compose"] / 1.5
    composed = found["compose"].report
    assert composed.fits == ()
    assert "fitted:" not in str(composed)
    assert "importance is distortion, weights composed, batch-norm statistics re-estimated," in composed.data


def test_a_plan_was_chosen_by_the_losses_of_refitted_weights(net):
    data = [draw(60, 5)]
    plan = compress(net, calibration=data).plan
    base = clone(fxmerge.capture(net, draw(2, 0)))
    read = read_calibration(data, None, base, ((draw(2, 0),), {}))
    refitted, composed = (Distortion(read, fit=fit).prepare(base) for fit in ("refit", "compose"))
    assert plan.loss == pytest.approx(sum(map(refitted, plan.candidates)), rel=1e-5)
    assert plan.loss < 0.9 * sum(map(composed, plan.candidates))


def test_compose_gives_what_the_passes_compose_to(net):
    data = [draw(60, 5)]
    result = compress(net, fit="compose", calibration=data)
    base = clone(fxmerge.capture(net, draw(2, 0)))
    expected, _ = apply_candidates(
        base, result.plan.candidates, read_calibration(data, None, base, ((draw(2, 0),), {})), "compose"
    )
    assert same(weights_of(result.model), weights_of(expected))


def test_the_measured_network_is_the_installed_one(net):
    """Latency is taken with composed weights; what is handed out has the same convolutions."""
    for budget in (0.4, 0.6, 0.8):
        result = compress(net, budget, calibration=[draw(30, 5)])
        again = fxmerge.frontier(result.merge(), draw(2, 0), runtime="macs")
        assert again.original == result.report.measured


def test_a_refitted_network_trains_and_merges(net):
    result = compress(net, calibration=[draw(60, 5)])
    x, labels = draw(32, 9), torch.arange(32) % 5
    with torch.no_grad():
        first = float(F.cross_entropy(result.model.eval()(x), labels))
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.005, momentum=0.9)
    result.model.train()
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(result.model(x), labels).backward()
        optimizer.step()
    result.model.eval()
    with torch.no_grad():
        assert float(F.cross_entropy(result.model(x), labels)) < 0.7 * first
        torch.testing.assert_close(result.merge()(x), result.model(x), rtol=0, atol=1e-4)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in result.merge().modules())


def test_what_is_excluded_is_not_refitted(net):
    result = compress(net, 0.6, calibration=[draw(60, 5)], exclude="fc")
    assert torch.equal(result.model.fc.weight, net.fc.weight)
    assert "fc" not in {each.name for each in result.report.fits}
    assert "fc" in {each.name for each in compress(net, 0.6, calibration=[draw(60, 5)]).report.fits}


def test_a_model_in_train_mode_gives_the_same_and_stays_in_train_mode(net):
    expected = compress(net, calibration=[draw(60, 5)])
    result = compress(net.train(), calibration=[draw(60, 5)])
    assert all(module.training for module in result.model.modules())
    assert result.plan == expected.plan
    x = draw(4, 9)
    assert torch.equal(result.merge()(x), expected.merge()(x))


def test_several_results_of_one_frontier_do_not_disturb_each_other(net):
    found = fxmerge.frontier(net, draw(2, 0), runtime="macs", calibration=[draw(60, 5)], fit="refit")
    first, other, again = (found.compress(budget) for budget in (0.5, 0.7, 0.5))
    assert same(weights_of(first.model), weights_of(again.model))
    assert first.report.fits == again.report.fits != other.report.fits
    assert found.apply(found.at(1.0)).report.fits == ()


def test_without_calibration_refit_is_refused_before_anything_is_done():
    with pytest.raises(UserError, match=r"fit='refit' fits weights on calibration inputs: pass calibration=\.\.\."):
        fxmerge.compress(None, None, 0.5, fit="refit")
    assert compress(make_net(), fit="auto").report.fits == ()


def test_a_report_tells_what_was_not_fitted(net):
    result = compress(net, calibration=[draw(60, 5)])
    fits = (dataclasses.replace(result.report.fits[0], fitted=False, reason="for a reason"), *result.report.fits[1:])
    lines = str(dataclasses.replace(result.report, fits=fits)).splitlines()
    assert f"not fitted:   {fits[0].name}: for a reason" in lines
