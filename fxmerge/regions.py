"""The region tree: how the values of a canonical graph nest between single entries and single exits.

A region (e, x) is what lies between two values such that e dominates and x post-dominates all of it (the program
structure tree of compilers; Johnson, Pearson, Pingali, PLDI 1994). Regions in a row form a :class:`Series`; a fork
whose branches meet again in one operation is a :class:`Parallel`; what is more entangled is a :class:`Mesh`, whose
inner chains are still found. Only tensor values that depend on an image-like input
take part: sizes, parameters and side inputs do not. Where all would be one Mesh because of values without spatial
extent that many operations read (an embedding computed from the image), those count as side inputs too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from .errors import UnsupportedError
from .graph import META, is_tensor, node_id, shape_of

__all__ = [
    "JOINS",
    "Mesh",
    "Op",
    "Parallel",
    "Region",
    "Series",
    "all_series",
    "operations",
    "region_tree",
    "removable_tag",
    "render",
    "runs",
]

_aten = torch.ops.aten

JOINS = {_aten.add.Tensor: "add", _aten.sub.Tensor: "sub", _aten.mul.Tensor: "mul", _aten.cat.default: "concat"}
"""The operators that close a Parallel region whose branches a merge may join, with the names they go by."""


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operation."""

    exit: fx.Node


@dataclass(frozen=True, slots=True, eq=False)
class Parallel:
    """Branches from one value that meet in one join; a None among them is the value itself (an identity skip).

    ``branches`` are in the order of the join's operands. Branches of a sum, difference or concatenation can merge,
    one branch of a product can go.
    """

    entry: fx.Node | None
    exit: fx.Node
    branches: tuple[Series | None, ...]

    @property
    def join(self) -> str:
        """``add``, ``sub``, ``mul``, ``concat``, or ``other``: any other operation of several values, such as attention."""
        return "other" if self.exit.kwargs else JOINS.get(self.exit.target, "other")  # type: ignore[call-overload]

    @property
    def adds(self) -> bool:
        """Whether the join is a sum, the second branch negated or not."""
        return self.join in ("add", "sub")

    def may_lose(self, position: int) -> bool:
        """Whether the branch at ``position`` can go and leave the others' value: not channels, not what is subtracted from."""
        return self.join in ("add", "mul") or (self.join == "sub" and position == 1)


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """Entangled operations between one entry and one exit, with the chains inside that are regions of their own."""

    nodes: tuple[fx.Node, ...]
    children: tuple[Series, ...]
    exit: fx.Node | None


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Regions one after another; entry and exit are None at the virtual source and sink of the whole graph."""

    entry: fx.Node | None
    children: tuple[Region, ...]

    @property
    def exit(self) -> fx.Node | None:
        """The last child's value."""
        return self.children[-1].exit


Region: TypeAlias = "Op | Parallel | Mesh"

_SOURCE = -1


def region_tree(gm: fx.GraphModule) -> Series:
    """The region tree of a canonical graph, from a virtual source over all image-like inputs to a virtual sink.

    Time is linear in the graph's size at each level of nesting, but for the inner chains of a Mesh, which cost up to
    the square of its size.

    Raises:
        UnsupportedError: the graph has no image-like input (three or more axes).

    Example:
        >>> import torch, fxmerge
        >>> from fxmerge.regions import region_tree, render
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU())
        >>> print(render(region_tree(fxmerge.capture(net, torch.randn(2, 3, 4, 4)))))
        Series
          input 3x4x4
          0 3x4x4
          1 3x4x4
    """
    values = _Values(gm)
    if not values.nodes:
        raise UnsupportedError("the network has no image-like input: a tensor of three or more axes, batch included")
    sink = len(values.nodes)
    return Series(None, values.regions(_SOURCE, list(range(sink + 1))))


