"""TensorRT engines: what is built, from what, with which options, and what is refused before any work.

No test needs a GPU: TensorRT-RTX builds for one that is not there. An engine cannot be run so, and is not.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from zoo import ZOO

import fxmerge
from fxmerge import engines
from fxmerge.cli import main
from fxmerge.engines import build_engine, check_options, default_flavour, load_module, shared_logger, with_precision
from fxmerge.errors import MissingPackageError, UnsupportedError, UserError
from fxmerge.exporters import onnx_bytes
from fxmerge.files import write_files
from fxmerge.result import Result

RTX = {"flavour": "tensorrt-rtx", "compute_capability": "8.9"}


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx_bindings")
    return load_module("tensorrt-rtx")


def images(count, seed=1):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def seeded(*layers):
    """The layers with weights of a fixed seed, batch norms with the statistics of images."""
    torch.manual_seed(0)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    net = nn.Sequential(*layers).train()
    with torch.no_grad():
        for seed in range(8):
            net(images(8, seed))
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return seeded(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.fixture(scope="module")
def model(net):
    return onnx_bytes(net, (images(2),), {}, dynamic_batch=False)


@pytest.fixture(scope="module")
def dynamic(net):
    return onnx_bytes(net, (images(2),), {}, dynamic_batch=True)


def run_onnx(path_or_bytes, x):
    model = path_or_bytes if isinstance(path_or_bytes, bytes) else str(path_or_bytes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0])


def is_engine(data):
    """TensorRT's magic word, and its own length at the place where the header has it."""
    return data[:4] == b"vtrt" and int.from_bytes(data[16:24], "little") == len(data)


