"""Covering networks: what is read from them, against prices that are known; and the same on ONNX Runtime."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from charging import LAYOUT, SCALE, Charged, Charging, layer_price
from own_networks import TimeUNet
from reparam_networks import RepVGG
from torch import fx, nn

from fxmerge.candidates import Candidate, Enumeration, Limits
from fxmerge.capture import capture
from fxmerge.covering import Skeleton, _by_operation, cover, skeleton
from fxmerge.exporters import onnx_bytes
from fxmerge.fitting import apply_candidates
from fxmerge.graph import between, by_id, clone, node_id
from fxmerge.passes import LatencyTable
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.profile_latency import Deployed, layer_signatures, profile_latency
from fxmerge.result import merge_graph
from fxmerge.runtimes import LayerSignature, OpSignature, ProfilingRuntime
from fxmerge.runtimes.onnxruntime import OnnxRuntime
from fxmerge.store import LatencyStore

sys.path.insert(0, str(Path(__file__).parent / "passes"))

from small_networks import SMALL, conv, head, images, lively, random_plan


class Dropped(nn.Module):
    """What hands its input on, around and between layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.nothing = nn.Dropout(0.2), nn.Identity()

    def forward(self, x):
        x = self.drop(self.nothing(self.first(x)))
        return self.nothing(torch.relu(self.drop(self.second(x)))) + self.drop(x)


class Mobile(nn.Module):
    """An inverted residual block with ReLU6 and a stride, as in MobileNetV2."""

    def __init__(self):
        super().__init__()
        layers = [conv(3, 4, s=2), conv(4, 8, 1), conv(8, 8, g=8), conv(8, 4, 1, act=False)]
        self.layers = nn.Sequential(
            *layers, conv(4, 12, 1), conv(12, 12, s=2, g=12), conv(12, 6, 1, act=False), head(6)
        )
        for block in self.layers[:-1]:
            for index, layer in enumerate(block):
                if isinstance(layer, nn.ReLU):
                    block[index] = nn.ReLU6()

    def forward(self, x):
        return self.layers(x)


def normed():
    """Norms over each sample that may return behind a merge."""
    return nn.Sequential(
        conv(3, 4), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), head(4)
    )


def linear_exit():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), conv(4, 4), head(4)
    )


NETWORKS = {
    **{name: SMALL[name] for name in ("chain", "residual", "inverted", "inception")},
    "mobile": Mobile,
    "dropped": Dropped,
    "normed": normed,
    "linear exit": linear_exit,
}
LIMITS = {"linear exit": {"exit_activation": True}}


@dataclass
class Case:
    """A network with its table on a runtime."""

    gm: fx.GraphModule
    args: tuple[torch.Tensor, ...]
    deployed: fx.GraphModule
    enumeration: Enumeration
    runtime: Charging
    table: LatencyTable
    kept: dict[str, LayerSignature]
    merged: dict[Candidate, LayerSignature]

    def built(self, *plan):
        """The deployed network of a plan, as fxmerge itself makes it."""
        return merge_graph(apply_candidates(self.gm, plan, None)[0])

    def predicted(self, *plan):
        return self.table.end_to_end(self.table.total(plan))

    def skeleton(self):
        return skeleton(self.deployed, self.args, {})

    @property
    def candidates(self):
        return list(dict.fromkeys(site.candidate for site in self.enumeration.sites))


def measure(model, args, runtime, *, store=None, **limits):
    gm = clone(capture(model.eval(), args)).eval()
    deployed = merge_graph(gm)
    enumeration = enumerate_segments(gm, Limits(**limits))
    timer = runtime.build(deployed, args, {})
    batch, original = len(args[0]), min(timer() for _ in range(20))
    inputs = Deployed(deployed, args, {})
    table = profile_latency(gm, enumeration, runtime, batch, original, store, inputs)
    return Case(gm, args, deployed, enumeration, runtime, table, *layer_signatures(gm, enumeration, batch))


def network(name):
    model = NETWORKS[name]() if name in NETWORKS else name
    return lively(model).float(), (images(2, 3, 12, 12).float(),)


@functools.cache
def case(name, *, fuses=True, free=()):
    return measure(*network(name), Charging(fuses=fuses, free=free), **LIMITS.get(name, {}))


