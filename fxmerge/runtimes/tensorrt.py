"""TensorRT and TensorRT-RTX on a CUDA device: engines, timed as a whole and layer by layer."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fxmerge.engines import build_engine, load_module, shared_logger
from fxmerge.errors import InternalError, UnsupportedError
from fxmerge.exporters import input_arrays, onnx_bytes

from ._base import LayerSignature
from ._cuda import cuda_environment, event_timer, require_cuda
from ._precision import PRECISIONS, full_name
from ._slope import measure_slopes, onnx_copies

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TensorRT", "TensorRTRTX"]

# How long and how often at least a network runs in one sweep of its profile.
_SWEEP_SECONDS, _SWEEP_RUNS = 0.05, 3
# How TensorRT names what only changes the memory layout.
_LAYOUT = "Reformatting"
# TensorRT's types that a network's inputs and outputs can have, by their names there.
_DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
}


class TensorRT:
    """Milliseconds of TensorRT engines, between two CUDA events; inputs and outputs lie on the device.

    What TensorRT measures while it builds is kept beside the latency store, so that networks that share layers build fast.

    Args:
        precision: ``"float32"``, ``"float16"`` or ``"bfloat16"``, or ``"fp32"``, ``"fp16"``, ``"bf16"``; inputs and outputs of
            a network stay as they are.
        device: index of the CUDA device.
        workspace: most memory for temporary buffers of a layer, such as ``"2GiB"``; None is all that the device has.

    Raises:
        MissingPackageError: TensorRT is not installed.
        UserError: there is no such CUDA device, or the precision is unknown.
    """

    name: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt"
    unit: Literal["ms", "MACs"] = "ms"
    deterministic: bool = False

    def __init__(self, *, precision: str = "float32", device: int = 0, workspace: str | None = None) -> None:
        self._trt = load_module(self.name)
        require_cuda(self.name, device)
        self.precision = full_name(precision)
        self.device = device
        self.workspace = workspace

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(precision={self.precision!r}, device={self.device}, workspace={self.workspace!r})"
        )

    def environment(self) -> dict[str, str]:
        """Device, driver, CUDA, TensorRT's version, precision and workspace."""
        versions = {"precision": self.precision, "runtime": f"{self.name} {self._trt.__version__}"}
        return {**versions, "workspace": str(self.workspace or "default"), **cuda_environment(self.device)}

    def measure(
        self,
        signatures: Sequence[LayerSignature],
        on_result: Callable[[LayerSignature, float], None],
    ) -> None:
        """Time each layer by the slope over copies of it, see :mod:`fxmerge.runtimes._slope`, as TensorRT times its layers.

        Its changes of layout at the ends of a network are left out: inside a network few are left.

        Raises:
            UnsupportedError: TensorRT cannot build a layer, or lacks the memory to run it.
            InternalError: it fails to run one.
        """

        def build(signature: LayerSignature, copies: int) -> Callable[[], float]:
            return self.profile(*onnx_copies(signature, copies, self.precision)).total

        measure_slopes(signatures, build, on_result)

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Export the network at the given inputs' sizes, build an engine and warm it up.

        Raises:
            UnsupportedError: the network cannot be exported, or TensorRT cannot build it or lacks the memory to run it.
        """
        model = onnx_bytes(module, args, kwargs, dynamic_batch=False)
        engine = self._engine(model, input_arrays(module, args, kwargs))
        return event_timer(engine.launch, engine.stream)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a network returns when it is built as :meth:`build` does, in order, on the CPU.

        Raises:
            UnsupportedError: see :meth:`build`.
        """
        model = onnx_bytes(module, args, kwargs, dynamic_batch=False)
        engine = self._engine(model, input_arrays(module, args, kwargs))
        engine.launch()
        engine.stream.synchronize()
        return [engine.tensors[name].cpu() for name in engine.outputs]

    def profile(self, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> _Profile:
        """Build an engine that times its layers, each named after the ONNX nodes that it is made of.

        Args:
            model: serialised, its sizes fixed.
            feeds: its inputs by name.

        Raises:
            UnsupportedError: TensorRT cannot build the network, or lacks the memory to run it.
        """
        return _Profile(self._trt, self._engine(model, feeds, detailed=True))

    def _engine(self, model: bytes, feeds: Mapping[str, NDArray[Any]], *, detailed: bool = False) -> _Engine:
        short = next(short for short, name in PRECISIONS.items() if name == self.precision)
        with torch.cuda.device(self.device):
            engine = build_engine(
                model,
                flavour=self.name,
                precision=short,
                workspace=self.workspace,
                detailed=detailed,
                **self._build_options(),
            )
            return _Engine(self._trt, engine, feeds, torch.device("cuda", self.device))

    def _build_options(self) -> dict[str, Any]:
        """What TensorRT measured in earlier builds serves the later ones of the same version on the same device."""
        from fxmerge.store import default_path

        device = re.sub(r"\W+", "-", torch.cuda.get_device_name(self.device))
        path = default_path().with_name(f"tensorrt-{self._trt.__version__}-{device}.timing")
        path.parent.mkdir(parents=True, exist_ok=True)
        return {"timing_cache": Path(path)}


class TensorRTRTX(TensorRT):
    """Milliseconds of TensorRT-RTX engines on an RTX GPU; see :class:`TensorRT`.

    Its kernels are compiled for the device in the first runs, which are not timed.

    Args:
        precision: see :class:`TensorRT`.
        device: see :class:`TensorRT`.
        workspace: see :class:`TensorRT`.

    Raises:
        MissingPackageError: TensorRT-RTX is not installed.
        UserError: see :class:`TensorRT`.
    """

    name = "tensorrt-rtx"

    def _build_options(self) -> dict[str, Any]:
        # engines for no capability in particular run from 8.0 on
        turing = torch.cuda.get_device_capability(self.device) == (7, 5)
        return {"compute_capability": "7.5"} if turing else {}


class _Engine:
    """A deserialised engine with its tensors on the device, and a stream of its own: TensorRT advises against the default one."""

    def __init__(self, trt: ModuleType, data: bytes, feeds: Mapping[str, NDArray[Any]], device: torch.device) -> None:
        # each object needs the ones before it for as long as it lives
        self.runtime = trt.Runtime(shared_logger(trt))
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise UnsupportedError(f"{trt.__name__} cannot load the engine that it built on this device")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise UnsupportedError(f"{trt.__name__} lacks the memory on the device to run this network")
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.tensors: dict[str, Tensor] = {}
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in inputs]
        for name in inputs:
            self.tensors[name] = torch.from_numpy(feeds[name]).to(device, self._dtype(name)).contiguous()
            self.context.set_input_shape(name, tuple(self.tensors[name].shape))
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            self.tensors[name] = torch.empty(shape, dtype=self._dtype(name), device=device)
        for name, tensor in self.tensors.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def _dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.engine.get_tensor_dtype(name).name]

    def launch(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise InternalError("TensorRT did not start a network that it had built")


class _Profile:
    """An engine whose layers are timed."""

    def __init__(self, trt: ModuleType, engine: _Engine) -> None:
        self.run = event_timer(engine.launch, engine.stream)
        self.times = _layer_times(trt)
        engine.context.profiler = self.times
        # every run reports its layers, without being asked to
        engine.context.enqueue_emits_profile = True

    def sweep(self) -> float:
        """Run a number of times that suits the network: at least three, up to 50 ms if it is quick."""
        end = time.perf_counter() + _SWEEP_SECONDS
        best, runs = math.inf, 0
        while runs < _SWEEP_RUNS or time.perf_counter() < end:
            best = min(best, self.run())
            runs += 1
        return best

    def total(self) -> float:
        """Run the network once and add up its layers, changes of layout left out."""
        self.times.total = 0.0
        self.run()
        return float(self.times.total)

    def latencies(self) -> dict[str, float]:
        """TensorRT's name of each layer -> its smallest milliseconds.

        A layer that was fused has the names of its ONNX nodes in its own; of many, only of the first and the last. A change
        of layout is made of none, and loses the name of the layer it was made for.
        """
        found = {}
        for place, (name, latency) in enumerate(self.times.best.items()):
            found[f"{_LAYOUT} {place}" if name.startswith(_LAYOUT) else name] = latency
        return found


def _layer_times(trt: ModuleType) -> Any:
    class Times(trt.IProfiler):  # type: ignore[misc, name-defined]  # known only once it is loaded
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.best: dict[str, float] = {}
            self.total = 0.0

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.best[layer_name] = min(ms, self.best.get(layer_name, math.inf))
            if not layer_name.startswith(_LAYOUT):
                self.total += ms

    return Times()
