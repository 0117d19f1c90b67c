"""What works on this machine, with a proof for each: ``fxmerge doctor``.

A small network (convolutions, batch norms, ReLUs, a residual sum, pooling, a linear layer) goes through every runtime: it is
built and timed, its outputs are compared with PyTorch's on the CPU, and the fastest plan for it is measured and installed. It
is exported to every file format, and the file is checked.

A runtime that hands out outputs has a method ``run``, see :class:`ReturnsOutputs`; without it nothing is compared. Proofs run
in a process of their own: one that crashes or hangs is a row of the table like any other.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import __version__
from .checks import outputs_of, relative_error
from .driver import frontier
from .engines import FLAVOURS
from .errors import FxmergeError, InternalError, UserError
from .plan import format_latency
from .progress import progress
from .runtimes import get_runtime, runtime_names
from .runtimes._cuda import cuda_environment
from .runtimes.onnxruntime import _processor
from .save import export
from .store import LatencyStore, default_path

__all__ = ["Diagnosis", "Proof", "ReturnsOutputs", "examine", "prove_file", "prove_runtime"]

_COLUMNS = 100
_FILES = (".onnx", ".pt2", *(f".engine {flavour}" for flavour in FLAVOURS))
_SECONDS = 300.0  # for one proof; building engines takes long
_TIMED_SECONDS = 0.1
_PACKAGES = (
    ("torch", "onnx", "onnxscript", "onnxruntime"),
    ("onnxruntime-gpu", "torch-tensorrt", "tensorrt", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
)
"""Shown in any case; shown where installed."""
_ALLOWED = {"float32": 5e-3}
"""Difference from PyTorch that is allowed, as a share of the outputs' spread; in float32 GPUs may multiply with ten bits (TF32)."""
_ALLOWED_SHORT = 5e-2


