from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxmerge.algebra import Geometry
from fxmerge.errors import InternalError, MissingPackageError
from fxmerge.runtimes import LayerSignature, Runtime, Timing, get_runtime, interleave
from fxmerge.runtimes.macs import Macs
from fxmerge.runtimes.onnxruntime import OnnxRuntime, conv_model

DENSE = Geometry(3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1)

GEOMETRIES = {
    "1d": (Geometry(4, 6, (3,), (2,), (1,), (1,), (1,), 2), (11,)),
    "2d": (DENSE, (9, 7)),
    "3d": (Geometry(2, 3, (1, 2, 3), (1, 2, 1), (1, 1, 2), (0, 1, 2), (0, 0, 2), 1), (4, 5, 6)),
    "depthwise": (Geometry(6, 6, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 6), (8, 8)),
    "dilated": (Geometry(3, 4, (3, 3), (1, 1), (2, 3), (2, 3), (2, 3), 1), (9, 9)),
    "strided": (Geometry(3, 4, (5, 3), (2, 3), (1, 1), (2, 1), (2, 1), 1), (11, 12)),
    "asymmetric": (Geometry(3, 4, (3, 2), (1, 1), (1, 1), (0, 1), (2, 0), 1), (9, 9)),
    "cropped": (Geometry(3, 4, (3, 3), (1, 1), (1, 1), (-1, -2), (-2, 0), 1), (9, 9)),
    "cropped and padded": (Geometry(3, 4, (3, 3), (2, 1), (1, 1), (-1, 2), (3, -1), 1), (9, 9)),
}

ACTIVATIONS = [
    "CELU",
    "ELU",
    "GELU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
]


