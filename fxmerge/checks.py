"""The checks that stand between a rewrite and the user: raising rather than handing out a wrong network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .calibration import Batch, eval_mode, second_example
from .errors import InternalError
from .graph import clone, graph_meta, structure
from .inputs import floats, map_tensors

__all__ = [
    "EndToEnd",
    "check_equal",
    "check_inputs",
    "dependence",
    "distinct_inputs",
    "outputs_of",
    "own_error",
    "relative_error",
]

_BOUNDS = {torch.float64: (1e-10, 20.0), torch.float32: (1e-5, 20.0)}
_HALF_BOUNDS = (2e-2, 6.0)
"""Least error that is allowed, and how many times the original's own: fewer in half precision, where that is large."""

_LEAST_DEPENDENCE = 1e-4
_LARGEST_ALLOWED = 0.5


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """What a comparison of two networks found.

    Attributes:
        error: largest difference over the input-dependent part of the output.
        allowed: what it was held to.
        dependence: share of the output that depends on the input.
        exact: the networks are equal in float64 and differ by the rounding of each; looked at where ``error`` is above
            ``allowed``.
    """

    error: float
    allowed: float
    dependence: float
    exact: bool = False

    @property
    def caveat(self) -> str:
        """Why the comparison says little, empty where it means something.

        Less than 1e-4 of the outputs depends on the input, rounding may change more than half of what does, or it makes
        the network take another way (the places of maxima, for example).
        """
        if self.dependence < _LEAST_DEPENDENCE:
            return f"only {self.dependence:.1e} of the outputs depends on the input: not checkable end to end"
        if self.allowed > _LARGEST_ALLOWED:
            return (
                f"rounding in the network's own dtype may change {self.allowed:.0%} of what depends on the input: not "
                "checkable end to end"
            )
        if self.exact:
            return (
                f"rounding alone moves {self.error:.1e} of what depends on the input (allowed {self.allowed:.1e}); in "
                "float64 the merged network equals its trainable form to 1e-10"
            )
        return ""

    @property
    def checkable(self) -> bool:
        """Whether the comparison means something."""
        return not self.caveat


def check_inputs(example: Batch, seed: int = 0) -> Batch:
    """Inputs that differ within the batch, made from the example.

    Floating-point values get noise of their own spread. Images of integers (three or more axes) are shuffled, so that
    the values stay in range; other integers and booleans stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            spread = tensor.detach().float().std(correction=0).item() if tensor.numel() > 1 else 0.0
            noise = torch.randn(tensor.shape, generator=generator) * (spread if spread > 0 else 1.0)
            return tensor + noise.to(tensor.device, tensor.dtype)
        if tensor.ndim >= 3:
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            return tensor.flatten()[order].reshape(tensor.shape)
        return tensor

    return map_tensors(disturb, *example)


def distinct_inputs(gm: fx.GraphModule, example: Batch) -> Batch:
    """:func:`check_inputs` of the example at a batch of two or more, where the captured network takes one."""
    return check_inputs(second_example(example) if graph_meta(gm).get("dynamic_batch") else example)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |a - b| over the largest |b - mean of b over the batch|, the worst over all outputs.

    The mean takes away what does not depend on the input: against the plain size of the output a mirrored kernel can go
    unnoticed. An output without a batch axis, or of one row, is held against its own size. Where both are infinite
    alike or both no number they count as equal; where one is, the error is infinite.

    Example:
        >>> b = torch.tensor([[101.0], [99.0]])
        >>> relative_error([b + 0.5], [b])
        0.5
    """
    return max(
        (_one_error(a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)),
        default=0.0,
    )


def _one_error(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    difference = _largest(torch.where(same, 0.0, a - b).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf))
    scale = _largest(_varying(b))
    return difference / scale if scale else (math.inf if difference else 0.0)