# --- the table is what was charged ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fuses"),
    [*((name, True) for name in NETWORKS), ("residual", False), ("mobile", False), ("inception", False)],
)
def test_every_layer_has_the_price_that_it_was_charged(name, fuses):
    found = case(name, fuses=fuses)
    assert {key: found.table.kept[key] for key in found.kept} == pytest.approx(
        {key: layer_price(signature) for key, signature in found.kept.items()}, rel=1e-12
    )
    measured = {c: latency for c, latency in found.table.merged.items() if math.isfinite(latency) and c.norm is None}
    for candidate, latency in measured.items():
        assert latency == pytest.approx(layer_price(found.merged[candidate]), rel=1e-12), str(candidate)
    assert len(measured) >= 2
    assert found.runtime.alone == []
    assert found.predicted() == pytest.approx(found.table.original, rel=1e-12)
    assert (found.table.scale, found.table.rest) == pytest.approx((SCALE, SCALE * LAYOUT), rel=1e-12)


def test_numbers_of_a_residual_network():
    """Two images of 12 x 12; MACs cost 1e-3, what runs alone 1e-2 an element."""
    fused, alone = case("residual").table, case("residual", fuses=False).table
    assert fused.kept["0.0"] == alone.kept["0.0"] == pytest.approx(2 * 144 * 4 * 3 * 9 * 1e-3)
    assert fused.kept["2.0.right.0"] == alone.kept["2.0.right.0"] == pytest.approx(2 * 36 * 6 * 4 * 1e-3)
    assert fused.kept["2.0.left.0.0"] == alone.kept["2.0.left.0.0"] == pytest.approx(2 * 36 * 6 * 4 * 9 * 1e-3)
    around = {"0.2": 2 * 144 * 4, "1.0/add": 2 * 144 * 4, "1.1": 2 * 144 * 4, "2.0/add": 2 * 36 * 6, "4.0": 2 * 6}
    assert {name: alone.kept[name] for name in around} == pytest.approx({n: 1e-2 * e for n, e in around.items()})
    inside_of_layers = dict.fromkeys(around, 0.0) | {"4.0": 0.12}
    assert {name: fused.kept[name] for name in around} == pytest.approx(inside_of_layers)
    assert fused.kept["4.2"] == pytest.approx(2 * 5 * 6 * 1e-3)


def test_what_stands_between_the_branches_of_a_concatenation():
    table = case("inception").table
    assert table.kept["3/add"] == pytest.approx(1e-2 * 2 * 144 * 8)  # of two activations: no convolution to run in
    assert table.kept["2.0"] == pytest.approx(1e-3 * 2 * 144 * 8 * 4 * 9)  # grouped: ONNX Runtime names it by the node


def test_a_norm_that_returns_costs_what_it_cost():
    found = case("normed")
    assert found.table.kept["2"] > 0
    back = [c for c in found.merged if c.norm and math.isfinite(found.table.of(c))]
    assert len(back) >= 1
    for candidate in back:
        expected = layer_price(found.merged[candidate]) + found.table.kept[candidate.norm]
        assert found.table.of(candidate) == pytest.approx(expected, rel=1e-12)


def test_candidates_that_leave_nothing_cost_nothing():
    found = case("residual")
    by_kind = {kind: [c for c in found.candidates if c.kind == kind] for kind in ("bypass", "drop")}
    assert {found.table.of(c) for each in by_kind.values() for c in each} == {0.0}
    alone = case("residual", fuses=False).table
    (drop,) = [c for c in by_kind["drop"] if c.cuts == (("1.0/add", 1),)]
    assert set(alone.inside[drop]) == {"1.0.left.0.0", "1.0.left.0.2", "1.0.left.1.0", "1.0/add"}


def test_what_cannot_be_placed_is_measured_alone():
    """The branches of a RepVGG block are one convolution in what is deployed, and merges inside have no place there."""
    model = nn.Sequential(conv(3, 4), RepVGG(4, 4), nn.ReLU(), RepVGG(4, 4), nn.ReLU(), conv(4, 4), head(4))
    found = measure(*network(model), Charging())
    assert found.predicted() == pytest.approx(found.table.original, rel=1e-12)
    assert len(found.table.folded) == 2
    assert {len(names) for names in found.table.folded} == {2}
    assert list(found.table.folded.values()) == pytest.approx([1e-3 * 2 * 144 * 4 * 4 * 9] * 2)
    holds = found.skeleton().holds
    outside = {found.merged[c] for c in found.merged if not holds(found.gm, c)}
    assert len(found.runtime.alone) >= 1
    assert set(found.runtime.alone) - set(found.kept.values()) <= outside
    finite = [c for c in found.merged if math.isfinite(found.table.of(c))]
    assert {c: found.table.of(c) for c in finite} == pytest.approx({c: layer_price(found.merged[c]) for c in finite})


