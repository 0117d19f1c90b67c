"""How much work an optional stage may do: so many of something, or so many seconds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UserError

__all__ = ["Effort", "parse_effort"]

_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Effort:
    """A number of things, or a number of seconds; one of them is None."""

    count: int | None
    seconds: float | None

    def __str__(self) -> str:
        return str(self.count) if self.seconds is None else f"{self.seconds:g} s"


def parse_effort(value: int | str | None, option: str, things: str) -> Effort | None:
    """The effort of ``"1min"``, ``"30s"``, ``"2h"``, or of a number; None for none.

    Args:
        value: what the user gave.
        option: its name, for messages.
        things: what a number counts.

    Raises:
        UserError: it is none of these.

    Example:
        >>> parse_effort("1.5min", "search", "networks").seconds, parse_effort(20, "search", "networks").count
        (90.0, 20)
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return Effort(value, None)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", value.lower()) if isinstance(value, str) else None
    if match is None or match[2] not in _SECONDS:
        raise UserError(
            f"{option}={value!r} is no effort; expected a time such as '1min' or '30s', a number of {things} such as 20, or None"
        )
    return Effort(None, float(match[1]) * _SECONDS[match[2]])
