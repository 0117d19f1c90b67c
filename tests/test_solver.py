"""The solver against enumeration, an integer program, and a plain Algorithm 1."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fxmerge import solver
from fxmerge.errors import BudgetError, UserError
from fxmerge.solver import Chain, Choice, Fork, Leaf, Problem, Span, solve, solve_levels

# One plan, enumerated: what it costs, what it loses, the choices it picks in the order of the tree.
Plan = tuple[float, float, tuple[str, ...]]


def enumerate_plans(problem: Problem) -> list[Plan]:
    """Every plan, dominated or not, straight from the meaning of the tree."""
    if isinstance(problem, Leaf):
        return [(problem.latency, 0.0, ())]
    if isinstance(problem, Chain):
        return _chain_plans(problem, 0)
    drops = problem.drops or (None,) * len(problem.branches)
    plans = []
    for stays in itertools.product((True, False), repeat=len(drops)):
        if not any(stays) or any(d is None for s, d in zip(stays, drops, strict=True) if not s):
            continue
        options = [
            enumerate_plans(branch) if stay else [(drop.latency, drop.loss, (drop.key,))]
            for stay, branch, drop in zip(stays, problem.branches, drops, strict=True)
        ]
        join = problem.join if sum(stays) >= 2 else 0.0
        plans += [_joined(parts, join) for parts in itertools.product(*options)]
    return plans


def _chain_plans(chain: Chain, start: int) -> list[Plan]:
    if start == len(chain.children):
        return [(0.0, 0.0, ())]
    heads = [(plan, start + 1) for plan in enumerate_plans(chain.children[start])]
    heads += [
        ((span.choice.latency, span.choice.loss, (span.choice.key,)), span.stop)
        for span in chain.spans
        if span.start == start
    ]
    return [_joined((head, tail), 0.0) for head, stop in heads for tail in _chain_plans(chain, stop)]


def _joined(parts: tuple[Plan, ...], join: float) -> Plan:
    latency = sum(part[0] for part in parts) + join
    return latency, sum(part[1] for part in parts), sum((part[2] for part in parts), ())


def frontier_of(plans: list[Plan]) -> list[tuple[float, float]]:
    """The non-dominated (latency, loss) pairs, equal up to the order of summation."""
    best: list[tuple[float, float]] = []
    for latency, loss in sorted((round(plan[0], 9), round(plan[1], 9)) for plan in plans):
        if not best or loss < best[-1][1]:
            best.append((latency, loss))
    return best


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - test data


class Trees:
    """Random small problems; ``coarse`` numbers are tenths, so that many plans tie."""

    def __init__(self, seed: int) -> None:
        self.rng = seeded(seed)
        self.coarse = seed % 2 == 0
        self.keys = itertools.count()

    def number(self, low: float, high: float) -> float:
        value = self.rng.uniform(low, high)
        return round(value, 1) if self.coarse else value

    def choice(self) -> Choice:
        return Choice(self.number(0, 2), self.number(-0.5, 3), f"c{next(self.keys)}")

    def problem(self, depth: int) -> Problem:
        kind = self.rng.choice(("leaf", "chain", "fork") if depth else ("leaf",))
        if kind == "chain":
            return self.chain(depth, self.rng.randint(0, 4), self.rng.randint(0, 4))
        if kind == "fork":
            return self.fork(depth, self.rng.randint(1, 3))
        return Leaf(self.number(0, 3))

    def chain(self, depth: int, size: int, count: int) -> Chain:
        spans = []
        for _ in range(count if size else 0):
            start, stop = sorted(self.rng.sample(range(size + 1), 2))
            spans.append(Span(start, stop, self.choice()))
        return Chain(tuple(self.problem(depth - 1) for _ in range(size)), tuple(spans))

    def fork(self, depth: int, size: int) -> Fork:
        branches = tuple(self.problem(depth - 1) for _ in range(size))
        drops = tuple(self.choice() if self.rng.random() < 0.7 else None for _ in branches)
        return Fork(branches, self.rng.choice((drops, ())), self.number(0, 1))

    def tree(self) -> Problem:
        """A nested problem with few enough plans to enumerate."""
        while True:
            root = self.rng.choice((self.chain, self.fork))
            problem = root(3, 3, 4) if root == self.chain else root(3, 3)
            if count_plans(problem) <= 4000:
                return problem


def count_plans(problem: Problem) -> int:
    """The number of plans, an upper bound where a fork may not drop all its branches."""
    if isinstance(problem, Leaf):
        return 1
    if isinstance(problem, Fork):
        drops = problem.drops or (None,) * len(problem.branches)
        branches = zip(problem.branches, drops, strict=True)
        return math.prod(count_plans(branch) + (drop is not None) for branch, drop in branches)
    counts = [1]
    for stop, child in enumerate(problem.children, start=1):
        counts.append(
            counts[-1] * count_plans(child) + sum(counts[span.start] for span in problem.spans if span.stop == stop)
        )
    return counts[-1]


def long_chain(positions: int = 50, candidates: int = 391, seed: int = 0) -> Chain:
    rng = seeded(seed)
    leaves = [rng.lognormvariate(0, 0.7) for _ in range(positions)]
    spans = []
    for number in range(candidates):
        length = rng.randint(1, 5)
        start = rng.randint(0, positions - length)
        latency = sum(leaves[start : start + length]) * rng.uniform(0.3, 0.9)
        choice = Choice(latency, length * rng.expovariate(1), f"c{number}")
        spans.append(Span(start, start + length, choice))
    return Chain(tuple(Leaf(latency) for latency in leaves), tuple(spans))


def wide_chain(children: int, seed: int = 0) -> Chain:
    """Children of four points each that do not interact."""
    rng = seeded(seed)
    parts = []
    for child in range(children):
        latency = rng.uniform(0.2, 2)
        parts.append(
            Chain(
                (Leaf(latency),),
                tuple(
                    Span(0, 1, Choice(latency * share, loss, f"c{child}.{share}"))
                    for share, loss in ((0.75, rng.random()), (0.4, 2 + rng.random()), (0.1, 5.0))
                ),
            )
        )
    return Chain(tuple(parts))


def cost_of(problem: Problem, keys: tuple[str, ...]) -> tuple[float, float]:
    """Latency and loss of a plan of a chain of leaves or of chains of one leaf, from its keys."""
    latency = loss = 0.0
    position = 0
    spans = {span.choice.key: span for span in problem.spans}
    starts = {spans[key].start: spans[key] for key in keys if key in spans}
    while position < len(problem.children):
        child = problem.children[position]
        if position in starts:
            span = starts[position]
            more, lost, position = span.choice.latency, span.choice.loss, span.stop
        elif isinstance(child, Chain):
            more, lost = cost_of(child, keys)
            position += 1
        else:
            more, lost, position = child.latency, 0.0, position + 1
        latency, loss = latency + more, loss + lost
    return latency, loss


@pytest.mark.parametrize("seed", range(320))
def test_frontier_equals_enumeration(seed):
    problem = Trees(seed).tree()
    plans = enumerate_plans(problem)
    frontier = solve(problem, max_points=None)
    expected = frontier_of(plans)
    found = list(zip(frontier.latency, frontier.loss, strict=True))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    assert np.all(np.diff(frontier.latency) > 0)
    assert np.all(np.diff(frontier.loss) < 0)
    assert frontier.bound == 0.0
    by_choices = {}
    for latency, loss, keys in plans:
        by_choices.setdefault(keys, []).append((latency, loss))
    for index, point in enumerate(found):
        costs = by_choices[frontier.choices(index)]
        assert any(np.allclose(point, cost, rtol=0, atol=1e-12) for cost in costs)


def test_random_trees_are_worth_testing():
    problems = [Trees(seed).tree() for seed in range(320)]
    sizes = [len(solve(problem, max_points=None)) for problem in problems]
    counts = [len(enumerate_plans(problem)) for problem in problems]
    assert np.median(sizes) >= 4
    assert max(sizes) >= 30
    assert np.median(counts) >= 20
    assert sum("drops=(Choice" in repr(problem) for problem in problems) >= 60


@pytest.mark.parametrize("seed", range(4))
def test_frontier_equals_an_integer_program(seed):
    optimize = pytest.importorskip("scipy.optimize")
    chain = long_chain(seed=seed)
    arcs = [(i, i + 1, leaf.latency, 0.0) for i, leaf in enumerate(chain.children)]
    arcs += [(s.start, s.stop, s.choice.latency, s.choice.loss) for s in chain.spans]
    flow = np.zeros((len(chain.children) + 1, len(arcs)))  # a plan is a path over the positions
    for column, (start, stop, _, _) in enumerate(arcs):
        flow[start, column], flow[stop, column] = 1, -1
    ends = np.zeros(len(flow))
    ends[0], ends[-1] = 1, -1
    latency = np.array([arc[2] for arc in arcs])
    loss = np.array([arc[3] for arc in arcs])
    frontier = solve(chain)
    assert frontier.bound == 0.0
    for fraction in (0.4, 0.5, 0.6, 0.75, 0.9):
        budget = fraction * frontier.latency[-1]
        program = optimize.milp(
            loss,
            integrality=np.ones(len(arcs)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(flow, ends, ends),
                optimize.LinearConstraint(latency, -np.inf, budget),
            ],
            options={"mip_rel_gap": 0.0},
        )
        assert program.success
        index = frontier.at(budget)
        assert frontier.loss[index] == pytest.approx(program.fun, rel=1e-6)
        assert frontier.latency[index] <= budget


def test_choices_add_up_on_a_long_chain():
    chain = long_chain()
    frontier = solve(chain)
    assert len(frontier) > 300
    for index in range(len(frontier)):
        cost = cost_of(chain, frontier.choices(index))
        assert cost == pytest.approx((frontier.latency[index], frontier.loss[index]), rel=1e-12)


@pytest.mark.parametrize("max_points", [2, 3, 10, 100, 1000])
def test_rounding_is_never_over_budget_and_within_its_bound(max_points):
    chain = wide_chain(60)
    exact, rounded = solve(chain, max_points=None), solve(chain, max_points=max_points)
    assert exact.bound == 0.0
    assert len(exact) > 1000
    assert len(rounded) <= max_points
    assert 0.0 < rounded.bound <= 60 * (exact.latency[-1] - exact.latency[0]) / (max_points - 1)
    assert rounded.latency[0] == pytest.approx(exact.latency[0], rel=1e-12)
    assert rounded.loss[-1] == exact.loss[-1] == 0.0
    for index in range(len(rounded)):  # what is reported is the true cost of a plan
        cost = cost_of(chain, rounded.choices(index))
        assert cost == pytest.approx((rounded.latency[index], rounded.loss[index]), rel=1e-12)
    for latency, loss in zip(exact.latency, exact.loss, strict=True):
        index = rounded.at(latency + rounded.bound + 1e-9)
        assert rounded.loss[index] <= loss + 1e-9
        assert rounded.latency[index] <= latency + rounded.bound + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_rounding_bound_holds_on_nested_trees(seed):
    problem = Trees(seed).tree()
    exact, rounded = solve(problem, max_points=None), solve(problem, max_points=3)
    assert len(rounded) <= 3
    for latency, loss in zip(exact.latency, exact.loss, strict=True):
        assert rounded.loss[rounded.at(latency + rounded.bound + 1e-9)] <= loss + 1e-9


def test_rounding_starts_above_max_points_only():
    chain = wide_chain(4)
    exact = solve(chain, max_points=None)
    assert solve(chain, max_points=len(exact)).bound == 0.0
    assert solve(chain, max_points=len(exact) - 1).bound > 0.0


def test_blocks_change_nothing(monkeypatch):
    problem = Fork((wide_chain(6, seed=1), wide_chain(6, seed=2), long_chain(12, 40)))
    whole = solve(problem, max_points=None)
    monkeypatch.setattr(solver, "_BLOCK", 50)
    blocks = solve(problem, max_points=None)
    np.testing.assert_array_equal(whole.latency, blocks.latency)
    np.testing.assert_array_equal(whole.loss, blocks.loss)
    indices = range(0, len(whole), 97)
    assert [whole.choices(i) for i in indices] == [blocks.choices(i) for i in indices]


def test_same_input_gives_same_plans():
    first, second = solve(long_chain()), solve(long_chain())
    np.testing.assert_array_equal(first.latency, second.latency)
    np.testing.assert_array_equal(first.loss, second.loss)
    indices = range(len(first))
    assert [first.choices(i) for i in indices] == [second.choices(i) for i in indices]


@pytest.mark.parametrize("seed", range(5))
def test_order_of_spans_and_branches_does_not_change_the_costs(seed):
    rng = seeded(seed)
    chain = long_chain(seed=seed)
    spans = rng.sample(chain.spans, len(chain.spans))
    first, second = solve(chain), solve(dataclasses.replace(chain, spans=tuple(spans)))
    np.testing.assert_allclose(first.latency, second.latency, rtol=1e-12)
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-12, atol=1e-12)

    fork = Trees(seed).fork(2, 4)
    order = rng.sample(range(4), 4)
    drops = tuple(fork.drops[i] for i in order) if fork.drops else ()
    shuffled = Fork(tuple(fork.branches[i] for i in order), drops, fork.join)
    first, second = solve(fork), solve(shuffled)
    np.testing.assert_allclose(first.latency, second.latency, rtol=1e-12)
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-12, atol=1e-12)


def test_orders_of_summation_are_one_point():
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1: k of 30 equal candidates are one point, not many."""
    child = Chain((Leaf(0.3),), (Span(0, 1, Choice(0.1, 0.7, "x")),))
    other = Chain((Leaf(0.2),), (Span(0, 1, Choice(0.0, 0.7, "y")),))
    frontier = solve(Chain((child, other) * 15))
    assert len(frontier) == 31
    np.testing.assert_allclose(frontier.loss, 0.7 * np.arange(30, -1, -1), atol=1e-12)


