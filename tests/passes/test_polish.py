"""Polish: what is trained, towards what, what is left alone, and what it is worth on a trained network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL,
    candidates,
    captured,
    conv,
    full_merge,
    head,
    images,
    lively,
    relaxed,
    small,
    value_of,
)
from torch import nn

import fxmerge
from fxmerge.calibration import read_calibration
from fxmerge.candidates import Limits
from fxmerge.checks import outputs_of
from fxmerge.effort import Effort
from fxmerge.errors import UserError
from fxmerge.estimators import distance
from fxmerge.fitting import apply_candidates
from fxmerge.graph import by_id, changed_nodes, node_id
from fxmerge.passes import PolishPass
from fxmerge.passes import polish as module
from fxmerge.passes.polish import polish
from fxmerge.passes.refit import known_inputs
from fxmerge.result import merge_graph


def calibration(gm, count=400, seed=3, dtype=torch.float64, shape=(3, 12, 12)):
    x = images(count, *shape, seed=seed).to(dtype)
    return read_calibration(x.split(40), None, gm, ((x[:2],), {}))


def state(gm):
    return {name: tensor.clone() for name, tensor in gm.state_dict().items()}


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def held_out_distance(gm, original, data):
    return np.mean([distance(outputs_of(gm, batch), outputs_of(original, batch)) for batch in data.held_out])


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("fit", ["refit", "compose"])
def test_outputs_come_nearer_to_the_originals(name, fit):
    gm, _ = small(name)
    data = calibration(gm)
    found, _ = apply_candidates(gm, (full_merge(gm),), data, fit)
    before = held_out_distance(found.eval(), gm, data)
    outcome = PolishPass(gm, data, 60)(found)
    assert outcome.before == pytest.approx(before, rel=1e-6)
    assert outcome.after == pytest.approx(held_out_distance(found, gm, data), rel=1e-6)
    assert outcome.after < outcome.before or (fit == "refit" and outcome.after == outcome.before)
    assert outcome.modified
    merged = merge_graph(found)
    x = images(4, 3, 12, 12, seed=8)
    torch.testing.assert_close(merged(x), found.eval()(x), rtol=0, atol=1e-8)


def test_the_same_number_of_steps_gives_the_same_weights():
    gm, _ = small("residual")
    data = calibration(gm)
    found, _ = apply_candidates(gm, (full_merge(gm),), data, "compose")
    one, other = copy.deepcopy(found), copy.deepcopy(found)
    for each in (one, other):
        polish(gm, each, data, Effort(7, None))
    assert not differing(state(one), state(other))
    assert differing(state(found), state(one))


def chain():
    """Two convolutions that merge between one in front and one behind."""
    stem = nn.Sequential(conv(3, 4), nn.Conv2d(4, 4, 1))
    gm = captured(
        lively(nn.Sequential(stem, conv(4, 4), conv(4, 6), nn.Conv2d(6, 6, 1), head(6))), images(2, 3, 12, 12)
    )
    chosen = next(c for c in candidates(gm) if c.kept == ("1.0", "2.0"))
    return gm, chosen


def test_what_is_in_front_of_the_first_change_and_statistics_stay_to_the_bit():
    gm, chosen = chain()
    data = calibration(gm)
    found, _ = apply_candidates(gm, (chosen,), data, "compose")
    before = state(found)
    assert polish(gm, found, data, Effort(20, None)) is not None
    changed = differing(before, state(found))
    assert {"1.0.weight", "3.weight", "4.2.weight"} <= changed
    assert not any(name.startswith("0.") or "running" in name for name in changed)


def test_limits_are_kept():
    gm, chosen = chain()
    data = calibration(gm)
    found, _ = apply_candidates(gm, (chosen,), data, "compose")
    before = state(found)
    polish(gm, found, data, Effort(20, None), limits=Limits(exclude=("3", "4")))
    changed = differing(before, state(found))
    assert "1.0.weight" in changed
    assert not any(name.startswith(("3.", "4.")) for name in changed)


def test_modes_gradients_and_what_requires_them_are_as_before():
    gm, chosen = chain()
    data = calibration(gm)
    found, _ = apply_candidates(gm, (chosen,), data, "compose")
    found.train()
    found.get_submodule("4").eval()
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(name != "3.weight")
    modes = {name: each.training for name, each in found.named_modules()}
    before = state(found)
    polish(gm, found, data, Effort(20, None))
    assert {name: each.training for name, each in found.named_modules()} == modes
    assert "3.weight" in differing(before, state(found))
    assert {name for name, p in found.named_parameters() if not p.requires_grad} == {"3.weight"}
    assert all(p.grad is None for p in found.parameters())


def test_weights_that_get_worse_are_put_back(monkeypatch):
    gm, chosen = chain()
    data = calibration(gm)
    found, _ = apply_candidates(gm, (chosen,), data, "refit")
    before = state(found)
    monkeypatch.setattr(module, "_RATE", 100.0)
    first, last = polish(gm, found, data, Effort(3, None))
    assert first == last
    assert not differing(before, state(found))


def test_nothing_to_train(monkeypatch):
    gm, chosen = chain()
    data = calibration(gm)
    assert polish(gm, copy.deepcopy(gm), data, Effort(3, None)) is None
    found, _ = apply_candidates(gm, (chosen,), data, "refit")
    monkeypatch.setattr(module, "written_in_place", lambda _: True)
    assert polish(gm, found, data, Effort(3, None)) is None
    outcome = PolishPass(gm, data, 3)(found)
    assert not outcome.modified
    assert np.isnan(outcome.before)
    monkeypatch.undo()
    before = state(found)
    assert polish(gm, found, data, Effort(3, None), limits=Limits(exclude=("1", "2", "3", "4"))) is None
    assert not differing(before, state(found))


def merged_blocks():
    """Five pairs of convolutions, of which each is one."""
    blocks = [nn.Sequential(conv(4, 4), conv(4, 4)) for _ in range(5)]
    gm = captured(lively(nn.Sequential(conv(3, 4), *blocks, head(4))), images(2, 3, 12, 12))
    chosen = [next(c for c in candidates(gm) if c.removed == (f"{n}.0.2",) and len(c.kept) == 2) for n in range(1, 6)]
    return gm, relaxed(gm, *chosen).eval()


def test_places_are_behind_segments_and_the_outputs_and_all_that_has_changed_is_trained():
    gm, found = merged_blocks()
    part = module._part(gm, found, changed_nodes(gm, found), None)
    assert [node_id(node) for node in part.ends] == [*(f"{n}.1.2" for n in range(1, 6)), "6.2"]
    assert [node_id(node) for node in part.enter] == ["0.2"]
    changed = [parameter for name, parameter in found.named_parameters() if not name.startswith("0.")]
    assert {id(p) for p in part.trained} == {id(p) for p in changed}


def test_the_loss_adds_up_shares_of_variance_and_the_divergence_of_the_outputs():
    gm, found = merged_blocks()
    data = calibration(gm, 40)
    part = module._part(gm, found, changed_nodes(gm, found), None)
    (rows,) = module._rows(gm, found, part, known_inputs(gm, data.fit[:1]), 2**31)
    (x,), _ = data.fit[0]
    expected = 0.0
    for place in part.ends:
        with torch.no_grad():
            mine, theirs = (value_of(graph, by_id(graph)[node_id(place)], x) for graph in (found, gm))
        if node_id(place) == "6.2":
            probabilities = theirs.softmax(1)
            expected += float((probabilities * (probabilities / mine.softmax(1)).log()).sum(1).mean())
        else:
            expected += float((mine - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())
    assert float(module._loss(found, part, rows).detach()) == pytest.approx(expected, rel=1e-5)


def test_images_that_do_not_fit_into_memory_are_not_trained_on():
    gm, found = merged_blocks()
    batches = known_inputs(gm, calibration(gm).fit)
    part = module._part(gm, found, changed_nodes(gm, found), None)
    whole = list(module._rows(gm, found, part, batches, 2**31))
    size = sum(t.nbytes for t in (*whole[0].enter.values(), *whole[0].wanted))
    assert [len(list(module._rows(gm, found, part, batches, most))) for most in (1, 3 * size)] == [1, 3]
    assert len(whole) == len(batches) > 3


def test_segments_that_were_fitted_are_places_like_those_that_were_not():
    """A fitted convolution has a batch norm behind it that the original does not have."""
    blocks = [nn.Sequential(conv(4, 4), conv(4, 4, act=False)) for _ in range(3)]
    gm = captured(lively(nn.Sequential(conv(3, 4), *blocks, head(4))), images(2, 3, 12, 12))
    chosen = [
        next(
            c
            for c in candidates(gm)
            if c.removed == (f"{n}.0.2",) and c.kept == (f"{n}.0.0", f"{n}.1.0") and not c.bypassed
        )
        for n in range(1, 4)
    ]
    data = calibration(gm)
    fitted, fits = apply_candidates(gm, chosen, data, "refit")
    assert sum(each.fitted for each in fits) == 4
    places = module._places(gm, fitted, changed_nodes(gm, fitted))
    twins = [node_id(module._twin(place, by_id(gm))) for place in places]
    assert twins == [*(f"{n}.1.1" for n in range(1, 4)), "4.2"]
    assert [node_id(place) for place in places[:3]] == [f"{n}.0.0_norm" for n in range(1, 4)]


def test_time_ends_it(monkeypatch):
    gm, chosen = chain()
    data = calibration(gm)
    found, _ = apply_candidates(gm, (chosen,), data, "refit")
    clock = iter(np.arange(0.0, 1e6))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    calls = []
    true = module._loss
    monkeypatch.setattr(module, "_loss", lambda *args: calls.append(torch.is_grad_enabled()) or true(*args))
    polish(gm, found, data, Effort(None, 12.0))
    assert 3 <= sum(calls) <= 12  # each look at the clock takes a second


@pytest.mark.parametrize("effort", [None, "soon", 0])
def test_efforts_that_are_none_are_refused(effort):
    gm, _ = chain()
    with pytest.raises(UserError, match=r"is no effort; expected a time such as"):
        PolishPass(gm, calibration(gm), effort)


# --- through compress -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(pixels, digits_chain):
    """A plain network, trained for seconds on scikit-learn's digits; images to calibrate on, and fresh ones with labels."""
    x, y = pixels
    return digits_chain, x[:1000], x[1200:], y[1200:]


