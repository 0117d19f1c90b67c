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
import torch
from torch import Tensor, nn

from fxmerge.algebra import Geometry
from fxmerge.errors import InternalError, MissingPackageError
from fxmerge.exporters import input_arrays, onnx_bytes

from ._base import LayerSignature, Profile

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["OnnxRuntime", "conv_model", "conv_nodes"]

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
            profiles = [self._layer(signature) for signature in group]
            for _ in range(_SWEEPS):
                for profile in profiles:
                    profile.sweep()
            for signature, profile in zip(group, profiles, strict=True):
                operators = profile.latencies()
                on_result(signature, sum(operators[name] for name in operators if not name.startswith(_LAYOUT)))

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Export the network at the given inputs' sizes and prepare a session, run once to warm up.

        Sizes are fixed in the export: that is quicker than with a dynamic batch axis, and the session runs equally
        fast. Most of the seconds it takes go into batch norms, so fold them first.
        """
        feeds = input_arrays(module, args, kwargs)
        run = self._timer(onnx_bytes(module, args, kwargs, dynamic_batch=False), feeds)
        run()
        return run

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a network returns when it is built as :meth:`build` does, in order, on the CPU."""
        feeds = input_arrays(module, args, kwargs)
        session = self._session(onnx_bytes(module, args, kwargs, dynamic_batch=False), self._options())
        known = {entry.name: feeds[entry.name] for entry in session.get_inputs()}
        return [torch.from_numpy(array) for array in session.run(None, known)]

    def profile(self, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> Profile:
        """A session of a serialised ONNX model whose operators are timed.

        Raises:
            InternalError: ONNX Runtime rejects the model.
        """
        try:
            return _Profiled(self, model, feeds)
        except Exception as error:
            raise InternalError(f"ONNX Runtime rejects a network of layers to measure: {error}") from error

    def _layer(self, signature: LayerSignature) -> Profile:
        try:
            return self.profile(*_layer(signature))
        except Exception as error:
            raise InternalError(f"ONNX Runtime failed on the layer {signature.key()}: {error}") from error

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
    """A session whose operators are timed."""

    def __init__(self, runtime: OnnxRuntime, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> None:
        # A folder of its own: ONNX Runtime names profiles by the millisecond, and two sessions would write one file.
        self.folder = TemporaryDirectory(prefix="fxmerge-")
        options = runtime._options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self.folder.name, "profile"))
        try:
            self.session = runtime._session(model, options)
            self.feeds = {entry.name: feeds[entry.name] for entry in self.session.get_inputs()}
            self.session.run(None, self.feeds)
        except Exception:
            self.folder.cleanup()
            raise

    def sweep(self) -> float:
        """Run a number of times that suits the network: at least three, up to 50 ms if it is quick."""
        end = time.perf_counter() + _SWEEP_SECONDS
        best = math.inf
        runs = 0
        while runs < _SWEEP_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            self.session.run(None, self.feeds)
            best = min(best, time.perf_counter() - start)
            runs += 1
        return best * 1e3

    def latencies(self) -> dict[str, float]:
        """Milliseconds: the smallest time of each operator."""
        with self.folder:
            events = json.loads(Path(self.session.end_profiling()).read_text())
        best: dict[str, float] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                best[name] = min(event["dur"] / 1e3, best.get(name, math.inf))
        return best


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

    nodes, constants = conv_nodes(geometry, weight, bias, "x", "y", activation)
    out_shape = [in_shape[0], geometry.out_channels, *geometry.out_size(tuple(in_shape[2:]))]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, in_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out_shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def conv_nodes(
    geometry: Geometry,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    source: str,
    target: str,
    activation: str | None = None,
    prefix: str = "",
) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """The ONNX nodes of :func:`conv_model` from value ``source`` to value ``target``, and their constants by name.

    Their names, and those of the values between them, begin with ``prefix``.
    """
    from onnx import helper

    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {f"{prefix}weight": weight, f"{prefix}bias": bias}

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(operator, inputs, [output], name=f"{prefix}{operator}", **attributes))

    pads = [*geometry.left, *geometry.right]
    if min(pads) < 0:
        axes = len(geometry.kernel)
        crops = [min(pad, 0) for pad in pads]
        constants[f"{prefix}crops"] = np.array([0, 0, *crops[:axes], 0, 0, *crops[axes:]], dtype=np.int64)
        add("Pad", [source, f"{prefix}crops"], f"{prefix}cropped")
        source = f"{prefix}cropped"
    gate = activation == "SiLU"
    alone = not (gate or activation in _CLIPS or activation in _ACTIVATIONS)
    conv = target if alone else f"{prefix}conv"
    add(
        "Conv",
        [source, f"{prefix}weight", f"{prefix}bias"],
        conv,
        kernel_shape=geometry.kernel,
        strides=geometry.stride,
        dilations=geometry.dilation,
        pads=[max(pad, 0) for pad in pads],
        group=geometry.groups,
    )
    if activation in _CLIPS:
        for name, value in zip(("low", "high"), _CLIPS[activation], strict=True):
            constants[prefix + name] = np.array(value, dtype=np.float32)
        add("Clip", [conv, f"{prefix}low", f"{prefix}high"], target)
    elif gate:
        add("Sigmoid", [conv], f"{prefix}gate")
        add("Mul", [conv, f"{prefix}gate"], target)
    elif activation in _ACTIVATIONS:
        operator, attributes = _ACTIVATIONS[activation]
        add(operator, [conv], target, **attributes)
    return nodes, constants


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
