from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest

from fxmerge.algebra import Geometry
from fxmerge.errors import StoreError, UserError
from fxmerge.runtimes import LayerSignature, OpSignature
from fxmerge.runtimes.macs import Macs
from fxmerge.store import Environment, LatencyStore, default_path, measured

HERE = {"device": "here", "threads": "1"}
THERE = {"device": "there", "threads": "1"}


def layer(number):
    return LayerSignature(Geometry(3, number, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (9, 7), 2)


class FakeRuntime:
    """Latency = output channels; fails at the ``fail_at``-th layer."""

    name = "fake"
    unit = "ms"
    deterministic = False

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    def environment(self):
        return HERE

    def measure(self, signatures, on_result):
        for signature in signatures:
            if len(self.calls) == self.fail_at:
                raise RuntimeError("power cut")
            self.calls.append(signature)
            on_result(signature, float(signature.geometry.out_channels))

    def build(self, module, args, kwargs):
        raise NotImplementedError


def run_python(code, path, *, wait=True):
    prelude = (
        "import sys\nfrom pathlib import Path\nfrom fxmerge.algebra import Geometry\n"
        "from fxmerge.runtimes import LayerSignature\nfrom fxmerge.store import LatencyStore\n"
        "def layer(n): return LayerSignature(Geometry(3, n, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (9, 7), 2)\n"
        f"HERE = {HERE!r}\npath = Path({str(path)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", prelude + code], stdout=subprocess.PIPE, text=True)  # noqa: S603
    if wait:
        assert process.communicate(timeout=50)[0] is not None
        assert process.returncode == 0
    return process


def test_round_trip(tmp_path):
    path = tmp_path / "made" / "on demand" / "latency.sqlite"
    with LatencyStore(path) as store:
        store.put(HERE, layer(1), 0.1 + 0.2, "ms")
        store.put(HERE, layer(2), 2.0, "ms")
        store.put(THERE, layer(1), 7.0, "ms")
        store.put(HERE, layer(2), 3.0, "ms")
    with LatencyStore(path) as store:
        assert store.get(HERE, [layer(1), layer(2), layer(3)]) == {layer(1): 0.1 + 0.2, layer(2): 3.0}
        assert store.get(dict(reversed(THERE.items())), [layer(1), layer(2)]) == {layer(1): 7.0}
        assert store.get({**HERE, "threads": "2"}, [layer(1)]) == {}
        entries = list(store.entries())
    assert [(entry.environment, entry.signature, entry.latency, entry.unit) for entry in entries] == [
        (HERE, layer(1), 0.1 + 0.2, "ms"),
        (HERE, layer(2), 3.0, "ms"),
        (THERE, layer(1), 7.0, "ms"),
    ]
    assert entries[0].measured_at.startswith("20")


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FXMERGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_path() == tmp_path / "home" / ".cache" / "fxmerge" / "latency.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path() == tmp_path / "xdg" / "fxmerge" / "latency.sqlite"
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path / "own"))
    assert default_path() == tmp_path / "own" / "latency.sqlite"
    with LatencyStore() as store:
        assert repr(store) == f"LatencyStore({str(default_path())!r})"
    assert default_path().exists()


def foreign_database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE latency (environment, signature, latency)")
    connection.close()


def newer_store(path):
    LatencyStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def damaged_store(path):
    with LatencyStore(path) as store:
        for number in range(1, 100):
            store.put(HERE, layer(number), 1.0, "ms")
    data = bytearray(path.read_bytes())
    data[4096:6000] = b"\xff" * (6000 - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"not a database, but long enough to be one" * 50), "not a latency store"),
        (lambda path: path.write_bytes(b"short"), "not a latency store"),
        (foreign_database, "not a latency store"),
        (newer_store, r"newer fxmerge \(format 2, this one reads 1\)"),
        (damaged_store, "cannot be used"),
    ],
)
def test_file_that_is_no_sound_store_is_refused_and_left_alone(tmp_path, make, message):
    path = tmp_path / "latency.sqlite"
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=message) as caught:
        LatencyStore(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "latency.sqlite"):
        with pytest.raises(StoreError, match="cannot be used") as caught:
            LatencyStore(path)
        assert str(path) in str(caught.value)


