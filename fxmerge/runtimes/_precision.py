"""Names of floating-point precisions."""

from __future__ import annotations

from fxmerge.errors import UserError

__all__ = ["PRECISIONS", "full_name"]

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Short name -> name in torch."""


def full_name(precision: str) -> str:
    """The name that torch has for a precision, given by either name.

    Raises:
        UserError: it is none of the three.

    Example:
        >>> full_name("bf16"), full_name("float32")
        ('bfloat16', 'float32')
    """
    name = PRECISIONS.get(precision, precision)
    if name not in PRECISIONS.values():
        known = ", ".join(f"{short} ({name})" for short, name in PRECISIONS.items())
        raise UserError(f"unknown precision {precision!r}; expected one of {known}.")
    return name
