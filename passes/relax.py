"""Apply a plan's candidates: remove what each says, and move a merged segment's padding to its entry. The result still trains.

This is the lossy rewrite. For each candidate:

1. **merge**: its activations, dropouts and bypassed convolutions (each with its batch norm) go; the remaining convolutions lose
   their padding, and one zero padding by the segment's L and R stands at the entry. Where branches of different reach join, the
   shorter ones crop their input by L_join - L_branch, an identity skip too. What is left is exactly one convolution:
   :mod:`fxmerge.passes.fold` computes it. An activation may be inserted behind.
2. **bypass**: readers of the exit read the entry.
3. **drop**: the join loses one operand; with one left, its readers read that one.

Every merged segment is tagged in ``gm.meta["fxmerge"]["segments"]``: entry, exit, members and padding, by node id. The pass
needs the ids and shapes of a canonical graph, and refuses candidates that name operations the graph does not have. An empty list
of candidates changes nothing, and a second run finds its operations gone and refuses.
"""

from __future__ import annotations

__all__ = ["RelaxPass", "relax"]

from collections.abc import Sequence

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import Geometry, add_geometries, as_torch_pad, concat_geometries, crops
from fxmerge.candidates import Candidate
from fxmerge.errors import InternalError, PlanError
from fxmerge.graph import CONVOLUTIONS, META, by_id, graph_meta, module_of, node_id, record_shapes, shape_of, sweep
from fxmerge.linear import conv_geometry, meaning, Linear, Removable, pad_sides
from fxmerge.regions import Op, Parallel, Region, Series, all_series, region_tree

from ._base import GraphPass


class RelaxPass(GraphPass):
    """Apply candidates to a canonical graph, in place; see the module docstring for the cases.

    Attributes:
        candidates: what to apply; segments must not overlap.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        super().__init__()
        self.candidates = tuple(candidates)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the pass in place."""
        return PassResult(graph_module, relax(graph_module, self.candidates))


def relax(gm: fx.GraphModule, candidates: Sequence[Candidate]) -> bool:
    """Rewrite ``gm`` in place as the module docstring says; True if there was anything to do.

    Raises:
        PlanError: a candidate names an operation that the graph does not have, or no region of it.
        InternalError: the relaxed segment is not the one that was enumerated.
    """
    if not candidates:
        return False
    rewrite = _Rewrite(gm)
    for candidate in candidates:
        rewrite.apply(candidate)
    rewrite.finish()
    return True


