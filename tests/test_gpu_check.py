"""``make gpu-check``: what it runs, what it writes, and that it goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fxmerge.doctor import Diagnosis, Proof

ROOT = Path(__file__).resolve().parents[1]
GPU = {"name": "NVIDIA H200", "capability": "9.0"}
SYSTEM = {
    "fxmerge": "1.2.3",
    "python": "3.11.9",
    "system": "Linux-6.1-x86_64",
    "packages": {"torch": "2.13.0", "onnx": "1.23.2"},
    "processor": "AMD EPYC",
    "cores": 4,
    "threads": 2,
    "gpus": [GPU],
    "driver": "570.1",
    "cuda": "13.0",
    "store": {"path": "/cache/latency.sqlite", "latencies": 0},
}
ON_GPU = {"runtime": "tensorrt 10.1", "device": "NVIDIA H200"}
PROOFS = (
    Proof("runtime", "tensorrt", environment=ON_GPU),
    Proof("runtime", "tensorrt-rtx", "fails", environment=ON_GPU, problem="no"),
    Proof("runtime", "torch", environment=ON_GPU),
    Proof("runtime", "onnxruntime", environment={"runtime": "onnxruntime 1.32", "device": "AMD EPYC"}),
    Proof("file", ".onnx"),
)
FOUND = Diagnosis(SYSTEM, Proof("default", "tensorrt"), PROOFS)

LATENCY = """
import json, sys
from pathlib import Path
runtime, results = sys.argv[2], Path(sys.argv[4])
assert sys.argv[1:4:2] == ["--runtime", "--results"]
log = Path(__file__).with_name("log")
log.write_text(log.read_text() + runtime + " " + ("resumed" if results.exists() else "new") + "\\n")
results.write_text(json.dumps({"error": 0.02, "runtime": runtime}))
results.with_suffix(".md").write_text("a table")
if runtime in Path(__file__).with_name("broken").read_text().split():
    sys.exit("CUDA error: out of memory")
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """The script, with a benchmark that only writes down how it was called."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stub = tmp_path / "latency.py"
    stub.write_text(LATENCY)
    (tmp_path / "log").write_text("")
    (tmp_path / "broken").write_text("")
    monkeypatch.setattr(script, "LATENCY", stub)
    monkeypatch.setattr(script, "examine", lambda: FOUND)

    def run(*arguments):
        (tmp_path / "log").write_text("")
        code = script.main(["--results", str(tmp_path / "results"), *arguments])
        return code, (tmp_path / "log").read_text().splitlines()

    script.run_here, script.folder = run, tmp_path
    return script


def record(check):
    return json.loads((check.folder / "results" / "gpu-nvidia-h200.json").read_text())


def files(check):
    return sorted(path.name for path in (check.folder / "results").iterdir())


def test_every_runtime_that_works_on_the_gpu_is_measured_once(check, capsys):
    assert check.run_here() == (0, ["tensorrt new", "torch new"])
    assert capsys.readouterr().out.startswith(f"{FOUND}\n\ngpu-check: latency.py on tensorrt\n")
    assert files(check) == ["gpu-nvidia-h200.json"]
    assert record(check) == {
        "device": "NVIDIA H200",
        "capability": "9.0",
        "driver": "570.1",
        "cuda": "13.0",
        "python": "3.11.9",
        "versions": {"fxmerge": "1.2.3", "torch": "2.13.0", "onnx": "1.23.2"},
        "doctor": json.loads(json.dumps(FOUND.to_json())),
        "latency": {
            "tensorrt": {"error": 0.02, "runtime": "tensorrt"},
            "torch": {"error": 0.02, "runtime": "torch"},
        },
        "failures": {},
    }
    assert check.run_here() == (0, [])
    assert check.run_here("--again") == (0, ["tensorrt new", "torch new"])
    assert check.run_here("--runtimes", "tensorrt", "tensorrt:fp16") == (0, ["tensorrt:fp16 new"])
    assert list(record(check)["latency"]) == ["tensorrt", "torch", "tensorrt:fp16"]


def test_another_driver_or_version_starts_anew(check, monkeypatch):
    check.run_here()
    for change in ({"driver": "575.2"}, {"packages": {"torch": "2.14.0"}}):
        monkeypatch.setattr(check, "examine", lambda: replace(FOUND, system={**SYSTEM, **change}))  # noqa: B023 - called here
        assert check.run_here() == (0, ["tensorrt new", "torch new"])
        assert check.run_here() == (0, [])


def test_a_runtime_that_fails_is_recorded_and_goes_on_next_time(check, capsys):
    (check.folder / "broken").write_text("tensorrt")
    assert check.run_here() == (1, ["tensorrt new", "torch new"])
    problem = "CUDA error: out of memory (status 1)"
    assert f"gpu-check: tensorrt failed: {problem}" in capsys.readouterr().out
    assert (list(record(check)["latency"]), record(check)["failures"]) == (["torch"], {"tensorrt": problem})
    assert "gpu-nvidia-h200.tensorrt.json" in files(check)
    (check.folder / "broken").write_text("")
    assert check.run_here() == (0, ["tensorrt resumed"])
    assert (sorted(record(check)["latency"]), record(check)["failures"]) == (["tensorrt", "torch"], {})
    assert files(check) == ["gpu-nvidia-h200.json"]


def test_what_is_unfinished_on_another_driver_is_not_gone_on_with(check, monkeypatch):
    (check.folder / "broken").write_text("tensorrt")
    check.run_here()
    monkeypatch.setattr(check, "examine", lambda: replace(FOUND, system={**SYSTEM, "driver": "575.2"}))
    assert check.run_here()[1] == ["tensorrt new", "torch new"]


def test_the_record_is_there_after_every_step(check, monkeypatch):
    seen = []

    def run(name, results):
        seen.append(sorted(record(check)["latency"]))
        results.write_text("{}")
        if name == "torch":
            raise KeyboardInterrupt

    monkeypatch.setattr(check, "run", run)
    with pytest.raises(KeyboardInterrupt):
        check.run_here()
    assert seen == [[], ["tensorrt"]]
    assert list(record(check)["latency"]) == ["tensorrt"]


@pytest.mark.parametrize(("default", "code"), [("onnxruntime", 0), ("tensorrt-rtx", 1)])
def test_without_a_gpu_only_the_doctor_runs(check, monkeypatch, capsys, default, code):
    found = Diagnosis({**SYSTEM, "gpus": []}, Proof("default", default), PROOFS)
    monkeypatch.setattr(check, "examine", lambda: found)
    assert check.run_here() == (code, [])
    out = capsys.readouterr().out
    assert out.startswith(f"{found}\n\n")
    assert out.endswith("there is no GPU on this machine: nothing was measured, and no record written\n")
    assert not (check.folder / "results").exists()


def test_a_default_that_does_not_work_ends_with_1(check, monkeypatch):
    monkeypatch.setattr(check, "examine", lambda: replace(FOUND, default=Proof("default", "tensorrt-rtx")))
    assert check.run_here() == (1, ["tensorrt new", "torch new"])


def test_names_of_files(check):
    assert check.slug("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop"
    assert check.slug("tensorrt:fp16") == "tensorrt-fp16"


def test_make_runs_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "gpu-check", "VENV=elsewhere"],  # noqa: S607
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "elsewhere/bin/python benchmarks/gpu_check.py"
