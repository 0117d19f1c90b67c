"""The latency table: what is measured, how often, and how sums of it become end-to-end latencies."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_networks import Add, captured, conv, head, images, lively, residual, small
from torch import nn

import fxmerge
from fxmerge.candidates import Candidate
from fxmerge.graph import clone, convolutions, node_id
from fxmerge.passes import LatencyTable, ProfileLatencyPass
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.profile_latency import layer_signatures
from fxmerge.plan import PlanEntry
from fxmerge.runtimes import get_runtime
from fxmerge.store import LatencyStore


class Fake:
    """A runtime on which a layer takes as long as it has multiply-accumulates a batch, in thousands; counts its layers."""

    name, unit = "fake", "ms"

    def __init__(self, *, deterministic=False):
        self.deterministic = deterministic
        self.measured = []

    def environment(self):
        return {"runtime": self.name}

    def measure(self, signatures, on_result):
        for signature in signatures:
            self.measured.append(signature)
            on_result(signature, self.latency(signature))

    @staticmethod
    def latency(signature):
        return signature.geometry.macs(signature.in_size, signature.batch) / 1e3

    def build(self, module, args, kwargs):
        raise NotImplementedError


def profile(gm, runtime, *, batch=4, original=100.0, store=None):
    enumeration = enumerate_segments(gm)
    result = ProfileLatencyPass(enumeration, runtime, batch, original, store)(gm)
    assert not result.modified
    assert result.graph_module is gm
    return enumeration, result.table


def test_layers_are_measured_at_their_own_size_with_what_follows():
    gm, _ = small("residual")
    enumeration, _ = profile(gm, Fake())
    kept, merged = layer_signatures(gm, enumeration, batch=4)
    assert list(kept) == [node_id(node) for node, _ in convolutions(gm)]
    assert (kept["0.0"].in_size, kept["0.0"].batch, kept["0.0"].activation) == ((12, 12), 4, "ReLU")
    assert (kept["2.0.left.0.0"].in_size, kept["2.0.left.0.0"].geometry.stride) == ((12, 12), (2, 2))
    assert kept["1.0.left.1.0"].activation is None  # an addition comes first
    whole = next(c for c in merged if c.kept == ("1.0.left.0.0", "1.0.left.1.0") and c.exit == "1.0/add")
    assert (merged[whole].geometry, merged[whole].in_size, merged[whole].activation) == (
        whole.geometry,
        (12, 12),
        "ReLU",
    )
    assert {c.kind for c in merged} == {"merge"}


def test_an_inserted_activation_counts_with_its_layer():
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), head(4)))
    gm = captured(model, images(2, 3, 6, 6))
    enumeration = enumerate_segments(gm)
    plain = next(site for site in enumeration.sites if site.candidate.kept == ("0", "2"))
    with_activation = Candidate(**{**fields_of(plain.candidate), "activation": "SiLU"})
    found = layer_signatures(
        gm, type(enumeration)(enumeration.series, (plain, replaced(plain, with_activation)), ()), 1
    )[1]
    assert [found[c].activation for c in (plain.candidate, with_activation)] == [None, "SiLU"]


def fields_of(candidate):
    return {name: getattr(candidate, name) for name in candidate.__dataclass_fields__}


def replaced(site, candidate):
    return type(site)(site.series, site.start, site.stop, candidate)


def test_equal_layers_are_measured_once_and_stored_ones_not_at_all(tmp_path):
    model = lively(nn.Sequential(conv(3, 4), *(residual(4, 4) for _ in range(3)), head(4)))
    gm = captured(model, images(2, 3, 8, 8))
    runtime = Fake()
    with LatencyStore(tmp_path / "latency.sqlite") as store:
        _, table = profile(gm, runtime, store=store)
        assert len(runtime.measured) == len(set(runtime.measured))
        assert len(runtime.measured) < len(table.kept) + len(table.merged)
        again = Fake()
        _, second = profile(gm, again, store=store)
    assert again.measured == []
    assert second == table


def test_a_measured_table_is_scaled_to_the_original():
    gm, _ = small("chain")
    enumeration, table = profile(gm, Fake(), original=250.0)
    total = sum(table.kept.values())
    assert table.kept["0.0"] == 4 * 12 * 12 * 3 * 4 * 9 / 1e3
    assert (table.scale, table.rest) == (250.0 / total, 0.0)
    assert table.end_to_end(total) == pytest.approx(250.0)
    assert table.end_to_end(total / 2) == pytest.approx(125.0)
    assert {table.of(site.candidate) for site in enumeration.sites if site.candidate.kind != "merge"} == {0.0}


def test_a_counted_table_adds_what_it_leaves_out():
    gm, x = small("chain")
    runtime = get_runtime("macs")
    original = runtime.build(gm, (x,), {})()
    _, table = profile(gm, runtime, batch=2, original=original)
    assert table.scale == 1.0
    assert table.rest == 2 * 6 * 5  # the classifier
    assert table.end_to_end(sum(table.kept.values())) == original


def test_a_network_without_convolutions_has_an_empty_table():
    gm = captured(lively(nn.Sequential(nn.Tanh(), nn.AvgPool2d(2))), images(2, 3, 4, 4))
    _, table = profile(gm, Fake(), original=3.0)
    assert table == LatencyTable("ms", {}, {}, {}, {}, 3.0, 1.0, 0.0)


def test_what_is_too_large_to_win_is_not_measured_alone_either():
    """All layers of the original are equally quick, so what has more than twice the MACs that it replaces is hopeless."""
    gm, _ = small("residual")
    runtime = Fake()
    enumeration, table = profile(gm, runtime)
    _, merged = layer_signatures(gm, enumeration, batch=4)
    wanted = {s for c, s in merged.items() if Fake.latency(s) <= 2 * table.replaced(c)}  # perhaps elsewhere
    hopeless = {c for c, signature in merged.items() if signature not in wanted}
    assert hopeless
    assert hopeless == {c for c, latency in table.merged.items() if math.isinf(latency)}
    kept, _ = layer_signatures(gm, enumeration, batch=4)
    assert set(runtime.measured) == wanted | set(kept.values())


def test_profiling_changes_nothing():
    gm = clone(small("inception")[0])
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    code = gm.code
    profile(gm, Fake())
    assert gm.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_what_folds_without_loss_counts_as_it_is_deployed():
    block = Add(conv(4, 4, act=False), Add(conv(4, 4, 1, act=False)))
    net, x = lively(nn.Sequential(conv(3, 4), block, nn.ReLU(), conv(4, 4), conv(4, 8))), images(1, 3, 8, 8)
    found = fxmerge.frontier(net, x, runtime="macs")
    one = 9 * 4 * 4 * 64
    assert found.original == 9 * 3 * 4 * 64 + 2 * one + 2 * one
    assert found.points[-1] == (found.original, 0.0)
    assert found.points[0][0] >= 0
    for index in (0, len(found) // 2, len(found) - 1):
        assert found.apply(found.plan(index)).report.measured == found.points[index][0]
    assert found.at(1.0).predicted == found.original
    bypassed = next(
        c for c in (s.candidate for s in found.enumeration.sites) if c.kind == "bypass" and c.bypassed == ("3.0",)
    )
    only = found.apply(fxmerge.Plan.from_json(plan_of(found, bypassed)))
    assert only.report.measured == only.plan.predicted == found.original - one


def plan_of(found, candidate):
    plan = found.at(1.0)
    return dataclasses.replace(plan, entries=(PlanEntry(candidate, 0.0, 0.0),)).to_json()


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=2), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.conv(x)[..., :-2])


def test_a_crop_behind_a_convolution_is_never_computed():
    net, x = lively(nn.Sequential(Causal(), nn.ReLU(), Causal(), nn.ReLU(), nn.Conv1d(4, 4, 1))), images(1, 4, 10)
    found = fxmerge.frontier(net, x, runtime="macs")
    assert found.original == found.points[-1][0] == (3 + 3 + 1) * 4 * 4 * 10
    assert found.points[0][0] >= 0
