"""What ``fxmerge inspect`` prints and lists: rows, reasons, legend, table."""

from __future__ import annotations

import json

import pytest
import torch
from own_networks import TimeUNet
from pytorchcv.models.resnet import resnet50
from torch import nn

import fxmerge
from fxmerge.candidates import Limits, Refusal
from fxmerge.graph import convolutions, node_id
from fxmerge.inspection import inspect_convolutions, inspection_json, inspection_text, legend, unexplained
from fxmerge.passes.enumerate_segments import enumerate_segments


def analysed(model, example, **limits):
    gm = fxmerge.capture(model.eval(), example)
    return gm, enumerate_segments(gm, Limits(**limits))


class Residual(nn.Module):
    """A stem, a residual block, and a head behind a pool that averages too little at the border."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        y = torch.relu(y + self.conv2(torch.relu(self.norm1(self.conv1(y)))))
        return self.head(self.drop(self.pool(y)))


class Gated(nn.Module):
    """A squeeze-excite gate, then a convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1))
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        return self.last(y * self.gate(y).sigmoid())


class Entangled(nn.Module):
    """Every value read by all that follow: one Mesh, whose convolutions stand alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4, 4))

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(a + b)
        return self.d(b + c), a * c


class SideConvolution(nn.Module):
    """Blocks that all add what a convolution on a map of one pixel makes of the image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.SiLU())
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        embedded = self.embed(x)
        return self.second(torch.relu(self.first(x) + embedded)) + embedded


class Deep(nn.Module):
    """Long names around a chain."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
        self.other = nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2))
        self.name = name

    def forward(self, x):
        return self.other(self.get_submodule(self.name)(x))


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))

RESIDUAL = """
convolution        geometry     output   merge bypass drop span  refused
input                           3x12x12
stem, relu         3x3 p1 3->8  8x12x12      3      -    -    3  -
add, relu                       8x12x12
+ identity
+ conv1, bn, relu  3x3 p1 8->8  8x12x12      7      1    1    3  not-linear
| conv2            3x3 p1 8->8  8x12x12      7      -    1    3  not-linear
pool, dropout                   8x6x6
head               1x1 8->4     4x6x6        -      -    -    -  not-linear

not-linear  MaxPool2d is no affine shift-equivariant map: pool

convolutions: 4, of which 3 could change
candidates:   7 merge, 1 bypass, 1 drop
refusals:     3 not-linear
"""

GATED = """
convolution   geometry     output   merge bypass drop span  refused
input                      3x12x12
first         3x3 p1 3->8  8x12x12      2      -    -    4  -
gate: mul                  8x12x12
+ identity
+ 0                        8x1x1
| 1, relu     1x1 8->2     2x1x1        4      -    1    4  not-linear
| 3, sigmoid  1x1 2->8     8x1x1        4      -    1    4  -
last          3x3 p1 8->4  4x12x12      2      -    -    4  -

not-linear  AdaptiveAvgPool2d is no affine shift-equivariant map: gate.0

convolutions: 4, of which 4 could change
candidates:   4 merge, 1 drop
refusals:     1 not-linear
"""

ENTANGLED = """
convolution  geometry  output   merge bypass drop span  refused
input                  3x12x12
a            1x1 3->4  4x12x12      -      -    -    -  mesh
Mesh of 6 operations
+ b          1x1 4->4  4x12x12      -      -    -    -  mesh
+ c          1x1 4->4  4x12x12      -      -    -    -  mesh
+ d          1x1 4->4  4x12x12      -      -    -    -  mesh

mesh  its operations are too entangled for a single entry and exit at every step: output
      it belongs to no chain of the Mesh of 6 operations that ends in output: output

convolutions: 4, of which 0 could change
candidates:   none
refusals:     1 mesh
"""

SIDE = """
convolution        geometry     output   merge bypass drop span  refused
input                           3x12x12
first, side, relu  3x3 p1 3->8  8x12x12      -      -    -    -  side-input
second, side       3x3 p1 8->8  8x12x12      -      1    -    -  -
in no region
+ embed.1          1x1 3->8     8x1x1        -      -    -    -  side-input