def test_last_bits_do_not_count():
    ones = np.array([1.0, math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0), 1 + 1e-12])
    keys = solver._comparable(ones)
    assert keys[0] == keys[1] == keys[2] < keys[3]
    np.testing.assert_array_equal(solver._comparable(-ones), -keys)
    assert solver._comparable(np.zeros(1)) == 0.0


def test_close_points_do_not_merge_into_one():
    """Neighbours 1e-12 apart: a tolerance between neighbours would drop all but one of them."""
    spans = tuple(Span(0, 1, Choice(1 + i * 1e-12, 1 - i * 1e-12, f"c{i}")) for i in range(1000))
    assert len(solve(Chain((Leaf(5.0),), spans))) == 1001


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        # equal to keeping the child: nothing is chosen
        (Chain((Leaf(1.0),), (Span(0, 1, Choice(1.0, 0.0, "a")),)), ()),
        # equal spans: the one listed first, also where they start at different places
        (
            Chain(
                (Leaf(9.0),),
                (Span(0, 1, Choice(1.0, 0.0, "a")), Span(0, 1, Choice(1.0, 0.0, "b"))),
            ),
            ("a",),
        ),
        (
            Chain(
                (Leaf(0.0), Leaf(9.0)),
                (Span(1, 2, Choice(1.0, 0.0, "b")), Span(0, 2, Choice(1.0, 0.0, "a"))),
            ),
            ("b",),
        ),
        # a branch that stays before its drop, decided from the last one
        (
            Fork((Leaf(1.0), Leaf(1.0)), (Choice(0.0, 0.0, "a"), Choice(0.0, 0.0, "b"))),
            ("a",),
        ),
        # one branch left before two
        (Fork((Leaf(1.0), Leaf(0.0)), (None, Choice(0.0, 0.0, "b"))), ("b",)),
    ],
)
def test_ties(problem, expected):
    frontier = solve(problem)
    assert len(frontier) == 1
    assert frontier.choices(0) == expected


