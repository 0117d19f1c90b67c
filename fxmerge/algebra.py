"""The algebra of convolutions: affine, shift-equivariant maps in one, two or three dimensions.

Everything here is one formula. Along each axis a map with kernel k, stride s, dilation d and left
padding L computes

    y[o] = b + sum_j W[j] x[o*s - L + j*d],    j = 0 .. k-1,

where x is a constant outside its range (zero unless said otherwise). Right padding R only decides
how many outputs there are: ``floor((n + L + R - e) / s) + 1`` for n inputs, where the extent e is
``d*(k-1) + 1``. Negative padding crops.

:class:`Geometry` is the shape of such a map and holds all integer rules; :class:`ConvMap` adds the
numbers, in float64. Maps compose (:meth:`ConvMap.then`), add (:func:`add_maps`) and stack
(:func:`concat_maps`), and the result is again one such map, that is, one convolution. Nothing here
knows of graphs. What cannot be exact is refused with an :class:`~fxmerge.errors.InexactError`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fxmerge.errors import InexactError, UserError

__all__ = [
    "Conv",
    "ConvMap",
    "Geometry",
    "Sides",
    "add_geometries",
    "add_maps",
    "as_torch_pad",
    "concat_geometries",
    "concat_maps",
    "constant_response",
    "crops",
    "inexact",
]

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""A convolution module of torch in one, two or three dimensions."""

