"""The weights of a relaxed network: composed, or fitted to the original on calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .calibration import Calibration, reestimate_batch_norms, spread
from .candidates import Candidate, Limits
from .errors import UserError
from .evaluate import Known, evaluate, taken_over
from .graph import changed_nodes, clone, node_id
from .inputs import batch_size

if TYPE_CHECKING:
    from .passes.refit import Reuse

__all__ = ["FITS", "Refitted", "apply_candidates", "install", "last_may_change", "resolve_fit"]

FITS = ("auto", "compose", "refit")

_NORM_IMAGES = 512
"""From which batch-norm statistics are re-estimated, if there are so many: more hardly change them, and cost most of a score."""


@dataclass(frozen=True, slots=True)
class Refitted:
    """What became of one merged convolution, or of the last linear layer, in a refit.

    Errors are on held-out images, as shares of the target's variance: 0 is perfect, 1 no better than the mean.

    Attributes:
        name: of the convolution or layer.
        error: of the weights that were installed.
        composed_error: of the composed weights; of a linear layer the old ones.
        rows_per_unknown: output pixels of the fitted images for each weight of an output channel.
        fitted: whether the fitted weights were better.
        reason: why nothing was fitted; empty where it was.
    """

    name: str
    error: float = 0.0
    composed_error: float = 0.0
    rows_per_unknown: float = 0.0
    fitted: bool = False
    reason: str = ""


def resolve_fit(fit: str, *, calibrated: bool) -> str:
    """``auto`` is ``refit`` where there is calibration data, else ``compose``.

    Raises:
        UserError: an unknown name, or ``refit`` without calibration data.
    """
    if fit not in FITS:
        raise UserError(f"unknown fit {fit!r}; the known ones are {', '.join(FITS)}")
    if fit == "refit" and not calibrated:
        raise UserError("fit='refit' fits weights on calibration inputs: pass calibration=...")
    if fit == "auto":
        return "refit" if calibrated else "compose"
    return fit


def apply_candidates(
    gm: fx.GraphModule,
    candidates: Collection[Candidate],
    calibration: Calibration | None,
    fit: str = "compose",
    memory: int = 2**31,
    limits: Limits | None = None,
    *,
    kept: bool = False,
    reuse: Reuse | None = None,
) -> tuple[fx.GraphModule, tuple[Refitted, ...]]:
    """A relaxed copy with the weights that will be installed, and what was fitted.

    Args:
        gm: the canonical graph of the original.
        candidates: what to apply.
        calibration: images; None composes weights, and keeps batch-norm statistics.
        fit: ``compose`` or ``refit``.
        memory: bound on the moments of one fit, in bytes.
        limits: what may change: kept convolutions and the last linear layer are fitted only if they cover them; None for
            everything.
        kept: with ``refit``, fit kept convolutions as well.
        reuse: with ``refit``, fits of other plans, without ``kept``.
    """
    from .passes.refit import known_inputs
    from .passes.relax import RelaxPass

    relaxed: fx.GraphModule = RelaxPass(tuple(candidates))(clone(gm)).graph_module
    if calibration is None or not candidates:
        return relaxed, ()
    images, held_out = known_inputs(gm, calibration.fit), known_inputs(gm, calibration.held_out)
    last, may = last_may_change(gm, limits), (limits or Limits()).covers if kept else None
    if reuse is not None:
        reuse.plan = tuple(candidates)
    return relaxed, install(
        gm, relaxed, fit, images, held_out, memory, last=last, kept=may, reuse=None if kept else reuse
    )


def last_may_change(gm: fx.GraphModule, limits: Limits | None) -> bool:
    """Whether the operation that gives the outputs is inside of the limits."""
    output = next(iter(gm.graph.find_nodes(op="output")))
    return limits is None or all(limits.covers(node_id(node)) for node in output.all_input_nodes)


def install(
    original: fx.GraphModule,
    relaxed: fx.GraphModule,
    fit: str,
    images: Sequence[Known],
    held_out: Sequence[Known],
    memory: int,
    *,
    last: bool = True,
    kept: Callable[[str], bool] | None = None,
    reuse: Reuse | None = None,
    norms: bool = True,
) -> tuple[Refitted, ...]:
    """Give a relaxed network its weights, in place; what was fitted.

    ``compose`` re-estimates the statistics of the batch norms behind a change, on 512 images or little more. ``refit`` fits every
    merged convolution (:mod:`fxmerge.passes.refit`); where none can be fitted it does the same. Arguments as of
    :func:`fxmerge.passes.refit.refit`.
    """
    from .passes.refit import refit

    fits: tuple[Refitted, ...] = ()
    if fit == "refit":
        fits = refit(original, relaxed, images, held_out, memory, last=last, kept=kept, reuse=reuse, norms=norms)
        if any(not each.reason for each in fits):
            return fits
    changed = changed_nodes(original, relaxed)
    output = next(iter(relaxed.graph.find_nodes(op="output")))
    known = [node for node in relaxed.graph.nodes if node not in changed]

    def forward(values: Known) -> Any:
        with torch.no_grad():
            return pytree.tree_leaves(evaluate(relaxed, output, taken_over(known, values)))

    reestimate_batch_norms(relaxed, changed, _some(original, images), forward)
    return fits


def _some(original: fx.GraphModule, batches: Sequence[Known]) -> list[Known]:
    """Batches of enough images for statistics."""
    inputs = tuple(batches[0].get(node_id(node)) for node in original.graph.find_nodes(op="placeholder"))
    return [batches[number] for number in spread(len(batches), batch_size(inputs, {}) or 1, _NORM_IMAGES)]
