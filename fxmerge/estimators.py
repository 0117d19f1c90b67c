"""Importance: what applying one candidate costs the whole network.

An estimator turns candidates into losses. :class:`Magnitude` needs no data; :class:`Distortion` compares outputs on calibration
inputs, no labels needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .calibration import Batch, Calibration, reestimate_batch_norms
from .candidates import Candidate
from .errors import UserError
from .graph import by_id, clone, module_of
from .linear import conv_geometry

__all__ = ["Distortion", "Estimator", "Magnitude", "distance", "get_estimator"]


@runtime_checkable
class Estimator(Protocol):
    """Anything that turns candidates into losses: the interface for estimators of your own.

    Attributes:
        name: for progress and reports.
    """

    @property
    def name(self) -> str: ...

    def prepare(self, gm: fx.GraphModule) -> Callable[[Candidate], float]:
        """Do once what all candidates of a network share; the result scores one candidate."""
        ...


class Magnitude:
    """Losses from the weights alone: the variance that every removed operation would have contributed.

    Each operation is taken on its own, with independent standard normal inputs, and counts with the share of its output's
    variance that no per-channel affine map of its input explains: 0 where the operation is one already, 1 where its
    output has nothing to do with its input. For an activation f that is 1 - Cov(x, f(x))^2 / Var f(x) (0.27 for ReLU), by
    Gauss-Hermite quadrature; for a convolution the mean over output channels of 1 - w^2 / |W|^2, w being the tap that the
    identity has. A candidate's loss is the sum over what it removes. The measure is fxmerge's own; LayerMerge uses weight norms
    only to choose which convolutions of a segment stay (section 4.3), as fxmerge does too.
    """

    name = "magnitude"

    def prepare(self, gm: fx.GraphModule) -> Callable[[Candidate], float]:
        """Compute the share of every operation once."""
        nodes = by_id(gm)
        shares: dict[str, float] = {}

        def share(name: str) -> float:
            if name not in shares:
                module = module_of(gm, nodes[name])
                assert module is not None  # noqa: S101 - only modules are removed
                shares[name] = _unexplained(module)
            return shares[name]

        return lambda candidate: sum(map(share, (*candidate.bypassed, *candidate.removed)))


def _unexplained(module: nn.Module) -> float:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _unexplained_by_identity(module)
    points, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / weights.sum()
    parameters = list(module.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dtype = parameters[0].dtype if parameters else torch.float64
    channels = parameters[0].numel() if parameters else 1
    with torch.no_grad():
        x = torch.tensor(points, dtype=dtype, device=device).reshape(-1, 1).expand(-1, channels)
        y = module(x).mean(dim=1).double().cpu().numpy()
    mean = float(weights @ y)
    variance = float(weights @ (y - mean) ** 2)
    covariance = float(weights @ (points * y))
    return max(0.0, 1.0 - covariance**2 / variance) if variance > 0 else 1.0


def _unexplained_by_identity(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> float:
    geometry = conv_geometry(module)
    weight = module.weight.detach().double()
    total = weight.flatten(1).square().sum(dim=1)
    centre = tuple(left // d for left, d in zip(geometry.left, geometry.dilation, strict=True))
    aligned = all(left % d == 0 for left, d in zip(geometry.left, geometry.dilation, strict=True))
    inside = all(0 <= tap < k for tap, k in zip(centre, geometry.kernel, strict=True))
    if geometry.in_channels != geometry.out_channels or not aligned or not inside:
        return 1.0
    tap = weight[(slice(None), slice(None), *centre)]
    per_group = geometry.out_channels // geometry.groups
    own = tap[torch.arange(geometry.out_channels), torch.arange(geometry.out_channels) % per_group].square()
    return float((1.0 - own / total.clamp_min(torch.finfo(torch.float64).tiny)).mean())


class Distortion:
    """Losses from the network's outputs on calibration inputs.

    One candidate is applied with the weights that would be installed (composed, batch-norm statistics re-estimated on the
    batches to fit), and the outputs on the held-out batches are compared with the original's by :func:`distance`.

    Args:
        calibration: what :func:`fxmerge.calibration.read_calibration` returned.
    """

    name = "distortion"

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration

    def prepare(self, gm: fx.GraphModule) -> Callable[[Candidate], float]:
        """Run the original once."""
        reference = [_outputs(gm, batch) for batch in self.calibration.held_out]

        def score(candidate: Candidate) -> float:
            relaxed = apply_candidates(gm, (candidate,), self.calibration)
            pairs = zip(self.calibration.held_out, reference, strict=True)
            return float(np.mean([distance(_outputs(relaxed, batch), expected) for batch, expected in pairs]))

        return score


def apply_candidates(
    gm: fx.GraphModule, candidates: tuple[Candidate, ...], calibration: Calibration | None
) -> fx.GraphModule:
    """A relaxed copy with the weights that will be installed: composed, statistics behind the first change re-estimated."""
    from .passes.relax import RelaxPass

    relaxed = RelaxPass(candidates)(clone(gm)).graph_module
    if calibration is not None and candidates:
        reestimate_batch_norms(relaxed, changed_nodes(gm, relaxed), calibration.fit)
    return relaxed


def changed_nodes(original: fx.GraphModule, relaxed: fx.GraphModule) -> set[fx.Node]:
    """Operations of ``relaxed`` whose inputs may differ from those they had in ``original``."""
    before = by_id(original)
    changed: set[fx.Node] = set()
    for node in relaxed.graph.nodes:
        twin = before.get(_id(node))
        same_inputs = twin is not None and list(map(_id, twin.all_input_nodes)) == list(map(_id, node.all_input_nodes))
        if not same_inputs or any(source in changed for source in node.all_input_nodes):
            changed.add(node)
    return changed


def _id(node: fx.Node) -> str:
    from .graph import node_id

    return node_id(node)


def _outputs(gm: nn.Module, batch: Batch) -> list[Tensor]:
    training = [(module, module.training) for module in gm.modules()]
    try:
        gm.eval()
        with torch.no_grad():
            outputs = gm(*batch[0], **batch[1])
    finally:
        for module, flag in training:
            module.training = flag
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(outputs: list[Tensor], reference: list[Tensor]) -> float:
    """How far outputs are from the reference's, averaged over them.

    Two-dimensional outputs are taken for logits: mean over the batch of KL(softmax(reference) || softmax(output)), in nats.
    Others: squared error over the reference's variance around its mean over the batch.
    """
    return float(np.mean([_one_distance(a.double(), b.double()) for a, b in zip(outputs, reference, strict=True)]))


def _one_distance(output: Tensor, reference: Tensor) -> float:
    if reference.ndim == 2 and reference.shape[1] > 1:
        return float(
            F.kl_div(output.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="batchmean").clamp_min(0)
        )
    spread = (reference - reference.mean(dim=0)).square().sum() if reference.shape[0] > 1 else reference.square().sum()
    return float((output - reference).square().sum() / spread.clamp_min(torch.finfo(torch.float64).tiny))


def get_estimator(spec: str | Estimator, calibration: Calibration | None) -> Estimator:
    """The estimator of that name: ``auto`` is ``distortion`` where there is calibration data, else ``magnitude``.

    Raises:
        UserError: an unknown name, or ``distortion`` without calibration data.
    """
    if not isinstance(spec, str):
        return spec
    if spec == "magnitude" or (spec == "auto" and calibration is None):
        return Magnitude()
    if spec in ("auto", "distortion"):
        if calibration is None:
            raise UserError("importance='distortion' compares outputs on calibration inputs: pass calibration=...")
        return Distortion(calibration)
    raise UserError(f"unknown importance {spec!r}; the known ones are auto, distortion, magnitude, or an object with prepare()")
