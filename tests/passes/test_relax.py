"""Relax: every segment against an oracle of its own, borders included, and what the pass refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL,
    Add,
    Cat,
    Gate,
    Minus,
    candidates,
    captured,
    conv,
    folded,
    full_merge,
    head,
    images,
    lively,
    output_error,
    relaxed,
    residual,
    segment_errors,
    small,
    value_of,
)
from torch import nn

import fxmerge.passes.relax
from fxmerge.candidates import Candidate
from fxmerge.checks import outputs_of, relative_error
from fxmerge.errors import InternalError, PlanError
from fxmerge.graph import by_id, changed_nodes, clone, convolutions, graph_meta, module_of, node_id
from fxmerge.passes import RelaxPass

TOLERANCE = 1e-10
FAR = 24
"""Zeros put around an input; a multiple of every stride and more than any kernel here reaches."""


def residual_gate(channels):
    """x + gate(conv(conv(x))), as in SE-ResNet."""
    return Add(nn.Sequential(conv(channels, channels), conv(channels, channels, act=False), Gate(channels)))


def on_the_plane(model, x, size, stride=1):
    """The model without activations on an infinite plane of zeros around ``x``: what relaxing must give, with borders.

    Its inner paddings lie so far out that they change nothing.
    """
    linear = copy.deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Dropout, Gate)):
            linear.set_submodule(path, nn.Identity())
    with torch.no_grad():
        y = linear(F.pad(x, [FAR] * (2 * len(size))))
    start = FAR // stride
    return y[(..., *(slice(start, start + n) for n in size))]


PLANE = {
    "two": (lambda: nn.Sequential(conv(3, 5), conv(5, 4)), (7, 8)),
    "strided": (lambda: nn.Sequential(conv(3, 5, s=2), conv(5, 4), conv(4, 4, s=2)), (13, 12)),
    "same": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 2, padding="same")),
        (9, 7),
    ),
    "padded in front": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((0, 1, 2, 1)), conv(3, 4, p=0), nn.ZeroPad2d((1, 0, 0, 1)), conv(4, 4, 2, p=0)
        ),
        (8, 8),
    ),
    "dilated": (lambda: nn.Sequential(conv(3, 4, d=2), conv(4, 4, d=3)), (12, 9)),
    "grouped": (lambda: nn.Sequential(conv(4, 8, g=2), conv(8, 8, 1, g=4), conv(8, 8, g=8)), (7, 7)),
    "skip": (lambda: nn.Sequential(conv(3, 4), residual(4, 4)[0]), (8, 9)),
    "strided skip": (lambda: residual(3, 4, s=2)[0], (9, 8)),
    "stem with skip": (lambda: nn.Sequential(Add(conv(3, 4, 7, s=2, p=3), conv(3, 4, 1, s=2)), conv(4, 4)), (11, 12)),
    "unequal reach": (lambda: Add(nn.Sequential(conv(3, 4), conv(4, 4, 5)), conv(3, 4)), (9, 9)),
    "concat": (
        lambda: nn.Sequential(Cat(conv(3, 2, 1), conv(3, 3), nn.Sequential(conv(3, 2), conv(2, 2))), conv(7, 4)),
        (9, 8),
    ),
    "nested": (lambda: nn.Sequential(conv(3, 4), Add(nn.Sequential(Add(conv(4, 4)), conv(4, 4)))), (10, 9)),
    "bare branch": (lambda: nn.Sequential(conv(3, 4), Cat(nn.ReLU(), conv(4, 3)), conv(7, 4)), (8, 8)),
    "x + relu(x)": (lambda: nn.Sequential(conv(3, 4), Add(nn.ReLU()), conv(4, 4)), (8, 8)),
    "difference": (lambda: nn.Sequential(conv(3, 4), Minus(conv(4, 4)), conv(4, 4)), (8, 8)),
    "gate": (lambda: nn.Sequential(conv(3, 4), residual_gate(4), conv(4, 4)), (8, 9)),
    "gate behind a stride": (lambda: nn.Sequential(conv(3, 4, s=2), Gate(4), conv(4, 4)), (9, 8)),
    "dropout": (lambda: nn.Sequential(conv(3, 4), nn.Dropout(0.5), conv(4, 4)), (8, 8)),
    "one axis": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 5, padding=4, dilation=2)
        ),
        (21,),
    ),
    "three axes": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 2, (1, 3, 3), padding=(0, 1, 1))
        ),
        (4, 5, 6),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", PLANE)
def test_a_merged_segment_is_its_linear_self_on_the_plane_and_folds_to_it(name):
    build, size = PLANE[name]
    model = lively(build())
    x = images(2, next(module.in_channels for module in model.modules() if hasattr(module, "in_channels")), *size)
    gm = captured(model, x)
    candidate = full_merge(gm, max_kernel=19)
    assert set(candidate.kept) == {node_id(node) for node, _ in convolutions(gm)}
    result = relaxed(gm, candidate)
    expected = on_the_plane(model, x, outputs_of(gm, ((x,), {}))[0].shape[2:], candidate.geometry.stride[0])
    assert not any(any(module.padding) for _, module in convolutions(result))
    assert relative_error([exit_value(result, x)], [expected]) < TOLERANCE
    assert relative_error([exit_value(gm, x)], [expected]) > 1e-3  # padding and activations mattered
    merged = folded(result)
    assert len(list(convolutions(merged))) == 1
    assert max(segment_errors(result, x)) < TOLERANCE


def exit_value(gm, x):
    """The value in front of a trailing activation: what the merged segment itself gives."""
    (output,) = gm.graph.find_nodes(op="output")
    node = output.all_input_nodes[0]
    return value_of(gm, node.args[0] if isinstance(module_of(gm, node), nn.ReLU) else node, x)


def test_the_hand_computed_chain():
    model = lively(nn.Sequential(conv(3, 4), conv(4, 4, act=False)))
    x = images(2, 3, 6, 6)
    gm = captured(model, x)
    result = relaxed(gm, full_merge(gm))
    (c1, b1, _), (c2, b2) = model[0], model[1]
    y = F.conv2d(F.pad(x, [2] * 4), c1.weight)
    y = b2(F.conv2d(b1(y), c2.weight))
    assert relative_error(outputs_of(result, ((x,), {})), [y.detach()]) < TOLERANCE
    interior = model[1](model[0][:2](x))[..., 2:-2, 2:-2]
    assert relative_error([y[..., 2:-2, 2:-2]], [interior.detach()]) < TOLERANCE


def test_a_bypassed_convolution_takes_its_batch_norm_and_dropout_along():
    model = lively(nn.Sequential(conv(3, 4), conv(4, 4, act=False), nn.Dropout(), nn.ReLU(), conv(4, 5, act=False)))
    x = images(2, 3, 6, 6)
    gm = captured(model, x)
    candidate = next(c for c in candidates(gm) if c.bypassed == ("1.0",) and len(c.kept) == 2)
    result = relaxed(gm, candidate)
    assert sorted({name.rpartition(".")[0] for name in result.state_dict()}) == ["0.0", "0.1", "4.0", "4.1"]
    linear = nn.Sequential(model[0][:2], model[4])
    assert relative_error(outputs_of(result, ((x,), {})), [on_the_plane(linear, x, (6, 6))]) < TOLERANCE


def test_a_bypassed_last_convolution_leaves_the_exit_to_what_stands_before_it():
    model = lively(nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4, act=False), nn.Tanh(), conv(4, 4)))
    model[1][0].weight.data.mul_(10)  # of two that merge to the same kernel the one with the larger norm stays
    x = images(2, 3, 6, 6)
    gm = captured(model, x)
    first = next(c for c in candidates(gm) if c.kept == ("0.0", "1.0") and c.bypassed == ("2.0",))
    result = relaxed(gm, first)
    (segment,) = graph_meta(result)["segments"]
    assert segment["exit"] == "1.1"
    expected = model[3:](on_the_plane(model[:2], x, (6, 6)))
    assert relative_error(outputs_of(result, ((x,), {})), [expected.detach()]) < TOLERANCE
    assert max(segment_errors(result, x)) < TOLERANCE


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("activation", [None, "ReLU"])
def test_neighbours_merge_in_any_order(order, activation):
    """The exit of one segment is the entry of the next, whichever is rewritten first."""
    parts = [conv(3, 4), conv(4, 4, act=False), conv(4, 4), conv(4, 4, act=False), conv(4, 4), conv(4, 4, act=False)]
    model = lively(nn.Sequential(*parts))
    x = images(2, 3, 9, 9)
    gm = captured(model, x)
    pairs = [("0.0", "1.0"), ("2.0", "3.0"), ("4.0", "5.0")]
    chosen = [next(c for c in candidates(gm) if c.kept == pair and not c.bypassed) for pair in pairs]
    chosen = [replace(c, activation=activation) for c in chosen]
    result = relaxed(gm, *(chosen[index] for index in order))
    y = x
    for start in (0, 2, 4):
        y = on_the_plane(model[start : start + 2], y, (9, 9))
        y = y if activation is None else y.relu()
    assert relative_error(outputs_of(result, ((x,), {})), [y.detach()]) < TOLERANCE
    merged = folded(result)
    assert max(segment_errors(result, x)) < TOLERANCE
    assert len(list(convolutions(merged))) == 3
    assert sum(isinstance(module, nn.ReLU) for module in merged.modules()) == (3 if activation else 0)


def test_a_bypass_next_to_a_merge_on_either_side():
    model = lively(nn.Sequential(conv(4, 4, act=False), conv(4, 4), conv(4, 4, act=False), conv(4, 4, act=False)))
    x = images(2, 4, 7, 7)
    gm = captured(model, x)
    merge = next(c for c in candidates(gm) if c.kept == ("1.0", "2.0") and not c.bypassed)
    around = [c for c in candidates(gm, "bypass") if c.bypassed in (("0.0",), ("3.0",))]
    for chosen in ([merge, *around], [*around, merge]):
        result = relaxed(gm, *chosen)
        assert relative_error(outputs_of(result, ((x,), {})), [on_the_plane(model[1:3], x, (7, 7))]) < TOLERANCE
        assert max(segment_errors(result, x)) < TOLERANCE


def test_a_dropped_branch_beside_a_merged_sibling():
    sibling = nn.Sequential(conv(4, 4), conv(4, 4, act=False))
    model = lively(nn.Sequential(Add(sibling, conv(4, 4, 1)), nn.Tanh()))
    x = images(2, 4, 7, 7)
    gm = captured(model, x)
    merge = next(c for c in candidates(gm) if c.kept == ("0.left.0.0", "0.left.1.0") and not c.cuts)
    drop = next(c for c in candidates(gm, "drop") if c.bypassed == ("0.right.0",))
    for chosen in ([merge, drop], [drop, merge]):
        result = relaxed(gm, *chosen)
        expected = on_the_plane(model[0].left, x, (7, 7)).tanh()
        assert relative_error(outputs_of(result, ((x,), {})), [expected]) < TOLERANCE
        assert not any("add" in node.name for node in result.graph.nodes)
        assert max(segment_errors(result, x)) < TOLERANCE


def test_a_merge_that_cuts_a_branch_inside():
    model = lively(nn.Sequential(conv(3, 4), Add(conv(4, 4)), conv(4, 4, act=False)))
    x = images(2, 3, 7, 7)
    gm = captured(model, x)
    candidate = next(c for c in candidates(gm) if c.cuts and c.kept == ("0.0", "2.0"))
    result = relaxed(gm, candidate)
    expected = on_the_plane(nn.Sequential(model[0], model[2]), x, (7, 7))
    assert relative_error(outputs_of(result, ((x,), {})), [expected]) < TOLERANCE


# --- inserted activations ---------------------------------------------------------------------------------------------


def test_an_inserted_activation_trains_and_survives_copies_and_folding():
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(4), nn.Conv2d(4, 5, 3, padding=1), head(5)))
    x = images(4, 3, 6, 6)
    gm = captured(model, x)
    candidate = next(c for c in candidates(gm, exit_activation=True) if c.activation == "PReLU")
    result = clone(relaxed(gm, candidate))
    slope = result.get_parameter("2_activation.weight")
    assert slope.tolist() == pytest.approx([model[1].weight.mean().item()] * 5)  # other channels: made anew
    result.train()
    optimiser = torch.optim.SGD(result.parameters(), lr=0.1)
    before = slope.detach().clone()
    result(x).square().sum().backward()
    optimiser.step()
    assert not torch.equal(slope, before)
    merged = folded(result)
    assert output_error(result, merged, x) < TOLERANCE
    assert torch.equal(merged.get_parameter("2_activation.weight"), slope)


def test_an_inserted_activation_avoids_names_that_are_taken():
    model = nn.Module()
    model.a = nn.Conv2d(3, 4, 3, padding=1)
    model.b = nn.Conv2d(4, 4, 3, padding=1)
    model.b_activation = nn.Conv2d(4, 4, 1)
    model.act = nn.Tanh()
    model.forward = lambda x: model.b_activation(model.b(model.act(model.a(x)))).sigmoid()
    lively(model)
    x = images(2, 3, 5, 5)
    gm = captured(model, x)
    candidate = next(c for c in candidates(gm, exit_activation=True) if c.kept == ("a", "b") and c.activation)
    result = relaxed(gm, candidate)
    assert isinstance(result.get_submodule("b_activation"), nn.Conv2d)
    assert isinstance(result.get_submodule("b_activation_1"), nn.Tanh)


# --- what stays -------------------------------------------------------------------------------------------------------


def test_survivors_keep_names_parameters_and_modes():
    model = lively(SMALL["residual"]())
    x = images(2, 3, 12, 12)
    gm = captured(model, x).train()
    result = RelaxPass([full_merge(gm)])(gm)
    assert result.modified
    assert result.graph_module is gm
    assert set(gm.state_dict()) <= set(model.state_dict())
    for name, parameter in gm.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert all(module.training for module in gm.modules())


def test_no_candidates_change_nothing():
    gm, _ = merge_of_chain()
    assert not RelaxPass([])(gm).modified
    assert "segments" not in graph_meta(gm)


def test_training_a_relaxed_network_then_folding_is_exact():
    gm, _ = small("residual")
    x = images(8, 3, 12, 12)
    result = relaxed(gm, *disjoint(gm))
    result.train()
    optimiser = torch.optim.SGD(result.parameters(), lr=0.05)
    before = outputs_of(result, ((x,), {}))
    for _ in range(5):
        optimiser.zero_grad()
        result(x).square().mean().backward()
        optimiser.step()
    assert relative_error(outputs_of(result, ((x,), {})), before) > 0.1
    merged = folded(result)
    assert output_error(result, merged, x) < TOLERANCE
    assert max(segment_errors(result, x)) < TOLERANCE
    assert result.training  # folding worked on a copy


def disjoint(gm):
    """The first merge of every residual block's two convolutions."""
    found = {}
    for candidate in candidates(gm):
        if len(candidate.kept) == 2 and not candidate.bypassed and not candidate.cuts:
            found.setdefault(candidate.kept[0].partition(".")[0], candidate)
    return [c for key, c in found.items() if all(name.startswith(key) for name in c.kept)]