def test_read_only_file_is_refused(tmp_path):
    path = tmp_path / "latency.sqlite"
    LatencyStore(path).close()
    path.chmod(0o444)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write everything")
    with pytest.raises(StoreError, match="readonly"):
        LatencyStore(path)


def test_empty_file_becomes_a_store(tmp_path):
    path = tmp_path / "latency.sqlite"
    path.write_bytes(b"")
    with LatencyStore(path) as store:
        store.put(HERE, layer(1), 1.0, "ms")
        assert store.get(HERE, [layer(1)]) == {layer(1): 1.0}


def test_killed_process_loses_nothing_it_had_stored(tmp_path):
    path = tmp_path / "latency.sqlite"
    code = (
        "store = LatencyStore(path)\n"
        "for number in range(1, 10**6):\n"
        "    store.put(HERE, layer(number), float(number), 'ms')\n"
        "    print(number, flush=True)\n"
    )
    process = run_python(code, path, wait=False)
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    reported = [int(line) for line in process.communicate(timeout=50)[0].splitlines() if line]
    last = max(reported, default=20)
    with LatencyStore(path) as store:
        known = store.get(HERE, [layer(number) for number in range(1, last + 1)])
        assert known == {layer(number): float(number) for number in range(1, last + 1)}
        store.put(HERE, layer(1), 5.0, "ms")


def test_concurrent_processes_share_a_store(tmp_path):
    path = tmp_path / "latency.sqlite"
    code = (
        "with LatencyStore(path) as store:\n"
        "    for number in range({start}, {start} + 50):\n"
        "        store.put(HERE, layer(number), float(number), 'ms')\n"
    )
    processes = [run_python(code.format(start=start), path, wait=False) for start in (1, 51)]
    for process in processes:
        process.communicate(timeout=50)
    assert [process.returncode for process in processes] == [0, 0]
    with LatencyStore(path) as store:
        assert len(list(store.entries())) == 100


def test_second_run_measures_nothing(tmp_path):
    path = tmp_path / "latency.sqlite"
    first, second = FakeRuntime(), FakeRuntime()
    steps = []
    with LatencyStore(path) as store:
        found = measured(first, [layer(2), layer(1), layer(2)], store, lambda *step: steps.append(step))
    assert list(found.items()) == [(layer(2), 2.0), (layer(1), 1.0)]
    assert first.calls == [layer(2), layer(1)]
    assert steps == [(1, 2), (2, 2)]
    with LatencyStore(path) as store:
        assert measured(second, [layer(1), layer(2)], store) == {layer(1): 1.0, layer(2): 2.0}
        assert second.calls == []
        assert measured(second, [layer(1), layer(3)], store) == {layer(1): 1.0, layer(3): 3.0}
        assert second.calls == [layer(3)]


def test_failure_in_the_middle_keeps_what_was_measured(tmp_path):
    with LatencyStore(tmp_path / "latency.sqlite") as store:
        with pytest.raises(RuntimeError, match="power cut"):
            measured(FakeRuntime(fail_at=2), [layer(1), layer(2), layer(3)], store)
        again = FakeRuntime()
        measured(again, [layer(1), layer(2), layer(3)], store)
    assert again.calls == [layer(3)]


def test_deterministic_runtime_leaves_the_store_alone(tmp_path):
    with LatencyStore(tmp_path / "latency.sqlite") as store:
        assert measured(Macs(), [layer(1)], store) == {layer(1): 2 * 9 * 7 * 3 * 9.0}
        assert list(store.entries()) == []


def test_without_a_store_nothing_is_kept():
    runtime = FakeRuntime()
    assert measured(runtime, [layer(1)], None) == {layer(1): 1.0}
    assert measured(runtime, [layer(1)], None) == {layer(1): 1.0}
    assert runtime.calls == [layer(1), layer(1)]