class _Rewrite:
    """One run of the pass: node lookups, and what removed values were replaced by."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = by_id(gm)
        self.moved: dict[fx.Node, fx.Node] = {}
        self.tagged: list[tuple[Candidate, fx.Node, fx.Node]] = []
        self.places: dict[fx.Node, tuple[Series, int]] = {}
        for series in all_series(region_tree(gm)):
            for index, child in enumerate(series.children):
                if child.exit is not None:
                    self.places[child.exit] = (series, index)

    def apply(self, candidate: Candidate) -> None:
        for join, position in candidate.cuts if candidate.kind == "drop" else ():
            self._cut(self._node(join), position)
        if candidate.kind == "bypass":
            self._replace(self._node(candidate.exit), self._node(candidate.entry))
        if candidate.kind == "merge":
            self._merge(candidate)

    def finish(self) -> None:
        sweep(self.gm)
        record_shapes(self.gm)
        segments = [self._tag(*each) for each in self.tagged]
        graph_meta(self.gm)["segments"] = [*graph_meta(self.gm).get("segments", ()), *segments]

    def _node(self, name: str) -> fx.Node:
        node = self.nodes.get(name)
        if node is None:
            raise PlanError(f"the plan speaks of {name!r}, which this network does not have. Make a plan for this network.")
        return node

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self.moved:
            node = self.moved[node]
        return node

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        by = self._now(by)
        node.replace_all_uses_with(by)
        self.moved[node] = by

    def _cut(self, join: fx.Node, position: int) -> None:
        series, index = self.places[join]
        region = series.children[index]
        if not isinstance(region, Parallel) or len(region.branches) != 2:
            raise PlanError(f"{node_id(join)!r} joins no two branches of which one could be dropped")
        self._replace(join, _operand(join, 1 - position))

    # --- merge -------------------------------------------------------------------------------------------------------------

    def _merge(self, candidate: Candidate) -> None:
        entry, exit_ = self._node(candidate.entry), self._node(candidate.exit)
        series, last = self.places[exit_]
        ends = [series.entry, *(child.exit for child in series.children)]
        if entry not in ends[: last + 1]:
            raise PlanError(f"{candidate.entry!r} and {candidate.exit!r} do not bound a segment of this network")
        children = series.children[ends.index(entry) : last + 1]
        geometry = self._geometry(children, candidate, shape_of(entry)[1], len(shape_of(entry)) - 2)
        if geometry != candidate.geometry:
            raise InternalError(f"{candidate} relaxes to {geometry}. Please report this network.")
        self._strip(children, candidate)
        source, exit_ = self._now(entry), self._now(exit_)
        self._pad(source, exit_, geometry.left, geometry.right)
        if candidate.activation is not None:
            self._activate(exit_, candidate)
        self.tagged.append((candidate, source, exit_))

    def _geometry(self, children: Sequence[Region], candidate: Candidate, channels: int, dims: int) -> Geometry:
        total = Geometry.identity(channels, dims)
        for child in children:
            if isinstance(child, Parallel):
                geometries = [self._geometry(part, candidate, total.out_channels, dims) for part in self._staying(child, candidate)]
                join = add_geometries if child.join == "add" else concat_geometries
                total = total.then(join(geometries) if len(geometries) > 1 else geometries[0])
            elif isinstance(child, Op) and node_id(child.exit) not in candidate.bypassed:
                what = meaning(self.gm, child.exit, frozenset())
                total = total.then(what.geometry) if isinstance(what, Linear) else total
        return total

    def _staying(self, parallel: Parallel, candidate: Candidate) -> list[tuple[Region, ...]]:
        return [
            () if branch is None else branch.children
            for position, branch in enumerate(parallel.branches)
            if (node_id(parallel.exit), position) not in candidate.cuts
        ]

    def _strip(self, children: Sequence[Region], candidate: Candidate) -> None:
        """Remove what goes, take padding off what stays, and crop shorter branches."""
        gone = False
        for child in children:
            if isinstance(child, Parallel):
                self._strip_parallel(child, candidate)
            elif isinstance(child, Op):
                gone = self._strip_op(child.exit, candidate, gone)

    def _strip_op(self, node: fx.Node, candidate: Candidate, gone: bool) -> bool:
        """Whether what follows directly goes with this: the batch norm and dropout of a removed convolution."""
        module = module_of(self.gm, node)
        source = node.args[0]
        assert isinstance(source, fx.Node)  # noqa: S101 - every operation of a segment reads a value
        if isinstance(module, CONVOLUTIONS):
            if node_id(node) in candidate.bypassed:
                self._replace(node, source)
                return True
            self.gm.add_submodule(str(node.target), _unpadded(module))
            return False
        what = meaning(self.gm, node, frozenset())
        free = isinstance(what, Removable) and what.free
        if isinstance(what, Removable) or pad_sides(node) is not None or gone:
            self._replace(node, source)
        return gone and (free or (isinstance(what, Linear) and node.op == "call_module"))

    def _strip_parallel(self, parallel: Parallel, candidate: Candidate) -> None:
        join, entry = parallel.exit, parallel.entry
        assert entry is not None  # noqa: S101 - the enumeration refuses joins of the network's inputs
        shape = shape_of(entry)
        staying = self._staying(parallel, candidate)
        geometries = [self._geometry(part, candidate, shape[1], len(shape) - 2) for part in staying]
        cut = [position for position in range(len(parallel.branches)) if (node_id(join), position) in candidate.cuts]
        sides = iter(crops(geometries))
        for position, branch in enumerate(parallel.branches):
            if position in cut:
                continue
            left, right = next(sides)
            self._strip(() if branch is None else branch.children, candidate)
            if any(left) or any(right):
                self._crop(parallel, position, [-side for side in left], [-side for side in right])
        if len(staying) == 1:
            self._replace(join, _operand(join, next(k for k in range(len(parallel.branches)) if k not in cut)))

    def _crop(self, parallel: Parallel, position: int, left: Sequence[int], right: Sequence[int]) -> None:
        assert parallel.entry is not None  # noqa: S101 - checked by the caller
        source, operand = self._now(parallel.entry), _operand(parallel.exit, position)
        if operand is source:
            _set_operand(parallel.exit, position, self._insert_pad(source, left, right))
        else:
            self._pad(source, operand, left, right)

    def _pad(self, source: fx.Node, exit_: fx.Node, left: Sequence[int], right: Sequence[int]) -> None:
        """Let the region from ``source`` to ``exit_`` read a padded or cropped source."""
        if not any(left) and not any(right):
            return
        inside = between(source, exit_)
        pad = self._insert_pad(source, left, right)
        for reader in inside:
            reader.replace_input_with(source, pad)

    def _insert_pad(self, source: fx.Node, left: Sequence[int], right: Sequence[int]) -> fx.Node:
        with self.gm.graph.inserting_after(source):
            pad = self.gm.graph.call_function(F.pad, (source, as_torch_pad(left, right)))
        stem = f"{node_id(source)}/pad"
        name = next(name for name in (stem, *(f"{stem}#{k}" for k in range(1, len(self.nodes) + 2))) if name not in self.nodes)
        self.nodes[name] = pad
        pad.meta[META] = {"id": name, "shape": list(shape_of(source)), "dtype": source.meta[META]["dtype"]}
        return pad

    def _activate(self, exit_: fx.Node, candidate: Candidate) -> None:
        path = f"{candidate.kept[-1].partition('#')[0]}_activation"
        removed = self._node(candidate.removed[-1])
        module = nn.Identity() if candidate.activation is None else module_of(self.gm, removed)
        assert module is not None  # noqa: S101 - a removed activation is a module
        self.gm.add_submodule(path, module)
        with self.gm.graph.inserting_after(exit_):
            node = self.gm.graph.call_module(path, (exit_,))
        exit_.replace_all_uses_with(node, delete_user_cb=lambda reader: reader is not node)
        node.meta[META] = {**exit_.meta[META], "id": path}

    def _tag(self, candidate: Candidate, entry: fx.Node, exit_: fx.Node) -> dict[str, object]:
        entry = self._now(entry)
        return {
            "entry": node_id(entry),
            "exit": node_id(exit_),
            "members": sorted(node_id(node) for node in between(entry, exit_)),
            "candidate": candidate.to_json(),
        }


def between(entry: fx.Node, exit_: fx.Node) -> set[fx.Node]:
    """The operations from ``entry`` (excluded) to ``exit_`` (included)."""
    pending, seen = [exit_], {exit_}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is not entry and source not in seen and source.op in ("call_module", "call_function"):
                seen.add(source)
                pending.append(source)
    return seen


def _operand(join: fx.Node, position: int) -> fx.Node:
    operands = join.args[0] if isinstance(join.args[0], (list, tuple)) else join.args
    operand = operands[position]
    assert isinstance(operand, fx.Node)  # noqa: S101 - a Parallel's operands are values
    return operand


def _set_operand(join: fx.Node, position: int, value: fx.Node) -> None:
    if isinstance(join.args[0], (list, tuple)):
        operands = list(join.args[0])
        operands[position] = value
        join.update_arg(0, operands)
    else:
        join.update_arg(position, value)


def _unpadded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> nn.Module:
    """The same convolution without padding, sharing its Parameters."""
    geometry = conv_geometry(module)
    bare = type(module)(
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        0,
        tuple(module.dilation),
        geometry.groups,
        module.bias is not None,
        device="meta",
    )
    bare.weight, bare.bias = module.weight, module.bias
    bare.training = module.training
    return bare