def read(path):
    return json.loads(Path(path).read_text())


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def one_node(operator, **attributes):
    """A model of one operator, from ``x`` to ``y``."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 8, 8]) for name in "xy")
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", **attributes)
    graph = helper.make_graph([node], "net", [x], [y])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


# --- engines of compressed networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2_wd4"])
def test_a_compressed_network_becomes_an_engine_with_its_model_and_its_description(rtx, tmp_path, name):
    entry = ZOO[name]
    result = fxmerge.compress(entry.build(), entry.example(), 0.6, runtime="macs")
    path = fxmerge.export(result, tmp_path / "net.engine", compute_capability="8.9")
    assert path == tmp_path / "net.engine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.engine", "net.engine.json", "net.onnx"]
    assert is_engine(path.read_bytes())

    (x,) = result.example[0]
    with torch.no_grad():
        expected = result.merge()(x)
    about = read(tmp_path / "net.engine.json")
    assert about == {
        "format": "fxmerge.engine/1",
        "fxmerge": fxmerge.__version__,
        "library": "tensorrt-rtx",
        "library_version": rtx.__version__,
        "compute_capability": "8.9",
        "precision": "fp32",
        "workspace": None,
        "batches": None,
        "inputs": [{"name": about["inputs"][0]["name"], "dtype": "float32", "shape": list(x.shape)}],
        "outputs": [{"name": about["outputs"][0]["name"], "dtype": "float32", "shape": list(expected.shape)}],
        "onnx": {"file": "net.onnx", "sha256": sha256(tmp_path / "net.onnx")},
        "engine": {"file": "net.engine", "sha256": sha256(path)},
    }
    spread = float((expected - expected.mean(0)).abs().max())
    assert float((run_onnx(tmp_path / "net.onnx", x) - expected).abs().max()) < 1e-3 * spread
    convolutions = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node].count("Conv")
    assert convolutions == result.report.after.convolutions < result.report.before.convolutions


@pytest.mark.usefixtures("rtx")
def test_a_range_of_batch_sizes_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("enginenets.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    options = ["--precision", "fp16", "--compute-capability", "8.9", "--batches", "1,8,32", "--workspace", "2GiB"]
    example = ("--input-shape", "2x3x16x16")
    assert main(["export", "enginenets:net", "small.pt2", "small.engine", *example, *options]) == 0
    assert capsys.readouterr().out == "small.pt2\nsmall.engine\n"
    about = read("small.engine.json")
    assert (about["precision"], about["batches"], about["workspace"]) == ("fp16", [1, 8, 32], "2GiB")
    assert about["inputs"][0]["shape"] == [-1, 3, 16, 16]
    assert about["outputs"][0]["shape"] == [-1, 4, 14, 14]
    for count in (1, 5):
        assert run_onnx("small.onnx", images(count)).shape == (count, 4, 14, 14)
    assert is_engine(Path("small.engine").read_bytes())
    for name in ("enginenets", "small.pt2"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("rtx")
def test_a_half_precision_network_is_built_in_its_own_precision(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().half()
    path = fxmerge.export(net, tmp_path / "net.engine", images(2).half(), compute_capability="8.9")
    about = read(f"{path}.json")
    assert (about["precision"], about["inputs"][0]["dtype"]) == ("fp16", "float16")
    words = "the network is in float16: an engine is built from a float32 network"
    with pytest.raises(UserError, match=words):
        fxmerge.export(net, path, images(2).half(), precision="fp32", runtime="tensorrt-rtx")


@pytest.mark.usefixtures("rtx")
def test_what_was_there_stays_when_an_engine_cannot_be_built(tmp_path):
    for name in ("net.engine", "net.onnx", "net.engine.json"):
        (tmp_path / name).write_text("what was there")
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).eval()
    with pytest.raises(UnsupportedError, match=r"tensorrt-rtx cannot build this network: .*sm75.*b16"):
        fxmerge.export(net, tmp_path / "net.engine", images(2), precision="bf16", compute_capability="7.5")
    assert len(list(tmp_path.iterdir())) == 3
    assert {path.read_text() for path in tmp_path.iterdir()} == {"what was there"}


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rtx")
def test_each_option_reaches_the_engine(model, dynamic):
    plain = build_engine(model, **RTX)
    assert is_engine(plain)
    others = {
        "fp16": build_engine(model, **RTX, precision="fp16"),
        "bf16": build_engine(model, **RTX, precision="bf16"),
        "capability": build_engine(model, flavour="tensorrt-rtx", compute_capability="12.0"),
        "batches": build_engine(dynamic, **RTX, batches=(1, 2, 4)),
        "wider": build_engine(dynamic, **RTX, batches=(1, 2, 64)),
    }
    assert all(map(is_engine, others.values()))
    assert len({plain, *others.values()}) == 6
    assert is_engine(build_engine(model, flavour="tensorrt-rtx"))


@pytest.mark.usefixtures("rtx")
def test_half_precision_halves_the_weights_of_an_engine():
    model = onnx_bytes(
        nn.Sequential(nn.Conv2d(3, 512, 3), nn.Conv2d(512, 512, 3)).eval(), (images(2),), {}, dynamic_batch=False
    )
    weights = 4 * 512 * 512 * 9
    sizes = {precision: len(build_engine(model, **RTX, precision=precision)) for precision in engines.PRECISIONS}
    for shorter in ("fp16", "bf16"):
        assert sizes["fp32"] - sizes[shorter] == pytest.approx(weights / 2, rel=0.05)


def test_workspace_and_profiling_are_set_on_the_builder(rtx, model, monkeypatch):
    seen = []
    build = rtx.Builder.build_serialized_network

    def record(builder, network, config):
        seen.append((config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE), config.profiling_verbosity))
        return build(builder, network, config)

    monkeypatch.setattr(rtx.Builder, "build_serialized_network", record)
    build_engine(model, **RTX)
    build_engine(model, **RTX, workspace="64.5MiB", detailed=True)
    assert seen[0][0] > 2**30
    assert seen[0][1] != rtx.ProfilingVerbosity.DETAILED
    assert seen[1] == (129 * 2**19, rtx.ProfilingVerbosity.DETAILED)
    with pytest.raises(UnsupportedError, match="within workspace limit"):
        build_engine(model, **RTX, workspace="1MiB")


@pytest.mark.usefixtures("rtx")
def test_batches_and_the_model_have_to_agree(model, dynamic):
    with pytest.raises(UserError, match=r"batches is \(1, 2, 4\), but the model's batch size is fixed"):
        build_engine(model, **RTX, batches=(1, 2, 4))
    with pytest.raises(UserError, match="input 'input' of the model takes any batch size: pass batches"):
        build_engine(dynamic, **RTX)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, r"precision is 'int8'; expected one of fp32, fp16, bf16\."),
        ({"workspace": "2 gigabytes"}, "workspace is '2 gigabytes'; expected an amount of memory such as '512MiB'"),
        ({"workspace": "0GiB"}, "workspace is '0GiB'; expected"),
        ({"workspace": 2**31}, "workspace is 2147483648; expected"),
        ({"batches": (8, 1, 32)}, r"batches is \(8, 1, 32\); expected \(smallest, usual, largest\)"),
        ({"batches": (1, 64, 32)}, r"batches is \(1, 64, 32\); expected"),
        ({"batches": (0, 1, 32)}, r"batches is \(0, 1, 32\); expected"),
        ({"batches": (1, 8)}, r"batches is \(1, 8\); expected"),
        ({"batches": (1, 8.0, 32)}, r"batches is \(1, 8\.0, 32\); expected"),
        ({"batches": 8}, "batches is 8; expected"),
        (
            {"compute_capability": "5.2"},
            r"compute_capability is '5\.2'; this version .* for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0",
        ),
        ({"compute_capability": "SM89"}, "compute_capability is 'SM89'; this version"),
    ],
)
@pytest.mark.usefixtures("rtx")
def test_wrong_options_are_refused_before_any_work(net, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))
    with pytest.raises(UserError, match=words):
        check_options(flavour="tensorrt-rtx", **options)
    with pytest.raises(UserError, match=words):
        fxmerge.export(net, tmp_path / "net.engine", images(2), runtime="tensorrt-rtx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("rtx")
def test_right_options_are_taken():
    for capability in ("7.5", "8.6", "8.9", "12.0"):
        check_options(flavour="tensorrt-rtx", compute_capability=capability)
    for batches in ((1, 1, 1), (2, 8, 8)):
        check_options(flavour="tensorrt-rtx", batches=batches, workspace="0.5 GiB", precision="bf16")


@pytest.mark.parametrize("name", ["runtime", "precision", "workspace", "batches", "compute_capability"])
def test_options_of_engines_are_for_engines_only(net, tmp_path, name):
    with pytest.raises(UserError, match=rf"^{name}: only for a path ending in \.engine, not for .*net\.onnx"):
        fxmerge.export(net, tmp_path / "net.onnx", images(2), **{name: "fp16"})


def test_a_flavour_that_is_none_is_refused(net, tmp_path):
    with pytest.raises(
        UserError, match="there is no TensorRT called 'tensorrt-lite'; expected one of tensorrt, tensorrt-rtx"
    ):
        fxmerge.export(net, tmp_path / "net.engine", images(2), runtime="tensorrt-lite")


class Fixed(nn.Module):
    """Its batch size is part of it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 8), (8, 8), (8, 4)))

    def forward(self, image):
        return self.three(torch.relu(self.two(torch.relu(self.one(image.reshape(2, 3, 16, 16))))))


