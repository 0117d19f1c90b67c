"""The compiler passes of fxmerge, one per file, each usable in any ``torch.fx`` ``PassManager``.

The source lives in the repository's top-level folder ``passes/``; the import name is
``fxmerge.passes`` and no other.
"""

from __future__ import annotations

if __name__ != "fxmerge.passes":
    raise ImportError(
        f"this folder is the source of fxmerge.passes and cannot be imported as {__name__!r}: "
        "two import names would make two copies of every class; "
        "write 'import fxmerge.passes' instead"
    )

from fxmerge.passes._base import GraphPass, PassResult
from fxmerge.passes.canonicalise import CanonicalisePass
from fxmerge.passes.enumerate_segments import EnumerateSegmentsPass, EnumerationResult
from fxmerge.passes.fold import FoldPass, FoldResult
from fxmerge.passes.polish import PolishPass, PolishResult
from fxmerge.passes.profile_latency import LatencyTable, ProfileLatencyPass, ProfileResult
from fxmerge.passes.recognise import RecognisePass
from fxmerge.passes.refit import RefitPass, RefitResult
from fxmerge.passes.relax import RelaxPass
from fxmerge.passes.score_importance import ScoreImportancePass, ScoreResult
from fxmerge.passes.select_segments import SelectResult, SelectSegmentsPass

__all__ = [
    "CanonicalisePass",
    "EnumerateSegmentsPass",
    "EnumerationResult",
    "FoldPass",
    "FoldResult",
    "GraphPass",
    "LatencyTable",
    "PassResult",
    "PolishPass",
    "PolishResult",
    "ProfileLatencyPass",
    "ProfileResult",
    "RecognisePass",
    "RefitPass",
    "RefitResult",
    "RelaxPass",
    "ScoreImportancePass",
    "ScoreResult",
    "SelectResult",
    "SelectSegmentsPass",
]
