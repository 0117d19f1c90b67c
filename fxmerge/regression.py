"""Fitting convolutions to what they should give: ridge regression on the patches of their input, in closed form.

One :class:`Regression` serves all convolutions that read the same value with the same stride, dilation and groups: the
patches of a smaller kernel are columns of those of a larger one, whatever the target. Of the patches P and targets T of
the images, less their means, one of three systems is solved for a ridge of strength r:

- the normal equations (P'P + r I) W = P'T, accumulated in float64, chunk by chunk;
- where there are fewer rows than unknowns, the dual (P P' + r I) A = T, W = P' A;
- where neither matrix fits into memory, the normal equations by conjugate gradients, never formed.

Rows are drawn at random, fifteen for an unknown at most, from no more images than it takes to have four times as many
output pixels, but 64: what many images are needed for is a late layer of few pixels. A ridge draws towards zero and towards
prior weights; images that no system has seen choose between strengths, and between all of these and the prior weights
as they are. With fewer than five rows for an unknown fitted weights have to be better than the prior ones by one part in 1 + n,
n being the number of those images; where there are none but the fitted ones they are not installed.

Where something is added to the convolution's output that is linear in a side input, one value for all pixels of an image (a time
embedding), its matrix is fitted together with the convolution: side inputs are more columns of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import Geometry, as_torch_pad

__all__ = [
    "ENOUGH_IMAGES",
    "FEW_ROWS",
    "STRENGTHS",
    "Fit",
    "Inputs",
    "Pairs",
    "Regression",
    "Wanted",
    "patches",
    "window_of",
]

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that are tried, as shares of the mean diagonal of P'P."""

FEW_ROWS = 5.0
"""Rows per unknown below which a fit says little about other images than those it has seen."""

_ENOUGH_ROWS = 15.0
_HELD_OUT_ROWS = 2048
_ENOUGH_PIXELS = 4
"""Output pixels for each row that is drawn: neighbours are much alike."""
ENOUGH_IMAGES = 64
"""That are looked at in any case, if there are so many."""
_CHUNK = 2**26
"""Bytes of patches that are gathered at once."""
_BLOCK = 512
"""Columns of a symmetric matrix that are computed at once, from the diagonal down: the rest is its mirror image."""
_STEPS, _PATIENCE = 60, 5
"""Most steps of conjugate gradients, and how many of them may pass without less error on the held-out images."""

