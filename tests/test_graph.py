"""Reading, copying and re-recording canonical graphs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxmerge
from fxmerge.errors import PlanError
from fxmerge.graph import (
    META,
    between,
    by_id,
    clone,
    convolutions,
    device_of,
    dtype_of,
    graph_meta,
    is_convolution,
    is_tensor,
    module_of,
    node_id,
    record_shapes,
    refuse_other_structure,
    shape_of,
    shared_targets,
    structure,
    sweep,
)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Residual(nn.Module):
    def __init__(self, width=4, kernel=3, hidden=4):
        super().__init__()
        self.a = conv(width, hidden, kernel)
        self.norm = nn.BatchNorm2d(hidden)
        self.b = conv(hidden, width)
        self.register_buffer("passing", torch.ones(1), persistent=False)

    def forward(self, x, time=None):
        y = torch.relu(self.norm(self.a(x)))
        y = y if time is None else y + time[:, :, None, None]
        return x + self.b(y) * self.passing


IMAGE = torch.zeros(2, 4, 8, 8)


@pytest.fixture
def captured():
    return fxmerge.capture(Residual(), IMAGE)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_names_shapes_and_modules(captured):
    nodes = by_id(captured)
    assert list(nodes) == ["passing", "x", "a", "norm", "relu", "b", "mul", "add", "output"]
    assert [shape_of(nodes[name]) for name in ("passing", "x", "relu")] == [(1,), (2, 4, 8, 8), (2, 4, 8, 8)]
    assert nodes["x"].meta[META] == {"shape": [2, 4, 8, 8], "dtype": "float32", "id": "x"}
    assert not is_tensor(nodes["output"])
    assert type(module_of(captured, nodes["norm"])) is nn.BatchNorm2d
    assert module_of(captured, nodes["add"]) is None
    assert [node_id(node) for node, _ in convolutions(captured)] == ["a", "b"]
    assert is_convolution(captured, nodes["a"])
    assert not is_convolution(captured, nodes["add"])


def test_repeated_operations_are_numbered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = conv(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.a(self.act(self.a(x)))) + x + x

    captured = fxmerge.capture(Twice(), IMAGE)
    assert list(by_id(captured)) == ["x", "a", "act", "a#1", "act_1", "add", "add#1", "output"]


def names_between(captured, entry, exit_):
    nodes = by_id(captured)
    return {node_id(node) for node in between(nodes[entry], nodes[exit_])}


def test_between_leaves_out_parameters_and_the_entry(captured):
    assert names_between(captured, "x", "add") == {"a", "norm", "relu", "b", "mul", "add"}
    assert names_between(captured, "relu", "mul") == {"b", "mul"}
    assert names_between(captured, "relu", "b") == {"b"}


def test_between_is_empty_where_the_exit_does_not_depend_on_the_entry(captured):
    assert names_between(captured, "b", "relu") == set()


def test_between_leaves_out_side_inputs_and_sizes():
    def forward(self, x, time):
        y = self.a(x) + torch.relu(time)[:, :, None, None]
        return self.b(y.view(x.shape[0], 4, -1, 8))

    kind = type("Side", (Residual,), {"forward": forward})
    captured = fxmerge.capture(kind(), (IMAGE, torch.zeros(2, 4)))
    assert names_between(captured, "x", "b") == {"a", "add", "view", "b"}


def test_shared_targets():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.left, self.right, self.read, self.alone = (conv(4, 4) for _ in range(5))
            self.right.weight = self.left.weight

        def forward(self, x):
            y = self.alone(self.right(self.left(self.twice(self.twice(x)))))
            return self.read(y) * self.read.bias.sum()

    assert shared_targets(fxmerge.capture(Shared(), IMAGE)) == {"twice", "left", "right", "read"}


def test_device_and_dtype(captured):
    assert device_of(captured) == torch.device("cpu")
    assert dtype_of(captured) == torch.float32
    assert dtype_of(fxmerge.capture(Residual().double(), IMAGE.double())) == torch.float64
    bare = nn.ReLU()
    assert (device_of(bare), dtype_of(bare)) == (torch.device("cpu"), torch.float32)


# --- structure --------------------------------------------------------------------------------------------------------


def test_structure_does_not_depend_on_weights_or_batch(captured):
    expected = structure(captured)
    assert len(expected) == 7
    assert structure(fxmerge.capture(Residual(), torch.zeros(5, 4, 8, 8))) == expected
    refuse_other_structure(expected, fxmerge.capture(Residual(), IMAGE))


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        (Residual(kernel=5), IMAGE, "operation 'a' differs in its options, shape or inputs"),
        (Residual(hidden=6), IMAGE, "operation 'a' differs"),
        (Residual(), torch.zeros(2, 4, 9, 9), "operation 'x' differs"),
        (nn.Sequential(conv(4, 4)), IMAGE, "it has 'input' where the plan's network has 'x'"),
    ],
)
def test_another_structure_is_refused(captured, model, image, message):
    other = fxmerge.capture(model, image)
    with pytest.raises(PlanError, match=message):
        refuse_other_structure(structure(captured), other)


def test_a_longer_structure_is_refused(captured):
    with pytest.raises(PlanError, match="it has 7 operations, the plan's network 6"):
        refuse_other_structure(structure(captured)[:-1], captured)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied_by", [clone, copy.deepcopy])
def test_a_copy_shares_nothing(captured, copied_by):
    captured.b.weight = captured.a.weight
    graph_meta(captured)["note"] = ["plain"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copied_by(captured)
        again = copied_by(copied)
    for one in (copied, again):
        assert type(one).__name__ == type(captured).__name__ == "Residual"
        assert list(one.state_dict()) == list(captured.state_dict())
        assert "passing" in dict(one.named_buffers())
        assert one.a.weight is one.b.weight
        assert one.meta[META] == captured.meta[META]
        assert one.meta[META]["note"] is not captured.meta[META]["note"]
        assert torch.equal(one(IMAGE + 1), captured(IMAGE + 1))
        ours = {id(tensor) for tensor in (*captured.parameters(), *captured.buffers())}
        assert ours.isdisjoint(id(tensor) for tensor in (*one.parameters(), *one.buffers()))
        assert {id(module) for module in captured.modules()}.isdisjoint(id(module) for module in one.modules())
        for node, original in zip(one.graph.nodes, captured.graph.nodes, strict=True):
            assert node.meta[META] == original.meta[META]
            assert node.meta[META] is not original.meta[META]
            assert node.meta[META].get("shape") is not original.meta[META].get("shape", ())
    with torch.no_grad():
        copied.a.weight.mul_(2)
    copied.graph.find_nodes(op="placeholder")[0].meta[META]["shape"][0] = 7
    assert shape_of(by_id(captured)["x"]) == shape_of(by_id(again)["x"]) == (2, 4, 8, 8)
    assert torch.equal(again.a.weight, captured.a.weight)


def test_torch_s_own_copy_would_fail_that():
    captured = fxmerge.capture(Residual(), IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = fx.GraphModule.__deepcopy__(captured, {})
    first, second = next(iter(copied.graph.nodes)), next(iter(captured.graph.nodes))
    assert first.meta[META] is second.meta[META]
    assert "passing" in copied.state_dict()


def test_a_copy_of_a_plain_graph_module():
    traced = fx.symbolic_trace(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)))
    assert torch.equal(clone(traced).eval()(IMAGE + 1), traced.eval()(IMAGE + 1))


def test_a_copy_may_share_parameters_but_no_buffers(captured):
    copied = clone(captured, share_parameters=True)
    theirs = dict(captured.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in copied.named_parameters())
    copied.train()(IMAGE + torch.randn(IMAGE.shape))
    assert int(copied.norm.num_batches_tracked) == 1
    assert int(captured.norm.num_batches_tracked) == 0
    assert not captured.norm.running_mean.any()


class Own(nn.Module):
    """A module that is none of torch's, with state that only deepcopy can copy."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.settings = {"scale": [2.0]}

    def forward(self, x):
        return self.settings["scale"][0] * self.inner(x)


