"""Replace linear segments by the one convolution that computes the same: lossless, on the current weights.

1. Every segment that :mod:`fxmerge.passes.relax` tagged becomes one convolution. A tensor without spatial extent that
   is added inside (a time embedding) passes through the rest of the segment as a matrix and is added behind it.
2. Elsewhere, neighbours that compose exactly become one convolution where it costs no more multiply-accumulates: a
   convolution with its batch norm, unpadded chains, a 1x1 without bias before a padded convolution, branches of linear
   maps that are added (RepVGG). Of the ways to do so the cheapest is taken.
3. Padding is never moved: a chain with inner padding stays (``inner-padding``), and so do what would cost more
   (``costs-more``), what is shared, batch norms without running statistics, and padding modes other than zeros. The
   result's ``refusals`` say so.

A folded convolution has the ids of those that it replaces under ``node.meta["fxmerge"]["made_of"]``, and that of the
last operation it replaces under ``"exit"``. The pass works in
place on a graph in eval mode: dropouts count as the identity. It needs the ids and shapes of a
canonical graph, and leaves them. Each convolution is checked in float64 before it is installed: against the operations
it replaces, on two random inputs of the segment's own entry shape, borders included, to 1e-10 of what varies between
them. A segment whose tag no longer matches the graph, because somebody edited it, is refused by name. A second run
changes nothing.
"""

from __future__ import annotations

__all__ = ["CHECK_TOLERANCE", "FoldPass", "FoldResult", "fold_graph", "fold_segments"]

import copy
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import as_torch_pad
from fxmerge.candidates import Refusal
from fxmerge.errors import InexactError, InternalError, UserError
from fxmerge.evaluate import evaluate
from fxmerge.folding import Composed, compose, convolve, exact_runs
from fxmerge.graph import (
    CONVOLUTIONS,
    META,
    between,
    by_id,
    graph_meta,
    is_convolution,
    memory_format_of,
    node_id,
    shape_of,
    shared_targets,
    sweep,
)
from fxmerge.passes._base import GraphPass
from fxmerge.surgery import insert_pad, insert_side

CHECK_TOLERANCE = 1e-10
"""Largest float64 difference of a folded segment, relative to what of its output varies with the input."""

_ROUNDING = 1e-14
"""Added to that, relative to the output's size: float64 itself is no better where the output hardly varies."""


class FoldResult(PassResult):
    """torch's PassResult with what could not be folded, and why."""

    refusals: tuple[Refusal, ...]

    def __new__(cls, graph_module: fx.GraphModule, modified: bool, refusals: tuple[Refusal, ...] = ()) -> FoldResult:
        """Make a result; ``refusals`` defaults to none."""
        result = super().__new__(cls, graph_module, modified)
        assert isinstance(result, FoldResult)  # noqa: S101 - what the line above makes
        result.refusals = refusals
        return result


class FoldPass(GraphPass):
    """Replace linear segments by single convolutions, in place; see the module docstring for the cases."""

    def call(self, graph_module: fx.GraphModule) -> FoldResult:
        """Apply the pass in place; what had to stay is in the result's ``refusals``."""
        modified, refusals = fold_graph(graph_module)
        return FoldResult(graph_module, modified, refusals)


def fold_graph(gm: fx.GraphModule) -> tuple[bool, tuple[Refusal, ...]]:
    """Fold in place; whether anything was folded, and the refusals.

    Raises:
        UserError: a tagged segment no longer matches the graph, or holds weights that are no numbers.
        InternalError: a folded convolution is not what it replaces.
    """
    tagged = fold_segments(gm)
    runs, refusals = exact_runs(gm)
    replaced: dict[fx.Node, fx.Node] = {}
    for run in runs:
        entry = replaced.get(run.entry, run.entry)
        replaced[run.exit] = _install(gm, entry, run.exit, Composed(run.conv_map), run.nodes)
    modified = tagged or bool(runs)
    if modified:
        sweep(gm)
    return modified, refusals


def fold_segments(gm: fx.GraphModule, *, check: bool = True) -> bool:
    """Fold the tagged segments alone, in place; whether there were any.

    Args:
        gm: a relaxed graph.
        check: compare every folded convolution with what it replaces, in float64.

    Raises:
        UserError: a segment no longer matches the graph.
        InternalError: a folded convolution is not what it replaces.
    """
    segments = graph_meta(gm).pop("segments", [])
    nodes = by_id(gm)
    shared = shared_targets(gm)
    replaced: dict[fx.Node, fx.Node] = {}
    for segment in segments:
        missing = [name for name in (segment["entry"], segment["exit"], *segment["members"]) if name not in nodes]
        if missing:
            raise _broken(segment, f"{missing[0]!r} is gone")
        entry, exit_ = nodes[segment["entry"]], nodes[segment["exit"]]
        entry = replaced.get(entry, entry)
        inside = between(entry, exit_)
        changed = sorted({node_id(node) for node in inside} ^ set(segment["members"]))
        if changed:
            raise _broken(segment, f"{changed[0]!r} was added or taken out")
        leak = next((n for n in sorted(inside) if n is not exit_ and not inside.issuperset(n.users)), None)
        if leak is not None:
            raise _broken(segment, f"{node_id(leak)!r} is read from outside")
        try:
            composed = compose(gm, entry, exit_, inside, shared)
        except InexactError as error:
            raise _broken(segment, str(error)) from error
        replaced[exit_] = _install(gm, entry, exit_, composed, inside, check=check)
    return bool(segments)