def test_an_end_inside_of_what_folds_without_loss_has_no_place():
    """Two pointwise convolutions are one where that is cheaper, and the value between them is nowhere."""
    model = nn.Sequential(conv(3, 4), conv(4, 4, 1, act=False), conv(4, 12, 1), conv(12, 4, 1), head(4))
    found = measure(*network(model), Charging())
    assert ("1.0", "2.0") in found.table.folded
    whole = found.skeleton()
    placed = {candidate for candidate in found.candidates if whole.holds(found.gm, candidate)}
    assert {c for c in found.candidates if "1.1" in (c.entry, c.exit)} == set(found.candidates) - placed != set()
    for candidate in placed:
        outputs(whole, whole.rewritten(found.gm, [candidate]))


def test_changes_of_layout_count_for_what_causes_them():
    """Convolutions 0, 1 (run with its activation, 2) and 5 share a layout, the pool 3 and the addition 4 do not."""
    operators = ("Conv", "Conv", "Relu", "MaxPool", "Add", "Conv")
    nodes = [
        onnx.helper.make_node(operator, [f"{number - 1}"], [f"{number}"], name=f"fxm{number}_{number}")
        for number, operator in enumerate(operators)
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "layers", [], []))
    latencies = {
        "ReorderInput": 0.01,
        "fxm0_0_nchwc": 1.0,
        "ReorderInput_token_1": 0.02,
        "fxm2_2_0_nchwc": 2.0,
        "ReorderOutput_token_2": 0.03,
        "ReorderOutput_token_3": 0.04,
        "fxm3_3": 3.0,
        "ReorderOutput_token_4": 0.05,
        "fxm4_4": 4.0,
        "ReorderInput_token_5": 0.06,
        "fxm5_5_nchwc": 5.0,
        "ReorderOutput_token_6": 0.07,
    }
    times, rest = _by_operation(latencies, model, {0, 1, 5})
    assert times == pytest.approx({0: 1.0, 1: 2.0, 3: 3.07, 4: 4.11, 5: 5.0})
    assert rest == pytest.approx(0.01 + 0.02 + 0.07)


def test_a_side_input_is_left_out_of_covering_networks():
    torch.manual_seed(0)
    found = measure(TimeUNet(), (torch.randn(2, 3, 16, 16), torch.rand(2)), Charging())
    assert found.predicted() == pytest.approx(found.table.original, rel=1e-9)
    merges = [c for c in found.merged if math.isfinite(found.table.of(c)) and c.norm is None]
    for candidate in merges:
        assert found.table.of(candidate) == pytest.approx(layer_price(found.merged[candidate]))
    assert len(merges) >= 3


# --- plans ------------------------------------------------------------------------------------------------------------


FUSED, ALONE = {"free": ("Relu", "Clip", "Add")}, {"fuses": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, FUSED) for name in ("residual", "inverted", "inception", "mobile", "dropped", "linear exit")),
        *((name, ALONE) for name in ("residual", "inverted", "mobile")),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_plans_are_predicted_to_the_last_digit(name, options):
    """The sum of the table is what the network that fxmerge builds is charged, unless it folds or simplifies further."""
    found = case(name, **options)
    originally = paid(found.runtime.charge(exported(found, found.deployed)))
    exact = 0
    for seed in range(4):
        drawn = random_plan(found.gm, seed, **LIMITS.get(name, {}))
        plan = [c for c in drawn if math.isfinite(found.table.of(c))]
        network = found.built(*plan)
        prices = found.runtime.charge(exported(found, network))
        charged, predicted = SCALE * sum(prices.values()), found.predicted(*plan)
        gone = sum(found.table.kept[key] > 0 for c in plan for key in found.table.inside[c])
        inserted = sum(c.kind == "merge" for c in plan)
        if paid(prices) == originally - gone + inserted:
            exact += bool(plan)
            assert predicted == pytest.approx(charged, rel=1e-9), [str(c) for c in plan]
        else:
            assert predicted > charged * (1 + 1e-9)
    assert exact >= 1


def exported(found, network):
    return onnx.load_model_from_string(onnx_bytes(network, found.args, {}, dynamic_batch=False))


def paid(prices):
    return sum(price > 0 for price in prices.values())


