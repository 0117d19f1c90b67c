"""The region tree against hand-drawn trees, and against its definition on random graphs."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxmerge
from fxmerge import regions
from fxmerge.errors import UnsupportedError
from fxmerge.graph import META, clone, convolutions
from fxmerge.passes import FoldPass, RelaxPass
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.regions import Mesh, Op, Parallel, all_series, region_tree, render


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def block(inputs, outputs):
    return nn.Sequential(conv(inputs, outputs), nn.ReLU(), conv(outputs, outputs))


class Net(nn.Module):
    """Modules by name, and what ``forward`` does with them."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, copy.deepcopy(module))

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def tree_of(model, *inputs):
    return region_tree(fxmerge.capture(model, inputs or (torch.zeros(2, 4, 8, 8),)))


def chain():
    return nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 3))


def residual():
    return Net(lambda net, x: torch.relu(x + net.b(torch.relu(net.a(x)))), a=conv(4, 4), b=conv(4, 4))


def downsample():
    def compute(net, x):
        return net.b(torch.relu(net.a(x))) + net.d(x)

    return Net(compute, a=conv(4, 6, stride=2), b=conv(6, 6), d=conv(4, 6, 1, stride=2))


def nested():
    def compute(net, x):
        y = net.a(x)
        return x + net.c(y + net.b(torch.relu(y)))

    return Net(compute, a=conv(4, 4), b=conv(4, 4), c=conv(4, 4))


def inception():
    def compute(net, x):
        return net.o(torch.cat([net.a(x), net.b(x), net.c(F.avg_pool2d(x, 3, 1, 1)), x], 1))

    return Net(compute, a=conv(4, 2, 1), b=block(4, 3), c=conv(4, 2, 1), o=conv(11, 4))


def dense():
    def compute(net, x):
        a = net.a(x)
        b = net.b(torch.cat([x, a], 1))
        return net.o(torch.cat([x, a, b, net.c(torch.cat([x, a, b], 1))], 1))

    return Net(compute, a=block(4, 2), b=block(6, 2), c=block(8, 2), o=conv(10, 4))


def unet():
    def compute(net, x):
        a = torch.relu(net.a(x))
        b = net.b(F.max_pool2d(a, 2))
        c = F.interpolate(net.c(F.max_pool2d(b, 2)), scale_factor=2.0)
        return net.o(torch.cat([a, F.interpolate(net.u(torch.cat([b, c], 1)), scale_factor=2.0)], 1))

    return Net(compute, a=conv(4, 4), b=conv(4, 6), c=conv(6, 6), u=conv(12, 4), o=conv(8, 3))


def two_inputs():
    return Net(lambda net, x, y: net.o(net.a(x) + net.b(y)), a=conv(4, 4), b=conv(4, 4), o=conv(4, 2))


def two_outputs():
    def compute(net, x):
        y = net.a(x)
        return net.b(y), net.o(torch.relu(y))

    return Net(compute, a=conv(4, 4), b=conv(4, 4), o=conv(4, 2))


def side_input():
    def compute(net, x, time):
        return net.o(net.a(x) + net.time(time)[:, :, None, None])

    return Net(compute, a=conv(4, 4), time=nn.Linear(5, 4), o=conv(4, 2))


def shuffle():
    def compute(net, x):
        y = net.a(x)
        n, c, h, w = y.shape
        return net.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    return Net(compute, a=conv(4, 4), b=conv(4, 4))


def squeeze_excite():
    def compute(net, x):
        y = net.a(x)
        return y * torch.sigmoid(net.e(torch.relu(net.r(F.adaptive_avg_pool2d(y, 1)))))

    return Net(compute, a=conv(4, 4), r=conv(4, 2, 1), e=conv(2, 4, 1))


def split():
    def compute(net, x):
        u, v = net.a(x).chunk(2, 1)
        return torch.cat([u, net.b(v)], 1)

    return Net(compute, a=conv(4, 4), b=conv(2, 2))


def difference():
    return Net(lambda net, x: x - net.a(x), a=block(4, 4))