def _varying(b: Tensor) -> Tensor:
    """What of an output varies within the batch; all of it where there is no batch of two. What is not finite is 0."""
    varying = b - b.mean(dim=0) if b.ndim and b.shape[0] > 1 else b
    return varying.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def dependence(outputs: Sequence[Tensor]) -> float:
    """Share of the outputs that varies within the batch: max |b - mean| / max |b|; the smallest over all outputs."""
    shares = [0.0]
    for b in (output.double() for output in outputs if output.ndim):
        size = _largest(b.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        shares.append(_largest(_varying(b)) / size if size else 0.0)
    return min(shares[1:], default=0.0)


def outputs_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The floating-point outputs of a network in eval mode, its modes left as they were."""
    with eval_mode(model), torch.no_grad():
        outputs = model(*batch[0], **batch[1])
    return floats(outputs)


def own_error(model: fx.GraphModule, batch: Batch, outputs: Sequence[Tensor]) -> float:
    """The network's own rounding error: its outputs in its dtype against those in float64.

    Where float64 does not run (a dtype written into the graph), against those with every parameter off by one rounding.
    """
    try:
        double = clone(model).double()
        wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, *batch)
        return relative_error(outputs, outputs_of(double, wide))
    except RuntimeError:
        return relative_error(outputs, outputs_of(_rounded(model), batch))


def _rounded(model: fx.GraphModule) -> fx.GraphModule:
    disturbed = clone(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in disturbed.parameters():
            if parameter.is_floating_point():
                sign = torch.randint(0, 2, parameter.shape, generator=generator).mul(2).sub(1).to(parameter.device)
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps * sign.to(parameter.dtype))
    return disturbed


def check_equal(model: fx.GraphModule, merged: nn.Module, batch: Batch, error_of_original: float) -> EndToEnd:
    """Compare a merged network with its trainable form on distinct inputs.

    Allowed is 20 times the original's own rounding error, in half precision 6 times, and at least 1e-10 (float64), 1e-5
    (float32), 2e-2 (half); where that is not enough, as many times the trainable form's own: strong compression can leave
    a network that rounds worse. A network whose output jumps (places of maxima) may differ by more: then it is folded
    anew in float64, where both have to agree to 1e-10, and ``merged`` has to be that one rounded.

    Raises:
        InternalError: they differ by more.
    """
    expected = outputs_of(model, batch)
    found = outputs_of(merged, batch)
    floor, factor = max(_BOUNDS.get(output.dtype, _HALF_BOUNDS) for output in expected) if expected else (0.0, 0.0)
    error, allowed = relative_error(found, expected), max(floor, factor * _finite(error_of_original))
    if not error <= allowed:
        allowed = max(allowed, factor * _finite(own_error(model, batch, expected)))
    exact = not error <= allowed and math.isfinite(error) and _is_rounding(model, merged, batch)
    result = EndToEnd(error, allowed, dependence(expected), exact)
    if not exact and result.dependence >= _LEAST_DEPENDENCE and not result.error <= result.allowed:
        raise InternalError(
            f"the merged network differs from its trainable form by {result.error:.1e} of the input-dependent output "
            f"(allowed {result.allowed:.1e}). Nothing was handed out. Please report this network."
        )
    return result


def _is_rounding(model: fx.GraphModule, merged: nn.Module, batch: Batch) -> bool:
    """Whether ``merged`` is, rounded, what the model folds to in float64, and that equals the model there."""
    from .result import merge_graph

    if not isinstance(merged, fx.GraphModule):
        return False
    try:
        double = clone(model).double()
        folded = merge_graph(double)
        wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, *batch)
        equal = relative_error(outputs_of(folded, wide), outputs_of(double, wide)) <= _BOUNDS[torch.float64][0]
    except RuntimeError:  # a dtype is written into the graph
        return False
    expected, found = folded.state_dict(), merged.state_dict()
    same = expected.keys() == found.keys() and all(torch.equal(expected[k].to(v.dtype), v) for k, v in found.items())
    return equal and same and structure(folded) == structure(merged)


def _finite(own: float) -> float:
    """An own error as a measure of rounding; an overflow is none."""
    return own if math.isfinite(own) else 0.0
