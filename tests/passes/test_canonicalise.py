"""What the canonicalise pass does to an exported graph, case by case."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxmerge.graph import META, clone
from fxmerge.passes import CanonicalisePass
from fxmerge.passes.canonicalise import canonicalise

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inputs=3, outputs=3, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def export(model, *inputs):
    inputs = inputs or (IMAGE,)
    axes = ({0: torch.export.Dim.DYNAMIC}, *([(None,) * len(inputs[1:])] if inputs[1:] else ()))
    with torch.no_grad():
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=axes, strict=False)
    exported = program.module(check_guards=False)
    return fx.GraphModule(exported, exported.graph)


def canonical(model, *inputs):
    graph_module = export(model, *inputs)
    assert canonicalise(graph_module, model)
    return graph_module


def listed(graph_module):
    """Operation, target and readable ids, in execution order."""
    return [
        (node.op, str(node.target), node.meta[META]["id"])
        for node in graph_module.graph.nodes
        if node.op not in ("placeholder", "output")
    ]


class Applied(nn.Module):
    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x, *others):
        return self.compute(self, x, *others)


def test_the_pass_says_what_it_did_and_a_second_run_changes_nothing():
    model = Applied(
        lambda net, x, k: torch.relu_(net.act(net.norm(net.conv(x)))) * k + x.flatten(1).view(x.shape),
        conv=conv(), norm=nn.BatchNorm2d(3), act=nn.SiLU(inplace=True),
    )  # fmt: skip
    graph_module = export(model, IMAGE, 2)
    canonicalise_pass = CanonicalisePass(model)
    first = canonicalise_pass(graph_module)
    assert first.modified is True
    assert first.graph_module is graph_module
    names, meta = listed(graph_module), [copy.deepcopy(node.meta[META]) for node in graph_module.graph.nodes]
    second = canonicalise_pass(graph_module)
    assert second.modified is False
    assert listed(graph_module) == names
    assert [node.meta[META] for node in graph_module.graph.nodes] == meta
    with torch.no_grad():
        assert torch.equal(graph_module(IMAGE, 2), model(IMAGE, 2))


def test_operators_become_modules_under_the_user_s_names():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)), nn.Flatten()
    )
    model.append(nn.Linear(48, 5))
    graph_module = canonical(model)
    assert listed(graph_module) == [
        ("call_module", "0", "0"),
        ("call_module", "1", "1"),
        ("call_module", "2.0", "2.0"),
        ("call_module", "2.1", "2.1"),
        ("call_function", "aten.flatten.using_ints", "3/flatten"),
        ("call_module", "4", "4"),
    ]
    for path in ("0", "1", "4"):
        assert graph_module.get_submodule(path) is not model.get_submodule(path)
        assert graph_module.get_submodule(path).weight is model.get_submodule(path).weight
    assert graph_module.get_submodule("1").running_mean is model.get_submodule("1").running_mean


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 6, (3, 5), (2, 1), (1, 2), (1, 2), 3, bias=False),
        nn.BatchNorm2d(3, eps=1e-3, momentum=0.3),
        nn.BatchNorm2d(3, momentum=None, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.GroupNorm(3, 3, eps=1e-2),
        nn.GroupNorm(3, 3, eps=1e-2, affine=False),
        nn.InstanceNorm2d(3, eps=1e-2),
        nn.InstanceNorm2d(3, affine=True),
        nn.InstanceNorm2d(3, momentum=0.3, track_running_stats=True),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.LayerNorm([8, 8], eps=1e-2, bias=False),
        nn.Linear(8, 4, bias=False),
        nn.PReLU(3),
        nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True),
        nn.AvgPool2d(3, (1, 2), 1, ceil_mode=True, count_include_pad=False, divisor_override=5),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Dropout(0.25),
        nn.Dropout2d(0.25),
        nn.LeakyReLU(0.3),
        nn.ELU(0.4),
        nn.Hardtanh(-2.0, 0.5),
        nn.ReLU6(),
        nn.LogSigmoid(),
        nn.Threshold(0.1, 2.0),
        nn.Hardshrink(0.3),
        nn.Softshrink(0.3),
        nn.RReLU(0.2, 0.4),
        nn.ChannelShuffle(3),
        nn.Softplus(2.0, 10.0),
        nn.GELU("tanh"),
    ],
    ids=repr,
)
def test_options_of_modules_are_kept(module):
    graph_module = canonical(nn.Sequential(module))
    assert listed(graph_module) == [("call_module", "0", "0")]
    found = graph_module.get_submodule("0")
    assert type(found) is type(module)
    for name, value in vars(module).items():
        if isinstance(value, (int, float, str, tuple)) and name != "training":
            ours = getattr(found, name)
            assert ours == value or set(ours) == {value}, name


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda x: F.threshold_(x, 0.1, 2.0), nn.Threshold(0.1, 2.0)),
        (lambda x: F.rrelu_(x, 0.2, 0.4), nn.RReLU(0.2, 0.4)),
        (lambda x: F.hardshrink(x, 0.3), nn.Hardshrink(0.3)),
        (lambda x: F.softshrink(x, 0.3), nn.Softshrink(0.3)),
        (lambda x: torch.clamp_(x, -1, 2), nn.Hardtanh(-1, 2)),
        (lambda x: x.clip(-1.5, 2.0), nn.Hardtanh(-1.5, 2.0)),
        (lambda x: x.clamp(0, 6), nn.ReLU6()),
        (lambda x: F.hardtanh_(x, 0.0, 6.0), nn.ReLU6()),
        (lambda x: x.clamp(min=0), nn.ReLU()),
        (lambda x: torch.clamp_min_(x, 0.0), nn.ReLU()),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), nn.ReLU()),
        (lambda x: torch.max(torch.zeros(()), x), nn.ReLU()),
        (lambda x: torch.maximum(x, torch.tensor(0.0)), nn.ReLU()),
        (lambda x: torch.maximum(torch.zeros(1, 3, 1, 1), x), nn.ReLU()),
        (lambda x: torch.ops.aten.log_sigmoid_forward(x)[0], nn.LogSigmoid()),
        (lambda x: F.instance_norm(x, eps=1e-2), nn.InstanceNorm2d(3, eps=1e-2)),
        (lambda x: F.group_norm(x, 3), nn.GroupNorm(3, 3, affine=False)),
        (lambda x: F.channel_shuffle(x, 3), nn.ChannelShuffle(3)),
    ],
    ids=range(18),
)
def test_spellings_of_activations(compute, expected):
    model = Applied(lambda net, x: compute(net.a(x)), a=conv())
    graph_module = canonical(model)
    name = type(expected).__name__.lower()
    assert [target for _, target, _ in listed(graph_module)] == ["a", name]
    assert repr(graph_module.get_submodule(name)) == repr(expected)
    with torch.no_grad():
        assert torch.equal(graph_module(IMAGE[:1]), model(IMAGE[:1]))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.clamp(min=1e-6),
        lambda x: x.clamp(max=0),
        lambda x: x.clamp(2, 1),
        lambda x: (x * 9).int().clamp(min=0),
        lambda x: torch.maximum(x, torch.ones_like(x)),
        lambda x: torch.maximum(x, torch.zeros_like(x).add_(1)),
        lambda x: torch.maximum(x, torch.tensor([0.0, 1.0] * 4)),
        lambda x: torch.maximum(x[:, :1], torch.zeros_like(x)),
        lambda x: torch.maximum(x, x - 1),
        lambda x: F.rrelu(x, training=True),
        lambda x: x.softmax(1),
        lambda x: F.instance_norm(x, torch.zeros(3), torch.ones(3)),
    ],
    ids=range(12),
)
def test_what_no_activation_computes_stays_a_function(compute):
    model = Applied(lambda net, x: compute(net.a(x)), a=conv())
    graph_module = canonical(model)
    assert [target for op, target, _ in listed(graph_module) if op == "call_module"] == ["a"]
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(IMAGE)
        torch.manual_seed(0)
        assert torch.equal(graph_module(IMAGE), expected)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 8, 8), (2, 3, 4, 4, 4)], ids=len)
def test_instance_norm_trains_as_the_user_s(shape):
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[len(shape)]
    model = nn.Sequential(kind(3, affine=True, track_running_stats=True, momentum=0.3), kind(3))
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph_module = canonical(model.double(), image)
    assert [type(module) for module in graph_module.children()] == [kind, kind]
    assert list(graph_module.state_dict()) == list(model.state_dict())
    assert graph_module.get_submodule("0").running_mean is model[0].running_mean
    for training in (False, True, False):
        ours, theirs = clone(graph_module).train(training), copy.deepcopy(model).train(training)
        assert torch.equal(ours(image), theirs(image))
        assert torch.equal(ours.get_buffer("0.running_var"), theirs[0].running_var)
        assert torch.equal(theirs[0].running_var, model[0].running_var) != training
        model[0].running_var.mul_(2)


def test_norms_without_tensors_are_modules_of_one_call():
    model = nn.Sequential(Applied(lambda net, x: net.norm(net.norm(F.instance_norm(x))), norm=nn.InstanceNorm2d(3)))
    assert [target for _, target, _ in listed(canonical(model))] == ["0.instancenorm2d", "0.norm", "0.norm_1"]


def test_functional_calls_get_names_of_their_own():
    model = nn.Sequential(
        Applied(lambda net, x: F.relu(F.dropout(F.relu(net.conv(x)), 0.5, net.training)), conv=conv())
    )
    assert [target for _, target, _ in listed(canonical(model))] == ["0.conv", "0.relu", "0.dropout", "0.relu_2"]


def test_a_name_that_is_taken_is_not_used():
    model = Applied(lambda net, x: net.relu(F.relu(x)), relu=conv())
    assert [target for _, target, _ in listed(canonical(model))] == ["relu_2", "relu"]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_an_activation_in_a_module_with_a_parameter_has_a_name_of_its_own(size):
    module = Applied(lambda net, x: F.relu(x) + net.shift.sum())
    module.shift = nn.Parameter(torch.zeros(size))
    lines = listed(canonical(nn.Sequential(module)))
    assert [target for op, target, _ in lines if op == "call_module"] == ["0.relu"]


def test_a_second_call_of_an_activation_is_a_module_of_its_own():
    model = Applied(lambda net, x: net.act(net.b(net.act(net.a(x)))), a=conv(), b=conv(), act=nn.ReLU())
    assert [target for _, target, _ in listed(canonical(model))] == ["a", "act", "b", "act_1"]


def test_a_second_call_of_a_convolution_keeps_its_target():
    model = Applied(lambda net, x: net.a(net.a(x)), a=conv())
    assert [(target, name) for _, target, name in listed(canonical(model))] == [("a", "a"), ("a", "a#1")]


def test_a_second_call_with_other_options_stays_a_function():
    class Pyramid(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + F.conv2d(x, self.weight, self.bias, padding=2, dilation=2)

    graph_module = canonical(nn.Sequential(Pyramid(3, 3, 3, padding=1)))
    assert [target for _, target, _ in listed(graph_module)][-3:] == ["0", "aten.conv2d.default", "aten.add.Tensor"]


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, x: F.conv2d(x, net.a.weight * 2, net.a.bias, padding=1),
        lambda net, x: F.batch_norm(x, net.n.running_mean, net.n.running_var, net.n.weight, net.n.bias, training=True),
        lambda net, x: F.batch_norm(x, net.n.running_mean, net.n.running_var, net.n.weight, net.n.bias),
        lambda _, x: F.dropout(x, 0.5, training=True),
        lambda _, x: torch.ops.aten.elu(x, 1.0, 2.0),
        lambda _, x: F.layer_norm(x, [8, 8]),
    ],
    ids=[
        "computed weight",
        "batch norm in train mode",
        "other module's norm",
        "dropout always on",
        "elu",
        "layer norm",
    ],
)
def test_what_no_module_computes_stays_a_function(compute):
    model = Applied(compute, a=conv(), n=nn.BatchNorm2d(3))
    assert not [line for line in listed(canonical(model)) if line[0] == "call_module"]


# --- in place ---------------------------------------------------------------------------------------------------------


def operations(graph_module):
    return [
        str(node.target).removeprefix("aten.").partition(".")[0]
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_module")
    ]


def opaque(graph_module):
    return [node.name for node in graph_module.graph.nodes if node.meta[META].get("opaque")]


def test_an_in_place_operator_becomes_functional_and_later_readers_read_it():
    def compute(net, x):
        y = net.a(x)
        y.mul_(2)
        return y + y.abs_()

    graph_module = canonical(Applied(compute, a=conv()))
    assert operations(graph_module) == ["a", "mul", "abs", "add"]
    add = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[0]
    assert [str(source) for source in add.args] == ["abs_", "abs_"]
    assert not opaque(graph_module)


def test_a_view_taken_before_and_read_before_does_not_matter():
    def compute(net, x):
        y = net.a(x)
        total = y.flatten(1).sum()
        return torch.relu_(y) * total

    graph_module = canonical(Applied(compute, a=conv()))
    assert operations(graph_module) == ["a", "flatten", "sum", "relu", "mul"]
    assert not opaque(graph_module)


def test_a_view_taken_after_sees_the_write():
    def compute(net, x):
        y = net.a(x)
        torch.relu_(y)
        view = y.flatten(1)
        view.mul_(2)
        return view

    graph_module = canonical(Applied(compute, a=conv()))
    assert operations(graph_module) == ["a", "relu", "flatten", "mul"]
    assert not opaque(graph_module)


def view_of(name):
    def compute(net, x):
        y = net.a(x)
        view = {"view": lambda: y.view(x.shape[0], -1), "slice": lambda: y[:, :1], "chunk": lambda: y.chunk(3, 1)[0]}[
            name
        ]()
        torch.relu_(y)
        return y.sum() + view.sum()

    return compute


@pytest.mark.parametrize("name", ["view", "slice", "chunk"])
def test_every_kind_of_view_is_known(name):
    model = Applied(view_of(name), a=conv())
    graph_module = canonical(model)
    assert operations(graph_module)[-4:] == ["relu_", "sum", "sum", "add"]
    assert {"conv2d", "relu_"} < set(opaque(graph_module))
    assert not {"sum_1", "add"} & set(opaque(graph_module))
    with torch.no_grad():
        assert torch.equal(graph_module(IMAGE), model(IMAGE))


def test_an_input_that_is_written_stays_so():
    graph_module = canonical(Applied(lambda net, x: net.a(x.add_(1)), a=conv()))
    assert operations(graph_module) == ["add_", "a"]
    assert opaque(graph_module) == ["x", "add_"]
    image = IMAGE.clone()
    graph_module(image)
    assert torch.equal(image, IMAGE + 1)


def test_a_module_stays_one_where_its_output_is_opaque():
    def compute(net, x):
        y = net.norm(net.a(x))
        view = y.flatten(1)
        torch.relu_(y)
        return view

    graph_module = canonical(Applied(compute, a=conv(), norm=nn.BatchNorm2d(3)))
    assert operations(graph_module)[:2] == ["a", "norm"]


# --- a border written by slices ---------------------------------------------------------------------------------------


class Bordered(nn.Module):
    """A batch norm and a padding by what it makes of zeros, written as DiverseBranchBlock's BNAndPadLayer writes it."""

    def __init__(self, write, pad=(1, 1, 1, 1)):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        self.write, self.pad = write, pad

    def forward(self, x):
        y = self.bn(x)
        value = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / torch.sqrt(
            self.bn.running_var + self.bn.eps
        )
        out = F.pad(y, self.pad)
        found = self.write(out, value.view(1, -1, 1, 1), y)
        return out if found is None else found