@pytest.mark.parametrize("latency", [float("nan"), float("inf"), -1.0])
def test_impossible_latency_is_refused_and_not_stored(tmp_path, latency):
    runtime = FakeRuntime()
    runtime.measure = lambda signatures, on_result: on_result(signatures[0], latency)
    with LatencyStore(tmp_path / "latency.sqlite") as store:
        with pytest.raises(UserError, match="runtime 'fake' returned the latency"):
            measured(runtime, [layer(1)], store)
        assert list(store.entries()) == []


def test_layer_left_out_by_a_runtime_is_named():
    runtime = FakeRuntime()
    runtime.measure = lambda *_: None
    with pytest.raises(UserError, match="returned no latency for"):
        measured(runtime, [layer(1)], None)


def test_operations_are_stored_like_layers(tmp_path):
    pool = OpSignature("MaxPool2d(2)", ((3, 8, 8), (3, 4, 4)), 2, ("Conv2d",))
    with LatencyStore(tmp_path / "latency.sqlite") as store:
        store.put(HERE, pool, 0.5, "ms")
        assert store.get(HERE, [pool, layer(1)]) == {pool: 0.5}
        assert [entry.signature for entry in store.entries()] == [pool]


# --- looking after it -------------------------------------------------------------------------------------------------

CPU1 = {"device": "AMD EPYC 7B13", "runtime": "onnxruntime 1.32.0", "threads": "1"}
CPU2 = {"device": "AMD EPYC 7B13", "runtime": "onnxruntime 1.20.0", "threads": "1"}
GPU = {"device": "NVIDIA H200", "runtime": "onnxruntime-cuda 1.32.0"}
BARE = {"own": "a runtime that says nothing else"}
DATES = ("2020-01-01 00:00:00", "2024-05-06 07:08:09")


def fill(path, *environments, dates=DATES, latency=1.0):
    """A layer of each date in each environment: layer(1) has the first date."""
    with LatencyStore(path) as store:
        for environment in environments:
            for number, _ in enumerate(dates, 1):
                store.put(environment, layer(number), latency, "ms")
    connection = sqlite3.connect(path)
    for number, date in enumerate(dates, 1):
        connection.execute("UPDATE latency SET measured_at = ? WHERE signature = ?", (date, layer(number).key()))
    connection.commit()
    connection.close()
    return path


def left(path):
    """Environments and output channels of what a store holds."""
    with LatencyStore(path, readonly=True) as store:
        return {(each.environment["runtime"], each.signature.geometry.out_channels) for each in store.entries()}


def test_environments_are_counted_and_dated(tmp_path):
    path = fill(tmp_path / "latency.sqlite", GPU, CPU1)
    with LatencyStore(path) as store:
        store.put(CPU2, layer(7), 1.0, "ms")
        found = {each.values["runtime"]: each for each in store.environments()}
        assert len(found) == 3
        assert found[CPU1["runtime"]] == Environment(CPU1, 2, *DATES)
        assert found[GPU["runtime"]] == Environment(GPU, 2, *DATES)
        assert found[CPU2["runtime"]].entries == 1
        assert found[CPU2["runtime"]].oldest == found[CPU2["runtime"]].newest > DATES[1]
        identity = found[GPU["runtime"]].id
        assert [entry.environment for entry in store.entries(identity)] == [GPU, GPU]
        assert list(store.entries("00000000")) == []


def test_an_id_depends_on_the_environment_alone():
    one = Environment(CPU1, 1, *DATES)
    assert one.id == Environment(dict(reversed(CPU1.items())), 9, "", "").id
    assert len({Environment(values, 1, *DATES).id for values in (CPU1, CPU2, GPU, BARE)}) == 4


EVERYTHING = {(each["runtime"], number) for each in (CPU1, CPU2, GPU) for number in (1, 2)}


