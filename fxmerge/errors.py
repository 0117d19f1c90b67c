"""The errors fxmerge raises: one family, three kinds.

A :class:`UserError` is something the caller can correct, an :class:`UnsupportedError` is a model that fxmerge cannot treat, and
an :class:`InternalError` is a defect of fxmerge itself. Every message says what was wrong, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CaptureError",
    "FxmergeError",
    "InexactError",
    "InternalError",
    "MissingPackageError",
    "PlanError",
    "StoreError",
    "UnsupportedError",
    "UserError",
]


class FxmergeError(Exception):
    """Base class of every error that fxmerge raises on purpose."""


class UserError(FxmergeError, ValueError):
    """An argument, file or option that the caller can correct."""


class BudgetError(UserError):
    """A budget that cannot be read, has the wrong unit, or is out of reach: then ``smallest`` is what can be reached."""

    def __init__(self, message: str, smallest: float | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class PlanError(UserError):
    """A plan that does not belong to the network it was applied to."""


class StoreError(UserError):
    """A latency store or result folder that is corrupt, foreign or not writable; it is left untouched."""


class MissingPackageError(UserError):
    """A runtime or exporter whose optional package is not installed."""


class UnsupportedError(FxmergeError):
    """A model or graph that fxmerge cannot treat."""


class CaptureError(UnsupportedError):
    """A model that ``torch.export`` cannot trace; the message names the place."""


class InexactError(UnsupportedError):
    """A composition of linear maps that is not exactly one convolution; ``code`` names the reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class InternalError(FxmergeError):
    """A check of fxmerge's own that failed: a defect, never a wrong network handed out. Please report it."""
