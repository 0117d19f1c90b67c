"""The modules that specs of :mod:`random_specs` describe: ordinary ``nn.Module`` classes, as users write them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from random_specs import (
    Act,
    Block,
    Blocks,
    Conv,
    Fork,
    Gate,
    InPlace,
    Links,
    LongSkip,
    Network,
    Norm,
    Plain,
    Pool,
    Split,
    Streams,
    Time,
    Transposed,
    Twice,
)
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "PLAIN", "Example", "build", "call", "inputs"]

Example: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"
"""What the network takes, as :func:`fxmerge.capture` does: a tensor, positional or keyword inputs."""

EMBEDDING = 3
"""Numbers that a time embedding has for each image."""


class _Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Timed(nn.Module):
    """A module whose forward pass takes the time embedding too; None where the network has none."""


class _Chain(_Timed):
    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        for step in self.steps:
            x = step(x, t) if isinstance(step, _Timed) else step(x)
        return x


def _chain(blocks: Blocks, x: Tensor, *more: Block) -> _Chain:
    """The modules of blocks, and of some that follow, for inputs like ``x``."""
    steps: list[nn.Module] = []
    for block in (*blocks, *more):
        steps.append(_module(block, x))
        x = _apply(steps[-1], x)
    return _Chain(steps)


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of ``x``, which is not written to."""
    value: Tensor = module(x.clone(), x.new_zeros(2, EMBEDDING)) if isinstance(module, _Timed) else module(x.clone())
    return value


def _module(block: Block, x: Tensor) -> nn.Module:
    return _MAKERS[type(block)](block, x)


def _nd(name: str, x: Tensor) -> Any:
    """``nn.Conv2d`` for ``Conv`` and a batch of images."""
    return getattr(nn, f"{name}{x.ndim - 2}d")


