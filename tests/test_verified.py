"""Verified selection: the search itself on plans whose distances are known, and on a network that was trained."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import fxmerge
from fxmerge import verified
from fxmerge.calibration import read_calibration
from fxmerge.candidates import Candidate
from fxmerge.checks import outputs_of
from fxmerge.effort import Effort
from fxmerge.estimators import distance, plan_distance
from fxmerge.fitting import apply_candidates
from fxmerge.graph import by_id, clone
from fxmerge.verified import search_plans

# --- the search -------------------------------------------------------------------------------------------------------


NAMES = "abcdefgh"
CANDIDATES = {name: Candidate("bypass", name, name) for name in NAMES}
SAVED = dict(zip(NAMES, (5, 4, 4, 3, 3, 2, 2, 1), strict=True))
LOSSES = {CANDIDATES[name]: 0.1 * SAVED[name] + 0.01 * number for number, name in enumerate(NAMES)}
WANTED = 9


def best_for(losses):
    """Of all sets that save enough the one with the least sum: what the solver does."""
    sets = [
        chosen
        for size in range(1, len(NAMES) + 1)
        for chosen in itertools.combinations(NAMES, size)
        if sum(map(SAVED.get, chosen)) >= WANTED
    ]
    best = min(sets, key=lambda chosen: (sum(losses[CANDIDATES[name]] for name in chosen), chosen))
    return tuple(CANDIDATES[name] for name in best)


def names(plan):
    return "".join(sorted(candidate.entry for candidate in plan))


class Network:
    """Distances in which neighbours in the alphabet do more than add up; what was asked is kept."""

    def __init__(self, together=1.0):
        self.together = together
        self.asked = []

    def __call__(self, plan):
        self.asked.append(names(plan))
        pairs = sum(abs(ord(a.entry) - ord(b.entry)) == 1 for a, b in itertools.combinations(plan, 2))
        return sum(LOSSES[candidate] for candidate in plan) + self.together * pairs


def run(effort, network=None, advance=lambda _: None):
    network = network or Network()
    return search_plans(best_for(LOSSES), LOSSES, best_for, network, effort, advance), network


def test_where_losses_do_not_add_up_the_search_ends_with_a_plan_that_no_neighbour_beats():
    tried, network = run(Effort(None, None))
    best = tried[0]
    assert names(best_for(LOSSES)) == "ab"  # the sum of losses alone misleads
    assert best.distance < network(best_for(LOSSES))
    assert [each.distance for each in tried] == sorted(each.distance for each in tried)
    assert all(sum(map(SAVED.get, names(each.candidates))) >= WANTED for each in tried)
    neighbours = list(verified._neighbours(best.candidates, LOSSES, best_for))
    assert len({names(each) for each in neighbours}) > 3
    assert min(map(network, neighbours)) >= best.distance


def test_no_plan_is_installed_twice():
    _, network = run(Effort(None, None))
    assert len(network.asked) == len(set(network.asked)) > 5


def test_where_losses_add_up_the_first_plan_stays():
    tried, network = run(Effort(None, None), Network(together=0.0))
    assert tried[0].candidates == best_for(LOSSES)
    assert network.asked[0] == names(best_for(LOSSES))


@pytest.mark.parametrize("together", [0.0, 0.1, 0.3, 1.0])
def test_the_best_of_all_plans_is_found_where_neighbours_alone_end_before_it(together, monkeypatch):
    sets = [chosen for size in range(1, 9) for chosen in itertools.combinations(NAMES, size)]
    every = [chosen for chosen in sets if sum(map(SAVED.get, chosen)) >= WANTED]
    least = min(Network(together)([CANDIDATES[name] for name in chosen]) for chosen in every)
    tried, network = run(Effort(None, None), Network(together))
    assert tried[0].distance == pytest.approx(least)
    assert len(network.asked) < len(every) / 3
    monkeypatch.setattr(verified, "_moved", lambda best, *_: best)
    tried, _ = run(Effort(None, None), Network(together))
    assert (tried[0].distance == pytest.approx(least)) == (together == 0.0)


@pytest.mark.parametrize("number", [1, 2, 6])
def test_a_number_of_networks_is_kept_and_gives_the_same_every_time(number):
    (first, one), (again, other) = (run(Effort(number, None)) for _ in range(2))
    assert len(one.asked) == number
    assert one.asked == other.asked
    assert first == again
    everything = run(Effort(None, None))[1]
    assert one.asked == everything.asked[:number]


def test_time_ends_it(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(verified.time, "monotonic", lambda: next(clock))
    _, network = run(Effort(None, 4.0))  # each question takes a second
    assert 2 <= len(network.asked) <= 4 < len(run(Effort(None, None))[1].asked)


def test_progress_hears_of_the_least_so_far():
    heard = []
    tried, _ = run(Effort(None, None), advance=heard.append)
    assert heard == sorted(heard, reverse=True)
    assert heard[-1] == tried[0].distance


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(pixels, digits_chain):
    """A plain network, trained for seconds on scikit-learn's digits; images to calibrate on, and fresh ones."""
    return digits_chain, pixels[0][:200], pixels[0][1200:]


