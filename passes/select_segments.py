"""Choose the candidates: the exact Pareto frontier of latency against loss, for every budget at once.

Turns the enumeration, the latency table and the importance table into the pure numbers of :mod:`fxmerge.solver`: a
Series becomes a chain whose candidates are spans, a Parallel a fork whose branches may be dropped, a Mesh a fork whose
operations all stay. A candidate of infinite latency is no choice. Never looks at weights or modules, and changes nothing:
``modified`` is False.
"""

from __future__ import annotations

__all__ = ["SelectResult", "SelectSegmentsPass", "selection_problem"]

import math
from collections.abc import Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.candidates import Candidate, Enumeration, Site
from fxmerge.graph import node_id
from fxmerge.passes._base import GraphPass
from fxmerge.passes.profile_latency import LatencyTable
from fxmerge.regions import Mesh, Op, Parallel, Region, Series, operations
from fxmerge.solver import Chain, Choice, Fork, Frontier, Leaf, Problem, Span, solve


class SelectResult(PassResult):
    """torch's PassResult with the solver's frontier; its choices are indices of ``enumeration.sites``."""

    frontier: Frontier

    def __new__(cls, graph_module: fx.GraphModule, frontier: Frontier) -> SelectResult:
        """Make a result; the graph is never modified."""
        result = super().__new__(cls, graph_module, False)
        assert isinstance(result, SelectResult)  # noqa: S101 - what the line above makes
        result.frontier = frontier
        return result


class SelectSegmentsPass(GraphPass):
    """Solve for all Pareto-optimal plans.

    Attributes:
        enumeration: the candidates.
        latencies: the latency table.
        losses: candidate -> loss.
        max_points: bound on the points per region (:func:`fxmerge.solver.solve`); None is exact.
    """

    def __init__(
        self,
        enumeration: Enumeration,
        latencies: LatencyTable,
        losses: Mapping[Candidate, float],
        max_points: int | None = 4096,
    ) -> None:
        super().__init__()
        self.enumeration = enumeration
        self.latencies = latencies
        self.losses = losses
        self.max_points = max_points

    def call(self, graph_module: fx.GraphModule) -> SelectResult:
        """Solve; the frontier is in the result's ``frontier``."""
        problem = selection_problem(self.enumeration, self.latencies, self.losses)
        return SelectResult(graph_module, solve(problem, max_points=self.max_points))


def selection_problem(enumeration: Enumeration, latencies: LatencyTable, losses: Mapping[Candidate, float]) -> Problem:
    """The solver's problem; the key of a choice is the index of its site."""
    sites: dict[int, list[tuple[int, Site]]] = {}
    for number, site in enumerate(enumeration.sites):
        if math.isinf(latencies.of(site.candidate)):
            continue
        sites.setdefault(site.series, []).append((number, site))
    numbers = {id(series): number for number, series in enumerate(enumeration.series)}

    def choice(number: int, site: Site) -> Choice:
        return Choice(latencies.of(site.candidate), losses[site.candidate], number)

    def chain(series: Series) -> Problem:
        spans = tuple(
            Span(site.start, site.stop, choice(number, site))
            for number, site in sites.get(numbers[id(series)], ())
            if site.candidate.kind != "drop"
        )
        return Chain(tuple(child(each) for each in series.children), spans)

    def drop(series: Series | None) -> Choice | None:
        listed = () if series is None else sites.get(numbers[id(series)], ())
        return next((choice(number, site) for number, site in listed if site.candidate.kind == "drop"), None)

    def child(region: Region) -> Problem:
        if isinstance(region, Op):
            return Leaf(latencies.kept.get(node_id(region.exit), 0.0))
        if isinstance(region, Parallel):
            branches = tuple(Leaf(0.0) if branch is None else chain(branch) for branch in region.branches)
            drops = tuple(drop(branch) for branch in region.branches)
            return Fork(branches, drops, latencies.kept.get(node_id(region.exit), 0.0))
        return mesh(region)

    def mesh(region: Mesh) -> Problem:
        inside = {node for series in region.children for node in operations(series)}
        loose = sum(latencies.kept.get(node_id(node), 0.0) for node in region.nodes if node not in inside)
        return Fork((Leaf(loose), *(chain(series) for series in region.children)))

    tree = enumeration.series[0]
    inside_tree = {node_id(node) for node in operations(tree)}
    outside = sum(latency for name, latency in latencies.kept.items() if name not in inside_tree)
    whole = chain(tree)
    return Fork((Leaf(outside), whole)) if outside else whole  # what only computes side inputs
