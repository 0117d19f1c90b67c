from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from fxmerge.algebra import Geometry
from fxmerge.errors import StoreError, UserError
from fxmerge.runtimes import LayerSignature
from fxmerge.runtimes.macs import Macs
from fxmerge.store import LatencyStore, default_path, measured

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