Sides: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Padding or crop before and after, each with one number per axis."""

_CONV_CLASSES: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

_ROUNDING = 1e-12
"""Two float64 values are taken for one where they differ by less than this share of the terms that they are sums of."""

_LARGEST_PAD = 1e4
"""Bound on a padding value that a composition chooses; the largest number of half precision is 65504."""


@dataclass(frozen=True, slots=True, repr=False)
class Geometry:
    """The shape of a map without its weights: hashable, so it keys tables.

    An axis whose kernel is 1 has no dilation; it is stored as 1, so that equal maps have equal
    geometries.

    Attributes:
        in_channels: Channels read.
        out_channels: Channels written.
        kernel: Taps per axis.
        stride: Input steps per output step, per axis.
        dilation: Input steps between taps, per axis.
        left: Padding before each axis; negative crops.
        right: Padding after each axis; negative crops.
        groups: Blocks of channels that do not mix, as in ``torch.nn.Conv2d``.

    Raises:
        UserError: The numbers describe no convolution.

    Example:
        >>> stem = Geometry(3, 64, (7, 7), (2, 2), (1, 1), (3, 3), (3, 3), 1)
        >>> stem
        Geometry(7x7 s2 p3 3->64)
        >>> stem.out_size((224, 224))
        (112, 112)
        >>> stem.then(stem.identity(64, dims=2)) == stem
        True
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        axes = (self.kernel, self.stride, self.dilation, self.left, self.right)
        if not 1 <= self.dims <= 3 or len({len(axis) for axis in axes}) != 1:
            raise UserError(
                "a geometry needs one number per axis, for 1, 2 or 3 axes, in each of kernel, "
                f"stride, dilation, left and right; got {', '.join(map(str, axes))}"
            )
        channels = (self.in_channels, self.out_channels, self.groups)
        positive = (*channels, *self.kernel, *self.stride, *self.dilation)
        if not all(isinstance(number, int) for number in (*positive, *self.left, *self.right)):
            raise UserError(f"a geometry is made of integers; got {asdict(self)}")
        if min(positive) < 1:
            raise UserError(f"channels, groups, kernel, stride and dilation must be at least 1; got {asdict(self)}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise UserError(f"groups={self.groups} must divide the channels {self.in_channels} and {self.out_channels}")
        dilation = tuple(d if k > 1 else 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        object.__setattr__(self, "dilation", dilation)

    @property
    def dims(self) -> int:
        """Number of axes: 1, 2 or 3."""
        return len(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        """Input positions that one output spans, per axis: d*(k-1) + 1."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def is_padded(self) -> bool:
        """Whether any side has positive padding, so that the map may read beyond its input."""
        return max(*self.left, *self.right) > 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as torch stores it: (out_channels, in_channels / groups, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @staticmethod
    def identity(channels: int, dims: int) -> Geometry:
        """The geometry of the map that changes nothing: kernel 1, each channel its own group."""
        ones, zeros = (1,) * dims, (0,) * dims
        return Geometry.depthwise(channels, ones, ones, zeros, zeros)

    @staticmethod
    def depthwise(
        channels: int, kernel: Sequence[int], stride: Sequence[int], left: Sequence[int], right: Sequence[int]
    ) -> Geometry:
        """The geometry of a filter without dilation that keeps channels apart, such as average pooling.

        Example:
            >>> Geometry.depthwise(8, (3, 3), (2, 2), (1, 1), (1, 1))
            Geometry(3x3 s2 p1 g8 8->8)
        """
        ones = (1,) * len(kernel)
        return Geometry(
            channels, channels, tuple(kernel), tuple(stride), ones, tuple(left), tuple(right), groups=channels
        )

    @staticmethod
    def pointwise(in_channels: int, out_channels: int, dims: int) -> Geometry:
        """The geometry of a map that mixes all channels and looks at no neighbour: kernel 1, one group.

        Example:
            >>> Geometry.pointwise(8, 4, dims=2)
            Geometry(1x1 8->4)
        """
        ones, zeros = (1,) * dims, (0,) * dims
        return Geometry(in_channels, out_channels, ones, ones, ones, zeros, zeros, groups=1)

    def out_size(self, in_size: Sequence[int]) -> tuple[int, ...]:
        """Output size per axis for an input size per axis.

        Raises:
            UserError: The number of axes differs, or an axis would have no output.
        """
        if len(in_size) != self.dims:
            raise UserError(f"{self!r} has {self.dims} axes, the input size {tuple(in_size)} has {len(in_size)}")
        axes = zip(in_size, self.left, self.right, self.extent, self.stride, strict=True)
        size = tuple((n + left + right - e) // s + 1 for n, left, right, e, s in axes)
        if min(size) < 1:
            raise UserError(f"{self!r} has no output for the input size {tuple(in_size)}; use a larger input")
        return size

    def then(self, second: Geometry) -> Geometry:
        """The geometry of this map followed by another.

        Putting one index into the other gives s = s1*s2, L = L1 + s1*L2 and the extent
        e = e1 + s1*(e2-1). R = R1 + s1*R2 then gives the same output size for every input size,
        because nested floors of divisions are one floor. The taps lie on a grid of step
        d = gcd(d1 if k1 > 1, s1*d2 if k2 > 1). Blocks of channels that neither map mixes stay:
        groups = gcd(g1, g2). All this says nothing about the border, where a composition may be
        inexact; :func:`inexact` does.

        Raises:
            UserError: Channels or number of axes do not fit together.
        """
        if self.dims != second.dims or self.out_channels != second.in_channels:
            raise UserError(f"{second!r} cannot follow {self!r}: channels and number of axes must agree")
        kernel, dilation = [], []
        extents = zip(self.extent, second.extent, strict=True)
        for axis, (s1, (e1, e2)) in enumerate(zip(self.stride, extents, strict=True)):
            reach = e1 - 1 + s1 * (e2 - 1)
            taps = (self.kernel[axis], self.dilation[axis])
            spread = (second.kernel[axis], s1 * second.dilation[axis])
            step = _grid([taps, spread], [])
            kernel.append(1 + reach // step)
            dilation.append(step)

        def at_entry(own: tuple[int, ...], later: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + s * b for a, s, b in zip(own, self.stride, later, strict=True))

        return Geometry(
            self.in_channels,
            second.out_channels,
            kernel=tuple(kernel),
            stride=tuple(a * b for a, b in zip(self.stride, second.stride, strict=True)),
            dilation=tuple(dilation),
            left=at_entry(self.left, second.left),
            right=at_entry(self.right, second.right),
            groups=math.gcd(self.groups, second.groups),
        )

    def padded(self, left: Sequence[int], right: Sequence[int]) -> Geometry:
        """This geometry with so much more padding before and after each axis of its input."""
        return replace(
            self,
            left=tuple(a + b for a, b in zip(self.left, left, strict=True)),
            right=tuple(a + b for a, b in zip(self.right, right, strict=True)),
        )

    def macs(self, in_size: Sequence[int], batch: int = 1) -> int:
        """Multiply-accumulates for a batch of inputs of this size, padding counted, bias not.

        Raises:
            UserError: See :meth:`out_size`.
        """
        return batch * math.prod(self.out_size(in_size)) * math.prod(self.weight_shape)

    def to_json(self) -> dict[str, int | list[int]]:
        """Plain data: numbers and lists under the names of the attributes."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Geometry:
        """The inverse of :meth:`to_json`.

        Raises:
            UserError: Names are missing or unknown, or the numbers describe no convolution.
        """
        names = {entry.name for entry in fields(Geometry)}
        if set(data) != names:
            raise UserError(f"a geometry has the entries {sorted(names)}; got {sorted(data)}")
        entries: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return Geometry(**entries)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.kernel))]
        if set(self.stride) != {1}:
            parts.append(f"s{_short(self.stride)}")
        if any(self.left) or any(self.right):
            sides = zip(self.left, self.right, strict=True)
            pads = [a if a == b else f"{a}:{b}" for a, b in sides]
            parts.append(f"p{_short(pads)}")
        if set(self.dilation) != {1}:
            parts.append(f"d{_short(self.dilation)}")
        if self.groups > 1:
            parts.append(f"g{self.groups}")
        return " ".join([*parts, f"{self.in_channels}->{self.out_channels}"])

    def __repr__(self) -> str:
        return f"Geometry({self})"


