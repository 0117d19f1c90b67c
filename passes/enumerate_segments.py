"""List every candidate of every segment: what could be merged, bypassed or dropped, and why the rest could not.

A segment is an interval of consecutive children of a Series of the region tree. For each:

1. **merge**: activations inside go, all irreducible convolutions stay and of the others a subset stays. One candidate
   for every distinct merged geometry, and for it the subset with the largest summed L1 norm (LayerMerge, section 4.3),
   from a table of reachable geometries: children of a Series combine by ``then``, branches of a join by
   ``add_geometries`` or ``concat_geometries``, so subsets are never listed. Of a product one factor goes, with all that
   it is computed by: a squeeze-excite gate. Norms over each sample go too; the last one
   with as many channels as the merged convolution writes returns behind it. With ``norms_go`` there is a second
   candidate, without it.
2. **bypass**: the shortest intervals whose entry and exit have the same shape become the identity. Longer ones are made
   of these.
3. **drop**: a branch of a sum or of a gate goes, and the join with it when one is left.

Bypasses and drops together never take every convolution of a branch: a join of a value with itself (x + x) is no
network anyone wants; the branch is dropped instead.

It does not act on, and says so with a refusal: modules used more than once, padding modes other than zeros, batch norms
without running statistics, operations that are no affine shift-equivariant maps, values written in place, joins that
are not additions, products or concatenations of channels, merged kernels over the cap, norms that fit no merged convolution, side
inputs that are computed inside the segment, and what ``include`` and ``exclude`` leave out. Annotates nothing and
changes nothing: ``modified`` is False.
"""

from __future__ import annotations

__all__ = ["EnumerateSegmentsPass", "EnumerationResult", "enumerate_segments"]

import math
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeGuard, cast

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import Geometry, add_geometries, concat_geometries
from fxmerge.candidates import Candidate, Enumeration, Limits, Refusal, Site
from fxmerge.graph import META, between, by_id, is_convolution, is_tensor, module_of, node_id, shape_of, shared_targets
from fxmerge.linear import (
    IDEMPOTENT,
    Barrier,
    Linear,
    Meaning,
    Norm,
    Removable,
    Side,
    is_batch_norm,
    meaning,
    pad_sides,
)
from fxmerge.passes._base import GraphPass
from fxmerge.regions import (
    Mesh,
    Op,
    Parallel,
    Region,
    Series,
    all_series,
    operations,
    region_tree,
    removable_tag,
    runs,
)


class EnumerationResult(PassResult):
    """torch's PassResult with the enumeration."""

    enumeration: Enumeration

    def __new__(cls, graph_module: fx.GraphModule, enumeration: Enumeration) -> EnumerationResult:
        """Make a result; the graph is never modified."""
        result = cast("EnumerationResult", super().__new__(cls, graph_module, False))
        result.enumeration = enumeration
        return result