def test_ties_among_many():
    spans = tuple(Span(i % 5, 5, Choice(1.0, 2.0, i)) for i in range(1000))
    frontier = solve(Chain((Leaf(0.0),) * 5 + (Leaf(9.0),), spans))
    assert frontier.choices(0) == ()
    spans = tuple(Span(i % 5, 6, Choice(1.0, 2.0, i)) for i in range(1000))
    frontier = solve(Chain((Leaf(0.0),) * 5 + (Leaf(9.0),), spans))
    assert len(frontier) == 2
    assert frontier.choices(0) == (0,)


def test_at_least_one_branch_stays():
    drops = (Choice(0.0, 1.0, "drop 0"), Choice(0.0, 2.0, "drop 1"), Choice(0.0, 4.0, "drop 2"))
    frontier = solve(Fork((Leaf(3.0), Leaf(5.0), Leaf(1.0)), drops))
    assert frontier.choices(0) == ("drop 0", "drop 1")
    assert (frontier.latency[0], frontier.loss[0]) == (1.0, 3.0)
    assert len(solve(Fork((Leaf(3.0),), (Choice(0.0, 0.0, "only"),)))) == 1


def test_join_is_paid_while_two_branches_stay():
    drops = (Choice(0.25, 1.0, "drop 0"), Choice(0.25, 4.0, "drop 1"), None)
    frontier = solve(Fork((Leaf(2.0), Leaf(4.0), Leaf(8.0)), drops, join=32.0))
    assert list(zip(frontier.latency, frontier.loss, strict=True)) == [
        (8.5, 5.0),  # both dropped: no join
        (8.0 + 2.0 + 0.25 + 32.0, 4.0),
        (8.0 + 4.0 + 0.25 + 32.0, 1.0),
        (8.0 + 4.0 + 2.0 + 32.0, 0.0),
    ]
    assert solve(Fork((Leaf(2.0), Leaf(4.0)), join=32.0)).latency.tolist() == [38.0]
    assert solve(Fork((Leaf(2.0),), join=32.0)).latency.tolist() == [2.0]