def _short(values: Sequence[int | str]) -> str:
    """One value if all axes agree, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _grid(kernels: Sequence[tuple[int, int]], offsets: Sequence[int]) -> int:
    """The coarsest grid that holds all taps of (kernel, dilation) pairs and all offsets, or 1."""
    return math.gcd(*(dilation for kernel, dilation in kernels if kernel > 1), *offsets) or 1


def _join(geometries: Sequence[Geometry]) -> Geometry:
    """Kernel, dilation and padding of the join of maps that read the same input.

    Channels and groups are the first map's. A branch keeps its taps: seen from L = max L_i they
    start at L - L_i. For R write a = L + R - e, so that a map has floor((n + a) / s) + 1 outputs.
    The branches agree on that number at the captured size; the smallest a_i gives it, and at any
    other size gives that of the smallest branch. Hence R = min(a_i) + e - L, at most max R_i.
    """
    if not geometries:
        raise UserError("a join needs at least one branch")
    if len({(g.dims, g.stride, g.in_channels) for g in geometries}) != 1:
        raise UserError(f"{', '.join(map(repr, geometries))} cannot join: axes, stride and input channels must agree")
    kernel, dilation, left, right = [], [], [], []
    for axis in range(geometries[0].dims):
        start = max(g.left[axis] for g in geometries)
        reach = max(start - g.left[axis] + g.extent[axis] - 1 for g in geometries)
        offsets = [start - g.left[axis] for g in geometries]
        step = _grid([(g.kernel[axis], g.dilation[axis]) for g in geometries], offsets)
        slack = min(g.left[axis] + g.right[axis] - g.extent[axis] for g in geometries)
        kernel.append(1 + reach // step)
        dilation.append(step)
        left.append(start)
        right.append(slack + reach + 1 - start)
    return replace(
        geometries[0],
        kernel=tuple(kernel),
        dilation=tuple(dilation),
        left=tuple(left),
        right=tuple(right),
    )


def add_geometries(geometries: Sequence[Geometry]) -> Geometry:
    """The geometry of a sum of maps that read the same input.

    L = max L_i. The taps of branch i start at L - L_i, on a grid of step d, the gcd of dilations
    and these offsets: k = 1 + max(L - L_i + e_i - 1) / d. groups = gcd: an identity or depthwise
    branch has as many groups as channels, so it never restricts the others. With
    R = min(L_i + R_i - e_i) + e - L the output size stays. That the output sizes of the branches
    agree at the captured input size is the caller's to check: it cannot be seen here.

    Raises:
        UserError: No branch, or axes, strides or channels that differ.

    Example:
        >>> conv = Geometry(8, 8, (3, 3), (1, 1), (2, 2), (2, 2), (2, 2), 1)
        >>> add_geometries([conv, Geometry.identity(8, dims=2)])
        Geometry(3x3 p2 d2 8->8)
    """
    joined = _join(geometries)
    if len({g.out_channels for g in geometries}) != 1:
        raise UserError(f"maps to different channels cannot be added: {', '.join(map(repr, geometries))}")
    return replace(joined, groups=math.gcd(*(g.groups for g in geometries)))


def concat_geometries(geometries: Sequence[Geometry]) -> Geometry:
    """The geometry of maps that read the same input and stack their output channels.

    As :func:`add_geometries`, but the result has one group, unless there is a single branch: each
    branch with groups writes all of its blocks one after the other, so that in the stack the blocks
    of one input block no longer lie next to each other.

    Raises:
        UserError: No branch, or axes, strides or input channels that differ.
    """
    joined = _join(geometries)
    if len(geometries) == 1:
        return joined
    return replace(joined, out_channels=sum(g.out_channels for g in geometries), groups=1)


def crops(geometries: Sequence[Geometry]) -> tuple[Sides, ...]:
    """How much each branch of a fork-join crops from a commonly padded entry.

    Where the entry is padded by the join's L and R, branch i runs without padding on what is left
    after cropping L - L_i before and (e - L) - (e_i - L_i) after each axis. Neither is negative,
    and an identity skip crops too.

    Returns:
        Per branch the numbers before and after, each per axis.

    Raises:
        UserError: No branch, or axes, strides or input channels that differ.

    Example:
        >>> conv = Geometry(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1)
        >>> crops([conv, Geometry.identity(8, dims=2)])
        (((0, 0), (0, 0)), ((1, 1), (1, 1)))
    """
    joined = _join(geometries)
    after = [e - left for e, left in zip(joined.extent, joined.left, strict=True)]
    return tuple(
        (
            tuple(total - own for total, own in zip(joined.left, g.left, strict=True)),
            tuple(total - e + own for total, e, own in zip(after, g.extent, g.left, strict=True)),
        )
        for g in geometries
    )


def as_torch_pad(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Padding per axis as ``torch.nn.functional.pad`` wants it.

    The last axis comes first, before and after in turn.

    Example:
        >>> as_torch_pad((1, 2), (3, 4))
        [2, 4, 1, 3]
    """
    return [side for pair in zip(reversed(left), reversed(right), strict=True) for side in pair]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ConvMap:
    """An affine, shift-equivariant map.

    A convolution, batch norm, scale, padding, crop, identity, or any composition of them.

    Attributes:
        geometry: Its shape.
        weight: float64, ``geometry.weight_shape``.
        bias: float64, (out_channels,).
        pad_value: float64, (in_channels,): what the input is taken to be where the padding lies. A
            single number serves all channels; default 0.
        bias_size: float64, (out_channels,): the absolute values of all terms that ``bias`` was computed as a sum
            of, summed, never less than ``|bias|``, which is the default. What rounding left of a bias that cancels is
            small against this, not against the bias.

    Tensors are detached and converted to float64 on the weight's device; no method writes to them.

    Raises:
        UserError: A tensor's shape does not fit the geometry.

    Example:
        >>> conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        >>> norm = nn.BatchNorm2d(8, eps=1e-3)
        >>> ConvMap.from_conv(conv).then(ConvMap.from_batch_norm(norm, dims=2))
        ConvMap(3x3 p1 4->8)
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor
    pad_value: Tensor = field(default_factory=lambda: torch.zeros(()))
    bias_size: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        weight = self.weight.detach().to(torch.float64)
        bias, pad_value = self.bias.detach().to(weight), self.pad_value.detach().to(weight)
        if pad_value.dim() == 0:
            pad_value = pad_value.expand(self.geometry.in_channels)
        shapes = tuple(map(tuple, (weight.shape, bias.shape, pad_value.shape)))
        wanted = (
            self.geometry.weight_shape,
            (self.geometry.out_channels,),
            (self.geometry.in_channels,),
        )
        if shapes != wanted:
            raise UserError(f"{self!r} needs weight, bias and padding value of shapes {wanted}; got {shapes}")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "pad_value", pad_value)
        object.__setattr__(self, "bias_size", torch.maximum(bias.abs(), self.bias_size.detach().to(weight)))

    def __repr__(self) -> str:
        return f"ConvMap({self.geometry})"

    @staticmethod
    def identity(channels: int, dims: int, *, device: torch.device | str | None = None) -> ConvMap:
        """The map that changes nothing; its tensors lie on ``device``, default the CPU."""
        ones = torch.ones(channels, device=device)
        return ConvMap.scale(ones, torch.zeros_like(ones), dims)

    @staticmethod
    def pad(
        channels: int,
        left: Sequence[int],
        right: Sequence[int],
        value: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> ConvMap:
        """The map that pads before and after each axis, and crops where a number is negative.

        Args:
            channels: Channels in and out.
            left: Positions added before each axis.
            right: Positions added after each axis.
            value: What they hold, (channels,) or one number; default 0.
            device: Where the map's tensors lie; default the CPU.
        """
        plain = ConvMap.identity(channels, len(left), device=device)
        fill = torch.zeros(()) if value is None else value
        return ConvMap(plain.geometry.padded(left, right), plain.weight, plain.bias, fill)

    @staticmethod
    def scale(scale: Tensor, shift: Tensor, dims: int) -> ConvMap:
        """The map ``x * scale + shift`` with one number each per channel."""
        geometry = Geometry.identity(scale.numel(), dims)
        return ConvMap(geometry, scale.reshape(geometry.weight_shape), shift)

    @staticmethod
    def average_pool(
        channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        left: Sequence[int],
        right: Sequence[int],
        divisor: int | None = None,
    ) -> ConvMap:
        """The map that sums each channel over a window and divides by a fixed number.

        This is torch's average pooling where every window is divided by the same number: padding counts as zeros
        (``count_include_pad``) and no window is cut short at the end (``ceil_mode``).

        Args:
            channels: Channels in and out.
            kernel: Window size per axis.
            stride: Step of the window per axis.
            left: Padding before each axis.
            right: Padding after each axis.
            divisor: What the sum is divided by; default the number of positions in the window.

        Example:
            >>> ConvMap.average_pool(1, (2,), (2,), (0,), (0,)).apply(torch.tensor([[[1.0, 3.0, 5.0, 5.0]]]))
            tensor([[[2., 5.]]])
        """
        geometry = Geometry.depthwise(channels, kernel, stride, left, right)
        share = 1 / (math.prod(kernel) if divisor is None else divisor)
        weight = torch.full(geometry.weight_shape, share, dtype=torch.float64)
        return ConvMap(geometry, weight, torch.zeros(channels))

    @staticmethod
    def select(channels: int, indices: Sequence[int | None], dims: int) -> ConvMap:
        """The map whose output channel i is input channel ``indices[i]``, zeros for None.

        Slices, shuffles, repeats and paddings of channels.

        Raises:
            UserError: An index is not one of the channels, or there is none.

        Example:
            >>> ConvMap.select(3, [2, None, 0], dims=1).apply(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten()
            tensor([3., 0., 1.])
        """
        geometry = Geometry.pointwise(channels, len(indices), dims)
        if not all(index is None or 0 <= index < channels for index in indices):
            raise UserError(f"the channels {list(indices)} are not all among 0 to {channels - 1}")
        rows = torch.eye(channels + 1, channels)  # the last one is zeros
        weight = rows[[channels if index is None else index for index in indices]].reshape(geometry.weight_shape)
        return ConvMap(geometry, weight, torch.zeros(len(indices)))

    @staticmethod
    @torch.no_grad()
    def from_conv(module: Conv) -> ConvMap:
        """The map of a convolution module, a copy of its present weights.

        ``padding="same"`` pads d*(k-1) positions, the odd one after, as torch does.

        Raises:
            InexactError: Code ``padding-mode``: it pads with something else than zeros.
        """
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        if module.padding == "valid":
            left = right = (0,) * len(kernel)
        elif module.padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            left, right = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        else:
            left = right = tuple(int(side) for side in module.padding)
        geometry = Geometry(
            module.in_channels,
            module.out_channels,
            kernel,
            stride=tuple(module.stride),
            dilation=dilation,
            left=left,
            right=right,
            groups=module.groups,
        )
        if geometry.is_padded and module.padding_mode != "zeros":
            raise InexactError(
                "padding-mode",
                f"{module} pads with values of its input ({module.padding_mode}); "
                "only padding with a constant keeps a composition one convolution",
            )
        weight = module.weight.to(torch.float64, copy=True)
        bias = weight.new_zeros(module.out_channels) if module.bias is None else module.bias.to(weight, copy=True)
        return ConvMap(geometry, weight, bias)

    @staticmethod
    @torch.no_grad()
    def from_batch_norm(module: _BatchNorm, dims: int) -> ConvMap:
        """The map of a batch norm in eval mode, with its own eps and running statistics.

        It is ``(x - mean) / sqrt(var + eps) * weight + bias``.

        Args:
            module: Any batch norm of torch that has running statistics, affine or not.
            dims: Axes of the tensors that it works on.

        Raises:
            InexactError: Code ``batch-statistics``: it has no running statistics, so it is not
                linear.
        """
        if module.running_mean is None or module.running_var is None:
            raise InexactError(
                "batch-statistics",
                f"{module} has no running statistics: it normalises each batch by itself, which is not linear",
            )
        mean = module.running_mean.to(torch.float64)
        scale = (module.running_var.to(torch.float64) + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.to(torch.float64)
        shift = -mean * scale
        size = shift.abs()
        if module.bias is not None:
            offset = module.bias.to(torch.float64)
            shift, size = shift + offset, size + offset.abs()
        return replace(ConvMap.scale(scale, shift, dims), bias_size=size)

    @torch.no_grad()
    def then(self, second: ConvMap) -> ConvMap:
        """This map followed by another, as one map; the padding of both moves to its entry.

        Raises:
            InexactError: Code ``inner-padding``, see :func:`inexact`.
            UserError: Channels or number of axes do not fit together.
        """
        pad_value = _composed_pad_value(self, second)
        if isinstance(pad_value, InexactError):
            raise pad_value
        geometry = self.geometry.then(second.geometry)
        bias = second.bias + _respond(second, self.bias)
        bias_size = second.bias_size + _respond(_absolute(second), self.bias_size)
        return ConvMap(geometry, _compose(self, second, geometry), bias, pad_value, bias_size)

    @torch.no_grad()
    def apply(self, x: Tensor) -> Tensor:
        """The map's output for an input (N, in_channels, *size), in its dtype and on its device.

        Raises:
            UserError: The input has other channels or axes, or is too small.
        """
        geometry = self.geometry
        if x.dim() != geometry.dims + 2 or x.shape[1] != geometry.in_channels:
            raise UserError(
                f"{self!r} reads inputs (N, {geometry.in_channels}, *size) with {geometry.dims} "
                f"axes in size; got the shape {tuple(x.shape)}"
            )
        geometry.out_size(x.shape[2:])
        zeros = [0] * geometry.dims
        convolved: Tensor = torch.convolution(
            self._pad_entry(x),
            self.weight.to(x),
            self.bias.to(x),
            geometry.stride,
            zeros,
            geometry.dilation,
            False,
            zeros,
            geometry.groups,
        )
        return convolved

    def _pad_entry(self, x: Tensor) -> Tensor:
        """The input with its padding around it and its crops taken off."""
        left, right = self.geometry.left, self.geometry.right
        # Padding comes before cropping: a crop may reach into the padding of the opposite side.
        grow = as_torch_pad([max(side, 0) for side in left], [max(side, 0) for side in right])
        shrink = as_torch_pad([min(side, 0) for side in left], [min(side, 0) for side in right])
        padded = F.pad(x, grow)
        if self.geometry.is_padded and self.pad_value.any():
            ring = F.pad(x.new_zeros(x.shape[2:]), grow, value=1.0)
            padded = padded + self.pad_value.to(x).view(-1, *(1,) * self.geometry.dims) * ring
        return F.pad(padded, shrink)

    @torch.no_grad()
    def to_conv(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> tuple[Conv, Sides | None]:
        """The map as a ``torch.nn`` convolution with bias, and the padding it needs in front.

        Args:
            dtype: Of its parameters.
            device: Of its parameters; default: where the map's tensors are.

        Returns:
            The module, and None where its own padding suffices. Otherwise, for padding that is
            negative, differs between the two sides of an axis, or has a value other than zero, the
            module has no padding and (left, right) belongs in front of it, filled with
            ``pad_value``.
        """
        geometry = self.geometry
        plain = not (geometry.is_padded and self.pad_value.any())
        inside = plain and geometry.left == geometry.right and min(geometry.left) >= 0
        # Without initialisation: drawing random weights would advance the caller's random state.
        module: Conv = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            _CONV_CLASSES[geometry.dims],
            geometry.in_channels,
            geometry.out_channels,
            geometry.kernel,
            stride=geometry.stride,
            padding=geometry.left if inside else 0,
            dilation=geometry.dilation,
            groups=geometry.groups,
            dtype=dtype,
            device=self.weight.device if device is None else device,
        )
        module.load_state_dict({"weight": self.weight, "bias": self.bias})
        return module, None if inside else (geometry.left, geometry.right)


def inexact(first: ConvMap, second: ConvMap) -> InexactError | None:
    """Why ``first.then(second)`` would not be exact, as a value, or None where it is.

    A crop in the second map is always exact, and so is a padded first map before an unpadded
    second. Padding of the second map is exact where the first, evaluated beyond its output, would
    itself produce what the second pads with. There the first reads nothing but its own padding if
    L1 + s1 >= e1 on the left and R1 + 1 >= e1 on the right: it produces a constant, which has to be
    the second's ``pad_value``. A first map of kernel 1, of any stride, reads so unless it crops; one
    that crops would bring back what it cropped.

    The two constants may differ by what rounding in float64 makes of one value that was computed in
    two ways: by 1e-12 of the absolute values of the terms of their sums. So zeros are what is
    produced by a batch norm from which its own response to zero was subtracted, though the
    difference is not 0.

    A first map that is not padded never reads its own padding value. One that keeps channels apart, such as a
    batch norm, therefore gets the value of which it makes what the second pads with, as long as that is at
    most 1e4, which half precision can hold.

    Returns:
        An error with code ``inner-padding``, not raised.

    Raises:
        UserError: Channels or number of axes do not fit together.
    """
    found = _composed_pad_value(first, second)
    return found if isinstance(found, InexactError) else None


def _composed_pad_value(first: ConvMap, second: ConvMap) -> Tensor | InexactError:
    """What the composition pads with, or why it is not exact; see :func:`inexact`."""
    one, two = first.geometry, second.geometry
    one.then(two)
    if not two.is_padded:
        return first.pad_value
    for axis, extent in enumerate(one.extent):
        before = two.left[axis] > 0 and one.left[axis] + one.stride[axis] < extent
        after = two.right[axis] > 0 and one.right[axis] + 1 < extent
        if before or after:
            return InexactError(
                "inner-padding",
                f"{two!r} pads axis {axis} between the maps, where {one!r} before it would go on "
                "reading its input; move the padding to the entry (relax does) or keep the two "
                "apart",
            )
    beyond = _respond(first, first.pad_value) + first.bias
    size = _respond(_absolute(first), first.pad_value.abs()) + first.bias_size + second.pad_value.abs()
    same = _agree(beyond, second.pad_value, size)
    if same.all():
        return first.pad_value
    if not one.is_padded and one.groups == one.in_channels == one.out_channels:
        value = torch.where(same, first.pad_value, (second.pad_value - first.bias) / _sum_taps(first).flatten())
        if (value.abs() <= _LARGEST_PAD).all():
            return value
    return InexactError(
        "inner-padding",
        f"{two!r} pads between the maps with a value that {one!r} before it does not produce "
        "from its own padding, for example zeros behind a bias; move the padding to the entry "
        "(relax does) or keep the two apart",
    )


@torch.no_grad()
def add_maps(maps: Sequence[ConvMap]) -> ConvMap:
    """The sum of maps that read the same input, as one map; see :func:`add_geometries`.

    Raises:
        InexactError: Code ``pad-values``: padded branches fill their padding with different values.
        UserError: No branch, or axes, strides or channels that differ.
    """
    geometry = add_geometries([branch.geometry for branch in maps])
    weight = maps[0].weight.new_zeros(geometry.weight_shape)
    for branch in maps:
        weight += _place(branch, geometry)
    bias = torch.stack([branch.bias for branch in maps]).sum(0)
    bias_size = torch.stack([branch.bias_size for branch in maps]).sum(0)
    return ConvMap(geometry, weight, bias, _common_pad_value(maps), bias_size)


@torch.no_grad()
def concat_maps(maps: Sequence[ConvMap]) -> ConvMap:
    """Maps that read the same input, outputs stacked along the channels, as one map.

    See :func:`concat_geometries`.

    Raises:
        InexactError: Code ``pad-values``: padded branches fill their padding with different values.
        UserError: No branch, or axes, strides or input channels that differ.
    """
    geometry = concat_geometries([branch.geometry for branch in maps])
    weight = torch.cat([_place(branch, geometry) for branch in maps])
    bias = torch.cat([branch.bias for branch in maps])
    bias_size = torch.cat([branch.bias_size for branch in maps])
    return ConvMap(geometry, weight, bias, _common_pad_value(maps), bias_size)


@torch.no_grad()
def constant_response(conv: ConvMap) -> Tensor:
    """What the map makes of an input that is constant over space: the weight summed over its taps.

    A tensor c of shape (N, in_channels, 1, 1) added to the map's input adds ``c @ response.T`` to
    every position of its output, provided that every output reads c at every tap. It does not where
    padding is read, since the padding is not added to.

    Raises:
        InexactError: Code ``inner-padding``: the map is padded.
    """
    if conv.geometry.is_padded:
        raise InexactError(
            "inner-padding",
            f"{conv!r} is padded: what a constant input adds differs at the border; "
            "move the padding to the entry (relax does)",
        )
    return _regroup(_sum_taps(conv), conv.geometry.groups, 1)


def _sum_taps(conv: ConvMap) -> Tensor:
    """The weight summed over its taps: (out_channels, in_channels / groups)."""
    return conv.weight.flatten(2).sum(2)


def _respond(conv: ConvMap, value: Tensor) -> Tensor:
    """The map without bias at an input of one value per channel everywhere: (out_channels,)."""
    groups = conv.geometry.groups
    blocks = _sum_taps(conv).reshape(groups, -1, conv.weight.shape[1])
    return (blocks @ value.reshape(groups, -1, 1)).flatten()


def _absolute(conv: ConvMap) -> ConvMap:
    """The map with the absolute values of its weights: it carries sizes of terms along."""
    return replace(conv, weight=conv.weight.abs())


def _agree(value: Tensor, other: Tensor, size: Tensor) -> Tensor:
    """Where two values are one up to rounding, given the size of the terms that they are sums of."""
    return (value - other).abs() <= _ROUNDING * size


def _regroup(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The weight (out, in / groups, ...) with fewer groups, zero between the old ones."""
    if groups == fewer:
        return weight
    merged = groups // fewer
    blocks = weight.reshape(fewer, merged, -1, *weight.shape[1:])
    dense = blocks.new_zeros(fewer, merged, blocks.shape[2], merged, *blocks.shape[3:])
    dense.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
    return dense.flatten(0, 2).flatten(1, 2)


def _window(offsets: Sequence[int], taps: Geometry, target: Geometry) -> tuple[Any, ...]:
    """The index of a kernel's taps in a larger kernel, from the input offset per axis."""
    axes = zip(offsets, taps.extent, taps.dilation, target.dilation, strict=True)
    slices = [slice(o // d, (o + e - 1) // d + 1, max(own // d, 1)) for o, e, own, d in axes]
    return (..., *slices)


def _place(conv: ConvMap, joined: Geometry) -> Tensor:
    """A branch's weight with the kernel and the groups of its join."""
    geometry = conv.geometry
    placed = conv.weight.new_zeros(geometry.out_channels, *joined.weight_shape[1:])
    offsets = [total - own for total, own in zip(joined.left, geometry.left, strict=True)]
    window = _window(offsets, geometry, joined)
    placed[window] = _regroup(conv.weight, geometry.groups, joined.groups)
    return placed


def _common_pad_value(maps: Sequence[ConvMap]) -> Tensor:
    """The value that all padded branches pad with, up to rounding; the others never read theirs."""
    padded = [branch for branch in maps if branch.geometry.is_padded] or list(maps[:1])
    value = padded[0].pad_value
    for branch in padded[1:]:
        if not _agree(branch.pad_value, value, value.abs()).all():
            raise InexactError(
                "pad-values",
                f"{padded[0]!r} and {branch!r} join but pad with different values; one convolution pads with one",
            )
    return value


def _compose(first: ConvMap, second: ConvMap, result: Geometry) -> Tensor:
    """The weight of a composition: each tap of the second map times all taps of the first.

    The products run per group of one of the two maps, so that zeros between groups are neither
    stored nor multiplied; only where neither number of groups divides the other is the first map
    filled up to the groups of the result.
    """
    one, two, groups = first.geometry, second.geometry, result.groups
    # The batch axis is the groups of the first map where the second mixes all of a result group,
    # else those of the second.
    by_first = two.groups == groups
    if by_first:
        share = one.groups // groups
        inner = first.weight.reshape(one.groups, -1, *first.weight.shape[1:])
        rows = second.weight.reshape(groups, -1, share, inner.shape[1], *two.kernel)
        outer = rows.transpose(1, 2).flatten(0, 1)
    else:
        dense = _regroup(first.weight, one.groups, groups)
        inner = dense.reshape(two.groups, -1, *dense.shape[1:])
        outer = second.weight.reshape(two.groups, -1, *second.weight.shape[1:])
    total = inner.new_zeros(*outer.shape[:2], inner.shape[2], *result.kernel)
    flat = inner.flatten(2)
    for tap in itertools.product(*map(range, two.kernel)):
        index: tuple[Any, ...] = (..., *tap)
        offsets = [j * s * d for j, s, d in zip(tap, one.stride, two.dilation, strict=True)]
        window = _window(offsets, one, result)
        total[window] += (outer[index] @ flat).reshape(total[window].shape)
    if by_first:
        total = total.reshape(groups, share, *total.shape[1:]).transpose(1, 2)
    return total.reshape(result.weight_shape)