@pytest.mark.usefixtures("rtx")
def test_a_batch_range_for_a_fixed_batch_is_refused_before_merging(net, tmp_path, monkeypatch):
    torch.manual_seed(0)
    fixed = fxmerge.compress(Fixed(), images(2), 0.7, runtime="macs")
    options = {"runtime": "tensorrt-rtx", "batches": (1, 2, 4)}
    monkeypatch.setattr(Result, "merge", lambda _: pytest.fail("merged"))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))
    words = r"batches is \(1, 2, 4\), but the batch size is fixed"
    with pytest.raises(UserError, match=words):
        fxmerge.export(fixed, tmp_path / "net.engine", **options)
    with pytest.raises(UserError, match=words):
        fxmerge.export(net, tmp_path / "net.engine", images(2), dynamic_batch=False, **options)
    with pytest.raises(UserError, match=words):
        fxmerge.export(net, tmp_path / "net.engine", (images(2), images(3)), **options)


@pytest.mark.usefixtures("rtx")
def test_paths_beside_an_engine_are_checked_too(net, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))
    (tmp_path / "net.engine.json").mkdir()
    with pytest.raises(UserError, match=r"net\.engine\.json': it is a folder"):
        fxmerge.export(net, tmp_path / "net.engine", images(2), runtime="tensorrt-rtx")


