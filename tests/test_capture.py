"""A capture computes what the model computes, in eval and in train mode, and leaves the model as it was."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.errors import CaptureError, UserError
from fxmerge.graph import clone
from fxmerge.inputs import map_tensors, split_example, with_batch
from fxmerge.passes import _in_place

ALLOWED = 1e-10


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


class Net(nn.Module):
    """Modules by name, and what ``forward`` does with them."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.compute(self, x)


def net(compute, **modules):
    """A factory of nets of fresh copies of the modules."""
    return lambda: Net(compute, **copy.deepcopy(modules))


def images(batch=2, channels=3, size=8, seed=0):
    shape = (batch, channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(factory):
    """A model in float64 with seeded weights, and batch norms whose statistics are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory().double()
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def run(model, example, seed=1):
    """Outputs, and the inputs as the model left them."""
    args, kwargs = map_tensors(torch.clone, *split_example(example))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = model(*args, **kwargs)
    return outputs, args, kwargs


def largest_difference(model, captured, example):
    """Over outputs, written inputs, and the state after a step, in eval and train mode."""
    differences = [0.0]
    for training in (False, True):
        ours, theirs = clone(captured).train(training), copy.deepcopy(model).train(training)
        found, spec = pytree.tree_flatten(run(ours, example))
        expected, expected_spec = pytree.tree_flatten(run(theirs, example))
        assert spec == expected_spec
        after = theirs.state_dict()
        found += ours.state_dict().values()
        expected += [after[name] for name in ours.state_dict()]
        for a, b in zip(found, expected, strict=True):
            if isinstance(b, torch.Tensor):
                assert a.shape == b.shape
                differences.append(float((a.detach().double() - b.detach().double()).abs().max()))
    return max(differences)


def calls(captured):
    """Module classes and operators of the graph in execution order, parameters and sizes left out."""
    found = []
    for node in captured.graph.nodes:
        if node.op == "call_module":
            found.append(type(captured.get_submodule(node.target)).__name__)
        elif node.op == "call_function" and "sym_size" not in str(node.target):
            found.append(getattr(node.target, "__name__", str(node.target)).partition(".")[0])
    return found


def opaque(captured):
    return [node.name for node in captured.graph.nodes if node.meta["fxmerge"].get("opaque")]


# --- numbers ----------------------------------------------------------------------------------------------------------


def read_later(net, x):
    a = net.a(x)
    return torch.relu_(a) + net.b(a)


def view_read_after(net, x):
    a = net.a(x)
    view = a.view(a.shape[0], -1)
    torch.relu_(a)
    return net.b(a).flatten(1) + view


def write_through_view(net, x):
    a = net.a(x)
    a[:, :1].mul_(3)
    return net.b(a)


def add_in_place(net, x):
    a = net.a(x)
    a += x
    a *= 2
    return net.b(a)


def write_input(net, x):
    x += 1
    return net.b(net.a(x)) + x


def norm_written_in_place(net, x):
    a = net.norm(net.a(x))
    view = a.view(a.shape[0], -1)
    torch.relu_(a)
    return net.b(a).flatten(1) + view


def dropout_written_in_place(net, x):
    a = net.a(x)
    dropped = F.dropout(a, 0.5, net.training)
    dropped.add_(1)
    return net.b(dropped) + a


PAIR = {"a": conv(3, 3), "b": conv(3, 3)}
ACTIVATIONS = [
    nn.ReLU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.GELU("tanh"),
    nn.GELU(), nn.LeakyReLU(0.2), nn.ELU(0.5), nn.CELU(0.7), nn.SELU(), nn.Softplus(2, 10), nn.Hardtanh(-2, 0.5),
    nn.LogSigmoid(),
]  # fmt: skip
IN_PLACE = [
    nn.ReLU(True), nn.SiLU(True), nn.Mish(True), nn.Hardswish(True), nn.LeakyReLU(0.3, True), nn.ELU(0.5, True),
    nn.CELU(0.7, True), nn.SELU(True), nn.Hardtanh(-1, 2, True),
]  # fmt: skip


class TwoDilations(nn.Module):
    """One weight, two convolutions of different geometry."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        near = F.conv2d(x, self.weight, self.bias, padding=1)
        return near + F.conv2d(x, self.weight, self.bias, padding=2, dilation=2)


class MaskedConv(nn.Conv2d):
    """A convolution with a Parameter and buffers of its own."""

    def __init__(self):
        super().__init__(3, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(1))
        self.register_buffer("mask", torch.randn(1, 3, 1, 1))
        self.register_buffer("passing", torch.randn(1, 3, 1, 1), persistent=False)
        self.plain = torch.full((3, 1, 1), 2.0, dtype=torch.float64)

    def forward(self, x):
        return super().forward(x * self.mask * self.passing) * self.gain * self.plain


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def aliased_parameter():
    model = net(lambda net, x: net.b(net.a(x)), **PAIR)()
    model.b.weight = model.a.weight
    return model


def aliased_module():
    model = net(lambda net, x: net.b(torch.relu(net.a(x))), a=conv(3, 3))()
    model.b = model.a
    return model


def sequential(*modules):
    return lambda: nn.Sequential(*copy.deepcopy(modules))


CASES = {
    "conv, bn, act, pool, dropout, linear": (
        sequential(
            conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 5)
        ),
        ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout", "flatten", "Linear"],
    ),
    "pools": (
        sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)),
        ["MaxPool2d", "AvgPool2d"],
    ),
    "functional pools": (
        net(lambda net, x: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(net.a(x), 2), 2), 1), a=conv(3, 4)),
        ["Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"],
    ),
    "batch norm without affine": (
        sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False)),
        ["Conv2d", "BatchNorm2d"],
    ),
    "batch norm without statistics": (
        sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False)),
        ["Conv2d", "BatchNorm2d"],
    ),
    "cumulative batch norm": (
        sequential(conv(3, 4), nn.BatchNorm2d(4, momentum=None)),
        ["Conv2d", "BatchNorm2d"],
    ),
    "batch norm with eps and momentum": (
        sequential(conv(3, 4), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)),
        ["Conv2d", "BatchNorm2d"],
    ),
    "batch norm of vectors": (
        sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6)),
        ["flatten", "Linear", "BatchNorm1d"],
    ),
    "other norms": (
        sequential(nn.GroupNorm(1, 3, eps=1e-3), nn.LayerNorm([8, 8], bias=False), nn.InstanceNorm2d(3)),
        ["GroupNorm", "LayerNorm", "InstanceNorm2d"],
    ),
    "padding same, even kernel": (
        sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.Conv2d(4, 4, 3, padding="valid", groups=2)),
        ["Conv2d", "Conv2d"],
    ),
    "padding reflect": (
        sequential(conv(3, 4, padding_mode="reflect"), nn.PReLU(4)),
        ["pad", "Conv2d", "PReLU"],
    ),
    "activations": (
        sequential(conv(3, 3), *ACTIVATIONS),
        ["Conv2d", *(type(activation).__name__ for activation in ACTIVATIONS)],
    ),
    "activations in place": (
        sequential(conv(3, 3), *IN_PLACE),
        ["Conv2d", *(type(activation).__name__ for activation in IN_PLACE)],
    ),
    "functional activations": (
        net(lambda net, x: F.elu(F.gelu(F.relu(net.a(x)), approximate="tanh"), 0.3) * torch.sigmoid(x), a=conv(3, 3)),
        ["Conv2d", "ReLU", "GELU", "ELU", "Sigmoid", "mul"],
    ),
    "functional dropouts": (
        net(lambda net, x: F.dropout2d(F.dropout(net.a(x), 0.5, net.training), 0.2, net.training), a=conv(3, 3)),
        ["Conv2d", "Dropout", "Dropout2d"],
    ),
    "dropout that is always on": (
        net(lambda net, x: F.dropout(net.a(x), 0.5, True), a=conv(3, 3)),
        ["Conv2d", "dropout"],
    ),
    "dropout modules": (
        sequential(nn.Dropout1d(0.5), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2)),
        ["Dropout1d", "AlphaDropout", "FeatureAlphaDropout"],
    ),
    "in place, read later": (net(read_later, **PAIR), ["Conv2d", "ReLU", "Conv2d", "add"]),
    "in place, added": (net(add_in_place, **PAIR), ["Conv2d", "add", "mul", "Conv2d"]),
    "in place, view read after": (
        net(view_read_after, **PAIR),
        ["Conv2d", "view", "relu_", "Conv2d", "flatten", "add"],
    ),
    "in place, through a view": (net(write_through_view, **PAIR), None),
    "in place, behind a batch norm": (net(norm_written_in_place, **PAIR, norm=nn.BatchNorm2d(3)), None),
    "in place, behind a dropout": (
        net(dropout_written_in_place, **PAIR),
        ["Conv2d", "Dropout", "add_", "Conv2d", "add"],
    ),
    "in place, on the input": (net(write_input, **PAIR), ["add_", "Conv2d", "Conv2d", "add"]),
    "shared module": (
        net(lambda net, x: net.a(torch.relu(net.a(x))), a=conv(3, 3)),
        ["Conv2d", "ReLU", "Conv2d"],
    ),
    "activation called twice": (
        net(lambda net, x: net.act(net.b(net.act(net.a(x)))), **PAIR, act=nn.ReLU()),
        ["Conv2d", "ReLU", "Conv2d", "ReLU"],
    ),
    "aliased parameter": (aliased_parameter, ["Conv2d", "Conv2d"]),
    "aliased module": (aliased_module, ["Conv2d", "ReLU", "Conv2d"]),
    "one weight, two geometries": (
        lambda: nn.Sequential(TwoDilations(), nn.ReLU()),
        ["Conv2d", "conv2d", "add", "ReLU"],
    ),
    "convolution with more of its own": (
        lambda: nn.Sequential(MaskedConv()),
        ["mul", "mul", "Conv2d", "mul", "mul"],
    ),
    "computed weight": (
        lambda: nn.Sequential(StandardisedConv(3, 3, 3), nn.ReLU()),
        ["mean", "sub", "conv2d", "ReLU"],
    ),
    "transposed": (
        sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU()),
        ["conv_transpose2d", "ReLU"],
    ),
    "outputs in a dict": (
        net(lambda net, x: {"u": net.a(x), "v": (net.b(x), [x.mean(dim=1)])}, **PAIR),
        ["Conv2d", "Conv2d", "mean"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CASES)
def test_capture_computes_what_the_model_computes_with_its_own_state(name):
    factory, expected = CASES[name]
    model = build(factory)
    example = images(channels=3) if name != "dropout modules" else images()[:, 0]
    captured = fxmerge.capture(model, example)
    if expected is not None:
        assert calls(captured) == expected
    for batch in (2, 1, 3):
        if batch == 1 and "batch norm of vectors" in name:
            continue  # one value per channel has no statistics in train mode
        assert largest_difference(model, captured, with_batch((example,), {}, batch)[0]) <= ALLOWED
    assert captured.meta["fxmerge"]["dynamic_batch"] is True

    assert set(captured.state_dict()) == set(model.state_dict())
    for pairs in ("named_parameters", "named_buffers"):
        ours = dict(getattr(captured, pairs)(remove_duplicate=False))
        theirs = dict(getattr(model, pairs)(remove_duplicate=False))
        assert ours.keys() - theirs.keys() <= {"0.plain"}  # a constant
        assert all(tensor is theirs.get(name, tensor) for name, tensor in ours.items())


def edit_weight(captured):
    captured.get_submodule("0").weight.data.view(-1)[5] += 1e-6


def edit_momentum(captured):
    captured.get_submodule("1").momentum = 0.11


def edit_dropout(captured):
    captured.get_submodule("4").p = 0.31


def edit_activation(captured):
    captured.add_submodule("2", nn.LeakyReLU(1e-6))


@pytest.mark.parametrize("edit", [edit_weight, edit_momentum, edit_dropout, edit_activation])
def test_the_comparison_catches(edit):
    model = build(CASES["conv, bn, act, pool, dropout, linear"][0])
    captured = clone(fxmerge.capture(model, images()))
    edit(captured)
    assert largest_difference(model, captured, images()) > 1e-8


def test_renaming_an_in_place_operator_whose_view_is_read_would_be_noticed(monkeypatch):
    monkeypatch.setattr(_in_place, "_unseen", lambda *_: True)
    model = build(CASES["in place, view read after"][0])
    captured = fxmerge.capture(model, images())
    assert not opaque(captured)
    assert largest_difference(model, captured, images()) > 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("in place, read later", 0),
        ("in place, added", 0),
        ("activations in place", 0),
        ("in place, view read after", 3),
        ("in place, on the input", 2),
        ("in place, behind a dropout", 3),
    ],
)
def test_what_is_written_in_place_is_opaque_where_it_could_be_seen(name, expected):
    assert len(opaque(fxmerge.capture(build(CASES[name][0]), images()))) == expected


