"""The importance table on disk: it keeps what was scored, spares it, and is not taken for another's."""

from __future__ import annotations

import copy
import functools
import operator
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from scoring import Counting, candidates, cross_entropy, digits, enumeration, graph

import fxmerge
from fxmerge.calibration import read_calibration
from fxmerge.candidates import Candidate
from fxmerge.errors import StoreError, UserError
from fxmerge.estimators import Distortion, Magnitude
from fxmerge.importance import ImportanceTable, identity_of, open_table
from fxmerge.passes.score_importance import score_importance
from fxmerge.performance import Finetune, Score

A = Candidate("bypass", "a", "b", bypassed=("b",))
B = Candidate("merge", "a", "c", kept=("b", "c"), removed=("r",))


def test_losses_come_back_to_the_last_digit(tmp_path):
    path = tmp_path / "made" / "on demand" / "table.sqlite"
    with ImportanceTable(path, {"model": "m"}) as table:
        table.put(A, 0.1 + 0.2)
        table.put(B, 1.0)
        table.put(B, -2.0)
    with ImportanceTable(path) as table:
        assert table.get([B, A]) == {B: -2.0, A: 0.1 + 0.2}
        assert table.get([A]) == {A: 0.1 + 0.2}
        assert dict(table.entries()) == {A: 0.1 + 0.2, B: -2.0}
        assert len(table) == 2
        assert table.identity == {"model": "m"}
        assert repr(table) == f"ImportanceTable({str(path)!r})"


def test_a_merge_adds_what_is_missing_and_keeps_its_own(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with ImportanceTable(one, {"model": "m"}) as table:
        table.put(A, 1.0)
    with ImportanceTable(two, {"model": "m"}) as table:
        table.put(A, 7.0)
        table.put(B, 2.0)
    with ImportanceTable(one) as table:
        assert table.merge(two) == 1
        assert dict(table.entries()) == {A: 1.0, B: 2.0}
        assert table.merge(two) == 0
    with ImportanceTable(tmp_path / "other", {"model": "n"}) as table:
        with pytest.raises(
            StoreError, match=r"two was made for something else; what differs: model \(m in the file, n now\)"
        ):
            table.merge(two)
        with pytest.raises(StoreError, match="there is no importance table at"):
            table.merge(tmp_path / "gone")
        assert len(table) == 0
    assert not (tmp_path / "gone").exists()


def test_files_of_another_kind_are_refused_and_left_alone(tmp_path):
    text, latencies = tmp_path / "text", tmp_path / "latencies"
    text.write_text("no table" * 50)
    fxmerge.driver.LatencyStore(latencies).close()
    for path in (text, latencies):
        before = path.read_bytes()
        with pytest.raises(
            StoreError, match=r"is not an importance table of fxmerge; .* name another file as importance_table"
        ):
            ImportanceTable(path, {})
        assert path.read_bytes() == before
    with pytest.raises(StoreError, match="there is no importance table at"):
        ImportanceTable(tmp_path / "gone")


# --- what a table is for ----------------------------------------------------------------------------------------------


def calibration(seed=1):
    gm = graph()
    batches = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).split(2)
    return read_calibration(batches, None, gm, ((batches[0],), {}))


def finetune(**options):
    return Finetune(digits()[:4], cross_entropy, inputs=operator.itemgetter(0), **options)


def changed(gm):
    with torch.no_grad():
        gm.get_parameter("4.weight")[0, 0, 0, 0] += 1e-6
    return gm


def shifted(gm):
    gm.get_buffer("5.running_mean")[0] += 1e-6
    return gm


def halved(outputs, batch):
    return cross_entropy(outputs, batch) / 2


@pytest.mark.parametrize(
    ("made", "asked", "difference"),
    [
        (lambda: (graph(), Magnitude()), lambda: (changed(graph()), Magnitude()), ["weights"]),
        (lambda: (graph(), Magnitude()), lambda: (shifted(graph()), Magnitude()), ["weights"]),
        (
            lambda: (graph(), Distortion(calibration())),
            lambda: (graph(), Distortion(calibration(2))),
            ["estimator.calibration"],
        ),
        (
            lambda: (graph(), Distortion(calibration(), fit="compose")),
            lambda: (graph(), Distortion(calibration(), fit="refit")),
            ["estimator.fit ('compose' in the file, 'refit' now)"],
        ),
        (lambda: (graph(), Magnitude()), lambda: (graph(), Counting()), ["estimator (fxmerge.estimators.Magnitude "]),
        (
            lambda: (graph(), finetune(lr=0.01)),
            lambda: (graph(), finetune(lr=0.02)),
            ["estimator.lr (0.01 in the file, 0.02 now)"],
        ),
        (
            lambda: (graph(), finetune()),
            lambda: (graph(), finetune().installing(calibration(), "refit", 1)),
            ["estimator.calibration", "estimator.fit (none in the file, 'refit' now)"],
        ),
        (
            lambda: (graph(), finetune()),
            lambda: (graph(), Finetune(digits()[:4], halved, inputs=operator.itemgetter(0))),
            ["estimator.loss"],
        ),
        (
            lambda: (graph(), finetune()),
            lambda: (graph(), Finetune(digits()[1:5], cross_entropy, inputs=operator.itemgetter(0))),
            ["estimator.batches"],
        ),
    ],
    ids=["weight", "buffer", "data", "fit", "estimator", "option", "installed", "function", "batches"],
)
def test_a_table_for_something_else_is_refused_by_what_differs(tmp_path, made, asked, difference):
    path = tmp_path / "table"
    open_table(path, *made()).close()
    open_table(path, *made()).close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="was made for something else; what differs: ") as caught:
        open_table(path, *asked())
    text = str(caught.value)
    for each in difference:
        assert f"{each}" in text
    assert text.count(" in the file, ") == len(difference)
    assert text.endswith("It was left untouched: name another file as importance_table, or remove it.")
    assert path.read_bytes() == before


