"""The closed loop: build a plan's network, measure it, move the target, until the largest one within the budget is found.

A table of layers is never exact, and a budget is kept in the measurement of the whole network. Pure control: what a
plan is, and how it is built and measured, is the caller's.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .runtimes import Timing

__all__ = ["TOLERANCE", "Build", "search", "within_budget"]

TOLERANCE = 0.02
"""A network this close to the budget is close enough."""

_BUILDS = 8


@dataclass(frozen=True, slots=True)
class Build:
    """A network that was built and measured in turns with the original.

    Attributes:
        index: of its plan.
        predicted: latency by the table.
        measured: of the network.
        original: of the original, in the same turns.
        within: whether that is within the budget, or over it by no more than the two timings repeat to, at most 2 %.
    """

    index: int
    predicted: float
    measured: Timing
    original: Timing
    within: bool


def within_budget(measured: Timing, original: Timing, limit: float) -> bool:
    """Whether a network that was timed in turns with the original is within ``limit``; see :attr:`Build.within`."""
    repeatability = max(measured.repeatability, original.repeatability)
    return measured.latency <= limit * (1 + min(repeatability, TOLERANCE))


def search(
    predicted: Sequence[float],
    measure: Callable[[int], tuple[Timing, Timing]],
    amount: Callable[[float], float],
    target: float,
) -> tuple[Build, ...]:
    """All networks that were built; those within the budget get larger, those over it smaller.

    The first is the largest that is within the budget by prediction. The next target is the budget, corrected by how far off the
    last prediction was, between the largest index known to be within and the smallest known to be over. It ends when
    these are neighbours, when a network is within and at most 2 % below the budget, or after eight builds; the last is the
    smallest plan if none was within before.

    Args:
        predicted: latency of every plan but the original's, ascending.
        measure: builds a plan's network and returns its timing and the original's, in turns.
        amount: the budget for an original of so many milliseconds.
        target: the budget before anything was built.

    Example:
        >>> slow = lambda index: (Timing(1.2 * (index + 1), 0.0, 4), Timing(10.0, 0.0, 4))
        >>> builds = search([1, 2, 3, 4, 5, 6, 7, 8, 9], slow, lambda original: 0.6 * original, 6.0)
        >>> [(build.index, build.within) for build in builds]
        [(5, False), (4, True)]
    """
    builds: list[Build] = []
    below, above = -1, len(predicted)
    while len(builds) < _BUILDS and above - below > 1:
        index = min(max(bisect.bisect_right(predicted, target) - 1, below + 1), above - 1)
        if len(builds) == _BUILDS - 1 and below < 0:
            index = 0
        measured, original = measure(index)
        limit = amount(original.latency)
        within = within_budget(measured, original, limit)
        builds.append(Build(index, predicted[index], measured, original, within))
        if within:
            below = index
        else:
            above = index
        if within and measured.latency >= (1 - TOLERANCE) * limit:
            break
        target = predicted[index] * limit / measured.latency
    return tuple(builds)
