"""A user's own activations: registering their classes, and the tags that capture gives their calls."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.checks import relative_error
from fxmerge.errors import UserError
from fxmerge.graph import META, clone, record_shapes
from fxmerge.removable import registered, unregister_removable
from fxmerge.serialize import load_graph, save_graph

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Snake(nn.Module):
    """An activation with a parameter, a buffer and a module in it."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("gain", torch.full((1,), 0.5))
        self.inner = nn.Sigmoid()

    def forward(self, x):
        return x + self.gain * torch.sin(self.alpha.exp() * x) ** 2 * self.inner(x)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Outer(nn.Module):
    def __init__(self, grows=False):
        super().__init__()
        self.act = Swish()
        self.grows = grows

    def forward(self, x):
        y = self.act(x) + 1
        return torch.cat([y, y], 1) if self.grows else y


class Applied(nn.Module):
    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


@pytest.fixture(autouse=True)
def _registry():
    before = registered()
    yield
    for kind in registered() - before:
        unregister_removable(kind)


def tags(gm):
    """The operations of every tag, in execution order."""
    found = {}
    for node in gm.graph.nodes:
        if "removable" in node.meta[META]:
            found.setdefault(node.meta[META]["removable"], []).append(node.meta[META]["id"])
    return found


def test_the_registry():
    assert fxmerge.register_removable(Snake) is Snake
    assert fxmerge.register_removable(Snake) is Snake
    assert registered() >= {Snake}
    unregister_removable(Snake)
    unregister_removable(Snake)
    assert Snake not in registered()

    @fxmerge.register_removable
    class Decorated(nn.Module):
        pass

    assert Decorated in registered()


@pytest.mark.parametrize(
    "wrong", [torch.relu, int, nn.ReLU(), "ReLU", None], ids=["function", "int", "module", "name", "nothing"]
)
def test_what_is_no_module_class_is_refused(wrong):
    with pytest.raises(UserError, match=r"cannot be registered: it is not a subclass of torch\.nn\.Module"):
        fxmerge.register_removable(wrong)
    assert wrong not in registered()


def test_every_call_has_its_tag():
    class Special(Snake):
        pass

    fxmerge.register_removable(Snake)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(act := Snake(), nn.Conv2d(4, 4, 1)), Special(), act, act)
    gm = fxmerge.capture(model.eval(), IMAGE)
    inside = ["exp", "mul", "sin", "pow", "mul#1", "mul#2", "add"]
    names = [f"1.0/{name}" for name in inside]
    assert tags(gm) == {
        "1.0": [*names[:5], "1.0.inner", *names[5:]],
        "2": ["2/exp", "2/mul", "2/sin", "2/pow", "2/mul#1", "2.inner", "2/mul#2", "2/add"],
        "1.0#1": ["3/exp", "3/mul", "3/sin", "3/pow", "3/mul#1", "3.inner", "3/mul#2", "3/add"],
        "1.0#2": ["4/exp", "4/mul", "4/sin", "4/pow", "4/mul#1", "4.inner", "4/mul#2", "4/add"],
    }
    assert relative_error([gm(IMAGE)], [model(IMAGE)]) <= 1e-6


def test_a_module_called_twice_under_one_name():
    fxmerge.register_removable(Swish)
    model = Applied(lambda net, x: net.act(net.a(net.act(x))), a=nn.Conv2d(4, 4, 1), act=Swish())
    gm = fxmerge.capture(model, IMAGE)
    assert tags(gm) == {"act": ["act"], "act#1": ["act_1"]}
    assert [type(gm.get_submodule(name)) for name in ("act", "act_1")] == [nn.SiLU, nn.SiLU]


def test_nothing_is_tagged_without_registering():
    assert tags(fxmerge.capture(nn.Sequential(nn.Conv2d(4, 4, 1), Snake()), IMAGE)) == {}


def test_a_formula_across_the_edge_of_a_call_stays():
    class Gate(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x)

    model = Applied(lambda net, x: x * net.gate(x), gate=Gate())
    assert "silu" in {node.target for node in fxmerge.capture(model, IMAGE).graph.nodes}
    fxmerge.register_removable(Gate)
    gm = fxmerge.capture(model, IMAGE)
    assert tags(gm) == {"gate": ["gate"]}
    assert isinstance(gm.get_submodule("gate"), nn.Sigmoid)


def test_the_outer_of_two_registered_modules_has_the_operations_if_it_is_removable():
    fxmerge.register_removable(Swish)
    fxmerge.register_removable(Outer)
    gm = fxmerge.capture(nn.Sequential(Outer()), IMAGE)
    assert tags(gm) == {"0": ["0.act", "0/add"]}
    with pytest.warns(UserWarning, match=r"'0' \(Outer\).* it makes \[2, 8, 6, 6\] of the shape \[2, 4, 6, 6\]"):
        gm = fxmerge.capture(nn.Sequential(Outer(grows=True)), IMAGE)
    assert tags(gm) == {"0.act": ["0.act"]}


def two_values(_, x, y):
    return x * torch.sigmoid(y)


def written(_, x, __):
    view = x.view(-1)
    x.mul_(2)
    return x * view.sum()


NOT_REMOVABLE = {
    "two inputs": (two_values, r"it reads 2 tensors besides its parameters and buffers, not one"),
    "no input": (lambda net, *_: net.alpha * 2, r"it reads 0 tensors"),
    "two results": (lambda _, x, __: (x.sin(), x.cos()), r"2 of its tensors are used outside, not one"),
    "another shape": (lambda _, x, __: x.mean(1, keepdim=True), r"it makes \[2, 1, 6, 6\] of the shape \[2, 4, 6, 6\]"),
    "another type": (lambda _, x, __: x.sin().double(), r"it makes float64 of float32"),
    "in place": (written, r"its values are written in place where that can be seen"),
}


@pytest.mark.parametrize("name", NOT_REMOVABLE)
def test_a_call_that_is_not_removable_is_named_with_the_reason(name):
    compute, reason = NOT_REMOVABLE[name]

    class Odd(Applied):
        pass

    fxmerge.register_removable(Odd)
    odd = Odd(compute)
    odd.alpha = nn.Parameter(torch.ones(2, 4, 6, 6))
    model = Applied(lambda net, x: net.odd(net.a(x), net.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), odd=odd)
    with pytest.warns(UserWarning, match=rf"'odd' \(Odd\) is registered as removable, but ({reason}).*stays as it is"):
        gm = fxmerge.capture(model, IMAGE)
    assert tags(gm) == {}


def test_a_size_that_is_read_outside_does_not_count():
    class Odd(nn.Module):
        def forward(self, x):
            self.size = x.shape[0]
            return x.sin().view(self.size, -1).view(x.shape)

    fxmerge.register_removable(Odd)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Odd())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxmerge.capture(model, IMAGE)
    assert tags(gm) == {"1": ["1/sin", "1/view", "1/view#1"]}


def test_tags_are_saved_copied_and_kept(tmp_path):
    fxmerge.register_removable(Snake)
    gm = fxmerge.capture(nn.Sequential(nn.Conv2d(4, 4, 1), Snake(), Swish()), IMAGE)
    expected = tags(gm)
    assert list(expected) == ["1"]
    save_graph(gm, tmp_path / "net")
    assert tags(load_graph(tmp_path / "net")) == expected
    copied = clone(gm)
    record_shapes(copied)
    assert tags(copied) == expected