def _convolution(spec: Conv, x: Tensor) -> nn.Module:
    channels, size = x.shape[1], x.shape[2:]
    dims = len(size)
    stride, dilation = spec.stride[:dims], spec.dilation[:dims]
    out = spec.out
    if spec.groups == "depth":
        out = 2 * channels if out > 6 and channels < 4 else channels
    groups = {"one": 1, "two": 1 if channels % 2 or out % 2 else 2, "depth": channels}[spec.groups]
    kernel = tuple(k if d * (k - 1) < n else 1 for k, d, n in zip(spec.kernel, dilation, size, strict=False))
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    half = tuple(e // 2 for e in extents)
    padding: Any = {
        "half": half,
        "more": tuple(p + 1 for p in half),
        "same": "same" if max(stride) == 1 else half,
    }.get(spec.padding, 0)
    mode = spec.mode if spec.padding == "half" else "zeros"
    conv: nn.Module = _nd("Conv", x)(
        channels, out, kernel, stride, padding, dilation, groups, spec.bias, padding_mode=mode
    )
    if spec.padding != "front":
        return conv
    totals = [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(size, stride, extents, strict=True)]
    amounts = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return nn.Sequential(_Fn(lambda y: F.pad(y, amounts)), conv)


def _transposed(_spec: Transposed, x: Tensor) -> nn.Module:
    module: nn.Module = _nd("ConvTranspose", x)(x.shape[1], x.shape[1], 3, 2, padding=1)
    return module if max(x.shape[2:]) <= 8 else nn.Identity()


class _LayerNorm(nn.Module):
    """A layer norm over the channels, with them brought to the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return value


class _HandNorm(nn.Module):
    """A layer norm over the channels, written out."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight


def _norm(spec: Norm, x: Tensor) -> nn.Module:
    channels, dims = x.shape[1], x.ndim - 2
    kind = "batch" if "instance" in spec.kind and math.prod(x.shape[2:]) == 1 else spec.kind
    makers: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: _nd("BatchNorm", x)(channels),
        "plain batch": lambda: _nd("BatchNorm", x)(channels, eps=1e-3, affine=False),
        "own batch": lambda: _nd("BatchNorm", x)(channels, track_running_stats=False),
        "group": lambda: nn.GroupNorm(1 if channels % 2 else 2, channels),
        "instance": lambda: _nd("InstanceNorm", x)(channels),
        "affine instance": lambda: _nd("InstanceNorm", x)(channels, affine=True),
        "layer": lambda: _LayerNorm(channels),
        "hand": lambda: _HandNorm(channels, dims),
    }
    return makers[kind]()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "in-place relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "relu6": nn.ReLU6,
    "hardswish, in place": lambda: nn.Hardswish(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2, inplace=True),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "prelu": nn.PReLU,
    "mish": nn.Mish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": lambda: nn.ELU(0.7),
    "celu": lambda: nn.CELU(0.7),
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "hardtanh": lambda: nn.Hardtanh(-2.0, 2.0),
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
    "softshrink": nn.Softshrink,
    "tanhshrink": nn.Tanhshrink,
    "hardshrink": nn.Hardshrink,
    "threshold": lambda: nn.Threshold(0.1, 0.0),
    "rrelu": nn.RReLU,
    "F.relu": lambda: _Fn(F.relu),
    "F.relu_": lambda: _Fn(F.relu_),
    "relu_()": lambda: _Fn(lambda x: x.relu_()),
    "F.silu": lambda: _Fn(F.silu),
    "F.elu, in place": lambda: _Fn(lambda x: F.elu(x, inplace=True)),
    "sigmoid_()": lambda: _Fn(lambda x: x.sigmoid_()),
    "clamp": lambda: _Fn(lambda x: x.clamp(0, 6)),
    "clamp, below": lambda: _Fn(lambda x: x.clamp(min=0)),
    "clamp_min": lambda: _Fn(lambda x: torch.clamp_min(x, 0.0)),
    "clamp_()": lambda: _Fn(lambda x: x.clamp_(-1, 1)),
    "x * sigmoid(x)": lambda: _Fn(lambda x: x * torch.sigmoid(x)),
    "x.sigmoid() * x": lambda: _Fn(lambda x: x.sigmoid() * x),
    "x.mul_(sigmoid(x))": lambda: _Fn(lambda x: x.mul_(x.sigmoid())),
    "x * sigmoid(1.702 x)": lambda: _Fn(lambda x: x * torch.sigmoid(1.702 * x)),
    "x * relu6(x + 3) / 6": lambda: _Fn(lambda x: x * F.relu6(x + 3) / 6),
    "x * (clamp(x + 3) / 6)": lambda: _Fn(lambda x: x * ((x + 3).clamp(0, 6) / 6)),
    "relu6(x + 3) / 6": lambda: _Fn(lambda x: F.relu6(x + 3.0) / 6.0),
    "x * tanh(softplus(x))": lambda: _Fn(lambda x: x * torch.tanh(F.softplus(x))),
    "gelu by erf": lambda: _Fn(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "max(x, 0.1 x)": lambda: _Fn(lambda x: torch.maximum(x, 0.1 * x)),
    "where": lambda: _Fn(lambda x: torch.where(x > 0, x, 0.1 * x)),
    "relu squared": lambda: _Fn(lambda x: F.relu(x) ** 2),
    "abs": lambda: _Fn(torch.abs),
}


