"""What could become of every convolution, and why not more: the rows behind ``fxmerge inspect``, as text and as JSON."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .candidates import Enumeration, Refusal
from .graph import convolutions, is_tensor, module_of, node_id, shape_of
from .linear import Norm, Removable, Side, conv_geometry, is_batch_norm, meaning
from .regions import Mesh, Op, Parallel, Region, Series, operations, removable_tag, render, runs

__all__ = ["Row", "inspect_convolutions", "inspection_json", "inspection_text", "legend", "unexplained"]

_KINDS = ("merge", "bypass", "drop")
_TOLD_TO_FIRST = ("kernel-cap", "norm", "side-input")
"""Refusals of a merge that only its first convolution has."""
_HEADS = ("convolution", "geometry", "output", *_KINDS, "span", "refused")
_BAR, _BRANCH = "| ", "+ "
_SHORT = {"batchnorm": "bn", "groupnorm": "gn", "instancenorm": "in", "layernorm": "ln"}
_LISTED = 3
"""Nodes of one reason that the legend names."""


@dataclass(frozen=True, slots=True)
class Row:
    """One convolution.

    Attributes:
        name: node id.
        geometry: such as ``3x3 p1 64->64``.
        size: of its output, without batch.
        candidates: how many of each kind would change it.
        merges_with: every other convolution that some merge takes together with it, in execution order.
        span: convolutions of the largest merge that takes it, 0 for none.
        refusals: merges that were looked at and refused.
        unexplained: why it has no candidate, where no refusal says so (:func:`unexplained`).
    """

    name: str
    geometry: str
    size: tuple[int, ...]
    candidates: Mapping[str, int]
    merges_with: tuple[str, ...]
    span: int
    refusals: tuple[Refusal, ...]
    unexplained: Refusal | None

    @property
    def obstacles(self) -> tuple[Refusal, ...]:
        """The refusals, or the reason in place of them."""
        return self.refusals if self.unexplained is None else (self.unexplained,)


def inspect_convolutions(gm: fx.GraphModule, enumeration: Enumeration) -> tuple[Row, ...]:
    """A row for every convolution of a canonical graph, in execution order."""
    names = {node_id(node): number for number, (node, _) in enumerate(convolutions(gm))}
    candidates: dict[str, Counter[str]] = {name: Counter() for name in names}
    partners: dict[str, set[str]] = {name: set() for name in names}
    spans = dict.fromkeys(names, 0)
    for site in enumeration.sites:
        members = {*site.candidate.kept, *site.candidate.bypassed}
        for name in members:
            candidates[name][site.candidate.kind] += 1
            if site.candidate.kind == "merge":
                partners[name] |= members
                spans[name] = max(spans[name], len(members))
    refusals: dict[str, list[Refusal]] = {name: [] for name in names}
    for refusal in enumeration.refusals:
        refusals[refusal.convolution].append(refusal)
    reasons = unexplained(gm, enumeration)

    def row(node: fx.Node, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Row:
        name = node_id(node)
        return Row(
            name,
            str(conv_geometry(module)),
            shape_of(node)[1:],
            {kind: candidates[name][kind] for kind in _KINDS if candidates[name][kind]},
            tuple(sorted(partners[name] - {name}, key=names.__getitem__)),
            spans[name],
            tuple(refusals[name]),
            reasons.get(name),
        )

    return tuple(row(*each) for each in convolutions(gm))


def inspection_json(gm: fx.GraphModule, enumeration: Enumeration) -> dict[str, Any]:
    """Plain data: the rendered region tree, the rows, and totals."""

    def plain(refusal: Refusal) -> dict[str, str]:
        return {"code": refusal.code, "node": refusal.node, "reason": refusal.reason}

    rows = inspect_convolutions(gm, enumeration)
    return {
        "tree": render(enumeration.series[0]),
        "convolutions": [
            {
                "name": row.name,
                "geometry": row.geometry,
                "size": list(row.size),
                "candidates": dict(row.candidates),
                "merges_with": list(row.merges_with),
                "span": row.span,
                "refusals": [plain(refusal) for refusal in row.refusals],
                "unexplained": None if row.unexplained is None else plain(row.unexplained),
            }
            for row in rows
        ],
        "totals": _totals(rows, enumeration),
    }


def _totals(rows: Collection[Row], enumeration: Enumeration) -> dict[str, Any]:
    return {
        "convolutions": len(rows),
        "candidates": dict(Counter(site.candidate.kind for site in enumeration.sites)),
        "refusals": dict(Counter(refusal.code for refusal in enumeration.refusals)),
    }


# --- reasons ----------------------------------------------------------------------------------------------------------


def unexplained(gm: fx.GraphModule, enumeration: Enumeration) -> dict[str, Refusal]:
    """For every convolution that has neither a candidate nor a refusal, the reason.

    It lies in no Series (inside a Mesh, or it computes a side input), the refusals of merges with it are told to its
    neighbours, or there is nothing to merge it with and it changes the shape.
    """
    told = {name for site in enumeration.sites for name in (*site.candidate.kept, *site.candidate.bypassed)}
    told |= {refusal.convolution for refusal in enumeration.refusals}
    return {node_id(node): _reason(node, enumeration) for node, _ in convolutions(gm) if node_id(node) not in told}


def _reason(node: fx.Node, enumeration: Enumeration) -> Refusal:
    name = node_id(node)
    home = next((series for series in enumeration.series if any(child.exit is node for child in series.children)), None)
    if home is None:
        return _outside(node, enumeration)
    before = {node_id(each): number for number, each in enumerate(operations(home)) if each < node}
    told = [each for each in enumeration.refusals if each.code in _TOLD_TO_FIRST and each.convolution in before]
    if told:
        nearest = max(told, key=lambda each: before[each.convolution])
        return Refusal(nearest.code, name, nearest.node, nearest.reason)
    source = node.all_input_nodes[0]
    kept = shape_of(source)[1:] == shape_of(node)[1:]
    why = "may not be removed here" if kept else f"changes the shape {_by(source)} to {_by(node)}"
    return Refusal("alone", name, name, f"there is nothing to merge it with, and it {why}")


def _outside(node: fx.Node, enumeration: Enumeration) -> Refusal:
    """The reason of a convolution that is no child of any Series."""
    name = node_id(node)
    meshes = [child for series in enumeration.series for child in series.children if isinstance(child, Mesh)]
    mesh = next((mesh for mesh in reversed(meshes) if node in mesh.nodes), None)
    if mesh is not None:
        where = "output" if mesh.exit is None else node_id(mesh.exit)
        reason = f"it belongs to no chain of the Mesh of {len(mesh.nodes)} operations that ends in {where}"
        return Refusal("mesh", name, where, reason)
    if _sees_an_image(node):
        return Refusal("side-input", name, name, "it computes a side input, which nothing changes")
    return Refusal("not-spatial", name, name, "no image-like input (three or more axes) reaches it")


def _sees_an_image(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        if each.op == "placeholder" and is_tensor(each) and len(shape_of(each)) >= 3:
            return True
        fresh = set(each.all_input_nodes) - seen
        seen |= fresh
        pending.extend(fresh)
    return False


def legend(refusals: Iterable[Refusal], width: int = 100) -> list[str]:
    """Every reason once, under its code, with the nodes it is about: the first three, and how many more.

    Sentences that differ by names alone are one reason, with ``...`` for the names.

    Example:
        >>> pools = [Refusal("not-linear", f"conv{k}", f"pool{k}", "MaxPool2d is no linear map") for k in range(5)]
        >>> legend(pools)
        ['not-linear  MaxPool2d is no linear map: pool0, pool1, pool2 and 2 more']
    """
    reasons: dict[str, dict[str, tuple[dict[str, None], dict[str, None]]]] = {}
    for refusal in refusals:
        sentences, nodes = reasons.setdefault(refusal.code, {}).setdefault(_pattern(refusal), ({}, {}))
        sentences[refusal.reason] = nodes[refusal.node] = None
    indent = max(map(len, reasons), default=0) + 2
    lines: list[str] = []
    for code, found in reasons.items():
        head = code
        for pattern, (sentences, nodes) in found.items():
            text = f"{next(iter(sentences)) if len(sentences) == 1 else pattern}: {_first(list(nodes))}"
            lines += _wrap(text, f"{head:<{indent}}", " " * indent, width)
            head = ""
    return lines


def _pattern(refusal: Refusal) -> str:
    """The sentence without what looks like a name: words in quotes, or with a slash or a number sign."""
    return re.sub(r"'[^']*'|[^\s']*[/#][^\s',:]*", "...", refusal.reason)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def _wrap(text: str, first: str, rest: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Line:
    """A convolution with what follows it, other operations, or the heading of a region."""

    bars: str
    words: list[str]
    last: fx.Node | None = None
    row: Row | None = None
    operations: bool = False


def inspection_text(gm: fx.GraphModule, enumeration: Enumeration, width: int = 100) -> str:
    """The region tree as a table with a line for every convolution, a legend of the reasons, and totals.

    Names are relative to the heading above them. ``+`` begins a branch. Norms, activations and dropouts follow the
    convolution in front of them. ``span`` is the number of convolutions of the largest merge. No line is longer than
    ``width`` unless a name is.
    """
    rows = inspect_convolutions(gm, enumeration)
    outline = _Outline(gm, rows)
    lines = outline.series(enumeration.series[0], "", "")
    loose = [row for row in rows if row.name not in outline.shown]
    if loose:
        lines.append(_Line("", ["in no region"]))
        lines += [_Line(_BRANCH, [row.name], outline.nodes[row.name], row) for row in loose]
    totals = _totals(rows, enumeration)
    changeable = sum(1 for row in rows if row.candidates)
    text = [*_table(lines, width), ""]
    reasons = legend((each for row in rows for each in row.obstacles), width)
    text += [*reasons, ""] if reasons else []
    text.append(f"convolutions: {len(rows)}, of which {changeable} could change")
    text.append(f"candidates:   {_counts(totals['candidates'])}")
    text.append(f"refusals:     {_counts(totals['refusals'])}")
    return "\n".join(text)


class _Outline:
    """The lines of a region tree; ``shown`` are the convolutions that have one."""

    def __init__(self, gm: fx.GraphModule, rows: Iterable[Row]) -> None:
        self.gm = gm
        self.rows = {row.name: row for row in rows}
        self.nodes = {node_id(node): node for node, _ in convolutions(gm)}
        self.order = {node: number for number, node in enumerate(gm.graph.nodes)}
        self.shown: set[str] = set()

    def series(self, series: Series, path: str, bars: str) -> list[_Line]:
        lines: list[_Line] = []
        front: _Line | None = None
        for group in _groups(series.children):
            if not isinstance(group[0][0], Op) and removable_tag(group[0][0]) is None:
                block = self._block(group[0][0], bars)
                front = block[0]
                lines += block
                continue
            inner = "" if path else self._path_of(group)
            if inner:
                lines.append(_Line(bars, [inner]))
                front = None
            for regions in group:
                line = self._line(front, regions, inner or path, f"{bars}  " if inner else bars)
                if line is not front:
                    lines.append(line)
                    front = line
        return lines

    def _path_of(self, group: Sequence[Sequence[Region]]) -> str:
        """The heading over several lines: the module of all their operations, or of their convolutions."""
        exits = [regions[-1].exit for regions in group]
        names = [node_id(e) for e in exits if e is not None and e.op != "placeholder" and not self._tag(e)]
        inside = [name for name in names if name in self.rows]
        path = _common_path(names) or (_common_path(inside) if len(inside) > 1 else "")
        return path if inside and len(names) > 1 else ""

    def _line(self, front: _Line | None, regions: Sequence[Region], path: str, bars: str) -> _Line:
        """A line for a convolution; anything else is a word on the line in front of it where it may follow that."""
        exit_ = regions[-1].exit
        assert exit_ is not None  # noqa: S101 - only a Mesh has none
        name = node_id(exit_)
        if name in self.rows:
            self.shown.add(name)
            return _Line(bars, [_relative(name, path)], exit_, self.rows[name])
        tag = removable_tag(regions[0]) or self._tag(exit_)
        if tag is not None and front is not None:
            front.words.append(tag)
            return front
        word = "input" if exit_.op == "placeholder" else _relative(name, path)
        if front is not None and front.operations and exit_.op != "placeholder":
            front.words.append(word)
            front.last = exit_
            return front
        return _Line(bars, [word], exit_, operations=exit_.op != "placeholder")

    def _tag(self, node: fx.Node) -> str | None:
        """A short name for a norm, an activation, a dropout or the addition of a side input; None for the rest."""
        if node.op not in ("call_module", "call_function"):
            return None
        what = meaning(self.gm, node, frozenset())
        if isinstance(what, Side):
            return "side"
        if not isinstance(what, (Removable, Norm)) and not is_batch_norm(self.gm, node):
            return None
        module = module_of(self.gm, node)
        name = node_id(node).rpartition("/")[2] if module is None else type(module).__name__.lower()
        bare = re.sub(r"#\d+$|[123]d$", "", name)
        return _SHORT.get(bare, bare)

    def _block(self, region: Region, bars: str) -> list[_Line]:
        path = self._path_of_block(region)
        branches: list[list[_Line]]
        if isinstance(region, Parallel):
            what = _relative(node_id(region.exit), path)
            branches = [self._branch(branch, path, bars) for branch in region.branches]
        else:
            assert isinstance(region, Mesh)  # noqa: S101 - an Op is no block
            what = f"Mesh of {len(region.nodes)} operations"
            branches = self._mesh(region, path, bars)
        head = _Line(bars, [f"{path}: {what}" if path else what], region.exit)
        for branch in branches:
            branch[0].bars = f"{bars}{_BRANCH}{branch[0].bars.removeprefix(bars + _BAR)}"
        return [head, *(line for branch in branches for line in branch)]

    def _path_of_block(self, region: Region) -> str:
        """The module that holds the region: the join's own where all its convolutions are in there."""
        nodes = [node for node in operations(region) if node is not region.exit]
        inside = [name for name in map(node_id, nodes) if name in self.rows]
        own = _common_path([node_id(region.exit)]) if isinstance(region, Parallel) else ""
        if own and {name for name in self.rows if _relative(name, own) != name} == set(inside):
            return own
        return _common_path(inside or list(map(node_id, nodes)))

    def _branch(self, branch: Series | None, path: str, bars: str) -> list[_Line]:
        inner = f"{bars}{_BAR}"
        return [_Line(inner, ["identity"])] if branch is None else self.series(branch, path, inner)

    def _mesh(self, mesh: Mesh, path: str, bars: str) -> list[list[_Line]]:
        """The chains of a Mesh and its other convolutions, in execution order."""
        inside = {node for series in mesh.children for node in operations(series)}
        parts: list[tuple[fx.Node | None, list[_Line]]] = []
        for series in mesh.children:
            parts.append((series.exit, self._branch(series, path, bars)))
        for node in mesh.nodes:
            row = self.rows.get(node_id(node))
            if row is not None and node not in inside:
                self.shown.add(row.name)
                parts.append((node, [_Line(f"{bars}{_BAR}", [_relative(row.name, path)], node, row)]))
        end = len(self.order)
        parts.sort(key=lambda part: end if part[0] is None else self.order[part[0]])
        return [lines for _, lines in parts]


