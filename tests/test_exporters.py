from __future__ import annotations

import logging
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import fxmerge.exporters as export
from fxmerge.errors import UnsupportedError, UserError
from fxmerge.exporters import check_path, export_module, input_arrays, onnx_bytes


class Net(nn.Module):
    """Several inputs, nested ones, numbers, several outputs, an integer one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, image, scale=2, extra=None):
        x = torch.relu(self.norm(self.conv(image))) * scale
        if extra is not None:
            x = x + extra["shift"][:, :, None, None]
        return {"map": x, "rest": (self.linear(x.mean((2, 3))), x.argmax(1), None)}


def calibrated(module):
    """Batch-norm statistics of real data: outputs that depend on inputs."""
    with torch.no_grad():
        for _ in range(20):
            module.train()(torch.randn(8, 3, 8, 8))
    return module.eval()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return calibrated(Net())


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return calibrated(nn.Sequential(*layers))


def examples(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def run_onnx(path_or_bytes, **feeds):
    model = path_or_bytes if isinstance(path_or_bytes, bytes) else str(path_or_bytes)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})


def mirrored(model):
    """The same ONNX model with the kernel of its convolution mirrored."""
    proto = onnx.load_model_from_string(model)
    (kernel,) = (tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    array = np.ascontiguousarray(numpy_helper.to_array(kernel)[..., ::-1])
    kernel.CopyFrom(numpy_helper.from_array(array, kernel.name))
    return proto.SerializeToString()


def test_onnx_computes_the_same_at_other_batch_sizes(plain, tmp_path):
    filters, level = list(warnings.filters), logging.getLogger("torch.onnx").level
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    path = export_module(plain, (examples(1)[0],), {}, tmp_path / "net.onnx")
    assert path == tmp_path / "net.onnx"
    for x in examples(1, 2, 5):
        (actual,) = run_onnx(path, input=x)
        with torch.no_grad():
            assert np.abs(actual - plain(x).numpy()).max() < 1e-5
    assert [node.op_type for node in onnx.load(path).graph.node].count("BatchNormalization") == 0
    assert list(tmp_path.iterdir()) == [path]

    assert list(warnings.filters) == filters
    assert logging.getLogger("torch.onnx").level == level
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())


def test_the_exporters_table_of_operators_is_made_once_and_put_back(plain):
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = vars(ONNXRegistry)["from_torchlib"]
    args = (torch.randn(2, 3, 8, 8),)
    first = onnx_bytes(plain, args, {}, dynamic_batch=True)
    made = export._registry.cache_info().misses
    again = onnx_bytes(plain, args, {}, dynamic_batch=True)
    assert again == first
    assert export._registry.cache_info().misses == made == 1
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_pt2_computes_the_same_at_other_batch_sizes(plain, tmp_path):
    path = export_module(plain, (examples(1)[0],), {}, str(tmp_path / "net.pt2"))
    program = torch.export.load(path)
    assert program.example_inputs is None
    for x in examples(1, 2, 5):
        with torch.no_grad():
            assert (program.module()(x) - plain(x)).abs().max() < 1e-6


@pytest.mark.parametrize("exporter", [export._onnx, export._onnx_torchscript])
def test_several_inputs_and_outputs(net, exporter):
    image, extra = examples(3)[0], {"shift": torch.randn(3, 8, generator=torch.Generator().manual_seed(2))}
    args, kwargs = (), {"extra": extra, "scale": 3, "image": image}
    model = exporter(net, args, kwargs, True)
    feeds = {"image": image, "extra_shift": extra["shift"]}
    assert {name: array.shape for name, array in input_arrays(net, args, kwargs).items()} == {
        name: tuple(tensor.shape) for name, tensor in feeds.items()
    }
    expected = net(image, 3, extra)
    one = {name: tensor[:1] for name, tensor in feeds.items()}
    for feed, size in ((feeds, 3), (one, 1)):
        features, logits, classes = run_onnx(model, **feed)
        assert np.abs(features - expected["map"][:size].detach().numpy()).max() < 1e-5
        assert np.abs(logits - expected["rest"][0][:size].detach().numpy()).max() < 1e-5
        assert (classes == expected["rest"][1][:size].numpy()).all()


class Returned(nn.Module):
    def forward(self, x, y):
        return x, y.relu(), x, y


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_inputs_that_are_returned(dynamic_batch):
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    model = onnx_bytes(Returned().eval(), (x, y), {}, dynamic_batch=dynamic_batch)
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    for found, expected in zip(run_onnx(model, x=x, y=y), (x, y.relu(), x, y), strict=True):
        assert (found == expected.numpy()).all()


def test_static_batch(plain):
    model = onnx_bytes(plain, (examples(2)[0],), {}, dynamic_batch=False)
    shape = onnx.load_model_from_string(model).graph.input[0].type.tensor_type.shape
    assert [axis.dim_value for axis in shape.dim] == [2, 3, 8, 8]


def test_wrong_onnx_is_caught_and_the_older_exporter_used(plain, tmp_path, monkeypatch):
    path, x = tmp_path / "net.onnx", examples(4)[0]
    with torch.no_grad():
        expected = plain(x).numpy()
    wrong = mirrored(export._onnx_torchscript(plain, (x,), {}, True))
    assert np.abs(run_onnx(wrong, input=x)[0] - expected).max() > 1e-3
    monkeypatch.setattr(export, "_onnx", lambda *_: wrong)
    with pytest.warns(UserWarning, match=r"older ONNX exporter .*: with the newer, .*output 0 .* is off by"):
        export_module(plain, (x,), {}, path)
    assert np.abs(run_onnx(path, input=x)[0] - expected).max() < 1e-5


def test_network_that_no_exporter_gets_right_is_not_written(plain, tmp_path, monkeypatch):
    right = export._onnx_torchscript
    wrong = mirrored(right(plain, (examples(2)[0],), {}, True))

    def refuse(*_):
        raise RuntimeError("no such operator\nlong trace")

    monkeypatch.setattr(export, "_onnx", refuse)
    monkeypatch.setattr(export, "_onnx_torchscript", lambda *_: wrong)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")
    with pytest.raises(UnsupportedError, match=r"Newer exporter: RuntimeError: no such operator\. Older .* is off by"):
        export_module(plain, (examples(2)[0],), {}, path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_pt2_is_caught(plain, tmp_path, monkeypatch):
    load = torch.export.load

    def damaged(buffer):
        program = load(buffer)
        program.state_dict["5.bias"].data.add_(0.01)
        return program

    monkeypatch.setattr(torch.export, "load", damaged)
    with pytest.raises(UnsupportedError, match=r"cannot be exported to \.pt2: .*output 0 .* is off by 0\.01"):
        export_module(plain, (examples(2)[0],), {}, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_check_catches_a_wrong_batch_axis(plain):
    x = examples(2)[0]
    reference = export._reference(plain, (x,), {}, True)
    assert [example[0][0].shape[0] for example in reference.inputs] == [2, 3]
    reference.compare(lambda args, kwargs: export._outputs(plain, args, kwargs))
    with pytest.raises(UnsupportedError, match=r"shapes \[\[2, 4\]\], not \[\[3, 4\]\]"):
        reference.compare(lambda args, kwargs: export._outputs(plain, (args[0][:2],), kwargs))


def test_check_scales_with_what_the_output_says(plain):
    """A large constant in the output does not widen what is allowed."""

    class Offset(nn.Module):
        def forward(self, x):
            return plain(x) + 100

    x = examples(4)[0]
    small = export._reference(plain, (x,), {}, True).limits[0]
    large = export._reference(Offset(), (x,), {}, True).limits[0]
    assert 1e-5 < small < 1e-3
    assert large < 0.01


def test_nan_is_caught(plain):
    reference = export._reference(plain, (examples(2)[0],), {}, True)
    with pytest.raises(UnsupportedError, match="is off by nan"):
        reference.compare(lambda args, kwargs: [export._outputs(plain, args, kwargs)[0] * float("nan")])


def test_output_that_ignores_the_input_is_reported(tmp_path):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    with pytest.warns(UserWarning, match="outputs barely depend on its inputs"):
        export_module(Constant().eval(), (examples(2)[0],), {}, tmp_path / "net.pt2")


def test_inputs_without_a_common_batch_are_exported_with_fixed_sizes(tmp_path):
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    x = examples(2)[0]
    with pytest.warns(UserWarning, match="do not agree on a batch size"):
        path = export_module(Add().eval(), (x, x[:1]), {}, tmp_path / "net.pt2")
    assert torch.equal(torch.export.load(path).module()(x, x[:1]), x + x[:1])


def test_without_onnxruntime_the_file_is_unchecked_and_says_so(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_onnx", lambda *_: b"anything")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match=r"not checked.*pip install 'fxmerge\[cpu\]'"):
        path = export_module(plain, (examples(2)[0],), {}, tmp_path / "net.onnx")
    assert path.read_bytes() == b"anything"


def test_check_can_be_left_out(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_onnx", lambda *_: b"anything")
    path = export_module(plain, (examples(2)[0],), {}, tmp_path / "net.onnx", check=False)
    assert path.read_bytes() == b"anything"


def test_paths_are_refused_before_the_work(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_onnx", None)
    (tmp_path / "folder.onnx").mkdir()
    for path, message in (
        ("net.tflite", "expected a path ending in .onnx, .pt2 or .engine"),
        ("net", "expected a path ending in .onnx, .pt2 or .engine"),
        ("folder.onnx", "it is a folder"),
        ("nowhere/net.onnx", "its folder does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            export_module(plain, (examples(2)[0],), {}, tmp_path / path)
        assert str(tmp_path / path) in str(caught.value)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="no permission"):
        check_path(tmp_path / "net.onnx")


def test_training_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Sequential is in training mode; call its \.eval\(\)"):
        export_module(nn.Sequential(nn.Conv2d(3, 4, 3)), (examples(2)[0],), {}, tmp_path / "net.onnx")


def test_module_that_cannot_be_traced_is_named(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match="Branch cannot be exported to ONNX"):
        onnx_bytes(Branch().eval(), (examples(2)[0],), {}, dynamic_batch=True)
    with pytest.raises(UnsupportedError, match=r"Branch cannot be exported to \.pt2"):
        export_module(Branch().eval(), (examples(2)[0],), {}, tmp_path / "net.pt2")