IMAGE = torch.zeros(2, 4, 8, 8)
TREES = {
    chain: ((), """
        Series
          input 4x8x8
          0 6x8x8
          1 6x8x8
          2 6x8x8
          3 6x4x4
          4/flatten 96
          5 3
    """),
    residual: ((), """
        Series
          input 4x8x8
          Parallel, joined by add
            identity
            Series
              a 4x8x8
              relu 4x8x8
              b 4x8x8
          relu_2 4x8x8
    """),
    downsample: ((), """
        Series
          input 4x8x8
          Parallel, joined by add
            Series
              a 6x4x4
              relu 6x4x4
              b 6x4x4
            Series
              d 6x4x4
    """),
    nested: ((), """
        Series
          input 4x8x8
          Parallel, joined by add#1
            identity
            Series
              a 4x8x8
              Parallel, joined by add
                identity
                Series
                  relu 4x8x8
                  b 4x8x8
              c 4x8x8
    """),
    inception: ((), """
        Series
          input 4x8x8
          Parallel, joined by cat
            Series
              a 2x8x8
            Series
              b.0 3x8x8
              b.1 3x8x8
              b.2 3x8x8
            Series
              avgpool2d 4x8x8
              c 2x8x8
            identity
          o 4x8x8
    """),
    dense: ((), """
        Series
          input 4x8x8
          Mesh of 12 operations
            Series
              a.0 2x8x8
              a.1 2x8x8
              a.2 2x8x8
            Series
              b.0 2x8x8
              b.1 2x8x8
              b.2 2x8x8
            Series
              c.0 2x8x8
              c.1 2x8x8
              c.2 2x8x8
          o 4x8x8
    """),
    unet: ((), """
        Series
          input 4x8x8
          a 4x8x8
          relu 4x8x8
          Parallel, joined by cat#1
            identity
            Series
              maxpool2d 4x4x4
              b 6x4x4
              Parallel, joined by cat
                identity
                Series
                  maxpool2d_2 6x2x2
                  c 6x2x2
                  upsample_nearest2d 6x4x4
              u 4x4x4
              upsample_nearest2d#1 4x8x8
          o 3x8x8
    """),
    two_inputs: ((IMAGE, IMAGE), """
        Series
          Parallel, joined by add
            Series
              input 4x8x8
              a 4x8x8
            Series
              input 4x8x8
              b 4x8x8
          o 2x8x8
    """),
    two_outputs: ((), """
        Series
          input 4x8x8
          a 4x8x8
          Mesh of 3 operations
            Series
              relu 4x8x8
              o 2x8x8
    """),
    side_input: ((IMAGE, torch.zeros(2, 5)), """
        Series
          input 4x8x8
          a 4x8x8
          add 4x8x8
          o 2x8x8
    """),
    shuffle: ((), """
        Series
          input 4x8x8
          a 4x8x8
          channelshuffle 4x8x8
          b 4x8x8
    """),
    squeeze_excite: ((), """
        Series
          input 4x8x8
          a 4x8x8
          Parallel, joined by mul
            identity
            Series
              adaptiveavgpool2d 4x1x1
              r 2x1x1
              relu 2x1x1
              e 4x1x1
              sigmoid 4x1x1
    """),
    split: ((), """
        Series
          input 4x8x8
          a 4x8x8
          Parallel, joined by cat
            Series
              slice 2x8x8
            Series
              slice#1 2x8x8
              b 2x8x8
    """),
    difference: ((), """
        Series
          input 4x8x8
          Parallel, joined by sub
            identity
            Series
              a.0 4x8x8
              a.1 4x8x8
              a.2 4x8x8
    """),
}  # fmt: skip


def dedent(text):
    return "\n".join(line[8:] for line in text.strip("\n").splitlines()).rstrip()


@pytest.mark.parametrize("factory", TREES, ids=lambda factory: factory.__name__)
def test_tree(factory):
    inputs, expected = TREES[factory]
    captured = fxmerge.capture(factory(), inputs or (IMAGE,))
    tree = region_tree(captured)
    assert render(tree) == dedent(expected)

    places = Counter(
        child.exit for series in all_series(tree) for child in series.children if not isinstance(child, Mesh)
    )
    meshes = [child for series in all_series(tree) for child in series.children if isinstance(child, Mesh)]
    inner = {
        child.exit for mesh in meshes for chain in mesh.children for one in all_series(chain) for child in one.children
    }
    places.update(node for mesh in meshes for node in mesh.nodes if node not in inner)
    assert all(places[node] == 1 for node, _ in convolutions(captured))