def _broken(segment: dict[str, Any], what: str) -> UserError:
    return UserError(
        f"the merged segment from {segment['entry']!r} to {segment['exit']!r} was edited: {what}. Undo the "
        "edit: weights may change, the graph of a segment may not."
    )


def _install(
    gm: fx.GraphModule,
    entry: fx.Node,
    exit_: fx.Node,
    composed: Composed,
    inside: Collection[fx.Node],
    *,
    check: bool = True,
) -> fx.Node:
    """Put the convolution, and the padding it cannot hold itself, in place of the operations between entry and exit."""
    if check:
        _check(gm, entry, exit_, composed, inside)
    path = next(str(node.target) for node in sorted(inside) if is_convolution(gm, node))
    weight = gm.get_parameter(f"{path}.weight")
    conv, sides = composed.conv_map.to_conv(weight.dtype, weight.device)
    # Where the entry may be overwritten later, it has to be read where it was; side inputs may be computed later.
    place = exit_ if composed.sides else min(node for node in inside if entry in node.all_input_nodes)
    source = entry if sides is None else insert_pad(gm, entry, *sides, before=place)
    with gm.graph.inserting_before(place):
        new = gm.graph.call_module(path, (source,))
        new.meta[META] = {**exit_.meta[META], "id": path, "made_of": _convolutions(gm, inside), "exit": node_id(exit_)}
        if composed.sides:
            new.meta[META]["sides"] = [node_id(value) for value in composed.sides]
        for value, matrix in composed.sides.items():
            new = insert_side(gm, new, value, matrix.to(weight), f"{path}_side")
    exit_.replace_all_uses_with(new)
    for node in sorted(inside, reverse=True):
        gm.graph.erase_node(node)
    layout = memory_format_of(gm, composed.conv_map.geometry.dims)
    gm.add_submodule(path, conv.eval().to(memory_format=layout))  # type: ignore[call-overload]  # torch's signatures lack it
    return new


def _convolutions(gm: fx.GraphModule, inside: Collection[fx.Node]) -> list[str]:
    return [node_id(node) for node in sorted(inside) if is_convolution(gm, node)]


def _check(gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, composed: Composed, inside: Collection[fx.Node]) -> None:
    """Compare the convolution with what it replaces, in float64 on random values at the segment's own entry shape."""
    conv, sides = composed.conv_map.to_conv(torch.float64)
    generator = torch.Generator().manual_seed(0)

    def draw(node: fx.Node) -> Tensor:
        value = torch.randn(2, *shape_of(node)[1:], generator=generator, dtype=torch.float64)
        return value.to(conv.weight.device)

    known = {node: draw(node) for node in (entry, *composed.sides)}
    value = known[entry]
    with torch.no_grad():
        expected = evaluate(gm, exit_, known, _in_float64)
        found = convolve(conv, value if sides is None else F.pad(value, as_torch_pad(*sides)))
        for node, matrix in composed.sides.items():
            found = found + (known[node].flatten(1) @ matrix.T).reshape(2, -1, *(1,) * composed.conv_map.geometry.dims)
        difference = _largest(expected - found)
        allowed = CHECK_TOLERANCE * _largest(expected - expected.mean(dim=0)) + _ROUNDING * _largest(expected)
    name = f"the segment from {node_id(entry)!r} to {node_id(exit_)!r}"
    if not expected.isfinite().all():
        raise UserError(f"{name} holds weights or batch-norm statistics that are not finite: it cannot fold.")
    if not difference <= allowed:
        raise InternalError(
            f"{name} ({len(inside)} operations) folds to {composed.conv_map.geometry} with an error of {difference:.1e} "
            f"(allowed {allowed:.1e}). Please report this network."
        )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _in_float64(thing: nn.Module | Tensor) -> Any:
    if isinstance(thing, Tensor):
        return thing.double() if thing.is_floating_point() else thing
    double = copy.deepcopy(thing).double().eval()
    if isinstance(double, CONVOLUTIONS):
        return lambda value: convolve(double, value)
    return double
