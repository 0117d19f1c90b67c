"""Which operations are linear, which can be removed, and why the others are in the way.

This is the one place that knows what an operation means to a merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx, nn

from .algebra import ConvMap, Geometry
from .graph import CONVOLUTIONS, META, is_tensor, module_of, shape_of

__all__ = [
    "FREE",
    "IDEMPOTENT",
    "REMOVABLE",
    "Barrier",
    "Linear",
    "Meaning",
    "Removable",
    "activation_after",
    "conv_geometry",
    "linear_map",
    "meaning",
    "pad_sides",
    "shape_after",
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
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
    nn.Hardtanh,
    nn.LogSigmoid,
    nn.PReLU,
)
"""Activations: replacing one by the identity keeps shapes."""

FREE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
"""Modules that are the identity once the network is deployed."""

IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
"""Activations that change nothing when applied twice."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SHAPE_KEEPING = (*REMOVABLE, *FREE, *_BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default, torch.nn.functional.pad)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear operation of one input, with its geometry."""

    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Removable:
    """An operation that may be replaced by the identity; ``free`` where that changes nothing in a deployed network."""

    free: bool


@dataclass(frozen=True, slots=True)
class Barrier:
    """An operation that no merge may pass, with a reason code and the reason in words."""

    code: str
    reason: str


Meaning: TypeAlias = "Linear | Removable | Barrier"


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
    if isinstance(module, _BATCH_NORMS):
        if module.running_mean is None:
            return Barrier("batch-statistics", f"batch norm {node.target!r} keeps no running statistics")
        if len(shape_of(node)) < 3:
            return Barrier("not-spatial", f"batch norm {node.target!r} works on a value without spatial axes")
        return Linear(Geometry.identity(shape_of(node)[1], len(shape_of(node)) - 2))
    return Barrier("not-linear", f"{type(module).__name__} is no affine shift-equivariant map")


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
    dims = len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        left = tuple(t // 2 for t in total)
        right = tuple(t - t // 2 for t in total)
    else:
        left = right = (0,) * dims if isinstance(module.padding, str) else tuple(module.padding)
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


def _function(node: fx.Node) -> Meaning:
    sides = pad_sides(node)
    if sides is not None:
        left, right = sides
        return Linear(Geometry.identity(shape_of(node)[1], len(left)).padded(left, right))
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    return Barrier("not-linear", f"{name} is no affine shift-equivariant map of one value")


def pad_sides(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How much a zero padding adds before and after each spatial axis, None for other operations; below 0 it crops."""
    if node.target not in _PADS or not is_tensor(node) or node.kwargs or len(node.args) < 2:
        return None
    amounts, options = node.args[1], node.args[2:]
    if not isinstance(amounts, (list, tuple)) or any(option not in ("constant", 0, 0.0, None) for option in options):
        return None
    dims = len(shape_of(node)) - 2
    sides = [side for side in amounts if isinstance(side, int)]
    if len(sides) != len(amounts) or len(sides) > 2 * dims:
        return None
    sides += [0] * (2 * dims - len(sides))
    return tuple(reversed(sides[0::2])), tuple(reversed(sides[1::2]))


def linear_map(gm: fx.GraphModule, node: fx.Node) -> ConvMap:
    """The map of an operation whose meaning is :class:`Linear` or a free :class:`Removable`, weights included."""
    module = module_of(gm, node)
    if isinstance(module, CONVOLUTIONS):
        return ConvMap.from_conv(module)
    dims = len(shape_of(node)) - 2
    if isinstance(module, _BATCH_NORMS):
        return ConvMap.from_batch_norm(module, dims)
    sides = pad_sides(node)
    if sides is not None:
        return ConvMap.pad(shape_of(node)[1], *sides)
    return ConvMap.identity(shape_of(node)[1], dims)


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