def all_sides(out, value, _, p=1):
    out[:, :, 0:p, :] = value
    out[:, :, -p:, :] = value
    out[:, :, :, 0:p] = value
    out[:, :, :, -p:] = value


def by_copy_and_select(out, value, _):
    out[..., 0].copy_(value.view(3, 1))
    out[:, :, :, -1] = value.view(3, 1)
    out[:, :, 0:1].copy_(value)
    out[:, :, 9:10].copy_(value)


def by_fill(out, *_):
    for strip in (out[:, :, :1], out[:, :, -1:], out[:, :, :, 0], out[:, :, :, -1:]):
        strip.fill_(2.5)


def by_number(out, *_):
    out[:, :, :1], out[:, :, -1], out[:, :, :, :1], out[..., -1] = 2.5, 2.5, 2.5, 2.5


def one_side(out, value, _):
    out[:, :, :, :2] = value


def used_on(out, value, _):
    all_sides(out, value, None)
    return torch.relu_(out).mul_(2)


BORDERS = {
    "DBB": (all_sides, (1, 1, 1, 1)),
    "wide": (lambda out, value, _: all_sides(out, value, None, 2), (2, 2, 2, 2)),
    "copy and select": (by_copy_and_select, (1, 1, 1, 1)),
    "fill": (by_fill, (1, 1, 1, 1)),
    "number": (by_number, (1, 1, 1, 1)),
    "one side": (one_side, (2, 0)),
    "in place after": (used_on, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", BORDERS)
def test_a_border_written_by_slices_is_a_difference_a_padding_and_a_sum(name):
    model = nn.Sequential(conv(), Bordered(*BORDERS[name]), conv())
    graph_module = canonical(model)
    ids = [line[2] for line in listed(graph_module)]
    order = [ids.index(name) for name in ("1.bn", "1/sub" if "1/sub#1" not in ids else "1/sub#1", "1/pad", "2")]
    assert order == sorted(order)
    assert not [name for name in ids if "copy" in name or "fill" in name or "slice" in name or "select" in name]
    assert not opaque(graph_module)
    ((pad,), image) = (
        graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.pad.default),
        IMAGE.double(),
    )
    assert pad.meta[META]["shape"] == list(next(iter(pad.users)).meta[META]["shape"])
    assert list(graph_module.state_dict()) == list(model.state_dict())
    for training in (False, True):
        ours, theirs = (
            clone(graph_module).double().train(training),
            copy.deepcopy(model).double().train(training),
        )
        for batch in (image, image[:1]):
            assert torch.allclose(ours(batch), theirs(batch), rtol=0, atol=1e-12)
    assert not canonicalise(graph_module, model)


def three_sides(out, value, _):
    out[:, :, :1] = out[:, :, -1:] = out[..., :1] = value


def too_wide(out, value, _):
    all_sides(out, value, None)
    out[:, :, :2] = value


def other_value(out, value, _):
    all_sides(out, value, None)
    out[..., :1] = value * 2


def other_number(out, *_):
    by_fill(out)
    out[..., :1].fill_(1.0)


def read_between(out, value, _):
    out[:, :, :1] = value
    total = out.sum()
    all_sides(out, value, None)
    return out + total


def read_strip(out, value, _):
    all_sides(out, value, None)
    return out * out[:, :, :1]


def part_of_the_batch(out, value, _):
    all_sides(out[:3], value, None)


def part_of_the_channels(out, value, _):
    all_sides(out[:, :2], value[:, :2], None)


def per_row(out, *_):
    row = torch.arange(10.0)
    out[:, :, :1], out[:, :, -1:], out[..., :1], out[..., -1:] = row, row, row[:, None], row[:, None]


def per_image(out, _, y):
    all_sides(out, y.mean((1, 2, 3), keepdim=True), None)


def of_itself(out, *_):
    all_sides(out, out[:, :, 4:5, 4:5], None)


def value_changes(out, value, _):
    value = value.clone()
    out[:, :, :1] = out[:, :, -1:] = value
    value.mul_(2)
    out[..., :1] = out[..., -1:] = value


def source_changes(out, value, y):
    all_sides(out, value, None)
    y.mul_(2)
    all_sides(out, value, None)
    return out + y.sum()


def every_other(out, value, _):
    all_sides(out[:, :, :, ::2], value, None)


NO_BORDERS = [
    three_sides, too_wide, other_value, other_number, read_between, read_strip, part_of_the_batch,
    part_of_the_channels, per_row, per_image, of_itself, value_changes, source_changes, every_other,
]  # fmt: skip


@pytest.mark.parametrize("write", NO_BORDERS, ids=lambda write: write.__name__)
def test_other_writes_through_slices_stay(write):
    image = IMAGE[[0, 1, 1]]
    model = nn.Sequential(conv(), Bordered(write))
    graph_module = canonical(model, image)
    assert opaque(graph_module)
    for batch in (image, IMAGE[[0, 1, 0, 1]]):
        with torch.no_grad():
            assert torch.equal(graph_module(batch), model(batch))


@pytest.mark.parametrize("pad", [(0, 0, 2, 0), (0, 0, 1, 1), (0, -1, 1, 0), (0, 0, 0, 0, 1, 0)], ids=str)
def test_a_border_that_is_not_all_of_the_padding_stays(pad):
    def write(out, value, _):
        out[:, :, :1] = 1.0 if len(pad) > 4 else value

    model = nn.Sequential(conv(), Bordered(write, pad))
    graph_module = canonical(model)
    assert opaque(graph_module)
    with torch.no_grad():
        assert torch.equal(graph_module(IMAGE[:1]), model(IMAGE[:1]))


# --- sizes, constants, state ------------------------------------------------------------------------------------------


def test_sizes_are_read_from_the_input():
    def compute(net, x):
        y = net.a(x)
        return y.view(y.shape[0], -1)

    graph_module = canonical(Applied(compute, a=conv()))
    (size,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert size.args[0].op == "placeholder"
    assert graph_module(torch.zeros(5, 3, 8, 8)).shape == (5, 192)


@pytest.mark.parametrize("value", [3, 2.5, True, "a", None])
def test_a_constant_is_compared(value):
    graph_module = canonical(Applied(lambda net, x, _: net.a(x), a=conv()), IMAGE, value)
    graph_module(IMAGE, value)
    with pytest.raises(AssertionError, match=r"was .* at capture and is a constant of this graph"):
        graph_module(IMAGE, "other")


def test_shapes_and_dtypes_are_plain_data():
    def compute(net, x):
        left, right = net.a(x).chunk(2, 3)
        return left > right

    graph_module = canonical(Applied(compute, a=conv()))
    data = {node.meta[META]["id"]: node.meta[META] for node in graph_module.graph.nodes}
    assert data["a"] == {"shape": [2, 3, 8, 8], "dtype": "float32", "id": "a"}
    assert data["chunk"] == {"parts": 2, "id": "chunk"}
    assert data["gt"] == {"shape": [2, 3, 8, 4], "dtype": "bool", "id": "gt"}


def test_training_flags_are_the_user_s():
    model = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(3)), nn.Sequential(nn.Dropout(0.5)))
    graph_module = export(model)
    model.train()
    model[0][1].eval()
    model[1].eval()
    canonicalise(graph_module, model)
    assert {name: module.training for name, module in graph_module.named_modules()} == {
        name: module.training for name, module in model.named_modules()
    }


def test_what_other_operations_read_stays_in_the_module():
    class Scaled(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 3)
            self.gain = nn.Parameter(torch.ones(1))
            self.register_buffer("shift", torch.ones(1))

        def forward(self, x):
            return super().forward(x) * self.gain + self.shift

    model = nn.Sequential(Scaled())
    graph_module = canonical(model)
    assert type(graph_module.get_submodule("0")) is nn.Conv2d
    assert set(graph_module.state_dict()) == set(model.state_dict())
    assert graph_module.get_buffer("0.shift") is model[0].shift