@pytest.mark.usefixtures("rtx")
def test_the_command_line_refuses_before_it_makes_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["a.engine", "--precision", "int8"], "precision is 'int8'"),
        (["a.engine", "--compute-capability", "1.0"], "compute_capability is '1.0'"),
        (["a.onnx", "--precision", "fp16"], "precision: only for a path ending in .engine"),
        (["a.onnx", "a.engine"], "a.onnx would be written twice"),
    ):
        assert main(["export", "nowhere:net", "--input-shape", "2x3x8x8", *arguments]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["export", "nowhere:net", "a.engine", "--input-shape", "2x3x8x8", "--batches", "1-8"])
    assert caught.value.code == 2
    assert "'1-8' are no batch sizes; expected something like 1,8,32" in capsys.readouterr().err


# --- what TensorRT says -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rtx")
def test_a_layer_that_tensorrt_does_not_know_is_named_in_its_words():
    words = "tensorrt-rtx cannot read this network's ONNX model: In node 0 with name: the_node and operator: Foo .*Plugin not found"
    with pytest.raises(UnsupportedError, match=words):
        build_engine(one_node("Foo", domain="acme"), **RTX)
    with pytest.raises(UnsupportedError, match=r"cannot read .*operator: Det \(checkDet\): UNSUPPORTED_NODE"):
        build_engine(one_node("Det"), **RTX)
    assert is_engine(build_engine(one_node("Relu"), **RTX))


@pytest.mark.usefixtures("rtx")
def test_what_is_no_onnx_model_is_refused():
    with pytest.raises(UnsupportedError, match="Failed to parse the ONNX model"):
        build_engine(b"nothing", **RTX)


def test_errors_of_one_build_are_not_those_of_the_next(rtx, model):
    for _ in range(2):
        with pytest.raises(UnsupportedError) as caught:
            build_engine(model, flavour="tensorrt-rtx", compute_capability="7.5", precision="bf16")
        assert str(caught.value).count("buildSerializedNetwork") == 1
    assert shared_logger(rtx) is shared_logger(load_module("tensorrt-rtx"))


@pytest.mark.usefixtures("rtx")
def test_many_builds_in_one_process(model):
    """TensorRT-RTX 1.7 ended the process in the garbage collection after a build with an error recorder."""
    for _ in range(4):
        build_engine(model, **RTX)
        with pytest.raises(UnsupportedError):
            build_engine(model, flavour="tensorrt-rtx", compute_capability="7.5", precision="bf16")
        gc.collect()


# --- packages ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_pip_command(net, tmp_path, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    for flavour, extra in (("tensorrt", "gpu"), ("tensorrt-rtx", "tensorrt-rtx")):
        with pytest.raises(MissingPackageError, match=rf"^{flavour} needs .*: pip install 'fxmerge\[{extra}\]' \("):
            load_module(flavour)
    with pytest.raises(
        MissingPackageError, match=r"pip install 'fxmerge\[tensorrt-rtx\]'.* pip install 'fxmerge\[gpu\]'"
    ):
        fxmerge.export(net, tmp_path / "net.engine", images(2))
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_the_device_that_is_there(monkeypatch):
    installed = {"tensorrt", "tensorrt-rtx"}

    def load(flavour):
        if flavour not in installed:
            raise MissingPackageError(flavour)

    monkeypatch.setattr(engines, "load_module", load)
    monkeypatch.setattr(engines, "cuda", SimpleNamespace(is_available=lambda: True))
    assert default_flavour() == "tensorrt"
    assert default_flavour("8.9") == "tensorrt-rtx"
    installed.discard("tensorrt")
    assert default_flavour() == "tensorrt-rtx"
    installed.add("tensorrt")
    monkeypatch.setattr(engines, "cuda", SimpleNamespace(is_available=lambda: False))
    assert default_flavour() == "tensorrt-rtx"


# --- TensorRT itself, with TensorRT-RTX in its place ------------------------------------------------------------------