# --- inputs -----------------------------------------------------------------------------------------------------------


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 3), conv(3, 3)

    def forward(self, x, y=None, *, scale=1, mask=None, flag=False):
        y = x if y is None else y
        y = y["deep"][0] if isinstance(y, dict) else y
        out = self.a(x) * scale + self.b(y)
        return out if mask is None or flag else out * mask


@pytest.mark.parametrize(
    "example",
    [
        images(),
        (images(), images(seed=1)),
        (images(), {"deep": [images(seed=1)]}),
        {"x": images(), "y": images(seed=1)},
        {"x": images(), "scale": 2, "mask": images(seed=2)},
        {"y": images(seed=1), "x": images(), "flag": True, "scale": 0.5},
    ],
    ids=lambda example: type(example).__name__,
)
def test_positional_and_keyword_inputs(example):
    model = build(Inputs)
    captured = fxmerge.capture(model, example)
    assert captured.meta["fxmerge"]["dynamic_batch"] is True
    for batch in (2, 3):
        args, kwargs = with_batch(*split_example(example), batch)
        assert largest_difference(model, captured, args or kwargs) <= ALLOWED


def test_varargs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv(3, 3)

        def forward(self, *values):
            return self.a(values[0]) + values[1]

    model = build(Sum)
    captured = fxmerge.capture(model, (images(), images(seed=1)))
    assert captured.meta["fxmerge"]["dynamic_batch"] is True
    assert largest_difference(model, captured, (images(3), images(3, seed=1))) <= ALLOWED


