"""Scoring: every distinct candidate once, and no loss that is no number."""

from __future__ import annotations

import itertools
import math

import pytest
from small_networks import small

from fxmerge.errors import UserError
from fxmerge.estimators import Magnitude
from fxmerge.passes import ScoreImportancePass
from fxmerge.passes.enumerate_segments import enumerate_segments


class Counting:
    """The number of convolutions that go, and a record of what was asked."""

    name = "counting"

    def __init__(self, answer=None):
        self.answer = answer
        self.prepared, self.asked = [], []

    def prepare(self, gm, candidates):
        self.prepared.append((gm, candidates))

        def score(candidate):
            self.asked.append(candidate)
            return len(candidate.bypassed) if self.answer is None else self.answer

        return score


def test_every_distinct_candidate_is_scored_once():
    gm, _ = small("residual")
    enumeration = enumerate_segments(gm)
    doubled = type(enumeration)(enumeration.series, enumeration.sites * 2, ())
    estimator = Counting()
    result = ScoreImportancePass(doubled, estimator)(gm)
    distinct = list(dict.fromkeys(site.candidate for site in enumeration.sites))
    assert sorted(map(str, estimator.asked)) == sorted(map(str, distinct))
    entries = [candidate.entry for candidate in estimator.asked]
    assert len(list(itertools.groupby(entries))) == len(set(entries)) > 1  # one start after the other
    assert estimator.prepared == [(gm, estimator.asked)]
    assert result.losses == {candidate: len(candidate.bypassed) for candidate in estimator.asked}
    assert not result.modified
    assert result.graph_module is gm


def test_losses_are_the_estimators():
    gm, _ = small("inverted")
    enumeration = enumerate_segments(gm)
    score = Magnitude().prepare(gm, ())
    found = ScoreImportancePass(enumeration, Magnitude())(gm).losses
    assert found == {site.candidate: score(site.candidate) for site in enumeration.sites}


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_estimator_and_candidate(answer):
    gm, _ = small("chain")
    with pytest.raises(UserError, match=rf"estimator 'counting' gave the loss {answer} to the candidate: merge 0\.0"):
        ScoreImportancePass(enumerate_segments(gm), Counting(answer))(gm)


def test_a_negative_loss_is_one():
    gm, _ = small("chain")
    assert set(ScoreImportancePass(enumerate_segments(gm), Counting(-1))(gm).losses.values()) == {-1.0}
