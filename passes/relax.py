"""Apply candidates: remove what each says, and move a merged segment's padding to its entry. The result still trains.

This is the lossy rewrite. For each candidate:

1. **merge**: its activations, dropouts and bypassed convolutions (each with its batch norm) go; the remaining
   convolutions and average pools lose their padding, and one zero padding by the segment's L and R stands at the entry.
   Where branches of different reach join, the shorter ones crop their input by L_join - L_branch, an identity skip too.
   What is left is exactly one convolution, which :mod:`fxmerge.passes.fold` computes. Norms over each sample go; one of
   them may stand behind the segment instead. An activation may be inserted behind that.
2. **bypass**: readers of the exit read the entry.
3. **drop**: a join of two loses one operand; its readers read the other.

Every merged segment is tagged in ``gm.meta["fxmerge"]["segments"]``: entry, exit, members and candidate, by node id.
The pass needs the ids and shapes of a canonical graph, and leaves them. It refuses candidates that name operations the
graph does not have, that overlap, or that were applied before, so that a second run raises. An empty list of candidates
changes nothing.
"""

from __future__ import annotations

__all__ = ["RelaxPass", "relax"]

from collections.abc import Sequence

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import Geometry, add_geometries, concat_geometries, crops
from fxmerge.candidates import Candidate
from fxmerge.errors import InternalError, PlanError
from fxmerge.folding import compose_geometry
from fxmerge.graph import between, by_id, graph_meta, module_of, node_id, record_shapes, shape_of, sweep
from fxmerge.linear import Linear, Norm, Removable, is_batch_norm, meaning, pad_sides, source_of
from fxmerge.passes._base import GraphPass
from fxmerge.regions import Op, Parallel, Region, Series, all_series, region_tree, removable_tag, runs
from fxmerge.surgery import insert_activation, insert_pad, join_operands, move_behind, set_join_operand, take_padding


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
        PlanError: a candidate names an operation that the graph does not have, or no region of it, or what another
            candidate names too.
        InternalError: the relaxed segment is not the one that was enumerated.
    """
    if not candidates:
        return False
    rewrite = _Rewrite(gm)
    rewrite.refuse_overlaps(candidates)
    for candidate in candidates:
        rewrite.apply(candidate)
    rewrite.finish()
    return True


class _Rewrite:
    """One run of the pass: where every operation stands in the region tree, and what replaced the removed ones."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = by_id(gm)
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.merged: list[tuple[Candidate, fx.Node, fx.Node]] = []
        self.places: dict[fx.Node, tuple[Series, int]] = {}
        for series in all_series(region_tree(gm)):
            for index, child in enumerate(series.children):
                if child.exit is not None:
                    self.places[child.exit] = (series, index)

    def refuse_overlaps(self, candidates: Sequence[Candidate]) -> None:
        owner = {
            self.nodes[name]: "a segment merged before"
            for segment in graph_meta(self.gm).get("segments", ())
            for name in segment["members"]
            if name in self.nodes
        }
        for candidate in candidates:
            joins = [self._node(join) for join, _ in candidate.cuts if candidate.kind == "drop"]
            for node in (*sorted(between(self._node(candidate.entry), self._node(candidate.exit))), *joins):
                if node in owner:
                    raise PlanError(f"{node_id(node)!r} belongs to two candidates: {candidate}; {owner[node]}")
                owner[node] = str(candidate)

    def apply(self, candidate: Candidate) -> None:
        if candidate.kind == "merge":
            self._merge(candidate)
        elif candidate.kind == "bypass":
            self._bypass(candidate)
        else:
            for join, position in candidate.cuts:
                self._drop(self._node(join), position)

    def finish(self) -> None:
        sweep(self.gm)
        record_shapes(self.gm)
        segments = [self._tag(candidate, self._now(entry), exit_) for candidate, entry, exit_ in self.merged]
        graph_meta(self.gm)["segments"] = [*graph_meta(self.gm).get("segments", ()), *segments]

    def _node(self, name: str) -> fx.Node:
        node = self.nodes.get(name)
        if node is None:
            raise PlanError(
                f"a candidate speaks of {name!r}, which this network does not have. Make a plan for this network."
            )
        return node

    def _place(self, node: fx.Node) -> tuple[Series, int]:
        place = self.places.get(node)
        if place is None:
            raise PlanError(f"{node_id(node)!r} ends no region of this network. Make a plan for this network.")
        return place

    def _now(self, node: fx.Node) -> fx.Node:
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        self.replaced[node] = self._now(by)
        node.replace_all_uses_with(self.replaced[node])

    # --- bypass and drop ---------------------------------------------------------------------------------------------

    def _bypass(self, candidate: Candidate) -> None:
        entry, exit_ = self._node(candidate.entry), self._node(candidate.exit)
        if shape_of(entry) != shape_of(exit_):
            raise PlanError(f"{candidate.exit!r} cannot become {candidate.entry!r}: their shapes differ")
        self._replace(exit_, entry)

    def _drop(self, join: fx.Node, position: int) -> None:
        series, index = self._place(join)
        region = series.children[index]
        if not isinstance(region, Parallel) or len(region.branches) != 2:
            raise PlanError(f"{node_id(join)!r} joins no two branches of which one could be dropped")
        self._replace(join, join_operands(join)[1 - position])

    # --- merge -------------------------------------------------------------------------------------------------------

    def _merge(self, candidate: Candidate) -> None:
        entry, exit_ = self._node(candidate.entry), self._node(candidate.exit)
        series, last = self._place(exit_)
        ends = [series.entry, *(child.exit for child in series.children[: last + 1])]
        if entry not in ends[:-1]:
            raise PlanError(f"{candidate.entry!r} and {candidate.exit!r} do not bound a segment of this network")
        children = series.children[ends.index(entry) : last + 1]
        self._strip(entry, children, candidate)
        exit_ = self._now(exit_)
        if candidate.geometry is not None:
            self._pad(self._now(entry), exit_, candidate.geometry.left, candidate.geometry.right)
        self.merged.append((candidate, entry, exit_))
        if candidate.norm is not None:
            self._return(exit_, self._node(candidate.norm))
        if candidate.activation is not None:
            self._activate(exit_, candidate)

    def _strip(self, entry: fx.Node | None, children: Sequence[Region], candidate: Candidate) -> None:
        """Remove what goes, take the padding off what stays, and crop shorter branches."""
        removed = False
        for first, stop in runs(children):
            child = children[first]
            if stop > first + 1 or removable_tag(child) is not None:
                exit_, source = children[stop - 1].exit, children[first - 1].exit if first else entry
                assert exit_ is not None and source is not None  # noqa: S101, PT018 - the enumeration refuses such ends
                self._replace(exit_, source)
                removed = False
            elif isinstance(child, Parallel):
                self._strip_parallel(child, candidate)
                removed = False
            elif isinstance(child, Op):
                removed = self._strip_op(child.exit, candidate, removed)

    def _strip_op(self, node: fx.Node, candidate: Candidate, with_it: bool) -> bool:
        """Strip one operation; ``with_it``, and the result for the next, say that it goes with what is in front of it.

        Batch norms and dropouts go with a removed convolution.
        """
        source = source_of(node)
        if node_id(node) in candidate.bypassed:
            self._replace(node, source)
            return True
        what = meaning(self.gm, node, frozenset())
        free = isinstance(what, Removable) and what.free
        goes_along = with_it and (is_batch_norm(self.gm, node) or free)
        if goes_along or isinstance(what, (Removable, Norm)) or pad_sides(node) is not None:
            self._replace(node, source)
        else:
            take_padding(self.gm, node)
        return goes_along

    def _strip_parallel(self, parallel: Parallel, candidate: Candidate) -> None:
        join, entry = parallel.exit, parallel.entry
        assert entry is not None  # noqa: S101 - the enumeration refuses joins of the network's inputs
        staying = _staying(parallel, candidate)
        geometries = _branch_geometries(self.gm, parallel, candidate, shape_of(entry)[1])
        for (position, branch), (left, right) in zip(staying, crops(geometries), strict=True):
            self._strip(entry, () if branch is None else branch.children, candidate)
            source, operand = self._now(entry), join_operands(join)[position]
            inverse = [-side for side in left], [-side for side in right]
            if operand is not source:
                self._pad(source, operand, *inverse)
            elif any(left) or any(right):
                set_join_operand(join, position, insert_pad(self.gm, source, *inverse))
        if len(staying) == 1:
            self._replace(join, join_operands(join)[staying[0][0]])

    def _pad(self, source: fx.Node, exit_: fx.Node, left: Sequence[int], right: Sequence[int]) -> None:
        """Let the operations from ``source`` to ``exit_`` read a padded (or, where negative, cropped) source."""
        if any(left) or any(right):
            readers = [node for node in between(source, exit_) if source in node.all_input_nodes]
            pad = insert_pad(self.gm, source, left, right)
            for reader in readers:
                reader.replace_input_with(source, pad)

    def _return(self, exit_: fx.Node, norm: fx.Node) -> None:
        """Put a norm of the segment behind its exit; whoever reads the segment reads it there."""
        move_behind(exit_, norm)
        del self.replaced[norm]
        self.replaced[exit_] = norm

    def _activate(self, exit_: fx.Node, candidate: Candidate) -> None:
        """Put the segment's last activation behind its exit; whoever reads the segment reads it there."""
        modules = (module_of(self.gm, self._node(name)) for name in reversed(candidate.removed))
        activation = next(each for each in modules if type(each).__name__ == candidate.activation)
        assert activation is not None  # noqa: S101 - its class has a name
        convolution, behind = self._node(candidate.kept[-1]), self._now(exit_)
        self.replaced[behind] = insert_activation(self.gm, behind, activation, f"{convolution.target}_activation")

    def _tag(self, candidate: Candidate, entry: fx.Node, exit_: fx.Node) -> dict[str, object]:
        inside = between(entry, exit_)
        geometry = compose_geometry(self.gm, entry, exit_, inside, frozenset())
        if geometry != candidate.geometry:
            raise InternalError(f"{candidate} was relaxed to {geometry}. Please report this network.")
        ends = {"entry": node_id(entry), "exit": node_id(exit_)}
        return {**ends, "members": sorted(map(node_id, inside)), "candidate": candidate.to_json()}