def test_an_example_of_one_image_leaves_the_batch_free():
    model = build(CASES["conv, bn, act, pool, dropout, linear"][0])
    captured = fxmerge.capture(model, images(1))
    assert captured.meta["fxmerge"]["dynamic_batch"] is True
    assert largest_difference(model, captured, images(5)) <= ALLOWED


def test_a_fixed_batch_is_captured_as_such():
    model = build(net(lambda net, x: net.a(x).reshape(2, 3, 64), a=conv(3, 3)))
    captured = fxmerge.capture(model, images())
    assert captured.meta["fxmerge"]["dynamic_batch"] is False
    assert largest_difference(model, captured, images(seed=3)) <= ALLOWED


@pytest.mark.parametrize(
    ("change", "name"), [({"scale": 3}, "scale"), ({"flag": True}, "flag"), ({"mask": images()}, "mask")]
)
def test_a_constant_of_the_capture_is_checked(change, name):
    inputs = {"x": images(), "scale": 2, "mask": None, "flag": False}
    captured = fxmerge.capture(build(Inputs), inputs)
    captured(**inputs)
    with pytest.raises(AssertionError, match=rf"'{name}' was .* at capture and is a constant"):
        captured(**{**inputs, **change})


# --- the model stays as it was ----------------------------------------------------------------------------------------