@pytest.fixture(scope="module")
def found(digits):
    model, images, _ = digits
    return fxmerge.frontier(model, images[:2], runtime="macs", calibration=images.split(40), search=12)


def compress(found, budget, search):
    setup = found._setup
    found._setup = replace(setup, search=None if search is None else Effort(search, None))
    try:
        return found.compress(budget)
    finally:
        found._setup = setup


def held_out_distance(found, model):
    batches = found._setup.calibration.held_out
    return np.mean([distance(outputs_of(model, b), outputs_of(found._setup.base, b)) for b in batches])


@pytest.mark.parametrize("budget", [0.5, 0.3])
def test_what_is_installed_is_no_farther_from_the_original_than_the_plain_optimum(found, budget):
    plain, searched = compress(found, budget, None), compress(found, budget, 12)
    amount = budget * found.original
    assert max(plain.report.measured, searched.report.measured) <= amount
    assert held_out_distance(found, searched.model.eval()) <= held_out_distance(found, plain.model.eval()) * (1 + 1e-4)
    assert searched.plan.loss >= plain.plan.loss  # which is least by the sum
    assert not any("were installed" in note for note in plain.report.notes)
    (note,) = [note for note in searched.report.notes if "were installed" in note]
    assert note.startswith("12 plans near the budget were installed; on held-out images")
    assert "verify" in searched.report.seconds


def test_of_some_budget_another_plan_is_better(found):
    plans = [
        [compress(found, budget, search).plan.candidates for search in (None, 12)] for budget in (0.5, 0.4, 0.3, 0.2)
    ]
    assert any(set(plain) != set(searched) for plain, searched in plans)