def run_model(geometry, in_size, activation=None, *, batch=2, seed=0):
    """The ONNX model's output and torch's, for random weights: (actual, expected)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weight = normal(geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    bias = normal(geometry.out_channels)
    x = normal(batch, geometry.in_channels, *in_size)
    model = conv_model(geometry, weight.numpy(), bias.numpy(), x.shape, activation)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(["y"], {"x": x.numpy()})

    pads = [pad for axis in zip(reversed(geometry.left), reversed(geometry.right), strict=True) for pad in axis]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(in_size) - 1]
    expected = convolve(
        F.pad(x, pads), weight, bias, geometry.stride, dilation=geometry.dilation, groups=geometry.groups
    )
    if activation is not None:
        expected = getattr(nn, activation)()(expected)
    return torch.from_numpy(actual), expected


@pytest.mark.parametrize("name", GEOMETRIES)
def test_layer_model_computes_what_torch_computes(name):
    geometry, in_size = GEOMETRIES[name]
    actual, expected = run_model(geometry, in_size)
    assert actual.shape == expected.shape
    assert actual.shape[2:] == geometry.out_size(in_size)
    assert (actual - expected).abs().max() < 1e-5


def test_layer_models_of_mirrored_padding_differ():
    geometry, in_size = GEOMETRIES["asymmetric"]
    mirrored = Geometry(3, 4, (3, 2), (1, 1), (1, 1), geometry.right, geometry.left, 1)
    assert (run_model(geometry, in_size)[0] - run_model(mirrored, in_size)[0]).abs().max() > 0.1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_torchs(activation):
    actual, expected = run_model(DENSE, (9, 7), activation)
    assert (actual - expected).abs().max() < 1e-5
    assert (actual - run_model(DENSE, (9, 7))[0]).abs().max() > 0.1


def test_activation_that_onnx_does_not_have_is_left_out():
    weight, bias = np.zeros((4, 3, 3, 3), np.float32), np.zeros(4, np.float32)
    for activation, operators in (("RReLU", ["Conv"]), ("ReLU", ["Conv", "Relu"])):
        model = conv_model(DENSE, weight, bias, (1, 3, 9, 7), activation)
        assert [node.op_type for node in model.graph.node] == operators


def test_models_need_no_newer_onnxruntime_than_the_oldest_supported():
    model = conv_model(DENSE, np.zeros((4, 3, 3, 3), np.float32), np.zeros(4, np.float32), (1, 3, 9, 7))
    assert (model.ir_version, model.opset_import[0].version) == (10, 20)  # ONNX Runtime 1.20 reads IR 10, opset 21


def test_signature_key_round_trip():
    signature = LayerSignature(DENSE, (9, 7), 2, "ReLU")
    assert LayerSignature.from_key(signature.key()) == signature
    assert hash(LayerSignature.from_key(signature.key())) == hash(signature)
    others = [
        LayerSignature(DENSE, (9, 7), 2),
        LayerSignature(DENSE, (7, 9), 2, "ReLU"),
        LayerSignature(DENSE, (9, 7), 1, "ReLU"),
        LayerSignature(Geometry(3, 4, (3, 3), (1, 1), (1, 1), (0, 1), (1, 1), 1), (9, 7), 2, "ReLU"),
    ]
    assert len({signature.key(), *(other.key() for other in others)}) == 5


def test_signature_key_is_fixed():
    """Stored latencies are found by it: another spelling would silently measure everything again."""
    assert LayerSignature(DENSE, (9, 7), 2, "ReLU").key() == (
        '{"activation":"ReLU","batch":2,"geometry":{"dilation":[1,1],"groups":1,"in_channels":3,"kernel":[3,3],'
        '"left":[1,1],"out_channels":4,"right":[1,1],"stride":[1,1]},"in_size":[9,7],"joined":false}'
    )


def test_interleave_takes_minima_of_turns_of_two_runs_or_more():
    order = []

    def timer(name, latencies):
        left = iter(latencies)

        def run():
            order.append(name)
            return next(left)

        return run

    slow = timer("a", [50.0, 20.0, 40.0, 25.0])
    quick = timer("b", [1.0, 9.0, 9.0, 1.5, 9.0, 9.0, 2.0])
    assert interleave([slow, quick], 0, min_rounds=2) == [
        Timing(20.0, 0.25, 4),
        Timing(1.0, 0.5, 7),  # the first three runs, and the last four
    ]
    assert "".join(order) == "aa" + "bbbb" + "aa" + "bbb"


def test_a_turn_ends_also_where_runs_take_no_time():
    (timing,) = interleave([lambda: 0.0], 0, min_rounds=2)
    assert timing == Timing(0.0, 0.0, 100)


def test_interleave_goes_on_until_the_time_is_up(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("fxmerge.runtimes._base.time.perf_counter", lambda: float(next(clock)))
    (timing,) = interleave([lambda: 10.0], seconds=5, min_rounds=2)
    assert timing.runs == 2 * 6


def test_interleave_runs_deterministic_timers_once():
    runs = []
    assert interleave([lambda: runs.append(1) or 7.0], 10, deterministic=True) == [Timing(7.0, 0.0, 1)]
    assert len(runs) == 1


def test_known_runtimes():
    assert isinstance(get_runtime("macs"), Macs)
    assert isinstance(get_runtime("onnxruntime"), OnnxRuntime)
    assert isinstance(get_runtime("auto"), OnnxRuntime)
    own = OnnxRuntime(threads=1)
    assert get_runtime(own) is own
    assert isinstance(own, Runtime)
    assert repr(own) == "OnnxRuntime(threads=1)"


def test_missing_onnxruntime_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'fxmerge\[cpu\]'"):
        get_runtime("auto")
    assert get_runtime("macs").name == "macs"


def test_importing_the_runtimes_imports_no_onnx():
    code = (
        "import sys, fxmerge.runtimes, fxmerge.store, fxmerge.exporters;"
        "print({'onnx', 'onnxruntime', 'onnxscript', 'networkx', 'scipy', 'rich'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert found.stdout.strip() == "set()"


def test_macs_of_layers_sum_to_the_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.Conv2d(8, 6, 1),
    ).eval()
    layers = [
        LayerSignature(Geometry(4, 8, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 2), (9, 12), 3),
        LayerSignature(Geometry(8, 8, (3, 3), (1, 1), (2, 2), (2, 2), (2, 2), 8), (5, 6), 3),
        LayerSignature(Geometry(8, 6, (1, 1), (1, 1), (1, 1), (0, 0), (0, 0), 1), (5, 6), 3),
    ]
    found = {}
    Macs().measure(layers, found.__setitem__)
    assert list(found.values()) == [3 * 30 * 8 * 18, 3 * 30 * 8 * 9, 3 * 30 * 6 * 8]
    assert Macs().build(net, (torch.randn(3, 4, 9, 12),), {})() == sum(found.values())


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 10), 2 * 6 * 8 * 2 * 3),
        (nn.Conv3d(2, 3, (1, 2, 3)), (2, 2, 5, 6, 7), 2 * 3 * 5 * 5 * 5 * 2 * 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5), 2 * 4 * 25 * 3 * 9),
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).eval(), (2, 4, 5, 5), 0),
    ],
)
def test_macs_of_other_layers(module, shape, macs):
    assert Macs().build(module, (torch.randn(shape),), {})() == macs


def test_onnxruntime_measures_each_layer_once():
    signatures = [LayerSignature(geometry, size, 1, "ReLU") for geometry, size in GEOMETRIES.values()]
    results = []
    OnnxRuntime(threads=1).measure(signatures, lambda signature, latency: results.append((signature, latency)))
    assert [signature for signature, _ in results] == signatures
    assert all(0 < latency < 1e4 for _, latency in results)


def test_onnxruntime_profiles_are_not_mixed_up(monkeypatch):
    """Sessions made within the same millisecond have profiles of their own."""
    monkeypatch.setattr("fxmerge.runtimes.onnxruntime._SWEEP_SECONDS", 0)
    monkeypatch.setattr("fxmerge.runtimes.onnxruntime._GROUP", 64)
    written = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: written.append(path) or read(path))
    tiny = [LayerSignature(Geometry.identity(1, 2), (1, width), 1) for width in range(1, 65)]
    OnnxRuntime(threads=1).measure(tiny, lambda *_: None)
    assert len(set(written)) == len(written) == 64


def test_onnxruntime_names_the_layer_it_failed_on(monkeypatch):
    """A group that holds a bad layer fails; the groups before it are kept."""
    monkeypatch.setattr("fxmerge.runtimes.onnxruntime._GROUP", 1)
    results = []
    good, bad = LayerSignature(DENSE, (9, 7), 1), LayerSignature(DENSE, (9, 7), -1)
    with pytest.raises(InternalError, match=r'ONNX Runtime failed on the layer.*"batch":-1'):
        OnnxRuntime(threads=1).measure([good, bad], lambda *result: results.append(result))
    assert [signature for signature, _ in results] == [good]


def test_onnxruntime_leaves_layout_changes_out():
    """A depthwise layer alone spends a good part of its time on them; its own operators take less than the whole run."""
    depthwise = LayerSignature(Geometry(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 64), (56, 56), 1)
    results = {}
    runtime = OnnxRuntime(threads=1)
    runtime.measure([depthwise], results.__setitem__)
    net = nn.Conv2d(64, 64, 3, padding=1, groups=64).eval()
    timer = runtime.build(net, (torch.randn(1, 64, 56, 56),), {})
    assert 0 < results[depthwise] < min(timer() for _ in range(20))


def test_onnxruntime_environment_tells_thread_counts_apart():
    one, default = OnnxRuntime(threads=1).environment(), OnnxRuntime().environment()
    assert set(one) == {"device", "precision", "runtime", "system", "threads"}
    assert one["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert one["threads"] == "1"
    assert {key for key in one if one[key] != default[key]} == {"threads"}


def test_onnxruntime_returns_what_a_network_computes():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, scale):
            y = self.conv(x)
            return {"mean": y.mean((2, 3)) * scale, "map": y}

    net, x, scale = Two().eval(), torch.randn(2, 3, 8, 8), torch.tensor(3.0)
    mean, image = OnnxRuntime(threads=1).run(net, (x,), {"scale": scale})
    expected = net(x, scale)
    torch.testing.assert_close(mean, expected["mean"], rtol=0, atol=1e-5)
    torch.testing.assert_close(image, expected["map"], rtol=0, atol=1e-5)


def test_onnxruntime_refuses_a_model_with_words_of_ours():
    with pytest.raises(InternalError, match="ONNX Runtime rejects"):
        OnnxRuntime(threads=1).profile(b"no model", {})


def test_onnxruntime_times_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    run = OnnxRuntime(threads=1).build(net, (torch.randn(1, 3, 8, 8),), {})
    (timing,) = interleave([run], 0)
    assert 0 < timing.latency < 1e4
