"""Budgets: a share of the original's latency, or an amount in the runtime's unit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import BudgetError

__all__ = ["Budget", "parse_budget"]

_FACTORS = {"ms": 1.0, "us": 1e-3, "s": 1e3, "MACs": 1.0, "kMACs": 1e3, "MMACs": 1e6, "GMACs": 1e9, "TMACs": 1e12}
_EXPECTED = "expected a share of the original such as 0.6 or '60%', or an amount such as '8ms' or '1.2GMACs'"


@dataclass(frozen=True, slots=True)
class Budget:
    """A share of the original (``unit`` None) or an amount in ``unit``."""

    value: float
    unit: str | None
    text: str

    def resolve(self, original: float) -> float:
        """The amount, for an original that takes ``original``."""
        return self.value * original if self.unit is None else self.value


def parse_budget(budget: float | str, unit: str) -> Budget:
    """Read a budget for a runtime that measures in ``unit`` (``ms`` or ``MACs``).

    Raises:
        BudgetError: it is no number, not positive, or in another unit.

    Example:
        >>> parse_budget("1.2GMACs", "MACs").value, parse_budget("60%", "ms").value
        (1200000000.0, 0.6)
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"budget={budget!r} is a {type(budget).__name__}; {_EXPECTED}")
    text = str(budget)
    match = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)\s*", text)
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        raise BudgetError(f"budget={budget!r} is not a number; {_EXPECTED}")
    if value <= 0:
        raise BudgetError(f"budget={budget!r} is not positive; {_EXPECTED}")
    suffix = match.group(2)
    if suffix in ("", "%"):
        share = value / 100 if suffix else value
        if share > 10:
            raise BudgetError(
                f"budget={budget!r} is {share:g} times the original; for an amount add its unit: {_EXPECTED}"
            )
        return Budget(share, None, text)
    known = {name.lower(): name for name in _FACTORS}
    name = known.get(suffix.lower())
    if name is None:
        raise BudgetError(f"budget={budget!r} has the unknown unit {suffix!r}; {_EXPECTED}")
    found = "MACs" if name.endswith("MACs") else "ms"
    if found != unit:
        raise BudgetError(f"budget={budget!r} is in {found}, but this runtime measures {unit}; {_EXPECTED}")
    return Budget(value * _FACTORS[name], unit, text)
