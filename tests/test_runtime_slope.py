"""The slope over copies of a layer: its arithmetic on a fake clock, and the networks of copies."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fxmerge.algebra import Geometry
from fxmerge.errors import InternalError, UnsupportedError
from fxmerge.runtimes import LayerSignature, _slope
from fxmerge.runtimes._slope import COPIES, in_a_row, measure_slopes, onnx_copies, slope, torch_copies

SAME = Geometry(6, 6, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 2)
WIDER = Geometry(3, 4, (3, 3), (2, 1), (1, 1), (1, 1), (1, 1), 1)
CROPPED = Geometry(3, 4, (3, 3), (1, 1), (1, 1), (-1, 2), (3, -1), 1)

LAYERS = {
    "row": LayerSignature(SAME, (8, 7), 2),
    "row relu6": LayerSignature(SAME, (8, 7), 2, "ReLU6"),
    "row joined": LayerSignature(SAME, (8, 7), 2, None, joined=True),
    "side by side": LayerSignature(WIDER, (9, 7), 2, "SiLU"),
    "side by side joined": LayerSignature(WIDER, (9, 7), 2, joined=True),
    "cropped": LayerSignature(CROPPED, (9, 9), 1, "ReLU"),
    "1d": LayerSignature(Geometry(4, 4, (3,), (1,), (1,), (2,), (0,), 1), (11,), 3, "Hardswish"),
    "3d": LayerSignature(Geometry(2, 3, (1, 2, 3), (1, 2, 1), (1, 1, 2), (0, 1, 2), (0, 0, 2), 1), (4, 5, 6), 1),
}


class Machine:
    """A clock that networks of copies move on: ``start + copies * layer`` milliseconds a run."""

    def __init__(self, monkeypatch, layers, start=3.0):
        self.now, self.layers, self.start, self.order, self.sweep = 0.0, layers, start, [], 0
        monkeypatch.setattr(_slope.time, "perf_counter", lambda: self.now)

    def build(self, signature, copies):
        def run():
            self.order.append((signature, copies))
            runs = len([each for each in self.order if each == (signature, copies)])
            layer = self.layers[signature]
            latency = self.start + copies * (layer(runs) if callable(layer) else layer)
            self.now += latency / 1e3
            return latency

        return run

    def measure(self, *signatures):
        found = []
        measure_slopes(signatures, self.build, lambda *result: found.append(result))
        assert [signature for signature, _ in found] == list(signatures)
        return [latency for _, latency in found]


def layer(width):
    return LayerSignature(Geometry.pointwise(width, width, dims=2), (4, 4), 1)


def test_slope():
    assert slope(3.0, 11.0) == 2.0
    assert slope(3.0, 5.0, copies=2) == 2.0
    assert COPIES == 5


def test_the_start_of_a_network_is_not_in_it(monkeypatch):
    machine = Machine(monkeypatch, {layer(1): 2.0, layer(2): 0.25}, start=7.0)
    assert machine.measure(layer(1), layer(2)) == pytest.approx([2.0, 0.25])


def test_copies_are_run_in_turn_and_layers_in_sweeps(monkeypatch):
    machine = Machine(monkeypatch, {layer(1): 20.0, layer(2): 20.0})
    machine.measure(layer(1), layer(2))
    one, two = [(layer(1), 1), (layer(1), 5)], [(layer(2), 1), (layer(2), 5)]
    assert machine.order == 2 * (3 * one + 3 * two)


def test_quick_layers_run_longer(monkeypatch):
    machine = Machine(monkeypatch, {layer(1): 0.4}, start=1.0)
    machine.measure(layer(1))
    assert len(machine.order) / 4 == 12  # of 1.4 and 3 ms: more than 50 ms in each of two sweeps


def test_a_busy_moment_is_noticed_and_left_behind(monkeypatch, caplog):
    """Everything in the first sweep takes three times as long."""
    machine = Machine(monkeypatch, {layer(1): lambda runs: 60.0 if runs <= 3 else 20.0, layer(2): 20.0})
    assert machine.measure(layer(1), layer(2)) == pytest.approx([20.0, 20.0])
    # the minima of sweeps 1, 2 and 3, 4 agree; the quiet layer stops after two
    assert [len([each for each in machine.order if each[0] == layer(width)]) for width in (1, 2)] == [
        3 * 2 * 4,
        3 * 2 * 2,
    ]
    assert caplog.text == ""


def test_what_never_agrees_is_bounded_and_reported(monkeypatch, caplog):
    machine = Machine(monkeypatch, {layer(1): lambda runs: 100.0 / runs, layer(2): 20.0}, start=20.0)
    latency, _ = machine.measure(layer(1), layer(2))
    assert len([each for each in machine.order if each[0] == layer(1)]) == 3 * 2 * 6
    assert latency == pytest.approx(100.0 / 18)
    assert "latencies of 1 of 2 layers do not repeat within 2 %" in caplog.text
    assert layer(1).key() in caplog.text


def test_never_below_zero(monkeypatch, caplog):
    machine = Machine(monkeypatch, {layer(1): -0.5, layer(2): 0.0}, start=20.0)
    assert machine.measure(layer(1), layer(2)) == [0.0, 0.0]
    assert f"a layer takes -0.5 ms, counted as 0: {layer(1).key()}" in caplog.text
    assert layer(2).key() not in caplog.text


def test_groups_are_handed_over_one_by_one(monkeypatch):
    """What was measured before something fails is kept, and what fails is named."""
    monkeypatch.setattr(_slope, "_GROUP", 1)
    machine = Machine(monkeypatch, {layer(1): 20.0})
    found = []
    with pytest.raises(InternalError, match=r"measuring failed on the layer \{.*\}: ") as caught:
        measure_slopes([layer(1), layer(2)], machine.build, lambda *result: found.append(result))
    assert layer(2).key() in str(caught.value)
    assert [signature for signature, _ in found] == [layer(1)]


def test_errors_with_a_message_of_their_own_keep_it():
    def build(*_):
        raise UnsupportedError("no such thing")

    with pytest.raises(UnsupportedError, match=r"^no such thing$"):
        measure_slopes([layer(1)], build, lambda *_: None)


# --- networks of copies -----------------------------------------------------------------------------------------------


def run_onnx(signature, copies):
    model, feeds = onnx_copies(signature, copies)
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return feeds, session.run(None, feeds), session


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("copies", [1, 5])
def test_copies_in_torch_are_the_layer(name, copies):
    signature = LAYERS[name]
    net, inputs = torch_copies(signature, copies)
    outputs = net(*inputs)
    shape = (signature.batch, signature.geometry.out_channels, *signature.geometry.out_size(signature.in_size))
    assert all(output.shape == shape for output in outputs)
    assert len(outputs) == (1 if in_a_row(signature) else copies)
    assert len(inputs) == len(outputs) * (2 if signature.joined and not in_a_row(signature) else 1)
    layers = [module for module in net.modules() if hasattr(module, "weight")]
    assert len(layers) == copies
    # every copy has weights of its own, and changes the outputs
    assert len({float(each.weight.detach().sum()) for each in layers}) == copies
    for each in layers:
        with torch.no_grad():
            each.bias += 1
        changed = net(*inputs)
        assert not all(torch.equal(before, after) for before, after in zip(outputs, changed, strict=True))
        outputs = changed
    if signature.activation is not None:
        assert sum(isinstance(module, getattr(nn, signature.activation)) for module in net.modules()) == copies


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("copies", [1, 5])
def test_copies_in_onnx_are_the_layer(name, copies):
    signature = LAYERS[name]
    feeds, outputs, session = run_onnx(signature, copies)
    shape = (signature.batch, signature.geometry.out_channels, *signature.geometry.out_size(signature.in_size))
    assert [list(entry.shape) for entry in session.get_outputs()] == [list(shape)] * len(outputs)
    assert all(output.shape == shape and np.isfinite(output).all() for output in outputs)
    assert len(outputs) == (1 if in_a_row(signature) else copies)
    assert len(feeds) == len(outputs) * (2 if signature.joined and not in_a_row(signature) else 1)
    graph = onnx.load_model_from_string(onnx_copies(signature, copies)[0]).graph
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name.endswith("weight")]
    assert len({float(weight.sum()) for weight in weights}) == copies
    assert sum(node.op_type == "Conv" for node in graph.node) == copies
    assert sum(node.op_type == "Add" for node in graph.node) == copies * signature.joined


def test_rows_keep_their_size():
    """Five layers on, values are neither lost in half precision nor out of its range."""
    for name in ("row", "row joined", "1d"):
        _, (output,), _ = run_onnx(LAYERS[name], 5)
        assert 1e-3 < output.std() < 1e3


def test_a_row_is_the_layers_one_after_another():
    signature = LAYERS["row relu6"]
    net, (x,) = torch_copies(signature, 2)
    first, second = (net.get_submodule(f"layer{place}") for place in range(2))
    assert torch.equal(net(x)[0], second(first(x)))
    assert not torch.equal(net(x)[0], first(second(x)))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_short_precisions_hold_in_the_whole_model(precision):
    graph = onnx.load_model_from_string(onnx_copies(LAYERS["cropped"], 2, precision)[0]).graph
    kind = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[precision]
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {kind}
    assert {tensor.data_type for tensor in graph.initializer} == {kind, onnx.TensorProto.INT64}


def test_half_precision_computes_the_same():
    signature = LAYERS["row"]
    feeds, (full,), _ = run_onnx(signature, 2)
    half = onnxruntime.InferenceSession(
        onnx_copies(signature, 2, "float16")[0], providers=["CPUExecutionProvider"]
    ).run(None, {name: array.astype(np.float16) for name, array in feeds.items()})[0]
    assert half.dtype == np.float16
    assert 0 < np.abs(half - full).max() < 2e-2