class EnumerateSegmentsPass(GraphPass):
    """List every candidate of every segment; see the module docstring for the cases.

    Attributes:
        limits: method and caps.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__()
        self.limits = limits or Limits()

    def call(self, graph_module: fx.GraphModule) -> EnumerationResult:
        """Read the graph; the candidates are in the result's ``enumeration``."""
        return EnumerationResult(graph_module, enumerate_segments(graph_module, self.limits))


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to make an interval linear."""

    geometry: Geometry
    norm: float = 0.0
    kept: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    cuts: tuple[tuple[str, int], ...] = ()
    lost: tuple[str, ...] = ()
    """What is removed in branches that are cut, and products that lose a factor."""
    norms: tuple[str, ...] = ()
    fused: int = 0
    """Joins and other linear operations besides the convolutions and their norms."""

    def then(self, other: _Way, geometry: Geometry) -> _Way:
        return _Way(
            geometry,
            self.norm + other.norm,
            self.kept + other.kept,
            self.bypassed + other.bypassed,
            self.removed + other.removed,
            self.cuts + other.cuts,
            self.lost + other.lost,
            self.norms + other.norms,
            self.fused + other.fused,
        )


_Ways = dict[Geometry, _Way]
_Joined = dict[Geometry | None, _Way]


@dataclass(frozen=True, slots=True)
class _Unit:
    """Children ``start`` to ``stop`` of a Series that merges take as one: a convolution with its norm, or one child."""

    start: int
    stop: int
    name: str
    ways: _Ways | Barrier
    convolutions: tuple[str, ...]


def enumerate_segments(gm: fx.GraphModule, limits: Limits | None = None) -> Enumeration:
    """All candidates of a canonical graph. See the module docstring.

    Time grows with (number of children) x (children within ``max_span`` convolutions) x (geometries within
    ``max_kernel``).
    """
    return _Search(gm, limits or Limits()).run()


class _Search:
    def __init__(self, gm: fx.GraphModule, limits: Limits) -> None:
        self.gm = gm
        self.limits = limits
        self.shared = shared_targets(gm)
        self.tree = region_tree(gm)
        self.nodes = by_id(gm)
        self.units: dict[int, tuple[_Unit, ...]] = {}
        self.composed: dict[tuple[Geometry, Geometry], Geometry] = {}
        self.refusals: dict[tuple[str, str, str], Refusal] = {}

    def run(self) -> Enumeration:
        series = tuple(all_series(self.tree))
        branches = {
            id(branch): (child, position)
            for one in series
            for child in one.children
            if isinstance(child, Parallel)
            for position, branch in enumerate(child.branches)
        }
        sites: list[Site] = []
        for number, one in enumerate(series):
            units = self._units(one)
            if self.limits.method != "layer":
                sites += self._merges(number, one, units)
            if self.limits.method != "depth":
                sites += self._bypasses(number, one, units)
                if id(one) in branches:
                    sites += self._drop(number, one, *branches[id(one)])
            self._refuse_barriers(units)
        takers: dict[int, list[Site]] = {}
        for site in sites:
            if site.candidate.kind != "merge":
                takers.setdefault(id(series[site.series]), []).append(site)
        spoiling: set[int] = set()
        for one in series:
            if id(one) in branches or _meets_its_entry(one):
                spoiling |= self._spoiling(one, takers, spoiling)
        kept = tuple(site for site in sites if id(site) not in spoiling)
        return Enumeration(series, kept, tuple(self.refusals.values()))

    def _spoiling(self, branch: Series, takers: Mapping[int, Sequence[Site]], gone: Container[int]) -> set[int]:
        """The last of the sites (by id) that together would take every convolution of a branch.

        ``takers`` are the sites that remove convolutions, by the id of their Series; those in ``gone`` do so no more.
        """
        convolutions = set(_convolutions(self.gm, branch.children))
        inside = [
            site
            for one in all_series(branch)
            for site in takers.get(id(one), ())
            if id(site) not in gone and not (site.candidate.kind == "drop" and one is branch)
        ]
        spoiling: set[int] = set()
        while convolutions and convolutions <= {name for site in inside for name in site.candidate.bypassed}:
            spoiling.add(id(inside.pop()))
        return spoiling

    # --- units --------------------------------------------------------------------------------------------------------

    def _units(self, series: Series) -> tuple[_Unit, ...]:
        known = self.units.get(id(series))
        if known is None:
            known = self.units[id(series)] = tuple(self._split(series))
        return known

    def _split(self, series: Series) -> Iterator[_Unit]:
        children = series.children
        following = 0
        for start, stop in runs(children):
            if start < following:
                continue
            child = children[start]
            if isinstance(child, Op) and is_convolution(self.gm, child.exit):
                while stop < len(children) and self._follows(children[stop]):
                    stop += 1
                ways = self._convolution(child.exit)
            elif removable_tag(child) is not None:
                ways = self._registered(series, start, stop)
            else:
                ways = self._region(child)
            following = stop
            name = node_id(child.exit) if child.exit is not None else "output"
            if not self._covered(children[start:stop]):
                ways = Barrier("excluded", f"{name} is left out by include or exclude")
            yield _Unit(start, stop, name, ways, _convolutions(self.gm, children[start:stop]))

    def _covered(self, regions: Sequence[Region]) -> bool:
        """Whether the user lets every operation of some regions be changed."""
        limits = self.limits
        if not limits.include and not limits.exclude:
            return True
        return all(limits.covers(node_id(node)) for region in regions for node in operations(region))

    def _registered(self, series: Series, start: int, stop: int) -> _Ways | Barrier:
        """A module that the user registered as removable: all its operations together."""
        entry = series.children[start - 1].exit if start else series.entry
        exit_ = series.children[stop - 1].exit
        if not _may_be_entry(entry) or exit_ is None or len(shape_of(entry)) < 3 or shape_of(entry) != shape_of(exit_):
            return Barrier("not-linear", "a registered module that does not keep the shape of one spatial value")
        identity = Geometry.identity(shape_of(entry)[1], len(shape_of(entry)) - 2)
        return {identity: _Way(identity, removed=(node_id(exit_),))}

    def _follows(self, child: Region) -> bool:
        """Whether a child goes with the convolution in front of it: its batch norm and dropout."""
        if not isinstance(child, Op) or is_convolution(self.gm, child.exit):
            return False
        what = meaning(self.gm, child.exit, self.shared)
        batch_norm = isinstance(what, Linear) and is_batch_norm(self.gm, child.exit)
        return batch_norm or (isinstance(what, Removable) and what.free)

    def _convolution(self, conv: fx.Node) -> _Ways | Barrier:
        what = meaning(self.gm, conv, self.shared)
        if not isinstance(what, Linear):
            return _as_barrier(what)
        weight = self.gm.get_submodule(str(conv.target)).weight
        name = node_id(conv)
        norm = float(weight.detach().abs().sum())  # type: ignore[operator]
        ways = {what.geometry: _Way(what.geometry, norm, kept=(name,))}
        if self.limits.method != "depth" and self._reducible(conv, what.geometry):
            identity = Geometry.identity(what.geometry.in_channels, what.geometry.dims)
            ways.setdefault(identity, _Way(identity, bypassed=(name,)))
        return ways

    def _reducible(self, conv: fx.Node, geometry: Geometry) -> bool:
        source = conv.args[0]
        return (
            isinstance(source, fx.Node)
            and geometry.in_channels == geometry.out_channels
            and set(geometry.stride) == {1}
            and shape_of(source)[2:] == shape_of(conv)[2:]
        )

    def _region(self, region: Region) -> _Ways | Barrier:
        if isinstance(region, Parallel):
            return self._parallel(region)
        if isinstance(region, Mesh):
            return Barrier("mesh", "its operations are too entangled for a single entry and exit at every step")
        node = region.exit
        if node.op == "placeholder":
            return Barrier("input", "the network's input is no operation")
        what: Meaning = meaning(self.gm, node, self.shared)
        if isinstance(what, Barrier) or len(shape_of(node)) < 3:
            return _as_barrier(what)
        if isinstance(what, Linear):
            plain = is_batch_norm(self.gm, node) or pad_sides(node) is not None
            return {what.geometry: _Way(what.geometry, fused=0 if plain else 1)}
        identity = Geometry.identity(shape_of(node)[1], len(shape_of(node)) - 2)
        name = (node_id(node),)
        if isinstance(what, Norm):
            return {identity: _Way(identity, removed=name, norms=name)}
        if isinstance(what, Side):
            return {identity: _Way(identity)}
        return {identity: _Way(identity, removed=() if what.free else name)}

    def _parallel(self, parallel: Parallel) -> _Ways | Barrier:
        join = parallel.exit
        if parallel.join == "other":
            return _as_barrier(meaning(self.gm, join, self.shared))
        if parallel.join == "concat" and list(join.args[1:]) != [1]:
            return Barrier("not-linear", f"{node_id(join)} does not concatenate channels")
        if parallel.entry is None or not is_tensor(parallel.entry) or len(shape_of(parallel.entry)) < 3:
            return Barrier("not-spatial", f"the branches joined by {node_id(join)} do not start from one spatial value")
        if parallel.join == "mul":
            return self._gate(parallel, parallel.entry)
        if len({shape_of(value)[1 if parallel.adds else 2 :] for value in join.all_input_nodes}) > 1:
            return Barrier("not-linear", f"{node_id(join)} broadcasts one of its operands")
        table: _Joined = {}
        for position, branch in enumerate(parallel.branches):
            options = self._branch(parallel, position, branch)
            if isinstance(options, Barrier):
                return options
            table = self._join(parallel, table, options) if position else options
        ways = {geometry: way for geometry, way in table.items() if geometry is not None}
        reason = f"{node_id(join)} joins branches of no common stride, or beyond max_kernel={self.limits.max_kernel}"
        return ways or Barrier("kernel-cap", reason)

    def _gate(self, parallel: Parallel, entry: fx.Node) -> _Ways | Barrier:
        """A product: one factor goes, with all that it is computed by."""
        join = parallel.exit
        ways: _Ways = {}
        identity = Geometry.identity(shape_of(entry)[1], len(shape_of(entry)) - 2)
        for position, gone in enumerate(parallel.branches):
            stays = parallel.branches[1 - position]
            value = entry if stays is None else stays.exit
            if gone is None or value is None or shape_of(value) != shape_of(join) or _written_in_place(gone.children):
                continue
            names, options = _convolutions(self.gm, gone.children), self._branch(parallel, 1 - position, stays)
            if isinstance(options, Barrier) or (names and self.limits.method == "depth"):
                continue
            lost = (*_removable(self.gm, gone, self.shared), node_id(join))
            cut = _Way(identity, bypassed=names, cuts=((node_id(join), position),), lost=lost, fused=1)
            for geometry, way in options.items():
                if geometry is not None:
                    self._offer(ways, way.then(cut, geometry))
        return ways or Barrier("gate", f"{node_id(join)} multiplies two values, neither of which can go")

    def _branch(self, parallel: Parallel, position: int, branch: Series | None) -> _Joined | Barrier:
        """The ways of one branch of a join; a geometry of None stands for dropping it."""
        assert parallel.entry is not None  # noqa: S101 - the caller has checked it
        shape = shape_of(parallel.entry)
        identity = Geometry.identity(shape[1], len(shape) - 2)
        if branch is None:
            return {identity: _Way(identity)}
        ways: _Ways = {identity: _Way(identity)}
        names = _convolutions(self.gm, branch.children)
        for unit in self._units(branch):
            if isinstance(unit.ways, Barrier):
                return unit.ways
            ways = self._compose(ways, unit.ways)
            if not ways:
                cap, join = self.limits.max_kernel, node_id(parallel.exit)
                return Barrier("kernel-cap", f"no kernel within max_kernel={cap} covers a branch of {join}")
        # A branch that has no convolution left is dropped, never turned into the identity: that would be x + x.
        options: _Joined = {geometry: way for geometry, way in ways.items() if way.kept or not names}
        if names and parallel.adds and parallel.may_lose(position) and self.limits.method != "depth":
            removed = _removable(self.gm, branch, self.shared)
            cuts = ((node_id(parallel.exit), position),)
            options[None] = _Way(identity, bypassed=names, cuts=cuts, lost=removed)
        return options

    def _join(self, parallel: Parallel, first: _Joined, second: _Joined) -> _Joined:
        assert parallel.entry is not None  # noqa: S101 - checked when the branches were listed
        size = shape_of(parallel.entry)[2:]
        table: _Joined = {}
        for (a, one), (b, other) in product(first.items(), second.items()):
            if a is None or b is None:
                left = b if a is None else a
                joined, joins = left, 0
            elif a.stride != b.stride or a.out_size(size) != b.out_size(size):
                continue
            else:
                joined, joins = (add_geometries if parallel.adds else concat_geometries)([a, b]), 1
            if joined is None:
                continue
            way = one.then(other, joined)
            self._offer(table, replace(way, fused=way.fused + joins))
        return table

    def _compose(self, first: _Ways, second: _Ways) -> _Ways:
        table: _Ways = {}
        for one, other in product(first.values(), second.values()):
            self._offer(table, one.then(other, self._then(one.geometry, other.geometry)))
        return table

    def _then(self, first: Geometry, second: Geometry) -> Geometry:
        """``first.then(second)``, computed once: blocks repeat."""
        known = self.composed.get((first, second))
        if known is None:
            known = self.composed[first, second] = first.then(second)
        return known

    def _offer(self, table: _Ways | _Joined, way: _Way) -> None:
        several = len(way.kept) + way.fused > 1
        if several and max(way.geometry.kernel) > self.limits.max_kernel:
            return
        known = table.get(way.geometry)
        if known is None or way.norm > known.norm:
            table[way.geometry] = way

    # --- merges -------------------------------------------------------------------------------------------------------

    def _merges(self, number: int, series: Series, units: Sequence[_Unit]) -> Iterator[Site]:
        for first, unit in enumerate(units):
            entry = series.entry if unit.start == 0 else series.children[unit.start - 1].exit
            if not unit.convolutions or not _may_be_entry(entry) or len(shape_of(entry)) < 3:
                continue
            ways: _Ways = {}
            count = 0
            for last in range(first, len(units)):
                other = units[last]
                count += len(other.convolutions)
                if isinstance(other.ways, Barrier) or count > self.limits.max_span:
                    break
                ways = self._compose(ways, other.ways) if ways else dict(other.ways)
                if not ways:
                    self._refuse_cap(unit, other)
                    break
                exit_ = series.children[other.stop - 1].exit
                if not other.convolutions or exit_ is None or not self._stands_alone(entry, exit_, series, unit, other):
                    continue
                for candidate in self._merge_candidates(entry, exit_, ways):
                    yield Site(number, unit.start, other.stop, candidate)

    def _merge_candidates(self, entry: fx.Node, exit_: fx.Node, ways: _Ways) -> Iterator[Candidate]:
        for geometry, way in ways.items():
            if not way.kept or len(way.kept) + len(way.bypassed) + way.fused < 2:
                continue
            activation = self._last_activation(way)
            for norm in self._norms_behind(exit_, way, geometry):
                candidate = Candidate(
                    "merge",
                    node_id(entry),
                    node_id(exit_),
                    way.kept,
                    way.bypassed,
                    way.lost + way.removed,
                    way.cuts,
                    geometry,
                    norm,
                )
                yield candidate
                if self.limits.exit_activation and activation is not None and not self._activated(exit_):
                    yield replace(candidate, activation=activation)

    def _norms_behind(self, exit_: fx.Node, way: _Way, geometry: Geometry) -> list[str | None]:
        """What may return behind a merge: the last norm that fits, None for nothing; empty where a norm has to and none does."""
        if not way.norms:
            return [None]
        fitting = [name for name in way.norms if shape_of(self.nodes[name])[1] == geometry.out_channels]
        point = math.prod(shape_of(exit_)[2:]) == 1
        found: list[str | None] = [] if point else [*fitting[-1:]]
        if self.limits.norms_go:
            found.append(None)
        if not found:
            reason = (
                f"a norm behind {node_id(exit_)!r} would see a single pixel"
                if point
                else f"no norm of the segment up to {node_id(exit_)!r} has {geometry.out_channels} channels"
            )
            reason += "; a fit does without"
            for name in dict.fromkeys((way.kept[0], way.kept[-1])):
                self._refuse("norm", name, way.norms[-1], reason)
        return found

    def _last_activation(self, way: _Way) -> str | None:
        modules = (module_of(self.gm, self.nodes[name]) for name in reversed(way.removed) if name not in way.norms)
        return next((type(module).__name__ for module in modules if module is not None), None)

    def _activated(self, exit_: fx.Node) -> bool:
        return any(
            isinstance(meaning(self.gm, reader, self.shared), Removable) and reader.op == "call_module"
            for reader in exit_.users
            if is_tensor(reader)
        )

    def _stands_alone(self, entry: fx.Node, exit_: fx.Node, series: Series, first: _Unit, last: _Unit) -> bool:
        """Whether a merge of these units is closed and computes no side input itself."""
        inside = between(entry, exit_)
        regions = series.children[first.start : last.stop]
        own = {node for region in regions for node in operations(region)}
        if inside <= own:
            return _is_closed(inside, exit_)
        reason = f"the segment up to {node_id(exit_)!r} computes what is added inside it"
        self._refuse("side-input", first.convolutions[0], node_id(min(inside - own)), reason)
        return False

    def _closed(self, entry: fx.Node, exit_: fx.Node) -> bool:
        """Whether nothing outside reads a value between entry and exit."""
        return _is_closed(between(entry, exit_), exit_)

    # --- bypass and drop ----------------------------------------------------------------------------------------------

    def _bypasses(self, number: int, series: Series, units: Sequence[_Unit]) -> Iterator[Site]:
        previous_stop = 0
        for last, unit in enumerate(units):
            exit_ = series.children[unit.stop - 1].exit
            if exit_ is None or not is_tensor(exit_):
                continue
            for first in range(last, -1, -1):
                start = units[first].start
                if start < previous_stop:
                    break
                names = tuple(name for each in units[first : last + 1] for name in each.convolutions)
                entry = series.entry if start == 0 else series.children[start - 1].exit
                if not names or not units[first].convolutions or not _may_be_entry(entry):
                    continue
                children = series.children[start : unit.stop]
                if not self._covered(children):
                    break
                if shape_of(entry) != shape_of(exit_) or not self._closed(entry, exit_) or _written_in_place(children):
                    continue
                previous_stop = start + 1
                if not _is_residual(children):  # dropping the other branches says the same
                    yield self._bypass(number, series, units, first, last)
                break

    def _bypass(self, number: int, series: Series, units: Sequence[_Unit], first: int, last: int) -> Site:
        start, stop = units[first].start, units[last].stop
        if stop < len(series.children) and self._goes_along(series.children[stop]):
            stop += 1
        entry = series.entry if start == 0 else series.children[start - 1].exit
        exit_ = series.children[stop - 1].exit
        assert entry is not None and exit_ is not None  # noqa: S101, PT018 - the caller has checked both
        inside = series.children[start:stop]
        candidate = Candidate(
            "bypass",
            node_id(entry),
            node_id(exit_),
            bypassed=_convolutions(self.gm, inside),
            removed=tuple(name for child in inside for name in _removable(self.gm, child, self.shared)),
        )
        return Site(number, start, stop, candidate)

    def _goes_along(self, follower: Region) -> bool:
        """Whether a bypass takes the activation behind it along: one that would change what it reads a second time."""
        if not isinstance(follower, Op) or not self._covered((follower,)):
            return False
        module = module_of(self.gm, follower.exit)
        removable = isinstance(meaning(self.gm, follower.exit, self.shared), Removable)
        return module is not None and removable and not isinstance(module, IDEMPOTENT)

    def _drop(self, number: int, branch: Series, parallel: Parallel, position: int) -> Iterator[Site]:
        names = _convolutions(self.gm, branch.children)
        if not parallel.may_lose(position) or not names or parallel.entry is None or branch.exit is None:
            return
        others = [each for k, each in enumerate(parallel.branches) if k != position]
        values = [parallel.entry if each is None else each.exit for each in others]
        if any(value is None or shape_of(value) != shape_of(parallel.exit) for value in values):
            return
        if _written_in_place((parallel,)) or not _may_be_entry(parallel.entry):
            return
        if not self._covered(branch.children) or not self.limits.covers(node_id(parallel.exit)):
            return
        if not self._closed(parallel.entry, branch.exit):
            return
        candidate = Candidate(
            "drop",
            node_id(parallel.entry),
            node_id(branch.exit),
            bypassed=names,
            removed=_removable(self.gm, branch, self.shared),
            cuts=((node_id(parallel.exit), position),),
        )
        yield Site(number, 0, len(branch.children), candidate)

    # --- refusals -----------------------------------------------------------------------------------------------------

    def _refuse_barriers(self, units: Sequence[_Unit]) -> None:
        """Tell the convolutions on both sides of a barrier what is in their way."""
        for index, unit in enumerate(units):
            if not isinstance(unit.ways, Barrier) or unit.ways.code == "input":
                continue
            neighbours = (*_until_barrier(units[:index][::-1]), *_until_barrier(units[index + 1 :]))
            about = unit.convolutions if unit.ways.code not in ("mesh",) else ()
            for name in dict.fromkeys((*neighbours, *about)):
                self._refuse(unit.ways.code, name, unit.name, unit.ways.reason)

    def _refuse_cap(self, first: _Unit, last: _Unit) -> None:
        cap = self.limits.max_kernel
        for name in first.convolutions:
            reason = f"merged up to {(last.convolutions or (last.name,))[-1]!r} its kernel would be larger than max_kernel={cap}"
            self._refuse("kernel-cap", name, last.name, reason)

    def _refuse(self, code: str, name: str, node: str, reason: str) -> None:
        self.refusals.setdefault((code, name, node), Refusal(code, name, node, reason))


def _as_barrier(what: Meaning) -> Barrier:
    return what if isinstance(what, Barrier) else Barrier("not-spatial", "it works on a value without spatial axes")


def _may_be_entry(value: fx.Node | None) -> TypeGuard[fx.Node]:
    """Whether a segment may read a value: a rewritten one reads it later, when it could have been overwritten."""
    return value is not None and is_tensor(value) and not value.meta[META].get("opaque")


def _written_in_place(regions: Sequence[Region]) -> bool:
    return any(node.meta.get(META, {}).get("opaque") for region in regions for node in operations(region))


def _is_closed(inside: Collection[fx.Node], exit_: fx.Node) -> bool:
    return all(reader in inside for node in inside if node is not exit_ for reader in node.users)


def _until_barrier(units: Sequence[_Unit]) -> tuple[str, ...]:
    """Convolutions of the nearest unit that has any, unless another barrier comes first."""
    for unit in units:
        if isinstance(unit.ways, Barrier):
            return ()
        if unit.convolutions:
            return unit.convolutions
    return ()


def _is_residual(regions: Sequence[Region]) -> bool:
    """Whether an interval is one join with an identity skip."""
    return len(regions) == 1 and isinstance(regions[0], Parallel) and None in regions[0].branches


def _meets_its_entry(series: Series) -> bool:
    """Whether some operation reads both the entry and the exit."""
    if series.entry is None or series.children[-1].exit is None:
        return False
    return not series.entry.users.keys().isdisjoint(series.children[-1].exit.users)


def _convolutions(gm: fx.GraphModule, regions: Sequence[Region]) -> tuple[str, ...]:
    return tuple(node_id(node) for region in regions for node in operations(region) if is_convolution(gm, node))


def _removable(gm: fx.GraphModule, region: Region | Series, shared: frozenset[str]) -> tuple[str, ...]:
    found = []
    for node in operations(region):
        what = meaning(gm, node, shared)
        if isinstance(what, Removable) and not what.free:
            found.append(node_id(node))
    return tuple(found)
