"""Choose candidates: every Pareto-optimal plan of a region tree, from numbers alone.

The problem is a tree. A :class:`Leaf` has a fixed latency, a :class:`Chain` runs its children one
after the other and may replace intervals of them by candidates, a :class:`Fork` runs its branches
side by side and may drop some. A plan picks candidates; its latency and its loss are the sums over
what it picked and what it kept. :func:`solve` returns the plans that no other plan beats in both,
:func:`solve_levels` the one plan that Algorithm 1 of the paper finds for one budget.

Nothing here knows torch, graphs or units: latencies are milliseconds if the caller's are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxmerge.errors import BudgetError, UserError

__all__ = [
    "Chain",
    "Choice",
    "Fork",
    "Frontier",
    "Leaf",
    "Problem",
    "Selection",
    "Span",
    "solve",
    "solve_levels",
]

_Floats: TypeAlias = NDArray[np.float64]

# Sums of the same numbers in another order differ in their last bits. Comparing 44 of the 53 bits
# makes them equal, and being a fixed rounding of each value (not a tolerance between neighbours)
# it cannot drift along a frontier of close points.
_HALF, _MASK = np.int64(1 << 8), np.int64(-(1 << 9))
# Sums formed at once: bounds the working memory where two large frontiers meet.
_BLOCK = 1 << 20
# Of one level: a latency that is a multiple of a level but for float error is not rounded down.
_NUDGE = 1e-9
_ADVICE = "Raise the budget to at least that, or allow more candidates."
_NONE = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Choice:
    """One candidate: what it costs, what it loses, and the name by which a plan will list it.

    Args:
        latency: Finite and not negative.
        loss: Finite; negative where the candidate improves the network.
        key: Anything hashable; the solver only hands it back.

    Raises:
        UserError: If a number is nan or infinite, or the latency is negative.
    """

    latency: float
    loss: float
    key: Hashable

    def __post_init__(self) -> None:
        _check_latency(self.latency, f"the latency of choice {self.key!r}")
        if not math.isfinite(self.loss):
            raise UserError(
                f"the loss of choice {self.key!r} is {self.loss}; expected a finite number. "
                "Leave out a candidate that must not be chosen."
            )


@dataclass(frozen=True, slots=True)
class Leaf:
    """A fixed cost, with nothing to choose.

    Raises:
        UserError: If ``latency`` is nan, infinite or negative.
    """

    latency: float

    def __post_init__(self) -> None:
        _check_latency(self.latency, "the latency of a leaf")


@dataclass(frozen=True, slots=True)
class Span:
    """A candidate that replaces the children ``start`` to ``stop - 1`` of a :class:`Chain`."""

    start: int
    stop: int
    choice: Choice


@dataclass(frozen=True, slots=True)
class Chain:
    """Children in series; disjoint spans may replace intervals of them.

    Raises:
        UserError: If a span is empty or leaves the chain.
    """

    children: tuple[Problem, ...]
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        size = len(self.children)
        for span in self.spans:
            if not 0 <= span.start < span.stop <= size:
                raise UserError(
                    f"the span of choice {span.choice.key!r} has start={span.start} and "
                    f"stop={span.stop}; expected 0 <= start < stop <= {size}, the number of "
                    "children of its chain."
                )


@dataclass(frozen=True, slots=True)
class Fork:
    """Branches side by side, whose latencies and losses add up.

    Args:
        branches: At least one.
        drops: Per branch what removing it costs and loses, or None where it must stay; ``()``
            where all must stay. At least one branch always stays.
        join: Latency of the op that joins the branches, paid only while two or more of them stay.

    Raises:
        UserError: If there is no branch, ``drops`` has another length, or ``join`` is nan, infinite
            or negative.
    """

    branches: tuple[Problem, ...]
    drops: tuple[Choice | None, ...] = ()
    join: float = 0.0

    def __post_init__(self) -> None:
        _check_latency(self.join, "the join latency of a fork")
        if not self.branches:
            raise UserError("a fork has no branches; expected at least one.")
        if self.drops and len(self.drops) != len(self.branches):
            raise UserError(
                f"a fork has {len(self.branches)} branches and {len(self.drops)} drops; "
                "expected one drop (or None) per branch, or () for none."
            )


Problem: TypeAlias = Leaf | Chain | Fork


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Frontier:
    """All Pareto-optimal plans of one problem, from the fastest to the one that loses least.

    Args:
        latency: Shape (n,), strictly ascending. Each is the true latency of its plan, also where
            other plans were left out.
        loss: Shape (n,), strictly descending.
        bound: 0.0 when the frontier is exact. Otherwise the most by which a plan that was left out
            was rounded up in latency: for every plan of the problem the frontier holds one that
            loses no more and is slower by at most ``bound``.

    Both arrays are read-only.
    """

    latency: _Floats
    loss: _Floats
    bound: float
    _trace: _Trace = field(repr=False)

    def __len__(self) -> int:
        return len(self.latency)

    def __repr__(self) -> str:
        count = "1 point" if len(self) == 1 else f"{len(self)} points"
        precision = "exact" if self.bound == 0.0 else f"rounded up by at most {self.bound:.3g}"
        return (
            f"Frontier({count}, latency {self.latency[0]:.6g} to {self.latency[-1]:.6g}, "
            f"loss {self.loss[0]:.6g} to {self.loss[-1]:.6g}, {precision})"
        )

    def choices(self, index: int) -> tuple[Hashable, ...]:
        """Return the keys of the candidates that plan ``index`` picks, in the order of the tree.

        Raises:
            IndexError: If there is no such plan; negative indices count from the end.
        """
        costs = _walk(self._trace, range(len(self))[index])
        return tuple(cost.key for cost in costs if isinstance(cost, Choice))

    def at(self, budget: float) -> int:
        """Return the index of the plan that loses least among those with ``latency <= budget``.

        Raises:
            BudgetError: If ``budget`` is nan or below the smallest reachable latency, which the
                message names.
        """
        if math.isnan(budget):
            raise BudgetError("the budget is nan; expected a number.")
        if self.latency[0] > budget:
            raise BudgetError(
                f"no plan has a latency of at most {budget}: the smallest reachable is "
                f"{self.latency[0].item()}. {_ADVICE}"
            )
        return int(np.searchsorted(self.latency, budget, side="right")) - 1


@dataclass(frozen=True, slots=True)
class Selection:
    """One plan: its true latency, its loss, and the keys it picks, in the order of the tree."""

    latency: float
    loss: float
    choices: tuple[Hashable, ...]


def solve(problem: Problem, *, max_points: int | None = 4096) -> Frontier:
    """Find every Pareto-optimal plan: one solve for every budget.

    Minimised are the sum of latencies and the sum of losses, together. With F(r) the non-dominated
    (latency, loss) pairs of region r, A ⊕ B all sums of a pair of A and a pair of B, and *prune*
    dropping what is dominated:

    - Leaf: one pair, (latency, 0).
    - Chain: P(0) = {(0, 0)}; P(j) = prune(P(j-1) ⊕ F(child j-1) ∪ P(i) ⊕ {c}, for every span from i
      to j with choice c); F = P(n).
    - Fork: Q(b, s) are the pairs of the first b branches of which s = 0, 1 or "two or more" stay.
      Branch b stays, ⊕ F(b), or is dropped, ⊕ {drop}; F = prune(Q(n, 1) ∪ Q(n, 2) ⊕ {join}).

    This is the recurrence of Algorithm 1 of LayerMerge (Kim et al., ICML 2024) with a frontier in
    the place of its latency levels.

    Exact while no step, a P(j) or Q(b, s), holds more than ``max_points`` pairs. Above that the
    latencies from its fastest to its slowest pair are divided into ``max_points`` equal cells, and
    the pairs of a cell are rounded up to its slowest one, which loses least. So every pair is
    still a plan with its true latency, never over a budget that it meets here, the fastest plan is
    always kept, and :attr:`Frontier.bound` says how much was rounded. A chain of n children may
    round n times; the bound adds up the worst of each time and is rarely near what was lost.

    A step of N sums takes O(N log N) time. Memory is 24 bytes per pair for the steps from which a
    span still starts and 1 to 8 bytes per pair for all others. Plans are rebuilt one at a time, by
    :meth:`Frontier.choices`.

    Values that agree to 44 bits count as equal. Of plans equal in both, the first in listing order
    is kept, decided at the last step first: a child before the spans that would replace it, spans
    as listed (those with the same start and stop together), a branch that stays before its drop,
    one branch left before several. The same input always gives the same plans.

    Every problem has a plan, the one that chooses nothing. A budget that no plan meets is noticed
    by :meth:`Frontier.at`, which raises.

    Args:
        problem: The region tree.
        max_points: Pairs kept per step, at least 2; None is exact at any size, and can take long.

    Raises:
        UserError: If ``problem`` is not a tree of :class:`Leaf`, :class:`Chain` and :class:`Fork`,
            or ``max_points`` is below 2.

    Example:
        >>> merge = Span(0, 2, Choice(latency=3.0, loss=0.5, key="merge 0-1"))
        >>> bypass = Span(2, 3, Choice(latency=0.0, loss=2.0, key="bypass 2"))
        >>> frontier = solve(Chain((Leaf(2.0), Leaf(2.0), Leaf(4.0)), (merge, bypass)))
        >>> frontier
        Frontier(4 points, latency 3 to 8, loss 2.5 to 0, exact)
        >>> frontier.at(5.0), frontier.choices(frontier.at(5.0))
        (1, ('bypass 2',))
        >>> frontier.choices(0)
        ('merge 0-1', 'bypass 2')
    """
    if max_points is not None and max_points < 2:
        raise UserError(f"max_points is {max_points}; expected at least 2, or None for exact.")
    points = _region(problem, max_points, unit=None)
    points.latency.flags.writeable = points.loss.flags.writeable = False
    return Frontier(points.latency, points.loss, points.bound, points.trace)


def solve_levels(problem: Problem, budget: float, levels: int) -> Selection:
    """Find one plan for one budget as the paper does, with latencies rounded down to levels.

    LayerMerge (Kim et al., ICML 2024), Algorithm 1, extended from chains to trees. Every latency is
    rounded down to a multiple of budget/levels, and of the plans whose rounded latencies sum to at
    most the budget the one that loses least is returned. **It can be over budget**, by up to one
    level for each of its parts; the ``latency`` of the result is its true latency. This is here for
    comparison with the paper; :func:`solve` is exact and never over budget.

    Of the paper's table over (position, level) only the non-dominated levels are stored: the
    recurrence and the answer are the same, time and memory those of :func:`solve`. Ties as there.

    Args:
        problem: The region tree.
        budget: Finite and above 0, in the unit of the latencies.
        levels: The paper's P, at least 1.

    Raises:
        BudgetError: If ``budget`` is not a finite number above 0, or below the smallest sum of
            rounded latencies, which the message names.
        UserError: If ``levels`` is below 1, or ``problem`` not a tree as in :func:`solve`.

    Example:
        >>> chain = Chain((Leaf(1.9), Leaf(1.9)), (Span(0, 2, Choice(3.0, 0.5, "merge")),))
        >>> solve_levels(chain, budget=3.0, levels=3)
        Selection(latency=3.8, loss=0.0, choices=())
    """
    if not (math.isfinite(budget) and budget > 0):
        raise BudgetError(f"the budget is {budget}; expected a finite number above 0.")
    if levels < 1:
        raise UserError(f"levels is {levels}; expected at least 1.")
    unit = budget / levels
    points = _region(problem, None, unit)
    if points.latency[0] > levels:
        raise BudgetError(
            f"no plan has a latency of at most {budget} in {levels} levels: the smallest "
            f"reachable, rounded down, is {points.latency[0].item() * unit}. {_ADVICE}"
        )
    index = int(np.searchsorted(points.latency, levels, side="right")) - 1
    costs = list(_walk(points.trace, index))
    return Selection(
        latency=float(sum(cost.latency for cost in costs)),
        loss=float(points.loss[index]),
        choices=tuple(cost.key for cost in costs if isinstance(cost, Choice)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Trace:
    """Where each point of a step came from, without its numbers.

    Either the points are those of ``costs``. Or the step is the union of ``prefix ⊕ extra`` over
    ``parts``, and ``origin`` holds the number of each surviving point among all the sums in that
    order, the prefix running fastest.
    """

    size: int
    costs: tuple[Leaf | Choice, ...] = ()
    parts: tuple[tuple[_Trace, _Trace], ...] = ()
    origin: NDArray[np.unsignedinteger[Any]] = field(default_factory=lambda: _NONE)


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
    """The points of a step, not dominated and latency ascending; or single costs, in any order."""

    latency: _Floats
    loss: _Floats
    bound: float
    trace: _Trace


def _region(problem: Problem, limit: int | None, unit: float | None) -> _Points:
    """Solve one region; with ``unit``, latencies are whole numbers of it, rounded down."""
    if isinstance(problem, Leaf):
        return _points([problem], unit)
    if isinstance(problem, Chain):
        return _chain(problem, limit, unit)
    if isinstance(problem, Fork):
        return _fork(problem, limit, unit)
    raise UserError(f"expected a Leaf, a Chain or a Fork, got {type(problem).__name__}.")


def _points(costs: Sequence[Leaf | Choice], unit: float | None) -> _Points:
    latencies: list[float] = [cost.latency for cost in costs]
    if unit is not None:
        latencies = [math.floor(latency / unit + _NUDGE) for latency in latencies]
    losses = [cost.loss if isinstance(cost, Choice) else 0.0 for cost in costs]
    trace = _Trace(len(costs), costs=tuple(costs))
    return _Points(np.array(latencies, np.float64), np.array(losses, np.float64), 0.0, trace)


def _chain(chain: Chain, limit: int | None, unit: float | None) -> _Points:
    size = len(chain.children)
    ending: list[dict[int, list[Choice]]] = [{} for _ in range(size + 1)]  # by start
    last_use = list(range(1, size + 1))
    for span in chain.spans:
        ending[span.stop].setdefault(span.start, []).append(span.choice)
        last_use[span.start] = max(last_use[span.start], span.stop)
    expiring: list[list[int]] = [[] for _ in range(size + 1)]
    for start, stop in enumerate(last_use):
        expiring[stop].append(start)

    prefixes = {0: _points([Leaf(0.0)], unit)}
    for stop, child in enumerate(chain.children, start=1):
        parts = [(prefixes[stop - 1], _region(child, limit, unit))]
        for start, choices in ending[stop].items():
            parts.append((prefixes[start], _points(choices, unit)))
        prefixes[stop] = _union(parts, limit)
        for start in expiring[stop]:  # only its trace is needed from here on
            del prefixes[start]
    return prefixes[size]


def _fork(fork: Fork, limit: int | None, unit: float | None) -> _Points:
    nothing = _points([Leaf(0.0)], unit)
    states = {0: nothing}  # by how many branches stay, where 2 means two or more
    for branch, drop in zip(fork.branches, fork.drops or [None] * len(fork.branches), strict=True):
        kept = _region(branch, limit, unit)
        parts: dict[int, list[tuple[_Points, _Points]]] = {0: [], 1: [], 2: []}
        for stay, prefix in states.items():
            parts[min(stay + 1, 2)].append((prefix, kept))
        if drop is not None:
            dropped = _points([drop], unit)
            for stay, prefix in states.items():
                parts[stay].append((prefix, dropped))
        states = {stay: _union(options, limit) for stay, options in parts.items() if options}
    joins = {1: nothing, 2: _points([Leaf(fork.join)], unit)}
    return _union([(states[stay], joins[stay]) for stay in (1, 2) if stay in states], limit)


def _union(parts: list[tuple[_Points, _Points]], limit: int | None) -> _Points:
    """Return the non-dominated sums of ``prefix ⊕ extra`` over ``parts``, at most ``limit``."""
    latency, loss, origin = np.empty(0), np.empty(0), np.empty(0, np.int64)
    count = 0
    for more_latency, more_loss in _sums(parts):
        latency = np.concatenate((latency, more_latency))
        loss = np.concatenate((loss, more_loss))
        origin = np.concatenate((origin, np.arange(count, count + len(more_loss))))
        count += len(more_loss)
        keep = _pareto(latency, loss)
        latency, loss, origin = latency[keep], loss[keep], origin[keep]
    bound = max(prefix.bound + extra.bound for prefix, extra in parts)
    if limit is not None and len(latency) > limit:
        keep, rounded = _round_up(latency, limit)
        latency, loss, origin = latency[keep], loss[keep], origin[keep]
        bound += rounded
    trace = _Trace(
        len(latency),
        parts=tuple((prefix.trace, extra.trace) for prefix, extra in parts),
        origin=origin.astype(np.min_scalar_type(count)),
    )
    return _Points(latency, loss, bound, trace)


def _sums(parts: list[tuple[_Points, _Points]]) -> Iterator[tuple[_Floats, _Floats]]:
    """Yield all sums of every part in order, the prefix running fastest, a block at a time."""
    latencies: list[_Floats] = []
    losses: list[_Floats] = []
    size = 0
    for prefix, extra in parts:
        width = len(prefix.latency)
        rows = max(1, _BLOCK // width)
        for row in range(0, len(extra.latency), rows):
            latencies.append((extra.latency[row : row + rows, None] + prefix.latency).ravel())
            losses.append((extra.loss[row : row + rows, None] + prefix.loss).ravel())
            size += len(latencies[-1])
            if size >= _BLOCK:
                yield np.concatenate(latencies), np.concatenate(losses)
                latencies, losses, size = [], [], 0
    if latencies:
        yield np.concatenate(latencies), np.concatenate(losses)


def _pareto(latency: _Floats, loss: _Floats) -> NDArray[np.intp]:
    """Return the indices of the non-dominated points, the first of equal ones.

    In this order latency ascends and loss descends, both strictly.
    """
    # The points are a few runs sorted by latency; the stable sort, a merge sort, profits from that.
    latency_key = _comparable(latency)
    order = np.argsort(latency_key, kind="stable")
    loss_key = _comparable(loss)[order]
    improves = np.empty(len(order), np.bool_)
    improves[0] = True
    np.less(loss_key[1:], np.minimum.accumulate(loss_key)[:-1], out=improves[1:])
    order = order[improves]
    latency_key = latency_key[order]
    best = np.empty(len(order), np.bool_)  # of its latency: the last one that improves
    best[-1] = True
    np.not_equal(latency_key[1:], latency_key[:-1], out=best[:-1])
    return order[best]


def _comparable(values: _Floats) -> _Floats:
    """Round to 44 significant bits; as the sign is a bit of its own, either sign works."""
    rounded: _Floats = ((values.view(np.int64) + _HALF) & _MASK).view(np.float64)
    return rounded


def _round_up(latency: _Floats, limit: int) -> tuple[NDArray[np.intp], float]:
    """Return which points stay, and the most by which another was rounded up to one of them.

    The slowest point of each cell stays, which loses least. The fastest is alone in its cell.
    """
    step = (latency[-1] - latency[0]) / (limit - 1)
    cell = np.minimum(np.ceil((latency - latency[0]) / step), limit - 1)
    last = np.flatnonzero(np.append(cell[1:] != cell[:-1], True))
    first = np.append(0, last[:-1] + 1)
    return last, float(np.max(latency[last] - latency[first]))


def _walk(trace: _Trace, index: int) -> Iterator[Leaf | Choice]:
    """Yield what the plan of one point keeps and picks, in the order of the tree."""
    steps = []
    while trace.parts:
        number = int(trace.origin[index])
        for prefix, extra in trace.parts:
            if number < prefix.size * extra.size:
                break
            number -= prefix.size * extra.size
        row, index = divmod(number, prefix.size)
        steps.append((extra, row))
        trace = prefix
    yield trace.costs[index]
    for extra, row in reversed(steps):
        yield from _walk(extra, row)


def _check_latency(latency: float, what: str) -> None:
    if not (math.isfinite(latency) and latency >= 0):
        raise UserError(f"{what} is {latency}; expected a finite number that is not negative.")
