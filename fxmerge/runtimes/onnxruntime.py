"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from torch import nn

from fxmerge.algebra import Geometry
from fxmerge.errors import InternalError, MissingPackageError
from fxmerge.exporters import input_arrays, onnx_bytes

from ._base import LayerSignature

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["OnnxRuntime", "conv_model"]

# The pair that torch's exporter writes; ONNX Runtime 1.20, the oldest supported, reads up to opset 21 and IR 10.
_OPSET = 20
_IR_VERSION = 10

# torch.nn activations, taken with their default arguments, that are one ONNX operator.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "CELU": ("Celu", {}),
    "ELU": ("Elu", {}),
    "GELU": ("Gelu", {}),
    "Hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6}),
    "Hardswish": ("HardSwish", {}),
    "LeakyReLU": ("LeakyRelu", {"alpha": 0.01}),
    "Mish": ("Mish", {}),
    "ReLU": ("Relu", {}),
    "SELU": ("Selu", {}),
    "Sigmoid": ("Sigmoid", {}),
    "Softplus": ("Softplus", {}),
    "Softsign": ("Softsign", {}),
    "Tanh": ("Tanh", {}),
}
# Operators that only change the memory layout.
_LAYOUT = ("ReorderInput", "ReorderOutput")
# Layers in memory at once, sweeps over them, and how long and how often at least each runs in a sweep.
_GROUP, _SWEEPS, _SWEEP_SECONDS, _SWEEP_RUNS = 32, 2, 0.05, 3

_CLIPS = {"ReLU6": (0.0, 6.0), "Hardtanh": (-1.0, 1.0)}


