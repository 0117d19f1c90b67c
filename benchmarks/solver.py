"""Time the solver against Algorithm 1 of LayerMerge: ``python benchmarks/solver.py``.

Prints three tables and writes ``benchmarks/results/solver.json``.

1. A chain shaped like the published enumeration of MobileNetV2-1.0 (Kim et al., ICML 2024): its 50
   convolutions in order, 391 candidates that merge or bypass intervals of them, 40.8 ms in all,
   budget 24.47 ms. The times are synthetic: seeded, proportional to multiply-adds plus an overhead.
   Compared are :func:`fxmerge.solver.solve` (the whole exact frontier, every budget) with three
   implementations of the paper's Algorithm 1 (one budget): ``algorithm_1_states`` keeps a
   dictionary of states, each with its plan, as the published code does; ``algorithm_1_lists`` is
   the leanest plain Python; :func:`fxmerge.solver.solve_levels` runs on the solver's own frontiers.
   The published code itself took 0.49 s at levels of 0.1 ms and 4.1 s at 0.01 ms on an
   enumeration of this size.
2. How far over budget the plan of each is when its true times are added up.
3. Chains of 50 to 1000 children with four points each, with the default ``max_points``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fxmerge.solver import Chain, Choice, Leaf, Span, solve, solve_levels

SEED = 0
TOTAL, BUDGET, CANDIDATES = 40.8, 24.47, 391
LEVELS_MS = (0.1, 0.01)
RESULTS = Path(__file__).parent / "results" / "solver.json"
# The inverted residual stages of MobileNetV2: expansion, output channels, repeats, first stride.
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
STAGES += [(6, 160, 3, 2), (6, 320, 1, 1)]


class Conv(NamedTuple):
    """One convolution, at the resolution of its output."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    depthwise: bool
    size: int

    def milliseconds(self) -> float:
        """Unscaled: depthwise convolutions reach a fifth of the throughput of dense ones."""
        taps = self.kernel**2 * self.outputs * (5 if self.depthwise else self.inputs)
        return 1.5e6 + float(taps * self.size**2)


def mobilenet_v2() -> list[Conv]:
    """The first 50 convolutions at 224×224."""
    convs = [Conv(3, 32, 3, 2, False, 112)]
    channels, size = 32, 112
    for expansion, outputs, repeats, first_stride in STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            middle = channels * expansion
            if expansion > 1:
                convs.append(Conv(channels, middle, 1, 1, False, size))
            size //= stride
            convs.append(Conv(middle, middle, 3, stride, True, size))
            convs.append(Conv(middle, outputs, 1, 1, False, size))
            channels = outputs
    return convs[:50]


def mobilenet_chain() -> Chain:
    """The chain of 50 positions and 391 candidates, with seeded times and losses."""
    rng = random.Random(SEED)  # noqa: S311 - synthetic data
    convs = mobilenet_v2()
    times = [conv.milliseconds() * rng.lognormvariate(0, 0.1) for conv in convs]
    scale = TOTAL / sum(times)
    merges = []
    for length in range(1, len(convs) + 1):
        for start in range(len(convs) - length + 1):
            parts = convs[start : start + length]
            kernel = 1 + sum(conv.kernel - 1 for conv in parts)
            for merged in range(1, min(kernel, 7) + (length > 1), 2):
                merges.append((start, start + length, merged, kernel))
    spans = []
    for start, stop, merged, full in merges[:CANDIDATES]:
        parts = convs[start:stop]
        stride = math.prod(conv.stride for conv in parts)
        depthwise = all(conv.depthwise for conv in parts)
        conv = Conv(parts[0].inputs, parts[-1].outputs, merged, stride, depthwise, parts[-1].size)
        latency = scale * conv.milliseconds() * rng.lognormvariate(0, 0.1)
        removed = (stop - start - 1) + 0.5 * (full - merged)
        loss = 0.01 * (1 + removed) * rng.lognormvariate(0, 0.5)
        spans.append(Span(start, stop, Choice(latency, loss, (start, stop, merged))))
    return Chain(tuple(Leaf(scale * milliseconds) for milliseconds in times), tuple(spans))


class Candidate(NamedTuple):
    """What replaces the positions from start on, its latency in levels too."""

    start: int
    cost: int
    latency: float
    loss: float