# --- the networks themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "inverted", "inception", "dropped", "normed", "linear exit"])
def test_every_candidate_gives_a_network_that_runs(name):
    found = case(name)
    whole = found.skeleton()
    (before,) = outputs(whole, whole.model)
    assert np.allclose(before, found.gm(*found.args).detach().numpy(), atol=1e-4)
    for candidate in found.candidates:
        assert whole.holds(found.gm, candidate), str(candidate)
        model = whole.rewritten(found.gm, [candidate])
        onnx.checker.check_model(model, full_check=True)
        (after,) = outputs(whole, model)
        assert after.shape == before.shape
        assert not np.allclose(after, before, atol=1e-4), str(candidate)  # its weights are random, or something is gone
        gone = {f"fxm{number}_" for number, key in enumerate(whole.operations) if key in removed(found, candidate)}
        assert not [node.name for node in model.graph.node if node.name.startswith(tuple(gone))]
    assert [node.name for node in whole.model.graph.node] == [node.name for node in found.skeleton().model.graph.node]


def removed(found, candidate):
    nodes = by_id(found.gm)
    return {node_id(node) for node in between(nodes[candidate.entry], nodes[candidate.exit])}


def outputs(whole: Skeleton, model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(whole.feeds))


def test_the_network_that_ends_with_a_candidate_returns_what_it_gives():
    """What names the output has to follow."""
    model = nn.Sequential(conv(3, 4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    found = measure(*network(model), Charging())
    last = next(c for c in found.candidates if c.kind == "merge" and c.exit == "2" and len(c.kept) == 2)
    whole = found.skeleton()
    rewritten = whole.rewritten(found.gm, [last])
    assert [entry.name for entry in rewritten.graph.output] == [f"fxm{len(whole.operations)}_out"]
    onnx.checker.check_model(rewritten, full_check=True)
    assert outputs(whole, rewritten)[0].shape == (2, 4, 12, 12)


@pytest.mark.parametrize("name", ["residual", "inception"])
def test_weights_of_what_is_gone_are_gone(name):
    found = case(name)
    whole = found.skeleton()
    for candidate in found.candidates[:8]:
        model = whole.rewritten(found.gm, [candidate])
        read = {value for node in model.graph.node for value in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= read


def test_half_precision_gets_candidates_of_half_precision():
    model, args = network("linear exit")
    found = measure(model.half(), (args[0].half(),), Charging(), exit_activation=True)
    whole = found.skeleton()
    for candidate in found.merged:
        onnx.checker.check_model(whole.rewritten(found.gm, [candidate]), full_check=True)


# --- which networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "residual", "inverted", "inception"])
def test_a_cover_holds_every_signature_in_disjoint_sets(name):
    found = case(name)
    nodes = by_id(found.gm)
    sets = list(cover(found.gm, found.merged))
    held = [found.merged[candidate] for chosen in sets for candidate in chosen]
    assert sorted(map(str, held)) == sorted(map(str, set(found.merged.values())))  # each once
    for chosen in sets:
        insides = [between(nodes[c.entry], nodes[c.exit]) for c in chosen]
        assert sum(map(len, insides)) == len(set().union(*insides))
    assert len(sets) < len(held)
    assert list(cover(found.gm, found.merged)) == sets
    assert list(cover(found.gm, {})) == []


def test_a_second_run_measures_nothing(tmp_path):
    with LatencyStore(tmp_path / "latency.sqlite") as store:
        first = measure(*network("residual"), Charging(), store=store)
        again = measure(*network("residual"), Charging(), store=store)
    assert len(first.runtime.profiled) > 2
    assert (again.runtime.profiled, again.runtime.alone) == ([], [])
    assert again.table == first.table
    assert math.inf in first.table.merged.values()  # also where some were never measured


def test_what_a_killed_run_has_measured_is_not_measured_again(tmp_path):
    class Killed(Charging):
        def profile(self, model, feeds):
            if len(self.profiled) == 12:
                raise KeyboardInterrupt
            return super().profile(model, feeds)

    with LatencyStore(tmp_path / "latency.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            measure(*network("residual"), Killed(), store=store)
        before = sum(isinstance(entry.signature, LayerSignature) for entry in store.entries())
        again = measure(*network("residual"), Charging(), store=store)
    whole = measure(*network("residual"), Charging())
    assert before > len(set(again.kept.values()))
    assert len(again.runtime.profiled) < len(whole.runtime.profiled)
    assert replace(again.table, merged={}) == replace(whole.table, merged={})
    assert again.table.merged == pytest.approx(whole.table.merged, rel=1e-12)


class Slowing(Charging):
    """A machine that runs every group of networks slower than the last, the first at the full speed."""

    def __init__(self, by):
        super().__init__()
        self.by, self.pace = by, 1.0

    def profile(self, model, feeds):
        self.pace *= self.by if model in self.profiled[:1] else 1.0  # the original, with another group
        return Charged({name: self.pace * price for name, price in super().profile(model, feeds).latencies().items()})


@pytest.mark.parametrize("by", [1.5, 0.8])
def test_what_a_machine_that_changes_its_speed_makes_of_the_times_is_taken_out(by, monkeypatch):
    monkeypatch.setattr("fxmerge.covering._TOGETHER", 2)
    steady, changing = measure(*network("residual"), Charging()), measure(*network("residual"), Slowing(by))
    assert abs(math.log(changing.runtime.pace, by)) >= 2
    assert changing.table.merged == pytest.approx(steady.table.merged, rel=1e-12)
    assert changing.table.kept == pytest.approx(steady.table.kept, rel=1e-12)


# --- merges that cannot win -------------------------------------------------------------------------------------------


def test_merges_too_large_to_win_are_not_measured():
    """Twice the MACs of what it replaces, at one price for a MAC, is the bound on both sides."""
    found = case("inverted")
    shares = {
        c: layer_price(signature) / sum(found.table.kept[name] for name in found.table.inside[c])
        for c, signature in found.merged.items()
    }
    wanted = {found.merged[c] for c, share in shares.items() if share <= 2}
    never = {c for c, signature in found.merged.items() if signature not in wanted}
    assert never
    assert never == {c for c, latency in found.table.merged.items() if math.isinf(latency)}
    assert any(1 < share <= 2 for share in shares.values())
    models = map(onnx.load_model_from_string, found.runtime.profiled)
    placed = [node.name for model in models for node in model.graph.node if node.name.endswith("_Conv")]
    assert len(placed) == len(wanted)  # each once


def test_a_quick_layer_lets_larger_merges_hope():
    """Where one layer does its MACs four times as quickly, merges of eight times the MACs are measured."""

    class Uneven(Charging):
        def charge(self, model):
            prices = super().charge(model)
            return {name: price / 4 if name.startswith("fxm1_1") else price for name, price in prices.items()}

    assert not any(map(math.isinf, measure(*network("residual"), Uneven()).table.merged.values()))


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_onnxruntime_gives_every_layer_a_latency(name, monkeypatch):
    monkeypatch.setattr("fxmerge.runtimes.onnxruntime._SWEEP_SECONDS", 0.01)
    model, _ = network(name)
    runtime = OnnxRuntime(threads=1)
    assert isinstance(runtime, ProfilingRuntime)
    alone = []
    monkeypatch.setattr(OnnxRuntime, "measure", lambda _, signatures, __: alone.extend(signatures))
    found = measure(model, (images(2, 3, 48, 48).float(),), runtime)
    assert alone == []
    assert all(found.table.kept[key] > 0 for key in found.kept)
    assert all(latency > 0 for latency in found.table.merged.values())
    assert all(found.table.kept[key] >= 0 for key in found.table.kept)
    assert 1 / 3 < found.table.scale < 3


def test_signatures_of_what_surrounds_layers_tell_options_sizes_and_neighbours_apart():
    model = nn.Sequential(
        conv(3, 4), nn.MaxPool2d(2), nn.ReLU(), conv(4, 4), conv(4, 4), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2), head(4)
    )
    runtime = Charging()
    with LatencyStore(Path(":memory:")) as store:
        measure(*network(model), runtime, store=store)
        signatures = [entry.signature for entry in store.entries() if isinstance(entry.signature, OpSignature)]
    activations = sorted(s.after for s in signatures if s.operation.startswith("ReLU("))
    assert activations == [("Conv2d",), ("Conv2d",), ("MaxPool2d",)]  # at 12 x 12 and, twice, at 6 x 6
    pools = {(s.shapes, s.after) for s in signatures if s.operation.startswith("MaxPool2d(kernel_size=(2, 2)")}
    assert pools == {(((4, 12, 12), (4, 6, 6)), ("ReLU",)), (((4, 6, 6), (4, 3, 3)), ("MaxPool2d",))}
