"""Operations beside convolutions inside merged segments: pools, scales, slices, filters, norms and side inputs."""

# ruff: noqa: ARG005 - the operations share one signature
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import candidates, captured, conv, folded, images, lively, output_error, relaxed, segment_errors
from torch import nn

import fxmerge
from fxmerge.candidates import Limits
from fxmerge.checks import outputs_of, relative_error
from fxmerge.errors import UserError
from fxmerge.estimators import Magnitude
from fxmerge.graph import by_id, convolutions, node_id
from fxmerge.linear import Linear, Norm, Side, is_constant, meaning, source_of
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.relax import RelaxPass
from fxmerge.regions import all_series, operations, region_tree
from fxmerge.removable import unregister_removable

EXACT = 1e-10


class Between(nn.Module):
    """Two convolutions with something linear between them."""

    def __init__(self, between, channels=4):
        super().__init__()
        self.first, self.second = conv(3, 4), conv(channels, 5, act=False)
        self.scale = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.float64))
        self.register_buffer("blur", torch.tensor([[1.0, 2.0, 1.0]]).mul(torch.tensor([[1.0], [2.0], [1.0]])) / 16)
        self.register_buffer("order", torch.tensor([3, 1]))
        self.between = between

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


LINEAR = {
    "scale": lambda m, x: x * m.scale,
    "scale first": lambda m, x: m.scale * x,
    "shift": lambda m, x: x + m.scale,
    "from a constant": lambda m, x: m.scale - x,
    "divided": lambda m, x: x / (m.scale**2 + 1),
    "number": lambda m, x: 1.5 - 2 * x / 3 + 1,
    "negative": lambda m, x: -x,
    "average": lambda m, x: F.avg_pool2d(x, 3, 1, 1),
    "average, strided": lambda m, x: F.avg_pool2d(x, (2, 3), (2, 1)),
    "average, other divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "blur": lambda m, x: F.conv2d(x, m.blur.expand(4, 1, 3, 3), None, 2, 1, groups=4),
    "copy": lambda m, x: x.contiguous().clone(),
    "crop": lambda m, x: x[:, :, 1:-1, 2:],
    "shuffle": lambda m, x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "split and stacked": lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "half of it scaled": lambda m, x: torch.cat([x[:, :2] * 2, F.avg_pool2d(x[:, 2:], 3, 1, 1)], 1),
}
SLICES = {
    "slice of all": lambda m, x: x[:, :][:, 1:3, :, :],
    "slice": lambda m, x: x[:, 1:3],
    "last": lambda m, x: x[:, -2:],
    "chosen by indices": lambda m, x: torch.index_select(x, 1, m.order),
    "zeros added": lambda m, x: F.pad(x[:, :1], (0, 0, 0, 0, 0, 1)),
}
OTHERS = {
    "varies": (lambda m, x: x + torch.linspace(0, 1, 9, dtype=torch.float64), "not-linear"),
    "border": (lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "not-linear"),
    "overhang": (lambda m, x: F.avg_pool2d(x, 2, ceil_mode=True), "not-linear"),
    "computed weight": (
        lambda m, x: F.conv2d(x, x.mean((0, 2, 3)).reshape(4, 1, 1, 1), groups=4),
        "computed-weight",
    ),
    "mirrored border": (lambda m, x: F.pad(x, (1, 1, 1, 1), "reflect"), "padding-mode"),
    "gate of a maximum": (lambda m, x: F.max_pool2d(x, 3, 1, 1) * x.mean((2, 3), keepdim=True), "gate"),
}


def whole(gm, **limits):
    """The merge of all convolutions that keeps them all."""
    count = sum(1 for _ in convolutions(gm))
    found = [c for c in candidates(gm, max_kernel=9, **limits) if len(c.kept) == count]
    assert len(found) == 1
    return found[0]


def check_exact(gm, candidate, x):
    result = relaxed(gm, candidate)
    merged = folded(result)
    assert max(segment_errors(result, x)) < EXACT
    assert output_error(result, merged, x) < EXACT
    assert sum(1 for _ in convolutions(merged)) == 1 + len(list(convolutions(gm))) - len(candidate.kept)
    return result, merged