Inputs: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""What a convolution reads, (N, C, *size), or that and its side inputs, (N, S)."""


class Wanted(NamedTuple):
    """A convolution to fit.

    Attributes:
        geometry: of it.
        number: of its target.
        weight: prior weights, as torch shapes them.
        bias: prior biases.
        side: prior matrix (out_channels, S) of the side inputs, if there are any.
    """

    geometry: Geometry
    number: int
    weight: Tensor
    bias: Tensor
    side: Tensor | None = None


class Pairs(Protocol):
    """Batches that can be read again: inputs, and for every target (N, out_channels, *out_size)."""

    def __len__(self) -> int:
        """How many batches."""
        ...

    def __iter__(self) -> Iterator[tuple[Inputs, Sequence[Tensor]]]:
        """The batches, in the same order every time."""
        ...


@dataclass(frozen=True, slots=True)
class Fit:
    """The better of fitted and prior weights, by their errors on held-out images.

    Errors are shares of the variance of the target: 0 is perfect, 1 is no better than the mean.

    Attributes:
        weight: float64, shaped as torch's.
        bias: float64, one for each output channel.
        error: of these weights.
        prior_error: of the prior weights.
        rows_per_unknown: output pixels that were fitted for each weight of an output channel.
        strength: of the ridge; None where the prior weights are better.
        side: float64 (out_channels, S), of the side inputs if there are any.
    """

    weight: Tensor
    bias: Tensor
    error: float
    prior_error: float
    rows_per_unknown: float
    strength: float | None
    side: Tensor | None = None


def window_of(geometries: Sequence[Geometry]) -> Geometry | None:
    """The smallest geometry whose patches hold those of all others as columns; None if they do not share a grid.

    Its ``out_channels`` are those of the first.

    Example:
        >>> small = Geometry(8, 8, (3,), (1,), (1,), (1,), (1,), 1)
        >>> window_of([small, Geometry(8, 16, (5,), (1,), (1,), (2,), (2,), 1)])
        Geometry(5 p2 8->8)
    """
    first = geometries[0]
    if any((g.in_channels, g.stride, g.groups) != (first.in_channels, first.stride, first.groups) for g in geometries):
        return None
    axes = []
    for axis in range(first.dims):
        steps = {g.dilation[axis] for g in geometries if g.kernel[axis] > 1}
        left = max(g.left[axis] for g in geometries)
        step = max(steps, default=1)
        if len(steps) > 1 or any((left - g.left[axis]) % step for g in geometries):
            return None
        taps = [(left - g.left[axis]) // step + g.kernel[axis] for g in geometries]
        if len({g.left[axis] + g.right[axis] - g.extent[axis] for g in geometries}) > 1:
            return None
        right = max(taps) - taps[0]
        axes.append((max(taps), step, left, first.right[axis] + step * right))
    kernel, dilation, left_sides, right_sides = (tuple(each) for each in zip(*axes, strict=True))
    return Geometry(
        first.in_channels, first.out_channels, kernel, first.stride, dilation, left_sides, right_sides, first.groups
    )


class Regression:
    """Everything that convolutions at one input are fitted from.

    Args:
        window: geometry that holds those of all fits (:func:`window_of`); its output channels do not matter.
        fitted: images to fit.
        held_out: images to choose by.
        memory: bound on matrices and stored patches, in bytes.
    """

    def __init__(self, window: Geometry, fitted: Pairs, held_out: Pairs, memory: int = 2**31) -> None:
        self.window = window
        self.memory = memory
        self._fitted = fitted
        counted = _Counted(held_out)
        self._held_out = list(_rows(window, counted, _HELD_OUT_ROWS))
        self._images = counted.images
        self.patch = math.prod(window.weight_shape[1:])
        self.unknowns = self._held_out[0][0].shape[2]  # those of a patch, and of side inputs
        self._spread = [
            max(float((t - t.mean(1, keepdim=True)).square().sum()), 1e-15 * float(t.square().sum()), 1e-30)
            for t in (torch.cat([targets[i].double() for _, targets in self._held_out], 1) for i in self._numbers())
        ]
        self._system = self._make(fitted)

    def _numbers(self) -> range:
        return range(len(self._held_out[0][1]))

    def _make(self, fitted: Pairs) -> _System:
        rows = _Stored(self.window, fitted, round(_ENOUGH_ROWS * self.unknowns))
        groups, unknowns = self.window.groups, self.unknowns
        count = rows.expected()
        if count < unknowns and groups * count * (4 * unknowns + 24 * count) <= self.memory:
            return _Dual(rows)
        if 24 * groups * unknowns**2 <= self.memory:
            return _Normal(rows)
        if groups * count * 4 * unknowns <= self.memory:
            rows.keep()
        return _Iterative(rows, self)

    def fit(self, wanted: Sequence[Wanted]) -> list[Fit]:
        """Fit convolutions of one kernel inside the window, each to its target; see the module docstring."""
        first = wanted[0].geometry
        columns = torch.cat([_columns(self.window, first), torch.arange(self.patch, self.unknowns)])
        ratio = self._system.rows / (len(columns) + 1)
        numbers = [each.number for each in wanted]
        with torch.no_grad():
            priors = [_as_columns(each.geometry, each.weight, each.bias, each.side) for each in wanted]
            best: list[Fit] = []
            for each, prior in zip(wanted, priors, strict=True):
                error = self.error(*prior, each.number, columns)
                side = None if each.side is None else each.side.double()
                best.append(Fit(each.weight.double(), each.bias.double(), error, error, ratio, None, side))
            doubt = self._doubt() if ratio < FEW_ROWS else 0.0
            bars = [(1.0 - doubt) * each.error for each in best]
            for strength, place, weight, bias in self._system.solutions(numbers, [w for w, _ in priors], columns):
                error = self.error(weight, bias, numbers[place], columns)
                if error < bars[place]:
                    bars[place] = error
                    found = _as_torch(wanted[place].geometry, weight, bias)
                    best[place] = Fit(*found[:2], error, best[place].prior_error, ratio, strength, found[2])
        return best

    def _doubt(self) -> float:
        """By which share weights that were fitted to few rows have to be better than the prior ones."""
        seen, _ = next(iter(_rows(self.window, self._fitted, _HELD_OUT_ROWS)))
        return 1.0 if torch.equal(seen, self._held_out[0][0]) else 1 / (1 + self._images)

    def error(self, weight: Tensor, bias: Tensor, number: int, columns: Tensor) -> float:
        """Squared error on the held-out images of weights (groups, unknowns, outputs), as a share of the variance."""
        total = 0.0
        for inputs, targets in self._held_out:
            found = inputs[..., columns] @ weight.to(inputs) + bias.to(inputs)[:, None]
            total += float((found - targets[number]).double().square().sum())
        return total / self._spread[number] if math.isfinite(total) else math.inf


# --- systems ----------------------------------------------------------------------------------------------------------


class _System(Protocol):
    """Solves for the weights of targets; patches and targets less their means."""

    rows: int

    def solutions(
        self, numbers: Sequence[int], priors: Sequence[Tensor], columns: Tensor
    ) -> Iterable[tuple[float, int, Tensor, Tensor]]:
        """(strength, position in ``numbers``, weights, biases) of every strength, towards zero and the prior."""
        ...


class _Means:
    """Means of patches and targets, and what makes a bias of them."""

    def __init__(self, inputs: Tensor, targets: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.targets = targets

    def bias(self, weight: Tensor, number: int, columns: Tensor) -> Tensor:
        shifted: Tensor = self.targets[number] - torch.einsum("gu,guo->go", self.inputs[:, columns], weight)
        return shifted


class _Normal:
    """The normal equations."""

    def __init__(self, rows: _Stored) -> None:
        self.rows = 0
        for inputs, targets in rows:
            if not self.rows:
                groups, _, unknowns = inputs.shape
                square = inputs.new_zeros(groups, unknowns, unknowns, dtype=torch.float64)
                products = [t.new_zeros(groups, unknowns, t.shape[2], dtype=torch.float64) for t in targets]
                sums = square.new_zeros(groups, unknowns)
                totals = [t.new_zeros(groups, t.shape[2], dtype=torch.float64) for t in targets]
            transposed = inputs.transpose(1, 2)
            for start in range(0, unknowns, _BLOCK):
                square[:, start:, start : start + _BLOCK] += transposed[:, start:] @ inputs[..., start : start + _BLOCK]
            sums += inputs.sum(1, dtype=torch.float64)
            for target, product, total in zip(targets, products, totals, strict=True):
                product += transposed @ target
                total += target.sum(1, dtype=torch.float64)
            self.rows += inputs.shape[1]
        for stop in range(_BLOCK, unknowns, _BLOCK):
            square[:, stop - _BLOCK : stop, stop:] = square[:, stop:, stop - _BLOCK : stop].transpose(1, 2)
        self.square = square.baddbmm_(sums[:, :, None], sums[:, None], alpha=-1 / self.rows)
        self.products = [
            product.baddbmm_(sums[:, :, None], total[:, None], alpha=-1 / self.rows)
            for product, total in zip(products, totals, strict=True)
        ]
        self.means = _Means(sums / self.rows, [total / self.rows for total in totals])

    def solutions(
        self, numbers: Sequence[int], priors: Sequence[Tensor], columns: Tensor
    ) -> Iterable[tuple[float, int, Tensor, Tensor]]:
        whole = len(columns) == self.square.shape[1]
        square = self.square if whole else self.square[:, columns][:, :, columns]
        diagonal = square.diagonal(dim1=1, dim2=2)
        size = diagonal.mean(1).clamp_min(1e-30)[:, None, None]
        products = [self.products[number][:, columns] for number in numbers]
        for strength in STRENGTHS:
            pull = strength * size
            matrix = square.clone()
            matrix.diagonal(dim1=1, dim2=2).add_(pull[:, 0])
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed.any():
                continue
            del matrix
            for place, (number, product, prior) in enumerate(zip(numbers, products, priors, strict=True)):
                both = torch.cat([product, product + pull * prior.to(product)], 2)
                for weight in torch.cholesky_solve(both, factor).chunk(2, 2):
                    yield strength, place, weight, self.means.bias(weight, number, columns)


class _Dual:
    """A system with an unknown for every row, where these are fewer."""

    def __init__(self, rows: _Stored) -> None:
        chunks = list(rows)
        inputs = torch.cat([inputs for inputs, _ in chunks], 1)
        targets = [torch.cat(each, 1).double() for each in zip(*(targets for _, targets in chunks), strict=True)]
        self.rows = inputs.shape[1]
        self.means = _Means(inputs.mean(1, dtype=torch.float64), [target.mean(1) for target in targets])
        self.inputs = inputs
        self.targets = [target - target.mean(1, keepdim=True) for target in targets]

    def solutions(
        self, numbers: Sequence[int], priors: Sequence[Tensor], columns: Tensor
    ) -> Iterable[tuple[float, int, Tensor, Tensor]]:
        inputs = self.inputs[..., columns]
        inputs = inputs - inputs.mean(1, keepdim=True)
        square = (inputs @ inputs.transpose(1, 2)).double()
        size = (square.diagonal(dim1=1, dim2=2).sum(1) / len(columns)).clamp_min(1e-30)[:, None, None]
        for strength in STRENGTHS:
            matrix = square.clone()
            matrix.diagonal(dim1=1, dim2=2).add_(strength * size[:, 0])
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed.any():
                continue
            for place, (number, prior) in enumerate(zip(numbers, priors, strict=True)):
                target, start = self.targets[number], prior.double()
                lacking = target - (inputs @ prior.to(inputs)).double()
                found = torch.cholesky_solve(torch.cat([target, lacking], 2), factor).to(inputs)
                zero, towards = (inputs.transpose(1, 2) @ found).double().chunk(2, 2)
                for weight in (zero, start + towards):
                    yield strength, place, weight, self.means.bias(weight, number, columns)


class _Iterative:
    """Conjugate gradients on the normal equations, from the prior weights; the steps taken are the stronger ridge."""

    def __init__(self, rows: _Stored, regression: Regression) -> None:
        self.source = rows
        self.regression = regression
        self.rows = 0
        for inputs, targets in rows:
            if not self.rows:
                sums = inputs.new_zeros(inputs.shape[0], inputs.shape[2], dtype=torch.float64)
                squares = torch.zeros_like(sums)
                totals = [t.new_zeros(t.shape[0], t.shape[2], dtype=torch.float64) for t in targets]
            sums += inputs.sum(1, dtype=torch.float64)
            squares += inputs.square().sum(1, dtype=torch.float64)
            for target, total in zip(targets, totals, strict=True):
                total += target.sum(1, dtype=torch.float64)
            self.rows += inputs.shape[1]
        self.means = _Means(sums / self.rows, [total / self.rows for total in totals])
        self.diagonal = (squares - sums.square() / self.rows).clamp_min(0.0)

    def solutions(
        self, numbers: Sequence[int], priors: Sequence[Tensor], columns: Tensor
    ) -> Iterable[tuple[float, int, Tensor, Tensor]]:
        diagonal = self.diagonal[:, columns]
        pull = STRENGTHS[0] * diagonal.mean(1, keepdim=True).clamp_min(1e-30)[..., None]
        for place, (number, prior) in enumerate(zip(numbers, priors, strict=True)):
            weight, least, stale = prior.double(), math.inf, 0
            residual = self._gradient(weight, number, columns)
            scaled = residual / (diagonal[..., None] + pull)
            direction, product = scaled, (residual * scaled).sum(1, keepdim=True)
            for _ in range(_STEPS):
                image = self._square(direction, columns) + pull * direction
                length = product / (direction * image).sum(1, keepdim=True).clamp_min(1e-300)
                weight, residual = weight + length * direction, residual - length * image
                scaled = residual / (diagonal[..., None] + pull)
                before, product = product, (residual * scaled).sum(1, keepdim=True)
                direction = scaled + product / before.clamp_min(1e-300) * direction
                bias = self.means.bias(weight, number, columns)
                yield STRENGTHS[0], place, weight, bias
                error = self.regression.error(weight, bias, number, columns)
                stale = 0 if error < 0.999 * least else stale + 1
                if stale == _PATIENCE:
                    break
                least = min(error, least)

    def _square(self, weight: Tensor, columns: Tensor) -> Tensor:
        """P'P times weights."""
        total = torch.zeros_like(weight)
        for inputs, _ in self.source:
            centred = inputs[..., columns] - self.means.inputs[:, None, columns].to(inputs)
            total += centred.transpose(1, 2) @ (centred @ weight.to(inputs))
        return total

    def _gradient(self, weight: Tensor, number: int, columns: Tensor) -> Tensor:
        """P'(T - P times weights)."""
        total = torch.zeros_like(weight)
        for inputs, targets in self.source:
            centred = inputs[..., columns] - self.means.inputs[:, None, columns].to(inputs)
            target = targets[number] - self.means.targets[number][:, None].to(inputs)
            total += centred.transpose(1, 2) @ (target - centred @ weight.to(inputs))
        return total


