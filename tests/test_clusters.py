"""Ray: two local workers give what a serial run gives, also where one of them is killed."""

from __future__ import annotations

import operator
import os
import sys
from pathlib import Path

import pytest
from scoring import Counting, candidates, cross_entropy, digits, enumeration, graph

from fxmerge.clusters import RayExecutor
from fxmerge.errors import MissingPackageError, UserError
from fxmerge.importance import ImportanceTable
from fxmerge.passes.score_importance import score_importance
from fxmerge.performance import Finetune, Score

HERE = Path(__file__).parent


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingPackageError, match=r"scoring on Ray needs the package ray .*: pip install 'fxmerge\[ray\]'"
    ):
        RayExecutor()


@pytest.mark.parametrize("option", ["num_cpus", "num_gpus", "max_retries"])
def test_negative_numbers_are_refused(option):
    with pytest.raises(UserError, match=f"{option} must not be negative, as -1 is"):
        RayExecutor(**{option: -1})


@pytest.fixture(scope="module")
def cluster():
    """Two local workers that can import the tests."""
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    ray.init(
        num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    )
    yield ray
    ray.shutdown()


pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.mark.usefixtures("cluster", "one_thread")
def test_two_workers_give_the_serial_table(tmp_path):
    def finetune():
        return Finetune(digits()[:4], cross_entropy, inputs=operator.itemgetter(0))

    with RayExecutor() as executor:
        found = score_importance(graph(), enumeration(), finetune(), executor, tmp_path / "table")
    serial = score_importance(graph(), enumeration(), finetune())
    assert list(found) == list(serial)
    assert list(found.values()) == pytest.approx(list(serial.values()), rel=1e-6, abs=0)
    with ImportanceTable(tmp_path / "table") as table:
        assert dict(table.entries()) == found


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_changes_nothing(tmp_path):
    killed = Counting("kill", at=4, flag=tmp_path / "flag", log=tmp_path / "log")
    with RayExecutor() as executor:
        found = score_importance(graph(), enumeration(), killed, executor)
    assert (tmp_path / "flag").exists()
    assert found == score_importance(graph(), enumeration(), Counting())
    assert set(map(int, (tmp_path / "log").read_text().split())) == set(range(len(candidates())))


@pytest.mark.usefixtures("cluster")
def test_a_failure_names_the_candidate():
    with RayExecutor() as executor, pytest.raises(UserError) as caught:
        score_importance(graph(), enumeration(), Counting("raise", at=2), executor)
    expected = f"the estimator 'counting' failed on the candidate: {candidates()[2]}: ZeroDivisionError: an accident"
    assert str(caught.value) == expected


@pytest.mark.usefixtures("cluster")
def test_functions_from_anywhere_can_be_sent():
    with RayExecutor() as executor:
        losses = score_importance(graph(), enumeration(), Score(lambda model: float(len(model.graph.nodes))), executor)
    assert losses == score_importance(graph(), enumeration(), Score(lambda model: float(len(model.graph.nodes))))
    assert max(losses.values()) > 0


def test_an_executor_that_was_shut_down_takes_no_task_and_leaves_the_cluster_to_who_began_it(cluster):
    executor = RayExecutor()
    assert executor.submit(pow, 2, 3).result() == 8
    executor.shutdown()
    with pytest.raises(RuntimeError, match="was shut down"):
        executor.submit(pow, 2, 3)
    assert cluster.is_initialized()