def test_choices_follow_the_order_of_the_tree():
    def replaced(name: str) -> Chain:
        return Chain((Leaf(4.0),), (Span(0, 1, Choice(1.0, 1.0, name)),))

    fork = Fork((replaced("b"), Leaf(3.0), replaced("d")), (None, Choice(0.0, 1.0, "c"), None))
    problem = Chain((replaced("a"), fork, Leaf(4.0)), (Span(2, 3, Choice(0.0, 1.0, "e")),))
    assert solve(problem).choices(0) == ("a", "b", "c", "d", "e")


def test_a_problem_without_choices_is_one_plan():
    for problem in (Leaf(2.5), Chain((Leaf(1.0), Leaf(1.5))), Fork((Leaf(1.0), Leaf(1.5)))):
        frontier = solve(problem)
        assert (len(frontier), frontier.latency[0], frontier.loss[0]) == (1, 2.5, 0.0)
        assert frontier.choices(0) == ()
    assert solve(Chain(())).latency.tolist() == [0.0]


def test_a_thousand_children():
    chain = wide_chain(1000)
    points = np.array(
        [
            [(child.children[0].latency, 0.0)] + [(span.choice.latency, span.choice.loss) for span in child.spans]
            for child in chain.children
        ]
    )
    frontier = solve(chain)
    assert 1000 < len(frontier) <= 4096
    assert frontier.bound > 0
    for fraction in (0.2, 0.4, 0.6, 0.8):
        budget = fraction * frontier.latency[-1]
        index = frontier.at(budget)
        latency, loss = cost_of(chain, frontier.choices(index))
        assert latency == pytest.approx(frontier.latency[index], rel=1e-10)
        assert loss == pytest.approx(frontier.loss[index], rel=1e-10)
        assert latency <= budget
        # weak duality: no plan within the budget loses less than this
        prices = np.geomspace(0.1, 100, 500)
        dual = [(points[:, :, 1] + price * points[:, :, 0]).min(axis=1).sum() - price * budget for price in prices]
        assert max(dual) <= loss <= 1.01 * max(dual)


