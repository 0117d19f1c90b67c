"""Replace linear segments by the one convolution that computes the same: lossless, on the current weights.

1. Every segment that :mod:`fxmerge.passes.relax` tagged becomes one convolution.
2. Elsewhere, runs of a Series that compose exactly become one convolution where it costs no more multiply-accumulates than
   before: a convolution with its batch norm, unpadded chains, a 1x1 without bias before a padded convolution, branches of linear
   maps that are added (RepVGG). Among exact runs the cheapest partition is taken.
3. Padding is never moved: a chain with inner padding stays as it is (``inner-padding``), and so does what is shared, has batch
   norm without running statistics, or a padding mode other than zeros.

The pass works in place on a graph in eval mode: dropouts count as the identity. Each fold is computed and checked in float64:
the new convolution against the operations it replaces, at the segment's own entry shape, borders included, to 1e-10 of the
largest deviation from the mean; :class:`fxmerge.InternalError` otherwise. A segment whose tag no longer matches the graph, because
somebody edited it, is refused by name.
"""

from __future__ import annotations

__all__ = ["FoldPass", "FoldResult", "fold_graph"]

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import ConvMap, add_maps, as_torch_pad, concat_maps
from fxmerge.candidates import Refusal
from fxmerge.errors import InexactError, InternalError, UserError
from fxmerge.graph import (
    META,
    by_id,
    graph_meta,
    is_convolution,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    shared_targets,
    sweep,
)
from fxmerge.linear import Barrier, Linear, Removable, linear_map, meaning
from fxmerge.regions import JOINS, Op, Parallel, Region, Series, all_series, region_tree

from ._base import GraphPass
from .relax import between

CHECK_TOLERANCE = 1e-10
"""Largest allowed float64 difference of a folded segment, relative to its output's deviation from the mean (DESIGN)."""