class OnnxRuntime:
    """Milliseconds of ONNX Runtime's CPU provider in float32, all graph optimisations on.

    Args:
        threads: threads within an operator; None is ONNX Runtime's own default, one per core.

    Raises:
        MissingPackageError: ``onnxruntime`` is not installed.
    """

    name: Final = "onnxruntime"
    unit: Final[Literal["ms", "MACs"]] = "ms"
    deterministic: Final = False

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._ort = _import_onnxruntime()

    def __repr__(self) -> str:
        return f"OnnxRuntime(threads={self.threads})"

    def environment(self) -> dict[str, str]:
        """Processor, system, ONNX Runtime's version, threads and precision."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {
            "device": _processor(),
            "precision": "float32",
            "runtime": f"{self.name} {self._ort.__version__}",
            "system": f"{platform.system()} {platform.machine()}",
            "threads": f"default of {cpus}" if self.threads is None else str(self.threads),
        }

    def measure(
        self,
        signatures: Sequence[LayerSignature],
        on_result: Callable[[LayerSignature, float], None],
    ) -> None:
        """Time each layer as a model of its own, with random weights.

        ONNX Runtime's profiler times every operator. Its changes of layout between the caller's tensors and its own blocked ones
        (ReorderInput, ReorderOutput) are left out: alone they make up to half of a small layer, inside a network few are left.
        The smallest of all runs counts. Layers are timed in groups, each group in interleaved sweeps, so that a busy moment of the
        machine does not fall on one of them alone.

        Raises:
            InternalError: ONNX Runtime rejects the model of a layer; the message holds its signature.
        """
        for start in range(0, len(signatures), _GROUP):
            group = signatures[start : start + _GROUP]
            with TemporaryDirectory(prefix="fxmerge-") as folder:
                sessions = [self._profiled(layer, Path(folder, str(place))) for place, layer in enumerate(group)]
                for _ in range(_SWEEPS):
                    for run in sessions:
                        run.sweep()
                latencies = [run.latency() for run in sessions]
            for signature, latency in zip(group, latencies, strict=True):
                on_result(signature, latency)

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Export the network at the given inputs' sizes and prepare a session, run once to warm up.

        Sizes are fixed in the export: that is quicker than with a dynamic batch axis, and the session runs equally
        fast. Most of the seconds it takes go into batch norms, so fold them first.
        """
        feeds = input_arrays(module, args, kwargs)
        run = self._timer(onnx_bytes(module, args, kwargs, dynamic_batch=False), feeds)
        run()
        return run

    def _profiled(self, signature: LayerSignature, prefix: Path) -> _Profiled:
        options = self._options()
        options.enable_profiling = True
        # Of its own: ONNX Runtime adds only the time of day, and two sessions of the same moment would write one file.
        options.profile_file_prefix = str(prefix)
        try:
            model, feeds = _layer(signature)
            session = self._session(model, options)
            session.run(None, feeds)
        except Exception as error:
            raise InternalError(f"ONNX Runtime failed on the layer {signature.key()}: {error}") from error
        return _Profiled(session, feeds)

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        # Threads keep spinning between runs, as they do by default where the network will be deployed.
        options.intra_op_num_threads = self.threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        return options

    def _session(self, model: bytes, options: Any) -> Any:
        return self._ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _timer(self, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        session = self._session(model, self._options())
        names = [output.name for output in session.get_outputs()]
        known = {entry.name: feeds[entry.name] for entry in session.get_inputs()}

        def run() -> float:
            start = time.perf_counter()
            session.run(names, known)
            return (time.perf_counter() - start) * 1e3

        return run


class _Profiled:
    """A session of one layer whose operators are timed."""

    def __init__(self, session: Any, feeds: Mapping[str, NDArray[Any]]) -> None:
        self.session = session
        self.feeds = feeds

    def sweep(self) -> None:
        """Run a number of times that suits the layer: at least three, up to 50 ms if it is quick."""
        end = time.perf_counter() + _SWEEP_SECONDS
        runs = 0
        while runs < _SWEEP_RUNS or time.perf_counter() < end:
            self.session.run(None, self.feeds)
            runs += 1

    def latency(self) -> float:
        """Milliseconds: over its operators the sum of the smallest time of each."""
        events = json.loads(Path(self.session.end_profiling()).read_text())
        best: dict[str, float] = {}
        for event in events:
            kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if kernel and event["args"]["op_name"] not in _LAYOUT:
                best[event["name"]] = min(event["dur"], best.get(event["name"], math.inf))
        return sum(best.values()) / 1e3


def _layer(signature: LayerSignature) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    geometry, random = signature.geometry, np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    fan_in = geometry.in_channels // geometry.groups
    weight = normal(geometry.out_channels, fan_in, *geometry.kernel)
    bias = normal(geometry.out_channels)
    x = normal(signature.batch, geometry.in_channels, *signature.in_size)
    model = conv_model(geometry, weight, bias, x.shape, signature.activation)
    return model.SerializeToString(), {"x": x}


def conv_model(
    geometry: Geometry,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    in_shape: Sequence[int],
    activation: str | None = None,
) -> onnx.ModelProto:
    r"""An ONNX model of one convolution and what follows it; input ``"x"``, output ``"y"``.

    Written operator by operator: torch's exporter takes a hundred times longer for the same model.

    Args:
        geometry: of the convolution. Negative padding becomes a crop in front of it.
        weight: (out_channels, in_channels / groups, \*kernel).
        bias: (out_channels,).
        in_shape: (batch, in_channels, \*in_size).
        activation: name of a ``torch.nn`` class, taken with its default arguments; one that ONNX has no
            operator for is left out.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants = {"weight": weight, "bias": bias}
    nodes, value = [], "x"
    pads = [*geometry.left, *geometry.right]
    if min(pads) < 0:
        axes = len(geometry.kernel)
        crops = [min(pad, 0) for pad in pads]
        constants["crops"] = np.array([0, 0, *crops[:axes], 0, 0, *crops[axes:]], dtype=np.int64)
        nodes.append(helper.make_node("Pad", [value, "crops"], ["cropped"]))
        value = "cropped"
    nodes.append(
        helper.make_node(
            "Conv",
            [value, "weight", "bias"],
            ["conv"],
            kernel_shape=geometry.kernel,
            strides=geometry.stride,
            dilations=geometry.dilation,
            pads=[max(pad, 0) for pad in pads],
            group=geometry.groups,
        )
    )
    if activation in _CLIPS:
        low, high = _CLIPS[activation]
        constants["low"] = np.array(low, dtype=np.float32)
        constants["high"] = np.array(high, dtype=np.float32)
        nodes.append(helper.make_node("Clip", ["conv", "low", "high"], ["y"]))
    elif activation == "SiLU":
        nodes.append(helper.make_node("Sigmoid", ["conv"], ["gate"]))
        nodes.append(helper.make_node("Mul", ["conv", "gate"], ["y"]))
    elif activation in _ACTIVATIONS:
        operator, attributes = _ACTIVATIONS[activation]
        nodes.append(helper.make_node(operator, ["conv"], ["y"], **attributes))
    else:
        nodes[-1].output[0] = "y"
    out_shape = [in_shape[0], geometry.out_channels, *geometry.out_size(tuple(in_shape[2:]))]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, in_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out_shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def _processor() -> str:
    """The processor's model name; Python itself only knows the architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            "the onnxruntime runtime needs a package that is not installed: pip install 'fxmerge[cpu]'"
        ) from error
    module: ModuleType = onnxruntime
    return module