@pytest.mark.parametrize(
    ("criteria", "gone"),
    [
        (
            {"runtime": "onnxruntime"},
            {(CPU1["runtime"], 1), (CPU1["runtime"], 2), (CPU2["runtime"], 1), (CPU2["runtime"], 2)},
        ),
        ({"runtime": "onnxruntime 1.32.0"}, {(CPU1["runtime"], 1), (CPU1["runtime"], 2)}),
        ({"runtime": "onnx"}, set()),
        ({"device": "h200"}, {(GPU["runtime"], 1), (GPU["runtime"], 2)}),
        ({"device": "h100"}, set()),
        ({"environment": Environment(CPU2, 0, "", "").id}, {(CPU2["runtime"], 1), (CPU2["runtime"], 2)}),
        ({"device": "epyc", "runtime": "onnxruntime-cuda"}, set()),
        ({"everything": True}, EVERYTHING),
    ],
    ids=["runtime", "version", "part of a name", "device", "no device", "environment", "both", "everything"],
)
def test_prune_removes_what_fits_all_criteria(tmp_path, criteria, gone):
    path = fill(tmp_path / "latency.sqlite", CPU1, CPU2, GPU)
    with LatencyStore(path) as store:
        would = store.prune(**criteria, dry_run=True)
    assert left(path) == EVERYTHING
    with LatencyStore(path) as store:
        assert store.prune(**criteria) == would
    assert sum(each.entries for each in would) == len(gone)
    assert left(path) == EVERYTHING - gone


def test_prune_by_age_keeps_what_is_younger(tmp_path):
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    dates = [(now - timedelta(hours=hours)).isoformat(" ", "seconds") for hours in (25, 23)]
    path = fill(tmp_path / "latency.sqlite", CPU1, GPU, dates=dates)
    with LatencyStore(path) as store:
        assert store.prune(older_than=timedelta(hours=26)) == []
        assert store.prune(older_than=timedelta(days=1), device="amd") == [Environment(CPU1, 1, dates[0], dates[0])]
    assert left(path) == {(CPU1["runtime"], 2), (GPU["runtime"], 1), (GPU["runtime"], 2)}


def test_prune_gives_the_space_back(tmp_path):
    path = tmp_path / "latency.sqlite"
    with LatencyStore(path) as store:
        for number in range(1, 200):
            store.put(CPU1, layer(number), 1.0, "ms")
        store.put(GPU, layer(1), 1.0, "ms")
        before = path.stat().st_size
        store.prune(runtime="onnxruntime")
        store.put(GPU, layer(2), 2.0, "ms")
    assert path.stat().st_size < before / 4
    assert left(path) == {(GPU["runtime"], 1), (GPU["runtime"], 2)}


def test_prune_wants_a_criterion_and_a_known_environment(tmp_path):
    path = fill(tmp_path / "latency.sqlite", CPU1)
    with LatencyStore(path) as store:
        for criteria in ({}, {"dry_run": True}, {"everything": True, "runtime": "onnxruntime"}):
            with pytest.raises(UserError, match="prune needs a criterion"):
                store.prune(**criteria)
        with pytest.raises(UserError, match=r"latency.sqlite holds no environment '12345678'"):
            store.prune(environment="12345678")
        store.put(CPU1, layer(3), 1.0, "ms")
    assert len(left(path)) == 3


def test_environments_that_name_no_runtime_or_device_are_left(tmp_path):
    path = fill(tmp_path / "latency.sqlite", BARE)
    with LatencyStore(path) as store:
        assert store.prune(runtime="onnxruntime") == store.prune(device="amd") == []
        assert [each.entries for each in store.prune(older_than=timedelta(days=1))] == [2]


def test_merge_adds_what_is_missing_and_takes_the_newer(tmp_path):
    own = fill(tmp_path / "own.sqlite", CPU1, dates=("2024-01-01 00:00:00", "2024-01-01 00:00:00"), latency=1.0)
    other = fill(
        tmp_path / "other.sqlite", CPU1, GPU, dates=("2023-01-01 00:00:00", "2025-01-01 00:00:00"), latency=2.0
    )
    before = other.read_bytes()
    with LatencyStore(own) as store:
        assert store.merge(other) == (2, 1)
        assert store.get(CPU1, [layer(1), layer(2)]) == {layer(1): 1.0, layer(2): 2.0}
        assert store.get(GPU, [layer(1), layer(2)]) == {layer(1): 2.0, layer(2): 2.0}
        assert [each.newest for each in store.environments()] == ["2025-01-01 00:00:00", "2025-01-01 00:00:00"]
        assert store.merge(other) == store.merge(own) == (0, 0)
    assert other.read_bytes() == before