@pytest.mark.parametrize("name", [*LINEAR, *SLICES])
def test_what_is_linear_merges_with_its_neighbours(name):
    between = {**LINEAR, **SLICES}[name]
    net, x = lively(Between(between, channels=4 if name in LINEAR else 2)), images(2, 3, 10, 9)
    gm = captured(net, x)
    assert output_error(net, gm, x) < EXACT
    check_exact(gm, whole(gm), x)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_says_why(name):
    between, code = OTHERS[name]
    net, x = lively(Between(between)), images(2, 3, 10, 9)
    enumeration = enumerate_segments(captured(net, x))
    assert not [site for site in enumeration.sites if len(site.candidate.kept) > 1]
    assert {"first.0", "second.0"} == {each.convolution for each in enumeration.refusals if each.code == code}


def test_a_scale_keeps_training_and_leaves_with_its_segment():
    net, x = lively(Between(LINEAR["scale"])), images(2, 3, 10, 9)
    gm = captured(net, x)
    result = relaxed(gm, whole(gm))
    result(x).square().sum().backward()
    assert result.get_parameter("scale").grad.abs().sum() > 0
    with torch.no_grad():
        result.get_parameter("scale").mul_(-2)
    merged = folded(result)
    assert output_error(result, merged, x) < EXACT
    assert "scale" not in merged.state_dict()


def test_a_convolution_and_a_pool_are_one_convolution_already():
    net, x = (
        lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.ReLU())),
        images(2, 3, 32, 32),
    )
    gm = captured(net, x)
    merged = folded(gm)
    assert output_error(gm, merged, x) < EXACT
    assert [tuple(module.kernel_size) for _, module in convolutions(merged)] == [(2, 2)]


# --- norms over each sample -------------------------------------------------------------------------------------------


def normed(norm, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        norm,
        nn.SiLU(),
        nn.Conv2d(width, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=["group", "instance"])
def test_a_norm_returns_behind_the_merge(norm):
    net, x = lively(normed(norm)), images(2, 3, 8, 9)
    gm = captured(net, x)
    candidate = next(c for c in candidates(gm) if c.kept == ("0", "3"))
    assert (candidate.norm, candidate.removed) == ("1", ("1", "2"))
    result, merged = check_exact(gm, candidate, x)
    for graph in (result, merged):
        order = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        assert order[-3:] == ["1", "4", "5"]
    with torch.no_grad():
        plain = F.conv2d(net[0](F.pad(x, (1, 1, 1, 1))), net[3].weight, net[3].bias)
        padded = nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).double()
        padded[1].load_state_dict(net[0].state_dict())
        padded[2].load_state_dict(net[3].state_dict())
        expected = net[5](net[4](net[1](padded(x))))
    assert plain.shape[1] == 4
    assert relative_error(outputs_of(merged, ((x,), {})), [expected]) < EXACT
    names = set(net.state_dict())
    assert set(result.state_dict()) == names


def test_the_segment_behind_a_returned_norm_merges_too():
    net = lively(nn.Sequential(*normed(nn.GroupNorm(2, 4))[:4], *normed(nn.GroupNorm(2, 4))[1:4]))
    x = images(2, 3, 8, 9)
    gm = captured(nn.Sequential(*net, nn.ReLU(), nn.Conv2d(4, 3, 3), nn.GELU(), nn.Conv2d(3, 3, 3)).double().eval(), x)
    first = next(c for c in candidates(gm) if c.kept == ("0", "3"))
    second = next(c for c in candidates(gm) if c.kept == ("8", "10"))
    result = RelaxPass((second, first))(fxmerge.graph.clone(gm)).graph_module
    assert output_error(result, folded(result), x) < EXACT