def test_hooks_act_once():
    model = build(lambda: nn.Sequential(conv(3, 4), nn.ReLU()))
    seen = []
    model[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    model[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    model.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 1.5,))
    model.register_forward_hook(lambda *_: seen.append(1))
    captured = fxmerge.capture(model, images())
    assert calls(captured) == ["mul", "add", "Conv2d", "mul", "ReLU"]
    assert largest_difference(model, captured, images()) <= ALLOWED
    before = len(seen)
    captured(images())
    assert len(seen) == before
    model(images())
    assert len(seen) == before + 1


def test_the_model_and_the_example_stay_as_they_were():
    model = build(
        lambda: nn.Sequential(
            Net(write_input, a=conv(3, 3), b=conv(3, 3)), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU()
        )
    )
    model.train()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model(images()).sum().backward()
    model[3].register_forward_hook(lambda *_: None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: None if gradient is None else gradient.clone() for name, gradient in gradients.items()}
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    objects = dict(model.named_modules())
    example = images()
    captured = fxmerge.capture(model, example)

    assert torch.equal(example, images())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert values[name] is None or torch.equal(parameter.grad, values[name])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert dict(model.named_modules()) == objects
    assert not {id(module) for module in captured.modules()} & {id(module) for module in objects.values()}
    assert {name: captured.get_submodule(name).training for name in ("", "0", "0.a", "1", "2", "3")} == {
        name: flags[name] for name in ("", "0", "0.a", "1", "2", "3")
    }
    assert captured.get_parameter("1.weight").requires_grad is False


def test_eval_and_train_are_not_called():
    class Merging(nn.Sequential):
        """As LoRA layers do: switching to eval mode changes the weights."""

        def train(self, mode=True):
            self[0].weight.data.mul_(2)
            return super().train(mode)

    model = Merging(conv(3, 3)).double()
    weight = model[0].weight.detach().clone()
    fxmerge.capture(model, images())
    assert torch.equal(model[0].weight, weight)


