"""Fold: what becomes one convolution computes what it replaces, borders included; what does not says why."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL,
    Cat,
    candidates,
    captured,
    conv,
    folded,
    full_merge,
    head,
    images,
    lively,
    output_error,
    random_plan,
    relaxed,
    residual,
    segment_errors,
    small,
)
from torch import nn

import fxmerge.folding
import fxmerge.passes.fold
from fxmerge.algebra import ConvMap
from fxmerge.checks import check_equal, outputs_of, own_error, relative_error
from fxmerge.errors import InternalError, UserError
from fxmerge.folding import convolve
from fxmerge.graph import by_id, clone, convolutions, graph_meta, shape_of
from fxmerge.linear import conv_geometry
from fxmerge.passes import FoldPass

TOLERANCE = 1e-10


def macs(gm):
    return sum(conv_geometry(module).macs(shape_of(node.all_input_nodes[0])[2:]) for node, module in convolutions(gm))


def fold(model, *shape):
    x = images(*shape)
    gm = captured(model, x)
    result = FoldPass()(clone(gm))
    merged = result.graph_module
    assert output_error(gm, merged, x) < TOLERANCE
    assert macs(merged) <= macs(gm)
    again = FoldPass()(merged)
    assert not again.modified
    assert len(again.refusals) <= len(result.refusals)
    return result


def kinds(gm):
    return [type(gm.get_submodule(str(node.target))).__name__ for node in gm.graph.nodes if node.op == "call_module"]


def only_convolution(gm):
    ((_, module),) = convolutions(gm)
    return module


# --- relaxed plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_random_plans_fold_to_what_they_relaxed_to(name):
    gm, x = small(name)
    for seed in range(6):
        result = relaxed(gm, *random_plan(gm, seed, exit_activation=seed % 2 == 1))
        segments = graph_meta(result)["segments"]
        assert all(error < TOLERANCE for error in segment_errors(result, x))
        merged = folded(result)
        assert output_error(result, merged, x) < TOLERANCE
        assert "segments" not in graph_meta(merged)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
        assert len(list(convolutions(merged))) <= len(list(convolutions(result))) - sum(
            len(segment["candidate"]["kept"]) - 1 for segment in segments
        )


def test_folding_leaves_the_relaxed_network_and_modes_alone():
    gm, x = small("residual")
    result = relaxed(gm, *random_plan(gm, 0)).train()
    state = {name: tensor.clone() for name, tensor in result.state_dict().items()}
    merged = folded(result)
    assert not any(module.training for module in merged.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.state_dict().items())
    assert graph_meta(result)["segments"]
    assert output_error(result, merged, x) < TOLERANCE


# --- what is linear already -------------------------------------------------------------------------------------------


def test_unpadded_convolutions_behind_a_padded_one_become_one():
    model = lively(nn.Sequential(conv(3, 6, act=False), conv(6, 6, p=0, act=False), conv(6, 4, p=0), nn.Tanh()))
    merged = fold(model, 2, 3, 9, 8).graph_module
    assert kinds(merged) == ["Conv2d", "ReLU", "Tanh"]
    assert (only_convolution(merged).kernel_size, only_convolution(merged).padding) == ((7, 7), (1, 1))


def test_a_chain_that_gets_cheaper_is_one_kernel():
    model = lively(nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 3), nn.BatchNorm2d(2)))
    merged = fold(model, 2, 2, 8, 8).graph_module
    assert [(m.kernel_size, m.in_channels, m.out_channels) for _, m in convolutions(merged)] == [((5, 5), 2, 2)]
    assert kinds(merged) == ["Conv2d"]


def test_a_1x1_without_bias_goes_into_the_padded_convolution_behind_it():
    model = lively(nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 3, 3, padding=1)))
    merged = fold(model, 2, 4, 6, 6).graph_module
    found = only_convolution(merged)
    expected = torch.einsum("omyx,mi->oiyx", model[1].weight, model[0].weight[..., 0, 0])
    assert torch.allclose(found.weight, expected, rtol=0, atol=1e-12)
    assert found.padding == (1, 1)


def test_a_1x1_with_a_bias_stays_with_the_reason():
    result = fold(lively(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 3, padding=1))), 2, 4, 6, 6)
    assert not result.modified
    (refusal,) = result.refusals
    assert (refusal.code, refusal.convolution, refusal.node) == ("inner-padding", "0", "1")
    assert "zeros behind a bias" in refusal.reason


class RepVGG(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dense, self.point = conv(channels, channels, act=False), conv(channels, channels, 1, act=False)
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.dense(x) + self.point(x) + self.skip(x))


def scaled(norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def test_a_repvgg_block_folds_to_exactly_its_3x3():
    model = lively(RepVGG(4))
    merged = fold(model, 2, 4, 7, 7).graph_module
    assert kinds(merged) == ["Conv2d", "ReLU"]
    found = only_convolution(merged)
    (s3, b3), (s1, b1), (s0, b0) = map(scaled, (model.dense[1], model.point[1], model.skip))
    kernel = model.dense[0].weight * s3.view(-1, 1, 1, 1)
    kernel = kernel + F.pad(model.point[0].weight * s1.view(-1, 1, 1, 1), [1] * 4)
    kernel = kernel + F.pad(torch.diag(s0)[..., None, None], [1] * 4)
    assert torch.allclose(found.weight, kernel, rtol=0, atol=1e-12)
    assert torch.allclose(found.bias, b3 + b1 + b0, rtol=0, atol=1e-12)
    assert found.padding == (1, 1)


def test_a_repvgg_network_has_one_convolution_a_block():
    model = lively(nn.Sequential(conv(3, 4, s=2), RepVGG(4), RepVGG(4), conv(4, 6, s=2), RepVGG(6), head(6)))
    merged = fold(model, 2, 3, 12, 12).graph_module
    assert kinds(merged)[:10] == ["Conv2d", "ReLU"] * 5
    assert len(list(convolutions(merged))) == 5


def test_linear_stacks_of_channels_and_dropouts_fold():
    stack = Cat(nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1), nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))
    merged = fold(lively(nn.Sequential(stack, nn.Dropout(), nn.ReLU())), 2, 4, 5, 5).graph_module
    assert kinds(merged) == ["Conv2d", "ReLU"]


def test_inner_padding_stays_with_the_reason_and_folds_once_relaxed():
    model = lively(nn.Sequential(conv(3, 4, act=False), conv(4, 4, act=False)))
    result = fold(model, 2, 3, 7, 7)
    assert kinds(result.graph_module) == ["Conv2d", "Conv2d"]
    assert [(r.code, r.convolution, r.node) for r in result.refusals] == [("inner-padding", "0.0", "1.0")]
    x = images(2, 3, 7, 7)
    gm = captured(model, x)
    loose = relaxed(gm, full_merge(gm))
    assert kinds(folded(loose)) == ["Conv2d"]
    assert output_error(gm, loose, x) > 0.01  # relaxing is not exact: the border differs
    inner = slice(2, -2)
    pair = (outputs_of(each, ((x,), {}))[0][..., inner, inner] for each in (loose, gm))
    assert relative_error([next(pair)], [next(pair)]) < TOLERANCE


def test_a_linear_residual_block_takes_its_skip_into_the_kernel():
    model = lively(residual(4, 4)[0])
    x = images(2, 4, 8, 8)
    block, chain = captured(model, x), captured(model.left, x)
    found, without = (only_convolution(folded(relaxed(gm, full_merge(gm)))) for gm in (block, chain))
    skip = torch.zeros_like(found.weight)
    skip[range(4), range(4), 2, 2] = 1.0
    assert (found.kernel_size, found.padding) == ((5, 5), (2, 2))
    assert torch.allclose(found.weight, without.weight + skip, rtol=0, atol=1e-12)
    assert torch.allclose(found.bias, without.bias, rtol=0, atol=1e-12)


def test_what_would_cost_more_stays_with_both_counts():
    model = lively(nn.Sequential(conv(8, 2, 1, act=False), conv(2, 8, 1, act=False)))
    result = fold(model, 2, 8, 5, 5)
    assert kinds(result.graph_module) == ["Conv2d", "Conv2d"]
    (refusal,) = result.refusals
    assert (refusal.code, refusal.convolution, refusal.node) == ("costs-more", "0.0", "1.0")
    assert refusal.reason == (
        f"one convolution would take {8 * 8 * 25} multiply-accumulates an image and have 64 weights, "
        f"apart they take {2 * 8 * 2 * 25} and have 32"
    )


@pytest.mark.parametrize(("width", "last", "folds"), [(4, 4, False), (4, 1, True)])
def test_fewer_multiply_accumulates_do_not_pay_for_many_more_weights(width, last, folds):
    """3x3 and 3x3 down to one pixel: 25 weights for 18, each read once; with one output channel 25 for 36 + 9."""
    model = lively(nn.Sequential(conv(width, width, p=0, act=False), conv(width, last, p=0, act=False)))
    result = fold(model, 2, width, 5, 5)
    assert len(kinds(result.graph_module)) == (1 if folds else 2)
    if not folds:
        (refusal,) = result.refusals
        assert (refusal.code, 25 * width**2 < (81 + 9) * width**2) == ("costs-more", True)
        assert (
            "would take 400 multiply-accumulates an image and have 400 weights, apart they take 1440" in refusal.reason
        )


def test_asymmetric_padding_in_front_stays_in_front():
    model = lively(nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    merged = fold(model, 2, 3, 6, 6).graph_module
    assert kinds(merged) == ["Conv2d"]
    assert sum(node.target is F.pad for node in merged.graph.nodes) == 1
    model = lively(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)))
    merged = fold(model, 2, 3, 6, 6).graph_module
    assert [node.op for node in merged.graph.nodes] == ["placeholder", "call_module", "output"]


class Odd(nn.Module):
    """A shared module, batch statistics, a reflected border, a sum with a number, x + x."""

    def __init__(self):
        super().__init__()
        self.a, self.shared = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.mirror = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.shared(torch.tanh(self.shared(self.a(x))))
        x = self.free(self.mirror(x))
        x = self.b(x)
        return (x + x) + 1.0


def test_what_cannot_fold_stays_and_says_so():
    result = fold(lively(Odd()), 2, 3, 6, 6)
    assert {refusal.code for refusal in result.refusals} == {"shared", "batch-statistics", "padding-mode"}
    assert result.modified  # x + x is a scale of the convolution in front of it
    assert kinds(result.graph_module) == [
        "Conv2d",
        "BatchNorm2d",
        "Tanh",
        "BatchNorm2d",
        "Conv2d",
        "BatchNorm2d",
        "Conv2d",
    ]


def test_a_convolution_alone_is_left_as_it_is():
    assert not fold(lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())), 2, 3, 6, 6).modified


def test_the_convolution_of_the_checks_is_torchs():
    for module, size in (
        (nn.Conv2d(6, 6, 3, 2, 1, groups=6), (7, 8)),
        (nn.Conv2d(6, 6, (3, 1), 1, (2, 0), (2, 1), groups=6, bias=False), (9, 5)),
        (nn.Conv1d(4, 4, 5, 3, 2, groups=4), (20,)),
        (nn.Conv3d(2, 2, 3, padding=1, groups=2), (4, 5, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), (6, 6)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular"), (6, 6)),
    ):
        value = images(2, module.in_channels, *size)
        assert torch.allclose(convolve(module.double(), value), module(value), rtol=0, atol=1e-13)


# --- edits and bad weights --------------------------------------------------------------------------------------------


def relaxed_chain():
    gm, x = small("chain")
    return relaxed(gm, full_merge(gm)), x


def test_weights_may_change():
    result, x = relaxed_chain()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(0.7)
    assert output_error(result, folded(result), x) < TOLERANCE


def test_an_operation_that_was_taken_out_is_named():
    result, _ = relaxed_chain()
    node = by_id(result)["1.1"]
    node.replace_all_uses_with(node.args[0])
    result.graph.erase_node(node)
    with pytest.raises(UserError, match=r"from 'input' to '2\.1' was edited: '1\.1' is gone. Undo the edit"):
        folded(result)


def test_an_operation_that_was_added_is_named():
    result, _ = relaxed_chain()
    node = by_id(result)["1.1"]
    with result.graph.inserting_after(node):
        added = result.graph.call_function(torch.tanh, (node,))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    result.recompile()
    with pytest.raises(UserError, match="'tanh' was added or taken out"):
        folded(result)


def test_a_value_read_from_outside_is_named():
    result, _ = relaxed_chain()
    node, (output,) = by_id(result)["1.1"], result.graph.find_nodes(op="output")
    output.args = ((output.args[0][0], node),)
    with pytest.raises(UserError, match=r"'1\.1' is read from outside"):
        FoldPass()(result)


def test_an_activation_put_in_place_of_a_batch_norm_is_named():
    result, _ = relaxed_chain()
    result.set_submodule("1.1", nn.ReLU())
    with pytest.raises(UserError, match=r"'1\.1' cannot fold: it is an activation"):
        folded(result)


def test_weights_that_are_not_finite_are_the_users():
    result, _ = relaxed_chain()
    with torch.no_grad():
        result.get_parameter("1.0.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="weights or batch-norm statistics that are not finite"):
        folded(result)


def test_outputs_that_hardly_vary_are_no_false_alarm():
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.fill_(1e-19)
        model[1].bias.fill_(7.0)
    x = images(2, 3, 6, 6)
    assert FoldPass()(captured(model, x)).modified
    with torch.no_grad():
        model[1].weight.zero_()
    assert FoldPass()(captured(model, x)).modified


# --- mutations: both checks catch each --------------------------------------------------------------------------------


def mirrored(true):
    def wrong(*args):
        found = true(*args)
        return replace(found, conv_map=replace(found.conv_map, weight=found.conv_map.weight.flip(-1)))

    return wrong


def shifted(true):
    def wrong(*args):
        found = true(*args)
        geometry = found.conv_map.geometry
        sides = {"left": tuple(n + 1 for n in geometry.left), "right": tuple(n - 1 for n in geometry.right)}
        return replace(found, conv_map=replace(found.conv_map, geometry=replace(geometry, **sides)))

    return wrong


def without_eps(true):
    def wrong(gm, node):
        if node.op == "call_module" and isinstance(module := gm.get_submodule(str(node.target)), nn.BatchNorm2d):
            module = copy.deepcopy(module)
            module.eps = 0.0
            return ConvMap.from_batch_norm(module, 2)
        return true(gm, node)

    return wrong


def without_crops(true):
    def wrong(gm, node):
        found = true(gm, node)
        left, right = found.geometry.left, found.geometry.right
        if min(left) < 0:  # as many positions, but all of them from one side
            both = tuple(a + b for a, b in zip(left, right, strict=True))
            return replace(found, geometry=replace(found.geometry, left=(0,) * len(both), right=both))
        return found

    return wrong


MUTATIONS = {
    "mirrored kernel": (fxmerge.passes.fold, "compose", mirrored),
    "padding off by one": (fxmerge.passes.fold, "compose", shifted),
    "no eps": (fxmerge.folding, "linear_map", without_eps),
    "no crop": (fxmerge.folding, "linear_map", without_crops),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_checks_catch_a_wrong_fold(mutation, dtype, monkeypatch):
    gm, x = small("residual")
    block = next(c for c in candidates(gm) if c.exit == "1.0/add" and not c.bypassed and len(c.kept) == 2)
    result, x = relaxed(gm, block).to(dtype), x.to(dtype)
    rounding = own_error(result, ((x,), {}), outputs_of(result, ((x,), {})))
    check_equal(result, folded(result), ((x,), {}), rounding)
    module, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(module, name, mutate(getattr(module, name)))
    with pytest.raises(InternalError, match=r"folds to .* with an error of"):
        folded(result)
    monkeypatch.setattr(fxmerge.passes.fold, "_check", lambda *_: None)
    wrong = folded(result)
    with pytest.raises(InternalError, match="differs from its trainable form"):
        check_equal(result, wrong, ((x,), {}), rounding)


class _HalfOverwritten(nn.Module):
    """A value that is overwritten in part, in front of its readers, behind them, or between two of them."""

    def __init__(self, when):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first, self.norm = nn.Conv2d(4, 4, 2, bias=False), nn.BatchNorm2d(4)
        self.second, self.skip = nn.Conv2d(4, 4, (1, 1)), nn.Conv2d(4, 4, 2)
        self.when = when

    def forward(self, x):
        x = self.stem(x)
        half = x[:, :2]
        if self.when == "before":
            half.mul_(0.5)
        y = self.first(x)
        if self.when == "between":
            half.mul_(0.5)
        y = self.second(self.norm(y)) + self.skip(x)
        if self.when == "behind":
            half.mul_(0.5)
        return y, half


@pytest.mark.parametrize(("when", "left"), [("before", 3), ("between", 3), ("behind", 2)])
def test_what_is_written_in_place_is_read_where_it_was(when, left):
    """Branches that may read different values are never one convolution; each may fold by itself."""
    net = lively(_HalfOverwritten(when))
    x = images(3, 3, 8, 7)
    gm = captured(net, x)
    result = FoldPass()(clone(gm)).graph_module
    assert relative_error(outputs_of(result, ((x,), {})), outputs_of(net, ((x,), {}))) < TOLERANCE
    assert len(list(convolutions(result))) == left
