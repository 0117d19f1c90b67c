"""What the recognise pass makes of formulas, and what it leaves alone."""

from __future__ import annotations

import copy
import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmerge
from fxmerge.checks import relative_error
from fxmerge.exporters import export_module, input_arrays, onnx_bytes
from fxmerge.graph import META, clone, module_of
from fxmerge.passes import RecognisePass
from fxmerge.passes.recognise import recognise

IMAGE = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6}


class Net(nn.Module):
    """A convolution, and what ``compute`` makes of its output."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            self.a.weight.mul_(8)  # the values reach all pieces of the activations
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.compute(self, self.a(x))


def build(compute, **modules):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(compute, **copy.deepcopy(modules)).double().eval()


def calls(gm):
    """The operations behind the convolution: class names of modules, names of functions."""
    nodes = [node for node in gm.graph.nodes if node.op in ("call_module", "call_function")][1:]
    return [
        type(module_of(gm, node)).__name__ if node.op == "call_module" else node.target.__name__.partition(".")[0]
        for node in nodes
    ]


def assert_equal(gm, model, image=IMAGE):
    """The graph computes what the model computes, in both modes and at another batch size; gradients too."""
    for dtype, limit in LIMITS.items():
        for training in (False, True):
            ours, theirs = clone(gm).to(dtype).train(training), copy.deepcopy(model).to(dtype).train(training)
            for batch in (image, image[:2]):
                x, y = (batch.to(dtype, copy=True).requires_grad_() for _ in range(2))
                found, expected = ours(x), theirs(y)
                assert relative_error([found], [expected]) <= limit
                for output in (found, expected):
                    output.square().sum().backward()
                # Even in float64 torch's derivative of Hardsigmoid takes 1 / 6 from float32.
                assert relative_error([x.grad], [y.grad]) <= 1e-6


def hard_swish_in_place(_, x):
    return torch.add(x, 3).clamp_(0, 6).div_(6).mul_(x)


def tanh_gelu(_, x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


FORMULAS = {
    "x * sigmoid(x)": (lambda _, x: x * torch.sigmoid(x), nn.SiLU),
    "sigmoid(x) * x": (lambda _, x: x.sigmoid().mul(x), nn.SiLU),
    "in place": (lambda _, x: x.mul_(x.sigmoid()), nn.SiLU),
    "sigmoid module": (lambda net, x: x * net.s(x), nn.SiLU),
    "relu6(x + 3) / 6": (lambda _, x: F.relu6(x + 3) / 6, nn.Hardsigmoid),
    "relu6(3 + x) * (1 / 6)": (lambda _, x: F.relu6(3 + x) * (1 / 6), nn.Hardsigmoid),
    "clamp(x / 6 + 0.5)": (lambda _, x: (x / 6 + 0.5).clamp(0, 1), nn.Hardsigmoid),
    "hardtanh(0.5 + x * (1 / 6))": (lambda _, x: F.hardtanh(0.5 + x * (1 / 6), 0.0, 1.0), nn.Hardsigmoid),
    "clamp((x + 3) / 6)": (lambda _, x: torch.clip((x - -3) / 6, 0, 1), nn.Hardsigmoid),
    "x * relu6(x + 3) / 6": (lambda _, x: x * F.relu6(x + 3) / 6, nn.Hardswish),
    "x * (relu6(x + 3) / 6)": (lambda _, x: x * (F.relu6(x + 3, inplace=True) / 6), nn.Hardswish),
    "x / 6 * relu6(x + 3)": (lambda _, x: x / 6 * F.relu6(x + 3), nn.Hardswish),
    "x * clamp(x + 3) / 6": (lambda _, x: (x + 3).clamp(0, 6) * x / 6, nn.Hardswish),
    "x * hardtanh(x + 3) / 6": (lambda _, x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6, nn.Hardswish),
    "x * hardsigmoid(x)": (lambda _, x: F.hardsigmoid(x) * x, nn.Hardswish),
    "x * clamp(x / 6 + 0.5)": (lambda _, x: x * (x / 6 + 0.5).clamp(0, 1), nn.Hardswish),
    "hard swish in place": (hard_swish_in_place, nn.Hardswish),
    "x * tanh(softplus(x))": (lambda _, x: x * torch.tanh(F.softplus(x)), nn.Mish),
    "0.5 * x * (1 + erf(...))": (lambda _, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), nn.GELU),
    "x * 0.5 * (1 + erf(...))": (lambda _, x: x * 0.5 * (1.0 + torch.erf(x * 0.5**0.5)), nn.GELU),
    "x * (erf(...) + 1) / 2": (lambda _, x: x * (torch.erf(x / 2**0.5) + 1) / 2, nn.GELU),
    "tanh gelu": (tanh_gelu, nn.GELU),
    "tanh gelu, x outside": (
        lambda _, x: 0.5 * x * (1 + torch.tanh(x * (2 / math.pi) ** 0.5 * (1 + 0.044715 * x * x))),
        nn.GELU,
    ),
    "tanh gelu, x * x * x": (
        lambda _, x: x * 0.5 * (torch.tanh((x * x * x * 0.044715 + x) * (2 / math.pi) ** 0.5) + 1),
        nn.GELU,
    ),
    "x - tanh(x)": (lambda _, x: x - torch.tanh(x), nn.Tanhshrink),
    "x / (1 + abs(x))": (lambda _, x: x / (1 + x.abs()), nn.Softsign),
    "tanhshrink": (lambda _, x: F.tanhshrink(x), nn.Tanhshrink),
    "softsign": (lambda _, x: F.softsign(x), nn.Softsign),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_becomes_its_module(name):
    compute, kind = FORMULAS[name]
    model = build(compute, s=nn.Sigmoid())
    gm = fxmerge.capture(model, IMAGE)
    assert calls(gm) == [kind.__name__]
    (found,) = [module for module in gm.modules() if isinstance(module, kind)]
    if kind is nn.GELU:
        assert found.approximate == ("tanh" if "tanh" in name else "none")
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert_equal(gm, model)


@pytest.mark.parametrize(("factor", "expected"), [(0.1666667, ["Hardsigmoid"]), (0.16667, ["ReLU6", "mul"])])
def test_constants_are_compared_up_to_a_millionth(factor, expected):
    model = build(lambda _, x: F.relu6(x + 3) * factor)
    gm = fxmerge.capture(model, IMAGE)
    assert calls(gm)[-len(expected) :] == expected
    assert relative_error([gm(IMAGE)], [model(IMAGE)]) <= 1e-6


def test_x_may_be_computed_and_read_elsewhere():
    def compute(_, x):
        y = x * 2
        return y * torch.sigmoid(y) + y

    gm = fxmerge.capture(build(compute), IMAGE)
    assert calls(gm) == ["mul", "SiLU", "add"]
    assert_equal(gm, build(compute))


def test_a_formula_of_a_value_computed_the_same_way_takes_the_nearest():
    compute = lambda _, x: F.relu6((x * 2) + 3) / 6  # noqa: E731
    gm = fxmerge.capture(build(compute), IMAGE)
    assert calls(gm) == ["mul", "Hardsigmoid"]
    assert_equal(gm, build(compute))


NO_FORMULAS = {
    "gate": lambda net, x: x * torch.sigmoid(net.b(x)),
    "gate of a relative": lambda _, x: x * torch.sigmoid(x * 2),
    "wrong constant": lambda _, x: x * F.relu6(x + 3) / 6.0001,
    "wrong shift": lambda _, x: F.relu6(x + 3.0001) / 6,
    "wrong bound": lambda _, x: (x + 3).clamp(0, 6.0001) / 6,
    "wrong gelu": lambda _, x: 0.5 * x * (1 + torch.erf(x / 1.4143)),
    "wrong power": lambda _, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**4))),
    "wrong sign": lambda _, x: torch.tanh(x) - x,
    "other softplus": lambda _, x: x * torch.tanh(F.softplus(x, 2.0)),
    "upside down": lambda _, x: torch.sigmoid(x) / x,
    "scaled sum": lambda _, x: torch.sub(x, torch.tanh(x), alpha=2),
    "over the channels": lambda _, x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "product twice": lambda _, x: x * x * torch.sigmoid(x),
}


@pytest.mark.parametrize("name", NO_FORMULAS)
def test_what_is_no_formula_stays(name):
    model = build(NO_FORMULAS[name], b=nn.Conv2d(8, 8, 1))
    known = {kind.__name__ for _, kind in FORMULAS.values()}
    gm = fxmerge.capture(model, IMAGE)
    assert not known & set(calls(gm))
    assert len(calls(gm)) > 1


def test_a_value_on_the_way_that_is_read_elsewhere_keeps_the_formula():
    def compute(_, x):
        gate = torch.sigmoid(x)
        return x * gate + gate

    model = build(compute)
    gm = fxmerge.capture(model, IMAGE)
    assert calls(gm) == ["Sigmoid", "mul", "add"]
    assert_equal(gm, model)


def test_an_opaque_value_keeps_the_formula():
    def compute(_, x):
        view = x.flatten(1)
        gate = torch.sigmoid(x)
        view.add_(1)
        return x * gate

    model = build(compute)
    gm = fxmerge.capture(model, IMAGE)
    assert "SiLU" not in calls(gm)
    assert relative_error([gm(IMAGE)], [model(IMAGE)]) <= 1e-12


# --- names ------------------------------------------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class HardSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu6 = nn.ReLU6()

    def forward(self, x):
        return x * self.relu6(x + 3) / 6


class Buffered(Swish):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x):
        return super().forward(x) + self.shift


def named(gm):
    return {str(node.target): node.meta[META]["id"] for node in gm.graph.nodes if node.op == "call_module"}


def test_names_follow_the_rule_of_the_canonicalise_pass():
    def compute(net, x):
        return net.hard(net.act(net.act(x))) * torch.tanh(F.softplus(x))

    gm = fxmerge.capture(build(compute, act=Swish(), hard=HardSwish()), IMAGE)
    assert list(named(gm)) == ["a", "act", "act_1", "hard.hardswish", "softplus", "tanh"]
    gm = fxmerge.capture(build(lambda net, x: net.gelu(0.5 * x * (1 + torch.erf(x / 2**0.5))), gelu=nn.ReLU()), IMAGE)
    assert named(gm) == {"a": "a", "gelu_2": "gelu_2", "gelu": "gelu"}
    assert set(dict(gm.named_modules())) == {"", "a", "gelu", "gelu_2"}


def test_ids_are_numbered_anew():
    gm = fxmerge.capture(build(lambda _, x: x * torch.sigmoid(x) * x * 2), IMAGE)
    assert [node.meta[META]["id"] for node in gm.graph.nodes] == ["x", "a", "silu", "mul", "mul#1", "output"]


def test_buffers_and_training_flags_stay_where_they_are():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Buffered()).double()
    model[1].eval()
    gm = fxmerge.capture(model, IMAGE)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert gm.get_buffer("1.shift") is model[1].shift
    assert isinstance(gm.get_submodule("1"), nn.SiLU)
    assert {name: module.training for name, module in gm.named_modules()} == {"": True, "0": True, "1": False}
    model[1]._non_persistent_buffers_set.add("shift")
    assert "1.shift" not in fxmerge.capture(model, IMAGE).state_dict()


def test_the_pass_says_what_it_did_and_a_second_run_changes_nothing(monkeypatch):
    model = build(lambda _, x: x * torch.sigmoid(x))
    with monkeypatch.context() as patch:
        patch.setattr("fxmerge.passes.recognise.recognise", lambda *_: False)
        gm = fxmerge.capture(model, IMAGE)
    assert calls(gm) == ["Sigmoid", "mul"]
    recognise_pass = RecognisePass(model)
    assert recognise_pass(gm).modified is True
    assert calls(gm) == ["SiLU"]
    before = [copy.deepcopy(node.meta[META]) for node in gm.graph.nodes]
    assert recognise_pass(gm).modified is False
    assert recognise(gm, model) is False
    assert [node.meta[META] for node in gm.graph.nodes] == before
    assert gm.graph.find_nodes(op="call_module", target="silu")[0].meta[META] == {
        "shape": [3, 8, 6, 6], "dtype": "float64", "id": "silu"
    }  # fmt: skip


# --- channel shuffle --------------------------------------------------------------------------------------------------


def by_view(_, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def by_reshape(_, x):
    n, c, h, w = x.shape
    return torch.transpose(x.reshape(n, 4, c // 4, h, w), 2, 1).clone().reshape(n, c, h, w)


def by_permute(_, x):
    _, c, h, w = x.shape
    return x.view(-1, 4, c // 4, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)


def of_a_slice(_, x):
    n, c, h, w = x[:, ::2].shape
    return x[:, ::2].reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


SHUFFLES = {"view": (by_view, 2), "reshape": (by_reshape, 4), "permute": (by_permute, 4), "slice": (of_a_slice, 2)}


@pytest.mark.parametrize("name", SHUFFLES)
def test_a_channel_shuffle_becomes_its_module(name):
    compute, groups = SHUFFLES[name]
    model = build(compute)
    gm = fxmerge.capture(model, IMAGE)
    assert calls(gm)[-1] == "ChannelShuffle"
    assert gm.get_submodule("channelshuffle").groups == groups
    assert not {"view", "reshape", "transpose", "permute", "sym_size"} & set(calls(gm))
    assert_equal(gm, model)


def test_torch_s_own_channel_shuffle_is_a_module():
    model = build(lambda net, x: F.channel_shuffle(net.shuffle(x), 4), shuffle=nn.ChannelShuffle(2))
    gm = fxmerge.capture(model, IMAGE)
    assert {name: gm.get_submodule(name).groups for name in ("shuffle", "channelshuffle")} == {
        "shuffle": 2, "channelshuffle": 4
    }  # fmt: skip
    assert_equal(gm, model)


def other_axes(_, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(2, 3).reshape(n, c, h, w)


def not_back(_, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c // 2, 2 * h, w)


def over_the_batch(_, x):
    n, c, h, w = x.shape
    return x.view(3, n, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


def read_between(_, x):
    n, c, h, w = x.shape
    parts = x.view(n, 2, c // 2, h, w).transpose(1, 2)
    return parts.reshape(n, c, h, w) * parts.mean()


@pytest.mark.parametrize("compute", [other_axes, not_back, read_between], ids=lambda f: f.__name__)
def test_what_is_no_channel_shuffle_stays(compute):
    gm = fxmerge.capture(build(compute), IMAGE)
    assert "ChannelShuffle" not in calls(gm)
    assert relative_error([gm(IMAGE[:2])], [build(compute)(IMAGE[:2])]) <= 1e-12


def other_axes_of_one_size(_, x):
    n, c, h, w = x.shape
    return x.view(n, 3, c // 3, h, w).transpose(3, 4).reshape(n, c, h, w)


@pytest.mark.parametrize("compute", [over_the_batch, other_axes_of_one_size], ids=lambda f: f.__name__)
def test_axes_as_large_as_the_groups_are_not_taken_for_them(compute):
    image = torch.randn(3, 9, 6, 6, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Conv2d(9, 9, 1), Applied(compute)).eval()
    gm = fxmerge.capture(model, image)
    for size in (3, 6) if gm.meta[META]["dynamic_batch"] else (3,):
        batch = image.repeat(2, 1, 1, 1)[:size]
        assert relative_error([gm(batch)], [model(batch)]) <= 1e-6


class Applied(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


# --- ONNX -------------------------------------------------------------------------------------------------------------

EXPORTED = {
    **{name: FORMULAS[name][0] for name in (
        "x * sigmoid(x)", "relu6(x + 3) / 6", "x * relu6(x + 3) / 6", "x * tanh(softplus(x))",
        "x * 0.5 * (1 + erf(...))", "tanh gelu", "tanhshrink", "softsign",
    )},
    "channel shuffle": by_view,
    "threshold": lambda _, x: F.threshold(x, 0.1, -2.0),
    "hardshrink": lambda _, x: F.hardshrink(x, 0.3),
    "softshrink": lambda _, x: F.softshrink(x, 0.3),
    "logsigmoid": lambda _, x: F.logsigmoid(x),
    "clamp(-1, 2)": lambda _, x: x.clamp(-1, 2),
    "clamp(0, 6)": lambda _, x: x.clamp(0, 6),
    "clamp(min=0)": lambda _, x: x.clamp(min=0),
    "instance norm": lambda _, x: F.instance_norm(x),
    "group norm": lambda _, x: F.group_norm(x, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_agrees(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(EXPORTED[name]).float()
    model.a.weight.data /= 3  # ONNX Runtime's sigmoid is 0 from -18 on, of which LogSigmoid takes the logarithm
    gm = clone(fxmerge.capture(model, IMAGE.float()))
    assert gm.graph.find_nodes(op="call_module")[-1].args[0].target == "a"
    data = onnx_bytes(gm, (IMAGE.float(),), {}, dynamic_batch=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, input_arrays(gm, (IMAGE[:2].float(),), {}))
    with torch.no_grad():
        expected = model(IMAGE[:2].float()).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_rrelu_is_exported_by_the_older_exporter_alone(tmp_path):
    """torch 2.13: the newer one has no rrelu."""
    pytest.importorskip("onnxruntime")
    gm = clone(fxmerge.capture(nn.Sequential(nn.Conv2d(8, 8, 3), nn.RReLU()).eval(), IMAGE.float()))
    with pytest.warns(UserWarning, match="older ONNX exporter"):
        export_module(gm, (IMAGE.float(),), {}, tmp_path / "net.onnx")


# --- splits -----------------------------------------------------------------------------------------------------------

SPLITS = {
    "chunk": (lambda x: x.chunk(3, 1), [(0, 3), (3, 6), (6, 8)]),
    "sizes": (lambda x: torch.split(x, [1, 5, 2], dim=1), [(0, 1), (1, 6), (6, 8)]),
    "size, from the end": (lambda x: x.split(4, dim=-3), [(0, 4), (4, 8)]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_a_split_are_slices(name):
    split, bounds = SPLITS[name]

    class Reversed(nn.Module):
        def forward(self, x):
            return torch.cat([part * k for k, part in enumerate(reversed(split(x)), 1)], 1)

    x = torch.randn(2, 8, 5, 4)
    gm = fxmerge.capture(Reversed(), x)
    assert torch.equal(gm(x), Reversed()(x))
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
    assert sorted(tuple(node.args[1:]) for node in found) == [(1, *pair) for pair in bounds]
    assert not gm.graph.find_nodes(op="call_function", target=operator.getitem)


@pytest.mark.parametrize("split", [lambda x: x.chunk(2, 0), lambda x: x.chunk(2, 2)], ids=["batch", "height"])
def test_other_splits_are_left_alone(split):
    class First(nn.Module):
        def forward(self, x):
            return split(x)[0]

    gm = fxmerge.capture(First(), torch.randn(4, 8, 6, 4))
    assert len(gm.graph.find_nodes(op="call_function", target=operator.getitem)) == 1