def test_a_norm_of_other_channels_has_nowhere_to_return():
    gm = captured(lively(normed(nn.GroupNorm(2, 6), width=6)), images(2, 3, 8, 9))
    enumeration = enumerate_segments(gm)
    assert not [site for site in enumeration.sites if site.candidate.kept == ("0", "3")]
    assert ("norm", "0", "1") in {(each.code, each.convolution, each.node) for each in enumeration.refusals}
    enumeration = enumerate_segments(gm, Limits(norms_go=True))
    (merge,) = {site.candidate for site in enumeration.sites if site.candidate.kept == ("0", "3")}
    assert (merge.norm, merge.removed) == (None, ("1", "2"))
    assert "norm" not in {each.code for each in enumeration.refusals}


def test_a_merge_may_do_without_the_norm():
    net, x = lively(normed(nn.GroupNorm(2, 4))), images(2, 3, 8, 9)
    gm = captured(net, x)
    merges = [c for c in candidates(gm, norms_go=True) if c.kept == ("0", "3")]
    assert [(c.norm, c.removed) for c in merges] == [("1", ("1", "2")), (None, ("1", "2"))]
    result, merged = check_exact(gm, merges[1], x)
    for graph in (result, merged):
        assert not [module for module in graph.modules() if isinstance(module, nn.GroupNorm)]