def test_memory_and_private_attributes_are_not_what_a_table_is_for():
    gm = graph()
    assert identity_of(gm, Distortion(calibration(), "1GiB")) == identity_of(gm, Distortion(calibration(), "2GiB"))
    assert identity_of(gm, Counting()) == identity_of(gm, Counting("raise"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1, lambda x: x + 2),
        (functools.partial(pow, 2), functools.partial(pow, 3)),
        (operator.itemgetter(0), operator.itemgetter(1)),
        ([1, [2]], [[1], 2]),
        ({"a": 1}, {"a": 1.0}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.optim.SGD, torch.optim.Adam),
        ({1, 2}, {1, 3}),
    ],
    ids=["lambda", "partial", "itemgetter", "nesting", "type", "shape", "dtype", "class", "set"],
)
def test_attributes_of_every_kind_are_told_apart(one, other):
    gm = graph()

    def identity(value):
        estimator = Counting()
        estimator.option = value
        return identity_of(gm, estimator)["estimator.option"]

    assert identity(one) == identity(copy.deepcopy(one))
    assert identity(one) != identity(other)


def test_an_attribute_without_content_is_refused():
    estimator = Counting()
    estimator.lock = threading.Lock()
    with pytest.raises(UserError, match=r"attribute 'lock' of the estimator 'counting' has no content to know it by"):
        identity_of(graph(), estimator)


# --- runs that stop ---------------------------------------------------------------------------------------------------


def lines(path):
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_failed_is_taken_up_where_it_stopped(tmp_path):
    table, log = tmp_path / "table", tmp_path / "log"
    with pytest.raises(
        UserError, match=r"the estimator 'counting' failed on the candidate: .* ZeroDivisionError: an accident"
    ):
        score_importance(graph(), enumeration(), Counting("raise", at=3, log=log), table=table)
    assert lines(log) == [0, 1, 2]
    losses = score_importance(graph(), enumeration(), Counting(log=tmp_path / "rest"), table=table)
    assert len(lines(tmp_path / "rest")) == len(candidates()) - 3
    assert list(losses.items()) == list(score_importance(graph(), enumeration(), Counting()).items())
    assert score_importance(graph(), enumeration(), Counting("raise"), table=table) == losses


def test_a_killed_process_loses_the_entry_that_it_was_in_and_no_other(tmp_path):
    table, log = tmp_path / "table", tmp_path / "log"
    code = (
        "from scoring import Counting, enumeration, graph\n"
        "from fxmerge.passes.score_importance import score_importance\n"
        f"score_importance(graph(), enumeration(), Counting('kill', at=5, log={str(log)!r}), table={str(table)!r})\n"
    )
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=120)  # noqa: S603
    assert done.returncode == -9
    assert lines(log) == [0, 1, 2, 3, 4]
    with ImportanceTable(table) as known:
        assert len(known) == 5
    losses = score_importance(graph(), enumeration(), Counting(log=log), table=table)
    assert len(lines(log)) == len(candidates())
    assert losses == score_importance(graph(), enumeration(), Counting())


def test_a_loss_that_is_no_number_is_not_kept(tmp_path):
    table = tmp_path / "table"
    with pytest.raises(
        UserError, match=r"the performance of a candidate's network is nan.* \(while scoring the candidate: "
    ):
        score_importance(graph(), enumeration(), Score(Falling()), table=table)
    with ImportanceTable(table) as known:
        assert list(known.entries()) == [(candidates()[0], 0.0)]


class Falling:
    """One for the original, no number for the second candidate."""

    def __init__(self):
        self._calls = 0

    def __call__(self, _):
        self._calls += 1
        return float("nan") if self._calls == 3 else 1.0