@runtime_checkable
class ReturnsOutputs(Protocol):
    """What a runtime may offer beyond :class:`~fxmerge.runtimes.Runtime`, so that what it computes can be checked."""

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Build a network as ``build`` does, run it once, and return its tensors, in order, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Proof:
    """What became of one runtime or file format.

    Attributes:
        kind: ``"runtime"``, ``"file"``, or ``"default"`` for what ``runtime="auto"`` stands for.
        name: of the runtime, or suffix of the file; of an engine with its library behind it.
        state: ``"works"``; ``"missing"``: a package or a device is not there; ``"fails"``: it is, and does not do what it should.
        environment: the runtime's.
        latency: of the small network, in ``unit``.
        unit: ``"ms"`` or ``"MACs"``.
        error: largest difference from PyTorch's outputs, as a share of their spread; None where nothing was compared.
        convolutions: of the small network, before and after compression.
        share: latency of the compressed network, as a share of the original's.
        problem: why it does not work, and what to do.
        seconds: that the proof took.
    """

    kind: str
    name: str
    state: str = "works"
    environment: Mapping[str, str] | None = None
    latency: float | None = None
    unit: str | None = None
    error: float | None = None
    convolutions: tuple[int, int] | None = None
    share: float | None = None
    problem: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that the doctor found; ``print`` it.

    Attributes:
        system: versions, processor, GPUs and driver, the store, plain data.
        default: what became of ``runtime="auto"``; its ``name`` is that of the runtime it stands for.
        proofs: of every runtime, then of every file format.
    """

    system: Mapping[str, Any]
    default: Proof
    proofs: tuple[Proof, ...]

    @property
    def healthy(self) -> bool:
        """Whether the default runtime works."""
        return any(proof.state == "works" and self._is_default(proof) for proof in self.proofs)

    def on_gpu(self, proof: Proof) -> bool:
        """Whether a runtime times on a GPU of this machine."""
        device = (proof.environment or {}).get("device")
        return any(device == gpu["name"] for gpu in self.system["gpus"])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "system": dict(self.system),
            "default": asdict(self.default),
            "healthy": self.healthy,
            "runtimes": [asdict(proof) for proof in self.proofs if proof.kind == "runtime"],
            "files": [asdict(proof) for proof in self.proofs if proof.kind == "file"],
        }

    def __str__(self) -> str:
        shown = self.proofs if self.default.state == "works" else (self.default, *self.proofs)
        rows = [("", "state", "version", "on", "off by", "latency", "compressed"), *map(self._row, shown)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head, *table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines = [*_about(self.system), "", head]
        for proof, line in zip(shown, table, strict=True):
            lines.append(line)
            if proof.problem is not None:
                lines += _wrap(proof.problem)
        return "\n".join(lines)

    def _is_default(self, proof: Proof) -> bool:
        return (proof.kind, proof.name) == ("runtime", self.default.name)

    def _row(self, proof: Proof) -> tuple[str, ...]:
        version = (proof.environment or {}).get("runtime", "").removeprefix(proof.name).strip()
        before, after = proof.convolutions or (0, 0)
        return (
            f"{proof.name} (default)" if self._is_default(proof) else proof.name,
            proof.state,
            version,
            "" if proof.environment is None else "GPU" if self.on_gpu(proof) else "CPU",
            "" if proof.error is None else f"{proof.error:.0e}",
            "" if proof.latency is None else format_latency(proof.latency, str(proof.unit)),
            "" if proof.share is None else f"{before} -> {after} layers, {proof.share:.0%}",
        )


def examine(seconds: float = _SECONDS) -> Diagnosis:
    """Prove every runtime that is registered, and every file format, in another process.

    Args:
        seconds: time limit of one proof.
    """
    subjects = [("default", "auto"), *(("runtime", name) for name in runtime_names())]
    subjects += [("file", name) for name in _FILES]
    proofs = []
    with progress("Examining this machine", total=len(subjects)) as bar:
        for proof in _proofs(subjects, seconds):
            proofs.append(proof)
            bar.advance(1, proof.name)
    return Diagnosis(_system(), proofs[0], tuple(proofs[1:]))


def prove_runtime(name: str) -> Proof:
    """Take the small network through a runtime, in this process. Whatever goes wrong is in the proof.

    Args:
        name: what :func:`~fxmerge.runtimes.get_runtime` takes.
    """
    return _prove("runtime", name, _take_through)


def prove_file(name: str) -> Proof:
    """Export the small network to a file, which is checked, in this process. Whatever goes wrong is in the proof.

    Args:
        name: a suffix; behind ``".engine"`` a space and the library that builds it.

    Example:
        >>> prove_file(".pt2").state
        'works'
    """
    return _prove("file", name, _write)


# --- one proof --------------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    """A little of everything that a network for images is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.pool, self.head = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, 10)."""
        x = self.relu(self.norm1(self.conv1(image)))
        x = self.relu(x + self.norm2(self.conv2(x)))
        scores: Tensor = self.head(self.pool(x).mean((2, 3)))
        return scores


def _network() -> tuple[nn.Module, Tensor]:
    """The same in every process, and without a trace in the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Net()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        return net.eval(), torch.randn(2, 3, 64, 64)


def _prove(kind: str, name: str, steps: Callable[[str, dict[str, Any]], None]) -> Proof:
    """Run the steps, which write down what they find. A UserError before there is anything says what is not there."""
    found: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        steps(name, found)
    except Exception as error:
        absent = isinstance(error, UserError) and not found
        found.update(state="missing" if absent else "fails", problem=_first_line(error))
    return Proof(**{"kind": kind, "name": name, "seconds": time.perf_counter() - start, **found})


def _choose(name: str, found: dict[str, Any]) -> None:
    found["name"] = get_runtime(name).name


def _take_through(name: str, found: dict[str, Any]) -> None:
    runtime = get_runtime(name)
    found["environment"] = environment = runtime.environment()
    found["unit"] = runtime.unit
    net, image = _network()
    if isinstance(runtime, ReturnsOutputs):
        error = relative_error(runtime.run(net, (image,), {}), outputs_of(net, ((image,), {})))
        allowed = _ALLOWED.get(environment.get("precision", "float32"), _ALLOWED_SHORT)
        if not error <= allowed:
            raise InternalError(f"its outputs are off by {error:.2g} of their spread, allowed is {allowed:g}")
        found["error"] = error
    plans = frontier(net, image, runtime=runtime, store=None, measure_seconds=_TIMED_SECONDS)
    found["latency"] = plans.original
    report = plans.apply(plans.plan(0)).report
    found["convolutions"] = report.before.convolutions, report.after.convolutions
    found["share"] = report.measured / report.original