@pytest.fixture
def tensorrt(rtx, monkeypatch):
    """TensorRT-RTX under the other's name, on a machine that claims to have a device."""
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    monkeypatch.setattr(engines, "cuda", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return rtx


@pytest.mark.usefixtures("tensorrt")
def test_tensorrt_is_built_by_the_same_code(net, tmp_path):
    path = fxmerge.export(net, tmp_path / "net.engine", images(2), precision="fp16")
    about = read(f"{path}.json")
    assert (about["library"], about["compute_capability"]) == ("tensorrt", "9.0")
    assert is_engine(path.read_bytes())


@pytest.mark.usefixtures("tensorrt")
def test_tensorrt_builds_for_the_device_that_is_there(monkeypatch):
    with pytest.raises(UserError, match=r"for the device that is there, not for compute capability 8\.9"):
        check_options(flavour="tensorrt", compute_capability="8.9")
    monkeypatch.setattr(engines, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        check_options(flavour="tensorrt")


# TensorRT-RTX keeps an empty cache, and says that it is of no use
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_timing_cache_is_read_and_written_whole(tensorrt, model, tmp_path, monkeypatch):
    cache = tmp_path / "timings"
    build_engine(model, flavour="tensorrt", timing_cache=cache)
    written = cache.read_bytes()
    assert written
    given = []
    create = tensorrt.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(
        tensorrt.IBuilderConfig, "create_timing_cache", lambda config, data: given.append(data) or create(config, data)
    )
    build_engine(model, flavour="tensorrt", timing_cache=cache)
    cache.write_bytes(b"of another version")
    build_engine(model, flavour="tensorrt", timing_cache=cache)
    assert given == [written, b"of another version"]
    assert cache.read_bytes() == written
    with pytest.raises(UnsupportedError):
        build_engine(b"nothing", flavour="tensorrt", timing_cache=cache)
    assert list(tmp_path.iterdir()) == [cache]


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_timings_of_another_device_are_replaced(tensorrt, model, tmp_path, monkeypatch):
    cache, taken = tmp_path / "timings", []
    cache.write_bytes(b"of another device")
    create, attach = tensorrt.IBuilderConfig.create_timing_cache, tensorrt.IBuilderConfig.set_timing_cache
    monkeypatch.setattr(
        tensorrt.IBuilderConfig, "create_timing_cache", lambda config, data: taken.append(data) or create(config, data)
    )
    monkeypatch.setattr(
        tensorrt.IBuilderConfig,
        "set_timing_cache",
        lambda config, timings, ignore: taken[-1] == b"" and not ignore and attach(config, timings, ignore),
    )
    build_engine(model, flavour="tensorrt", timing_cache=cache)
    assert taken == [b"of another device", b""]
    assert cache.read_bytes() != b"of another device"


@pytest.mark.usefixtures("rtx")
def test_tensorrt_rtx_has_no_timing_cache(model, tmp_path):
    with pytest.raises(UserError, match="tensorrt-rtx has no timing cache"):
        build_engine(model, **RTX, timing_cache=tmp_path / "timings")


# --- precision --------------------------------------------------------------------------------------------------------


def distance(actual, expected):
    """The largest error, as a share of what the output says about its input."""
    return float((actual - expected).abs().max() / (expected - expected.mean(0)).abs().max())


def test_float16_computes_what_torch_computes_in_float16(net, dynamic):
    short = with_precision(dynamic, "fp16")
    onnx.checker.check_model(onnx.load_model_from_string(short), full_check=True)
    x = images(8)
    with torch.no_grad():
        expected = net(x)
        own = distance(copy.deepcopy(net).half()(x.half()).float(), expected)
    assert 1e-4 < own < 1e-2
    assert distance(run_onnx(short, x), expected) < 4 * own

    mirrored = onnx.load_model_from_string(short)
    kernel = next(tensor for tensor in mirrored.graph.initializer if len(tensor.dims) == 4)
    array = np.ascontiguousarray(numpy_helper.to_array(kernel)[..., ::-1])
    kernel.CopyFrom(numpy_helper.from_array(array, kernel.name))
    assert distance(run_onnx(mirrored.SerializeToString(), x), expected) > 20 * own


def test_all_is_shorter_but_inputs_outputs_and_what_onnx_has_in_float32_only(dynamic):
    proto = onnx.load_model_from_string(with_precision(dynamic, "fp16"))
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    ends = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert ends == {TensorProto.FLOAT}
    assert TensorProto.FLOAT not in types.values()
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    (resize,) = (node for node in graph.node if node.op_type == "Resize")
    assert [name for name, kind in weights.items() if kind == TensorProto.FLOAT] == [resize.input[2]]
    assert [node.op_type for node in graph.node].count("Cast") == 2
    assert all(weights[node.input[1]] == TensorProto.FLOAT16 for node in graph.node if node.op_type == "Conv")


def test_bfloat16_is_float16_with_other_numbers(net, model):
    half, brain = (
        onnx.load_model_from_string(with_precision(model, precision)).graph for precision in ("fp16", "bf16")
    )
    assert [(node.op_type, len(node.input)) for node in brain.node] == [(n.op_type, len(n.input)) for n in half.node]
    kinds = {tensor.name: tensor.data_type for tensor in brain.initializer}
    assert set(kinds.values()) - {TensorProto.INT64} == {TensorProto.BFLOAT16, TensorProto.FLOAT}
    (weight,) = (tensor for tensor in brain.initializer if tensor.name.endswith("8.weight.bf16"))
    stored = torch.frombuffer(bytearray(weight.raw_data), dtype=torch.bfloat16).reshape(tuple(weight.dims))
    assert torch.equal(stored, net[8].weight.detach().bfloat16())
    assert not torch.equal(stored.float(), net[8].weight.detach())


def test_fp32_leaves_a_model_as_it_is(model):
    assert with_precision(model, "fp32") is model
    twice = with_precision(with_precision(model, "fp16"), "fp16")
    casts = [node.op_type for node in onnx.load_model_from_string(twice).graph.node].count("Cast")
    assert casts == 2


@pytest.mark.usefixtures("rtx")
def test_a_weight_too_large_for_float16_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    net[0].weight.data[0, 0, 0, 0] = -1e6
    model = onnx_bytes(net, (images(2),), {}, dynamic_batch=False)
    with pytest.raises(
        UnsupportedError, match=r"'0\.weight' holds 1e\+06, more than fp16 can \(65504\): use bf16 or fp32"
    ):
        build_engine(model, **RTX, precision="fp16")
    assert is_engine(build_engine(model, **RTX, precision="bf16"))


def test_infinite_weights_stay_infinite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]).repeat(8))

        def forward(self, x):
            return (x + self.mask).softmax(-1)

    model = onnx_bytes(Masked().eval(), (images(2),), {}, dynamic_batch=False)
    out = run_onnx(with_precision(model, "fp16"), images(2))
    assert float(out[..., 1::2].abs().max()) == 0
    assert float((out.sum(-1) - 1).abs().max()) < 1e-2