# --- rows -------------------------------------------------------------------------------------------------------------


class _Stored:
    """Drawn rows that can be read again: gathered anew every time, or kept."""

    def __init__(self, window: Geometry, pairs: Pairs, most: int) -> None:
        self.window = window
        self.pairs = pairs
        self.most = most
        self.kept: list[tuple[Tensor, list[Tensor]]] | None = None

    def expected(self) -> int:
        """About how many there are, from the first batch."""
        inputs, _ = next(iter(self.pairs))
        return min(self.most, len(self.pairs) * _pixels(self.window, _split(inputs)[0]))

    def keep(self) -> None:
        """Hold them in memory."""
        self.kept = list(self)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        return _rows(self.window, self.pairs, self.most) if self.kept is None else iter(self.kept)


class _Counted:
    """Pairs, and how many images were read of them."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.images = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[Inputs, Sequence[Tensor]]]:
        for inputs, targets in self.pairs:
            self.images += len(_split(inputs)[0])
            yield inputs, targets


def _rows(window: Geometry, pairs: Pairs, most: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Patches (groups, rows, unknowns) and targets (groups, rows, outputs), chunk by chunk; at most so many rows.

    In float32, or float64 where the input is. The same rows every time, from the first batches that have enough.
    """
    generator = torch.Generator().manual_seed(0)
    batches = len(pairs)
    for number, (inputs, targets) in enumerate(pairs):
        x, side = _split(inputs)
        total = _pixels(window, x)
        if number == 0:
            spare = min(_ENOUGH_PIXELS, total // len(x))  # one alone has no neighbours
            needed = max(-(-ENOUGH_IMAGES // len(x)), -(-spare * most // total))
            batches = min(needed, batches)
            share = -(-most // batches)
        if x.device.type == "mps":  # which has no float64
            x, side, targets = x.cpu(), side.cpu(), [target.cpu() for target in targets]
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        drawn = torch.arange(total)
        if total > share:
            drawn = torch.randperm(total, generator=generator)[:share].sort().values
        step = max(1, _CHUNK // (dtype.itemsize * window.in_channels * math.prod(window.kernel)))
        for chosen in torch.split(drawn.to(x.device), step):
            rows = patches(x.to(dtype), window, chosen)
            if side.shape[1]:
                beside = side[chosen // (total // len(x))].to(dtype)
                rows = torch.cat([rows, beside.expand(window.groups, -1, -1)], 2)
            yield rows, [_grouped(t, window.groups, chosen).to(dtype) for t in targets]
        if number + 1 == batches:
            return  # before the next one is computed


def _split(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What is convolved, and side inputs (N, S); S is 0 where there are none."""
    return inputs if isinstance(inputs, tuple) else (inputs, inputs.new_zeros(len(inputs), 0))


def _pixels(window: Geometry, x: Tensor) -> int:
    return len(x) * math.prod(window.out_size(x.shape[2:]))


def patches(x: Tensor, geometry: Geometry, chosen: Tensor | None = None) -> Tensor:
    """What each output pixel of each group reads: (groups, N * pixels, C / groups * taps), in the order of torch's weights.

    Args:
        x: (N, C, *size).
        geometry: of the convolution.
        chosen: numbers of the output pixels of all images to return; default all.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 1, 6)
        >>> patches(x, Geometry(1, 1, (2,), (2,), (1,), (0,), (0,), 1)).tolist()
        [[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]]
    """
    x = F.pad(x, as_torch_pad(geometry.left, geometry.right))
    for axis, (extent, stride) in enumerate(zip(geometry.extent, geometry.stride, strict=True), 2):
        x = x.unfold(axis, extent, stride)
    dims = geometry.dims
    for axis, dilation in enumerate(geometry.dilation, 2 + dims):
        x = x[(slice(None),) * axis + (slice(None, None, dilation),)]
    x = x.movedim(1, 1 + dims)  # (N, *pixels, C, *taps)
    if chosen is not None:
        x = x[torch.unravel_index(chosen, x.shape[: 1 + dims])]
    taps = math.prod(geometry.weight_shape[1:])
    return x.reshape(-1, geometry.groups, taps).transpose(0, 1)


def _grouped(target: Tensor, groups: int, chosen: Tensor) -> Tensor:
    """Chosen pixels of (N, C, *size) as (groups, rows, C / groups)."""
    rows = target.movedim(1, -1).flatten(0, -2)[chosen]
    return rows.reshape(len(chosen), groups, -1).transpose(0, 1)


def _columns(window: Geometry, geometry: Geometry) -> Tensor:
    """Which columns of the window's patches are those of a geometry inside of it."""
    taps = torch.arange(math.prod(window.weight_shape[1:])).reshape(window.weight_shape[1:])
    for axis, dilation in enumerate(window.dilation):
        start = (window.left[axis] - geometry.left[axis]) // dilation
        taps = taps.narrow(1 + axis, start, geometry.kernel[axis])
    return taps.flatten()


def _as_columns(geometry: Geometry, weight: Tensor, bias: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights (groups, unknowns, outputs), those of side inputs last, and biases (groups, outputs), float64."""
    shape = geometry.groups, geometry.out_channels // geometry.groups
    parts = [weight] if side is None else [weight, side]
    columns = torch.cat([part.double().reshape(*shape, -1) for part in parts], 2)
    return columns.transpose(1, 2), bias.double().reshape(shape)


def _as_torch(geometry: Geometry, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of :func:`_as_columns`."""
    taps = math.prod(geometry.weight_shape[1:])
    found = weight.transpose(1, 2)
    side = found[..., taps:].flatten(0, 1).contiguous() if weight.shape[1] > taps else None
    return found[..., :taps].reshape(geometry.weight_shape).contiguous(), bias.flatten(), side