def _write(name: str, found: dict[str, Any]) -> None:
    del found
    suffix, _, library = name.partition(" ")
    net, image = _network()
    with tempfile.TemporaryDirectory(prefix="fxmerge-") as folder:
        export(net, Path(folder, f"net{suffix}"), image, runtime=library or None)


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return text if text and isinstance(error, FxmergeError) else f"{type(error).__name__}: {text}"


# --- proofs in another process ----------------------------------------------------------------------------------------

_STEPS = {"default": _choose, "runtime": _take_through, "file": _write}


def _proofs(subjects: Sequence[tuple[str, str]], seconds: float) -> Iterator[Proof]:
    """One proof for each (kind, name), in order. A process that ends early has failed at the first without an answer."""
    left = list(subjects)
    while left:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            command = [sys.executable, "-m", "fxmerge.doctor", *(f"{kind}:{name}" for kind, name in left)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:  # noqa: S603
                start = time.perf_counter()
                while answer := _line(process, seconds):
                    left.pop(0)
                    yield Proof(**json.loads(answer))
                    start = time.perf_counter()
                taken = time.perf_counter() - start
            if left:
                kind, name = left.pop(0)
                problem = (
                    f"no result within {seconds:g} seconds" if taken >= seconds else _ending(process.returncode, log)
                )
                yield Proof(kind, name, "fails", problem=problem, seconds=taken)


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line that a process writes; empty when it ends, which happens at the latest after so many seconds."""
    assert process.stdout is not None  # noqa: S101 - it was asked for
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


def _ending(code: int, log: IO[str]) -> str:
    log.seek(0)
    said = log.read().strip().splitlines()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"its process {how}{f': {said[-1]}' if said else ''}"


def _answer(subjects: Sequence[str]) -> None:
    """The other process: a line of JSON for each ``kind:name``."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for subject in subjects:
        kind, _, name = subject.partition(":")
        answers.write(json.dumps(asdict(_prove(kind, name, _STEPS[kind]))) + "\n")
        answers.flush()


# --- the machine ------------------------------------------------------------------------------------------------------


def _system() -> dict[str, Any]:
    needed, optional = ({name: _version(name) for name in names} for names in _PACKAGES)
    gpus, driver = _gpus()
    return {
        "fxmerge": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": needed | {name: version for name, version in optional.items() if version is not None},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "driver": driver,
        "cuda": torch.version.cuda,
        "store": _store(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[list[dict[str, str]], str | None]:
    """Name and compute capability of each GPU, and the driver's version, from torch or else from nvidia-smi."""
    rows = _nvidia_smi()
    driver = rows[0][2] if rows else None
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
        gpus = [{"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in seen]
        return gpus, driver or cuda_environment()["driver"]
    return [{"name": name, "capability": capability} for name, capability, _ in rows], driver


def _nvidia_smi() -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 3]


def _store() -> dict[str, Any]:
    path = default_path()
    about: dict[str, Any] = {"path": str(path), "latencies": 0}
    if path.exists():
        try:
            with LatencyStore(path, readonly=True) as store:
                about["latencies"] = sum(environment.entries for environment in store.environments())
        except FxmergeError as error:
            about["problem"] = str(error)
    return about


def _about(system: Mapping[str, Any]) -> list[str]:
    """The lines above the table."""
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in system["packages"].items())
    gpus = ", ".join(f"{gpu['name']} (compute capability {gpu['capability']})" for gpu in system["gpus"]) or "none"
    if system["gpus"]:
        gpus += f"; driver {system['driver'] or 'unknown'}, torch for CUDA {system['cuda'] or '- none'}"
    store = system["store"]
    lines = {
        "fxmerge": f"{system['fxmerge']}, Python {system['python']}, {system['system']}",
        "packages": packages,
        "processor": f"{system['processor']}, {system['cores']} cores; threads of PyTorch: {system['threads']}",
        "GPU": gpus,
        "latencies": f"{store['latencies']:,} stored in {store['path']}",
    }
    if "problem" in store:
        lines["latencies"] = store["problem"]
    return [line for name, text in lines.items() for line in _wrap(text, f"{name:<11}")]


def _wrap(text: str, title: str = "    ") -> list[str]:
    indent = " " * len(title)
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=title,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    _answer(sys.argv[1:])
