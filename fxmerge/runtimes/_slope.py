"""Latencies of single layers on runtimes that time whole networks only: the slope over copies of a layer.

A network of one layer also pays for being started, for its input and its output. What one more copy of the layer adds
does not contain that: ``(t(5 copies) - t(1 copy)) / 4``.

Every copy has weights of its own: equal ones could be loaded, or computed, once. Where a layer's output fits as its input the
copies stand in a row, as layers do in a network: each finds its input where the one before left it, and memory is reused.
Elsewhere they stand side by side, and each has an input and an output of its own too: of copies that read one input a compiler may
make one wider layer, and a copy whose output nobody reads is dropped.
"""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxmerge.algebra import ConvMap, as_torch_pad
from fxmerge.errors import FxmergeError, InternalError

from ._base import LayerSignature
from .onnxruntime import _IR_VERSION, _OPSET, conv_nodes

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["COPIES", "Build", "in_a_row", "measure_slopes", "onnx_copies", "slope", "torch_copies"]

COPIES = 5
"""Copies in the larger of the two networks that are compared."""

Build: TypeAlias = Callable[[LayerSignature, int], Callable[[], float]]
"""Makes a network of so many copies of a layer; each call of what it returns runs it once, in milliseconds."""

# Layers in memory at once; sweeps over them, at least and at most; how long and how often at least a layer runs in one.
_GROUP, _SWEEPS, _MOST_SWEEPS, _SWEEP_SECONDS, _SWEEP_RUNS = 16, 2, 6, 0.05, 3
# The latencies of the earlier and the later half of the sweeps may differ by this share.
_AGREEMENT = 0.02
_PADS: dict[int, type[nn.Module]] = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}
_log = logging.getLogger("fxmerge")


def measure_slopes(
    signatures: Sequence[LayerSignature],
    build: Build,
    on_result: Callable[[LayerSignature, float], None],
) -> None:
    """Find each layer's latency as the slope over its copies and hand it to ``on_result`` once.

    A sweep runs each layer of a group, one copy and five in turn. Sweeps are repeated until the minima of the earlier and of
    the later half give a layer latencies within 2 % of each other, six times at most: so a busy moment of the machine is
    noticed, and left behind. How many are still further apart then is logged, and so is what is below zero and counts as zero.

    Args:
        signatures: layers.
        build: makes the networks.
        on_result: is called group by group.

    Raises:
        InternalError: a layer's network cannot be built or run; the message holds its signature.
    """
    spreads: dict[str, float] = {}
    for start in range(0, len(signatures), _GROUP):
        group = [_Layer(signature, build) for signature in signatures[start : start + _GROUP]]
        unsettled = group
        while unsettled:
            for layer in unsettled:
                layer.sweep()
            unsettled = [layer for layer in unsettled if not layer.settled()]
        for layer in group:
            spreads[layer.signature.key()] = layer.spread()
            on_result(layer.signature, layer.latency())
    apart = {key: spread for key, spread in spreads.items() if spread > _AGREEMENT}
    if apart:
        worst = max(apart, key=lambda key: apart[key])
        _log.warning(
            "latencies of %d of %d layers do not repeat within %.0f %%; the worst is %.0f %% apart: %s",
            len(apart),
            len(spreads),
            100 * _AGREEMENT,
            100 * apart[worst],
            worst,
        )


def slope(one: float, many: float, copies: int = COPIES) -> float:
    """What one more copy adds, from the latencies of one copy and of several.

    Example:
        >>> slope(3.0, 11.0)
        2.0
    """
    return (many - one) / (copies - 1)


def in_a_row(signature: LayerSignature) -> bool:
    """Whether a layer's output has the shape of its input.

    Example:
        >>> from fxmerge.algebra import Geometry
        >>> [in_a_row(LayerSignature(Geometry.pointwise(8, width, dims=2), (4, 4), 1)) for width in (8, 16)]
        [True, False]
    """
    return _in_shape(signature) == _out_shape(signature)


class _Layer:
    """A layer's two networks and what they took, sweep by sweep: (one copy, all copies)."""

    def __init__(self, signature: LayerSignature, build: Build) -> None:
        self.signature = signature
        with _naming(signature):
            self.one, self.many = build(signature, 1), build(signature, COPIES)
        self.sweeps: list[tuple[float, float]] = []

    def sweep(self) -> None:
        end = time.perf_counter() + _SWEEP_SECONDS
        best_one, best_many, runs = math.inf, math.inf, 0
        with _naming(self.signature):
            while runs < _SWEEP_RUNS or time.perf_counter() < end:
                best_one, best_many = min(best_one, self.one()), min(best_many, self.many())
                runs += 1
        self.sweeps.append((best_one, best_many))

    def settled(self) -> bool:
        enough = len(self.sweeps) >= _SWEEPS and self.spread() <= _AGREEMENT
        return enough or len(self.sweeps) >= _MOST_SWEEPS

    def latency(self) -> float:
        """Never below zero: what is lost in the noise of its network costs nothing."""
        latency = self._slope(self.sweeps)
        if latency < 0:
            _log.warning("a layer takes %.2g ms, counted as 0: %s", latency, self.signature.key())
        return max(latency, 0.0)

    def spread(self) -> float:
        """How far the two halves of the sweeps are apart, relative to the layer or to a copy's share of its network."""
        half = len(self.sweeps) // 2
        earlier, later = self._slope(self.sweeps[:half]), self._slope(self.sweeps[half:])
        share = min(many for _, many in self.sweeps) / COPIES
        return abs(earlier - later) / max(abs(earlier), abs(later), share)

    @staticmethod
    def _slope(sweeps: Sequence[tuple[float, float]]) -> float:
        return slope(min(one for one, _ in sweeps), min(many for _, many in sweeps))


