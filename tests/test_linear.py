"""What operations mean to a merge: geometry, weights, and why the others are in the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxmerge
from fxmerge.graph import META, by_id, module_of, shared_targets
from fxmerge.linear import (
    FREE,
    IDEMPOTENT,
    REMOVABLE,
    Barrier,
    Linear,
    Removable,
    activation_after,
    conv_geometry,
    linear_map,
    meaning,
    pad_sides,
    shape_after,
)

ALLOWED = 1e-10


class Applied(nn.Module):
    def __init__(self, compute, *modules):
        super().__init__()
        self.compute = compute
        self.layers = nn.ModuleList(modules)

    def forward(self, x):
        return self.compute(self.layers, x)


def meaning_of(model, image, name):
    captured = fxmerge.capture(model, image)
    return meaning(captured, by_id(captured)[name], shared_targets(captured))


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


IMAGE = images(2, 4, 9, 9)

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, 2, 1),
    nn.Conv2d(4, 4, (3, 5), (1, 2), (0, 2), (2, 1), 2),
    nn.Conv2d(4, 6, 4, padding="same"),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv1d(4, 4, 3, padding=1, groups=4),
    nn.Conv3d(4, 2, 3, padding=1),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("module", CONVOLUTIONS, ids=repr)
def test_a_convolution_s_geometry_and_map(module):
    module = module.double()
    shape = (2, 4, *[9] * len(module.kernel_size))
    image = images(*shape)
    expected = module(image).detach()
    geometry = conv_geometry(module)
    assert (geometry.in_channels, geometry.out_channels) == (module.in_channels, module.out_channels)
    assert geometry.out_size(shape[2:]) == expected.shape[2:]
    assert shape_after(module, shape) == tuple(expected.shape)

    captured = fxmerge.capture(nn.Sequential(module), image)
    node = by_id(captured)["0"]
    assert meaning(captured, node, frozenset()) == Linear(geometry)
    assert float((linear_map(captured, node).apply(image) - expected).abs().max()) <= ALLOWED
    with torch.no_grad():
        module.weight.view(-1)[0] += 1e-6
    assert float((linear_map(captured, node).apply(image) - expected).abs().max()) > ALLOWED


def test_a_batch_norm_is_its_affine_map():
    norm = nn.BatchNorm2d(4, eps=1e-2).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    captured = fxmerge.capture(nn.Sequential(norm), IMAGE)
    node = by_id(captured)["0"]
    what = meaning(captured, node, frozenset())
    assert isinstance(what, Linear)
    assert float((linear_map(captured, node).apply(IMAGE) - norm(IMAGE).detach()).abs().max()) <= ALLOWED


def test_a_free_operation_is_the_identity():
    captured = fxmerge.capture(nn.Sequential(nn.Conv2d(4, 4, 1).double(), nn.Dropout(0.5)), IMAGE)
    node = by_id(captured)["1"]
    assert meaning(captured, node, frozenset()) == Removable(free=True)
    assert torch.equal(linear_map(captured, node).apply(IMAGE), IMAGE)


PADS = {
    (1, 2, 3, 4): ((3, 1), (4, 2)),
    (1, 2): ((0, 1), (0, 2)),
    (-1, 2, 0, -3): ((0, -1), (-3, 2)),
}


@pytest.mark.parametrize("sides", PADS, ids=str)
def test_a_zero_padding_is_a_map(sides):
    captured = fxmerge.capture(Applied(lambda _, x: F.pad(x, sides)), IMAGE)
    node = by_id(captured)["pad"]
    assert pad_sides(node) == PADS[sides]
    if min(sides) >= 0:
        assert torch.equal(linear_map(captured, node).apply(IMAGE), F.pad(IMAGE, sides))
        what = meaning(captured, node, frozenset())
        assert what.geometry.out_size((9, 9)) == F.pad(IMAGE, sides).shape[2:]


NO_MAP = Barrier("not-linear", "pad is no affine shift-equivariant map of one value")


@pytest.mark.parametrize(
    ("compute", "barrier"),
    [
        (lambda _, x: F.pad(x, (1, 1), value=2.0), NO_MAP),
        (
            lambda _, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
            Barrier("padding-mode", "it pads with 'reflect', not zeros"),
        ),
        (lambda _, x: F.pad(x, (1, 0, 0, 0, 1, 1)), NO_MAP),
    ],
    ids=["value", "reflect", "channels"],
)
def test_other_paddings_are_no_map(compute, barrier):
    captured = fxmerge.capture(Applied(compute), IMAGE)
    node = by_id(captured)["pad"]
    assert pad_sides(node) is None
    assert meaning(captured, node, frozenset()) == barrier


@pytest.mark.parametrize(
    ("crop", "sides"),
    [
        (lambda _, x: x[:, :, 1:-2], ((-1, 0), (-2, 0))),
        (lambda _, x: x[..., 3:], ((0, -3), (0, 0))),
    ],
)
def test_a_slice_of_neighbours_is_a_crop(crop, sides):
    captured = fxmerge.capture(Applied(crop), IMAGE)
    found = [
        pad_sides(node)
        for node in captured.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
        if meaning(captured, node, frozenset()) != Removable(free=True)
    ]
    assert found == [sides]


@pytest.mark.parametrize("crop", [lambda _, x: x[:, :, ::2], lambda _, x: x[1:]], ids=["steps", "batch"])
def test_other_slices_are_no_map(crop):
    captured = fxmerge.capture(Applied(crop), IMAGE)
    found = captured.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
    assert [pad_sides(node) for node in found if meaning(captured, node, frozenset()) != Removable(free=True)] == [None]


def test_pads_of_a_dynamic_size_are_no_map():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(F.pad, (x, [x, 1]))
    node.meta[META] = {"shape": [1, 2, 3, 3]}
    assert pad_sides(node) is None
    assert pad_sides(x) is None


@pytest.mark.parametrize("kind", REMOVABLE, ids=lambda kind: kind.__name__)
def test_an_activation_is_removable(kind):
    module = (kind(0.1, 0.2) if kind is nn.Threshold else kind()).double().requires_grad_(False).eval()
    assert shape_after(module, (2, 4, 9, 9)) == tuple(module(IMAGE).shape) == (2, 4, 9, 9)
    captured = fxmerge.capture(nn.Sequential(module), IMAGE)
    found = module_of(captured, by_id(captured)["0"])
    assert type(found) is kind
    assert meaning(captured, by_id(captured)["0"], frozenset()) == Removable(free=False)
    assert (float((module(module(IMAGE)) - module(IMAGE)).abs().max()) == 0) == (kind in IDEMPOTENT)


@pytest.mark.filterwarnings("ignore:dropout[23]d. Received")
@pytest.mark.parametrize("kind", FREE, ids=lambda kind: kind.__name__)
def test_a_free_module_hands_its_input_through(kind):
    image = IMAGE[:, :, 0]
    assert torch.equal(kind().eval()(image), image)
    assert shape_after(kind(), (2, 4, 9)) == (2, 4, 9)


def test_a_shape_that_does_not_follow_from_the_class_is_not_given():
    assert shape_after(nn.GLU(1), (2, 4, 9, 9)) is None
    assert shape_after(nn.Conv2d(4, 4, 3), (4, 9, 9)) is None


def written_in_place(layers, x):
    y = layers[0](x)
    view = y.flatten(1)
    torch.relu_(y)
    return y.flatten(1) + view


BARRIERS = {
    "padding-mode": (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), "0"),
    "batch-statistics": (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "0"),
    "shared": (Applied(lambda layers, x: layers[0](layers[0](x)), nn.Conv2d(4, 4, 1)), "layers.0"),
    "in-place": (Applied(written_in_place, nn.Conv2d(4, 4, 1)), "layers.0"),
    "not-linear": (nn.Sequential(nn.MaxPool2d(2)), "0"),
    "not-spatial": (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(324)), "1"),
}


@pytest.mark.parametrize("code", BARRIERS)
def test_a_barrier_has_a_code_and_a_reason(code):
    model, name = BARRIERS[code]
    if code == "padding-mode":
        captured = fxmerge.capture(model.double(), IMAGE)
        captured.get_submodule("0").padding_mode = "circular"
        what = meaning(captured, by_id(captured)[name], frozenset())
    else:
        what = meaning_of(model.double(), IMAGE, name)
    assert isinstance(what, Barrier)
    assert what.code == code
    assert what.reason


def test_a_convolution_of_one_image_without_batch_axis_is_no_map():
    what = meaning_of(nn.Sequential(nn.Conv2d(4, 4, 3)).double(), IMAGE[0], "0")
    assert what == Barrier("not-spatial", "it works on a value without a batch axis")


def test_a_shared_activation_is_a_barrier_where_it_has_parameters():
    model = Applied(lambda layers, x: layers[0](layers[0](x)), nn.PReLU())
    assert meaning_of(model.double(), IMAGE, "layers.0").code == "shared"


def test_the_activation_that_reads_a_convolution():
    conv = [nn.Conv2d(4, 4, 1) for _ in range(5)]
    model = nn.Sequential(
        conv[0], nn.BatchNorm2d(4), nn.Dropout(0.5), nn.SiLU(), conv[1], conv[2], nn.MaxPool2d(2), nn.ReLU(), conv[3]
    )
    captured = fxmerge.capture(model.double(), IMAGE)
    nodes = by_id(captured)
    assert [activation_after(captured, nodes[name]) for name in ("0", "4", "5", "8")] == ["SiLU", None, None, None]


def test_no_activation_where_the_value_is_read_twice():
    model = Applied(lambda layers, x: torch.relu(layers[0](x)) + layers[0](x).mean(), nn.Conv2d(4, 4, 1))
    captured = fxmerge.capture(model.double(), IMAGE)
    assert activation_after(captured, by_id(captured)["layers.0"]) == "ReLU"
    model = Applied(lambda layers, x: (lambda y: torch.relu(y) + y)(layers[0](x)), nn.Conv2d(4, 4, 1))
    captured = fxmerge.capture(model.double(), IMAGE)
    assert activation_after(captured, by_id(captured)["layers.0"]) is None