def test_sizes_are_no_operations():
    captured = fxmerge.capture(shuffle(), IMAGE)
    assert any("sym_size" in str(node.target) for node in captured.graph.nodes)
    assert "sym_size" not in render(region_tree(captured))


def test_branches_are_in_the_order_of_the_operands():
    tree = tree_of(Net(lambda net, x: net.a(x) + x, a=conv(4, 4)))
    left = tree.children[1]
    assert isinstance(left, Parallel)
    assert [branch is None for branch in left.branches] == [False, True]
    assert left.join == "add"
    assert left.exit.args[0] is left.branches[0].exit


def test_a_network_without_images_is_refused():
    with pytest.raises(UnsupportedError, match="no image-like input: a tensor of three or more axes"):
        tree_of(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4))


# --- against the definition -------------------------------------------------------------------------------------------

SOURCE = -1


def random_graph(generator, size):
    """Sources of each value: value 0 is the input, value k reads one to three earlier ones."""
    sources = [[SOURCE]]
    for value in range(1, size):
        near = list(range(max(0, value - generator.choice([1, 2, 3, size])), value))
        count = min(generator.choice([1, 1, 1, 2, 2, 3]), len(near))
        sources.append(generator.sample(near, count))
    return sources


def as_module(sources):
    graph = fx.Graph()
    nodes = []
    for value, read in enumerate(sources):
        operands = [nodes[source] for source in read if source != SOURCE]
        if not operands:
            node = graph.placeholder("x")
        elif len(operands) == 1:
            node = graph.call_function(torch.ops.aten.relu.default, (operands[0],))
        elif len(operands) == 2:
            node = graph.call_function(torch.ops.aten.add.Tensor, tuple(operands))
        else:
            node = graph.call_function(torch.ops.aten.cat.default, (operands, 1))
        node.meta[META] = {"id": f"v{value}", "shape": [1, 2, 4, 4], "dtype": "float32"}
        nodes.append(node)
    graph.output(tuple(node for node in nodes if not node.users))
    return fx.GraphModule(nn.Module(), graph), nodes


class Definition:
    """Single-entry single-exit regions by their definition; the sink is the last value."""

    def __init__(self, sources):
        self.sink = len(sources)
        read = {source for each in sources for source in each}
        self.sources = [*sources, [value for value in range(len(sources)) if value not in read]]
        self.readers = {value: [] for value in range(SOURCE, self.sink + 1)}
        for value, each in enumerate(self.sources):
            for source in each:
                self.readers[source].append(value)

    def region(self, entry, exit_):
        """R(entry, exit), None where that is no region."""
        pending, found = [exit_], {exit_}
        while pending:
            for source in self.sources[pending.pop()]:
                if source == SOURCE and entry != SOURCE:
                    return None
                if source not in (entry, SOURCE) and source not in found:
                    found.add(source)
                    pending.append(source)
        leaks = any(reader not in found for value in found - {exit_} for reader in self.readers[value])
        return None if leaks else frozenset(found)

    def is_fork(self, entry, region, exit_):
        """Whether each operand of the exit comes from a part of its own, or is the entry."""
        rest, parts = set(region) - {exit_}, []
        while rest:
            part, pending = set(), [rest.pop()]
            while pending:
                part.add(value := pending.pop())
                linked = rest & {*self.sources[value], *self.readers[value]}
                rest -= linked
                pending += linked
            parts.append(part)
        operands = self.sources[exit_]
        own = all(sum(operand in part for operand in operands) == 1 for part in parts)
        return len(operands) > 1 and own and len(operands) - (entry in operands) == len(parts)

    def largest_inside(self, entry, region, exit_):
        """The maximal regions of more than one value properly inside a region."""
        inner = [
            found
            for start in (entry, *region)
            for stop in region - {exit_, self.sink}
            if start < stop and (found := self.region(start, stop)) is not None and 1 < len(found) < len(region)
        ]
        return {found for found in inner if found <= region and not any(found < other for other in inner)}