def candidates_by_stop(chain: Chain, budget: float, levels: int) -> list[list[Candidate]]:
    """Per position the candidates that end there; keeping a layer is one of them."""
    arcs = [
        (stop - 1, stop, leaf.latency, 0.0)
        for stop, leaf in enumerate(chain.children, start=1)
        if isinstance(leaf, Leaf)
    ]
    arcs += [(s.start, s.stop, s.choice.latency, s.choice.loss) for s in chain.spans]
    ending: list[list[Candidate]] = [[] for _ in range(len(chain.children) + 1)]
    for start, stop, latency, loss in arcs:
        cost = math.floor(latency * levels / budget)
        ending[stop].append(Candidate(start, cost, latency, loss))
    return ending


def algorithm_1_states(chain: Chain, budget: float, levels: int) -> tuple[float, float]:
    """Algorithm 1 with a dictionary of states; returns the true latency and the loss.

    As in the published code every state carries its plan, values are compared after rounding to
    seven digits, and ties go to the plan with the smaller time.
    """
    ending = candidates_by_stop(chain, budget, levels)
    losses = {(level, 0): 0.0 for level in range(levels + 1)}
    times = {(level, 0): 0 for level in range(levels + 1)}
    plans: dict[tuple[int, int], tuple[Candidate, ...]] = {(level, 0): () for level in range(levels + 1)}
    for stop in range(1, len(ending)):
        for level in range(levels + 1):
            best_loss, best_time = math.inf, 0
            best_plan: tuple[Candidate, ...] = ()
            for candidate in ending[stop]:
                before = (level - candidate.cost, candidate.start)
                if before not in losses:
                    continue
                loss = losses[before] + candidate.loss
                spent = times[before] + candidate.cost
                rounded, best_rounded = round(loss, 7), round(best_loss, 7)
                if rounded < best_rounded or (rounded == best_rounded and spent < best_time):
                    best_loss, best_time = loss, spent
                    best_plan = (*plans[before], candidate)
            if best_loss < math.inf:
                losses[level, stop] = best_loss
                times[level, stop] = best_time
                plans[level, stop] = best_plan
    end = (levels, len(chain.children))
    return sum(candidate.latency for candidate in plans[end]), losses[end]


def algorithm_1_lists(chain: Chain, budget: float, levels: int) -> tuple[float, float]:
    """Algorithm 1 with one list per position; returns the true latency and the loss."""
    ending = candidates_by_stop(chain, budget, levels)
    table = [[(0.0, 0.0)] * (levels + 1)]  # per position and level: loss, true latency
    for candidates in ending[1:]:
        row = []
        for level in range(levels + 1):
            best = (math.inf, math.inf)
            for start, cost, latency, loss in candidates:
                if cost <= level:
                    before = table[start][level - cost]
                    if before[0] + loss < best[0]:
                        best = (before[0] + loss, before[1] + latency)
            row.append(best)
        table.append(row)
    loss, latency = table[-1][levels]
    return latency, loss


def algorithm_1_frontiers(chain: Chain, budget: float, levels: int) -> tuple[float, float]:
    """Algorithm 1 by the solver; returns the true latency and the loss."""
    selection = solve_levels(chain, budget, levels)
    return selection.latency, selection.loss


def independent_children(count: int) -> tuple[Chain, list[list[tuple[float, float]]]]:
    """A chain of children that do not interact, and the four (latency, loss) points of each."""
    rng = random.Random(SEED)  # noqa: S311 - synthetic data
    children, points = [], []
    for child in range(count):
        latency = rng.uniform(0.2, 2.0)
        shares = sorted((rng.random() for _ in range(3)), reverse=True)
        losses = sorted(rng.expovariate(1.0) for _ in range(3))
        choices = [
            Choice(latency * share, loss, (child, number))
            for number, (share, loss) in enumerate(zip(shares, losses, strict=True))
        ]
        children.append(Chain((Leaf(latency),), tuple(Span(0, 1, choice) for choice in choices)))
        points.append([(latency, 0.0)] + [(choice.latency, choice.loss) for choice in choices])
    return Chain(tuple(children)), points


