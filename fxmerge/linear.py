"""Which operations are linear, which can be removed, and why the others are in the way.

This is the one place that knows what an operation means to a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .algebra import ConvMap, Geometry
from .graph import CONVOLUTIONS, META, attribute, is_tensor, module_of, node_id, shape_of

__all__ = [
    "AVERAGE_POOLS",
    "FREE",
    "IDEMPOTENT",
    "NORMS",
    "REMOVABLE",
    "Barrier",
    "Linear",
    "Meaning",
    "Norm",
    "Removable",
    "Side",
    "activation_after",
    "conv_geometry",
    "is_batch_norm",
    "is_constant",
    "is_filter",
    "is_joined",
    "linear_map",
    "meaning",
    "pad_sides",
    "shape_after",
    "source_of",
]

_aten = torch.ops.aten

REMOVABLE: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.LeakyReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
    nn.Softsign,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Tanhshrink,
    nn.Threshold,
    nn.Hardtanh,
    nn.LogSigmoid,
    nn.PReLU,
)
"""Activations: replacing one by the identity keeps shapes."""

FREE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
"""Modules that are the identity once the network is deployed."""

IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardshrink, nn.Threshold)
"""Activations that change nothing when applied twice."""

NORMS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Norms that compute statistics of every sample: a merge moves them behind its convolution."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_SHAPE_KEEPING = (*REMOVABLE, *FREE, *_BATCH_NORMS, *NORMS, nn.LayerNorm)
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default, torch.nn.functional.pad)
_COPIES = (_aten.contiguous.default, _aten.clone.default, _aten.alias.default, _aten.detach.default)
_FILTERS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear operation of one input, with its geometry."""

    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Removable:
    """An operation that may be replaced by the identity; ``free`` where that changes nothing in a deployed network."""

    free: bool


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over each sample, of so many channels: it may leave a segment and return behind it."""

    channels: int


@dataclass(frozen=True, slots=True)
class Side:
    """The addition of a tensor that is constant over space, such as the embedding of a time step."""

    value: fx.Node


@dataclass(frozen=True, slots=True)
class Barrier:
    """An operation that no merge may pass, with a reason code and the reason in words."""

    code: str
    reason: str


Meaning: TypeAlias = "Linear | Removable | Norm | Side | Barrier"


def meaning(gm: fx.GraphModule, node: fx.Node, shared: frozenset[str]) -> Meaning:
    """What one operation means to a merge.

    Args:
        gm: a canonical graph.
        node: the operation.
        shared: the paths of :func:`fxmerge.graph.shared_targets`.
    """
    if node.meta.get(META, {}).get("opaque"):
        return Barrier("in-place", "its storage is written in place where another view of it is read")
    module = module_of(gm, node)
    if module is None:
        return _function(node)
    if isinstance(module, FREE):
        return Removable(free=True)
    if isinstance(module, REMOVABLE) and str(node.target) not in shared:
        return Removable(free=False)
    if str(node.target) in shared:
        return Barrier(
            "shared", f"{type(module).__name__} {node.target!r} is called more than once or shares its parameters"
        )
    if isinstance(module, CONVOLUTIONS):
        return _convolution(module, node)
    if len(shape_of(node)) < 3:
        return Barrier("not-spatial", f"{type(module).__name__} works on a value without spatial axes")
    if isinstance(module, _BATCH_NORMS):
        if module.running_mean is None:
            return Barrier("batch-statistics", f"batch norm {node.target!r} keeps no running statistics")
        return Linear(_identity(node))
    if isinstance(module, NORMS):
        if getattr(module, "running_mean", None) is not None:
            return Barrier("not-linear", f"{type(module).__name__} {node.target!r} with running statistics")
        return Norm(shape_of(node)[1])
    if isinstance(module, AVERAGE_POOLS):
        return _average_pool(module, node)
    if isinstance(module, nn.ChannelShuffle):
        return Linear(Geometry.pointwise(shape_of(node)[1], shape_of(node)[1], len(shape_of(node)) - 2))
    return Barrier("not-linear", f"{type(module).__name__} is no affine shift-equivariant map")


def _identity(node: fx.Node) -> Geometry:
    return Geometry.identity(shape_of(node)[1], len(shape_of(node)) - 2)


def is_batch_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls one of torch.nn's batch norms."""
    return isinstance(module_of(gm, node), _BATCH_NORMS)