class Checker:
    """Walks a tree and compares every part with the definition."""

    def __init__(self, sources):
        graph_module, nodes = as_module(sources)
        self.definition = Definition(sources)
        self.number = {node: value for value, node in enumerate(nodes)}
        self.seen = []
        self.kinds = Counter()
        tree = region_tree(graph_module)
        self.series(tree)
        assert sorted(self.seen) == list(range(len(sources)))

    def values(self, region):
        if isinstance(region, Op):
            return {self.number[region.exit]}
        if isinstance(region, Mesh):
            return {self.number[node] for node in region.nodes}
        if isinstance(region, Parallel):
            parts = [self.values(branch) for branch in region.branches if branch is not None]
            return {self.number[region.exit]}.union(*parts)
        return set().union(*map(self.values, region.children))

    def series(self, series):
        start = SOURCE if series.entry is None else self.number[series.entry]
        for child in series.children:
            stop = self.definition.sink if child.exit is None else self.number[child.exit]
            region = self.definition.region(start, stop)
            assert region is not None
            assert region - {self.definition.sink} == self.values(child)
            for cut in region - {stop}:
                halves = self.definition.region(start, cut), self.definition.region(cut, stop)
                assert None in halves or halves[0] | halves[1] != region, "a child could be split"
            self.kinds[type(child)] += 1
            self.child(child, start, stop, region)
            start = stop

    def child(self, child, start, stop, region):
        if isinstance(child, Mesh):
            assert stop == self.definition.sink or not self.definition.is_fork(start, region, stop)
            chains = [frozenset(self.values(chain)) for chain in child.children]
            assert set(chains) == self.definition.largest_inside(start, region, stop)
            assert sum(map(len, chains)) == len(frozenset().union(*chains))
            self.seen += self.values(child) - frozenset().union(*chains)
            for chain in child.children:
                self.series(chain)
            return
        self.seen.append(stop)
        if isinstance(child, Parallel):
            for branch, source in zip(child.branches, self.definition.sources[stop], strict=True):
                assert source == (start if branch is None else self.number[branch.exit])
                if branch is not None:
                    self.series(branch)


def check_random_graphs(count=400):
    generator = random.Random(0)  # noqa: S311 - test data
    kinds = Counter()
    for _ in range(count):
        kinds += Checker(random_graph(generator, generator.randint(1, 13))).kinds
    assert min(kinds[Op], kinds[Parallel], kinds[Mesh]) > 100


def test_trees_of_random_graphs_are_what_the_definition_says():
    check_random_graphs()


@pytest.mark.parametrize("method", ["_escapes", "_ancestors", "_components"])
def test_the_check_against_the_definition_can_fail(monkeypatch, method):
    wrong = {
        "_escapes": lambda *_: True,
        "_ancestors": lambda _self, region, _stop: set(region),
        "_components": lambda _self, members: [list(members)],
    }
    monkeypatch.setattr(regions._Values, method, wrong[method])
    with pytest.raises(AssertionError):
        check_random_graphs()


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 5, padding=2)

    def forward(self, x):
        return self.a(x) - self.b(x)


def test_a_difference_is_a_parallel_that_merges_with_its_sign_and_drops_only_what_is_subtracted():
    """As a Mesh it could have been bypassed into x - x."""
    torch.manual_seed(0)
    model = Difference().double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    gm = clone(fxmerge.capture(model, x))
    candidates = [site.candidate for site in enumerate_segments(gm).sites]
    dropped = [c for c in candidates if c.kind == "drop"]
    assert [c.bypassed for c in dropped] == [("b",)]
    (merge,) = [c for c in candidates if c.kind == "merge" and len(c.kept) == 2]
    merged = FoldPass()(RelaxPass([merge])(clone(gm)).graph_module.eval()).graph_module
    with torch.no_grad():
        expected = model(x)
        assert (merged(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert (merged(x) - (model.a(x) + model.b(x))).abs().max() > 0.1
        left = RelaxPass(dropped)(clone(gm)).graph_module
        assert torch.equal(left(x), model.a(x))
    assert sum(isinstance(module, nn.Conv2d) for module in merged.modules()) == 1