def _pool(spec: Pool, x: Tensor) -> nn.Module:
    kernel = min(spec.kernel, *x.shape[2:])
    padding = min(spec.padding, kernel // 2)
    if spec.kind == "max":
        pool: nn.Module = _nd("MaxPool", x)(kernel, spec.stride, padding, ceil_mode=spec.ceil)
    elif spec.kind == "avg":
        pool = _nd("AvgPool", x)(kernel, spec.stride, padding, spec.ceil, spec.count_pad)
    else:
        return _Blur(x, spec.stride)
    return pool


class _Blur(nn.Module):
    """A fixed filter of every channel, its weights a buffer."""

    taps: Tensor

    def __init__(self, x: Tensor, stride: int) -> None:
        super().__init__()
        taps = one = torch.tensor([1.0, 2.0, 1.0]) / 4
        for _ in range(x.ndim - 3):
            taps = taps[..., None] * one
        self.register_buffer("taps", taps.expand(x.shape[1], 1, *taps.shape).clone())
        self.stride = stride
        self.convolve: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.convolve(x, self.taps, stride=self.stride, padding=1, groups=x.shape[1])
        return value


class _LayerScale(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _shuffled(x: Tensor) -> Tensor:
    """Channels of two halves taken in turns, as ShuffleNet does."""
    batch, channels = x.shape[:2]
    return x.view(batch, 2, channels // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape) if channels % 2 == 0 else x


def _linear_mode(x: Tensor) -> str:
    return ("linear", "bilinear", "trilinear")[x.ndim - 3]


def _upsample(x: Tensor, mode: str) -> nn.Module:
    mode = _linear_mode(x) if mode == "linear" else mode
    return nn.Upsample(scale_factor=2, mode=mode) if max(x.shape[2:]) <= 8 else nn.Identity()


def _function(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], nn.Module]:
    return lambda _: _Fn(function)


PLAIN: dict[str, Callable[[Tensor], nn.Module]] = {
    "dropout": lambda _: nn.Dropout(0.3),
    "dropout of channels": lambda x: _nd("Dropout", x)(0.3),
    "identity": lambda _: nn.Identity(),
    "layer scale": lambda x: _LayerScale((x.shape[1], *[1] * (x.ndim - 2))),
    "layer scale with a batch axis": lambda x: _LayerScale((1, x.shape[1], *[1] * (x.ndim - 2))),
    "one scale": lambda _: _LayerScale(()),
    "number": _function(lambda x: 0.7 * x),
    "offset": _function(lambda x: x + 0.3),
    "shuffle": _function(_shuffled),
    "flip": _function(lambda x: x.flip(1)),
    "pad": _function(lambda x: F.pad(x, (2, 1))),
    "pad by a constant": _function(lambda x: F.pad(x, (1, 0), value=0.5)),
    "replicate": _function(lambda x: F.pad(x, (1, 1) * (x.ndim - 2), "replicate")),
    "up, nearest": lambda x: _upsample(x, "nearest"),
    "up, linear": lambda x: _upsample(x, "linear"),
    "x + x": _function(lambda x: x + x),
    "x * x": _function(lambda x: x * x),
    "x beside x": _function(lambda x: torch.cat([x, x], 1)),
    "relu(x) beside relu(-x)": _function(lambda x: torch.cat([F.relu(x), F.relu(-x)], 1)),
}
"""Operations by name: what makes the module for values like the one given."""


class _Time(_Timed):
    def __init__(self, channels: int, dims: int, how: str) -> None:
        super().__init__()
        self.project = nn.Linear(EMBEDDING, 2 * channels if how == "scale and shift" else channels)
        self.ones = [1] * dims
        self.how = how

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        assert t is not None
        projected: Tensor = self.project(F.silu(t) if self.how == "silu" else t)
        if self.how == "view":
            return projected.view(x.shape[0], -1, *self.ones) + x
        projected = projected[(...,) + (None,) * len(self.ones)]
        if self.how == "scale and shift":
            scale, shift = projected.chunk(2, dim=1)
            return x * (1 + scale) + shift
        return x + projected


def _time(spec: Time, x: Tensor) -> nn.Module:
    return _Time(x.shape[1], x.ndim - 2, spec.how)


def _fitted(value: Tensor, size: torch.Size) -> Tensor:
    """Cropped or padded at the end of each axis."""
    amounts = [n for want, have in zip(reversed(size), reversed(value.shape), strict=False) for n in (0, want - have)]
    return F.pad(value, amounts) if any(amounts) else value


class _Fork(_Timed):
    def __init__(self, spec: Fork, branches: list[_Chain | None], size: torch.Size) -> None:
        super().__init__()
        self.branches = nn.ModuleList([branch for branch in branches if branch is not None])
        self.join, self.skip, self.size, self.drop_path = spec.join, spec.skip, size, spec.drop_path

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        values = [x] if self.skip else []
        values += [branch(x, t) for branch in self.branches]
        values = [_fitted(value, self.size) for value in values]
        if self.drop_path and self.training:
            keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype) > 0.3
            values[-1] = values[-1] * keep
        if self.join == "cat":
            return torch.cat(values, 1)
        return functools.reduce({"add": operator.add, "sub": operator.sub, "mul": operator.mul}[self.join], values)


def _fork(spec: Fork, x: Tensor) -> nn.Module:
    stride = 1 if spec.skip else spec.stride
    branches: list[_Chain | None] = []
    channels = x.shape[1]
    for index, blocks in enumerate(spec.branches):
        chain = _chain(blocks, x)
        found = _apply(chain, x)
        channels = found.shape[1] if not index and not spec.skip else channels
        if stride > 1 or (spec.join != "cat" and found.shape[1] != channels):
            kernel = (1, 1, 1) if index % 2 else (3, 3, 3)
            chain = _chain(blocks, x, Conv(found.shape[1] if spec.join == "cat" else channels, kernel, (stride,) * 3))
        branches.append(chain)
    sizes = [_apply(branch, x).shape[2:] for branch in branches if branch is not None]
    return _Fork(spec, branches, torch.Size(map(min, zip(*sizes, *([x.shape[2:]] if spec.skip else []), strict=True))))


class _Gate(nn.Module):
    def __init__(self, x: Tensor, how: str) -> None:
        super().__init__()
        channels = x.shape[1]
        self.pool = _nd("AdaptiveAvgPool", x)(1)
        layer: Any = nn.Linear if how == "linear" else _nd("Conv", x)
        extra = () if how == "linear" else (1,)
        self.inner = nn.Sequential(layer(channels, 2, *extra), nn.ReLU(), layer(2, channels, *extra))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            gate = torch.sigmoid(self.inner(x.mean(dim=list(range(2, x.ndim)))))
            return x * gate[(...,) + (None,) * (x.ndim - 2)]
        weights = self.inner(self.pool(x))
        return x + weights.tanh() if self.how == "sum" else x * F.hardsigmoid(weights)


def _gate(spec: Gate, x: Tensor) -> nn.Module:
    return _Gate(x, spec.how)


class _Split(_Timed):
    def __init__(self, spec: Split, inner: _Chain, size: torch.Size) -> None:
        super().__init__()
        self.inner = inner
        self.how, self.shuffle, self.size = spec.how, spec.shuffle, size

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        half = x.shape[1] // 2
        if self.how == "chunk":
            first, second = x.chunk(2, dim=1)
        elif self.how == "split":
            first, second = torch.split(x, [half, x.shape[1] - half], dim=1)
        else:
            first, second = x[:, :half], x[:, half:]
        joined = torch.cat([_fitted(self.inner(first, t), self.size), _fitted(second, self.size)], 1)
        return _shuffled(joined) if self.shuffle else joined


def _split(spec: Split, x: Tensor) -> nn.Module:
    if x.shape[1] < 2:
        return _chain(spec.inner, x)
    half = x[:, : math.ceil(x.shape[1] / 2) if spec.how == "chunk" else x.shape[1] // 2]
    inner = _chain(spec.inner, half)
    size = torch.Size(map(min, zip(x.shape[2:], _apply(inner, half).shape[2:], strict=True)))
    return _Split(spec, inner, size)


class _Links(_Timed):
    def __init__(self, steps: list[_Chain], join: str, size: torch.Size) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.join, self.size = join, size

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(_fitted(step(self.joined(values), t), self.size))
        return self.joined(values)

    def joined(self, values: list[Tensor]) -> Tensor:
        return torch.cat(values, 1) if self.join == "cat" else functools.reduce(operator.add, values)


def _links(spec: Links, x: Tensor) -> nn.Module:
    module = _Links([], spec.join, x.shape[2:])
    for blocks in spec.steps:
        value = _apply(module, x)
        more = () if spec.join == "cat" else (Conv(x.shape[1], (1, 1, 1)),)
        module.steps.append(_chain(blocks, value, *more))
    return module


class _Streams(_Timed):
    def __init__(self, spec: Streams, x: Tensor) -> None:
        super().__init__()
        channels = x.shape[1]
        convolution = _nd("Conv", x)
        self.down = convolution(channels, channels, 3, 2, 1)
        low = self.down(x)
        self.wide, self.low = _chain(spec.wide, x), _chain(spec.low, low)
        wide, low = _apply(self.wide, x), _apply(self.low, low)
        self.size = x.shape[2:]
        self.across = convolution(low.shape[1], wide.shape[1], 1)
        self.downwards = convolution(wide.shape[1], low.shape[1], 3, 2, 1)
        self.last = convolution(low.shape[1], wide.shape[1], 1)

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        low = self.low(self.down(x), t)
        wide = _fitted(self.wide(x, t), self.size)
        first = F.relu(wide + F.interpolate(self.across(low), size=self.size))
        below = self.downwards(wide)
        second = F.relu(_fitted(low, below.shape[2:]) + below)
        return first + F.interpolate(self.last(second), size=self.size)


class _LongSkip(_Timed):
    def __init__(self, spec: LongSkip, x: Tensor) -> None:
        super().__init__()
        self.size = x.shape[2:]
        downs: dict[str, Block] = {
            "max": Pool("max", 2, 2),
            "avg": Pool("avg", 2, 2),
            "conv": Conv(x.shape[1], stride=(2, 2, 2)),
        }
        self.down = _module(downs[spec.down], x)
        low = _apply(self.down, x)
        self.long_skip = _chain(spec.inner, low, *(() if spec.join == "cat" else (Conv(x.shape[1], (1, 1, 1)),)))
        channels = _apply(self.long_skip, low).shape[1]
        self.up = _nd("ConvTranspose", x)(channels, channels, 2, 2) if spec.up == "transposed" else None
        self.mode = _linear_mode(x) if spec.up == "linear" else "nearest"
        self.join = spec.join

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        low = self.long_skip(self.down(x), t)
        low = F.interpolate(low, size=self.size, mode=self.mode) if self.up is None else self.up(low)
        high = _fitted(low, self.size)
        return torch.cat([x, high], 1) if self.join == "cat" else high + x


class _Twice(_Timed):
    def __init__(self, spec: Twice, x: Tensor) -> None:
        super().__init__()
        channels = x.shape[1]
        self.shared = _chain(spec.inner, x, Conv(channels, padding="same"))
        self.how, self.size = spec.how, x.shape[2:]
        if spec.how == "tied":
            self.shared = _chain((Conv(channels), Act(), Conv(channels)), x)
            self.shared.steps[2].weight = self.shared.steps[0].weight

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        first = _fitted(self.shared(x, t), self.size)
        if self.how == "tied":
            return first
        if self.how == "row":
            value: Tensor = self.shared(F.relu(first), t)
            return value
        return first + _fitted(self.shared(torch.tanh(x), t), self.size)


class _InPlace(_Timed):
    def __init__(self, spec: InPlace, x: Tensor) -> None:
        super().__init__()
        self.in_place = _chain(spec.inner, x, Conv(x.shape[1], (1, 1, 1)))
        self.how, self.size = spec.how, x.shape[2:]

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        half = x[:, : max(1, x.shape[1] // 2)] if self.how in ("view", "part") else x
        skip = x.clone() if self.how == "clone" else x
        if self.how in ("before", "clone", "view"):
            F.relu_(x)
        elif self.how == "part":
            half.mul_(0.5)
        y = _fitted(self.in_place(x, t), self.size)
        if self.how == "after":
            y.add_(x)
            return y.relu_()
        return torch.cat([y, half], 1) if self.how == "view" else y + skip


_MAKERS: dict[type, Callable[[Any, Tensor], nn.Module]] = {
    Conv: _convolution,
    Transposed: _transposed,
    Norm: _norm,
    Act: lambda spec, _: ACTIVATIONS[spec.kind](),
    Pool: _pool,
    Plain: lambda spec, x: PLAIN[spec.kind](x),
    Time: _time,
    Fork: _fork,
    Gate: _gate,
    Split: _split,
    Links: _links,
    Streams: _Streams,
    LongSkip: _LongSkip,
    Twice: _Twice,
    InPlace: _InPlace,
}


class _Network(nn.Module):
    def __init__(self, spec: Network) -> None:
        super().__init__()
        self.spec = spec
        x = torch.zeros(2, spec.channels, *spec.size)
        self.embed = nn.Linear(spec.channels, EMBEDDING) if spec.timed and spec.time == "image" else None
        x = torch.cat([x, x], 1) if spec.second == "cat" else x
        self.stem = _chain(spec.blocks[:1], x)
        x = _apply(self.stem, x)
        self.other = _nd("Conv", x)(spec.channels, x.shape[1], 1) if spec.second == "add" else None
        self.size = x.shape[2:]
        self.body = _chain(spec.blocks[1:], x)
        self.head = nn.Linear(2 * _apply(self.body, x).shape[1], 5)

    def forward(self, image: Tensor, second: Tensor | None = None, time: Tensor | None = None) -> Any:
        spec = self.spec
        if self.embed is not None:
            time = self.embed(image.mean(dim=list(range(2, image.ndim))))
        if spec.second == "cat":
            assert second is not None
            image = torch.cat([image, second], 1)
        early = self.stem(image, time)
        if self.other is not None:
            early = early + _fitted(self.other(second), self.size)
        late = self.body(early, time)
        if spec.outputs == "map":
            return late
        axes = list(range(2, late.ndim))
        classes = self.head(torch.cat([late.mean(axes), late.amax(axes)], 1))
        if spec.outputs == "classes":
            return classes
        return (late, early) if spec.outputs == "tuple" else {"classes": classes, "features": {"early": early}}


def build(spec: Network) -> nn.Module:
    """The module of a spec, in float64 and eval mode: seeded weights, batch norms calibrated on random images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(spec.seed)
        model = _Network(spec).double().eval()
        for tensor in model.parameters():
            noise = torch.randn_like(tensor)
            if tensor.ndim < 2:
                tensor.copy_(tensor + 0.3 * noise)
            elif tensor[0].numel() > 1:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.5 + noise.abs())
        _calibrate(model, spec)
    return model


def _calibrate(model: nn.Module, spec: Network) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the cumulative average, instead of an exponential one
    model.train()
    for seed in range(3):
        call(model, inputs(spec, batch=4, seed=100 + seed))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def inputs(spec: Network, batch: int = 2, seed: int = 0) -> Example:
    """Random inputs of a spec's network, in float64."""
    generator = torch.Generator().manual_seed(1000 * seed + spec.seed % 1000)

    def image() -> Tensor:
        return torch.randn(batch, spec.channels, *spec.size, generator=generator, dtype=torch.float64)

    named: dict[str, Any] = {"image": image()}
    if spec.second != "none":
        named["second"] = image()
    if spec.timed and spec.time == "input":
        named["time"] = torch.randn(batch, EMBEDDING, generator=generator, dtype=torch.float64)
    if spec.keywords:
        return named
    if len(named) == 1:
        return image()
    positional = tuple(named.get(name) for name in ("image", "second", "time"))
    return positional if "time" in named else positional[:2]


def call(model: nn.Module, example: Example) -> Any:
    """What a network makes of an example, which is not written to, without gradients."""
    with torch.no_grad():
        if isinstance(example, dict):
            return model(**{name: value.clone() for name, value in example.items()})
        values = example if isinstance(example, tuple) else (example,)
        return model(*(None if value is None else value.clone() for value in values))
