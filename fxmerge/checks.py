"""The checks that stand between a rewrite and the user: raising rather than handing out a wrong network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calibration import Batch
from .errors import InternalError
from .inputs import map_tensors

__all__ = ["EndToEnd", "check_equal", "check_inputs", "own_error", "relative_error"]

_FLOORS = {torch.float64: 1e-10, torch.float32: 1e-5}
_HALF_FLOOR = 2e-2
_FACTOR = 20.0
_LEAST_DEPENDENCE = 1e-4


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """What a comparison of two networks found.

    Attributes:
        error: largest difference over the input-dependent part of the output.
        allowed: what it was held to.
        dependence: share of the output that depends on the input; below 1e-4 the comparison says little.
    """

    error: float
    allowed: float
    dependence: float

    @property
    def checkable(self) -> bool:
        """Whether the outputs depend on the input enough for the comparison to mean something."""
        return self.dependence >= _LEAST_DEPENDENCE


def check_inputs(example: Batch, seed: int = 0) -> Batch:
    """Inputs that differ within the batch: the example's values with noise of their own spread; integers and booleans stay."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        spread = tensor.detach().float().std(correction=0).item() if tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator) * (spread if spread > 0 else 1.0)
        return tensor + noise.to(tensor.device, tensor.dtype)

    return map_tensors(disturb, *example)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max |a - b| / max |b - mean of b over the batch|, the largest over all outputs (batch of two or more)."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        difference = float((a.double() - b.double()).abs().max())
        scale = float((b.double() - b.double().mean(dim=0)).abs().max()) if b.ndim and b.shape[0] > 1 else float(b.abs().max())
        if difference:
            worst = max(worst, difference / scale if scale else float("inf"))
    return worst


def dependence(outputs: Sequence[Tensor]) -> float:
    """Share of the outputs that varies within the batch; the smallest over all outputs."""
    shares = [
        float((b.double() - b.double().mean(dim=0)).abs().max() / b.double().abs().max().clamp_min(1e-300)) for b in outputs if b.ndim
    ]
    return min(shares, default=0.0)


def outputs_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The floating-point outputs of a network in eval mode, its modes left as they were."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            outputs = model(*batch[0], **batch[1])
    finally:
        for module, flag in training:
            module.training = flag
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def own_error(model: nn.Module, batch: Batch, outputs: Sequence[Tensor]) -> float:
    """The network's own rounding error: its outputs in its dtype against float64; infinite where float64 does not run."""
    try:
        double = copy.deepcopy(model).double()
        wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, *batch)
        return relative_error(outputs, outputs_of(double, wide))
    except RuntimeError:
        return float("inf")


def check_equal(model: nn.Module, merged: nn.Module, batch: Batch, error_of_original: float) -> EndToEnd:
    """Compare a merged network with its trainable form on distinct inputs.

    Allowed is 20 times the original's own rounding error, at least 1e-5 (float32), 2e-2 (half), 1e-10 (float64).

    Raises:
        InternalError: they differ by more.
    """
    expected = outputs_of(model, batch)
    found = outputs_of(merged, batch)
    floor = max((_FLOORS.get(output.dtype, _HALF_FLOOR) for output in expected), default=1e-5)
    own = error_of_original if error_of_original < float("inf") else 0.0
    result = EndToEnd(relative_error(found, expected), max(floor, _FACTOR * own), dependence(expected))
    if result.checkable and not result.error <= result.allowed:
        raise InternalError(
            f"the merged network differs from its trainable form by {result.error:.1e} of the input-dependent output "
            f"(allowed {result.allowed:.1e}). Nothing was handed out. Please report this network."
        )
    return result
