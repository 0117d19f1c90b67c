"""What the doctor says of runtimes that work, are missing, compute something else, crash or hang."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import replace

import pytest
import torch

import fxmerge
from fxmerge import doctor
from fxmerge.algebra import Geometry
from fxmerge.checks import outputs_of
from fxmerge.cli import main
from fxmerge.doctor import Diagnosis, Proof, examine, prove_file, prove_runtime
from fxmerge.errors import MissingPackageError, UserError
from fxmerge.runtimes import LayerSignature, get_runtime
from fxmerge.runtimes.macs import Macs
from fxmerge.store import LatencyStore

MACS = 2 * (32 * 32 * 16 * 3 * 9 + 32 * 32 * 16 * 16 * 9 + 16 * 10)
"""Of the small network at batch 2."""


class Fake(Macs):
    """A runtime that counts, and hands out outputs that are ``off`` by a share of their largest."""

    def __init__(self, off=0.0, precision="float32", broken=""):
        self.off, self.precision, self.broken = off, precision, broken

    def environment(self):
        if self.broken == "environment":
            raise RuntimeError("no driver\nand more")
        return {"runtime": "fake 2.1", "precision": self.precision, "device": "Fake GPU"}

    def build(self, module, args, kwargs):
        if self.broken == "build":
            raise UserError("its library is there, and cannot be loaded")
        return super().build(module, args, kwargs)

    def run(self, module, args, kwargs):
        return [
            output + self.off * (output - output.mean(0)).abs().max() for output in outputs_of(module, (args, kwargs))
        ]


def proven(monkeypatch, fake):
    monkeypatch.setattr(doctor, "get_runtime", lambda _: fake)
    return prove_runtime("fake")


# --- one proof --------------------------------------------------------------------------------------------------------


def test_a_runtime_that_works(monkeypatch):
    proof = proven(monkeypatch, Fake())
    assert (proof.kind, proof.name, proof.state, proof.problem) == ("runtime", "fake", "works", None)
    assert (proof.latency, proof.unit, proof.error) == (MACS, "MACs", 0.0)
    assert proof.convolutions == (2, 1)
    assert 0 < proof.share < 0.5
    assert proof.seconds > 0


def test_the_proof_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    doctor._network()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(doctor._network()[1], doctor._network()[1])


@pytest.mark.parametrize(
    ("off", "precision", "state"),
    [
        (0.004, "float32", "works"),
        (0.006, "float32", "fails"),
        (0.04, "float16", "works"),
        (0.06, "bfloat16", "fails"),
        (float("nan"), "float32", "fails"),
    ],
)
def test_outputs_are_compared_with_those_of_pytorch(monkeypatch, off, precision, state):
    proof = proven(monkeypatch, Fake(off, precision))
    assert proof.state == state
    if state == "works":
        assert proof.error == pytest.approx(off, rel=1e-3)
    else:
        shown = "inf" if off != off else f"{off:.2g}"
        allowed = 0.005 if precision == "float32" else 0.05
        assert proof.problem == f"its outputs are off by {shown} of their spread, allowed is {allowed:g}"
        assert (proof.error, proof.share) == (None, None)


def test_too_few_outputs_fail(monkeypatch):
    fake = Fake()
    fake.run = lambda *_: []
    proof = proven(monkeypatch, fake)
    assert (proof.state, proof.error) == ("fails", None)
    assert proof.problem.startswith("ValueError: zip()")


def test_a_runtime_without_outputs_is_not_compared():
    proof = prove_runtime("macs")
    assert (proof.state, proof.error, proof.latency, proof.convolutions) == ("works", None, MACS, (2, 1))


def test_what_is_not_there_is_missing(monkeypatch):
    def absent(_):
        raise MissingPackageError("it needs a package: pip install it")

    monkeypatch.setattr(doctor, "get_runtime", absent)
    proof = prove_runtime("fake")
    assert (proof.state, proof.problem) == ("missing", "it needs a package: pip install it")
    assert proof.environment is None
    monkeypatch.undo()
    assert prove_runtime("tpu").state == "missing"
    assert prove_runtime("tpu").problem.startswith("unknown runtime 'tpu'; expected one of 'auto', ")


@pytest.mark.parametrize(
    ("broken", "problem", "environment"),
    [
        ("environment", "RuntimeError: no driver", None),
        (
            "build",
            "its library is there, and cannot be loaded",
            {"runtime": "fake 2.1", "precision": "float32", "device": "Fake GPU"},
        ),
    ],
)
def test_what_is_there_and_does_not_work_fails(monkeypatch, broken, problem, environment):
    proof = proven(monkeypatch, Fake(broken=broken))
    assert (proof.state, proof.problem, proof.environment) == ("fails", problem, environment)


def test_onnxruntime_works_and_computes_the_same():
    proof = prove_runtime("onnxruntime")
    assert (proof.state, proof.problem, proof.unit) == ("works", None, "ms")
    assert proof.environment == get_runtime("onnxruntime").environment()
    assert proof.latency > 0
    assert proof.share > 0
    assert proof.error < 1e-4


def test_files_are_written_and_checked(monkeypatch):
    assert [prove_file(name).state for name in (".onnx", ".pt2")] == ["works", "works"]
    unknown = prove_file(".tflite")
    assert unknown.state == "missing"
    assert "expected a path ending in .onnx" in unknown.problem
    seen = []

    def export(_, path, example, **options):
        seen.append((path.name, tuple(example.shape), options))
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(doctor, "export", export)
    assert prove_file(".engine tensorrt-rtx").problem == "RuntimeError: the disk is full"
    assert prove_file(".onnx").state == "fails"
    assert seen == [
        ("net.engine", (2, 3, 64, 64), {"runtime": "tensorrt-rtx"}),
        ("net.onnx", (2, 3, 64, 64), {"runtime": None}),
    ]


# --- in another process -----------------------------------------------------------------------------------------------

PLUGINS = """
import os, signal, sys, time
from fxmerge.runtimes.macs import Macs

