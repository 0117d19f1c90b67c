"""A plan: the chosen candidates, as plain data that goes to JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .candidates import Candidate
from .errors import PlanError, UserError

__all__ = ["Plan", "PlanEntry", "format_latency"]

_FORMAT = "fxmerge.plan/1"


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One chosen candidate, with the latency of what it leaves and its loss when it was chosen (history, not identity)."""

    candidate: Candidate
    latency: float
    loss: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to a network.

    Attributes:
        entries: the chosen candidates in the order of the network.
        structure: the network the plan is for (:func:`fxmerge.graph.structure`): operations, shapes, edges; no weights.
        runtime: where it was measured.
        unit: of all latencies, ``ms`` or ``MACs``.
        original: end-to-end latency of the original.
        predicted: end-to-end latency of the result, from the table.
        loss: sum of the entries' losses.
    """

    entries: tuple[PlanEntry, ...]
    structure: tuple[str, ...]
    runtime: str
    unit: str
    original: float
    predicted: float
    loss: float

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The chosen candidates alone."""
        return tuple(entry.candidate for entry in self.entries)

    @property
    def merges(self) -> tuple[Candidate, ...]:
        """Candidates that merge two or more convolutions into one."""
        return tuple(c for c in self.candidates if c.kind == "merge" and len(c.kept) > 1)

    def to_json(self) -> str:
        """The plan as JSON text; :meth:`from_json` reads it back."""
        entries = [{"candidate": e.candidate.to_json(), "latency": e.latency, "loss": e.loss} for e in self.entries]
        fields = {
            "format": _FORMAT,
            "runtime": self.runtime,
            "unit": self.unit,
            "original": self.original,
            "predicted": self.predicted,
            "loss": self.loss,
            "entries": entries,
            "structure": list(self.structure),
        }
        return json.dumps(fields, indent=1)

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Plan:
        """Read a plan from JSON text (or from what ``json.loads`` made of it).

        Raises:
            PlanError: it is no JSON, or no plan of this version of fxmerge.
        """
        try:
            data = json.loads(text) if isinstance(text, str) else text
            if data["format"] != _FORMAT:
                raise PlanError(
                    f"this plan has the format {data['format']!r}; this version of fxmerge reads {_FORMAT!r}"
                )
            entries = tuple(
                PlanEntry(Candidate.from_json(e["candidate"]), float(e["latency"]), float(e["loss"]))
                for e in data["entries"]
            )
            numbers = (float(data[name]) for name in ("original", "predicted", "loss"))
            return Plan(entries, tuple(data["structure"]), data["runtime"], data["unit"], *numbers)
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise PlanError(f"this is no plan of fxmerge's: {error!r}") from error

    def __str__(self) -> str:
        head = (
            f"Plan on {self.runtime}: {format_latency(self.original, self.unit)} -> {format_latency(self.predicted, self.unit)} "
            f"predicted, {len(self.entries)} changes, loss {self.loss:.4g}"
        )
        lines = [f"  {format_latency(e.latency, self.unit):>12}  {e.loss:8.4f}  {e.candidate}" for e in self.entries]
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.entries)} changes, {format_latency(self.original, self.unit)} -> "
            f"{format_latency(self.predicted, self.unit)}, loss {self.loss:.4g})"
        )


def format_latency(value: float, unit: str) -> str:
    """A latency with its unit: milliseconds with three digits, multiply-accumulates with a prefix.

    Example:
        >>> format_latency(1.8e9, "MACs"), format_latency(12.3456, "ms")
        ('1.80 GMACs', '12.346 ms')
    """
    if unit == "ms":
        return f"{value:.3f} ms"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"