def test_merge_of_what_is_no_store_changes_nothing(tmp_path):
    own, foreign = fill(tmp_path / "own.sqlite", CPU1), tmp_path / "foreign.sqlite"
    foreign_database(foreign)
    before = foreign.read_bytes()
    with LatencyStore(own) as store:
        with pytest.raises(StoreError, match=r"foreign.sqlite is not a latency store"):
            store.merge(foreign)
        with pytest.raises(StoreError, match=r"there is no latency store at .*gone.sqlite"):
            store.merge(tmp_path / "gone.sqlite")
    assert len(left(own)) == 2
    assert foreign.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.sqlite", "own.sqlite"]


def test_a_store_that_is_only_read_is_neither_made_nor_changed(tmp_path):
    path = tmp_path / "folder" / "latency.sqlite"
    with pytest.raises(StoreError, match="there is no latency store at"):
        LatencyStore(path, readonly=True)
    assert not path.parent.exists()
    empty = tmp_path / "empty.sqlite"
    empty.write_bytes(b"")
    with pytest.raises(StoreError, match="the file is empty"):
        LatencyStore(empty, readonly=True)
    assert empty.read_bytes() == b""
    fill(path, CPU1)
    before = path.read_bytes()
    with LatencyStore(path, readonly=True) as store:
        assert store.get(CPU1, [layer(1)]) == {layer(1): 1.0}
        for change in (lambda: store.put(CPU1, layer(9), 1.0, "ms"), lambda: store.prune(everything=True)):
            with pytest.raises(StoreError, match="cannot be used: attempt to write a readonly database"):
                change()
    assert path.read_bytes() == before


def test_a_merge_that_is_killed_leaves_nothing_behind(tmp_path):
    own, other = fill(tmp_path / "own.sqlite", CPU1), fill(tmp_path / "other.sqlite", GPU)
    code = (
        "import os, signal\n"
        "store = LatencyStore(path)\n"
        "count, calls = store._count, []\n"
        "def die():\n"
        "    calls.append(count())\n"
        "    if len(calls) == 2: print(calls, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return calls[-1]\n"
        "store._count = die\n"
        f"store.merge(Path({str(other)!r}))\n"
    )
    process = run_python(code, own, wait=False)
    assert process.communicate(timeout=50)[0] == "[2, 4]\n"
    assert process.returncode == -signal.SIGKILL
    assert left(own) == {(CPU1["runtime"], 1), (CPU1["runtime"], 2)}


def test_one_process_prunes_and_merges_while_another_stores(tmp_path):
    path = tmp_path / "latency.sqlite"
    other = fill(tmp_path / "other.sqlite", GPU)
    with LatencyStore(path) as store:
        for number in range(1, 31):
            store.put(THERE, layer(number), 1.0, "ms")
    storing = (
        "with LatencyStore(path) as store:\n"
        "    for number in range(1, 61):\n"
        "        store.put(HERE, layer(number), float(number), 'ms')\n"
    )
    tending = (
        "with LatencyStore(path) as store:\n"
        "    for _ in range(10):\n"
        "        store.prune(device='there')\n"
        f"        store.merge(Path({str(other)!r}))\n"
        "        store.prune(device='h200')\n"
        f"    store.merge(Path({str(other)!r}))\n"
    )
    processes = [run_python(code, path, wait=False) for code in (storing, tending)]
    for process in processes:
        process.communicate(timeout=100)
    assert [process.returncode for process in processes] == [0, 0]
    with LatencyStore(path, readonly=True) as store:
        assert store.get(HERE, map(layer, range(1, 61))) == {layer(n): float(n) for n in range(1, 61)}
        assert store.get(THERE, map(layer, range(1, 31))) == {}
        assert store.get(GPU, map(layer, (1, 2))) == {layer(1): 1.0, layer(2): 1.0}