def test_the_same_number_of_networks_gives_the_same_network(found):
    one, other = (compress(found, 0.3, 5).model.state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("fit", ["refit", "compose"])
def test_a_plan_is_as_far_as_the_network_that_it_gives(digits, found, fit):
    """Also when fits of other plans are taken over; the original is left as it was."""
    model, images, _ = digits
    gm = clone(fxmerge.capture(model, images[:2])).eval()
    data = read_calibration(images.split(40), None, gm, ((images[:2],), {}))
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    measure = plan_distance(gm, data, fit, 2**31)
    plans = [found.plan(index).candidates for index in range(0, len(found) - 1, max(1, len(found) // 6))]
    for plan in (*plans, *plans[::-1]):
        network, _ = apply_candidates(gm, plan, data, fit)
        expected = np.mean([distance(outputs_of(network.eval(), b), outputs_of(gm, b)) for b in data.held_out])
        assert measure(plan) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


@pytest.fixture
def fitted(monkeypatch):
    """What has been fitted so far."""
    from fxmerge.passes import refit

    asked = []

    class Counting(refit.Regression):
        def fit(self, wanted):
            asked.append(wanted)
            return super().fit(wanted)

    monkeypatch.setattr(refit, "Regression", Counting)
    return asked


def test_fits_are_taken_over_where_all_in_front_is_the_same(digits, found, fitted):
    model, images, _ = digits
    gm = clone(fxmerge.capture(model, images[:2])).eval()
    data = read_calibration(images.split(40), None, gm, ((images[:2],), {}))
    measure = plan_distance(gm, data, "refit", 2**31, last=False)
    plan = max(
        (found.plan(index).candidates for index in range(len(found))), key=lambda p: sum(c.kind == "merge" for c in p)
    )
    merges = sum(candidate.kind == "merge" for candidate in plan)
    assert merges >= 2
    first = measure(plan)
    assert (len(fitted), measure(plan), len(fitted)) == (merges, first, merges)
    order = list(by_id(gm))
    last = max((c for c in plan if c.kind == "merge"), key=lambda c: order.index(c.entry))
    measure([candidate for candidate in plan if candidate != last])
    assert len(fitted) == merges  # nothing behind it was left to fit


def test_what_a_fit_computed_of_held_out_images_is_not_computed_again(digits, found, monkeypatch):
    """Of the network the last layer is left, whose input its own fit read."""
    from fxmerge import estimators

    model, images, _ = digits
    gm = clone(fxmerge.capture(model, images[:2])).eval()
    data = read_calibration(images.split(40), None, gm, ((images[:2],), {}))
    measure = plan_distance(gm, data, "refit", 2**31)
    plan = compress(found, 0.5, None).plan.candidates
    assert any(candidate.kind == "merge" for candidate in plan)
    expected, calls = measure(plan), []
    true_distance = estimators.Remembered.distance

    def distance_alone(self, gm, changed, computed=()):
        assert len(computed) == len(data.held_out)
        with monkeypatch.context() as patch:
            for kind in (torch.nn.Conv2d, torch.nn.Linear):
                forward = kind.forward
                patch.setattr(kind, "forward", lambda self, x, forward=forward: calls.append(self) or forward(self, x))
            whole = true_distance(self, gm, changed)
            of_whole = len(calls)
            found = true_distance(self, gm, changed, computed)
        assert (found, len(calls) - of_whole) == (whole, len(data.held_out))
        assert of_whole > len(calls) - of_whole
        return found

    monkeypatch.setattr(estimators.Remembered, "distance", distance_alone)
    assert measure(plan) == expected
    assert calls


def test_what_was_fitted_in_the_search_is_installed(digits, found, fitted):
    plain = compress(found, 0.3, None)
    alone = len(fitted)
    fitted.clear()
    one = compress(found, 0.3, 1)  # the plan itself, as if no more could be tried
    assert one.plan.candidates == plain.plan.candidates
    merges = sum(candidate.kind == "merge" for candidate in plain.plan.candidates)
    assert (alone, len(fitted)) == (merges + 1, merges + 2)  # twice only the last linear layer
    x = digits[2]
    torch.testing.assert_close(one.merge()(x), plain.merge()(x), rtol=1e-3, atol=1e-3)


def test_no_more_fits_are_kept_than_memory_is_given():
    from fxmerge.passes.refit import Reuse
    from fxmerge.regression import Fit

    reuse = Reuse(memory=250)
    for number in range(5):
        reuse.keep(
            (frozenset(), CANDIDATES["a"], str(number)), Fit(torch.zeros(12).double(), torch.zeros(1), 0, 0, 1, None)
        )
    assert [key[2] for key in reuse.fits] == ["3", "4"]
    reuse.keep((frozenset(), CANDIDATES["a"], "large"), Fit(torch.zeros(99).double(), torch.zeros(1), 0, 0, 1, None))
    assert not reuse.fits


def test_without_calibration_data_there_is_nothing_to_verify(digits):
    model, images, _ = digits
    result = fxmerge.compress(model, images[:2], 0.5, runtime="macs", search=50)
    assert "verify" not in result.report.seconds