class Tied(nn.Module):
    """A buffer under two names, and a module that is also called by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.second.running_mean = self.first.running_mean
        self.own = Own()
        self.again = self.own.inner

    def forward(self, x):
        return self.again(self.own(self.second(self.first(x))))


class LeavesOwn(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Own) or super().is_leaf_module(m, module_qualified_name)


def test_a_copy_that_shares_parameters_is_a_network_of_its_own():
    model = Tied()
    traced = fx.GraphModule(model, LeavesOwn().trace(model))
    copied = clone(traced, share_parameters=True)
    assert copied.first.running_mean is copied.second.running_mean
    assert copied.first.running_mean is not traced.first.running_mean
    assert torch.equal(copied.eval()(IMAGE + 1), traced.eval()(IMAGE + 1))
    copied.own.settings["scale"][0] = 3.0
    copied.own.inner.padding = (1, 1)
    copied.own.inner.register_forward_hook(lambda *_: None)
    copied.first.register_buffer("more", torch.zeros(1))
    copied.second.bias = nn.Parameter(torch.ones(4))
    assert traced.own.settings == {"scale": [2.0]}
    assert traced.own.inner.padding == (0, 0)
    assert not traced.own.inner._forward_hooks
    assert "more" not in dict(traced.first.named_buffers())
    assert not traced.second.bias.any()


# --- editing ----------------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Operations of many kinds, so that every way to a shape is taken."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 0), (1, 2), groups=2), nn.BatchNorm2d(6), nn.ReLU6(), nn.PReLU(6),
            nn.Dropout(0.5), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 4, padding="same"), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.ConvTranspose2d(6, 4, 2, 2), nn.AvgPool2d(2), nn.Upsample(scale_factor=3.0),
        )  # fmt: skip
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale=2):
        y = F.pad(self.layers(x), (1, -1, 0, 2))
        left, right = y.chunk(2, 1)
        y = torch.cat([left * scale, right[:, :1] + left], 1).flatten(2).mean(-1)
        return {"scores": self.linear(y), "size": (y > 0).sum()}


def true_shapes(captured, *inputs):
    shapes = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                shapes[node_id(n)] = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            return value

    with torch.no_grad():
        Interpreter(captured).run(*inputs, enable_io_processing=False)
    return shapes


def recorded(captured):
    return {
        node_id(node): (shape_of(node), node.meta[META]["dtype"]) for node in captured.graph.nodes if is_tensor(node)
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_shapes_are_recorded_as_they_are():
    captured = fxmerge.capture(Zoo(), (torch.zeros(2, 4, 20, 20), 3))
    expected = true_shapes(captured, torch.zeros(2, 4, 20, 20), 3)
    assert recorded(captured) == expected
    state = {name: tensor.clone() for name, tensor in captured.state_dict().items()}
    for node in captured.graph.nodes:
        if is_tensor(node) and node.op != "placeholder":
            node.meta[META]["shape"], node.meta[META]["dtype"] = [0], "int8"
    assert recorded(captured) != expected
    captured.train()
    record_shapes(captured)
    assert recorded(captured) == expected
    assert all(torch.equal(tensor, state[name]) for name, tensor in captured.state_dict().items())


def test_shapes_follow_an_edit(captured):
    captured.a.padding = (2, 2)
    with captured.graph.inserting_after(by_id(captured)["b"]):
        crop = captured.graph.call_function(F.pad, (by_id(captured)["b"], [-1, -1, -1, -1]))
    by_id(captured)["b"].replace_all_uses_with(crop, delete_user_cb=lambda user: user is not crop)
    crop.meta[META] = {"id": "crop"}
    captured.recompile()
    record_shapes(captured)
    nodes = by_id(captured)
    assert shape_of(nodes["relu"]) == shape_of(nodes["b"]) == (2, 4, 10, 10)
    assert shape_of(nodes["crop"]) == (2, 4, 8, 8)
    assert recorded(captured) == true_shapes(captured, IMAGE)


def test_a_sweep_takes_what_nothing_reads():
    captured = fxmerge.capture(Residual(), IMAGE)
    nodes = by_id(captured)
    nodes["add"].replace_all_uses_with(nodes["relu"])
    sweep(captured)
    assert list(by_id(captured)) == ["x", "a", "norm", "relu", "output"]
    assert "b" not in dict(captured.named_children())
    assert torch.equal(captured.eval()(IMAGE), torch.relu(captured.norm(captured.a(IMAGE))))


def test_a_sweep_leaves_what_has_an_effect():
    class Writes(nn.Module):
        def forward(self, x, k):
            x += 1
            return torch.relu(x * 2) * k

    captured = fxmerge.capture(Writes(), (IMAGE, 2))
    nodes = by_id(captured)
    nodes["mul"].replace_all_uses_with(nodes["x"])
    nodes["mul#1"].replace_all_uses_with(nodes["x"])
    sweep(captured)
    assert list(by_id(captured)) == ["x", "k", "eq", "_assert", "add_", "output"]
    value = IMAGE.clone()
    captured(value, 2)
    assert torch.equal(value, IMAGE + 1)
    with pytest.raises(AssertionError, match="'k' was 2"):
        captured(value, 3)
