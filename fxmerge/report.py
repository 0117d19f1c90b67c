"""The report of a compression: what was asked, what was measured, and a decision with a reason for every convolution."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from .candidates import Candidate, Enumeration, Refusal, Site
from .errors import StoreError
from .fitting import Refitted
from .graph import between, by_id, convolutions, node_id
from .inspection import legend, unexplained
from .linear import Side, meaning
from .plan import Plan, format_latency

__all__ = ["Decision", "Report", "Size", "decide", "size_of"]

_COLUMNS = 100
_NAME = 40
"""Characters of the column of names; a longer name has a line of its own."""
_LISTED = 3
"""Names that a sentence lists before it says how many more there are."""
_OBSTACLE = re.compile(r"; refused \[([\w-]+)\] at (\S+): ")


@dataclass(frozen=True, slots=True)
class Size:
    """What a network consists of: convolutions, parameters."""

    convolutions: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one convolution: ``kept``, ``merged``, ``removed`` or ``dropped``, and why."""

    convolution: str
    decision: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """All there is to say about one compression; ``print`` it.

    Latencies are in ``unit``, end to end. ``measured`` and ``repeatability`` come from the same session as ``original``, runs
    interleaved; ``repeatability`` is the machine's own relative spread. ``builds`` are the networks of the closed loop, each
    with its predicted and its measured share of the original; ``drift`` is by how much the original's latency differs from
    what it was when layers were measured.
    """

    data: str
    notes: tuple[str, ...]
    runtime: Mapping[str, str]
    unit: str
    batch: int
    requested: float
    original: float
    predicted: float
    measured: float
    repeatability: float
    before: Size
    after: Size
    candidates: Mapping[str, int]
    useful: int
    refusals: Mapping[str, int]
    decisions: tuple[Decision, ...]
    error: float
    error_allowed: float
    original_error: float
    dependence: float
    fits: tuple[Refitted, ...]
    bound: float
    builds: tuple[tuple[float, float], ...]
    drift: float
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it back."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            StoreError: it is no report of this version.
        """
        try:
            fields: dict[str, Any] = {name: math.inf if value is None else value for name, value in data.items()}
            fields["notes"] = tuple(fields["notes"])
            fields["before"], fields["after"] = Size(**fields["before"]), Size(**fields["after"])
            fields["fits"] = tuple(Refitted(**each) for each in fields["fits"])
            fields["builds"] = tuple((predicted, measured) for predicted, measured in fields["builds"])
            fields["decisions"] = tuple(Decision(**each) for each in fields["decisions"])
            return Report(**fields)
        except (KeyError, TypeError) as error:
            raise StoreError(f"this is no report of this version of fxmerge: {error!r}") from error

    def __str__(self) -> str:
        def show(value: float) -> str:
            return f"{format_latency(value, self.unit)} ({value / self.original:.1%})"

        measured = (
            f"{show(self.measured)}, repeatability {self.repeatability:.1%}"
            if self.unit == "ms"
            else show(self.measured)
        )
        environment = [value for name, value in self.runtime.items() if name != "name"]
        lines = [
            self.data,
            *(f"note: {note}" for note in self.notes),
            f"runtime:      {', '.join((self.runtime['name'], f'batch {self.batch}', *environment))}",
            f"original:     {format_latency(self.original, self.unit)}",
            f"requested:    {show(self.requested)}",
            f"predicted:    {show(self.predicted)}",
            f"measured:     {measured}",
            *self._closed_loop(),
            *self._fitted(),
            f"convolutions: {self.before.convolutions} -> {self.after.convolutions}",
            f"parameters:   {self.before.parameters:,} -> {self.after.parameters:,}",
            f"candidates:   {_counts(self.candidates)}; {self.useful} of them faster than what they replace",
            f"refusals:     {_counts(self.refusals)}",
            f"merged against trainable form: error {self.error:.1e}, allowed {self.error_allowed:.1e}",
            f"seconds:      {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in self.seconds.items())}",
        ]
        wrapped = (piece for line in lines for piece in _wrap(line, "", " " * 14))
        return "\n".join([*wrapped, "", *_table(self.decisions)])

    def _fitted(self) -> list[str]:
        if not self.fits:
            return []
        done = [each for each in self.fits if not each.reason]
        better = [each for each in done if each.fitted]
        lines = [f"fitted:       {len(better)} of {len(self.fits)}; {len(done) - len(better)} are better composed"]
        if done:
            worst = max(done, key=lambda each: each.error)
            least = min(done, key=lambda each: each.rows_per_unknown)
            lines[0] += (
                f"; held-out error at most {worst.error:.2g} ({worst.name}), composed {worst.composed_error:.2g}; at least "
                f"{least.rows_per_unknown:.1f} rows for an unknown ({least.name})"
            )
        return lines + [f"not fitted:   {each.name}: {each.reason}" for each in self.fits if each.reason]

    def _closed_loop(self) -> list[str]:
        if not self.builds:
            return []
        listed = ", ".join(f"{measured:.1%} for {predicted:.1%}" for predicted, measured in self.builds)
        return [f"built:        {listed} predicted; the original's latency drifted by {self.drift:+.1%}"]

    def __repr__(self) -> str:
        return (
            f"Report({format_latency(self.original, self.unit)} -> {format_latency(self.measured, self.unit)}, "
            f"{self.before.convolutions} -> {self.after.convolutions} convolutions)"
        )


def _table(decisions: Sequence[Decision]) -> Iterator[str]:
    """The decisions in columns, with the code and the place of every refusal, and a legend of the codes."""
    names = max((len(each.convolution) for each in decisions), default=0)
    column = min(names, _NAME)
    refusals: list[Refusal] = []
    for each in decisions:
        what, *parts = _OBSTACLE.split(each.reason)
        obstacles = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
        found = [Refusal(code, each.convolution, node, sentence) for code, node, sentence in obstacles]
        refusals += found
        places = [r.code if r.node == r.convolution else f"{r.code} at {r.node}" for r in found]
        start = f"{each.decision:<7}  {each.convolution:<{column}}  "
        rest = " " * (7 + 2 + column + 2)
        if len(each.convolution) > column:
            yield start.rstrip()
            start = rest
        yield from _wrap("; ".join([what, *_some(places)]), start, rest)
    if refusals:
        yield ""
        yield from legend(refusals, _COLUMNS)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def size_of(gm: fx.GraphModule) -> Size:
    """Convolution calls and distinct parameters of a network."""
    return Size(sum(1 for _ in convolutions(gm)), sum(p.numel() for p in nn.Module.parameters(gm)))


def decide(gm: fx.GraphModule, enumeration: Enumeration, useful: Sequence[Site], plan: Plan) -> tuple[Decision, ...]:
    """What became of every convolution of the original, and why; ``useful`` are the sites that were up for choice."""
    fates: dict[str, Decision] = {}
    nodes = by_id(gm)
    for candidate in plan.candidates:
        for name, decision, reason in _fates(candidate, _side_inputs(gm, nodes, candidate)):
            fates[name] = Decision(name, decision, reason)
    options, slower = _by_convolution(useful), _by_convolution(enumeration.sites)
    refused: dict[str, list[Refusal]] = {name: [each] for name, each in unexplained(gm, enumeration).items()}
    for refusal in enumeration.refusals:
        refused.setdefault(refusal.convolution, []).append(refusal)
    return tuple(
        fates.get(name) or Decision(name, "kept", _why_kept(options[name], slower[name], refused.get(name, ())))
        for name in (node_id(node) for node, _ in convolutions(gm))
    )


def _by_convolution(sites: Sequence[Site]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for site in sites:
        counts.update(set(site.candidate.kept + site.candidate.bypassed))
    return counts


def _side_inputs(gm: fx.GraphModule, nodes: Mapping[str, fx.Node], candidate: Candidate) -> list[str]:
    """What a merge adds behind its convolution: values that were added inside the segment."""
    if candidate.kind != "merge":
        return []
    inside = between(nodes[candidate.entry], nodes[candidate.exit])
    found = (meaning(gm, node, frozenset()) for node in sorted(inside))
    return [node_id(what.value) for what in found if isinstance(what, Side)]


def _fates(candidate: Candidate, sides: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    if candidate.kind == "merge":
        where = f"into {candidate.geometry}"
        behind = [f"norm {candidate.norm} returns behind it"] if candidate.norm else []
        behind += [f"side input {side} is added behind it" for side in sides]
        for name in candidate.kept:
            yield name, "merged", "; ".join([f"{where} with {_others(candidate.kept, name)}", *behind])
        for name in candidate.bypassed:
            branch = ", or gone with its branch," if candidate.cuts else ""
            yield name, "removed", f"replaced by the identity{branch} in the merge {where}"
        return
    for name in candidate.bypassed:
        if candidate.kind == "drop":
            yield name, "dropped", f"its branch to {candidate.exit} is gone"
        else:
            yield name, "removed", "replaced by the identity"


def _others(names: Sequence[str], name: str) -> str:
    others = [other for other in names if other != name]
    return ", ".join(_some(others)) if others else "its skip or what was removed around it"


def _why_kept(options: int, listed: int, refused: Sequence[Refusal]) -> str:
    if options:
        reason = f"{_candidates(options)}, none in the best plan"
    elif listed:
        reason = f"{_candidates(listed)}, none faster than leaving it alone"
    else:
        reason = "no candidate"
    return "".join([reason, *(f"; refused [{each.code}] at {each.node}: {each.reason}" for each in refused)])


def _candidates(count: int) -> str:
    return "1 candidate" if count == 1 else f"{count} candidates"


def _some(names: Sequence[str]) -> list[str]:
    """The first few names; of one more than that, all."""
    if len(names) <= _LISTED + 1:
        return list(names)
    return [*names[:_LISTED], f"{len(names) - _LISTED} more"]


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