def test_compress_polishes_on_request_and_says_what_it_did(digits):
    model, calibration_images, fresh, labels = digits
    options = {"runtime": "macs", "calibration": calibration_images.split(40), "search": None}
    plain = fxmerge.compress(model, fresh[:2], 0.35, **options)
    polished = fxmerge.compress(model, fresh[:2], 0.35, polish=100, **options)
    assert plain.plan.candidates == polished.plan.candidates
    assert not any("polish" in note for note in plain.report.notes)
    (note,) = [note for note in polished.report.notes if note.startswith("polish")]
    assert "on held-out images the outputs differ by" in note
    assert "polish" in polished.report.seconds
    with torch.no_grad():
        reference = model(fresh)
        plain_distance, distance_ = (distance([r.merge()(fresh)], [reference]) for r in (plain, polished))
        accuracy = [float((r.merge()(fresh).argmax(1) == labels).double().mean()) for r in (plain, polished)]
    assert distance_ < 0.9 * plain_distance  # on images that neither saw
    assert accuracy[1] > accuracy[0] - 0.01


@pytest.mark.parametrize("options", [{"polish": 5}, {"refit_kept": True}, {"distance": F.mse_loss}])
def test_options_that_need_images_say_so(options):
    (name,) = options
    with pytest.raises(UserError, match=f"^{name} needs images: pass calibration="):
        fxmerge.compress(nn.Conv2d(3, 3, 3), torch.randn(2, 3, 8, 8), 0.5, runtime="macs", **options)
