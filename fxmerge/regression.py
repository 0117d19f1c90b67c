"""Fitting a convolution to what it should give: ridge regression on the patches of its input, in closed form.

Only second moments are kept: for the patches P of all images (a column for every weight of a group, and one of ones for
the bias) and the targets T the matrices P'P, P'T and T'T, in float64. Everything else follows from them: the solution for
any ridge strength, and its error, on the images that were fitted as well as on those that were held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import Geometry, as_torch_pad

__all__ = ["FEW_ROWS", "STRENGTHS", "Fit", "Moments", "fit_convolution", "moments_bytes", "patches"]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that are tried, as shares of the mean diagonal of P'P."""

FEW_ROWS = 5.0
"""Rows per unknown below which a fit says little about other images than those it has seen."""

_CHUNK = 2**26
"""Bytes of patches that are held at once."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The better of fitted and prior weights, by their errors on held-out images.

    Errors are shares of the variance of the target: 0 is perfect, 1 is no better than the mean.

    Attributes:
        weight: float64, shaped as torch's.
        bias: float64, one for each output channel.
        error: of these weights.
        prior_error: of the prior weights.
        rows_per_unknown: output pixels of all fitted images for each weight of an output channel.
        strength: of the ridge; None where the prior weights are better.
    """

    weight: Tensor
    bias: Tensor
    error: float
    prior_error: float
    rows_per_unknown: float
    strength: float | None


def moments_bytes(geometry: Geometry) -> int:
    """Memory that :class:`Moments` of a convolution takes."""
    unknowns = math.prod(geometry.weight_shape[1:]) + 1
    return 8 * (unknowns**2 * geometry.groups + (unknowns + 1) * geometry.out_channels)


class Moments:
    """P'P, P'T and T'T of a convolution's patches and targets, group by group.

    Args:
        geometry: of the convolution; its padding is the input's.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        groups = geometry.groups
        unknowns = math.prod(geometry.weight_shape[1:]) + 1
        self.rows = 0
        self.inputs = torch.zeros(groups, unknowns, unknowns, dtype=torch.float64)
        self.products = torch.zeros(groups, unknowns, geometry.out_channels // groups, dtype=torch.float64)
        self.targets = torch.zeros(groups, geometry.out_channels // groups, dtype=torch.float64)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add images: their inputs (N, C, *size) and targets (N, out_channels, *out_size)."""
        per_image = 8 * target[0, 0].numel() * self.inputs.shape[1] * self.geometry.groups
        step = max(1, _CHUNK // max(per_image, 1))
        for start in range(0, len(x), step):
            rows = patches(x[start : start + step].double(), self.geometry)
            ones = rows.new_ones(*rows.shape[:2], 1)
            rows = torch.cat([rows, ones], 2)
            wanted = _grouped(target[start : start + step].double(), self.geometry.groups)
            transposed = rows.transpose(1, 2)
            self.inputs += (transposed @ rows).cpu()
            self.products += (transposed @ wanted).cpu()
            self.targets += wanted.square().sum(1).cpu()
            self.rows += rows.shape[1]

    def solve(self, strength: float, prior: Tensor | None = None) -> Tensor:
        """The weights (groups, unknowns, outputs) of the ridge; drawn towards ``prior`` (default zero), the bias is free."""
        unknowns = self.inputs.shape[1]
        diagonal = self.inputs.diagonal(dim1=1, dim2=2)[:, :-1]
        pull = strength * diagonal.mean(1, keepdim=True).clamp_min(1e-30).expand(-1, unknowns)
        pull = pull.clone()
        pull[:, -1] = 1e-9 * pull[:, 0]
        wanted = self.products if prior is None else self.products + pull[:, :, None] * prior
        weights: Tensor = torch.linalg.solve(self.inputs + torch.diag_embed(pull), wanted)
        return weights

    def error(self, weights: Tensor) -> float:
        """Squared error of weights (groups, unknowns, outputs), as a share of the target's variance."""
        explained = (weights * (self.inputs @ weights - 2 * self.products)).sum()
        spread = self.targets.sum() - self.products[:, -1].square().sum() / self.rows
        least = max(1e-15 * float(self.targets.sum()), 1e-30)  # what rounding leaves of a target that does not vary
        return float((explained + self.targets.sum()).clamp_min(0.0) / spread.clamp_min(least))


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """What each output pixel of each group reads: (groups, N * pixels, C / groups * taps), in the order of torch's weights.

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
    batch, channels = x.shape[:2]
    x = x.reshape(batch, geometry.groups, channels // geometry.groups, *x.shape[2:])
    pixels = range(3, 3 + dims)
    rows = x.permute(1, 0, *pixels, 2, *range(3 + dims, 3 + 2 * dims))
    return rows.reshape(geometry.groups, -1, math.prod(geometry.weight_shape[1:]))


def _grouped(target: Tensor, groups: int) -> Tensor:
    """(N, C, *size) as (groups, N * pixels, C / groups)."""
    flat = target.flatten(2) if target.ndim > 2 else target[..., None]
    batch, channels, pixels = flat.shape
    return (
        flat.reshape(batch, groups, channels // groups, pixels).permute(1, 0, 3, 2).reshape(groups, batch * pixels, -1)
    )


@torch.no_grad()
def fit_convolution(
    fitted: Moments, held_out: Moments, weight: Tensor, bias: Tensor, strengths: Sequence[float] = STRENGTHS
) -> Fit:
    """The convolution that fits best on held-out images, of all ridge strengths, towards zero and the prior weights.

    The prior weights themselves compete.

    Args:
        fitted: moments of the images to fit.
        held_out: moments of the images to choose by.
        weight: prior weights, shaped as torch's.
        bias: prior biases.
        strengths: what to try.
    """
    geometry = fitted.geometry
    shape = (geometry.groups, geometry.out_channels // geometry.groups, -1)
    prior = torch.cat([weight.double().cpu().reshape(shape), bias.double().cpu().reshape(shape)], 2).transpose(1, 2)
    ratio = fitted.rows / fitted.inputs.shape[1]
    tried = [(strength, fitted.solve(strength, towards)) for strength in strengths for towards in (None, prior)]
    errors = [(held_out.error(weights), strength, weights) for strength, weights in tried]
    error, strength, best = min(errors, key=lambda each: (not math.isfinite(each[0]), each[0]))
    prior_error = held_out.error(prior)
    if not error < prior_error:
        return Fit(weight.double().cpu(), bias.double().cpu(), prior_error, prior_error, ratio, None)
    rows = best.transpose(1, 2).reshape(geometry.out_channels, -1)
    return Fit(rows[:, :-1].reshape(geometry.weight_shape), rows[:, -1], error, prior_error, ratio, strength)
