"""Fit merged convolutions to the original network on calibration inputs, in closed form.

Every merged segment of a relaxed graph becomes the one convolution that it composes to. In the order of the graph, each
of these is then fitted (:mod:`fxmerge.regression`):

1. Its input is what the compressed network in front of it gives, with what was fitted before; its target is what the
   original network gives at the segment's exit, inner activations in place. Where the segment ends in an addition whose
   other operand is known by then, the target is what the original's sum lacks: what went wrong in the skip is made good.
2. The strength of the ridge, whether it draws towards zero or the composed weights, and whether the fitted or the composed
   weights are installed, is decided by the held-out images.
3. Behind it stands a batch norm that changes nothing, because folded convolutions hardly train (fold removes it).

Then the last linear layer, where its output is the network's, is fitted to the original's in the same way, its old weights in
place of composed ones. A segment keeps its composed weights where a norm returned behind it, an activation was put
behind it, a side input passes through it, or its moments would not fit into ``memory``.

Works in place on a relaxed graph of the original; needs the ids of a canonical graph, and leaves them. A graph without
merged segments is left as it is.
"""

from __future__ import annotations

__all__ = ["Known", "RefitPass", "RefitResult", "known_inputs", "refit"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.calibration import Batch, Calibration, eval_mode, parse_memory
from fxmerge.candidates import Candidate
from fxmerge.evaluate import evaluate, recorder
from fxmerge.fitting import Refitted
from fxmerge.graph import (
    CONVOLUTIONS,
    META,
    by_id,
    changed_nodes,
    graph_meta,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    shared_targets,
    sweep,
)
from fxmerge.linear import conv_geometry
from fxmerge.passes._base import GraphPass
from fxmerge.passes.fold import fold_segments
from fxmerge.regression import Fit, Moments, fit_convolution, moments_bytes
from fxmerge.surgery import insert_behind

Known: TypeAlias = Mapping[str, Any]
"""Values of one batch of images in the original network, by node id."""

_aten = torch.ops.aten
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class RefitResult(PassResult):
    """torch's PassResult with what was fitted."""

    fits: tuple[Refitted, ...]

    def __new__(cls, graph_module: fx.GraphModule, modified: bool, fits: tuple[Refitted, ...] = ()) -> RefitResult:
        """Make a result."""
        result = super().__new__(cls, graph_module, modified)
        assert isinstance(result, RefitResult)  # noqa: S101 - what the line above makes
        result.fits = fits
        return result


class RefitPass(GraphPass):
    """Fit the merged segments of a relaxed graph, in place; see the module docstring.

    Attributes:
        original: the canonical graph that was relaxed.
        calibration: images to fit, and held-out ones.
        memory: bound on the moments of one convolution, such as "2GiB".
    """

    def __init__(self, original: fx.GraphModule, calibration: Calibration, memory: str | int = "2GiB") -> None:
        super().__init__()
        self.original = original
        self.calibration = calibration
        self.memory = parse_memory(memory)

    def call(self, graph_module: fx.GraphModule) -> RefitResult:
        """Apply the pass in place; what was fitted is in the result's ``fits``."""
        images = known_inputs(self.original, self.calibration.fit)
        held_out = known_inputs(self.original, self.calibration.held_out)
        fits = refit(self.original, graph_module, images, held_out, self.memory)
        return RefitResult(graph_module, bool(fits), fits)


def refit(
    original: fx.GraphModule,
    gm: fx.GraphModule,
    fit: Sequence[Known],
    held_out: Sequence[Known],
    memory: int = 2**31,
    *,
    last: bool = True,
) -> tuple[Refitted, ...]:
    """Fit in place.

    Args:
        original: the canonical graph.
        gm: a relaxed copy of it.
        fit: images to fit: for every batch values of the original by node id, the inputs at least. The more are known, the less
            is computed.
        held_out: images to choose by.
        memory: bound on the moments of one convolution, in bytes.
        last: fit the last linear layer, too, if anything was fitted.

    Returns:
        What became of every merged convolution, in the order of the graph, and of the last linear layer.
    """
    segments = {segment["exit"]: segment for segment in graph_meta(gm).get("segments", ())}
    if not segments:
        return ()
    old = set(gm.modules())
    fold_segments(gm)
    work = _Refit(original, gm, (fit, held_out), memory)
    nodes = [node for node in gm.graph.nodes if node.meta.get(META, {}).get("exit") in segments]
    waiting = set(nodes)
    found = []
    with eval_mode(original), eval_mode(gm), torch.no_grad():
        for node in nodes:
            waiting.discard(node)
            candidate = Candidate.from_json(segments[node.meta[META]["exit"]]["candidate"])
            found.append(work.fit(node, candidate, waiting))
        classifier = work.fit_last() if last and any(not each.reason for each in found) else None
        sweep(gm)
    for module in set(gm.modules()) - old:
        module.train(gm.training)
    return (*found, *([] if classifier is None else [classifier]))


def known_inputs(gm: fx.GraphModule, batches: Iterable[Batch]) -> list[Known]:
    """Batches as :func:`refit` takes them: the inputs alone."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    run = recorder(gm, inputs)
    with eval_mode(gm):
        return [{node_id(node): value for node, value in run(batch)[1].items()} for batch in batches]


class _Refit:
    """One run of the pass."""

    def __init__(
        self, original: fx.GraphModule, gm: fx.GraphModule, parts: tuple[Sequence[Known], Sequence[Known]], memory: int
    ) -> None:
        self.original = original
        self.gm = gm
        self.memory = memory
        self.targets = by_id(original)
        changed = changed_nodes(original, gm)
        same = [node for node in gm.graph.nodes if node not in changed]
        self.originals = [[{self.targets[name]: v for name, v in batch.items()} for batch in part] for part in parts]
        # What gives the same as in the original is known in the compressed network, too.
        self.parts = [
            [{node: batch[node_id(node)] for node in same if node_id(node) in batch} for batch in part]
            for part in parts
        ]

    def fit(self, node: fx.Node, candidate: Candidate, waiting: set[fx.Node]) -> Refitted:
        """Fit one merged convolution, where that can be done."""
        module = module_of(self.gm, node)
        assert isinstance(module, CONVOLUTIONS)  # noqa: S101 - fold made it
        geometry = conv_geometry(module)
        reason = self._why_not(node, candidate, moments_bytes(geometry))
        if reason:
            return Refitted(node_id(node), reason=reason)
        source = node.all_input_nodes[0]
        total, other = self._joined(node, waiting)
        wanted = self.targets[candidate.exit if total is None else node_id(total)]
        read = [source] if other is None else [source, other]
        fit = self._solve(Moments(geometry), Moments(geometry), read, wanted, module.weight, module.bias)
        dtype = module.weight.dtype
        module.weight.copy_(fit.weight.to(dtype))
        assert module.bias is not None  # noqa: S101 - fold gives every convolution one
        module.bias.copy_(fit.bias.to(dtype))
        self._normalise(node, module)
        return _outcome(node_id(node), fit)

    def _why_not(self, node: fx.Node, candidate: Candidate, needed: int) -> str:
        if candidate.norm is not None:
            return f"the norm {candidate.norm!r} stands behind it"
        if candidate.activation is not None:
            return "an activation was put behind it"
        if node.meta[META].get("sides"):
            return "a side input passes through it"
        if candidate.exit not in self.targets:
            return f"the original has no value {candidate.exit!r}"
        if 2 * needed > self.memory:
            return f"its moments take {2 * needed / 2**30:.1f} GiB, more than memory allows"
        return ""

    def _joined(self, node: fx.Node, waiting: set[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition that alone reads a convolution, and the other operand, if that is final by now."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or reader.target is not _aten.add.Tensor or reader.kwargs or len(reader.args) != 2:
            return None, None
        first, second = reader.args
        other = second if first is node else first
        if not isinstance(other, fx.Node) or not is_tensor(other) or other is node:
            return None, None
        twin = self.targets.get(node_id(reader))
        if twin is None or twin.target is not _aten.add.Tensor or shape_of(reader) != shape_of(node):
            return None, None
        if not waiting.isdisjoint(_ancestors(other)):
            return None, None
        return reader, other

    def _solve(
        self,
        fitted: Moments,
        held_out: Moments,
        read: Sequence[fx.Node],
        wanted: fx.Node,
        weight: Tensor,
        bias: Tensor | None,
        shaped: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Fit:
        """Gather moments from all images: the first value read is the input, a second one comes off the target."""
        for moments, batches, originals in zip((fitted, held_out), self.parts, self.originals, strict=True):
            for known, reference in zip(batches, originals, strict=True):
                x, *others = (evaluate(self.gm, node, known) for node in read)
                target = evaluate(self.original, wanted, reference).double()
                moments.add(shaped(x), shaped(target - others[0] if others else target))
        start = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
        return fit_convolution(fitted, held_out, weight, start)

    def _normalise(self, node: fx.Node, module: Any) -> None:
        """Put a batch norm behind a convolution whose running statistics are what it scales and shifts back."""
        count, total, squares = 0, 0.0, 0.0
        axes = [0, *range(2, module.weight.ndim)]
        for known in self.parts[0]:
            wide: Any = evaluate(self.gm, node, known).double()
            count += wide.numel() // wide.shape[1]
            total, squares = total + wide.sum(axes), squares + wide.square().sum(axes)
        mean: Any = total / count
        variance: Any = (squares / count - mean.square()).clamp_min(1e-12)
        norm: Any = _NORMS[module.weight.ndim - 2](module.out_channels).to(module.weight)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
        behind = insert_behind(self.gm, node, norm.eval(), f"{node.target}_norm")
        del behind.meta[META]["made_of"]
        self.gm.recompile()

    def fit_last(self) -> Refitted | None:
        """Fit the linear layer whose output is the network's, if there is one."""
        output = next(iter(self.gm.graph.find_nodes(op="output")))
        node = output.all_input_nodes[0] if len(output.all_input_nodes) == 1 else None
        module = None if node is None else module_of(self.gm, node)
        if node is None or not isinstance(module, nn.Linear) or node_id(node) not in self.targets:
            return None
        source = node.all_input_nodes[0]
        if len(shape_of(source)) != 2 or str(node.target) in shared_targets(self.gm):
            return None
        pointwise = conv_geometry(nn.Conv1d(module.in_features, module.out_features, 1))
        if 2 * moments_bytes(pointwise) > self.memory:
            return None
        moments = Moments(pointwise), Moments(pointwise)
        weight = module.weight[..., None]
        wanted = self.targets[node_id(node)]
        fit = self._solve(*moments, [source], wanted, weight, module.bias, lambda value: value[..., None])
        module.weight.copy_(fit.weight[..., 0].to(module.weight.dtype))
        if module.bias is not None:
            module.bias.copy_(fit.bias.to(module.bias.dtype))
        return _outcome(node_id(node), fit)


def _outcome(name: str, fit: Fit) -> Refitted:
    return Refitted(name, fit.error, fit.prior_error, fit.rows_per_unknown, fit.strength is not None)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    pending, found = [node], {node}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found