side-input  it computes a side input, which nothing changes: embed.1
            the segment up to 'second' computes what is added inside it: embed.0

convolutions: 3, of which 1 could change
candidates:   1 bypass
refusals:     1 side-input
"""


@pytest.mark.parametrize(
    ("kind", "expected"), [(Residual, RESIDUAL), (Gated, GATED), (Entangled, ENTANGLED), (SideConvolution, SIDE)]
)
def test_the_table_has_a_line_for_every_convolution(kind, expected):
    assert inspection_text(*analysed(kind(), IMAGES)) == expected.strip()


def test_what_does_not_fit_has_a_line_of_its_own():
    name = "backbone_of_a_network_with_a_rather_long_name"
    gm, enumeration = analysed(Deep(name), IMAGES, max_kernel=3)
    assert inspection_text(gm, enumeration, width=70).splitlines()[:7] == [
        "convolution   geometry     output   merge bypass drop span  refused",
        "input                      3x12x12",
        f"{name}.0, relu",
        "              3x3 p1 3->8  8x12x12      2      -    -    3  -",
        f"{name}.2",
        "              3x3 p1 8->8  8x12x12      4      1    -    3  -",
        "other.0       1x1 8->8     8x12x12      3      1    -    3  not-linear",
    ]


def test_a_network_without_convolutions_is_totals_and_operations():
    text = inspection_text(*analysed(nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), IMAGES))
    assert text.splitlines()[1:] == [
        "input                  3x12x12",
        "0/flatten, 1           3",
        "",
        "convolutions: 0, of which 0 could change",
        "candidates:   none",
        "refusals:     none",
    ]


@pytest.mark.parametrize(
    ("build", "example", "count", "most"),
    [
        (resnet50, torch.zeros(2, 3, 224, 224), 53, 140),
        (TimeUNet, (torch.zeros(2, 3, 32, 32), torch.zeros(2)), 19, 60),
    ],
)
def test_published_networks_fit_a_terminal(build, example, count, most):
    gm, enumeration = analysed(build(), example)
    text = inspection_text(gm, enumeration)
    lines = text.splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 100
    rows = inspect_convolutions(gm, enumeration)
    assert len(rows) == count
    table = [line for line in lines[: lines.index("")] if "->" in line]
    assert len(table) == count
    assert sorted(line.split("->")[0].split()[-1] for line in table) == sorted(
        row.geometry.split("->")[0].split()[-1] for row in rows
    )


def test_rows_say_how_far_merges_reach():
    gm, enumeration = analysed(Residual(), IMAGES)
    stem, conv1, conv2, head = inspect_convolutions(gm, enumeration)
    assert (stem.geometry, stem.size, stem.span) == ("3x3 p1 3->8", (8, 12, 12), 3)
    assert stem.merges_with == ("conv1", "conv2")
    assert conv1.merges_with == ("stem", "conv2")
    assert dict(conv1.candidates) == {"merge": 7, "bypass": 1, "drop": 1}
    assert conv2.unexplained is None
    assert (dict(head.candidates), head.merges_with, head.span) == ({}, (), 0)
    for row in (stem, conv1, conv2, head):
        own = [site for site in enumeration.sites if row.name in (*site.candidate.kept, *site.candidate.bypassed)]
        assert sum(row.candidates.values()) == len(own)
        assert row.refusals == tuple(each for each in enumeration.refusals if each.convolution == row.name)


@pytest.mark.parametrize(
    ("model", "limits", "expected"),
    [
        (Residual(), {}, {}),
        (Gated(), {}, {}),
        (Entangled(), {}, dict.fromkeys("bcd", ("mesh", "output"))),
        (SideConvolution(), {}, {"embed.1": ("side-input", "embed.1")}),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, {"0": ("alone", "0")}),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)),
            {"max_kernel": 3},
            {"2": ("kernel-cap", "2")},
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), {"method": "depth"}, {"0": ("alone", "0")}),
    ],
)
def test_what_nothing_explains_gets_a_reason(model, limits, expected):
    gm, enumeration = analysed(model, IMAGES, **limits)
    found = unexplained(gm, enumeration)
    assert {name: (each.code, each.node) for name, each in found.items()} == expected
    assert all(name == each.convolution and each.reason for name, each in found.items())
    told = {name for site in enumeration.sites for name in (*site.candidate.kept, *site.candidate.bypassed)}
    told |= {each.convolution for each in enumeration.refusals}
    assert told | found.keys() == {node_id(node) for node, _ in convolutions(gm)}
    assert not told & found.keys()


def test_the_reason_of_a_lone_convolution_is_true():
    def reason(model, **limits):
        (found,) = unexplained(*analysed(model, IMAGES, **limits)).values()
        return found.reason

    changed = "there is nothing to merge it with, and it changes the shape 3x12x12 to 4x10x10"
    assert reason(nn.Sequential(nn.Conv2d(3, 4, 3))) == changed
    stays = "there is nothing to merge it with, and it may not be removed here"
    assert reason(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), method="depth") == stays


def test_a_convolution_that_sees_no_image_says_so():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.image = nn.Conv1d(1, 2, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x, v):
            return self.image(x), self.conv(v[:, None])

    gm, enumeration = analysed(Vector(), (IMAGES, torch.zeros(2, 5)))
    found = unexplained(gm, enumeration)["conv"]
    assert (found.code, found.reason) == ("not-spatial", "no image-like input (three or more axes) reaches it")


def test_the_legend_names_each_reason_once():
    def refuse(k, reason, code="gate"):
        return Refusal(code, f"conv{k}", f"block.{k}/mul", reason)

    same = [refuse(k, f"block.{k}/mul multiplies two values") for k in range(5)]
    assert legend(same[:1]) == ["gate  block.0/mul multiplies two values: block.0/mul"]
    assert legend([*same[:2], same[0]]) == ["gate  ... multiplies two values: block.0/mul, block.1/mul"]
    assert legend(same) == ["gate  ... multiplies two values: block.0/mul, block.1/mul, block.2/mul and 2 more"]
    quoted = [refuse(k, f"its mode is {mode!r}", "padding-mode") for k, mode in enumerate(("reflect", "circular"))]
    assert legend(quoted) == ["padding-mode  its mode is ...: block.0/mul, block.1/mul"]
    assert legend(quoted[1:]) == ["padding-mode  its mode is 'circular': block.1/mul"]
    lines = legend([*same, *quoted[:1], refuse(9, "a sentence of its own")], width=50)
    assert lines == [
        "gate          ... multiplies two values:",
        "              block.0/mul, block.1/mul,",
        "              block.2/mul and 2 more",
        "              a sentence of its own: block.9/mul",
        "padding-mode  its mode is 'reflect': block.0/mul",
    ]
    assert legend([]) == []


def test_json_has_the_rows_and_the_totals():
    gm, enumeration = analysed(Entangled(), IMAGES)
    data = json.loads(json.dumps(inspection_json(gm, enumeration)))
    assert data["totals"] == {"convolutions": 4, "candidates": {}, "refusals": {"mesh": 1}}
    assert data["tree"].startswith("Series\n  input 3x12x12\n")
    a, b = data["convolutions"][:2]
    assert a == {
        "name": "a",
        "geometry": "1x1 3->4",
        "size": [4, 12, 12],
        "candidates": {},
        "merges_with": [],
        "span": 0,
        "refusals": [{"code": "mesh", "node": "output", "reason": enumeration.refusals[0].reason}],
        "unexplained": None,
    }
    assert b["refusals"] == []
    assert b["unexplained"]["code"] == "mesh"
