"""Which operations are exactly one convolution: composing a segment, and finding those that are linear already."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .algebra import (
    Conv,
    ConvMap,
    Geometry,
    add_geometries,
    add_maps,
    as_torch_pad,
    concat_geometries,
    concat_maps,
    constant_response,
)
from .candidates import Refusal
from .errors import InexactError
from .graph import (
    CONVOLUTIONS,
    META,
    device_of,
    is_convolution,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    shared_targets,
)
from .linear import AVERAGE_POOLS, Barrier, Linear, Removable, Side, conv_geometry, linear_map, meaning, source_of
from .regions import JOINS, Mesh, Region, Series, all_series, operations, region_tree
from .surgery import join_operands

__all__ = ["Composed", "Run", "compose", "compose_geometry", "convolve", "exact_runs"]

_Map = TypeVar("_Map", "Composed", Geometry)

_WEIGHT = 10
"""Multiply-accumulates that take as long as reading a weight: at a few pixels that is what a convolution takes."""

_TOLD = ("shared", "padding-mode", "batch-statistics", "in-place")
"""Reasons that keep a convolution or batch norm from folding and that a user may be able to remove."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbouring operations that are one convolution.

    Attributes:
        entry: the value that they read.
        exit: the value that they give.
        nodes: the operations, ``exit`` among them.
        conv_map: what they compute.
        macs: multiply-accumulates of one image, apart, those of average pools among them.
        weights: of all convolutions, apart.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    conv_map: ConvMap
    macs: int
    weights: int

    @property
    def folded_macs(self) -> int:
        """Multiply-accumulates of one image as one convolution."""
        return self.conv_map.geometry.macs(shape_of(self.entry)[2:])

    @property
    def folded_weights(self) -> int:
        """Weights of that convolution."""
        return math.prod(self.conv_map.geometry.weight_shape)

    @property
    def gain(self) -> int:
        """How much less one convolution takes, in multiply-accumulates of one image; reading a weight counts as several."""
        return self.macs - self.folded_macs + _WEIGHT * (self.weights - self.folded_weights)

    @property
    def saved(self) -> int:
        """How many operations fewer there are as one convolution, with the padding that it cannot hold itself."""
        geometry = self.conv_map.geometry
        held = geometry.left == geometry.right and min(geometry.left) >= 0
        return len(self.nodes) - (1 if held else 2)


@dataclass(frozen=True, slots=True, eq=False)
class Composed:
    """What a segment computes: one map of its entry, and of tensors that are constant over space one matrix each.

    Attributes:
        conv_map: of the entry.
        sides: value of shape (N or 1, channels, 1, ...) -> (out_channels, channels), float64: what is added to every
            position.
    """

    conv_map: ConvMap
    sides: Mapping[fx.Node, Tensor] = field(default_factory=dict)

    def then(self, second: Composed) -> Composed:
        """This followed by another, as :meth:`fxmerge.algebra.ConvMap.then`; sides pass through the second's taps."""
        carried: dict[fx.Node, Tensor] = {}
        if self.sides:
            response = constant_response(second.conv_map)
            carried = {value: response @ matrix for value, matrix in self.sides.items()}
        return Composed(self.conv_map.then(second.conv_map), _sum_of_sides([carried, second.sides]))


def _sum_of_sides(sides: Iterable[Mapping[fx.Node, Tensor]]) -> dict[fx.Node, Tensor]:
    total: dict[fx.Node, Tensor] = {}
    for each in sides:
        for value, matrix in each.items():
            total[value] = total[value] + matrix if value in total else matrix
    return total


def _add(composed: list[Composed]) -> Composed:
    return Composed(add_maps([each.conv_map for each in composed]), _sum_of_sides(each.sides for each in composed))


def _stack(composed: list[Composed]) -> Composed:
    total = sum(each.conv_map.geometry.out_channels for each in composed)
    start, sides = 0, []
    for each in composed:
        stop = start + each.conv_map.geometry.out_channels
        sides.append({value: F.pad(matrix, (0, 0, start, total - stop)) for value, matrix in each.sides.items()})
        start = stop
    return Composed(concat_maps([each.conv_map for each in composed]), _sum_of_sides(sides))