@contextmanager
def _naming(signature: LayerSignature) -> Iterator[None]:
    """Name the layer in whatever goes wrong with its networks, but for what has a message of its own."""
    try:
        yield
    except FxmergeError:
        raise
    except Exception as error:
        raise InternalError(f"measuring failed on the layer {signature.key()}: {error}") from error


def torch_copies(signature: LayerSignature, copies: int) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Copies of a layer as a network in eval mode, on the CPU in float32, and its inputs.

    A graph module: its ``forward`` is code of its own. Of modules that share one, ``torch.compile`` compiles the first eight.
    """
    row, graph, draw = in_a_row(signature), fx.Graph(), torch.Generator().manual_seed(0)
    layers: dict[str, nn.Module] = {}
    inputs: list[Tensor] = []
    outputs: list[fx.Node] = []

    def read(shape: tuple[int, ...]) -> fx.Node:
        inputs.append(torch.randn(shape, generator=draw))
        return graph.placeholder(f"x{len(inputs)}")

    for place in range(copies):
        source = outputs[-1] if row and outputs else read(_in_shape(signature))
        layers[f"layer{place}"] = _torch_layer(signature, draw)
        value = graph.call_module(f"layer{place}", (source,))
        if signature.joined:
            value = graph.call_function(operator.add, (value, source if row else read(_out_shape(signature))))
        outputs.append(value)
    graph.output(tuple(outputs[-1:] if row else outputs))
    return fx.GraphModule(layers, graph).eval(), tuple(inputs)


def _torch_layer(signature: LayerSignature, draw: torch.Generator) -> nn.Sequential:
    geometry = signature.geometry
    weight = torch.randn(geometry.weight_shape, generator=draw) * _scale(signature)
    conv, sides = ConvMap(geometry, weight, torch.zeros(geometry.out_channels)).to_conv()
    layers: list[nn.Module] = [conv]
    if sides is not None:
        layers.insert(0, _PADS[geometry.dims](tuple(as_torch_pad(*sides)), 0.0))
    if signature.activation is not None:
        layers.append(getattr(nn, signature.activation)())
    return nn.Sequential(*layers)


def onnx_copies(
    signature: LayerSignature, copies: int, precision: str = "float32"
) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    """Copies of a layer as a serialised ONNX model, sizes fixed, and its inputs by name, in float32.

    The whole model is in the precision, inputs and outputs too: copies that stand side by side would each have casts around them.
    An activation that ONNX has no operator for is left out.
    """
    from onnx import helper

    row, draw, kind = in_a_row(signature), np.random.default_rng(0), _onnx_type(precision)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, NDArray[Any]] = {}
    feeds: dict[str, NDArray[np.float32]] = {}
    outputs: list[str] = []

    def read(shape: tuple[int, ...]) -> str:
        feeds[f"x{len(feeds)}"] = draw.standard_normal(shape, dtype=np.float32)
        return list(feeds)[-1]

    for place in range(copies):
        source = outputs[-1] if row and outputs else read(_in_shape(signature))
        outputs.append(f"y{place}")
        target = f"conv{place}" if signature.joined else outputs[-1]
        geometry = signature.geometry
        weight = draw.standard_normal(geometry.weight_shape, dtype=np.float32) * np.float32(_scale(signature))
        bias = np.zeros(geometry.out_channels, dtype=np.float32)
        made, constants = conv_nodes(geometry, weight, bias, source, target, signature.activation, f"layer{place}_")
        nodes += made
        weights |= constants
        if signature.joined:
            other = source if row else read(_out_shape(signature))
            nodes.append(helper.make_node("Add", [target, other], outputs[-1:], name=f"layer{place}_Add"))
    graph = helper.make_graph(
        nodes,
        "copies",
        [helper.make_tensor_value_info(name, kind, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(name, kind, _out_shape(signature)) for name in outputs[-1 if row else 0 :]],
        [_onnx_constant(name, array, precision) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    return model.SerializeToString(), feeds


def _onnx_type(precision: str) -> int:
    from onnx import TensorProto

    types: dict[str, int] = {
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
    }
    return types[precision]


def _onnx_constant(name: str, array: NDArray[Any], precision: str) -> onnx.TensorProto:
    from onnx import helper, numpy_helper

    if array.dtype != np.float32 or precision == "float32":
        return numpy_helper.from_array(array, name)
    short = torch.from_numpy(array).to(getattr(torch, precision))
    return helper.make_tensor(
        name, _onnx_type(precision), array.shape, short.view(torch.int16).numpy().tobytes(), raw=True
    )


def _in_shape(signature: LayerSignature) -> tuple[int, ...]:
    return (signature.batch, signature.geometry.in_channels, *signature.in_size)


def _out_shape(signature: LayerSignature) -> tuple[int, ...]:
    geometry = signature.geometry
    return (signature.batch, geometry.out_channels, *geometry.out_size(signature.in_size))


def _scale(signature: LayerSignature) -> float:
    """Of the weights: outputs as large as inputs, so that a row of copies does not leave the range of half precision."""
    return float(math.prod(signature.geometry.weight_shape[1:]) ** -0.5)
