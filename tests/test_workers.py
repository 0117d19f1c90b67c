"""Executors: the losses are those of a serial run whatever scores them, and errors and deaths are named."""

from __future__ import annotations

import logging
import multiprocessing
import operator
import pickle
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from scoring import Counting, candidates, cross_entropy, digits, enumeration, graph
from torch import nn
from untouched import Untouched

import fxmerge
from fxmerge import workers
from fxmerge.calibration import read_calibration
from fxmerge.errors import InternalError, StoreError, UnsupportedError, UserError
from fxmerge.estimators import Distortion
from fxmerge.importance import ImportanceTable, open_table
from fxmerge.passes.score_importance import score_importance
from fxmerge.performance import Finetune, Score


@pytest.fixture(scope="module")
def pool():
    """Two processes that begin as on every system."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


class Inline(Executor):
    """Scores as it is asked to, in this process, from what a worker would be sent."""

    def __init__(self):
        self.tasks = []

    def submit(self, fn, /, *args, **kwargs):
        self.tasks.append(pickle.dumps((fn, args, kwargs)))
        future = Future()
        function, args, kwargs = pickle.loads(self.tasks[-1])  # noqa: S301 - what was written a line above
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def finetune(**options):
    return Finetune(digits()[:4], cross_entropy, inputs=operator.itemgetter(0), **options)


def distortion(fit="compose"):
    gm, images = graph(), [batch[0] for batch in digits()[:5]]
    return Distortion(read_calibration(images, None, gm, ((images[0],), {})), fit=fit)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "make", [finetune, distortion, lambda: distortion("refit")], ids=["finetune", "distortion", "refit"]
)
def test_threads_and_processes_give_the_serial_losses_in_its_order(pool, make):
    serial = score_importance(graph(), enumeration(), make())
    assert list(serial) == candidates()
    assert len(set(serial.values())) > 4
    with ThreadPoolExecutor(3) as threads:
        for executor in (threads, pool, Inline()):
            found = score_importance(graph(), enumeration(), make(), executor)
            assert list(found.items()) == list(serial.items()), executor


def test_a_table_that_was_half_full_ends_as_one_that_was_empty(tmp_path):
    losses = score_importance(graph(), enumeration(), distortion("refit"))
    with open_table(tmp_path / "table", graph(), distortion("refit")) as table:
        for candidate in candidates()[::2]:
            table.put(candidate, losses[candidate])
        assert score_importance(graph(), enumeration(), distortion("refit"), table=table) == losses
        assert dict(table.entries()) == losses


class Together(Counting):
    by_start = True


def test_candidates_that_belong_together_are_one_task():
    executor = Inline()
    found = score_importance(graph(), enumeration(), Together(), executor)
    assert found == score_importance(graph(), enumeration(), Counting())
    assert len(executor.tasks) == len({candidate.entry for candidate in candidates()}) < len(candidates())
    starts = [candidate.entry for candidate in candidates()]
    number = next(n for n in range(1, len(starts)) if starts[n] == starts[n - 1])
    with pytest.raises(UserError, match="failed on the candidate: ") as caught:
        score_importance(graph(), enumeration(), Together("raise", at=number), executor)
    assert f"failed on the candidate: {candidates()[number]}: ZeroDivisionError" in str(caught.value)


def test_the_network_is_sent_once_and_a_task_is_small():
    executor, threads = Inline(), torch.get_num_threads()
    found = score_importance(graph(), enumeration(), Counting(), executor)
    assert len(executor.tasks) == len(found) == len(candidates())
    assert max(map(len, executor.tasks)) < 2000
    assert workers._prepared == {}
    assert torch.get_num_threads() == threads


class Modes:
    name = "modes"

    def prepare(self, gm, _):
        return lambda _: float(any(module.training for module in gm.modules()))


class Crowd:
    """How many threads have been scoring at the same time."""

    name = "crowd"

    def __init__(self, by_start):
        self.by_start = by_start
        self._inside = []
        self.most = 0

    def prepare(self, *_):
        return self._score

    def _score(self, candidate):
        self._inside.append(candidate)
        self.most = max(self.most, len(self._inside))
        time.sleep(0.01)
        self._inside.remove(candidate)
        return 0.0


@pytest.mark.parametrize(("by_start", "most"), [(True, 1), (False, 3)])
def test_threads_take_turns_where_candidates_belong_together(by_start, most):
    crowd = Crowd(by_start)
    with ThreadPoolExecutor(3) as threads:
        score_importance(graph(), enumeration(), crowd, threads)
    assert crowd.most == most


def test_networks_are_scored_in_eval_mode_and_left_in_their_own():
    gm = graph()
    gm.get_submodule("5").train()
    before = [module.training for module in gm.modules()]
    with ThreadPoolExecutor(2) as threads:
        for executor in (None, threads, Inline()):
            assert set(score_importance(gm, enumeration(), Modes(), executor).values()) == {0.0}
            assert [module.training for module in gm.modules()] == before
    assert sum(before) == 1


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["serial", "threads", "processes"])
def test_a_failure_names_the_candidate_and_keeps_what_was_done(pool, tmp_path, where):
    with (
        ThreadPoolExecutor(1) if where == "threads" else nullcontext(pool if where == "processes" else None) as executor
    ):
        with pytest.raises(UserError) as caught:
            score_importance(graph(), enumeration(), Counting("raise", at=2), executor, tmp_path / "table")
        expected = (
            f"the estimator 'counting' failed on the candidate: {candidates()[2]}: ZeroDivisionError: an accident"
        )
        assert str(caught.value) == expected
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with ImportanceTable(tmp_path / "table") as table:
            assert candidates()[2] not in dict(table.entries())
        losses = score_importance(graph(), enumeration(), Counting(), executor, tmp_path / "table")
    assert losses == score_importance(graph(), enumeration(), Counting())


class Raises:
    name = "raises"

    def __init__(self, error):
        self._error = error

    def prepare(self, *_):
        return self._fail

    def _fail(self, _):
        raise self._error


@pytest.mark.parametrize("executor", [None, Inline()], ids=["serial", "inline"])
def test_errors_of_fxmerge_keep_their_class(executor):
    with pytest.raises(InternalError) as caught:
        score_importance(graph(), enumeration(), Raises(InternalError("a defect")), executor)
    assert str(caught.value) in {f"a defect (while scoring the candidate: {each})" for each in candidates()}


def test_what_cannot_be_sent_is_refused_before_anything_is_done(pool):
    score = Score(lambda _: 0.0)
    with pytest.raises(
        UserError, match=r"the estimator 'score' cannot be sent to other processes \(.*lambda.*\): write its"
    ):
        score_importance(graph(), enumeration(), score, pool)
    with ThreadPoolExecutor(1) as threads:
        assert set(score_importance(graph(), enumeration(), score, threads).values()) == {0.0}
    with pytest.raises(UserError, match=r"executor is a int; expected a concurrent\.futures\.Executor"):
        score_importance(graph(), enumeration(), score, 4)


def test_a_network_that_cannot_be_saved_cannot_be_sent():
    gm = graph()
    gm.get_submodule("1").register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="It cannot be sent to other processes either: use a ThreadPoolExecutor"):
        score_importance(gm, enumeration(), Counting(), Inline())


# --- workers that die -------------------------------------------------------------------------------------------------


def test_a_killed_worker_changes_nothing(tmp_path, caplog):
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        caplog.at_level(logging.WARNING, "fxmerge"),
    ):
        killed = Counting("kill", at=4, flag=tmp_path / "flag", log=tmp_path / "log")
        found = score_importance(graph(), enumeration(), killed, pool, tmp_path / "table")
    assert (tmp_path / "flag").exists()
    assert found == score_importance(graph(), enumeration(), Counting())
    assert "a worker died; a new pool of processes scores" in caplog.text
    done = sorted(map(int, (tmp_path / "log").read_text().split()))
    assert sorted(set(done)) == list(range(len(candidates())))
    assert len(done) <= len(candidates()) + 1  # the pool may lose an answer that was on its way


class Mortal(ProcessPoolExecutor):
    """Breaks at every first task."""

    broken = 0

    def submit(self, *_, **__):
        Mortal.broken += 1
        raise BrokenExecutor("gone")


def test_workers_that_die_every_time_are_given_up(monkeypatch):
    monkeypatch.setattr(workers, "_another", lambda _: Mortal())
    with (
        Mortal() as pool,
        pytest.raises(UserError, match=r"workers died 3 times while \d+ candidates were left .* \(gone\)"),
    ):
        score_importance(graph(), enumeration(), Counting(), pool)
    assert Mortal.broken == 3


def test_a_new_pool_is_like_the_one_that_broke():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, context, print, ("begin",)) as pool, workers._another(pool) as another:
        assert another is not pool
        assert (another._max_workers, another._mp_context) == (3, context)
        assert (another._initializer, another._initargs) == (print, ("begin",))


# --- the whole pipeline -----------------------------------------------------------------------------------------------


def test_frontier_scores_on_an_executor_and_keeps_a_table(tmp_path):
    model, example = nn.Sequential(*graph_modules()), digits()[0][0]
    options = {"runtime": "macs", "importance": finetune(steps=1), "importance_table": tmp_path / "table"}
    executor = Inline()
    first = fxmerge.frontier(model, example, executor=executor, **options)
    scored = len(executor.tasks)
    assert scored > 0
    again = fxmerge.frontier(model, example, executor=executor, **options)
    assert len(executor.tasks) == scored
    assert (
        again.points
        == first.points
        == fxmerge.frontier(model, example, runtime="macs", importance=finetune(steps=1)).points
    )
    with ImportanceTable(tmp_path / "table") as table:
        assert len(table) == scored


def graph_modules():
    torch.manual_seed(1)
    return [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    ]


def test_what_cannot_work_is_refused_before_anything_is_measured(tmp_path, pool):
    model, example = nn.Sequential(*graph_modules()), digits()[0][0]
    made = {"runtime": "macs", "importance_table": tmp_path / "table"}
    fxmerge.frontier(model, example, importance=finetune(steps=1), **made)
    asked = {"runtime": Untouched(), "store": None}
    with pytest.raises(StoreError, match=r"what differs: estimator\.steps \(1 in the file, 2 now\)"):
        fxmerge.frontier(model, example, importance=finetune(steps=2), importance_table=tmp_path / "table", **asked)
    with pytest.raises(StoreError, match=r"the importance table .* cannot be used: .*name another file"):
        fxmerge.frontier(model, example, importance="magnitude", importance_table=tmp_path, **asked)
    with pytest.raises(UserError, match="cannot be sent to other processes"):
        fxmerge.frontier(model, example, importance=lambda _: 0.0, executor=pool, **asked)
    with pytest.raises(UserError, match="executor is a int"):
        fxmerge.frontier(model, example, executor=4, **asked)