def compose(
    gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, inside: Iterable[fx.Node], shared: frozenset[str]
) -> Composed:
    """The one map from ``entry`` to ``exit_`` that the operations ``inside`` are, in eval mode.

    ``shared`` are the paths of :func:`fxmerge.graph.shared_targets`.

    Raises:
        InexactError: they are not one; ``code`` says why, and the message names the operation.
    """
    device = device_of(gm)
    start = Composed(ConvMap.identity(shape_of(entry)[1], len(shape_of(entry)) - 2, device=device))

    def map_of(node: fx.Node) -> Composed:
        geometry = _geometry_of(gm, node, shared)  # raises where it has none
        what = meaning(gm, node, shared)
        if isinstance(what, Side):
            identity = ConvMap.identity(geometry.in_channels, geometry.dims, device=device)
            sign = -1.0 if node.target is torch.ops.aten.sub.Tensor else 1.0
            return Composed(identity, {what.value: sign * torch.eye(geometry.in_channels).to(identity.weight)})
        return Composed(_map_on(device, gm, node))

    return _walk({entry: start}, exit_, inside, map_of, _add, _stack)


def compose_geometry(
    gm: fx.GraphModule, entry: fx.Node, exit_: fx.Node, inside: Iterable[fx.Node], shared: frozenset[str]
) -> Geometry:
    """The geometry of what :func:`compose` gives, without touching a weight.

    Raises:
        InexactError: an operation is not linear, or a join is no plain sum or stack.
    """
    start = Geometry.identity(shape_of(entry)[1], len(shape_of(entry)) - 2)
    geometry_of = functools.partial(_geometry_of, gm, shared=shared)
    return _walk({entry: start}, exit_, inside, geometry_of, add_geometries, concat_geometries)


def _walk(
    values: dict[fx.Node, _Map],
    exit_: fx.Node,
    inside: Iterable[fx.Node],
    leaf: Callable[[fx.Node], _Map],
    add: Callable[[list[_Map]], _Map],
    stack: Callable[[list[_Map]], _Map],
) -> _Map:
    """Carry maps, or geometries, from the one value in ``values`` through the operations ``inside``."""
    (entry,) = values
    for node in sorted(inside):
        kind = JOINS.get(node.target)  # type: ignore[call-overload]
        if kind == "concat" or (kind and sum(operand in values for operand in join_operands(node)) > 1):
            joined = _joined(node, values)
            values[node] = (stack if kind == "concat" else add)(joined)
            continue
        found = leaf(node)
        sources = [source for source in node.all_input_nodes if source in values]
        if len(sources) != 1 or sources[0] is not source_of(node):
            raise InexactError("not-linear", f"{node_id(node)!r} cannot fold: it works on a value of another place")
        values[node] = found if sources[0] is entry else values[sources[0]].then(found)
    return values[exit_]


def _joined(node: fx.Node, values: Mapping[fx.Node, _Map]) -> list[_Map]:
    kind = JOINS[node.target]  # type: ignore[index]
    operands = join_operands(node)
    found = [values[operand] for operand in operands if operand in values]
    plain = list(node.args[1:]) == [1] if kind == "concat" else kind in ("add", "sub") and len(operands) == 2
    strides = {each.stride if isinstance(each, Geometry) else each.conv_map.geometry.stride for each in found}
    if not plain or node.kwargs or len(found) < len(operands) or len(strides) > 1:
        raise InexactError("not-linear", f"{node_id(node)!r} cannot fold: it is no plain sum or stack of linear maps")
    return [found[0], _negated(found[1])] if kind == "sub" else found


def _negated(found: _Map) -> _Map:
    if isinstance(found, Geometry):
        return found
    minus = -torch.ones_like(found.conv_map.bias)
    return found.then(Composed(ConvMap.scale(minus, torch.zeros_like(minus), found.conv_map.geometry.dims)))


def _geometry_of(gm: fx.GraphModule, node: fx.Node, shared: frozenset[str]) -> Geometry:
    what = meaning(gm, node, shared)
    if isinstance(what, Linear):
        return what.geometry
    if isinstance(what, Side) or (isinstance(what, Removable) and what.free):
        return Geometry.identity(shape_of(node)[1], len(shape_of(node)) - 2)
    code, reason = (
        (what.code, what.reason) if isinstance(what, Barrier) else ("not-linear", "it is an activation or norm")
    )
    raise InexactError(code, f"{node_id(node)!r} cannot fold: {reason}")