def _branch_geometries(gm: fx.GraphModule, parallel: Parallel, candidate: Candidate, channels: int) -> list[Geometry]:
    """What the candidate leaves of each branch that stays."""
    start = Geometry.identity(channels, len(shape_of(parallel.exit)) - 2)
    branches = [() if branch is None else branch.children for _, branch in _staying(parallel, candidate)]
    return [_geometry(gm, children, candidate, start) for children in branches]


def _geometry(gm: fx.GraphModule, children: Sequence[Region], candidate: Candidate, total: Geometry) -> Geometry:
    for child in children:
        if isinstance(child, Parallel) and removable_tag(child) is None:
            branches = _branch_geometries(gm, child, candidate, total.out_channels)
            join = add_geometries if child.adds else concat_geometries
            total = total.then(join(branches))
        elif isinstance(child, Op) and removable_tag(child) is None and node_id(child.exit) not in candidate.bypassed:
            what = meaning(gm, child.exit, frozenset())
            total = total.then(what.geometry) if isinstance(what, Linear) else total
    return total


def _staying(parallel: Parallel, candidate: Candidate) -> list[tuple[int, Series | None]]:
    """The branches that the candidate leaves, with their positions among the join's operands."""
    join = node_id(parallel.exit)
    return [each for each in enumerate(parallel.branches) if (join, each[0]) not in candidate.cuts]