def _groups(children: Sequence[Region]) -> Iterator[list[Sequence[Region]]]:
    """The children of a Series: neighbouring operations together, inputs and other regions alone.

    What belongs to one registered removable module is one operation.
    """
    group: list[Sequence[Region]] = []
    for start, stop in runs(children):
        child = children[start]
        is_input = isinstance(child, Op) and child.exit.op == "placeholder"
        if not is_input and (isinstance(child, Op) or removable_tag(child) is not None):
            group.append(children[start:stop])
            continue
        if group:
            yield group
        yield [children[start:stop]]
        group = []
    if group:
        yield group


def _common_path(names: Iterable[str]) -> str:
    """The innermost module that holds all operations of these ids."""
    holders = [(name.partition("/")[0] if "/" in name else name.rpartition(".")[0]).split(".") for name in names]
    shared: list[str] = []
    for parts in zip(*holders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _relative(name: str, path: str) -> str:
    return name[len(path) + 1 :] if path and name.startswith((f"{path}.", f"{path}/")) else name


def _table(lines: Sequence[_Line], width: int) -> Iterator[str]:
    """The lines in columns; what is too long for its column has lines of its own."""
    cells = [[line.bars + ", ".join(line.words), *_cells(line)] for line in lines]
    numbered = [cell[:-1] for cell, line in zip(cells, lines, strict=True) if line.row is not None]
    widths = [max(map(len, column)) for column in zip(_HEADS[:-1], *numbered, strict=True)]
    codes = max(len(code) for cell in [_HEADS, *cells] for code in cell[-1].split(" "))
    beside = len(_columns(["", *("x" * number for number in widths[1:])], [0, *widths[1:]]))
    widths[0] = max(len(_HEADS[0]), min(widths[0], width - beside - codes - 2))
    yield f"{_columns(_HEADS[:-1], widths)}  {_HEADS[-1]}"
    for (first, *others, refused), line in zip(cells, lines, strict=True):
        open_bars = line.bars.replace(_BRANCH, _BAR)
        if line.row is None:
            yield from _unnumbered(line, first, others[1], widths[0] + 2 + widths[1], width)
            continue
        if len(first) > widths[0]:
            yield from _wrap(", ".join(line.words), line.bars, f"{open_bars}  ", width)
            first = open_bars
        numbers = f"{_columns([first, *others], widths)}  "
        yield from _wrap(refused, numbers, f"{open_bars:<{len(numbers)}}", width)


def _unnumbered(line: _Line, first: str, size: str, room: int, width: int) -> Iterator[str]:
    """Operations or a heading, over the columns that they have no numbers for; many operations are cut short."""
    words = line.words
    if len(first) > room and len(words) > _LISTED and line.operations:
        words = [*words[:_LISTED], f"{len(words) - _LISTED} more"]
    text = ", ".join(words)
    whole = f"{line.bars + text:<{room}}  {size}".rstrip()
    open_bars = line.bars.replace(_BRANCH, _BAR)
    yield from [whole] if len(whole) <= width else _wrap(f"{text}  {size}", line.bars, f"{open_bars}  ", width)


def _cells(line: _Line) -> list[str]:
    size = "" if line.last is None else _by(line.last)
    if line.row is None:
        return ["", size, *[""] * 5]
    row = line.row
    codes = " ".join(dict.fromkeys(each.code for each in row.obstacles))
    counts = [str(row.candidates.get(kind, "-")) for kind in _KINDS]
    return [row.geometry, size, *counts, str(row.span or "-"), codes or "-"]


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    text = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*text, " ".join(numbers)])


def _by(node: fx.Node) -> str:
    """The shape of a value without batch, such as ``64x56x56``."""
    return "x".join(map(str, shape_of(node)[1:])) if is_tensor(node) else "several"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