def _map_on(device: torch.device, gm: fx.GraphModule, node: fx.Node) -> ConvMap:
    """The operation's map, on the network's device even where it has no weights."""
    found = linear_map(gm, node)
    tensors = {name: getattr(found, name).to(device) for name in ("weight", "bias", "pad_value")}
    return replace(found, **tensors)


def convolve(conv: Conv, value: Tensor) -> Tensor:
    """What ``conv(value)`` gives, many times faster for depthwise convolutions in float64.

    torch runs each of their groups by itself there; this adds the taps, each over all channels at once.
    """
    geometry = conv_geometry(conv)
    if (
        geometry.groups < geometry.in_channels
        or geometry.groups < geometry.out_channels
        or conv.padding_mode != "zeros"
    ):
        output: Tensor = conv(value)
        return output
    ones = (1,) * geometry.dims
    size = geometry.out_size(value.shape[2:])
    padded = F.pad(value, as_torch_pad(geometry.left, geometry.right))
    total = value.new_zeros(()) if conv.bias is None else conv.bias.view(-1, *ones)
    taps = conv.weight.flatten(1).unbind(dim=1)
    for tap, weight in zip(itertools.product(*map(range, geometry.kernel)), taps, strict=True):
        steps = zip(tap, geometry.dilation, geometry.stride, size, strict=True)
        window: tuple[Any, ...] = (..., *(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in steps))
        total = total + padded[window] * weight.view(-1, *ones)
    return total


def exact_runs(gm: fx.GraphModule) -> tuple[list[Run], tuple[Refusal, ...]]:
    """The disjoint runs that fold exactly where they stand, and why others do not.

    Every interval of a Series is tried. Of those that compose exactly, cost no more multiply-accumulates as one and
    leave fewer operations, the set is taken that saves most multiply-accumulates, then most operations.
    """
    search = _Search(gm)
    found: list[Run] = []
    taken: set[int] = set()
    for series in all_series(region_tree(gm)):
        if id(series) in taken:
            continue
        for start, stop, run in _cheapest(search.runs(series), len(series.children)):
            found.append(run)
            taken |= {id(inner) for child in series.children[start:stop] for inner in all_series(child)}
    together = [set(run.nodes) for run in found]
    kept = [each for ends, each in search.refusals.items() if not any(nodes.issuperset(ends) for nodes in together)]
    return found, tuple(kept)