def test_only_what_reads_something_else_counts_as_changed():
    gm, _ = small("chain")
    candidate = next(c for c in candidates(gm) if c.kept == ("1.0", "2.0"))
    result = relaxed(gm, candidate)
    unchanged = [node_id(node) for node in result.graph.nodes if node not in changed_nodes(gm, result)]
    assert unchanged[1:] == ["0.0", "0.1", "0.2"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def merge_of_chain():
    gm = clone(small("chain")[0])
    return gm, next(c for c in candidates(gm) if c.kept == ("0.0", "1.0"))


@pytest.mark.parametrize("field", ["entry", "exit"])
def test_unknown_operations_are_refused_by_name(field):
    gm, candidate = merge_of_chain()
    with pytest.raises(PlanError, match=r"'nowhere\.conv', which this network does not have"):
        RelaxPass([replace(candidate, **{field: "nowhere.conv"})])(gm)


def test_ends_that_bound_no_segment_are_refused():
    gm, candidate = merge_of_chain()
    with pytest.raises(PlanError, match="do not bound a segment"):
        RelaxPass([replace(candidate, entry=candidate.exit, exit=candidate.entry)])(gm)
    with pytest.raises(PlanError, match="ends no region"):
        RelaxPass([replace(candidate, exit="output")])(gm)


def test_a_bypass_between_other_shapes_and_a_drop_of_no_join_are_refused():
    gm, _ = merge_of_chain()
    with pytest.raises(PlanError, match="their shapes differ"):
        RelaxPass([Candidate("bypass", "1.2", "2.2", bypassed=("2.0",))])(gm)
    with pytest.raises(PlanError, match="joins no two branches"):
        RelaxPass([Candidate("drop", "1.2", "2.0", cuts=(("2.2", 0),))])(gm)


def test_overlaps_and_second_runs_are_refused():
    gm, candidate = merge_of_chain()
    other = next(c for c in candidates(gm) if c.kept == ("1.0", "2.0"))
    with pytest.raises(PlanError, match=r"'1\.0' belongs to two candidates"):
        RelaxPass([candidate, other])(gm)
    gm, candidate = merge_of_chain()
    RelaxPass([candidate])(gm)
    with pytest.raises(PlanError, match="merged before"):
        RelaxPass([candidate])(gm)
    gm, _ = merge_of_chain()
    bypass = candidates(gm, "bypass")[0]
    RelaxPass([bypass])(gm)
    with pytest.raises(PlanError, match="which this network does not have"):
        RelaxPass([bypass])(gm)


def test_the_plane_catches_a_wrong_crop(monkeypatch):
    """The mutation: a skip that loses all positions on one side, in place of half on each."""
    true_crops = fxmerge.passes.relax.crops

    def one_sided(geometries):
        sides = true_crops(geometries)
        return tuple((tuple(map(sum, zip(*pair, strict=True))), (0,) * len(pair[0])) for pair in sides)

    model = lively(residual(4, 4)[0])
    x = images(2, 4, 9, 9)
    gm = captured(model, x)
    expected = [on_the_plane(model, x, (9, 9))]
    assert relative_error(outputs_of(relaxed(gm, full_merge(gm)), ((x,), {})), expected) < TOLERANCE
    monkeypatch.setattr(fxmerge.passes.relax, "crops", one_sided)
    assert relative_error(outputs_of(relaxed(gm, full_merge(gm)), ((x,), {})), expected) > 0.1


def test_a_padding_that_is_off_by_one_is_caught(monkeypatch):
    true_pad = fxmerge.passes.relax.insert_pad

    def wrong(gm, source, left, right):
        return true_pad(gm, source, [side + 1 for side in left], [side - 1 for side in right])

    gm, candidate = merge_of_chain()
    monkeypatch.setattr(fxmerge.passes.relax, "insert_pad", wrong)
    with pytest.raises(InternalError, match="was relaxed to"):
        relaxed(gm, candidate)


def test_ids_and_shapes_are_true_after_the_pass():
    gm, candidate = merge_of_chain()
    result = relaxed(gm, candidate)
    shapes = {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                shapes[node_id(n)] = list(value.shape)
            return value

    Shapes(result).run(images(2, 3, 12, 12), enable_io_processing=False)
    for name, node in by_id(result).items():
        if name in shapes:
            assert node.meta["fxmerge"]["shape"][1:] == shapes[name][1:]
