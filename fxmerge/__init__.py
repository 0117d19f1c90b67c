"""fxmerge makes PyTorch CNNs shallower until they meet a latency budget on a real runtime.

:func:`compress` is the whole pipeline: capture, analyse, measure, select, rewrite. :func:`fold` is its lossless part alone.
What costs import time (networkx, onnx, rich, the passes) is imported by the functions that use it.
"""

from __future__ import annotations

from .capture import capture
from .driver import Frontier, compress, fold, frontier
from .errors import FxmergeError
from .finetuning import finetune
from .plan import Plan
from .removable import register_removable
from .report import Report
from .result import Result, load
from .save import export

__version__ = "0.1.0"

__all__ = [
    "Frontier",
    "FxmergeError",
    "Plan",
    "Report",
    "Result",
    "__version__",
    "capture",
    "compress",
    "export",
    "finetune",
    "fold",
    "frontier",
    "load",
    "register_removable",
]
