"""The report of a compression: what was asked, what was measured, and a decision with a reason for every convolution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx, nn

from .candidates import Candidate, Enumeration, Site
from .errors import StoreError
from .graph import convolutions, node_id
from .plan import Plan, format_latency

__all__ = ["Decision", "Report", "Size", "decide", "size_of"]


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
    interleaved; ``repeatability`` is the machine's own relative spread.
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
    bound: float
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
            f"convolutions: {self.before.convolutions} -> {self.after.convolutions}",
            f"parameters:   {self.before.parameters:,} -> {self.after.parameters:,}",
            f"candidates:   {_counts(self.candidates)}; {self.useful} of them faster than what they replace",
            f"refusals:     {_counts(self.refusals)}",
            f"merged against trainable form: error {self.error:.1e}, allowed {self.error_allowed:.1e}",
            f"seconds:      {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in self.seconds.items())}",
            "",
            *(f"  {d.decision:<8} {d.convolution}: {d.reason}" for d in self.decisions),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"Report({format_latency(self.original, self.unit)} -> {format_latency(self.measured, self.unit)}, "
            f"{self.before.convolutions} -> {self.after.convolutions} convolutions)"
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def size_of(gm: fx.GraphModule) -> Size:
    """Convolution calls and distinct parameters of a network."""
    return Size(sum(1 for _ in convolutions(gm)), sum(p.numel() for p in nn.Module.parameters(gm)))


def decide(gm: fx.GraphModule, enumeration: Enumeration, useful: Sequence[Site], plan: Plan) -> tuple[Decision, ...]:
    """What became of every convolution of the original, and why; ``useful`` are the sites that were up for choice."""
    fates: dict[str, Decision] = {}
    for candidate in plan.candidates:
        for name, decision, reason in _fates(candidate):
            fates[name] = Decision(name, decision, reason)
    options, slower = _by_convolution(useful), _by_convolution(enumeration.sites)
    refused: dict[str, list[str]] = {}
    for refusal in enumeration.refusals:
        refused.setdefault(refusal.convolution, []).append(f"[{refusal.code}] at {refusal.node}: {refusal.reason}")
    return tuple(
        fates.get(name) or Decision(name, "kept", _why_kept(options[name], slower[name], refused.get(name, ())))
        for name in (node_id(node) for node, _ in convolutions(gm))
    )


def _by_convolution(sites: Sequence[Site]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for site in sites:
        counts.update(set(site.candidate.kept + site.candidate.bypassed))
    return counts


def _fates(candidate: Candidate) -> list[tuple[str, str, str]]:
    if candidate.kind == "merge":
        where = f"into {candidate.geometry}"
        merged = [(name, "merged", f"{where} with {_others(candidate.kept, name)}") for name in candidate.kept]
        return merged + [
            (name, "removed", f"replaced by the identity in the merge {where}") for name in candidate.bypassed
        ]
    if candidate.kind == "drop":
        return [(name, "dropped", f"its branch to {candidate.exit} is gone") for name in candidate.bypassed]
    return [(name, "removed", "replaced by the identity") for name in candidate.bypassed]


def _others(names: Sequence[str], name: str) -> str:
    others = [other for other in names if other != name]
    return ", ".join(others) if others else "its skip or what was removed around it"


def _why_kept(options: int, listed: int, refused: Sequence[str]) -> str:
    if options:
        reason = f"{options} candidates would change it, none of them in the best plan for this budget"
    elif listed:
        reason = f"none of the {listed} candidates that would change it is faster than leaving it alone"
    elif refused:
        reason = "no candidate"
    else:
        reason = "no candidate: it has no neighbour to merge with and cannot be removed"
    return "; ".join([reason, *(f"refused {obstacle}" for obstacle in refused)])
