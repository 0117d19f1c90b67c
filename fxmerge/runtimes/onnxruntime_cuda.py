"""ONNX Runtime on CUDA devices: its CUDA provider, and its TensorRT provider."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fxmerge.errors import MissingPackageError, UserError
from fxmerge.exporters import input_arrays, onnx_bytes

from ._base import LayerSignature
from ._cuda import cuda_environment
from ._precision import full_name
from ._slope import measure_slopes, onnx_copies

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

__all__ = ["OnnxRuntimeCuda", "OnnxRuntimeTensorrt"]

_WARM_UP = 3


class OnnxRuntimeCuda:
    """Milliseconds of ONNX Runtime's CUDA provider in float32.

    Inputs and outputs lie on the device; their copies are not timed. ONNX Runtime's own profiler times the launch of a kernel
    there, not its run, so a layer's latency is the slope over copies of it.

    Args:
        device: index of the CUDA device.

    Raises:
        MissingPackageError: ONNX Runtime is not installed, or without this provider.
    """

    name: str = "onnxruntime-cuda"
    unit: Literal["ms", "MACs"] = "ms"
    deterministic: bool = False
    provider: str = "CUDAExecutionProvider"
    _memory: str = "cuda"

    def __init__(self, *, device: int = 0) -> None:
        self.device = device
        self.precision = "float32"
        self._ort = _import_onnxruntime(self.name, self.provider)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(device={self.device})"

    def environment(self) -> dict[str, str]:
        """Device, driver, CUDA, ONNX Runtime's version and precision."""
        versions = {"precision": self.precision, "runtime": f"{self.name} {self._ort.__version__}"}
        return {**versions, **cuda_environment(self.device)}

    def measure(
        self,
        signatures: Sequence[LayerSignature],
        on_result: Callable[[LayerSignature, float], None],
    ) -> None:
        """Time each layer by the slope over copies of it; see :mod:`fxmerge.runtimes._slope`.

        Raises:
            UserError: see :meth:`build`.
            InternalError: ONNX Runtime rejects the model of a layer; the message holds its signature.
        """
        measure_slopes(signatures, lambda signature, copies: self._timer(*onnx_copies(signature, copies)), on_result)

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Export the network at the given inputs' sizes and prepare a session, its inputs on the device, warmed up.

        Raises:
            UserError: ONNX Runtime cannot use the provider here; it would have run on the CPU instead and said nothing.
            UnsupportedError: the network cannot be exported.
        """
        return self._timer(onnx_bytes(module, args, kwargs, dynamic_batch=False), input_arrays(module, args, kwargs))

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a network returns when it is built as :meth:`build` does, in order, on the CPU.

        Raises:
            UserError: see :meth:`build`.
            UnsupportedError: see :meth:`build`.
        """
        model = onnx_bytes(module, args, kwargs, dynamic_batch=False)
        session, binding = self._bound(model, input_arrays(module, args, kwargs))
        session.run_with_iobinding(binding)
        return [torch.from_numpy(array) for array in binding.copy_outputs_to_cpu()]

    def _provider_options(self) -> dict[str, str]:
        return {"device_id": str(self.device)}

    def _providers(self) -> list[tuple[str, dict[str, str]]]:
        """In order of preference; single operators that the first does not have run on a later one."""
        return [(self.provider, self._provider_options()), ("CPUExecutionProvider", {})]

    def _timer(self, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        session, binding = self._bound(model, feeds)

        def run() -> float:
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return (time.perf_counter() - start) * 1e3

        for _ in range(_WARM_UP):
            run()
        return run

    def _bound(self, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> tuple[Any, Any]:
        """A session, and its inputs and outputs bound to memory on the device."""
        session = self._session(model)
        binding = session.io_binding()
        for entry in session.get_inputs():
            value = self._ort.OrtValue.ortvalue_from_numpy(feeds[entry.name], self._memory, self.device)
            binding.bind_ortvalue_input(entry.name, value)
        for entry in session.get_outputs():
            binding.bind_output(entry.name, self._memory, self.device)
        binding.synchronize_inputs()
        return session, binding

    def _session(self, model: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Without a fallback an error in a run is an error; with it, ONNX Runtime goes on on the CPU.
        session = self._ort.InferenceSession(model, options, providers=self._providers(), enable_fallback=0)
        found = session.get_providers()
        if self.provider not in found:
            raise UserError(
                f"runtime {self.name!r}: ONNX Runtime {self._ort.__version__} could not load its {self.provider} and would "
                f"run on {', '.join(found)} instead. Its log says which library is missing; its versions of CUDA, cuDNN and "
                "TensorRT are listed at https://onnxruntime.ai/docs/execution-providers."
            )
        return session


class OnnxRuntimeTensorrt(OnnxRuntimeCuda):
    """Milliseconds of ONNX Runtime's TensorRT provider; what TensorRT does not have runs on the CUDA provider.

    Everything runs in one CUDA stream. What TensorRT measures while it builds is kept beside the latency store.

    Args:
        device: index of the CUDA device.
        precision: that TensorRT may use: ``"float32"``, ``"float16"`` or ``"bfloat16"``, or ``"fp32"``, ``"fp16"``, ``"bf16"``.

    Raises:
        MissingPackageError: ONNX Runtime is not installed, or without this provider.
        UserError: the precision is unknown.
    """

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def __init__(self, *, device: int = 0, precision: str = "float32") -> None:
        super().__init__(device=device)
        self.precision = full_name(precision)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(device={self.device}, precision={self.precision!r})"

    def environment(self) -> dict[str, str]:
        """Device, driver, CUDA, ONNX Runtime's version, TensorRT's where it is a Python package, and precision."""
        return {**super().environment(), "tensorrt": _version_of("tensorrt")}

    def _provider_options(self) -> dict[str, str]:
        from fxmerge.store import default_path

        folder = default_path().parent
        folder.mkdir(parents=True, exist_ok=True)
        options = {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(folder)}
        # With more streams TensorRT would run copies of a layer at the same time.
        options["trt_auxiliary_streams"] = "0"
        if self.precision != "float32":
            options["trt_fp16_enable" if self.precision == "float16" else "trt_bf16_enable"] = "True"
        return {**super()._provider_options(), **options}

    def _providers(self) -> list[tuple[str, dict[str, str]]]:
        first, last = super()._providers()
        return [first, ("CUDAExecutionProvider", {"device_id": str(self.device)}), last]


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _import_onnxruntime(runtime: str, provider: str) -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            f"the {runtime} runtime needs a package that is not installed: pip install 'fxmerge[gpu]'"
        ) from error
    module: ModuleType = onnxruntime
    available = module.get_available_providers()
    if provider not in available:
        raise MissingPackageError(
            f"the {runtime} runtime needs an ONNX Runtime with {provider}; this one ({module.__version__}) has "
            f"{', '.join(available)}. The CPU's package takes the place of the GPU's, so: pip uninstall onnxruntime, then "
            "pip install 'fxmerge[gpu]'"
        )
    return module