class _Values:
    """The value graph in numbers: -1 is the virtual source, 0, 1, ... the values in execution order, then the sink."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.nodes: list[fx.Node] = []
        numbers: dict[fx.Node, int] = {}
        self.inputs: list[list[int]] = []
        for node in gm.graph.nodes:
            sources = [numbers[source] for source in node.all_input_nodes if source in numbers]
            image = node.op == "placeholder" and is_tensor(node) and len(shape_of(node)) >= 3
            carries = is_tensor(node) or "parts" in node.meta.get(META, {})
            if node.op != "output" and (image or (sources and carries)):
                numbers[node] = len(self.nodes)
                self.nodes.append(node)
                self.inputs.append(sources or [_SOURCE])
        unread = [
            number
            for node, number in numbers.items()
            if any(user not in numbers and user.op == "output" for user in node.users)
            or not any(user in numbers for user in node.users)
        ]
        self.inputs.append(unread)
        self.readers: dict[int, list[int]] = {number: [] for number in range(_SOURCE, len(self.inputs))}
        for number, sources in enumerate(self.inputs):
            for source in sources:
                self.readers[source].append(number)

    def regions(self, entry: int, members: list[int]) -> tuple[Region, ...]:
        """The children of the Series from ``entry`` over ``members`` (ascending; the last is its exit)."""
        children: list[Region] = []
        start = entry
        between: list[int] = []
        inside = set(members)
        furthest = max(reader for reader in self.readers[entry] if reader in inside)
        for member in members:
            # A value is a cut iff no edge jumps over it: every other member is its ancestor or its descendant.
            if member == furthest:
                children += self._between(start, between, member)
                start, between = member, []
            else:
                between.append(member)
            furthest = max([furthest, *(reader for reader in self.readers[member] if reader in inside)])
        return tuple(children)

    def _between(self, entry: int, between: list[int], exit_: int) -> tuple[Region, ...]:
        """What lies between two neighbouring cut values."""
        sink = exit_ == len(self.nodes)
        if not between:
            return () if sink else (Op(self.nodes[exit_]),)
        components = self._components(between)
        if not sink:
            parallel = self._parallel(entry, components, exit_)
            if parallel is not None:
                return (parallel,)
        found = self._without_side_inputs(entry, [*between, exit_])
        if found is not None:
            return found
        members = between if sink else [*between, exit_]
        chains = self._chains(entry, [*between, exit_])
        return (Mesh(tuple(self.nodes[m] for m in members), chains, None if sink else self.nodes[exit_]),)

    def _without_side_inputs(self, entry: int, members: list[int]) -> tuple[Region, ...] | None:
        """The regions that appear where values without spatial extent count as side inputs of spatial ones.

        None where they are none, or only hide operations of what stays one Mesh.
        """
        flat = {member for member in members[:-1] if not self._is_spatial(member)}
        sides = [
            (value, reader)
            for value in flat
            for reader in self.readers[value]
            if self._is_spatial(reader)
            and not (flat.issuperset(self.inputs[reader]) or self._is_gate(value, reader, flat))
        ]
        if not sides:
            return None
        inputs, readers = list(self.inputs), dict(self.readers)
        for value, reader in sides:
            self.inputs[reader] = [source for source in self.inputs[reader] if source != value]
            self.readers[value] = [other for other in self.readers[value] if other != reader]
        on_the_way = self._ancestors({members[-1]}, entry).intersection(members)
        found = self.regions(entry, sorted(on_the_way))
        if len(found) == 1 and isinstance(found[0], Mesh):
            self.inputs, self.readers = inputs, readers
            return None
        return found

    def _is_spatial(self, number: int) -> bool:
        if number in (_SOURCE, len(self.nodes)):
            return False
        node = self.nodes[number]
        if not is_tensor(node):
            return any(map(self._is_spatial, self.inputs[number]))
        return math.prod(shape_of(node)[2:]) > 1

    def _is_gate(self, value: int, reader: int, flat: set[int]) -> bool:
        """Whether what a value without extent is computed from is computed for this one reader: a squeeze-excite gate."""
        pending, computed = [value], {value}
        while pending:
            more = flat.intersection(self.inputs[pending.pop()]) - computed
            computed |= more
            pending.extend(more)
        return all(each == reader or each in computed for member in computed for each in self.readers[member])

    def _parallel(self, entry: int, components: list[list[int]], exit_: int) -> Parallel | None:
        join = self.nodes[exit_]
        if not is_tensor(join):
            return None
        if join.target in JOINS and not join.kwargs and len(self.inputs[exit_]) != len(_operands(join)):
            return None  # the same value twice
        home = {member: index for index, component in enumerate(components) for member in component}
        branches: list[Series | None] = []
        used: list[int | None] = []
        for source in self.inputs[exit_]:
            component = home.get(source)
            used.append(component)
            if component is None:
                branches.append(None)
                continue
            if components[component][-1] != source:
                return None
            start = None if entry == _SOURCE else self.nodes[entry]
            branches.append(Series(start, self.regions(entry, components[component])))
        if len(set(used)) != len(used) or len({*used} - {None}) != len(components) or len(used) < 2:
            return None
        return Parallel(None if entry == _SOURCE else self.nodes[entry], join, tuple(branches))

    def _components(self, members: list[int]) -> list[list[int]]:
        """Weakly connected components of the members alone, each ascending."""
        root = {member: member for member in members}

        def find(member: int) -> int:
            while root[member] != member:
                root[member] = root[root[member]]
                member = root[member]
            return member

        for member in members:
            for reader in self.readers[member]:
                if reader in root:
                    root[find(reader)] = find(member)
        groups: dict[int, list[int]] = {}
        for member in members:
            groups.setdefault(find(member), []).append(member)
        return list(groups.values())

    def _chains(self, entry: int, members: list[int]) -> tuple[Series, ...]:
        """The maximal regions of more than one value inside a Mesh, in execution order."""
        import networkx as nx

        inside = {entry, *members}
        graph = nx.DiGraph((u, v) for u in inside for v in self.readers[u] if v in inside)
        dominator = nx.immediate_dominators(graph, entry)
        covered: set[int] = set()
        found: list[Series] = []
        for exit_ in reversed(members[:-1]):
            if exit_ in covered:
                continue
            best: tuple[int, set[int]] | None = None
            above, region = dominator[exit_], {exit_}
            while True:
                region |= self._ancestors(region, above)
                closed = all(r in region for m in region - {exit_} for r in self.readers[m])
                if closed and len(region) > 1:
                    best = (above, set(region))
                if above == entry or self._escapes(region, exit_):
                    break
                above = dominator[above]
            if best is None:
                continue
            start, region = best
            covered |= region
            first = None if start == _SOURCE else self.nodes[start]
            found.append(Series(first, self.regions(start, sorted(region))))
        return tuple(reversed(found))

    def _ancestors(self, region: set[int], stop: int) -> set[int]:
        """Values from which the region is reached without passing ``stop``."""
        pending, seen = list(region), set(region)
        while pending:
            for source in self.inputs[pending.pop()]:
                if source != stop and source not in seen and source != _SOURCE:
                    seen.add(source)
                    pending.append(source)
        return seen

    def _escapes(self, region: set[int], exit_: int) -> bool:
        """Whether a value of the region is read after its exit, so that no larger region ends there either."""
        return any(reader > exit_ for member in region - {exit_} for reader in self.readers[member])


def _operands(join: fx.Node) -> list[fx.Node]:
    first = join.args[0]
    operands = first if isinstance(first, (list, tuple)) else join.args[:2]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def all_series(region: Region | Series) -> Iterator[Series]:
    """Every Series of a tree, outer ones first."""
    if isinstance(region, Series):
        yield region
        children: tuple[Region | Series | None, ...] = region.children
    elif isinstance(region, Parallel):
        children = region.branches
    elif isinstance(region, Mesh):
        children = region.children
    else:
        return
    for child in children:
        if child is not None:
            yield from all_series(child)


def operations(region: Region | Series) -> Iterator[fx.Node]:
    """Every operation of a region, those of nested regions among them; a join comes after what it joins."""
    if isinstance(region, Series):
        for child in region.children:
            yield from operations(child)
        return
    if isinstance(region, Parallel):
        for branch in region.branches:
            if branch is not None:
                yield from operations(branch)
    if isinstance(region, Mesh):
        yield from region.nodes
    elif isinstance(region, (Op, Parallel)):
        yield region.exit


def removable_tag(region: Region) -> str | None:
    """The registered removable module that all operations of a region belong to, None for none."""
    tags = {node.meta.get(META, {}).get("removable") for node in operations(region)}
    return str(tags.pop()) if len(tags) == 1 and None not in tags else None


def runs(children: Sequence[Region]) -> Iterator[tuple[int, int]]:
    """The children of a Series as (start, stop): those of one registered removable module together, others alone."""
    start = 0
    while start < len(children):
        tag, stop = removable_tag(children[start]), start + 1
        while tag is not None and stop < len(children) and removable_tag(children[stop]) == tag:
            stop += 1
        yield start, stop
        start = stop


def render(region: Region | Series, indent: int = 0) -> str:
    """The tree as indented text: a line an operation (its id and shape without batch), a heading a region."""
    pad = "  " * indent
    if isinstance(region, Op):
        shape = "x".join(map(str, shape_of(region.exit)[1:])) if is_tensor(region.exit) else "several"
        name = "input" if region.exit.op == "placeholder" else node_id(region.exit)
        return f"{pad}{name} {shape}"
    if isinstance(region, Parallel):
        lines = [f"{pad}Parallel, joined by {node_id(region.exit)}"]
        for branch in region.branches:
            lines.append(f"{pad}  identity" if branch is None else render(branch, indent + 1))
        return "\n".join(lines)
    if isinstance(region, Mesh):
        lines = [f"{pad}Mesh of {len(region.nodes)} operations"]
        return "\n".join([*lines, *(render(child, indent + 1) for child in region.children)])
    return "\n".join([f"{pad}Series", *(render(child, indent + 1) for child in region.children)])