def test_an_operator_without_the_shorter_type_stays_in_float32():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("TfIdfVectorizerLike", ["a"], ["b"], domain="acme"),
        helper.make_node("Tanh", ["b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "net", [x], [y], value_info=[helper.make_tensor_value_info("b", TensorProto.FLOAT, [2, 3])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)])
    found = onnx.load_model_from_string(with_precision(model.SerializeToString(), "fp16")).graph.node
    assert [node.op_type for node in found] == ["Cast", "Relu", "Cast", "TfIdfVectorizerLike", "Cast", "Tanh", "Cast"]
    (unknown,) = (node for node in found if node.domain == "acme")
    assert (list(unknown.input), list(unknown.output)) == (["a"], ["b"])


def test_control_flow_is_refused_in_a_shorter_type():
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "branch", [], [y])
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    model = helper.make_model(
        helper.make_graph([node], "net", inputs, [y]), opset_imports=[helper.make_opsetid("", 20)]
    )
    with pytest.raises(UnsupportedError, match=r"node 'choice' \(If\) is control flow, .* fp32 only, not in fp16"):
        with_precision(model.SerializeToString(), "fp16")


# --- files ------------------------------------------------------------------------------------------------------------


def test_several_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    files = {tmp_path / name: name.encode() for name in ("a", "b", "c")}
    write_files(files)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    write = Path.write_bytes

    def full(path, data):
        if path.name.startswith(".c"):
            raise OSError("no space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_files(dict.fromkeys(files, b"new"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
