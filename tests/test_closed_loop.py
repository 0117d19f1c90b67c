"""The closed loop alone: measurements are made up, so what it must find is known."""

from __future__ import annotations

import bisect
import itertools
import random

import pytest

from fxmerge.closed_loop import TOLERANCE, search
from fxmerge.runtimes import Timing

ORIGINAL = 100.0


def run(predicted, measured, share, *, repeatability=0.0, original=ORIGINAL):
    """What was built, of plans with these latencies; every original takes the next of ``original``."""
    originals = itertools.repeat(original) if isinstance(original, float) else iter(original)

    def measure(index):
        return Timing(measured[index], repeatability, 4), Timing(next(originals), 0.0, 4)

    builds = search(predicted, measure, lambda latency: share * latency, share * ORIGINAL)
    assert [b.measured.latency for b in builds] == [measured[b.index] for b in builds]
    assert [b.predicted for b in builds] == [predicted[b.index] for b in builds]
    return builds


def best(builds):
    return max((build.index for build in builds if build.within), default=None)


def bracket(builds):
    below = max((build.index for build in builds if build.within), default=-1)
    return below, min((build.index for build in builds if not build.within), default=None)


def test_a_prediction_that_holds_needs_one_network():
    plans = [float(k) for k in range(10, 90)]
    (build,) = run(plans, [0.995 * latency for latency in plans], 0.5)
    assert (build.index, build.within) == (40, True)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.1, 1.6])
def test_a_constant_factor_is_corrected_in_two_networks(factor):
    plans = [float(k) for k in range(10, 90)]
    builds = run(plans, [factor * latency for latency in plans], 0.5)
    assert builds[0].index == 40
    assert len(builds) <= 3
    largest = bisect.bisect_right([factor * latency for latency in plans], 50.0) - 1
    assert 50.0 * (1 - TOLERANCE) <= factor * plans[best(builds)] <= 50.0
    assert builds[1].index == largest


def test_the_next_target_is_what_was_asked_by_how_far_the_last_was_off():
    """Predicted 50 took 80: 50 is asked of what is predicted at 50 / 1.6 = 31.25."""
    plans = [10.0, 30.0, 31.0, 32.0, 50.0, 70.0]
    builds = run(plans, [16.0, 48.0, 49.6, 51.2, 80.0, 112.0], 0.5)
    assert [build.index for build in builds] == [4, 2]


def test_a_budget_between_two_plans_is_proven_by_the_larger_one():
    builds = run([20.0, 40.0, 60.0, 80.0], [20.0, 40.0, 60.0, 80.0], 0.5)
    assert [(build.index, build.within) for build in builds] == [(1, True), (2, False)]


@pytest.mark.parametrize(("latency", "builds"), [(49.0, [2]), (48.9, [2, 3])])
def test_what_is_within_two_percent_ends_it(latency, builds):
    found = run([30.0, 40.0, 50.0, 51.0], [30.0, 40.0, latency, 60.0], 0.5)
    assert [build.index for build in found] == builds
    assert best(found) == 2


def test_unreachable_budgets_end_with_the_smallest_plan():
    plans = [float(k) for k in range(1, 1000)]
    builds = run(plans, [100.0] * len(plans), 0.5)
    assert best(builds) is None
    assert builds[-1].index == 0
    assert len(builds) <= 8


def test_the_smallest_plan_is_tried_before_giving_up():
    """Each try is just not enough smaller: eight builds are all there are, and the last is the smallest plan."""
    plans = [float(k) for k in range(1, 2000)]
    builds = run(plans, [20.0, *(51.0 + k / 1e3 for k in range(1998))], 0.5)
    assert builds[-1].index == 0
    assert builds[-1].within
    assert len(builds) <= 8


def test_budgets_follow_the_original_of_each_build():
    """The machine slows down by a quarter: shares count, not milliseconds."""
    plans = [20.0, 40.0, 50.0, 60.0]
    (build,) = run(plans, [1.25 * latency for latency in plans], 0.5, original=[125.0])
    assert (build.index, build.within) == (2, True)


@pytest.mark.parametrize(("repeatability", "within"), [(0.0, False), (0.005, False), (0.01, True), (0.5, True)])
def test_a_timing_is_held_to_no_more_than_it_repeats(repeatability, within):
    builds = run([50.0, 90.0], [50.5, 90.0], 0.5, repeatability=repeatability)
    assert builds[0].within == within


def test_no_more_than_two_percent_are_forgiven():
    builds = run([50.0, 90.0], [51.1, 90.0], 0.5, repeatability=0.5)
    assert [build.within for build in builds] == [False]


def test_without_plans_nothing_is_built():
    assert run([], [], 0.5) == ()


@pytest.mark.parametrize("seed", range(60))
def test_against_every_plan(seed):
    """Measurements that grow with the plan: where the bracket closed, no larger plan is within the budget."""
    draw = random.Random(seed)  # noqa: S311 - seeded numbers
    count = draw.choice([1, 2, 5, 20, 300])
    predicted = sorted(draw.uniform(5, 99) for _ in range(count))
    factor, noise = draw.uniform(0.5, 2), draw.choice([0.0, 0.05, 0.3])
    measured = sorted(factor * latency * draw.uniform(1 - noise, 1 + noise) for latency in predicted)
    share = draw.uniform(0.1, 0.95)
    builds = run(predicted, measured, share)
    limit = share * ORIGINAL
    largest = bisect.bisect_right(measured, limit) - 1
    below, above = bracket(builds)

    assert 1 <= len(builds) <= 8
    assert len({build.index for build in builds}) == len(builds)
    for build in builds:
        assert build.within == (build.index <= largest)
    for known in range(1, len(builds)):
        low, high = bracket(builds[:known])
        assert low < builds[known].index < (count if high is None else high)
    if below + 1 == (count if above is None else above):
        assert below == largest
    elif len(builds) < 8:
        assert (1 - TOLERANCE) * limit <= measured[below] <= limit
    if largest >= 0:
        assert best(builds) is not None


def test_noise_does_not_break_the_bounds():
    """Measurements that do not grow with the plan: what is returned still is within, and found in eight builds."""
    for seed in range(100):
        draw = random.Random(seed)  # noqa: S311 - seeded numbers
        predicted = sorted(draw.uniform(5, 99) for _ in range(200))
        measured = [latency * draw.uniform(0.7, 1.4) for latency in predicted]
        builds = run(predicted, measured, 0.5)
        assert len(builds) <= 8
        assert all(build.within == (measured[build.index] <= 50.0) for build in builds)
        assert best(builds) is not None
