"""Verified selection: near-optimal plans are installed, and what their networks give decides between them.

The solver adds up the losses of single candidates. That ranks plans well near the original and badly where much is
changed, because errors that follow each other do more than add up. So it only proposes here: its own plan, those that it
finds when large losses weigh more or less, plans that differ from the best so far in one or two candidates, and those that are
best for losses that were corrected by what the networks so far lost, and moved at random.

Pure search: what a plan's network loses, and which plan is best for given losses, is the caller's.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from .candidates import Candidate
from .effort import Effort

__all__ = ["Chosen", "Tried", "search_plans"]

Chosen = tuple[Candidate, ...]
"""The candidates of a plan."""

_POWERS = (1.0, 1.5, 0.7, 2.0, 0.5)
"""Of the losses, in proposals: above 1 one large loss costs more than several small ones."""
_KEPT = 0.5
"""What the losses of the best plan's candidates are multiplied by, so that what is proposed differs from it in little."""
_SPREADS = (0.3, 0.7)
"""Standard deviations of the logarithms that losses are moved by, in turns."""
_MOVES, _WIDER = 20, 0.3
"""How often losses are moved until their best plan is a new one, and by how much farther each time."""
_IDLE = 20
"""Moves without a better plan, after which it is left at that where no neighbour is better either."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan that was installed.

    Attributes:
        candidates: of the plan.
        distance: of its network's outputs from the original's.
    """

    candidates: Chosen
    distance: float


def search_plans(
    first: Chosen,
    losses: Mapping[Candidate, float],
    best_for: Callable[[Mapping[Candidate, float]], Chosen],
    distance: Callable[[Chosen], float],
    effort: Effort,
    advance: Callable[[float], None] = lambda _: None,
) -> list[Tried]:
    """Plans that were installed, the one with the least distance first; ``first`` is among them.

    Plans for losses to other powers come first, then, in turns, the neighbours of the best so far, which are complete, and plans
    for moved losses, which reach farther. Where one is better the search goes on from there. It ends when no neighbour is
    better, nor any of twenty moves, or the effort is spent. The same plans in the same order whenever the effort is a number.

    Args:
        first: the solver's own plan.
        losses: of single candidates.
        best_for: the plan within the budget that loses least for given losses.
        distance: installs a plan, and says how far its network's outputs are from the original's.
        effort: how long.
        advance: called with the least distance so far, after each network.
    """
    tried: dict[frozenset[Candidate], Tried] = {}
    start = time.monotonic()

    def left() -> bool:
        if effort.count is not None:
            return len(tried) < effort.count
        return effort.seconds is None or time.monotonic() - start < effort.seconds

    def attempt(plan: Chosen) -> Tried | None:
        """The plan's outcome; None if it was tried before or the effort is spent."""
        if frozenset(plan) in tried or not left():
            return None
        found = tried[frozenset(plan)] = Tried(plan, distance(plan))
        advance(min(each.distance for each in tried.values()))
        return found

    best = Tried(first, distance(first))
    tried[frozenset(first)] = best
    for power in _POWERS:
        found = attempt(best_for({candidate: max(loss, 0.0) ** power for candidate, loss in losses.items()}))
        if found is not None and found.distance < best.distance:
            best = found
    draw = random.Random(0)  # noqa: S311 - a seeded choice
    neighbours, idle = _neighbours(best.candidates, losses, best_for), 0
    while left():
        idle += 1
        neighbour = next((plan for plan in neighbours if frozenset(plan) not in tried), None)
        moved = _moved(best.candidates, losses, best_for, tried.values(), draw)
        if neighbour is None and (idle > _IDLE or frozenset(moved) in tried):
            break
        for plan in (neighbour, moved):
            found = None if plan is None else attempt(plan)
            if found is not None and found.distance < best.distance:
                best, neighbours, idle = found, _neighbours(found.candidates, losses, best_for), 0
    return sorted(tried.values(), key=lambda each: each.distance)


def _moved(
    best: Chosen,
    losses: Mapping[Candidate, float],
    best_for: Callable[[Mapping[Candidate, float]], Chosen],
    tried: Collection[Tried],
    draw: random.Random,
) -> Chosen:
    """The best plan for losses corrected by the networks so far, moved at random; a new one, if there is one nearby.

    A candidate's loss is multiplied by how many times more than their sum of losses the networks lost in which it was: by the
    geometric mean of these, and of a 1 that stands for what is not known yet.
    """
    excess: dict[Candidate, list[float]] = {candidate: [0.0] for candidate in losses}
    for each in tried:
        ratio = each.distance / max(sum(losses[candidate] for candidate in each.candidates), 1e-12)
        for candidate in each.candidates:
            excess[candidate].append(math.log(min(max(ratio, 1e-6), 1e6)))
    kept = {candidate: _KEPT if candidate in best else 1.0 for candidate in losses}
    corrected = {
        candidate: kept[candidate] * max(loss, 0.0) * math.exp(sum(excess[candidate]) / len(excess[candidate]))
        for candidate, loss in losses.items()
    }
    known, spread = {frozenset(each.candidates) for each in tried}, _SPREADS[len(tried) % len(_SPREADS)]
    for move in range(_MOVES):
        width = spread * (1 + _WIDER * move)
        plan = best_for({candidate: loss * math.exp(draw.gauss(0, width)) for candidate, loss in corrected.items()})
        if frozenset(plan) not in known:
            break
    return plan


def _neighbours(
    plan: Chosen,
    losses: Mapping[Candidate, float],
    best_for: Callable[[Mapping[Candidate, float]], Chosen],
) -> Iterator[Chosen]:
    """Plans without one of the candidates, those that lose most first; with one more; without two."""
    never = 1.0 + 10 * sum(map(abs, losses.values()))
    kept = {candidate: _KEPT * loss if candidate in plan else loss for candidate, loss in losses.items()}
    costly = sorted(plan, key=lambda candidate: -losses[candidate])
    for gone in costly:
        yield best_for({**kept, gone: never})
    for added in sorted(set(losses) - set(plan), key=lambda candidate: (losses[candidate], str(candidate))):
        yield best_for({**kept, added: -never})
    for one, other in itertools.combinations(costly, 2):
        yield best_for({**kept, one: never, other: never})