def source_of(node: fx.Node) -> fx.Node:
    """The one value that a linear, removable or side-adding operation works on, constants and side inputs aside."""
    operands = [each for each in node.all_input_nodes if not is_constant(each)] or node.all_input_nodes
    if len(operands) == 1:
        return operands[0]
    same = [each for each in operands if is_tensor(each) and shape_of(each) == shape_of(node)]
    return max(same or operands, key=lambda each: math.prod(shape_of(each)[2:]) if is_tensor(each) else 0)


def is_constant(node: fx.Node) -> bool:
    """Whether a value depends on no input of the network: a parameter, a buffer, or what little is made of them."""
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        if each.op not in ("get_attr", "call_function") or len(seen) > _LARGEST_CONSTANT:
            return False
        fresh = set(each.all_input_nodes) - seen
        seen |= fresh
        pending.extend(fresh)
    return True


_LARGEST_CONSTANT = 64
"""Operations that a constant may be made of; no network needs more, and the search stays short."""


# --- modules ----------------------------------------------------------------------------------------------------------


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, node: fx.Node) -> Meaning:
    if len(shape_of(node)) != len(module.kernel_size) + 2:
        return Barrier("not-spatial", "it works on a value without a batch axis")
    if module.padding_mode != "zeros":
        return Barrier("padding-mode", f"its padding mode is {module.padding_mode!r}, not zeros")
    return Linear(conv_geometry(module))


def conv_geometry(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    """The geometry of a convolution, as if it were padded with zeros whatever its padding mode.

    Example:
        >>> conv_geometry(nn.Conv2d(3, 8, 4, padding="same")).right
        (2, 2)
    """
    left, right = _same_sides(module.padding, module.kernel_size, module.dilation)
    return Geometry(
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.dilation),
        left,
        right,
        module.groups,
    )