def test_gradients_reach_the_shared_parameters():
    model = build(CASES["conv, bn, act, pool, dropout, linear"][0]).train()
    captured = fxmerge.capture(model, images())
    run(captured, images())[0].square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(build(CASES["conv, bn, act, pool, dropout, linear"][0]).state_dict())
    model.zero_grad()
    run(model, images())[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert float((found[name] - parameter.grad).abs().max()) <= ALLOWED


# --- state ------------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 3)
        self.register_buffer("kept", torch.ones(3, 1, 1))
        self.register_buffer("passing", torch.full((3, 1, 1), 2.0), persistent=False)
        self.constant = torch.full((3, 1, 1), 3.0, dtype=torch.float64)

    def forward(self, x):
        return self.a(x) * self.kept + self.passing * self.constant


def test_buffers_that_are_not_saved_stay_so():
    model = build(lambda: nn.Sequential(Buffers(), MaskedConv()))
    root = build(Buffers)
    for original in (model, root):
        captured = fxmerge.capture(original, images())
        for graph in (captured, clone(captured), copy.deepcopy(captured)):
            assert set(graph.state_dict()) == set(original.state_dict())
            assert largest_difference(original, graph, images()) <= ALLOWED
            graph.load_state_dict(original.state_dict())


def test_what_the_forward_pass_does_not_use_is_left_out():
    model = build(net(lambda net, x: net.a(x), **PAIR))
    assert set(fxmerge.capture(model, images()).state_dict()) == {"a.weight", "a.bias"}


def test_the_order_of_parameters_stays():
    model = build(net(lambda net, x: net.a(torch.relu(net.b(x))), **PAIR))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in fxmerge.capture(model, images()).named_parameters()] == names


def test_a_bare_convolution_is_wrapped():
    model = build(lambda: conv(3, 4)).eval()
    captured = fxmerge.capture(model, images())
    assert calls(captured) == ["Conv2d"]
    assert captured.get_parameter("0.weight") is model.weight
    assert torch.equal(captured(images()), model(images()))
    assert not captured.training


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_untraceable_model_is_refused_with_the_place():
    def branches(net, x):
        y = net.a(x)
        return y if y.sum() > 0 else net.b(y)  # the place

    model = build(net(branches, **PAIR))
    line = branches.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError, match=rf"cannot trace Net: .*\(at .*test_capture.py:{line}\)"):
        fxmerge.capture(model, images())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            images(channels=4),
            r"Sequential rejects the example input \(tensors of shape \[\[2, 4, 8, 8\]\]\): RuntimeError",
        ),
        ((images(), images()), "Sequential rejects the example input"),
        ({"image": images()}, "Sequential rejects the example input"),
        ([images()], "example_input is a list"),
        ((3,), "example_input holds no tensor"),
    ],
)
def test_a_wrong_example_is_refused(example, message):
    with pytest.raises(UserError, match=message):
        fxmerge.capture(nn.Sequential(conv(3, 3)).double(), example)


def test_a_model_without_values_is_refused():
    with pytest.raises(UserError, match=r"parameter '0\.weight' is on the meta device"):
        fxmerge.capture(nn.Sequential(conv(3, 3)).to("meta"), images())


def test_a_model_on_several_devices_is_refused(monkeypatch):
    model = nn.Sequential(conv(3, 3), conv(3, 3))
    elsewhere = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(model, "named_parameters", lambda: [("0.weight", model[0].weight), ("1.weight", elsewhere)])
    with pytest.raises(UserError, match=r"'0\.weight' on cpu, '1\.weight' on cuda:1.*model\.to"):
        fxmerge.capture(model, images())


class DropPath(nn.Module):
    def forward(self, x):
        return x * 0.5 if self.training else x


class PassedOn(nn.Module):
    def forward(self, x):
        return drop_path(x, self.training)


def drop_path(x, training):
    return x * 0.5 if training else x


class OnlyDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


@pytest.mark.parametrize("kind", [DropPath, PassedOn])
def test_a_branch_on_training_is_warned_of_by_name(kind):
    with pytest.warns(
        UserWarning, match=rf"'1' \({kind.__name__}\), '2' .*, '3' .* and 1 more may behave differently"
    ) as found:
        fxmerge.capture(nn.Sequential(conv(3, 3), kind(), kind(), kind(), kind()), images().float())
    assert found[0].filename == __file__


def test_a_traced_use_of_training_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxmerge.capture(nn.Sequential(conv(3, 3), OnlyDropout()), images().float())
