"""Score every candidate by the loss of the whole network when it alone is applied: the importance table.

What the loss is, the estimator says (:mod:`fxmerge.estimators`). Candidates are independent of each other, so any
``concurrent.futures.Executor`` may score them; a table on disk keeps each loss as soon as it is known
(:mod:`fxmerge.importance`). Changes nothing: ``modified`` is False.
"""

from __future__ import annotations

__all__ = ["ScoreImportancePass", "ScoreResult", "score_importance"]

import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import nullcontext

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.candidates import Candidate, Enumeration
from fxmerge.errors import UserError
from fxmerge.estimators import Estimator
from fxmerge.graph import by_id
from fxmerge.importance import ImportanceTable, open_table
from fxmerge.passes._base import GraphPass
from fxmerge.progress import progress
from fxmerge.workers import check_executor, scores

_log = logging.getLogger("fxmerge")


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
        executor: where to, see :func:`score_importance`.
        table: see :func:`score_importance`.
    """

    def __init__(
        self,
        enumeration: Enumeration,
        estimator: Estimator,
        executor: Executor | None = None,
        table: ImportanceTable | str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.enumeration = enumeration
        self.estimator = estimator
        self.executor = executor
        self.table = table

    def call(self, graph_module: fx.GraphModule) -> ScoreResult:
        """Score; the table is in the result's ``losses``."""
        losses = score_importance(graph_module, self.enumeration, self.estimator, self.executor, self.table)
        return ScoreResult(graph_module, losses)


def score_importance(
    gm: fx.GraphModule,
    enumeration: Enumeration,
    estimator: Estimator,
    executor: Executor | None = None,
    table: ImportanceTable | str | os.PathLike[str] | None = None,
) -> dict[Candidate, float]:
    """The loss of every distinct candidate, in the order of where they start.

    Args:
        gm: a canonical graph.
        enumeration: the candidates.
        estimator: what turns one into a loss.
        executor: where they are scored, see :func:`fxmerge.workers.scores`; None is here, one after the other.
        table: keeps every loss at once, and spares what it holds; a file, or one that is open for this network and
            estimator. None keeps nothing.

    Raises:
        UserError: the estimator failed, or returned something that is no finite number; the message names the candidate.
            The executor cannot score this network with this estimator.
        StoreError: the file cannot be used, or was made for something else.
    """
    order = {name: number for number, name in enumerate(by_id(gm))}
    distinct = dict.fromkeys(site.candidate for site in enumeration.sites)
    candidates = sorted(distinct, key=lambda candidate: order[candidate.entry])
    check_executor(executor, gm, estimator)
    opened = (
        nullcontext(table) if table is None or isinstance(table, ImportanceTable) else open_table(table, gm, estimator)
    )
    with opened as kept:
        losses = {} if kept is None else kept.get(candidates)
        missing = [candidate for candidate in candidates if candidate not in losses]
        if losses:
            _log.info("%d of %d losses are known from %s", len(losses), len(candidates), kept)
        with progress(f"Scoring candidates by {estimator.name}", total=len(missing)) as bar:
            for candidate, loss in scores(gm, candidates, estimator, executor, missing):
                if not math.isfinite(loss):
                    raise UserError(f"estimator {estimator.name!r} gave the loss {loss} to the candidate: {candidate}")
                losses[candidate] = loss
                if kept is not None:
                    kept.put(candidate, loss)
                bar.advance()
    return {candidate: losses[candidate] for candidate in candidates}
