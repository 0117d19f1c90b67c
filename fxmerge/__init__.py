"""fxmerge makes PyTorch CNNs shallower until they meet a latency budget on a real runtime.

:func:`compress` is the whole pipeline: capture, analyse, measure, select, rewrite. :func:`fold` is its lossless part alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture import capture
    from .driver import Frontier, compress, fold, frontier
    from .errors import FxmergeError
    from .plan import Plan
    from .report import Report
    from .result import Result, load
    from .save import export

__version__ = "0.1.0"

_HOMES = {
    "Frontier": "driver",
    "FxmergeError": "errors",
    "Plan": "plan",
    "Report": "report",
    "Result": "result",
    "capture": "capture",
    "compress": "driver",
    "export": "save",
    "fold": "driver",
    "frontier": "driver",
    "load": "result",
}
"""Where each public name lives: modules are imported on first use, so that ``import fxmerge`` costs no more than torch."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fxmerge' has no attribute {name!r}; its public names are {', '.join(_HOMES)}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
