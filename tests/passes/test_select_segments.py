"""Selection: the frontier against every disjoint set of candidates."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from small_networks import Add, captured, conv, folded, head, images, lively, output_error, relaxed, residual, small
from torch import nn

from fxmerge.errors import PlanError
from fxmerge.estimators import Magnitude
from fxmerge.graph import between, by_id, convolutions, node_id
from fxmerge.passes import LatencyTable, SelectSegmentsPass
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.profile_latency import profile_latency
from fxmerge.passes.select_segments import selection_problem
from fxmerge.regions import Mesh
from fxmerge.runtimes import get_runtime
from fxmerge.solver import Chain, Fork


class Tangled(nn.Module):
    """A Mesh with a Mesh in one of its chains, in which bare convolutions belong to no chain."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4)
        self.bare, self.also, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), conv(4, 4)

    def inner(self, x):
        a = self.bare(x)
        b = self.b(x + a)
        return self.also(a * b + x) + b * a

    def forward(self, x):
        x = self.stem(x)
        a = self.a(x)
        b = self.c(self.inner(a))
        return self.last(b * a + x) + b


NETWORKS = {
    "chain": lambda: nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 6, s=2), conv(6, 6), head(6)),
    "residual": lambda: nn.Sequential(conv(3, 4), residual(4, 4), conv(4, 4), head(4)),
    "two branches": lambda: nn.Sequential(Add(conv(4, 4), conv(4, 4)), conv(4, 4)),
    "tangled": Tangled,
}


def owned(gm, candidate):
    nodes = by_id(gm)
    inside = between(nodes[candidate.entry], nodes[candidate.exit])
    return inside | {nodes[join] for join, _ in candidate.cuts if candidate.kind == "drop"}


def tables(gm, seed):
    """Random latencies and losses for everything: no relation between them that a wrong solver could profit from."""
    rng = random.Random(seed)  # noqa: S311 - seeded numbers
    enumeration = enumerate_segments(gm)
    candidates = list(dict.fromkeys(site.candidate for site in enumeration.sites))
    kept = {node_id(node): rng.uniform(1, 3) for node, _ in convolutions(gm)}
    merged = {c: rng.uniform(0.5, 3) for c in candidates if c.kind == "merge"}
    inside = {c: (*c.kept, *c.bypassed) for c in candidates}
    losses = {c: rng.uniform(0, 2) for c in candidates}
    return enumeration, LatencyTable("ms", kept, merged, {}, inside, 0.0, 1.0, 0.0), losses


def cost(table, losses, chosen):
    gone = {name for c in chosen for name in (*c.kept, *c.bypassed)}
    latency = sum(ms for name, ms in table.kept.items() if name not in gone) + sum(map(table.of, chosen))
    return latency, sum(losses[c] for c in chosen)


def disjoint_sets(owners, start=0, used=frozenset()):
    yield []
    for index in range(start, len(owners)):
        candidate, nodes = owners[index]
        if not nodes & used:
            for rest in disjoint_sets(owners, index + 1, used | nodes):
                yield [candidate, *rest]


def pareto(points):
    best = float("inf")
    for latency, loss in sorted(points):
        if loss < best - 1e-12:
            best = loss
            yield latency, loss


@pytest.mark.parametrize("name", NETWORKS)
def test_the_frontier_is_that_of_all_disjoint_sets(name):
    model = lively(NETWORKS[name]())
    gm = captured(model, images(2, next(model.parameters()).shape[1], 8, 8))
    for seed in range(3):
        enumeration, table, losses = tables(gm, seed)
        owners = [(site.candidate, frozenset(owned(gm, site.candidate))) for site in enumeration.sites]
        points = {cost(table, losses, chosen) for chosen in disjoint_sets(owners)}
        assert len(points) > 8
        expected = np.array(list(pareto(points)))
        result = SelectSegmentsPass(enumeration, table, losses, max_points=None)(gm)
        found = result.frontier
        assert np.allclose(found.latency, expected[:, 0], rtol=0, atol=1e-9)
        assert np.allclose(found.loss, expected[:, 1], rtol=0, atol=1e-9)
        assert not result.modified
        for index in range(len(found)):
            chosen = [enumeration.sites[number].candidate for number in found.choices(index)]
            assert cost(table, losses, chosen) == pytest.approx((found.latency[index], found.loss[index]))


def test_every_convolution_of_a_mesh_is_counted_once():
    gm = captured(lively(Tangled()), images(2, 3, 8, 8))
    enumeration, table, losses = tables(gm, 0)
    meshes = [child for series in enumeration.series for child in series.children if isinstance(child, Mesh)]
    assert len(meshes) == 2
    assert set(meshes[1].nodes) < set(meshes[0].nodes)
    frontier = SelectSegmentsPass(enumeration, table, losses)(gm).frontier
    assert frontier.loss[-1] == 0.0
    assert frontier.latency[-1] == pytest.approx(sum(table.kept.values()))


def test_every_plan_of_a_frontier_can_be_installed():
    for name in ("residual", "inverted"):
        gm, x = small(name)
        enumeration = enumerate_segments(gm)
        table = profile_latency(gm, enumeration, get_runtime("macs"), 2, get_runtime("macs").build(gm, (x,), {})())
        score = Magnitude().prepare(gm)
        losses = {site.candidate: score(site.candidate) for site in enumeration.sites}
        frontier = SelectSegmentsPass(enumeration, table, losses)(gm).frontier
        assert len(frontier) > 4
        for index in range(0, len(frontier), max(1, len(frontier) // 5)):
            chosen = [enumeration.sites[number].candidate for number in frontier.choices(index)]
            result = relaxed(gm, *chosen)
            assert output_error(result, folded(result), x) < 1e-10


def test_branches_are_forks_whose_drops_are_choices():
    gm, _ = small("residual")
    enumeration, table, losses = tables(gm, 0)
    problem = selection_problem(enumeration, table, losses)
    assert isinstance(problem, Chain)
    forks = [child for child in problem.children if isinstance(child, Fork)]
    assert len(forks) == 3
    for fork in forks:
        drops = [drop for drop in fork.drops if drop is not None]
        assert [enumeration.sites[drop.key].candidate.kind for drop in drops] == ["drop"] * len(drops)
        assert len(drops) >= 1


def test_a_bound_on_the_points_is_kept_and_stated():
    gm, _ = small("inception")
    enumeration, table, losses = tables(gm, 1)
    exact = SelectSegmentsPass(enumeration, table, losses, max_points=None)(gm).frontier
    coarse = SelectSegmentsPass(enumeration, table, losses, max_points=4)(gm).frontier
    assert exact.bound == 0.0
    assert coarse.bound > 0
    assert len(coarse) < len(exact)


def test_relax_refuses_just_what_the_solver_rules_out():
    gm, _ = small("chain")
    sites = enumerate_segments(gm).sites
    pairs = [(a, b) for a in sites for b in sites if a is not b and a.series == b.series]
    for one, other in pairs[:40]:
        chosen = (one.candidate, other.candidate)
        assert (one.start < other.stop and other.start < one.stop) == bool(owned(gm, chosen[0]) & owned(gm, chosen[1]))
        if one.start < other.stop and other.start < one.stop:
            with pytest.raises(PlanError, match="belongs to two candidates"):
                relaxed(gm, *chosen)
        else:
            relaxed(gm, *chosen)


def test_the_graph_is_not_touched():
    gm, x = small("chain")
    enumeration, table, losses = tables(gm, 0)
    before = gm(x)
    SelectSegmentsPass(enumeration, table, losses)(gm)
    assert torch.equal(gm(x), before)