def _same_sides(padding: Any, kernel: Any, dilation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each axis: of numbers, 'valid', or 'same' (the odd one after, as torch does)."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    sides = (0,) * len(kernel) if isinstance(padding, str) else tuple(padding)
    return sides, sides


def _average_pool(module: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d, node: fx.Node) -> Meaning:
    geometry = _pool_geometry(module, shape_of(node)[1], len(shape_of(node)) - 2)
    if geometry.is_padded and not module.count_include_pad:
        return Barrier("not-linear", "it averages fewer values at the border (count_include_pad=False)")
    if geometry.out_size(shape_of(source_of(node))[2:]) != shape_of(node)[2:]:
        return Barrier("not-linear", "its last windows hang over the border (ceil_mode)")
    return Linear(geometry)


def _pool_geometry(module: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d, channels: int, dims: int) -> Geometry:
    kernel, stride, padding = (_spread(each, dims) for each in (module.kernel_size, module.stride, module.padding))
    return Geometry.depthwise(channels, kernel, stride, padding, padding)


def _spread(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


# --- functions --------------------------------------------------------------------------------------------------------


def _function(node: fx.Node) -> Meaning:
    if is_tensor(node) and len(shape_of(node)) >= 3:
        if node.target in _COPIES or (node.target is _aten.slice.Tensor and _keeps_all(node)):
            return Removable(free=True)
        for recognise in (_padding, _affine, _selection, _filter):
            found = recognise(node)
            if found is not None:
                return found
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    return Barrier("not-linear", f"{name} is no affine shift-equivariant map of one value")


def _padding(node: fx.Node) -> Meaning | None:
    sides = pad_sides(node)
    if sides is not None:
        return Linear(_identity(node).padded(*sides))
    if node.target in _PADS and len(node.args) > 2 and node.args[2] not in _ZEROS:
        return Barrier("padding-mode", f"it pads with {node.args[2]!r}, not zeros")
    return None


_ZEROS = ("constant", 0, 0.0, None)


def pad_sides(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How much a zero padding adds before and after each spatial axis, None for other operations; below 0 it crops.

    A slice of neighbouring positions is a crop.
    """
    if node.target is _aten.slice.Tensor and is_tensor(node):
        return _slice_sides(node)
    if node.target not in _PADS or not is_tensor(node) or node.kwargs or len(node.args) < 2:
        return None
    amounts, options = node.args[1], node.args[2:]
    if not isinstance(amounts, (list, tuple)) or any(option not in _ZEROS for option in options):
        return None
    dims = len(shape_of(node)) - 2
    sides = [side for side in amounts if isinstance(side, int)]
    if len(sides) != len(amounts) or len(sides) > 2 * dims:
        return None
    sides += [0] * (2 * dims - len(sides))
    return tuple(reversed(sides[0::2])), tuple(reversed(sides[1::2]))


def _slice_sides(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    source = source_of(node)
    bounds = [*node.args[2:], None, None, None][:3]
    axis = node.args[1] if len(node.args) > 1 else 0
    if node.kwargs or not is_tensor(source) or not isinstance(axis, int) or not all(_is_bound(each) for each in bounds):
        return None
    size = shape_of(source)
    axis %= len(size)
    chosen = range(size[axis])[slice(*bounds)]  # type: ignore[arg-type]
    if axis < 2 or not chosen or chosen.step != 1:
        return None
    left, right = [0] * (len(size) - 2), [0] * (len(size) - 2)
    left[axis - 2], right[axis - 2] = -chosen.start, chosen.stop - size[axis]
    return tuple(left), tuple(right)


def _is_bound(value: object) -> bool:
    return value is None or isinstance(value, int)


_Numbers: TypeAlias = "tuple[Tensor | float, Tensor | float]"
_AFFINE: dict[Any, tuple[Callable[[Any], _Numbers], Callable[[Any], _Numbers] | None]] = {
    _aten.mul.Tensor: (lambda c: (c, 0.0), lambda c: (c, 0.0)),
    _aten.div.Tensor: (lambda c: (1 / c, 0.0), None),
    _aten.add.Tensor: (lambda c: (1.0, c), lambda c: (1.0, c)),
    _aten.sub.Tensor: (lambda c: (1.0, -c), lambda c: (-1.0, c)),
    _aten.rsub.Scalar: (lambda c: (-1.0, c), None),
}
"""Arithmetic with a constant c as (scale, shift): where c is the second operand, and where it is the first."""


def _affine(node: fx.Node) -> Meaning | None:
    """Arithmetic with one number for each channel, or with a tensor that is constant over space."""
    if node.target is _aten.neg.default:
        return Linear(_identity(node))
    if node.target not in _AFFINE or node.kwargs or len(node.args) != 2:
        return None
    second = _AFFINE[node.target][1]
    value = source_of(node)
    if (
        not is_tensor(value)
        or shape_of(value) != shape_of(node)
        or value.meta[META]["dtype"] != node.meta[META]["dtype"]
    ):
        return None
    other = node.args[1] if node.args[0] is value else node.args[0]
    if node.args[0] is not value and second is None:
        return None
    if isinstance(other, (int, float)):
        return Linear(_identity(node))
    if not isinstance(other, fx.Node) or other is value or not is_tensor(other):
        return None
    if is_constant(other):
        per_channel = _per_channel(shape_of(other), shape_of(node))
        reason = f"{node_id(node)} works with a constant that varies over space"
        return Linear(_identity(node)) if per_channel else Barrier("not-linear", reason)
    shape = shape_of(other)
    flat = len(shape) == len(shape_of(node)) and shape[1] == shape_of(node)[1] and math.prod(shape[2:]) == 1
    adds = node.target is _aten.add.Tensor or (node.target is _aten.sub.Tensor and node.args[0] is value)
    spatial = math.prod(shape_of(node)[2:]) > 1
    return Side(other) if flat and adds and spatial else None


def _per_channel(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a tensor broadcasts to ``whole`` with one number for each channel, or one in all."""
    aligned = (1,) * (len(whole) - len(shape)) + shape
    return all(size == 1 or (axis == 1 and size == whole[1]) for axis, size in enumerate(aligned))


def _selection(node: fx.Node) -> Meaning | None:
    """Channels chosen by a slice or by constant indices, or padded with channels of zeros."""
    if not _selects(node):
        return None
    return Linear(Geometry.pointwise(shape_of(source_of(node))[1], shape_of(node)[1], len(shape_of(node)) - 2))


def _selects(node: fx.Node) -> bool:
    if node.target is _aten.index_select.default:
        return bool(node.args[1] == 1) and isinstance(node.args[2], fx.Node) and is_constant(node.args[2])
    return _slice_of_channels(node) is not None or _channel_pads(node) is not None


def _channel_pads(node: fx.Node) -> tuple[int, int] | None:
    """Channels of zeros before and after, for a padding of nothing else."""
    if node.target not in _PADS or node.kwargs or len(node.args) < 2 or any(o not in _ZEROS for o in node.args[2:]):
        return None
    amounts: Any = node.args[1]
    spatial = 2 * (len(shape_of(node)) - 2)
    if not isinstance(amounts, (list, tuple)) or len(amounts) != spatial + 2 or any(amounts[:spatial]):
        return None
    before, after = amounts[spatial:]
    return (before, after) if isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0 else None


def _selected(gm: fx.GraphModule, node: fx.Node) -> list[int | None]:
    """For each channel of a selection the channel it is, None for zeros."""
    channels = shape_of(source_of(node))[1]
    if node.target is _aten.index_select.default:
        return [int(index) % channels for index in _value(gm, node.args[2])]
    chosen, pads = _slice_of_channels(node), _channel_pads(node)
    if pads is not None:
        return [None] * pads[0] + list(range(channels)) + [None] * pads[1]
    assert chosen is not None  # noqa: S101 - the node selects
    return list(chosen)


def _keeps_all(node: fx.Node) -> bool:
    return shape_of(source_of(node)) == shape_of(node)


def _slice_of_channels(node: fx.Node) -> range | None:
    if node.target is not _aten.slice.Tensor or node.kwargs or node.args[1:2] != (1,):
        return None
    bounds = node.args[2:]
    channels = shape_of(source_of(node))[1]
    if not all(map(_is_bound, bounds)):
        return None
    return range(channels)[slice(*(*bounds, None, None)[:3])]  # type: ignore[arg-type]


def _filter(node: fx.Node) -> Meaning | None:
    """A convolution whose weight is no module's: a buffer, such as the filter of a blur."""
    geometry = _filter_geometry(node)
    if geometry is None:
        return None
    weights = [each for each in node.args[1:3] if isinstance(each, fx.Node)]
    if not all(map(is_constant, weights)):
        return Barrier("computed-weight", "its weight is computed from the input")
    return Linear(geometry)


def is_filter(node: fx.Node) -> bool:
    """Whether the node is a convolution that is no module."""
    return node.target in _FILTERS


def _filter_geometry(node: fx.Node) -> Geometry | None:
    if node.target not in _FILTERS or node.kwargs or not isinstance(node.args[1], fx.Node):
        return None
    weight = shape_of(node.args[1])
    dims = len(weight) - 2
    given = (*node.args[3:], *_FILTER_DEFAULTS[len(node.args) - 3 :]) if len(node.args) >= 3 else _FILTER_DEFAULTS
    stride, padding, dilation, groups = given
    sides = _spread(padding, dims)
    return Geometry(
        weight[1] * groups,
        weight[0],
        weight[2:],
        _spread(stride, dims),
        _spread(dilation, dims),
        sides,
        sides,
        groups,
    )


_FILTER_DEFAULTS: tuple[Any, ...] = ((1,), (0,), (1,), 1)


# --- maps -------------------------------------------------------------------------------------------------------------


def linear_map(gm: fx.GraphModule, node: fx.Node) -> ConvMap:
    """The map of an operation whose meaning is :class:`Linear` or a free :class:`Removable`, weights included.

    Constants are computed in float64 from the present parameters and buffers.
    """
    module = module_of(gm, node)
    if isinstance(module, CONVOLUTIONS):
        return ConvMap.from_conv(module)
    channels, dims = shape_of(node)[1], len(shape_of(node)) - 2
    if isinstance(module, _BATCH_NORMS):
        return ConvMap.from_batch_norm(module, dims)
    if isinstance(module, AVERAGE_POOLS):
        geometry = _pool_geometry(module, channels, dims)
        divisor = getattr(module, "divisor_override", None)
        return ConvMap.average_pool(
            channels, geometry.kernel, geometry.stride, geometry.left, geometry.right, divisor=divisor
        )
    if isinstance(module, nn.ChannelShuffle):
        order = torch.arange(channels).view(module.groups, -1).t().flatten()
        return ConvMap.select(channels, order.tolist(), dims)
    sides = pad_sides(node)
    if sides is not None:
        return ConvMap.pad(channels, *sides)
    if _selects(node):
        return ConvMap.select(shape_of(source_of(node))[1], _selected(gm, node), dims)
    geometry_of_filter = _filter_geometry(node)
    if geometry_of_filter is not None:
        weight = _value(gm, node.args[1])
        bias = _value(gm, node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
        return ConvMap(geometry_of_filter, weight, weight.new_zeros(len(weight)) if bias is None else bias)
    return _affine_map(gm, node, channels, dims)


def _affine_map(gm: fx.GraphModule, node: fx.Node, channels: int, dims: int) -> ConvMap:
    scale: Tensor | float
    shift: Tensor | float
    if node.target is _aten.neg.default:
        scale, shift = -1.0, 0.0
    elif node.target in _AFFINE:
        first, second = _AFFINE[node.target]
        after = node.args[0] is source_of(node)
        law = first if after else second
        assert law is not None  # noqa: S101 - such an operation is not Linear
        scale, shift = law(_value(gm, node.args[1] if after else node.args[0]))
    else:
        scale, shift = 1.0, 0.0

    def per_channel(number: Tensor | float) -> Tensor:
        return torch.as_tensor(number, dtype=torch.float64).flatten().expand(channels)

    return ConvMap.scale(per_channel(scale), per_channel(shift), dims)


def _value(gm: fx.GraphModule, argument: Any) -> Any:
    """A constant operand in float64: a number as it is, a tensor from what it is made of."""
    if not isinstance(argument, fx.Node):
        return argument
    if argument.op == "get_attr":
        found = attribute(gm, str(argument.target))
        return found.detach().double() if found.is_floating_point() else found
    with torch.no_grad():
        args, kwargs = fx.map_arg((argument.args, argument.kwargs), lambda each: _value(gm, each))
        return argument.target(*args, **kwargs)  # type: ignore[operator]


def shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a module makes of ``shape`` (N, C, ...), None where that does not follow from its class.

    Example:
        >>> shape_after(nn.Conv2d(3, 8, 3, stride=2), (1, 3, 9, 9)), shape_after(nn.MaxPool2d(2), (1, 3, 8, 8))
        ((1, 8, 4, 4), None)
    """
    if isinstance(module, CONVOLUTIONS):
        geometry = conv_geometry(module)
        spatial = len(shape) == geometry.dims + 2
        return (shape[0], geometry.out_channels, *geometry.out_size(shape[2:])) if spatial else None
    return shape if isinstance(module, _SHAPE_KEEPING) else None


def activation_after(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Class name of the activation that alone reads a value, through batch norms; None for none.

    Runtimes fuse it into the convolution.
    """
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = module_of(gm, node)
        if isinstance(module, REMOVABLE):
            return type(module).__name__
        if not isinstance(module, (*_BATCH_NORMS, *FREE)):
            return None
    return None


def is_joined(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value goes, through batch norms at most, into an addition of two values alone."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if isinstance(module_of(gm, node), (*_BATCH_NORMS, *FREE)):
            continue
        return node.target is _aten.add.Tensor and len(node.all_input_nodes) == 2
    return False