def least_loss(points: list[list[tuple[float, float]]], budget: float) -> float:
    """A lower bound of the loss within the budget, by weak duality."""
    array = np.array(points)
    prices = np.geomspace(1e-3, 1e3, 1000)
    sums = [(array[:, :, 1] + price * array[:, :, 0]).min(axis=1).sum() for price in prices]
    return float(np.max(np.array(sums) - prices * budget))


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median over repeats of the processor time, after one call to warm up.

    Everything here runs on one thread, so on an idle machine this is the time on the clock; on a
    busy one it leaves out the waiting.
    """
    function()
    samples = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        samples.append(time.process_time() - start)
    return statistics.median(samples)


def compare() -> tuple[int, list[dict[str, Any]]]:
    """Tables 1 and 2: the size of the exact frontier, and one row per method and level."""
    chain = mobilenet_chain()
    frontier = solve(chain)
    index = frontier.at(BUDGET)
    latency, loss = float(frontier.latency[index]), float(frontier.loss[index])
    exact = seconds(partial(solve, chain), repeats=51)
    rows = [row("exact frontier", None, exact, exact, latency, loss)]
    for method, repeats in (
        (algorithm_1_states, 3),
        (algorithm_1_lists, 5),
        (algorithm_1_frontiers, 21),
    ):
        for level in LEVELS_MS:
            run = partial(method, chain, BUDGET, round(BUDGET / level))
            latency, loss = run()
            rows.append(row(method.__name__, level, seconds(run, repeats), exact, latency, loss))
    return len(frontier), rows


def row(method: str, level: float | None, taken: float, exact: float, latency: float, loss: float) -> dict[str, Any]:
    """One line of tables 1 and 2."""
    return {
        "method": method,
        "level_ms": level,
        "seconds": taken,
        "times_the_exact_frontier": taken / exact,
        "plan_ms": latency,
        "over_budget_percent": 100 * max(0.0, latency / BUDGET - 1),
        "loss": loss,
    }


def scale() -> list[dict[str, Any]]:
    """Table 3: one row per number of children."""
    rows = []
    for count in (50, 100, 200, 500, 1000):
        chain, points = independent_children(count)
        frontier = solve(chain)
        total = float(frontier.latency[-1])
        index = frontier.at(0.6 * total)
        lower = least_loss(points, 0.6 * total)
        rows.append(
            {
                "children": count,
                "points": len(frontier),
                "seconds": seconds(partial(solve, chain), repeats=3),
                "bound_percent_of_total": 100 * frontier.bound / total,
                "loss_above_lower_bound_percent": 100 * (float(frontier.loss[index]) / lower - 1),
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> None:
    """Run everything, print the tables, write the JSON."""
    (points, comparison), scaling = compare(), scale()
    print(f"50 positions, {CANDIDATES} candidates, {TOTAL} ms in all, budget {BUDGET} ms")
    print(f"{'method':<22}{'level ms':>9}{'ms':>10}{'ratio':>8}{'plan ms':>9}{'over %':>8}{'loss':>8}")
    for line in comparison:
        print(
            f"{line['method']:<22}{line['level_ms'] or '-':>9}{1e3 * line['seconds']:>10.2f}"
            f"{line['times_the_exact_frontier']:>8.1f}{line['plan_ms']:>9.3f}"
            f"{line['over_budget_percent']:>8.2f}{line['loss']:>8.4f}"
        )
    print(f"the exact frontier has {points} points and serves every budget")
    print("\nindependent children, four points each, default max_points, loss at 0.6 of the total")
    print(f"{'children':<10}{'points':>8}{'s':>8}{'bound %':>9}{'loss above lower bound %':>26}")
    for line in scaling:
        print(
            f"{line['children']:<10}{line['points']:>8}{line['seconds']:>8.3f}"
            f"{line['bound_percent_of_total']:>9.3f}{line['loss_above_lower_bound_percent']:>26.3f}"
        )
    report = {
        "command": "python benchmarks/solver.py",
        "machine": machine(),
        "seed": SEED,
        "chain": {
            "positions": 50,
            "candidates": CANDIDATES,
            "total_ms": TOTAL,
            "budget_ms": BUDGET,
            "frontier_points": points,
            "comparison": comparison,
        },
        "scaling": scaling,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