class _Search:
    """The search of one graph, with the refusals met on the way, by the operations that they are about."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.shared = shared_targets(gm)
        self.refusals: dict[tuple[fx.Node, fx.Node], Refusal] = {}

    def runs(self, series: Series) -> Iterator[tuple[int, int, Run]]:
        """Every interval (start, stop) of the children that may fold."""
        entries = [series.entry, *(child.exit for child in series.children)]
        steps = [self._step(*pair) for pair in zip(entries, series.children, strict=False)]
        for start, first in enumerate(steps):
            total = first
            for stop in range(start + 1, len(steps) + 1):
                total = first if stop == start + 1 else self._then(total, steps[stop - 1])
                if total is None:
                    break
                if not (total.weights and total.saved > 0 and _is_closed(total) and _reads_in_time(total)):
                    continue
                if self._holds(total) and self._pays(total):
                    yield start, stop, total

    def _step(self, entry: fx.Node | None, region: Region) -> Run | None:
        """One child of a Series as a run, None where it is not one exactly."""
        if entry is None or isinstance(region, Mesh) or not is_tensor(entry) or len(shape_of(entry)) < 3:
            return None
        nodes = tuple(operations(region))
        if not all(self._linear(node) for node in nodes):
            return None
        try:
            composed = compose(self.gm, entry, region.exit, nodes, self.shared)
        except InexactError as error:
            if error.code != "not-linear":
                self._refuse(error.code, nodes, str(error))
            return None
        if composed.sides:
            return None
        macs, weights = (sum(each) for each in zip(*map(self._costs, nodes), strict=True))
        return Run(entry, region.exit, nodes, composed.conv_map, macs, weights)

    def _linear(self, node: fx.Node) -> bool:
        if node.target in JOINS:
            return not node.meta[META].get("opaque")
        if not is_tensor(node) or len(shape_of(node)) < 3:
            return False
        what = meaning(self.gm, node, self.shared)
        if isinstance(what, Barrier) and what.code in _TOLD:
            self._refuse(what.code, (node,), f"{node_id(node)!r} cannot fold: {what.reason}")
        return isinstance(what, Linear) or (isinstance(what, Removable) and what.free)

    def _costs(self, node: fx.Node) -> tuple[int, int]:
        """Multiply-accumulates and weights of an operation; an average pool is a depthwise convolution that reads none."""
        module, what = module_of(self.gm, node), meaning(self.gm, node, self.shared)
        if not isinstance(module, (*CONVOLUTIONS, *AVERAGE_POOLS)) or not isinstance(what, Linear):
            return 0, 0
        weights = module.weight.numel() if isinstance(module, CONVOLUTIONS) else 0
        return what.geometry.macs(shape_of(node.all_input_nodes[0])[2:]), weights

    def _then(self, first: Run | None, second: Run | None) -> Run | None:
        if first is None or second is None:
            return None
        nodes = (*first.nodes, *second.nodes)
        try:
            conv_map = first.conv_map.then(second.conv_map)
        except InexactError as error:
            if first.weights:
                self._refuse(error.code, nodes, str(error))
            return None
        return Run(first.entry, second.exit, nodes, conv_map, first.macs + second.macs, first.weights + second.weights)

    def _holds(self, run: Run) -> bool:
        """Whether a convolution can be padded as the run is: with zeros."""
        if not (run.conv_map.geometry.is_padded and bool(run.conv_map.pad_value.any())):
            return True
        reason = "one convolution would have to pad with a value of its own for each channel, not with zeros"
        self._refuse("inner-padding", run.nodes, reason)
        return False

    def _pays(self, run: Run) -> bool:
        if run.gain >= 0:
            return True
        last = max(index for index, node in enumerate(run.nodes) if is_convolution(self.gm, node))
        reason = (
            f"one convolution would take {run.folded_macs} multiply-accumulates an image and have {run.folded_weights} weights, "
            f"apart they take {run.macs} and have {run.weights}"
        )
        self._refuse("costs-more", run.nodes[: last + 1], reason)
        return False

    def _refuse(self, code: str, nodes: Sequence[fx.Node], reason: str) -> None:
        first = next((node for node in nodes if is_convolution(self.gm, node)), nodes[0])
        refusal = Refusal(code, node_id(first), node_id(nodes[-1]), reason)
        self.refusals.setdefault((first, nodes[-1]), refusal)


def _is_closed(run: Run) -> bool:
    """Whether nobody else reads a value inside."""
    return all(reader in run.nodes for node in run.nodes if node is not run.exit for reader in node.users)


def _reads_in_time(run: Run) -> bool:
    """Whether a convolution in the place of the run's first reader reads what all of them read.

    A value that is written in place may have changed between two readers.
    """
    return not run.entry.meta[META].get("opaque") or sum(run.entry in node.all_input_nodes for node in run.nodes) == 1


def _cheapest(runs: Iterable[tuple[int, int, Run]], length: int) -> list[tuple[int, int, Run]]:
    """The disjoint runs that gain most, then those that save most operations."""
    ending: dict[int, list[tuple[int, int, Run]]] = {}
    for each in runs:
        ending.setdefault(each[1], []).append(each)
    best: list[tuple[int, int]] = [(0, 0)]
    chosen: list[tuple[int, int, Run] | None] = [None]
    for stop in range(1, length + 1):
        best.append(best[-1])
        chosen.append(None)
        for start, _, run in ending.get(stop, ()):
            saved, fewer = best[start]
            value = saved + run.gain, fewer + run.saved
            if value > best[stop]:
                best[stop], chosen[stop] = value, (start, stop, run)
    picked: list[tuple[int, int, Run]] = []
    stop = length
    while stop:
        one = chosen[stop]
        if one is not None:
            picked.append(one)
        stop = stop - 1 if one is None else one[0]
    return picked[::-1]
