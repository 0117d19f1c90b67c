"""A runtime that charges networks by fixed prices, under the names that ONNX Runtime gives to what it runs."""

from __future__ import annotations

import math
from collections import Counter

import onnx
from onnx import shape_inference

from fxmerge.exporters import onnx_bytes
from fxmerge.runtimes import LayerSignature

MAC = 1e-3
"""Milliseconds of a multiply-accumulate."""
ELEMENT = 1e-2
"""Of an element that an operation of its own computes."""
LAYOUT = 0.7
"""Of the change of layout that ONNX Runtime puts in front of the first convolution."""
SCALE = 1.25
"""How much slower a network is than its operators together."""
FREE = {"Constant", "Identity", "Pad", "Shape", "Reshape", "Unsqueeze", "Concat", "Gather", "Dropout"}


class Charging:
    """A profiling runtime: every layer costs its multiply-accumulates, whatever else runs on its own its elements.

    Args:
        fuses: an activation, and an addition, run inside of the convolution in front of them, as in ONNX Runtime.
        free: operators that cost nothing, wherever they run.
    """

    name, unit, deterministic = "charging", "ms", False

    def __init__(self, *, fuses=True, free=()):
        self.fuses, self.free = fuses, FREE | set(free)
        self.alone: list[LayerSignature] = []
        self.profiled: list[bytes] = []

    def environment(self):
        return {"runtime": self.name}

    def measure(self, signatures, on_result):
        for signature in signatures:
            self.alone.append(signature)
            on_result(signature, layer_price(signature))

    def build(self, module, args, kwargs):
        price = SCALE * self.price(onnx_bytes(module, args, kwargs, dynamic_batch=False))
        return lambda: price

    def price(self, model):
        return sum(self.charge(onnx.load_model_from_string(model)).values())

    def profile(self, model, feeds):  # noqa: ARG002
        self.profiled.append(model)
        return Charged(self.charge(onnx.load_model_from_string(model)))

    def charge(self, model):
        """Name of everything that runs on its own -> milliseconds."""
        shapes = shapes_of(model)
        readers = Counter(value for node in model.graph.node for value in node.input)
        readers.update(entry.name for entry in model.graph.output)
        makers = {value: node for node in model.graph.node for value in node.output}
        hosts: dict[str, onnx.NodeProto] = {}
        names: dict[str, str] = {}
        prices: dict[str, float] = {}
        for node in model.graph.node:
            (*_, result) = node.output
            host = next((h for h in self.hosts(node, readers, makers, hosts)), None)
            if host is not None:
                hosts[result] = host
                if node.op_type != "Add" and host.output[0] in node.input and ordinary(host, shapes):
                    names[host.name] = f"{result}_nchwc"
                continue
            if node.op_type == "Conv":
                hosts[result] = node
                names[node.name] = f"{result}_nchwc" if ordinary(node, shapes) else node.name
                weight = shapes[node.input[1]]
                prices[node.name] = MAC * math.prod(shapes[result]) * math.prod(weight[1:])
            elif node.op_type == "Gemm":
                prices[node.name] = MAC * math.prod(shapes[result]) * shapes[node.input[0]][-1]
            elif node.op_type not in self.free:
                prices[node.name] = ELEMENT * math.prod(shapes[result])
        return {"ReorderInput": LAYOUT} | {names.get(name, name): price for name, price in prices.items()}

    def hosts(self, node, readers, makers, hosts):
        """The convolutions that an operation could run in: nothing else reads what they give."""
        if self.fuses and node.op_type in ("Add", "Relu", "Clip"):
            for value in reversed(node.input[: 2 if node.op_type == "Add" else 1]):
                host = hosts.get(value)
                if host is not None and readers[value] == 1 and (node.op_type != "Add" or makers[value] is host):
                    yield host


class Charged:
    def __init__(self, prices):
        self.prices = prices

    def sweep(self):
        return sum(self.prices.values())

    def latencies(self):
        return self.prices


def ordinary(conv, shapes):
    """Whether ONNX Runtime has a blocked layout for a convolution, whose name is then that of its output."""
    groups = next((each.i for each in conv.attribute if each.name == "group"), 1)
    return groups in (1, shapes[conv.input[0]][1])


def layer_price(signature):
    return MAC * signature.geometry.macs(signature.in_size, signature.batch)


def shapes_of(model):
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for entry in (*inferred.input, *inferred.output, *inferred.value_info):
        shapes[entry.name] = tuple(axis.dim_value for axis in entry.type.tensor_type.shape.dim)
    return shapes