class FoldResult(PassResult):
    """torch's PassResult with what could not be folded, and why."""

    refusals: tuple[Refusal, ...]

    def __new__(cls, graph_module: fx.GraphModule, modified: bool, refusals: tuple[Refusal, ...] = ()) -> FoldResult:
        """Make a result; ``refusals`` defaults to none."""
        result: FoldResult = super().__new__(cls, graph_module, modified)
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
        UserError: a tagged segment no longer matches the graph.
        InternalError: a folded convolution is not what it replaces.
    """
    tagged = _fold_tagged(gm)
    exact, refusals = _fold_exact(gm)
    if tagged or exact:
        sweep(gm)
    return tagged or exact, refusals


# --- tagged segments -------------------------------------------------------------------------------------------------------


def _fold_tagged(gm: fx.GraphModule) -> bool:
    segments = graph_meta(gm).pop("segments", [])
    nodes = by_id(gm)
    moved: dict[fx.Node, fx.Node] = {}
    for segment in segments:
        missing = [name for name in (segment["entry"], segment["exit"], *segment["members"]) if name not in nodes]
        if missing:
            raise _broken(segment, f"{missing[0]!r} is gone")
        entry, exit_ = nodes[segment["entry"]], nodes[segment["exit"]]
        entry = moved.get(entry, entry)
        inside = between(entry, exit_)
        if {node_id(node) for node in inside} != set(segment["members"]):
            changed = sorted({node_id(node) for node in inside} ^ set(segment["members"]))
            raise _broken(segment, f"{changed[0]!r} was added or taken out")
        leak = next((node for node in inside if node is not exit_ and any(user not in inside for user in node.users)), None)
        if leak is not None:
            raise _broken(segment, f"{node_id(leak)!r} is read from outside")
        conv_map = _compose(gm, entry, exit_, inside, segment)
        moved[exit_] = _install(gm, entry, exit_, conv_map, inside)
    return bool(segments)


def _broken(segment: dict[str, Any], what: str) -> UserError:
    return UserError(
        f"the merged segment from {segment['entry']!r} to {segment['exit']!r} was edited: {what}. Undo the edit, or keep its "
        "operations as fxmerge left them: weights may change, the graph of a segment may not."
    )


def _compose(
    gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, inside: set[fx.Node], segment: dict[str, Any]
) -> ConvMap:
    """Walk the segment in execution order, carrying the map from the entry to every value."""
    maps: dict[fx.Node, ConvMap] = {entry: ConvMap.identity(shape_of(entry)[1], len(shape_of(entry)) - 2)}
    for node in gm.graph.nodes:
        if node not in inside:
            continue
        if node.target in JOINS:
            operands = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:2]
            join = concat_maps if JOINS[node.target] == "concat" else add_maps
            maps[node] = join([maps[operand] for operand in operands])
            continue
        what = meaning(gm, node, frozenset())
        if isinstance(what, Barrier) or (isinstance(what, Removable) and not what.free):
            raise _broken(segment, f"{node_id(node)!r} is not linear")
        maps[node] = maps[node.args[0]].then(linear_map(gm, node))
    return maps[exit_]


# --- exact folds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """Children ``start`` to ``stop`` of a Series as one map, with what they and it cost."""

    start: int
    stop: int
    conv_map: ConvMap
    before: int
    after: int


def _fold_exact(gm: fx.GraphModule) -> tuple[bool, tuple[Refusal, ...]]:
    shared = shared_targets(gm)
    refusals: dict[tuple[str, str], Refusal] = {}
    folds: list[tuple[fx.Node, fx.Node, ConvMap]] = []
    taken: set[int] = set()
    for series in all_series(region_tree(gm)):
        if id(series) in taken:
            continue
        for run in _cheapest(_exact_runs(gm, series, shared, refusals), len(series.children)):
            entry = series.entry if run.start == 0 else series.children[run.start - 1].exit
            exit_ = series.children[run.stop - 1].exit
            assert entry is not None and exit_ is not None  # noqa: S101, PT018 - runs have linear operations only
            folds.append((entry, exit_, run.conv_map))
            taken |= {id(inner) for child in series.children[run.start : run.stop] for inner in all_series(child)}
    moved: dict[fx.Node, fx.Node] = {}
    for entry, exit_, conv_map in folds:
        source = moved.get(entry, entry)
        moved[exit_] = _install(gm, source, exit_, conv_map, between(source, exit_))
    return bool(folds), tuple(refusals.values())


def _exact_runs(
    gm: fx.GraphModule, series: Series, shared: frozenset[str], refusals: dict[tuple[str, str], Refusal]
) -> list[_Run]:
    """All intervals of at least two operations that compose exactly and cost no more as one."""
    steps = [_exact_map(gm, child, shared) for child in series.children]
    runs = []
    for start, first in enumerate(steps):
        entry = series.entry if start == 0 else series.children[start - 1].exit
        if first is None or entry is None or not is_tensor(entry):
            continue
        size = shape_of(entry)[2:]
        total, before = first
        operations = _count(series.children[start])
        for stop in range(start + 1, len(steps) + 1):
            if stop > start + 1:
                step = steps[stop - 1]
                if step is None:
                    break
                joined = _then(total, step[0], series.children[start : stop], refusals)
                if joined is None:
                    break
                total, before, operations = joined, before + step[1], operations + _count(series.children[stop - 1])
            after = total.geometry.macs(size)
            if operations > 1 and after <= before:
                runs.append(_Run(start, stop, total, before, after))
    return runs


def _then(
    first: ConvMap, second: ConvMap, regions: Sequence[Region], refusals: dict[tuple[str, str], Refusal]
) -> ConvMap | None:
    try:
        return first.then(second)
    except InexactError as error:
        names = [node_id(region.exit) for region in regions if region.exit is not None]
        refusals.setdefault((names[0], names[-1]), Refusal(error.code, names[0], names[-1], str(error)))
        return None


def _exact_map(gm: fx.GraphModule, region: Region, shared: frozenset[str]) -> tuple[ConvMap, int] | None:
    """The map of one child with its multiply-accumulates, None where it is not one exactly."""
    if isinstance(region, Op):
        what = meaning(gm, region.exit, shared)
        spatial = region.exit.op != "placeholder" and is_tensor(region.exit) and len(shape_of(region.exit)) >= 3
        if not spatial or isinstance(what, Barrier) or (isinstance(what, Removable) and not what.free):
            return None
        cost = what.geometry.macs(shape_of(region.exit.all_input_nodes[0])[2:]) if is_convolution(gm, region.exit) and isinstance(what, Linear) else 0
        return linear_map(gm, region.exit), cost
    if not isinstance(region, Parallel) or region.join == "mul" or region.entry is None or len(shape_of(region.entry)) < 3:
        return None
    if region.join == "concat" and list(region.exit.args[1:]) != [1]:
        return None
    maps, cost = [], 0
    for branch in region.branches:
        total = ConvMap.identity(shape_of(region.entry)[1], len(shape_of(region.entry)) - 2)
        for child in () if branch is None else branch.children:
            step = _exact_map(gm, child, shared)
            if step is None:
                return None
            try:
                total = total.then(step[0])
            except InexactError:
                return None
            cost += step[1]
        maps.append(total)
    if len({each.geometry.stride for each in maps}) > 1:
        return None
    try:
        return (add_maps if region.join == "add" else concat_maps)(maps), cost
    except InexactError:
        return None


def _count(region: Region) -> int:
    if isinstance(region, Parallel):
        return 1 + sum(_count(child) for branch in region.branches if branch is not None for child in branch.children)
    return 1


def _cheapest(runs: Sequence[_Run], length: int) -> list[_Run]:
    """The disjoint runs that save most multiply-accumulates, then most operations."""
    best: list[tuple[int, int]] = [(0, 0)]
    chosen: list[_Run | None] = [None]
    for stop in range(1, length + 1):
        best.append(best[-1])
        chosen.append(None)
        for run in runs:
            if run.stop != stop:
                continue
            saved, fewer = best[run.start]
            value = (saved + run.before - run.after, fewer + run.stop - run.start)
            if value > best[stop]:
                best[stop], chosen[stop] = value, run
    picked: list[_Run] = []
    stop = length
    while stop:
        run = chosen[stop]
        if run is not None:
            picked.append(run)
        stop = stop - 1 if run is None else run.start
    return picked[::-1]


# --- install and check -----------------------------------------------------------------------------------------------------


def _install(
    gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, conv_map: ConvMap, inside: set[fx.Node]
) -> fx.Node:
    """Put the convolution (and the padding it cannot hold itself) in place of the operations between entry and exit."""
    _check(gm, entry, exit_, conv_map, inside)
    path = next(str(node.target) for node in gm.graph.nodes if node in inside and is_convolution(gm, node))
    old = gm.get_submodule(path)
    conv, sides = conv_map.to_conv(old.weight.dtype, old.weight.device)  # type: ignore[arg-type]
    conv.training = False
    with gm.graph.inserting_before(exit_):
        source = entry
        if sides is not None:
            source = gm.graph.call_function(F.pad, (entry, as_torch_pad(*sides)))
            size = [n + a + b for n, a, b in zip(shape_of(entry)[2:], *sides, strict=True)]
            source.meta[META] = {**entry.meta[META], "id": f"{path}/pad", "shape": [*shape_of(entry)[:2], *size]}
        new = gm.graph.call_module(path, (source,))
    new.meta[META] = {**exit_.meta[META], "id": path}
    exit_.replace_all_uses_with(new)
    for node in sorted(inside, reverse=True):
        gm.graph.erase_node(node)
    gm.delete_submodule(path)
    gm.add_submodule(path, conv)
    return new


def _check(gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, conv_map: ConvMap, inside: set[fx.Node]) -> None:
    """Compare the convolution with what it replaces, in float64 on random values at the segment's own entry shape."""
    shape = shape_of(entry)
    device = conv_map.weight.device
    generator = torch.Generator(device="cpu").manual_seed(0)
    value = torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        expected = run_segment(gm, entry, exit_, inside, value)
        found = conv_map.apply(value)
        difference = float((expected - found).abs().max())
        scale = float((expected - expected.mean()).abs().max())
    if not difference <= CHECK_TOLERANCE * max(scale, math.ulp(1.0)):
        raise InternalError(
            f"the segment from {node_id(entry)!r} to {node_id(exit_)!r} folds to {conv_map.geometry} with an error of "
            f"{difference / max(scale, math.ulp(1.0)):.1e} (allowed {CHECK_TOLERANCE:.0e}). Please report this network."
        )


def run_segment(
    gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, inside: set[fx.Node], value: Tensor
) -> Tensor:
    """Compute the exit of a segment from a value at its entry, in the value's dtype, in eval mode."""
    values: dict[fx.Node, Any] = {entry: value}
    for node in gm.graph.nodes:
        if node not in inside:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        module = module_of(gm, node)
        if module is None:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            values[node] = copy.deepcopy(module).to(value.dtype).eval()(*args, **kwargs)
    result: Tensor = values[exit_]
    return result
