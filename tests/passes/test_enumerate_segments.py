"""The candidates of small networks, listed in full; the best subset against brute force; and every refusal."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxmerge
from fxmerge.candidates import Limits
from fxmerge.graph import by_id, clone, module_of
from fxmerge.linear import REMOVABLE, conv_geometry
from fxmerge.passes import EnumerateSegmentsPass, enumerate_segments
from fxmerge.regions import Mesh, Parallel, all_series

IMAGE = torch.zeros(2, 4, 8, 8)


def conv(inputs=4, outputs=4, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Modules by name, and what ``forward`` does with them."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, copy.deepcopy(module))

    def forward(self, x):
        return self.compute(self, x)


def enumerate_(model, **limits):
    captured = fxmerge.capture(model, IMAGE)
    return enumerate_segments.enumerate_segments(captured, Limits(**limits))


def show(enumeration):
    """One line a candidate: where it stands, what it is."""
    lines = []
    for site in enumeration.sites:
        candidate = site.candidate
        parts = [f"{site.series}[{site.start}:{site.stop}] {candidate.kind} {candidate.entry}..{candidate.exit}"]
        for sign, names in (("=", candidate.kept), ("-", candidate.bypassed), ("~", candidate.removed)):
            parts += [sign + name for name in names]
        parts += [f"cut {join}:{position}" for join, position in candidate.cuts]
        if candidate.geometry is not None:
            parts.append(repr(candidate.geometry).removeprefix("Geometry(").removesuffix(")"))
        if candidate.activation is not None:
            parts.append(f"+{candidate.activation}")
        lines.append(" ".join(parts))
    return lines


def codes(enumeration):
    return {(refusal.code, refusal.convolution, refusal.node) for refusal in enumeration.refusals}


def two():
    return nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 5))


def residual():
    return Net(lambda net, x: torch.relu(x + net.b(torch.relu(net.a(x)))), a=conv(), b=conv())


def downsample():
    def compute(net, x):
        return torch.relu(net.b(torch.relu(net.a(x))) + net.d(x))

    return Net(compute, a=conv(4, 6, stride=2), b=conv(6, 6), d=conv(4, 6, 1, stride=2))


def inverted_residual():
    expand = nn.Sequential(conv(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
    depthwise = nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
    project = nn.Sequential(conv(8, 4, 1), nn.BatchNorm2d(4))
    return Net(lambda net, x: x + net.p(net.d(net.e(x))), e=expand, d=depthwise, p=project)


def inception():
    branch = nn.Sequential(conv(4, 3, 1), nn.ReLU(), conv(3, 3))
    return Net(lambda net, x: net.o(torch.cat([net.a(x), net.b(x)], 1)), a=conv(4, 2, 1), b=branch, o=conv(5, 6))


# --- whole lists ------------------------------------------------------------------------------------------------------

LISTS = {
    two: ["0[1:4] merge input..2 =0 =2 ~1 5x5 p2 4->5"],
    residual: [
        "0[1:2] merge x..add =a =b ~relu 5x5 p2 4->4",
        "0[1:2] merge x..add =b -a ~relu 3x3 p1 4->4",
        "1[0:3] merge x..b =a =b ~relu 5x5 p2 4->4",
        "1[0:3] merge x..b =b -a ~relu 3x3 p1 4->4",
        "1[0:1] bypass x..a -a",
        "1[0:3] drop x..b -a -b ~relu cut add:1",
    ],
    downsample: [
        "0[1:2] merge x..add =a =b =d ~relu 7x7 s2 p3 4->6",
        "0[1:2] merge x..add =a =d -b ~relu 3x3 s2 p1 4->6",
        "0[1:2] merge x..add =d -a -b ~relu cut add:0 1x1 s2 4->6",
        "1[0:3] merge x..b =a =b ~relu 7x7 s2 p3 4->6",
        "1[0:3] merge x..b =a -b ~relu 3x3 s2 p1 4->6",
        "1[2:3] bypass relu..b -b",
        "1[0:3] drop x..b -a -b ~relu cut add:0",
        "2[0:1] drop x..d -d cut add:1",
    ],
    inverted_residual: [
        "0[1:2] merge x..add =e.0 =d.0 =p.0 ~e.2 ~d.2 3x3 p1 4->4",
        "0[1:2] merge x..add =e.0 =p.0 -d.0 ~e.2 ~d.2 1x1 4->4",
        "1[0:5] merge x..d.1 =e.0 =d.0 ~e.2 3x3 p1 4->8",
        "1[0:5] merge x..d.1 =e.0 -d.0 ~e.2 1x1 4->8",
        "1[0:8] merge x..p.1 =e.0 =d.0 =p.0 ~e.2 ~d.2 3x3 p1 4->4",
        "1[0:8] merge x..p.1 =e.0 =p.0 -d.0 ~e.2 ~d.2 1x1 4->4",
        "1[3:8] merge e.2..p.1 =d.0 =p.0 ~d.2 3x3 p1 8->4",
        "1[3:8] merge e.2..p.1 =p.0 -d.0 ~d.2 1x1 8->4",
        "1[3:5] bypass e.2..d.1 -d.0",
        "1[0:8] drop x..p.1 -e.0 -d.0 -p.0 ~e.2 ~d.2 cut add:1",
    ],
    inception: [
        "0[1:2] merge x..cat =a =b.0 =b.2 ~b.1 3x3 p1 4->5",
        "0[1:2] merge x..cat =a =b.0 -b.2 ~b.1 1x1 4->5",
        "0[1:3] merge x..o =a =b.0 =b.2 =o ~b.1 5x5 p2 4->6",
        "0[1:3] merge x..o =a =b.0 =o -b.2 ~b.1 3x3 p1 4->6",
        "2[0:3] merge x..b.2 =b.0 =b.2 ~b.1 3x3 p1 4->3",
        "2[0:3] merge x..b.2 =b.0 -b.2 ~b.1 1x1 4->3",
        "2[2:3] bypass b.1..b.2 -b.2",
    ],
}


@pytest.mark.parametrize("factory", LISTS, ids=lambda factory: factory.__name__)
def test_every_candidate_of(factory):
    torch.manual_seed(0)
    model = factory()
    if factory is residual:  # of two equal geometries the larger norm stays
        model.b.weight.data.mul_(2)
    enumeration = enumerate_(model)
    assert show(enumeration) == LISTS[factory]
    assert not enumeration.refusals


def test_the_larger_norm_stays():
    torch.manual_seed(0)
    model = residual()
    model.a.weight.data.mul_(2)
    assert "1[0:3] merge x..b =a -b ~relu 3x3 p1 4->4" in show(enumerate_(model))


def test_method_depth_takes_no_convolution():
    for factory in LISTS:
        found = show(enumerate_(factory(), method="depth"))
        assert found == [line for line in LISTS[factory] if " -" not in line]
    assert found


def test_method_layer_merges_nothing():
    for factory in LISTS:
        enumeration = enumerate_(factory(), method="layer")
        assert show(enumeration) == [line for line in LISTS[factory] if " merge " not in line]
        assert not [refusal for refusal in enumeration.refusals if refusal.code == "kernel-cap"]


def test_the_kernel_cap_refuses_with_both_ends():
    enumeration = enumerate_(two(), max_kernel=4)
    assert show(enumeration) == []
    (refusal,) = enumeration.refusals
    assert (refusal.code, refusal.convolution, refusal.node) == ("kernel-cap", "0", "2")
    assert refusal.reason == "merged up to '2' its kernel would be larger than max_kernel=4"
    assert show(enumerate_(two(), max_kernel=5)) == LISTS[two]


def test_the_kernel_cap_holds_for_branches():
    wide = Net(lambda net, x: net.o(x + net.a(x)), a=nn.Sequential(conv(4, 6), conv(6, 4)), o=conv(4, 6))
    assert all(" 7x7" not in line for line in show(enumerate_(wide, max_kernel=5)))
    assert any(" 7x7" in line for line in show(enumerate_(wide, max_kernel=7)))
    enumeration = enumerate_(wide, max_kernel=3)
    assert ("kernel-cap", "o", "add") in codes(enumeration)


def test_one_large_kernel_is_no_merge_and_not_capped():
    model = nn.Sequential(conv(4, 6, 9), nn.ReLU(), conv(6, 5, 1))
    assert show(enumerate_(model)) == []
    assert show(enumerate_(model, max_kernel=9)) == ["0[1:4] merge input..2 =0 =2 ~1 9x9 p4 4->5"]


@pytest.mark.parametrize(("span", "count"), [(1, 0), (2, 3), (3, 5), (4, 6)])
def test_max_span(span, count):
    model = nn.Sequential(conv(4, 5, 1), nn.ReLU(), conv(5, 6, 1), nn.ReLU(), conv(6, 7, 1), nn.ReLU(), conv(7, 8, 1))
    enumeration = enumerate_(model, max_span=span)
    assert len(enumeration.sites) == count
    assert max((len(site.candidate.kept) for site in enumeration.sites), default=0) == (span if count else 0)


def test_an_activation_behind_a_merge_is_a_choice():
    line = LISTS[two][0]
    assert show(enumerate_(two(), exit_activation=True)) == [line, f"{line} +ReLU"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 5), nn.BatchNorm2d(5), nn.SiLU()),
        nn.Sequential(conv(4, 6), conv(6, 5)),
    ],
    ids=["there is one", "none was removed"],
)
def test_no_activation_where(model):
    found = show(enumerate_(model, exit_activation=True))
    assert len(found) == 1
    assert "+" not in found[0]


# --- the best subset --------------------------------------------------------------------------------------------------

KERNELS = (3, 1, 5, 3, 1, 3)


def reducible_chain(seed):
    torch.manual_seed(seed)
    return nn.Sequential(*(layer for kernel in KERNELS for layer in (conv(4, 4, kernel), nn.ReLU())))


def by_brute_force(model, max_kernel):
    """For every interval and geometry the largest summed norm, and the subset that has it; every subset is tried."""
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    best = {}
    for first in range(len(convolutions)):
        for last in range(first, len(convolutions)):
            inside = convolutions[first : last + 1]
            for stays in product((True, False), repeat=len(inside)):
                kept = [pair for pair, stay in zip(inside, stays, strict=True) if stay]
                if not kept or len(inside) < 2:
                    continue
                geometry = conv_geometry(kept[0][1])
                for _, module in kept[1:]:
                    geometry = geometry.then(conv_geometry(module))
                if len(kept) > 1 and max(geometry.kernel) > max_kernel:
                    continue
                norm = sum(float(module.weight.detach().abs().sum()) for _, module in kept)
                key = (inside[0][0], inside[-1][0], geometry)
                if key not in best or norm > best[key][0]:
                    best[key] = (norm, tuple(name for name, _ in kept))
    return {key: names for key, (_, names) in best.items()}


@pytest.mark.parametrize("max_kernel", [5, 7, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_subset_with_the_largest_norm_wins(seed, max_kernel):
    model = reducible_chain(seed)
    expected = by_brute_force(model, max_kernel)
    merges = [
        site.candidate for site in enumerate_(model, max_kernel=max_kernel).sites if site.candidate.kind == "merge"
    ]
    found = {}
    for candidate in merges:
        names = sorted((*candidate.kept, *candidate.bypassed), key=int)
        found[names[0], names[-1], candidate.geometry] = candidate.kept
    assert found == expected
    assert len(found) == len(merges) >= 40


def test_the_brute_force_check_can_fail(monkeypatch):
    offer = enumerate_segments._Search._offer

    def first_comes(self, table, way):
        if way.geometry not in table:
            offer(self, table, way)

    monkeypatch.setattr(enumerate_segments._Search, "_offer", first_comes)
    with pytest.raises(AssertionError):
        test_the_subset_with_the_largest_norm_wins(0, 9)


# --- bypass and drop --------------------------------------------------------------------------------------------------


def applied(captured, sites):
    """The network after bypasses and drops, done here by hand."""
    copied = clone(captured)
    nodes = by_id(copied)
    for site in sites:
        candidate = site.candidate
        entry, exit_ = nodes[candidate.entry], nodes[candidate.exit]
        if candidate.kind == "bypass":
            exit_.replace_all_uses_with(entry)
        else:
            ((join, position),) = candidate.cuts
            nodes[join].replace_all_uses_with(nodes[join].args[1 - position])
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied


def joins_a_value_with_itself(captured):
    """Whether both operands of a join are one value, activations aside."""

    def source(node):
        while isinstance(module_of(captured, node), REMOVABLE):
            node = node.args[0]
        return node

    pairs = [node.args for node in captured.graph.nodes if node.op == "call_function" and len(node.args) == 2]
    joins = [pair for pair in pairs if all(isinstance(value, fx.Node) for value in pair)]
    return any(source(left) is source(right) for left, right in joins)


def two_in_a_branch():
    return Net(lambda net, x: x + net.b(torch.relu(net.a(x))), a=conv(), b=conv())


def residual_in_a_branch():
    def compute(net, x):
        y = net.a(x)
        return x + (y + net.b(y))

    return Net(compute, a=conv(), b=conv())


def only_a_residual_in_a_branch():
    return Net(lambda net, x: x + (x + net.b(x)), b=conv())


def two_branches():
    return Net(lambda net, x: net.a(x) + net.b(x), a=conv(), b=nn.Sequential(conv(), conv()))


def gate():
    return Net(lambda net, x: x * torch.sigmoid(net.b(torch.relu(net.a(x)))), a=conv(), b=conv())


def difference():
    return Net(lambda net, x: x - net.b(torch.relu(net.a(x))), a=conv(), b=conv())


def read_elsewhere():
    def compute(net, x):
        y = net.b(torch.relu(net.a(x)))
        return x + y, y * 2

    return Net(compute, a=conv(), b=conv())


NEVER_TWICE = [
    residual,
    two_in_a_branch,
    residual_in_a_branch,
    only_a_residual_in_a_branch,
    two_branches,
    gate,
    difference,
    read_elsewhere,
]


@pytest.mark.parametrize("factory", NEVER_TWICE, ids=lambda factory: factory.__name__)
def test_no_choice_of_bypasses_and_drops_joins_a_value_with_itself(factory):
    captured = fxmerge.capture(factory(), IMAGE)
    enumeration = enumerate_segments.enumerate_segments(captured)
    small = [site for site in enumeration.sites if site.candidate.kind != "merge"]
    assert small
    for chosen in product((True, False), repeat=len(small)):
        sites = [site for site, taken in zip(small, chosen, strict=True) if taken]
        names = [name for site in sites for name in site.candidate.bypassed]
        if len(names) == len(set(names)):  # a plan takes disjoint segments
            assert not joins_a_value_with_itself(applied(captured, sites)), show(enumeration)


def test_that_check_can_fail(monkeypatch):
    monkeypatch.setattr(enumerate_segments._Search, "_spoiling", lambda *_: set())
    for factory in (two_in_a_branch, residual_in_a_branch, only_a_residual_in_a_branch, difference, read_elsewhere):
        with pytest.raises(AssertionError):
            test_no_choice_of_bypasses_and_drops_joins_a_value_with_itself(factory)


def test_a_bypass_takes_the_activation_behind_it_unless_it_is_idempotent():
    for activation, stop, removed in ((nn.ReLU(), 2, ""), (nn.SiLU(), 3, " ~1")):
        model = nn.Sequential(conv(), activation, conv(4, 6))
        assert f"0[1:{stop}] bypass input..{stop - 2} -0{removed}" in show(enumerate_(model))


def test_the_shortest_interval_is_bypassed():
    model = nn.Sequential(conv(4, 8, stride=2), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2))
    found = [line for line in show(enumerate_(model)) if "bypass" in line]
    assert found == ["0[3:4] bypass 1..2 -2"]
    model[2] = conv(8, 8, stride=2)
    model[4] = nn.ConvTranspose2d(8, 4, 4, 4)
    found = [line for line in show(enumerate_(model)) if "bypass" in line]
    assert found == ["0[1:6] bypass input..4/conv_transpose2d -0 -2 ~1 ~3"]


def test_a_branch_of_a_gate_is_dropped():
    def compute(net, x):
        y = net.a(x)
        return y * torch.sigmoid(net.e(torch.relu(net.r(F.adaptive_avg_pool2d(y, 1)))))

    found = show(enumerate_(Net(compute, a=conv(), r=conv(4, 2, 1), e=conv(2, 4, 1))))
    assert "1[0:5] drop a..sigmoid -r -e ~relu ~sigmoid cut mul:1" in found
    assert [line for line in found if " a.." in line or "..a " in line] == [
        "0[1:2] bypass x..a -a",
        "1[0:5] drop a..sigmoid -r -e ~relu ~sigmoid cut mul:1",
    ]


def squeeze_excite(net, x):
    y = net.a(x)
    return net.o(y * torch.sigmoid(net.e(torch.relu(net.r(F.adaptive_avg_pool2d(y, 1))))))


def test_a_merge_drops_the_gate_on_its_way():
    net = Net(squeeze_excite, a=nn.Sequential(conv(), nn.ReLU()), r=conv(4, 2, 1), e=conv(2, 4, 1), o=conv(4, 5))
    dropped = "-r -e ~relu ~sigmoid ~mul"
    merges = [line for line in show(enumerate_(net)) if " cut " in line and " merge " in line]
    assert merges == [
        f"0[1:4] merge x..mul =a.0 {dropped} ~a.1 cut mul:1 3x3 p1 4->4",
        f"0[1:5] merge x..o =a.0 =o {dropped} ~a.1 cut mul:1 5x5 p2 4->5",
        f"0[1:5] merge x..o =o -a.0 {dropped} ~a.1 cut mul:1 3x3 p1 4->5",
        f"0[3:5] merge a.1..o =o {dropped} cut mul:1 3x3 p1 4->5",
    ]
    assert not [line for line in show(enumerate_(net, method="depth")) if "cut" in line]


def test_the_activation_behind_a_merge_is_never_that_of_a_gate():
    net = Net(squeeze_excite, a=nn.Sequential(conv(), nn.SiLU()), r=conv(4, 2, 1), e=conv(2, 4, 1), o=conv(4, 5))
    sites = enumerate_(net, exit_activation=True).sites
    assert {site.candidate.activation for site in sites if site.candidate.cuts} == {None, "SiLU"}


def test_a_gate_without_convolutions_goes_with_activations_alone():
    net = Net(lambda net, x: net.b(net.a(x) * torch.sigmoid(x.mean(1, keepdim=True))), a=conv(), b=conv())
    cut = [line for line in show(enumerate_(net, method="depth")) if "cut" in line]
    assert cut == [
        "0[1:2] merge x..mul =a ~sigmoid ~mul cut mul:1 3x3 p1 4->4",
        "0[1:3] merge x..b =a =b ~sigmoid ~mul cut mul:1 5x5 p2 4->4",
    ]


def test_chains_in_a_mesh_are_found():
    def compute(net, x):
        y = net.a(x)
        return torch.cat([x, y, net.b(torch.cat([x, y], 1))], 1)

    chain = nn.Sequential(conv(4, 5), nn.ReLU(), conv(5, 4))
    enumeration = enumerate_(Net(compute, a=chain, b=nn.Sequential(conv(8, 5), nn.ReLU(), conv(5, 4))))
    assert any(isinstance(child, Mesh) for child in enumeration.series[0].children)
    assert show(enumeration) == [
        "1[0:3] merge x..a.2 =a.0 =a.2 ~a.1 5x5 p2 4->4",
        "2[0:3] merge cat..b.2 =b.0 =b.2 ~b.1 5x5 p2 8->4",
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


def broadcast():
    return Net(lambda net, x: net.o(net.a(x) + net.b(x)), a=conv(4, 6), b=conv(4, 1), o=conv(6, 5))


def shared():
    return Net(lambda net, x: net.b(net.a(torch.relu(net.a(x)))), a=conv(), b=conv(4, 5))


def written_in_place():
    def compute(net, x):
        y = net.b(net.a(x))
        view = y.flatten(1)
        torch.relu_(y)
        return net.c(y).flatten(1) + view

    return Net(compute, a=conv(4, 6), b=conv(6, 4), c=conv(4, 4))


REFUSED = {
    "max pool": (
        lambda: nn.Sequential(conv(4, 6), nn.MaxPool2d(2), conv(6, 5)),
        {("not-linear", "0", "1"), ("not-linear", "2", "1")},
    ),
    "padding mode": (
        lambda: nn.Sequential(conv(4, 6), conv(6, 5, padding_mode="reflect")),
        {("padding-mode", "0", "1/pad"), ("padding-mode", "1", "1/pad")},
    ),
    "batch statistics": (
        lambda: nn.Sequential(conv(4, 6), nn.BatchNorm2d(6, track_running_stats=False), conv(6, 5)),
        {("batch-statistics", "0", "1"), ("batch-statistics", "2", "1")},
    ),
    "group norm": (
        lambda: nn.Sequential(conv(4, 6), nn.GroupNorm(2, 6), conv(6, 5)),
        {("norm", "0", "1"), ("norm", "2", "1")},
    ),
    "shared": (
        shared,
        {("shared", "a", "a"), ("shared", "a#1", "a#1"), ("shared", "b", "a#1")},
    ),
    "broadcast": (
        broadcast,
        {("not-linear", name, "add") for name in "abo"},
    ),
    "gate": (
        lambda: Net(
            lambda net, x: net.o(F.max_pool2d(net.a(x), 3, 1, 1) * net.b(x)), a=conv(4, 6), b=conv(4, 1), o=conv(6, 5)
        ),
        {("gate", name, "mul") for name in "abo"},
    ),
    "concatenation of rows": (
        lambda: Net(lambda net, x: net.o(torch.cat([net.a(x), net.b(x)], 2)), a=conv(4, 6), b=conv(4, 6), o=conv(6, 5)),
        {("not-linear", name, "cat") for name in "abo"},
    ),
    "in place": (
        written_in_place,
        {("in-place", "a", "b"), ("in-place", "b", "b"), ("in-place", "c", "relu_")},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_convolutions_on_both_sides(name):
    factory, expected = REFUSED[name]
    enumeration = enumerate_(factory())
    assert expected <= codes(enumeration)
    assert not [line for line in show(enumeration) if "merge" in line]
    assert all(refusal.reason for refusal in enumeration.refusals)


def test_what_is_written_in_place_is_no_entry_and_not_taken():
    for line in show(enumerate_(written_in_place())):
        assert "..b" not in line
        assert "relu_.." not in line


def test_sizes_do_not_keep_a_segment_from_being_closed():
    def compute(net, x):
        y = net.a(x)
        n, c, h, w = y.shape
        return net.b(y.view(n, c, h * w).flip(2).view(n, c, h, w)).view(n, -1)

    found = show(enumerate_(Net(compute, a=conv(4, 8), b=conv(8, 4))))
    assert found == ["0[1:6] bypass x..b -a -b"]


def test_the_pass_changes_nothing():
    captured = fxmerge.capture(residual(), IMAGE)
    before = captured.code
    result = EnumerateSegmentsPass(Limits(method="depth"))(captured)
    assert result.modified is False
    assert result.graph_module is captured
    assert captured.code == before
    assert show(result.enumeration) == [line for line in LISTS[residual] if " -" not in line]
    assert repr(EnumerateSegmentsPass()).startswith("EnumerateSegmentsPass(limits=Limits(method='layermerge'")


def test_sites_count_series_of_the_tree():
    enumeration = enumerate_(residual())
    assert enumeration.series == tuple(all_series(enumeration.series[0]))
    parallel = enumeration.series[0].children[1]
    assert isinstance(parallel, Parallel)
    assert parallel.branches[1] is enumeration.series[1]
    for site in enumeration.sites:
        children = enumeration.series[site.series].children[site.start : site.stop]
        exit_ = children[-1].exit
        assert exit_ is not None
        assert exit_.meta["fxmerge"]["id"] == site.candidate.exit