class Crashing(Macs):
    def environment(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Leaving(Macs):
    def environment(self):
        print("the licence has expired", file=sys.stderr)
        os._exit(7)

class Hanging(Macs):
    def environment(self):
        time.sleep(600)

class Noisy(Macs):
    def environment(self):
        os.write(1, b"{not an answer")
        print("nor is this")
        return {"runtime": "noisy 1.0"}
"""


@pytest.fixture
def _plugins(tmp_path, monkeypatch):
    """Runtimes of another package, found through its entry points, here and in other processes."""
    about = tmp_path / "plugins-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    names = ("Crashing", "Leaving", "Hanging", "Noisy")
    entries = "\n".join(f"{name.lower()} = doctorplugins:{name}" for name in names)
    (about / "entry_points.txt").write_text(f"[fxmerge.runtimes]\n{entries}\n")
    (tmp_path / "doctorplugins.py").write_text(PLUGINS)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_plugins")
def test_a_runtime_that_crashes_or_prints_is_a_row_like_any_other(monkeypatch):
    monkeypatch.setattr(doctor, "runtime_names", lambda: ["crashing", "leaving", "noisy"])
    monkeypatch.setattr(doctor, "_FILES", (".pt2",))
    found = examine(seconds=200)
    assert (found.default.name, found.default.state) == ("onnxruntime", "works")
    assert [(proof.name, proof.state, proof.problem) for proof in found.proofs] == [
        ("crashing", "fails", "its process was ended by SIGKILL"),
        ("leaving", "fails", "its process ended with status 7: the licence has expired"),
        ("noisy", "works", None),
        (".pt2", "works", None),
    ]
    assert found.proofs[2].environment == {"runtime": "noisy 1.0"}
    assert not found.healthy


@pytest.mark.usefixtures("_plugins")
def test_a_runtime_that_hangs_is_ended():
    (proof,) = doctor._proofs([("runtime", "hanging")], seconds=0.5)
    assert (proof.kind, proof.name, proof.state) == ("runtime", "hanging", "fails")
    assert proof.problem == "no result within 0.5 seconds"
    assert 0.5 <= proof.seconds < 60


# --- what is printed --------------------------------------------------------------------------------------------------

SYSTEM = {
    "fxmerge": "1.2.3",
    "python": "3.11.9",
    "system": "Linux-6.1-x86_64",
    "packages": {"torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": None},
    "processor": "AMD EPYC",
    "cores": 4,
    "threads": 2,
    "gpus": [],
    "driver": None,
    "cuda": None,
    "store": {"path": "/cache/latency.sqlite", "latencies": 1234},
}
WORKS = Proof(
    "runtime",
    "onnxruntime",
    environment={"runtime": "onnxruntime 1.32.0", "device": "AMD EPYC"},
    latency=0.1234,
    unit="ms",
    error=3.2e-7,
    convolutions=(2, 1),
    share=0.486,
)
MISSING = Proof(
    "runtime", "tensorrt", "missing", problem="tensorrt needs a package that is not installed: " + "word " * 20
)
FILE = Proof("file", ".onnx")
DEFAULT = Proof("default", "onnxruntime")


def test_the_table():
    shown = str(Diagnosis(SYSTEM, DEFAULT, (MISSING, WORKS, FILE)))
    assert shown == textwrap.dedent(
        """\
        fxmerge    1.2.3, Python 3.11.9, Linux-6.1-x86_64
        packages   torch 2.13.0, onnx 1.23.2, onnxruntime missing
        processor  AMD EPYC, 4 cores; threads of PyTorch: 2
        GPU        none
        latencies  1,234 stored in /cache/latency.sqlite

                               state    version  on   off by  latency   compressed
        tensorrt               missing
            tensorrt needs a package that is not installed: word word word word word word word word word
            word word word word word word word word word word word
        onnxruntime (default)  works    1.32.0   CPU  3e-07   0.123 ms  2 -> 1 layers, 49%
        .onnx                  works"""
    )
    assert max(map(len, shown.splitlines())) <= 100


def test_a_gpu_and_a_damaged_store_are_shown():
    gpus = [{"name": "NVIDIA H200", "capability": "9.0"}]
    store = {"path": "/cache/latency.sqlite", "latencies": 0, "problem": "/cache/latency.sqlite is no store"}
    system = {**SYSTEM, "gpus": gpus, "driver": "570.1", "cuda": "13.0", "store": store}
    on_it = replace(WORKS, environment={"runtime": "onnxruntime 1.32.0", "device": "NVIDIA H200"})
    found = Diagnosis(system, DEFAULT, (on_it, FILE, WORKS))
    assert [found.on_gpu(proof) for proof in found.proofs] == [True, False, False]
    lines = str(found).splitlines()
    assert lines[3] == "GPU        NVIDIA H200 (compute capability 9.0); driver 570.1, torch for CUDA 13.0"
    assert lines[4] == "latencies  /cache/latency.sqlite is no store"
    assert "  GPU  " in lines[7]
    assert "  CPU  " in lines[9]
    blind = str(Diagnosis({**system, "driver": None, "cuda": None}, DEFAULT, ())).splitlines()
    assert blind[3].endswith("(compute capability 9.0); driver unknown, torch for CUDA - none")


def test_healthy_is_what_the_default_runtime_is():
    broken = replace(WORKS, state="fails", problem="out of memory")
    assert Diagnosis(SYSTEM, DEFAULT, (MISSING, WORKS)).healthy
    assert not Diagnosis(SYSTEM, DEFAULT, (MISSING, broken)).healthy
    assert not Diagnosis(SYSTEM, replace(DEFAULT, name="tensorrt"), (MISSING, WORKS)).healthy
    none = Proof("default", "auto", "missing", problem="nothing works here")
    found = Diagnosis(SYSTEM, none, (MISSING, WORKS))
    assert not found.healthy
    lines = str(found).splitlines()
    assert lines[7:9] == ["auto         missing", "    nothing works here"]
    assert "(default)" not in str(found)


def test_the_system():
    gpus, driver = doctor._gpus()
    system = doctor._system()
    assert system["fxmerge"] == fxmerge.__version__
    assert system["packages"]["torch"] == torch.__version__
    assert (system["gpus"], system["driver"]) == (gpus, driver)
    assert json.loads(json.dumps(system)) == system
    assert doctor._version("a-package-that-is-not-there") is None


def test_the_store_is_counted_and_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "latency.sqlite"
    assert doctor._store() == {"path": str(path), "latencies": 0}
    assert not path.parent.exists()
    with LatencyStore(path) as store:
        for kernel in (1, 3):
            geometry = Geometry(3, 4, (kernel, kernel), (1, 1), (1, 1), (0, 0), (0, 0), 1)
            store.put({"runtime": "mine"}, LayerSignature(geometry, (9, 9), 1), 1.0, "ms")
    assert doctor._store() == {"path": str(path), "latencies": 2}
    path.write_bytes(b"something else")
    assert doctor._store()["problem"].startswith(f"{path} is not a latency store of fxmerge")


@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("echo 'NVIDIA H200, 9.0, 570.133.20'", [["NVIDIA H200", "9.0", "570.133.20"]]),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", []),
        ("echo 'No devices were found'", []),
    ],
)
def test_nvidia_smi(tmp_path, monkeypatch, script, rows):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._nvidia_smi() == rows
    found = [{"name": name, "capability": capability} for name, capability, _ in rows]
    assert doctor._gpus() == (found, rows[0][2] if rows else None)
    monkeypatch.setenv("PATH", "")
    assert doctor._gpus() == ([], None)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_ends_with_what_the_default_is(monkeypatch, tmp_path, capsys):
    good = Diagnosis(SYSTEM, DEFAULT, (MISSING, WORKS, FILE))
    monkeypatch.setattr(doctor, "examine", lambda: good)
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0
    assert capsys.readouterr() == (f"{good}\n", "")
    record = json.loads(path.read_text())
    assert (record["healthy"], record["system"], record["default"]["name"]) == (True, SYSTEM, "onnxruntime")
    assert [row["name"] for row in record["runtimes"]] == ["tensorrt", "onnxruntime"]
    assert record["runtimes"][1]["error"] == 3.2e-7
    assert [row["name"] for row in record["files"]] == [".onnx"]
    bad = replace(good, proofs=(MISSING, replace(WORKS, state="fails", problem="out of memory")))
    monkeypatch.setattr(doctor, "examine", lambda: bad)
    assert main(["doctor", "--json", str(path)]) == 1
    assert capsys.readouterr() == (f"{bad}\n", "fxmerge: error: the default runtime does not work here: onnxruntime\n")
    assert json.loads(path.read_text())["healthy"] is False


def test_the_command_refuses_an_unwritable_file_before_it_examines(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("examined"))
    assert main(["doctor", "--json", str(tmp_path / "gone" / "doctor.json")]) == 1
    assert "doctor.json cannot be written" in capsys.readouterr().err