def test_at():
    frontier = solve(Chain((Leaf(4.0),), (Span(0, 1, Choice(1.5, 2.0, "a")),)))
    assert [frontier.at(budget) for budget in (1.5, 3.9, 4.0, math.inf)] == [0, 0, 1, 1]
    with pytest.raises(BudgetError) as error:
        frontier.at(1.4)
    assert str(error.value) == (
        "no plan has a latency of at most 1.4: the smallest reachable is 1.5. "
        "Raise the budget to at least that, or allow more candidates."
    )
    with pytest.raises(BudgetError, match=r"the budget is nan; expected a number\."):
        frontier.at(math.nan)


def test_the_budget_an_error_names_is_reachable():
    frontier = solve(long_chain())
    with pytest.raises(BudgetError) as error:
        frontier.at(1.0)
    named = str(error.value).split("smallest reachable is ")[1].split(". Raise")[0]
    assert frontier.at(float(named)) == 0


def test_frontier_is_readable_and_read_only():
    frontier = solve(Chain((Leaf(4.0),), (Span(0, 1, Choice(1.5, 2.0, "a")),)))
    assert repr(frontier) == "Frontier(2 points, latency 1.5 to 4, loss 2 to 0, exact)"
    assert repr(solve(Leaf(1.0))) == "Frontier(1 point, latency 1 to 1, loss 0 to 0, exact)"
    assert "rounded up by at most " in repr(solve(wide_chain(20), max_points=8))
    assert frontier.choices(-2) == ("a",)
    with pytest.raises(IndexError):
        frontier.choices(2)
    with pytest.raises(ValueError, match="read-only"):
        frontier.latency[0] = 0.0


