"""Score every candidate by the loss of the whole network when it alone is applied: the importance table.

What the loss is, the estimator says (:mod:`fxmerge.estimators`). Candidates are independent of each other. Changes
nothing: ``modified`` is False.
"""

from __future__ import annotations

__all__ = ["ScoreImportancePass", "ScoreResult", "score_importance"]

import math
from collections.abc import Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.candidates import Candidate, Enumeration
from fxmerge.errors import UserError
from fxmerge.estimators import Estimator
from fxmerge.graph import by_id
from fxmerge.passes._base import GraphPass
from fxmerge.progress import progress


class ScoreResult(PassResult):
    """torch's PassResult with the importance table."""

    losses: Mapping[Candidate, float]

    def __new__(cls, graph_module: fx.GraphModule, losses: Mapping[Candidate, float]) -> ScoreResult:
        """Make a result; the graph is never modified."""
        result = super().__new__(cls, graph_module, False)
        assert isinstance(result, ScoreResult)  # noqa: S101 - what the line above makes
        result.losses = losses
        return result


class ScoreImportancePass(GraphPass):
    """Score all candidates with one estimator.

    Attributes:
        enumeration: the candidates.
        estimator: what turns a candidate into a loss.
    """

    def __init__(self, enumeration: Enumeration, estimator: Estimator) -> None:
        super().__init__()
        self.enumeration = enumeration
        self.estimator = estimator

    def call(self, graph_module: fx.GraphModule) -> ScoreResult:
        """Score; the table is in the result's ``losses``."""
        return ScoreResult(graph_module, score_importance(graph_module, self.enumeration, self.estimator))


def score_importance(gm: fx.GraphModule, enumeration: Enumeration, estimator: Estimator) -> dict[Candidate, float]:
    """The loss of every distinct candidate.

    Raises:
        UserError: the estimator returned something that is no finite number; the message names the candidate.
    """
    order = {name: number for number, name in enumerate(by_id(gm))}
    distinct = dict.fromkeys(site.candidate for site in enumeration.sites)
    candidates = sorted(distinct, key=lambda candidate: order[candidate.entry])
    losses: dict[Candidate, float] = {}
    score = estimator.prepare(gm, candidates)
    with progress(f"Scoring candidates by {estimator.name}", total=len(candidates)) as bar:
        for candidate in candidates:
            loss = float(score(candidate))
            if not math.isfinite(loss):
                raise UserError(f"estimator {estimator.name!r} gave the loss {loss} to the candidate: {candidate}")
            losses[candidate] = loss
            bar.advance()
    return losses