@pytest.mark.parametrize(("size", "refused"), [(5, True), (6, False)], ids=["one pixel", "two pixels"])
def test_a_norm_does_not_return_to_a_single_pixel(size, refused):
    """It would give zeros there, and torch raises for an instance norm."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 5))
    enumeration = enumerate_segments(captured(lively(net), images(2, 3, 5, size)))
    assert any(each.code == "norm" and "single pixel" in each.reason for each in enumeration.refusals) is refused
    assert any(site.candidate.kept == ("0", "2") for site in enumeration.sites) is not refused


def test_an_activation_may_stand_behind_the_returned_norm():
    net, x = lively(nn.Sequential(*list(normed(nn.GroupNorm(2, 4)))[:4], nn.Conv2d(4, 2, 1))), images(2, 3, 8, 9)
    gm = captured(net, x)
    candidate = next(c for c in candidates(gm, exit_activation=True) if c.activation and c.kept == ("0", "3"))
    result, merged = check_exact(gm, candidate, x)
    for graph in (result, merged):
        order = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
        assert order[-3:] == ["1", "3_activation", "4"]


# --- side inputs ------------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    """Residual blocks that read an embedding of a second input, or of the image itself."""

    def __init__(self, own=False, subtract=False, blocks=2):
        super().__init__()
        self.stem, self.own, self.subtract = nn.Conv2d(3, 4, 3, padding=1), own, subtract
        self.embed = nn.Linear(4 if own else 6, 5)
        self.project = nn.ModuleList(nn.Linear(5, 4) for _ in range(blocks))
        self.first = nn.ModuleList(conv(4, 4) for _ in range(blocks))
        self.second = nn.ModuleList(conv(4, 4, act=False) for _ in range(blocks))

    def forward(self, x, t):
        x = self.stem(x)
        e = torch.sigmoid(self.embed(x.mean((2, 3)) if self.own else t))
        for first, project, second in zip(self.first, self.project, self.second, strict=True):
            side = project(e)[:, :, None, None]
            h = first(x)
            x = torch.relu(x + second(h - side if self.subtract else h + side))
        return x


def embedded(**options):
    net = Embedded(**options).double().eval()
    inputs = images(2, 3, 8, 9), torch.randn(2, 6, dtype=torch.float64)
    lively_net = lively(net)
    return lively_net, fxmerge.graph.clone(fxmerge.capture(lively_net, inputs)), inputs


@pytest.mark.parametrize(
    "options", [{}, {"subtract": True}, {"own": True}], ids=["added", "subtracted", "of the image"]
)
def test_an_embedding_passes_through_a_merge(options):
    _, gm, inputs = embedded(**options)
    pairs = {("first.0.0", "second.0.0"), ("first.1.0", "second.1.0")}
    if options.get("own"):  # what the first block reads is computed from the value that it starts from
        pairs.remove(("first.0.0", "second.0.0"))
    merges = [c for c in candidates(gm) if c.kept in pairs and not (c.bypassed or c.cuts)]
    assert {c.kept for c in merges} == pairs
    result = RelaxPass(pick_disjoint(gm, merges))(fxmerge.graph.clone(gm)).graph_module
    merged = folded(result)
    expected = outputs_of(result, (inputs, {}))
    assert relative_error(outputs_of(merged, (inputs, {})), expected) < EXACT
    others = inputs[0], inputs[1] + 1.0
    if not options.get("own"):
        assert relative_error(outputs_of(merged, (others, {})), expected) > 1e-3
    result(*inputs).square().sum().backward()
    for first, _ in pairs:
        assert result.get_parameter(f"project.{first.split('.')[1]}.weight").grad.abs().sum() > 0


def pick_disjoint(gm, found):
    chosen, used, nodes = [], set(), by_id(gm)
    for candidate in found:
        inside = fxmerge.graph.between(nodes[candidate.entry], nodes[candidate.exit])
        if used.isdisjoint(inside):
            used |= inside
            chosen.append(candidate)
    return tuple(chosen)


def test_a_lost_embedding_is_noticed(monkeypatch):
    _, gm, _ = embedded()
    candidate = next(c for c in candidates(gm) if c.kept == ("first.0.0", "second.0.0"))
    result = relaxed(gm, candidate)
    monkeypatch.setattr(fxmerge.folding, "constant_response", lambda conv: 2 * fxmerge.algebra.constant_response(conv))
    with pytest.raises(fxmerge.errors.InternalError, match="with an error of"):
        folded(result)


def test_blocks_that_read_an_embedding_of_the_image_are_one_series():
    _, gm, _ = embedded(own=True, blocks=3)
    tree = region_tree(gm)
    assert [node_id(child.exit) for child in tree.children if child.exit is not None][-1].startswith("relu")
    assert all(type(child).__name__ in ("Op", "Parallel") for series in all_series(tree) for child in series.children)
    listed = {node_id(node) for node in operations(tree)}
    assert {node_id(node) for node, _ in convolutions(gm)} <= listed


def test_a_segment_that_computes_its_own_side_input_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4)
            self.e, self.f = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            h = self.b(x)
            e = torch.tanh(self.e(x.mean((2, 3))))
            y = self.c(h + e[:, :, None, None])
            return y + self.f(e)[:, :, None, None]

    x = images(2, 3, 8, 9)
    gm = captured(lively(Own()), x)
    enumeration = enumerate_segments(gm)
    assert "side-input" in {each.code for each in enumeration.refusals}
    for site in enumeration.sites:
        if site.candidate.kind == "merge":
            result = relaxed(gm, site.candidate)
            assert output_error(result, folded(result), x) < EXACT


def test_convolutions_that_compute_side_inputs_count():
    class Pooled(Embedded):
        def __init__(self):
            super().__init__(own=True)
            self.squeeze = nn.Conv2d(4, 4, 1)

        def forward(self, x, t):
            x = self.stem(x)
            e = torch.sigmoid(self.embed(self.squeeze(x.mean((2, 3), keepdim=True)).flatten(1)))
            for first, project in zip(self.first, self.project, strict=True):
                x = x + first(x + project(e)[:, :, None, None])
            return x + t.mean()

    net, inputs = lively(Pooled()), (images(2, 3, 8, 9), torch.randn(2, 6, dtype=torch.float64))
    found = fxmerge.frontier(net, inputs, runtime="macs")
    assert "squeeze" not in {node_id(node) for node in operations(found.enumeration.series[0])}
    assert found.points[-1][0] == found.original
    projection, carried = 2 * 5 * 4, 2 * 4 * 4  # a layer that goes with its reader, a matrix that is new
    for index in range(len(found)):
        difference = found.apply(found.plan(index)).report.measured - found.points[index][0]
        assert difference in [a * carried - b * projection for a in range(3) for b in range(3)]
    for budget in (0.9, 0.8, 0.7):
        report = found.compress(budget).report
        assert report.measured <= budget * report.original


def test_meanings():
    _, gm, _ = embedded()
    nodes = by_id(gm)
    assert isinstance(meaning(gm, nodes["add"], frozenset()), Side)
    assert source_of(nodes["add"]) is next(n for n in gm.graph.nodes if node_id(n) == "first.0.2")
    assert not is_constant(nodes["add"])
    norm = captured(lively(normed(nn.GroupNorm(2, 4))), images(2, 3, 8, 9))
    assert meaning(norm, by_id(norm)["1"], frozenset()) == Norm(4)
    scaled = captured(lively(Between(LINEAR["scale"])), images(2, 3, 10, 9))
    assert isinstance(meaning(scaled, by_id(scaled)["mul"], frozenset()), Linear)
    assert is_constant(by_id(scaled)["scale"])


# --- activations of the user's own --------------------------------------------------------------------------------------


class Snake(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.rate = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return x + torch.sin(x * self.rate) ** 2


@pytest.fixture
def snake():
    fxmerge.register_removable(Snake)
    yield Snake
    unregister_removable(Snake)


def test_a_registered_activation_goes_like_any_other(snake):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), snake(4), nn.Conv2d(4, 5, 3, padding=1), snake(5))
    net, x = lively(net), images(2, 3, 8, 9)
    gm = captured(net, x)
    assert output_error(net, gm, x) < EXACT
    candidate = whole(gm)
    assert candidate.kept == ("0", "2")
    result, _ = check_exact(gm, candidate, x)
    assert set(net.state_dict()) - set(result.state_dict()) == {"1.rate"}
    loss = Magnitude().prepare(gm)(candidate)
    points = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    weights = torch.exp(-(points**2) / 2)
    weights /= weights.sum()
    shares = []
    for rate in net[1].rate.detach().flatten():
        y = points + torch.sin(points * rate) ** 2
        y = y - weights @ y
        shares.append(float((weights @ (points * y)) ** 2 / (weights @ y**2)))
    assert loss == pytest.approx(-math.log(sum(shares) / len(shares)), rel=1e-6)


def test_an_unregistered_one_is_in_the_way():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Snake(4), nn.Conv2d(4, 5, 3, padding=1)))
    assert not [c for c in candidates(captured(net, images(2, 3, 8, 9))) if len(c.kept) == 2]


# --- include and exclude ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "changed"),
    [
        ({}, {"first", "second", "third"}),
        ({"include": ("first",)}, {"first"}),
        ({"exclude": ("first", "third.1")}, {"second"}),
        ({"include": ("first", "second"), "exclude": ("second.0",)}, {"first"}),
    ],
)
def test_only_what_is_included_and_not_excluded_changes(limits, changed):
    block = lambda: nn.Sequential(conv(4, 4), conv(4, 4))  # noqa: E731
    net = nn.Sequential()
    for name in ("first", "second", "third"):
        net.add_module(name, block())
    gm = captured(lively(nn.Sequential(conv(3, 4)).append(net)), images(2, 3, 8, 8))
    spelled = {key: tuple(f"1.{name}" for name in names) for key, names in limits.items()}
    enumeration = enumerate_segments(gm, Limits(**spelled))
    touched = {name for site in enumeration.sites for name in (*site.candidate.kept, *site.candidate.bypassed)}
    inside = {name.split(".")[1] for name in touched if name.startswith("1.")}
    assert inside <= changed | ({"third"} if "third.1" in str(limits) else set()) | (
        {"second"} if "second.0" in str(limits) else set()
    )
    assert changed <= inside
    if limits:
        assert "0.0" not in touched
        assert "excluded" in {each.code for each in enumeration.refusals}


def test_names_that_are_no_submodules_are_refused():
    net = nn.Sequential(conv(3, 4), conv(4, 4))
    with pytest.raises(UserError, match=r"include names '0\.conv', which is no submodule"):
        fxmerge.frontier(net, torch.randn(2, 3, 8, 8), runtime="macs", include="0.conv")
    found = fxmerge.frontier(net, torch.randn(2, 3, 8, 8), runtime="macs", include=["0", "1"], exclude="0")
    assert all("0.0" not in (*site.candidate.kept, *site.candidate.bypassed) for site in found.enumeration.sites)