NAN_LOSS = "the loss of choice 'k' is nan; expected a finite number. Leave out a candidate that must not be chosen."


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Leaf(-1.0),
            "the latency of a leaf is -1.0; expected a finite number that is not negative.",
        ),
        (
            lambda: Choice(math.nan, 0.0, "k"),
            "the latency of choice 'k' is nan; expected a finite number that is not negative.",
        ),
        (lambda: Choice(0.0, math.nan, "k"), NAN_LOSS),
        (lambda: Choice(0.0, math.inf, "k"), NAN_LOSS.replace("nan", "inf")),
        (
            lambda: Chain((Leaf(1.0),), (Span(0, 2, Choice(0.0, 0.0, "k")),)),
            "the span of choice 'k' has start=0 and stop=2; expected 0 <= start < stop <= 1, "
            "the number of children of its chain.",
        ),
        (
            lambda: Chain((Leaf(1.0),), (Span(1, 1, Choice(0.0, 0.0, "k")),)),
            "the span of choice 'k' has start=1 and stop=1; expected 0 <= start < stop <= 1, "
            "the number of children of its chain.",
        ),
        (
            lambda: Chain((Leaf(1.0),), (Span(-1, 1, Choice(0.0, 0.0, "k")),)),
            "the span of choice 'k' has start=-1 and stop=1; expected 0 <= start < stop <= 1, "
            "the number of children of its chain.",
        ),
        (lambda: Fork(()), "a fork has no branches; expected at least one."),
        (
            lambda: Fork((Leaf(1.0), Leaf(1.0)), (None,)),
            "a fork has 2 branches and 1 drops; expected one drop (or None) per branch, or () for none.",
        ),
        (
            lambda: Fork((Leaf(1.0),), join=math.inf),
            "the join latency of a fork is inf; expected a finite number that is not negative.",
        ),
        (lambda: solve(Chain(("a",))), "expected a Leaf, a Chain or a Fork, got str."),
        (
            lambda: solve(Leaf(1.0), max_points=1),
            "max_points is 1; expected at least 2, or None for exact.",
        ),
        (
            lambda: solve_levels(Leaf(1.0), budget=0.0, levels=3),
            "the budget is 0.0; expected a finite number above 0.",
        ),
        (
            lambda: solve_levels(Leaf(1.0), budget=1.0, levels=0),
            "levels is 0; expected at least 1.",
        ),
        (
            lambda: solve_levels(Leaf(7.9), budget=4.0, levels=4),
            "no plan has a latency of at most 4.0 in 4 levels: the smallest reachable, "
            "rounded down, is 7.0. Raise the budget to at least that, or allow more candidates.",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


def algorithm_1(chain: Chain, budget: float, levels: int) -> float:
    """The least loss of the paper's table over (position, level), for a chain of leaves."""
    arcs = [(i, i + 1, leaf.latency, 0.0) for i, leaf in enumerate(chain.children)]
    arcs += [(s.start, s.stop, s.choice.latency, s.choice.loss) for s in chain.spans]
    table = [[math.inf] * (levels + 1) for _ in range(len(chain.children) + 1)]
    table[0] = [0.0] * (levels + 1)
    for start, stop, latency, loss in sorted(arcs, key=lambda arc: arc[1]):
        cost = math.floor(latency * levels / budget)
        for level in range(cost, levels + 1):
            table[stop][level] = min(table[stop][level], table[start][level - cost] + loss)
    return table[-1][levels]


@pytest.mark.parametrize(("seed", "levels"), [(0, 50), (1, 200), (2, 700), (3, 7)])
def test_levels_equal_the_table_of_the_paper(seed, levels):
    chain = long_chain(20, 120, seed=seed)
    budget = 0.6 * sum(leaf.latency for leaf in chain.children)
    selection = solve_levels(chain, budget, levels)
    assert selection.loss == pytest.approx(algorithm_1(chain, budget, levels), rel=1e-12)
    cost = cost_of(chain, selection.choices)
    assert cost == pytest.approx((selection.latency, selection.loss), rel=1e-12)
    assert selection.latency <= budget + 20 * budget / levels


@pytest.mark.parametrize("seed", range(0, 80, 2))
def test_levels_equal_the_exact_solution_on_multiples_of_a_level(seed):
    problem = Trees(seed).tree()  # latencies are multiples of 0.1
    exact = solve(problem)
    budget = max(0.1, round(0.6 * exact.latency[-1] + 0.4 * exact.latency[0], 1))
    selection = solve_levels(problem, budget, levels=round(budget / 0.1))
    assert selection.loss == pytest.approx(exact.loss[exact.at(budget + 1e-9)], abs=1e-9)
    assert selection.latency <= budget + 1e-9


def test_levels_can_be_over_budget():
    """Ten children of 1.9 fit ten levels of one millisecond each, and take 19."""
    bypass = [Span(i, i + 1, Choice(0.0, 1.0, f"bypass {i}")) for i in range(10)]
    chain = Chain((Leaf(1.9),) * 10, tuple(bypass))
    selection = solve_levels(chain, budget=10.0, levels=10)
    assert (selection.loss, selection.choices) == (0.0, ())
    assert selection.latency == pytest.approx(19.0)
    frontier = solve(chain)
    assert frontier.latency[frontier.at(10.0)] == pytest.approx(9.5)
    assert frontier.loss[frontier.at(10.0)] == 5.0


def test_solver_needs_numpy_only():
    code = (
        "import sys, types; package = types.ModuleType('fxmerge');"
        f"package.__path__ = [{str(Path(solver.__file__).parent)!r}];"
        "sys.modules['fxmerge'] = package; import fxmerge.solver;"
        "print(sorted({'torch', 'scipy', 'networkx', 'onnx'} & set(sys.modules)))"
    )
    result = subprocess.run(  # noqa: S603 - our own interpreter and text
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
