"""What can become of a segment: typed data that the passes hand to each other.

Names in here are node ids (:func:`fxmerge.graph.node_id`), so candidates survive copies of the graph and go to JSON.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from .algebra import Geometry
from .errors import UserError
from .regions import Series

__all__ = ["METHODS", "Candidate", "Enumeration", "Limits", "Refusal", "Site", "submodules"]

METHODS = ("layermerge", "depth", "layer")
"""The paper's method and its two baselines: no convolution goes, and nothing merges."""

_Kind = Literal["merge", "bypass", "drop"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the search for candidates.

    Attributes:
        method: ``layermerge``, or a baseline of the paper: ``depth`` (no convolution goes), ``layer`` (nothing merges).
        max_span: the most convolutions that one merged segment may hold.
        max_kernel: the largest kernel, per axis, that several convolutions may merge into.
        include: paths of submodules outside of which nothing changes; none for the whole network.
        exclude: paths of submodules inside of which nothing changes.
        exit_activation: whether a merge whose exit has no activation may also get one (Kim et al. 2023 do so for
            MobileNetV2).
        norms_go: whether a merge may also do without any of the norms over each sample that were in it: where merged
            convolutions are fitted to what the original gives, norms and all.

    Raises:
        UserError: an unknown method, or a bound below 1.
    """

    method: str = "layermerge"
    max_span: int = 16
    max_kernel: int = 7
    exit_activation: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    norms_go: bool = field(default=False, repr=False)  # follows from how weights are found, which is told beside it

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}; the known ones are {', '.join(METHODS)}")
        for name in ("max_span", "max_kernel"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")

    def covers(self, path: str) -> bool:
        """Whether the operation or module at ``path`` may be changed.

        Example:
            >>> limits = Limits(include=("backbone",), exclude=("backbone.stem",))
            >>> limits.covers("backbone.layer1.0"), limits.covers("backbone.stem.conv"), limits.covers("backbones")
            (True, False, False)
        """

        def inside(names: tuple[str, ...]) -> bool:
            return any(path == name or path.startswith((f"{name}.", f"{name}/", f"{name}#")) for name in names)

        return (not self.include or inside(self.include)) and not inside(self.exclude)


def submodules(model: nn.Module, option: str, names: str | Iterable[str]) -> tuple[str, ...]:
    """What ``include`` or ``exclude`` (``option``) name, as :class:`Limits` takes it.

    Raises:
        UserError: a name is no path of a submodule; the message has those that are close to it.
    """
    listed = (names,) if isinstance(names, str) else tuple(names)
    known = {path for path, _ in model.named_modules(remove_duplicate=False)} if isinstance(model, nn.Module) else set()
    for name in listed:
        if name not in known or not name:
            close = difflib.get_close_matches(str(name), known - {""}, n=3, cutoff=0.4)
            hint = f"; close to it are {', '.join(map(repr, close))}" if close else ""
            raise UserError(
                f"{option} names {name!r}, which is no submodule of {type(model).__name__}{hint}. "
                "Pass paths as model.named_modules() lists them."
            )
    return listed


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to replace one segment.

    Attributes:
        kind: ``merge`` (one convolution is left), ``bypass`` (the identity is left) or ``drop`` (a branch goes with its
            join).
        entry: the value the segment reads.
        exit: the value it gives.
        kept: convolutions that merge into one.
        bypassed: convolutions that go.
        removed: activations that go, norms over each sample, and products that lose a factor; those of branches that go first.
        cuts: branches that go: join and position among its operands.
        geometry: of the convolution that is left, None where none is.
        norm: which of the removed norms returns behind the merged convolution, None for none.
        activation: ``torch.nn`` class of the activation inserted behind that, None for none.
    """

    kind: _Kind
    entry: str
    exit: str
    kept: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    cuts: tuple[tuple[str, int], ...] = ()
    geometry: Geometry | None = None
    norm: str | None = None
    activation: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it back."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**data, "geometry": None if self.geometry is None else self.geometry.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Candidate:
        """Read what :meth:`to_json` wrote.

        Raises:
            UserError: a field is missing or unknown.
        """
        try:
            return Candidate(
                kind=data["kind"],
                entry=data["entry"],
                exit=data["exit"],
                kept=tuple(data["kept"]),
                bypassed=tuple(data["bypassed"]),
                removed=tuple(data["removed"]),
                cuts=tuple((join, position) for join, position in data["cuts"]),
                geometry=None if data["geometry"] is None else Geometry.from_json(data["geometry"]),
                norm=data["norm"],
                activation=data["activation"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no candidate of fxmerge's: {error!r} in {data!r}") from error

    def __str__(self) -> str:
        if self.kind == "drop":
            return f"drop the branch {self.entry} .. {self.exit} ({len(self.bypassed)} convolutions)"
        if self.kind == "bypass":
            return f"bypass {', '.join(self.bypassed)}"
        gone = f", {len(self.bypassed)} removed" if self.bypassed else ""
        norm = f", {self.norm} behind it" if self.norm else ""
        return f"merge {' + '.join(self.kept)} into {self.geometry}{gone}{norm}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where a candidate stands: children ``start`` to ``stop`` (exclusive) of one Series of the tree."""

    series: int
    start: int
    stop: int
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something was not merged.

    Attributes:
        code: of the reason.
        convolution: that it is about.
        node: in the way.
        reason: in words.
    """

    code: str
    convolution: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Enumeration:
    """Everything that could be done to a network, and the reasons for what could not.

    Attributes:
        series: every Series of the region tree, outer ones first; the first is the tree.
        sites: every candidate with its place.
        refusals: every merge that was looked at and refused.
    """

    series: tuple[Series, ...]
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

    def __repr__(self) -> str:
        return f"Enumeration({len(self.series)} series, {len(self.sites)} candidates, {len(self.refusals)} refusals)"
