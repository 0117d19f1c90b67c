"""The algebra of convolutions against torch, in float64, borders included."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxmerge.algebra import (
    ConvMap,
    Geometry,
    add_geometries,
    add_maps,
    as_torch_pad,
    concat_geometries,
    concat_maps,
    constant_response,
    crops,
    inexact,
)
from fxmerge.errors import InexactError, UserError

TOLERANCE = 1e-10
WRONG = 1e-3
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

reproducible = settings(deadline=None, derandomize=True, max_examples=80)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Thousands of tiny convolutions: handing them to threads costs more than computing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def error(expected: Tensor, actual: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert expected.shape == actual.shape
    difference = (expected - actual).detach()
    return float(difference.abs().max() / expected.detach().abs().max())


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def with_numbers(geometry: Geometry, seed: int, *, bias: bool = True) -> ConvMap:
    """A map with random weights, and random padding values where it pads."""
    weight = randn(*geometry.weight_shape, seed=seed)
    values = randn(geometry.out_channels + geometry.in_channels, seed=seed + 1)
    shift = values[: geometry.out_channels] if bias else torch.zeros(geometry.out_channels)
    return ConvMap(geometry, weight, shift, values[geometry.out_channels :])


def conv(channels: tuple[int, int], kernel: int, *, dims: int = 1, seed: int = 0, **numbers: int) -> ConvMap:
    """A map with the same numbers on every axis, zero padding and no bias."""
    axes = {"stride": 1, "dilation": 1, "left": 0, "right": 0} | numbers
    groups = axes.pop("groups", 1)
    geometry = Geometry(*channels, (kernel,) * dims, **{k: (v,) * dims for k, v in axes.items()}, groups=groups)
    weight = randn(*geometry.weight_shape, seed=seed)
    return ConvMap(geometry, weight, torch.zeros(geometry.out_channels))


def unpadded(map_: ConvMap) -> ConvMap:
    none = (0,) * map_.geometry.dims
    return replace(map_, geometry=replace(map_.geometry, left=none, right=none))


def forced(first: ConvMap, second: ConvMap) -> ConvMap:
    """The composition that ``then`` refuses: padding moved to the entry all the same."""
    composed = first.then(unpadded(second))
    return replace(composed, geometry=first.geometry.then(second.geometry))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def geometries(draw: st.DrawFn, in_channels: int, dims: int, *, lowest: int = -2, highest: int = 3) -> Geometry:
    """Any shape: dense, grouped, depthwise, with channel multipliers, strides and crops."""

    def axes(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    groups = draw(st.sampled_from(divisors(in_channels)))
    return Geometry(
        in_channels,
        groups * draw(st.integers(1, 3)),
        kernel=axes(1, 3),
        stride=axes(1, 3),
        dilation=axes(1, 2),
        left=axes(lowest, highest),
        right=axes(lowest, highest),
        groups=groups,
    )


@st.composite
def chains(draw: st.DrawFn, length: int) -> list[ConvMap]:
    """Maps that follow one another; only the first may pad, all may crop."""
    dims = draw(st.integers(1, 3))
    channels = draw(st.sampled_from([1, 2, 4, 6]))
    maps = []
    for position in range(length):
        highest = 3 if position == 0 else 0
        geometry = draw(geometries(channels, dims, lowest=-1, highest=highest))
        channels = geometry.out_channels
        assume(channels <= 12)
        maps.append(with_numbers(geometry, draw(seeds)))
    return maps


def entry(maps: list[ConvMap], spare: int, seed: int) -> Tensor:
    """An input that gives every map of a chain an output: the smallest size, plus some."""

    def has_output(size: int, axis: int) -> bool:
        for shape in (map_.geometry for map_ in maps):
            reach = size + shape.left[axis] + shape.right[axis] - shape.extent[axis]
            size = reach // shape.stride[axis] + 1
            if size < 1:
                return False
        return True

    shape = maps[0].geometry
    size = [next(n for n in itertools.count(1) if has_output(n, axis)) + spare for axis in range(shape.dims)]
    return randn(2, shape.in_channels, *size, seed=seed)


@st.composite
def branches(draw: st.DrawFn, *, same_out: bool) -> tuple[list[ConvMap], Tensor]:
    """Maps of one input with equal strides whose output sizes agree, and that input."""
    dims = draw(st.integers(1, 3))
    channels = draw(st.sampled_from([2, 4, 6]))
    out = draw(st.sampled_from([2, 4, 6, 12]))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    stride, size, target = axes(1, 2), axes(4, 6), axes(1, 4)
    value = randn(channels, seed=draw(seeds))
    maps = []
    for _ in range(draw(st.integers(1, 3))):
        written = out if same_out else draw(st.sampled_from([2, 4, 6]))
        groups = draw(st.sampled_from(divisors(math.gcd(channels, written))))
        kernel, dilation, left, spare = axes(1, 3), axes(1, 3), axes(-2, 3), axes(0, 1)
        plain = Geometry(channels, written, kernel, stride, dilation, left, (0,) * dims, groups)
        right = tuple(
            (m - 1) * s + e - n - lft + min(t, s - 1)
            for m, s, e, n, lft, t in zip(target, stride, plain.extent, size, left, spare, strict=True)
        )
        map_ = with_numbers(replace(plain, right=right), draw(seeds))
        assert map_.geometry.out_size(size) == target
        maps.append(replace(map_, pad_value=value))
    return maps, randn(2, channels, *size, seed=draw(seeds))


# Composition


@reproducible
@given(chains(2), st.integers(0, 3), seeds)
def test_then_equals_one_after_the_other(maps: list[ConvMap], spare: int, seed: int) -> None:
    first, second = maps
    x = entry(maps, spare, seed)
    composed = first.then(second)
    assert error(second.apply(first.apply(x)), composed.apply(x)) < TOLERANCE
    assert tuple(composed.weight.shape) == composed.geometry.weight_shape
    assert composed.geometry == first.geometry.then(second.geometry)
    assert inexact(first, second) is None


@reproducible
@given(chains(3), seeds)
def test_then_is_associative(maps: list[ConvMap], seed: int) -> None:
    a, b, c = maps
    x = entry(maps, 1, seed)
    one, other = a.then(b).then(c), a.then(b.then(c))
    assert one.geometry == other.geometry
    assert error(one.weight, other.weight) < TOLERANCE
    assert error(one.bias, other.bias) < TOLERANCE
    assert error(c.apply(b.apply(a.apply(x))), one.apply(x)) < TOLERANCE


@reproducible
@given(chains(1))
def test_identity_is_neutral(maps: list[ConvMap]) -> None:
    (map_,) = maps
    shape = map_.geometry
    before = ConvMap.identity(shape.in_channels, shape.dims)
    after = ConvMap.identity(shape.out_channels, shape.dims)
    zero_padded = replace(map_, pad_value=torch.zeros(shape.in_channels))
    for same in (before.then(zero_padded), zero_padded.then(after)):
        assert same.geometry == shape
        assert torch.equal(same.weight, map_.weight)
        assert torch.equal(same.bias, map_.bias)
        assert torch.equal(same.pad_value, zero_padded.pad_value)


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        ((12, 12, 12), (12, 12, 12), 12),  # depthwise stays depthwise
        ((12, 24, 12), (24, 24, 24), 12),  # with a channel multiplier
        ((12, 12, 12), (12, 5, 1), 1),
        ((5, 12, 1), (12, 12, 12), 1),
        ((12, 12, 4), (12, 12, 6), 2),  # neither number of groups divides the other
        ((12, 24, 6), (24, 36, 12), 6),
        ((12, 24, 12), (24, 36, 4), 4),
        ((1, 1, 1), (1, 1, 1), 1),  # dense and depthwise at once
    ],
)
def test_then_of_groups(first: tuple[int, int, int], second: tuple[int, int, int], groups: int) -> None:
    a = conv(first[:2], 3, dims=2, left=1, right=1, groups=first[2])
    b = conv(second[:2], 2, dims=2, stride=2, groups=second[2], seed=1)
    x = randn(2, first[0], 9, 8, seed=2)
    assert a.then(b).geometry.groups == groups
    assert error(b.apply(a.apply(x)), a.then(b).apply(x)) < TOLERANCE


def test_then_leaves_its_operands_alone() -> None:
    a, b = conv((4, 4), 3, groups=4), conv((4, 4), 3, groups=2, seed=1)
    kept = [t.clone() for t in (a.weight, a.bias, b.weight, b.bias)]
    a.then(b)
    add_maps([a, b])
    assert all(map(torch.equal, kept, (a.weight, a.bias, b.weight, b.bias)))


@reproducible
@given(st.data(), st.integers(1, 3), st.integers(0, 3), seeds)
def test_then_is_exact_where_the_ring_is_a_constant(data: st.DataObject, dims: int, spare: int, seed: int) -> None:
    # On every axis the first has kernel 1, any stride, and no crop, or pads so much that it reads
    # nothing else beyond its output. Integers make its constant exact.
    drawn = data.draw(geometries(4, dims, lowest=0))
    wide = tuple(drawn.extent[i] - 1 + drawn.left[i] for i in range(dims))
    use_wide = data.draw(st.tuples(*[st.booleans()] * dims))
    shape = replace(
        drawn,
        kernel=tuple(k if w else 1 for k, w in zip(drawn.kernel, use_wide, strict=True)),
        left=tuple(p if w else q for p, q, w in zip(wide, drawn.left, use_wide, strict=True)),
        right=tuple(p if w else q for p, q, w in zip(wide, drawn.right, use_wide, strict=True)),
    )
    random = with_numbers(shape, seed)
    first = ConvMap(shape, *(t.mul(4).round() for t in (random.weight, random.bias, random.pad_value)))
    everywhere = first.pad_value.view(1, 4, *(1,) * dims).expand(1, 4, *shape.extent)
    constant = unpadded(first).apply(everywhere).flatten()
    second = with_numbers(data.draw(geometries(shape.out_channels, dims)), seed + 5)
    second = replace(second, pad_value=constant)
    x = entry([first, second], spare, seed + 9)
    composed = first.then(second)
    assert torch.equal(composed.pad_value, first.pad_value)
    assert error(second.apply(first.apply(x)), composed.apply(x)) < TOLERANCE


def test_inexact_says_exactly_when_the_border_is_wrong() -> None:
    """All small first maps on an axis, either side padded behind them, against all sizes."""
    counts = {True: 0, False: 0}
    cases = itertools.product([1, 2, 3], [1, 2, 3], range(-2, 4), range(-2, 4), [(1, 0), (0, 1)])
    for kernel, stride, left, right, (before, after) in cases:
        first = conv((1, 2), kernel, stride=stride, left=left, right=right)
        second = conv((2, 1), 2, left=before, right=after, seed=1)
        refusal = inexact(first, second)
        composed = first.then(second) if refusal is None else forced(first, second)
        worst = 0.0
        for size in range(7, 11):
            x = randn(1, 1, size, seed=size)
            worst = max(worst, error(second.apply(first.apply(x)), composed.apply(x)))
        assert (worst < TOLERANCE) is (refusal is None), (first, second, worst)
        assert (worst > WRONG) is (refusal is not None), (first, second, worst)
        counts[refusal is None] += 1
    assert min(counts.values()) > 50


@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["kernel", "bias", "pad value", "crop"])
def test_inner_padding_is_refused_and_wrong_at_that_border_only(kind: str, left: int, right: int) -> None:
    second = conv((3, 3), 3, dims=2, left=left, right=right, seed=1)
    first = {
        "kernel": conv((3, 3), 3, dims=2, left=1, right=1),
        "bias": replace(conv((3, 3), 1, dims=2), bias=torch.tensor([0.0, 0.5, 0.0])),
        "pad value": ConvMap.pad(3, (1, 1), (1, 1), torch.tensor([0.0, 0.0, 1.0])),
        "crop": ConvMap.pad(3, (-1, -1), (-1, -1)),
    }[kind]
    reads_on = "pads axis 0 between the maps, where .* would go on reading its input"
    other_value = "pads between the maps with a value that .* does not produce"
    message = reads_on if kind in ("kernel", "crop") else other_value
    with pytest.raises(InexactError, match=message) as caught:
        first.then(second)
    assert caught.value.code == "inner-padding"
    assert "relax" in str(caught.value)

    x = randn(2, 3, 9, 8, seed=2)
    expected, actual = second.apply(first.apply(x)), forced(first, second).apply(x)
    inner = (..., *(slice(left, n - right) for n in expected.shape[2:]))
    assert error(expected[inner], actual[inner]) < TOLERANCE
    assert error(expected, actual) > WRONG
    difference = (expected - actual)[..., left : expected.shape[-1] - right].abs().amax((0, 1, 3))
    assert [bool(difference[0] > WRONG), bool(difference[-1] > WRONG)] == [left == 1, right == 1]


def cancelling(norm: ConvMap, value: Tensor) -> list[ConvMap]:
    """A norm, and padding with ``value`` behind it written as value + pad(x - value), as graphs have it."""
    one, dims = torch.ones_like(value), norm.geometry.dims
    pad = ConvMap.pad(value.numel(), (1,) * dims, (1,) * dims)
    return [norm, ConvMap.scale(one, -value, dims), pad, ConvMap.scale(one, value, dims)]


@reproducible
@given(seeds, st.integers(1, 3), st.floats(-30, 30), st.integers(-2, 2), st.booleans())
def test_a_constant_computed_in_another_way_is_the_same_one(
    seed: int, dims: int, exponent: float, rounding: int, dense: bool
) -> None:
    norm = ConvMap.from_batch_norm(norm_of(dims, 1e-3, affine=True, seed=seed), dims)
    norm = replace(norm, weight=norm.weight * 10**exponent, bias=norm.bias * 10**exponent)
    value = norm.bias * (1 + rounding * 2.0**-52)
    first = conv((3, 4), 1, dims=dims, seed=seed) if dense else ConvMap.identity(4, dims)
    steps = [first, *cancelling(norm, value), conv((4, 2), 3, dims=dims, seed=seed + 1)]
    x = randn(2, first.geometry.in_channels, *(5,) * dims, seed=seed + 2)
    expected, total = x, ConvMap.identity(first.geometry.in_channels, dims)
    for step in steps:
        expected, total = step.apply(expected), total.then(step)
    assert error(expected, total.apply(x)) < TOLERANCE
    assert (total.geometry.left, total.geometry.right) == ((1,) * dims, (1,) * dims)
    assert not total.pad_value.any()


@reproducible
@given(seeds, st.floats(-30, 30), st.sampled_from([1e-9, -1e-9, 1e-3, 1.0]))
def test_a_constant_that_differs_is_refused_however_small(seed: int, exponent: float, share: float) -> None:
    norm = ConvMap.from_batch_norm(norm_of(2, 1e-3, affine=True, seed=seed), 2)
    norm = replace(norm, weight=norm.weight * 10**exponent, bias=norm.bias * 10**exponent, bias_size=torch.tensor(0.0))
    norm, less, pad, _ = cancelling(norm, norm.bias * (1 + share))
    first = conv((3, 4), 1, dims=2, seed=seed).then(norm).then(less)
    with pytest.raises(InexactError, match=r"with a value that .* does not produce"):
        first.then(pad)


def test_a_small_bias_is_no_rounding() -> None:
    """Against a scale such as 1 it would be; what cancelled is remembered instead."""
    tiny = replace(conv((2, 2), 1, seed=2), bias=torch.full((2,), 1e-19))
    tiny = replace(tiny, weight=tiny.weight * 1e-20)
    padded = conv((2, 2), 3, left=1, right=1)
    assert inexact(tiny, padded) is not None
    x = randn(1, 2, 6, seed=0)
    assert error(padded.apply(tiny.apply(x)), forced(tiny, padded).apply(x)) > WRONG


@reproducible
@given(st.data(), st.integers(1, 3), st.integers(0, 3), seeds, st.booleans())
def test_padding_behind_a_norm_becomes_padding_in_front_of_it(
    data: st.DataObject, dims: int, spare: int, seed: int, strided: bool
) -> None:
    norm = ConvMap.from_batch_norm(norm_of(dims, 1e-3, affine=True, seed=seed), dims)
    assume(norm.weight.abs().min() > 1e-3)
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * dims)) if strided else (1,) * dims
    norm = replace(norm, geometry=replace(norm.geometry, stride=stride), pad_value=randn(4, seed=seed + 6))
    second = with_numbers(data.draw(geometries(4, dims)), seed + 5)
    x = entry([norm, second], spare, seed + 9)
    composed = norm.then(second)
    assert error(second.apply(norm.apply(x)), composed.apply(x)) < TOLERANCE
    if second.geometry.is_padded:
        value = composed.pad_value * norm.weight.flatten() + norm.bias
        assert error(second.pad_value, value) < TOLERANCE


def test_padding_behind_a_norm_and_taken_back_in_front_of_it_cancel() -> None:
    norm = ConvMap.from_batch_norm(norm_of(2, 1e-3, affine=True, seed=0), 2)
    _, less, pad, more = cancelling(norm, randn(4, seed=7))
    bordered = less.then(pad).then(more)
    assert torch.equal(bordered.pad_value, more.bias)
    assert error(bordered.weight, pad.weight) < TOLERANCE
    assert not bordered.bias.any()


@pytest.mark.parametrize("scale", [0.0, 1e-9, float("nan")])
def test_a_padding_value_that_no_network_can_hold_is_refused(scale: float) -> None:
    norm = ConvMap.scale(torch.tensor([1.0, scale]), torch.tensor([0.0, 1.0]), dims=1)
    padded = conv((2, 2), 3, left=1, right=1)
    with pytest.raises(InexactError, match="does not produce"):
        norm.then(padded)
    # A channel without weights that makes what the padding holds is no obstacle.
    composed = norm.then(replace(padded, pad_value=torch.tensor([0.5, 1.0]))) if scale == 0 else None
    assert composed is None or torch.equal(composed.pad_value, torch.tensor([0.5, 0.0], dtype=torch.float64))


@reproducible
@given(chains(3))
def test_a_bias_is_never_larger_than_its_terms(maps: list[ConvMap]) -> None:
    a, b, c = maps
    composed = a.then(b).then(c)
    for map_ in (a, composed, add_maps([composed, composed]), concat_maps([composed, composed])):
        assert map_.bias_size.shape == map_.bias.shape
        assert bool((map_.bias_size >= map_.bias.abs()).all())
    one = a.then(ConvMap.scale(torch.ones_like(a.bias), -a.bias, a.geometry.dims))
    assert not one.bias.any()
    assert torch.equal(one.bias_size, 2 * a.bias.abs())


def test_only_the_axes_that_are_padded_matter() -> None:
    first = ConvMap(
        Geometry(2, 2, (1, 3), (1, 1), (1, 1), (0, 0), (0, 0), 1),
        randn(2, 2, 1, 3, seed=0),
        torch.zeros(2),
    )
    second = with_numbers(Geometry(2, 2, (3, 3), (1, 1), (1, 1), (1, -1), (1, 0), 1), seed=1)
    second = replace(second, pad_value=torch.zeros(2))
    x = randn(2, 2, 6, 9, seed=2)
    assert error(second.apply(first.apply(x)), first.then(second).apply(x)) < TOLERANCE


def test_then_refuses_maps_that_do_not_meet() -> None:
    for other in (conv((3, 2), 1), conv((4, 2), 1, dims=2)):
        with pytest.raises(UserError, match="cannot follow"):
            conv((2, 4), 3).then(other)
        with pytest.raises(UserError, match="cannot follow"):
            inexact(conv((2, 4), 3), other)


# Joins


@reproducible
@given(branches(same_out=True))
def test_add_equals_sum(case: tuple[list[ConvMap], Tensor]) -> None:
    maps, x = case
    expected = torch.stack([map_.apply(x) for map_ in maps]).sum(0)
    joined = add_maps(maps)
    assert joined.geometry == add_geometries([map_.geometry for map_ in maps])
    assert error(expected, joined.apply(x)) < TOLERANCE


@reproducible
@given(branches(same_out=False))
def test_concat_equals_cat(case: tuple[list[ConvMap], Tensor]) -> None:
    maps, x = case
    expected = torch.cat([map_.apply(x) for map_ in maps], dim=1)
    joined = concat_maps(maps)
    assert joined.geometry == concat_geometries([map_.geometry for map_ in maps])
    assert error(expected, joined.apply(x)) < TOLERANCE


@reproducible
@given(branches(same_out=True))
def test_crops_replace_the_padding_of_the_branches(case: tuple[list[ConvMap], Tensor]) -> None:
    maps, x = case
    shapes = [map_.geometry for map_ in maps]
    joined = add_geometries(shapes)
    padded = ConvMap.pad(joined.in_channels, joined.left, joined.right, maps[0].pad_value).apply(x)
    total = torch.zeros(())
    for map_, (left, right) in zip(maps, crops(shapes), strict=True):
        assert min(*left, *right) >= 0
        crop = ConvMap.pad(joined.in_channels, [-v for v in left], [-v for v in right])
        total = total + crop.then(unpadded(map_)).apply(padded)
    assert error(torch.stack([map_.apply(x) for map_ in maps]).sum(0), total) < TOLERANCE


@reproducible
@given(branches(same_out=True), st.integers(0, 5))
def test_a_join_has_the_smallest_output_of_its_branches_at_any_size(
    case: tuple[list[ConvMap], Tensor], more: int
) -> None:
    maps, x = case
    size = [n + more for n in x.shape[2:]]
    sizes = [map_.geometry.out_size(size) for map_ in maps]
    joined = add_geometries([map_.geometry for map_ in maps])
    assert joined.out_size(size) == tuple(map(min, zip(*sizes, strict=True)))
    highest = zip(*(map_.geometry.right for map_ in maps), strict=True)
    assert all(r <= max(own) for r, own in zip(joined.right, highest, strict=True))


def test_add_of_depthwise_and_identity_stays_depthwise() -> None:
    depthwise = conv((6, 6), 3, left=1, right=1, groups=6)
    assert add_maps([depthwise, ConvMap.identity(6, 1)]).geometry == depthwise.geometry
    grouped = conv((6, 6), 3, left=1, right=1, groups=2)
    assert add_maps([depthwise, grouped, ConvMap.identity(6, 1)]).geometry.groups == 2


def test_joins_of_different_padding_values_are_refused_and_wrong() -> None:
    one = conv((2, 2), 3, left=1, right=1)
    other = replace(conv((2, 2), 3, left=1, right=1, seed=1), pad_value=torch.tensor(1.0))
    for join in (add_maps, concat_maps):
        with pytest.raises(InexactError, match="different values") as caught:
            join([one, other])
        assert caught.value.code == "pad-values"
    x = randn(1, 2, 7, seed=2)
    wrong = add_maps([one, replace(other, pad_value=one.pad_value)])
    assert error(one.apply(x) + other.apply(x), wrong.apply(x)) > WRONG
    # One value, rounded in two ways, is one value.
    rounded = replace(other, pad_value=torch.tensor(1.0, dtype=torch.float64) + 2.0**-52)
    assert error(other.apply(x) + rounded.apply(x), add_maps([other, rounded]).apply(x)) < TOLERANCE
    # A branch that reads no padding may have any value.
    cropped = replace(conv((2, 2), 1), pad_value=torch.tensor(3.0))
    joined = add_maps([cropped, one])
    assert torch.equal(joined.pad_value, one.pad_value)
    assert error(one.apply(x) + cropped.apply(x), joined.apply(x)) < TOLERANCE


def test_joins_refuse_what_does_not_fit() -> None:
    base = Geometry.identity(2, 1)
    for other in (
        Geometry.identity(3, 1),
        Geometry.identity(2, 2),
        replace(base, stride=(2,)),
    ):
        with pytest.raises(UserError, match="cannot join"):
            add_geometries([base, other])
    with pytest.raises(UserError, match="cannot be added"):
        add_geometries([base, replace(base, out_channels=4)])
    for function in (add_geometries, concat_geometries, crops):
        with pytest.raises(UserError, match="at least one branch"):
            function([])


# Fixed filters

POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@reproducible
@given(st.data(), st.integers(1, 3), st.sampled_from([None, 1, 5]), seeds)
def test_average_pool(data: st.DataObject, dims: int, divisor: int | None, seed: int) -> None:
    def axes(low: int, high: int) -> tuple[int, ...]:
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, left, right = axes(1, 3), axes(1, 3), axes(-1, 2), axes(-1, 2)
    pool = ConvMap.average_pool(3, kernel, stride, left, right, divisor)
    assert pool.geometry == Geometry.depthwise(3, kernel, stride, left, right)
    x = entry([pool], 2, seed)
    expected = POOLS[dims](F.pad(x, as_torch_pad(left, right)), kernel, stride)
    assume(expected.any())  # not only padding is read
    if divisor is not None:
        expected = expected * math.prod(kernel) / divisor
    assert error(expected, pool.apply(x)) < TOLERANCE
    assert error(expected, shifted(pool).apply(x)) > WRONG


def test_average_pool_is_torchs_where_padding_counts() -> None:
    x = randn(2, 3, 9, 8, seed=0)
    expected = nn.AvgPool2d(3, stride=2, padding=1)(x)
    assert error(expected, ConvMap.average_pool(3, (3, 3), (2, 2), (1, 1), (1, 1)).apply(x)) < TOLERANCE
    expected = nn.AvgPool2d(3, stride=2, padding=1, divisor_override=7)(x)
    assert error(expected, ConvMap.average_pool(3, (3, 3), (2, 2), (1, 1), (1, 1), 7).apply(x)) < TOLERANCE
    assert error(expected, ConvMap.average_pool(3, (3, 3), (2, 2), (1, 1), (1, 1)).apply(x)) > WRONG


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("indices", [[0], [2, 3], [5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5], [1, 1, 0]])
def test_select(indices: list[int], dims: int) -> None:
    x = randn(2, 6, *(4,) * dims, seed=0)
    selected = ConvMap.select(6, indices, dims)
    assert selected.geometry == Geometry.pointwise(6, len(indices), dims)
    assert torch.equal(selected.apply(x), x[:, indices])
    assert not torch.equal(selected.apply(x), x[:, [4, *indices[1:]]])


def test_a_shuffle_between_grouped_convolutions_composes() -> None:
    order = [0, 3, 1, 4, 2, 5]
    first, second = conv((6, 6), 3, dims=2, left=1, right=1, groups=3), conv((6, 6), 1, dims=2, groups=2, seed=1)
    x = randn(2, 6, 7, 6, seed=2)
    composed = first.then(ConvMap.select(6, order, 2)).then(second)
    expected = second.apply(first.apply(x)[:, order])
    assert error(expected, composed.apply(x)) < TOLERANCE
    assert error(expected, first.then(second).apply(x)) > WRONG


@pytest.mark.parametrize("indices", [[3], [-1], []])
def test_select_refuses_channels_that_are_not_there(indices: list[int]) -> None:
    with pytest.raises(UserError, match=r"not all among 0 to 2|at least 1"):
        ConvMap.select(3, indices, dims=2)


# Shapes


@reproducible
@given(st.data(), st.integers(1, 3))
def test_out_size_and_macs_agree_with_torch(data: st.DataObject, dims: int) -> None:
    shape = data.draw(geometries(2, dims, lowest=0))
    shape = replace(shape, right=shape.left)
    size = data.draw(st.tuples(*[st.integers(1, 9)] * dims))
    module = CONVS[dims](
        2,
        shape.out_channels,
        shape.kernel,
        shape.stride,
        shape.left,
        shape.dilation,
        shape.groups,
    )
    if any(n + 2 * p < e for n, p, e in zip(size, shape.left, shape.extent, strict=True)):
        with pytest.raises(UserError, match="no output for the input size"):
            shape.out_size(size)
        return
    y = module(torch.zeros(1, 2, *size))
    assert shape.out_size(size) == tuple(y.shape[2:])
    assert shape.macs(size, batch=3) == 3 * y.numel() * module.weight[0].numel()


@reproducible
@given(st.data(), st.integers(1, 3))
def test_json_round_trip(data: st.DataObject, dims: int) -> None:
    shape = data.draw(geometries(4, dims))
    assert Geometry.from_json(shape.to_json()) == shape
    assert {shape: 1}[Geometry.from_json(shape.to_json())] == 1


def test_geometry_in_words() -> None:
    assert str(conv((64, 128), 3, dims=2, stride=2, left=1, right=1).geometry) == ("3x3 s2 p1 64->128")
    uneven = Geometry(8, 8, (1, 3), (1, 2), (1, 2), (0, 2), (1, -2), 4)
    assert str(uneven) == "1x3 s1x2 p0:1x2:-2 d1x2 g4 8->8"
    assert repr(uneven) == f"Geometry({uneven})"
    assert repr(ConvMap.identity(3, 1)) == "ConvMap(1 g3 3->3)"


def test_dilation_of_a_single_tap_is_one() -> None:
    assert conv((1, 1), 1, dilation=5).geometry == conv((1, 1), 1).geometry


def test_padded_adds_padding() -> None:
    shape = conv((1, 1), 3, dims=2, left=1, right=1).geometry.padded((1, 2), (-1, 0))
    assert (shape.left, shape.right) == ((2, 3), (0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "must divide the channels 4 and 6"),
        ({"kernel": (0,)}, "at least 1"),
        ({"stride": (1, 1)}, "one number per axis"),
        ({"dilation": (1.0,)}, "made of integers"),
        (dict.fromkeys(["kernel", "stride", "dilation", "left", "right"], (1,) * 4), "1, 2 or"),
    ],
)
def test_geometry_refuses_what_is_no_convolution(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(conv((4, 6), 3).geometry, **changes)


def test_wrong_entries_and_inputs_are_refused() -> None:
    map_ = conv((2, 2), 3)
    data = map_.geometry.to_json()
    with pytest.raises(UserError, match="has the entries"):
        Geometry.from_json({**data, "colour": 1})
    with pytest.raises(UserError, match="has 1 axes"):
        map_.geometry.out_size((4, 4))
    with pytest.raises(UserError, match="needs weight, bias and padding value of shapes"):
        ConvMap(map_.geometry, map_.weight[:1], map_.bias)
    for wrong in (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8, 8)):
        with pytest.raises(UserError, match="got the shape"):
            map_.apply(wrong)
    with pytest.raises(UserError, match="no output"):
        map_.apply(torch.zeros(1, 2, 2))


def test_torch_pad_order() -> None:
    x = torch.zeros(1, 1, 2, 3, 4)
    padded = nn.functional.pad(x, as_torch_pad((1, 2, 3), (10, 20, 30)))
    assert padded.shape == (1, 1, 13, 25, 37)


# Modules of torch


@reproducible
@given(st.data(), st.integers(1, 3), st.booleans(), seeds)
def test_convolution_round_trip(data: st.DataObject, dims: int, bias: bool, seed: int) -> None:
    shape = data.draw(geometries(4, dims, lowest=0))
    shape = replace(shape, right=shape.left)
    torch.manual_seed(seed)
    module = CONVS[dims](
        4,
        shape.out_channels,
        shape.kernel,
        shape.stride,
        shape.left,
        shape.dilation,
        shape.groups,
        bias=bias,
        dtype=torch.float64,
    )
    map_ = ConvMap.from_conv(module)
    assert map_.geometry == shape
    x = entry([map_], 2, seed)
    assert error(module(x), map_.apply(x)) < TOLERANCE
    back, padding = map_.to_conv(torch.float64)
    assert type(back) is type(module)
    assert padding is None
    assert torch.equal(back.weight, module.weight)
    assert error(module(x), back(x)) < TOLERANCE


@reproducible
@given(chains(1), seeds, st.booleans())
def test_to_conv_with_the_padding_it_asks_for(maps: list[ConvMap], seed: int, zero: bool) -> None:
    (map_,) = maps
    if zero:
        map_ = replace(map_, pad_value=torch.tensor(0.0))
    x = entry([map_], 2, seed)
    module, padding = map_.to_conv(torch.float64)
    shape = map_.geometry
    symmetric = shape.left == shape.right and min(shape.left) >= 0
    assert (padding is None) == (symmetric and (zero or not shape.is_padded))
    if padding is not None:
        assert padding == (shape.left, shape.right)
        x = ConvMap.pad(shape.in_channels, *padding, map_.pad_value).apply(x)
    assert error(map_.apply(entry([map_], 2, seed)), module(x)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (2, 1), (4, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str, kernel: int, dilation: int, dims: int) -> None:
    torch.manual_seed(0)
    module = CONVS[dims](2, 3, kernel, padding=padding, dilation=dilation, dtype=torch.float64)
    map_ = ConvMap.from_conv(module)
    x = randn(2, 2, *(8,) * dims, seed=1)
    assert error(module(x), map_.apply(x)) < TOLERANCE
    total = dilation * (kernel - 1) if padding == "same" else 0
    assert map_.geometry.left == (total // 2,) * dims
    assert map_.geometry.right == (total - total // 2,) * dims


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_are_refused_where_they_pad(mode: str) -> None:
    with pytest.raises(InexactError, match=mode) as caught:
        ConvMap.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode))
    assert caught.value.code == "padding-mode"
    module = nn.Conv2d(2, 2, 3, padding_mode=mode, dtype=torch.float64)
    x = randn(1, 2, 5, 5, seed=0)
    assert error(module(x), ConvMap.from_conv(module).apply(x)) < TOLERANCE


def norm_of(dims: int, eps: float, affine: bool, seed: int) -> nn.Module:
    """A batch norm whose variances are of the size of its eps, where a wrong eps shows."""
    norm = NORMS[dims](4, eps=eps, affine=affine, dtype=torch.float64).eval()
    with torch.no_grad():
        norm.running_mean.copy_(randn(4, seed=seed))
        norm.running_var.copy_(randn(4, seed=seed + 1).abs() * 1e-3)
        if affine:
            norm.weight.copy_(randn(4, seed=seed + 2))
            norm.bias.copy_(randn(4, seed=seed + 3))
    return norm


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(dims: int, eps: float, affine: bool) -> None:
    norm = norm_of(dims, eps, affine, seed=0)
    map_ = ConvMap.from_batch_norm(norm, dims)
    x = randn(2, 4, *(5,) * dims, seed=4)
    assert map_.geometry == Geometry.identity(4, dims)
    assert error(norm(x), map_.apply(x)) < TOLERANCE
    before = conv((3, 4), 3, dims=dims, left=1, right=1)
    y = randn(2, 3, *(5,) * dims, seed=5)
    assert error(norm(before.apply(y)), before.then(map_).apply(y)) < TOLERANCE


def test_batch_norm_without_running_statistics_is_refused() -> None:
    with pytest.raises(InexactError, match="no running statistics") as caught:
        ConvMap.from_batch_norm(nn.BatchNorm2d(4, track_running_stats=False), 2)
    assert caught.value.code == "batch-statistics"


def test_a_map_is_a_float64_copy_without_gradient() -> None:
    module = nn.Conv1d(2, 2, 3, dtype=torch.float64)
    map_ = ConvMap.from_conv(module)
    kept = map_.weight.clone()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    assert torch.equal(map_.weight, kept)
    assert not map_.weight.requires_grad
    single = ConvMap.from_conv(nn.Conv1d(2, 2, 3))
    assert single.weight.dtype == single.bias.dtype == single.pad_value.dtype == torch.float64


def test_apply_and_to_conv_keep_the_dtype_asked_for() -> None:
    map_ = replace(conv((2, 3), 3, left=2, right=1), pad_value=torch.tensor([0.5, 1.5]))
    x = randn(2, 2, 8, seed=1)
    assert map_.apply(x.float()).dtype == torch.float32
    assert error(map_.apply(x), map_.apply(x.float()).double()) < 1e-5
    module, _ = map_.to_conv()
    assert module.weight.dtype == module.bias.dtype == torch.float32
    assert module.weight.requires_grad


def test_maps_lie_on_the_device_asked_for() -> None:
    for map_ in (
        ConvMap.identity(3, 2, device="meta"),
        ConvMap.pad(3, (1,), (1,), torch.ones(3), device="meta"),
        ConvMap.scale(torch.ones(3, device="meta"), torch.zeros(3), 1),
    ):
        assert {t.device.type for t in (map_.weight, map_.bias, map_.pad_value)} == {"meta"}


def test_to_conv_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    conv((2, 3), 3).to_conv()
    assert torch.equal(torch.rand(3), expected)


@reproducible
@given(chains(1), seeds)
def test_constant_response(maps: list[ConvMap], seed: int) -> None:
    shape = maps[0].geometry
    left, right = (tuple(min(v, 0) for v in side) for side in (shape.left, shape.right))
    map_ = replace(maps[0], geometry=replace(shape, left=left, right=right))
    x = entry([map_], 1, seed)
    side = randn(2, map_.geometry.in_channels, seed=seed + 1)
    spread = side.reshape(*side.shape, *(1,) * map_.geometry.dims)
    added = (side @ constant_response(map_).T)[(..., *(None,) * map_.geometry.dims)]
    assert error(map_.apply(x + spread), map_.apply(x) + added) < TOLERANCE


def test_constant_response_of_a_padded_map_is_refused_and_wrong() -> None:
    padded = conv((2, 2), 3, left=1, right=1)
    with pytest.raises(InexactError) as caught:
        constant_response(padded)
    assert caught.value.code == "inner-padding"
    x, side = randn(1, 2, 6, seed=1), randn(1, 2, seed=2)
    added = side @ constant_response(unpadded(padded)).T
    assert error(padded.apply(x + side[..., None]), padded.apply(x) + added[..., None]) > WRONG


# What the checks above would catch


def mirrored(map_: ConvMap) -> ConvMap:
    return replace(map_, weight=map_.weight.flip(-1))


def shifted(map_: ConvMap) -> ConvMap:
    one = (1,) * map_.geometry.dims
    return replace(map_, geometry=map_.geometry.padded(one, [-1] * map_.geometry.dims))


def unbiased(map_: ConvMap) -> ConvMap:
    return replace(map_, bias=torch.zeros_like(map_.bias))


def shuffled(map_: ConvMap) -> ConvMap:
    return replace(map_, weight=map_.weight.flip(1))


def zero_padded(map_: ConvMap) -> ConvMap:
    return replace(map_, pad_value=torch.zeros_like(map_.pad_value))


@pytest.mark.parametrize("mutate", [mirrored, shifted, unbiased, shuffled, zero_padded])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_mutated_compositions_and_joins_are_caught(mutate, dims: int) -> None:
    shape = Geometry(4, 6, (3,) * dims, (2,) * dims, (1,) * dims, (2,) * dims, (1,) * dims, 2)
    first = with_numbers(shape, seed=0)
    second = with_numbers(replace(shape, in_channels=6, left=(0,) * dims, right=(0,) * dims), 1)
    x = randn(2, 4, *(12,) * dims, seed=2)
    for expected, actual in (
        (second.apply(first.apply(x)), first.then(second)),
        (first.apply(x) * 2, add_maps([first, first])),
        (torch.cat([first.apply(x)] * 2, 1), concat_maps([first, first])),
    ):
        assert error(expected, actual.apply(x)) < TOLERANCE
        assert error(expected, mutate(actual).apply(x)) > WRONG


def test_a_dropped_eps_is_caught() -> None:
    norm = norm_of(2, 1e-3, affine=True, seed=0)
    x = randn(2, 4, 5, 5, seed=4)
    expected = norm(x)
    for eps in (0.0, 1e-5):
        norm.eps = eps
        assert error(expected, ConvMap.from_batch_norm(norm, 2).apply(x)) > WRONG


def test_a_missed_crop_is_caught() -> None:
    """An identity skip beside a padded convolution, cropped on the wrong side."""
    maps = [conv((2, 2), 3, left=1, right=1), ConvMap.identity(2, 1)]
    shapes = [map_.geometry for map_ in maps]
    joined = add_geometries(shapes)
    x = randn(2, 2, 8, seed=1)
    expected = maps[0].apply(x) + x
    padded = ConvMap.pad(2, joined.left, joined.right).apply(x)
    left, right = crops(shapes)[1]
    assert (left, right) == ((1,), (1,))
    branch = unpadded(maps[0]).apply(padded)
    assert error(expected, branch + ConvMap.pad(2, (-1,), (-1,)).apply(padded)) < TOLERANCE
    assert error(expected, branch + ConvMap.pad(2, (0,), (-2,)).apply(padded)) > WRONG


def test_a_missed_offset_in_a_join_is_caught() -> None:
    maps = [conv((2, 2), 3, left=1, right=1), conv((2, 2), 1, seed=1)]
    x = randn(2, 2, 8, seed=2)
    expected = maps[0].apply(x) + maps[1].apply(x)
    misplaced = [maps[0], shifted(maps[1])]
    assert error(expected, add_maps(maps).apply(x)) < TOLERANCE
    assert error(expected, add_maps(misplaced).apply(x)) > WRONG
