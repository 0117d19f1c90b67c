"""The runtimes on CUDA devices, as far as a machine without one can tell.

ONNX Runtime's run here on its CPU provider, through the same calls. TensorRT's run on stand-ins that have what the
classes of the installed TensorRT-RTX have, and nothing else.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from unittest.mock import create_autospec

import onnxruntime
import pytest
import torch
from torch import nn

from fxmerge.algebra import Geometry
from fxmerge.engines import build_engine, load_module
from fxmerge.errors import InternalError, MissingPackageError, UnsupportedError, UserError
from fxmerge.exporters import onnx_bytes
from fxmerge.runtimes import (
    LayerSignature,
    ProfilingRuntime,
    Runtime,
    _cuda,
    _slope,
    get_runtime,
    onnxruntime_cuda,
    tensorrt,
)
from fxmerge.runtimes._slope import onnx_copies
from fxmerge.runtimes.onnxruntime_cuda import OnnxRuntimeCuda, OnnxRuntimeTensorrt
from fxmerge.runtimes.tensorrt import TensorRT, TensorRTRTX

ROW = LayerSignature(Geometry(4, 4, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (8, 8), 1, "ReLU6")
BESIDE = LayerSignature(Geometry(16, 8, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1), (64, 64), 2, joined=True)
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported():
    """The network as ONNX, once for all: the exporter takes seconds."""
    return onnx_bytes(network(), (IMAGE,), {}, dynamic_batch=False)


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


# --- refusals ---------------------------------------------------------------------------------------------------------


@no_cuda
@pytest.mark.parametrize("name", ["torch:device=cuda", "torch:device=cuda:1", "tensorrt-rtx"])
@pytest.mark.parametrize("built", [None, "13.0"], ids=["cpu build", "no device"])
def test_cuda_is_refused_where_there_is_none(monkeypatch, name, built):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(tensorrt, "load_module", lambda _: SimpleNamespace(__version__="1.0"))
    runtime = name.partition(":")[0]
    problem = (
        f"runtime {runtime!r} needs a CUDA device, and torch finds none. Check the driver with nvidia-smi, and "
        "CUDA_VISIBLE_DEVICES."
        if built
        else f"runtime {runtime!r} needs a CUDA device, and this PyTorch ({torch.__version__}) was built without CUDA. "
        "On a machine with an NVIDIA GPU, install one with it: https://pytorch.org/get-started/locally."
    )
    with pytest.raises(UserError) as caught:
        get_runtime(name)
    assert str(caught.value) == problem


def test_cuda_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _cuda.require_cuda("torch", 1)
    for device in (2, -1):
        with pytest.raises(UserError, match=f"runtime 'torch': there is no CUDA device {device}; torch finds 2"):
            _cuda.require_cuda("torch", device)


def test_tensorrt_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"tensorrt needs a package .* pip install 'fxmerge\[gpu\]'"):
        get_runtime("tensorrt")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime is built for CUDA"
)
@pytest.mark.parametrize(
    ("name", "provider"),
    [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", "TensorrtExecutionProvider")],
)
def test_onnxruntime_without_the_provider_is_refused(name, provider):
    with pytest.raises(MissingPackageError) as caught:
        get_runtime(name)
    assert str(caught.value) == (
        f"the {name} runtime needs an ONNX Runtime with {provider}; this one ({onnxruntime.__version__}) has "
        f"{', '.join(onnxruntime.get_available_providers())}. The CPU's package takes the place of the GPU's, so: "
        "pip uninstall onnxruntime, then pip install 'fxmerge[gpu]'"
    )


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_missing_onnxruntime_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=rf"the {name} runtime needs .* pip install 'fxmerge\[gpu\]'"):
        get_runtime(name)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


class OnCpu(OnnxRuntimeCuda):
    """The same sessions and bindings, on the provider that is there."""

    provider, _memory = "CPUExecutionProvider", "cpu"

    def _providers(self):
        return [("CPUExecutionProvider", {})]


def test_onnxruntime_measures_with_bound_tensors(monkeypatch):
    monkeypatch.setattr(_slope, "_SWEEP_SECONDS", 0.02)
    found = {}
    runtime = OnCpu()
    assert isinstance(runtime, Runtime)
    assert not isinstance(runtime, ProfilingRuntime)
    runtime.measure([ROW, BESIDE], found.__setitem__)
    assert list(found) == [ROW, BESIDE]
    assert 0 < found[ROW] < found[BESIDE] < 1e4


def test_onnxruntime_times_and_runs_networks(monkeypatch, exported):
    monkeypatch.setattr(onnxruntime_cuda, "onnx_bytes", lambda *_, **__: exported)
    net = network()
    assert 0 < OnCpu().build(net, (IMAGE,), {})() < 1e4
    (actual,) = OnCpu().run(net, (IMAGE,), {})
    with torch.no_grad():
        assert (actual - net(IMAGE)).abs().max() < 1e-5


def test_a_silent_fall_back_to_the_cpu_is_an_error(monkeypatch, exported):
    """ONNX Runtime lists a provider whose libraries are missing, and goes on on the CPU."""
    monkeypatch.setattr(onnxruntime_cuda, "onnx_bytes", lambda *_, **__: exported)

    class Silent(OnCpu):
        provider = "CUDAExecutionProvider"

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    message = (
        f"runtime 'onnxruntime-cuda': ONNX Runtime {onnxruntime.__version__} could not load its CUDAExecutionProvider and "
        "would run on CPUExecutionProvider instead."
    )
    for attempt in (
        lambda: Silent().build(network(), (IMAGE,), {}),
        lambda: Silent().run(network(), (IMAGE,), {}),
        lambda: Silent().measure([ROW], lambda *_: None),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(caught.value).startswith(message)


def test_onnxruntime_names_the_layer_it_failed_on():
    bad = LayerSignature(ROW.geometry, (8, 8), -1)
    with pytest.raises(InternalError, match=r'measuring failed on the layer .*"batch":-1.*'):
        OnCpu().measure([bad], lambda *_: None)


def test_providers_and_their_options(monkeypatch, tmp_path):
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path / "cache"))
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    cpu = ("CPUExecutionProvider", {})
    cuda = ("CUDAExecutionProvider", {"device_id": "1"})
    assert OnnxRuntimeCuda(device=1)._providers() == [cuda, cpu]
    options = {
        "device_id": "1",
        "trt_auxiliary_streams": "0",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path / "cache"),
    }
    for precision, flag in (("fp32", {}), ("fp16", {"trt_fp16_enable": "True"}), ("bf16", {"trt_bf16_enable": "True"})):
        runtime = OnnxRuntimeTensorrt(device=1, precision=precision)
        assert runtime._providers() == [("TensorrtExecutionProvider", options | flag), cuda, cpu]
    assert (tmp_path / "cache").is_dir()


def test_onnxruntime_environment(monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    )
    environment = OnnxRuntimeTensorrt(precision="bf16").environment()
    assert set(environment) == {"cuda", "device", "driver", "precision", "runtime", "tensorrt"}
    assert environment["precision"] == "bfloat16"
    assert environment["runtime"] == f"onnxruntime-tensorrt {onnxruntime.__version__}"
    assert set(OnCpu().environment()) == {"cuda", "device", "driver", "precision", "runtime"}


def test_driver_files(tmp_path):
    """As NVIDIA's kernel module writes them."""
    assert _cuda._driver_version(tmp_path) == "unknown"
    assert _cuda._driver_name(0, tmp_path) == "unknown"
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\n"
    (tmp_path / "version").write_text(line + "GCC version:  gcc version 12.3.0\n")
    for place, name in (("0000:01:00.0", "NVIDIA RTX A6000"), ("0000:02:00.0", "NVIDIA H200")):
        (tmp_path / "gpus" / place).mkdir(parents=True)
        (tmp_path / "gpus" / place / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 42\n")
    assert _cuda._driver_version(tmp_path) == "580.95.05"
    assert [_cuda._driver_name(device, tmp_path) for device in range(3)] == [
        "NVIDIA RTX A6000",
        "NVIDIA H200",
        "unknown",
    ]


# --- TensorRT ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    try:
        return load_module("tensorrt-rtx")
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("signature", [ROW, BESIDE], ids=["row", "beside"])
def test_tensorrt_builds_copies_of_layers(real, signature, precision):  # noqa: ARG001 - skips where it is not installed
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[precision]
    model, _ = onnx_copies(signature, 5, precision)
    engine = build_engine(model, flavour="tensorrt-rtx", precision=short, compute_capability="8.9", detailed=True)
    assert len(engine) > 1000


class Gpu:
    """Stands in for the device: a clock that launches move on, and events that read it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda _: None, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.event(enable_timing))
        monkeypatch.setattr(tensorrt.time, "perf_counter", lambda: self.now / 1e3)

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda _: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


class Engine:
    """A network (2, 3) -> (2, 4) of two layers and a change of layout, on stand-ins for TensorRT's objects."""

    layers = (("Reformatting CopyNode for Input Tensor 0 to fxm0_1", 0.5), ("fxm0_1 + fxm1_2", 2.0), ("fxm2_3", 1.0))

    def __init__(self, real, gpu):
        self.gpu, self.runs, self.starts = gpu, 0, True
        self.context = create_autospec(real.IExecutionContext, instance=True, spec_set=True)
        self.context.get_tensor_shape.side_effect = {"x": (2, 3), "y": (2, 4)}.__getitem__
        self.context.execute_async_v3.side_effect = self.run
        self.engine = create_autospec(real.ICudaEngine, instance=True, spec_set=True)
        self.engine.num_io_tensors = 2
        self.engine.get_tensor_name.side_effect = ["y", "x"].__getitem__
        modes = {"x": real.TensorIOMode.INPUT, "y": real.TensorIOMode.OUTPUT}
        self.engine.get_tensor_mode.side_effect = modes.__getitem__
        self.engine.get_tensor_dtype.side_effect = {"x": real.DataType.HALF, "y": real.DataType.FLOAT}.__getitem__
        self.engine.create_execution_context.side_effect = lambda: self.context
        runtime = create_autospec(real.Runtime, instance=True, spec_set=True)
        runtime.deserialize_cuda_engine.side_effect = lambda _: self.engine
        self.trt = ModuleType("tensorrt")
        self.trt.Runtime = lambda _: runtime
        for name in ("TensorIOMode", "IProfiler", "ILogger"):
            setattr(self.trt, name, getattr(real, name))

    def run(self, stream):
        assert stream == 7
        self.runs += 1
        busy = 5.0 if self.runs % 2 else 1.0
        for name, ms in self.layers:
            self.gpu.now += ms * busy
            if self.context.enqueue_emits_profile is True:
                self.context.profiler.report_layer_time(name, ms * busy)
        return self.starts

    def made(self):
        feeds = {"x": torch.arange(6.0).reshape(2, 3).numpy()}
        return tensorrt._Engine(self.trt, b"", feeds, torch.device("cpu"))


@pytest.fixture
def engine(real, monkeypatch):
    return Engine(real, Gpu(monkeypatch))


def test_tensorrt_gets_its_tensors(engine):
    made = engine.made()
    x, y = made.tensors["x"], made.tensors["y"]
    assert x.dtype == torch.float16
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (y.dtype, tuple(y.shape)) == (torch.float32, (2, 4))
    assert made.outputs == ["y"]
    engine.context.set_input_shape.assert_called_once_with("x", (2, 3))
    addresses = dict(call.args for call in engine.context.set_tensor_address.call_args_list)
    assert addresses == {"x": x.data_ptr(), "y": y.data_ptr()}
    # the shape of an output is asked for when those of the inputs are known
    calls = [call[0] for call in engine.context.method_calls]
    assert calls.index("set_input_shape") < calls.index("get_tensor_shape")


def test_tensorrt_profiles_layers(engine):
    profile = tensorrt._Profile(engine.trt, engine.made())
    assert engine.runs == 3  # warmed up, unprofiled
    assert profile.sweep() == 3.5
    assert engine.runs >= 6
    assert profile.latencies() == {"Reformatting 0": 0.5, "fxm0_1 + fxm1_2": 2.0, "fxm2_3": 1.0}
    totals = [profile.total(), profile.total()]
    assert sorted(totals) == [3.0, 15.0]  # of the two layers, in a quiet and in a busy run


def test_tensorrt_times_networks(engine, monkeypatch, exported):
    monkeypatch.setattr(tensorrt, "onnx_bytes", lambda *_, **__: exported)
    runtime = TensorRT.__new__(TensorRT)
    made = engine.made()
    monkeypatch.setattr(runtime, "_engine", lambda *_: made, raising=False)
    run = runtime.build(network(), (IMAGE,), {})
    assert [run(), run()] == [3.5, 17.5]
    (output,) = runtime.run(network(), (IMAGE,), {})
    assert tuple(output.shape) == (2, 4)


def test_tensorrt_failures_are_told(engine):
    made = engine.made()
    engine.starts = False
    with pytest.raises(InternalError, match="TensorRT did not start a network"):
        made.launch()
    engine.context = None
    with pytest.raises(UnsupportedError, match="tensorrt lacks the memory on the device"):
        engine.made()
    engine.engine = None
    with pytest.raises(UnsupportedError, match="tensorrt cannot load the engine"):
        engine.made()


def test_tensorrt_measures_slopes_of_its_layers(engine, monkeypatch):
    """Of a network whose layers take 3 ms for one copy and 15 for five."""
    monkeypatch.setattr(_slope.time, "perf_counter", lambda: engine.gpu.now / 1e3)
    asked = []

    def profile(_, feeds):
        asked.append(len(feeds))
        copies = 1 if len(asked) % 2 else 5
        return SimpleNamespace(total=lambda: advance(3.0 * copies))

    def advance(ms):
        engine.gpu.now += ms
        return ms

    runtime = TensorRT.__new__(TensorRT)
    runtime.precision = "float16"
    monkeypatch.setattr(runtime, "profile", profile, raising=False)
    found = []
    runtime.measure([ROW, BESIDE], lambda *result: found.append(result))
    assert found == [(ROW, 3.0), (BESIDE, 3.0)]
    assert asked == [1, 1, 2, 10]


@pytest.mark.parametrize(("runtime", "name"), [(TensorRT, "tensorrt"), (TensorRTRTX, "tensorrt-rtx")])
def test_tensorrt_builds_with_its_options(monkeypatch, tmp_path, runtime, name):
    built = []
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt, "load_module", lambda _: SimpleNamespace(__version__="11.0"))
    monkeypatch.setattr(tensorrt, "require_cuda", lambda *_: None)
    monkeypatch.setattr(tensorrt, "build_engine", lambda model, **options: built.append(options) or model)
    monkeypatch.setattr(tensorrt, "_Engine", lambda *arguments: arguments)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A6000 (48/2)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    made = runtime(precision="bf16", device=1, workspace="2GiB")
    assert isinstance(made, ProfilingRuntime)
    _, model, feeds, device = made._engine(b"model", {"x": None}, detailed=True)
    assert (model, feeds, device) == (b"model", {"x": None}, torch.device("cuda", 1))
    own = {"compute_capability": "7.5"}
    if name == "tensorrt":
        own = {"timing_cache": tmp_path / "cache" / "tensorrt-11.0-NVIDIA-RTX-A6000-48-2-.timing"}
    assert built == [{"flavour": name, "precision": "bf16", "workspace": "2GiB", "detailed": True, **own}]
    assert repr(made) == f"{runtime.__name__}(precision='bfloat16', device=1, workspace='2GiB')"
    environment = made.environment()
    assert (environment["runtime"], environment["precision"], environment["workspace"]) == (
        f"{name} 11.0",
        "bfloat16",
        "2GiB",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    made._engine(b"model", {})
    assert "compute_capability" not in built[1]
