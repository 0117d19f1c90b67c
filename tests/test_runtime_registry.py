"""Runtimes by name: fxmerge's own, those of other packages, options, and what "auto" stands for."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fxmerge.errors import MissingPackageError, UserError
from fxmerge.runtimes import Runtime, _registry, get_runtime, prove, runtime_names
from fxmerge.runtimes.macs import Macs
from fxmerge.runtimes.onnxruntime import OnnxRuntime
from fxmerge.runtimes.torch import TorchRuntime

OWN = ["tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime", "torch", "macs"]


class Theirs(Macs):
    """What another package could bring."""

    name = "theirs"

    def __init__(self, *, fast: bool = False, level: int = 1, precision: str = "fp32") -> None:
        self.fast, self.level, self.precision = fast, level, precision


def no_runtime():
    return "a string"


@pytest.fixture(autouse=True)
def not_cached():
    _registry._first_working.cache_clear()
    yield
    _registry._first_working.cache_clear()


def installed(monkeypatch, *points):
    """Let these (name, value) pairs be all the entry points of the group."""
    entries = [EntryPoint(name, value, "fxmerge.runtimes") for name, value in points]
    monkeypatch.setattr(_registry, "entry_points", lambda group: entries if group == "fxmerge.runtimes" else [])


def test_own_runtimes_need_no_package_metadata(monkeypatch):
    installed(monkeypatch)
    assert runtime_names() == OWN
    assert isinstance(get_runtime("macs"), Macs)
    assert isinstance(get_runtime("torch"), TorchRuntime)


def test_pyproject_lists_the_same():
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines()
    start = lines.index('[project.entry-points."fxmerge.runtimes"]') + 1
    rows = [line.partition(" = ") for line in lines[start : lines.index("", start)]]
    assert {name: value.strip('"') for name, _, value in rows} == _registry._OWN


def test_every_own_runtime_can_be_loaded():
    assert all(callable(_registry._own(name).load()) for name in OWN)


def test_other_packages_add_theirs(monkeypatch):
    installed(monkeypatch, ("theirs", f"{__name__}:Theirs"))
    assert runtime_names() == [*OWN, "theirs"]
    assert isinstance(get_runtime("theirs"), Theirs)
    installed(monkeypatch)
    with pytest.raises(UserError, match="unknown runtime 'theirs'"):
        get_runtime("theirs")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no_such_package:Theirs", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{__name__}:Missing", "AttributeError"),
    ],
)
def test_a_broken_entry_point_breaks_itself_alone(monkeypatch, value, problem):
    installed(monkeypatch, ("broken", value), ("theirs", f"{__name__}:Theirs"))
    assert runtime_names() == [*OWN, "broken", "theirs"]
    assert isinstance(get_runtime("theirs"), Theirs)
    assert isinstance(get_runtime("macs"), Macs)
    with pytest.raises(UserError, match=f"runtime 'broken' cannot be loaded from {value}: {problem}"):
        get_runtime("broken")


def test_what_is_no_runtime_is_refused(monkeypatch):
    installed(monkeypatch, ("theirs", f"{__name__}:no_runtime"))
    with pytest.raises(UserError, match=r"runtime 'theirs': .*:no_runtime returned 'a string', which is no Runtime"):
        get_runtime("theirs")


def test_nobody_takes_the_name_of_an_own_runtime(monkeypatch, caplog):
    installed(monkeypatch, ("macs", f"{__name__}:Theirs"))
    assert type(get_runtime("macs")) is Macs
    assert (
        f"two runtimes are called 'macs': fxmerge.runtimes.macs:Macs is used, {__name__}:Theirs is not" in caplog.text
    )
    caplog.clear()
    installed(monkeypatch, ("macs", "fxmerge.runtimes.macs:Macs"))
    assert type(get_runtime("macs")) is Macs
    assert caplog.text == ""


def test_unknown_names_list_the_known():
    known = ", ".join(repr(name) for name in ("auto", *OWN))
    for spec in ("nope", "", 3, None, "nope:threads=1"):
        with pytest.raises(
            UserError, match=f"unknown runtime {spec!r}; expected one of {known}.*, or a Runtime object"
        ):
            get_runtime(spec)


def test_options(monkeypatch):
    installed(monkeypatch, ("theirs", f"{__name__}:Theirs"))

    def made(spec):
        runtime = get_runtime(spec)
        return runtime.fast, runtime.level, runtime.precision

    assert made("theirs") == (False, 1, "fp32")
    assert made("theirs:fast") == (True, 1, "fp32")
    assert made("theirs:level=3,bf16") == (False, 3, "bf16")
    assert made("theirs:precision=fp16,fast") == (True, 1, "fp16")
    assert get_runtime("onnxruntime:threads=3").threads == 3


@pytest.mark.parametrize("option", ["slow", "slow=1", "level", "fast=1", "", "int8", "fast,"])
def test_unknown_options_list_the_known(monkeypatch, option):
    installed(monkeypatch, ("theirs", f"{__name__}:Theirs"))
    with pytest.raises(
        UserError,
        match=r"runtime 'theirs' has no option '.*'; expected one of fast, level=..., precision=..., fp32, fp16, bf16.$",
    ):
        get_runtime(f"theirs:{option}")
    with pytest.raises(UserError, match="runtime 'macs' has no option 'fp16'; it takes none"):
        get_runtime("macs:fp16")


# --- auto -------------------------------------------------------------------------------------------------------------


class Fake(Macs):
    """One of the runtimes that "auto" tries; a latency of None stands for one that fails."""

    def __init__(self, name: str, latency: float | None) -> None:
        self.name, self.latency = name, latency

    def measure(self, signatures, on_result):
        if self.latency is None:
            raise RuntimeError(f"{self.name} has no device")
        for signature in signatures:
            on_result(signature, self.latency)


def machine(monkeypatch, **latencies):
    """Let the runtimes measure these latencies, and return the list of those that were made."""
    made = []

    def create(entry):
        made.append(entry.name)
        return Fake(entry.name, latencies[entry.name.replace("-", "_")])

    monkeypatch.setattr(_registry, "_create", create)
    return made


@pytest.mark.parametrize(
    ("latencies", "name"),
    [
        ({"tensorrt": 1.0, "onnxruntime_cuda": 1.0, "onnxruntime": 1.0}, "tensorrt"),
        ({"tensorrt": None, "onnxruntime_cuda": 1.0, "onnxruntime": 1.0}, "onnxruntime-cuda"),
        ({"tensorrt": None, "onnxruntime_cuda": None, "onnxruntime": 1.0}, "onnxruntime"),
        ({"tensorrt": float("nan"), "onnxruntime_cuda": 0.0, "onnxruntime": 1.0}, "onnxruntime-cuda"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_takes_the_first_that_works(monkeypatch, caplog, latencies, name):
    caplog.set_level(logging.INFO, "fxmerge")
    machine(monkeypatch, **latencies)
    assert get_runtime("auto").name == name
    failed = [
        each for each in ("tensorrt", "onnxruntime-cuda") if f"runtime {each!r} does not work here" in caplog.text
    ]
    assert failed == ["tensorrt", "onnxruntime-cuda"][: ["tensorrt", "onnxruntime-cuda", "onnxruntime"].index(name)]
    assert f"runtime {name!r} works and is used" in caplog.text
    if latencies["tensorrt"] is None:
        assert "tensorrt has no device" in caplog.text


def test_auto_looks_once(monkeypatch):
    made = machine(monkeypatch, tensorrt=None, onnxruntime_cuda=None, onnxruntime=1.0)
    get_runtime("auto")
    assert made == ["tensorrt", "onnxruntime-cuda", "onnxruntime", "onnxruntime"]
    get_runtime("auto")
    assert made[4:] == ["onnxruntime"]


def test_auto_without_any_says_why_the_last_does_not_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"the onnxruntime runtime .* pip install 'fxmerge\[cpu\]'"):
        get_runtime("auto")


def test_auto_on_this_machine_runs():
    runtime = get_runtime("auto")
    assert isinstance(runtime, Runtime)
    assert runtime.unit == "ms"
    prove(runtime)


def test_auto_takes_no_options():
    with pytest.raises(UserError, match="unknown runtime 'auto:threads=1'"):
        get_runtime("auto:threads=1")


def test_proof():
    prove(OnnxRuntime(threads=1))
    for latency in (float("nan"), -1.0):
        with pytest.raises(UserError, match=r"runtime 'fake' returned \[.*\] for one small layer"):
            prove(Fake("fake", latency))
    silent = Fake("fake", 1.0)
    silent.measure = lambda *_: None
    with pytest.raises(UserError, match=r"runtime 'fake' returned \[\]"):
        prove(silent)
