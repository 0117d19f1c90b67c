"""Small edits of a canonical graph that keep its ids and shapes true."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .algebra import Conv, as_torch_pad
from .graph import CONVOLUTIONS, META, by_id, module_of, node_id, shape_of
from .linear import conv_geometry, is_filter

__all__ = [
    "insert_activation",
    "insert_behind",
    "insert_pad",
    "insert_side",
    "join_operands",
    "move_behind",
    "set_join_operand",
    "take_padding",
    "unpadded",
]


def insert_pad(
    gm: fx.GraphModule,
    source: fx.Node,
    left: Sequence[int],
    right: Sequence[int],
    before: fx.Node | None = None,
) -> fx.Node:
    """A new operation that pads ``source`` with zeros, or crops it where a number is negative; nothing reads it yet.

    It stands right behind ``source``, or in front of ``before``.
    """
    with gm.graph.inserting_before(before) if before else gm.graph.inserting_after(source):
        pad = gm.graph.call_function(F.pad, (source, as_torch_pad(left, right)))
    batch, channels, *size = shape_of(source)
    padded = [n + a + b for n, a, b in zip(size, left, right, strict=True)]
    name = _unused(f"{node_id(source)}/pad", by_id(gm))
    pad.meta[META] = {"id": name, "shape": [batch, channels, *padded], "dtype": source.meta[META]["dtype"]}
    return pad


def insert_activation(gm: fx.GraphModule, value: fx.Node, activation: nn.Module, path: str) -> fx.Node:
    """A new call of ``activation``, under ``path`` or the next free name, that every reader of ``value`` reads instead.

    A PReLU with one slope for each of other channels is made anew, with the mean slope.
    """
    channels = shape_of(value)[1]
    if isinstance(activation, nn.PReLU) and activation.num_parameters not in (1, channels):
        slopes = activation.weight.detach()
        fitted = nn.PReLU(channels, device=slopes.device, dtype=slopes.dtype).train(activation.training)
        fitted.load_state_dict({"weight": slopes.mean().expand(channels)})
        activation = fitted
    return insert_behind(gm, value, activation, path)


def insert_behind(gm: fx.GraphModule, value: fx.Node, module: nn.Module, path: str) -> fx.Node:
    """A new call of ``module``, under ``path`` or the next free name, that every reader of ``value`` reads instead."""
    path = _unused(path, {name for name, _ in gm.named_modules()} | by_id(gm).keys())
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(value):
        node = gm.graph.call_module(path, (value,))
    value.replace_all_uses_with(node, delete_user_cb=lambda reader: reader is not node)
    node.meta[META] = {**value.meta[META], "id": path}
    return node


def move_behind(value: fx.Node, node: fx.Node) -> None:
    """Let an operation that nobody reads any more work on ``value`` instead, and every reader of ``value`` read it."""
    readers = [reader for reader in value.users if reader is not node]
    node.args = (value, *node.args[1:])
    value.append(node)
    for reader in readers:
        reader.replace_input_with(value, node)
    node.meta[META] = {**node.meta[META], "shape": list(shape_of(value))}


def insert_side(gm: fx.GraphModule, value: fx.Node, side: fx.Node, matrix: Tensor, path: str) -> fx.Node:
    """``value`` plus ``matrix`` times a side input of shape (N or 1, channels, 1, ...), at every position.

    The matrix becomes a linear layer under ``path`` or the next free name. The operations stand where the graph inserts;
    nothing reads the result yet.
    """
    dims = len(shape_of(side)) - 2
    dtype = side.meta[META]["dtype"]
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype, device=matrix.device
    )
    layer.load_state_dict({"weight": matrix})
    path = _unused(path, {name for name, _ in gm.named_modules()} | by_id(gm).keys())
    gm.add_submodule(path, layer.eval())
    batch = shape_of(side)[0]
    steps: list[tuple[fx.Node, str, list[int]]] = []
    flat = gm.graph.call_function(torch.ops.aten.flatten.using_ints, (side, 1))
    steps.append((flat, f"{path}/flatten", [batch, matrix.shape[1]]))
    mapped = gm.graph.call_module(path, (flat,))
    steps.append((mapped, path, [batch, matrix.shape[0]]))
    for axis in range(dims):
        mapped = gm.graph.call_function(torch.ops.aten.unsqueeze.default, (mapped, -1))
        steps.append((mapped, f"{path}/unsqueeze#{axis}", [batch, matrix.shape[0], *[1] * (axis + 1)]))
    total = gm.graph.call_function(torch.ops.aten.add.Tensor, (value, mapped))
    steps.append((total, f"{path}/add", list(shape_of(value))))
    for node, name, shape in steps:
        node.meta[META] = {"id": name, "shape": shape, "dtype": dtype}
    return total


def _unused(stem: str, taken: Container[str]) -> str:
    """``stem``, or the first of ``stem_1``, ``stem_2``, ... that is not taken."""
    numbered = (f"{stem}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def join_operands(join: fx.Node) -> list[fx.Node]:
    """The values that an addition, multiplication or concatenation joins, in order; numbers among them are left out."""
    first = join.args[0]
    operands = first if isinstance(first, (list, tuple)) else join.args[:2]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def set_join_operand(join: fx.Node, position: int, value: fx.Node) -> None:
    """Let a join read ``value`` in one position; unlike ``replace_input_with``, in that one alone."""
    first = join.args[0]
    if isinstance(first, (list, tuple)):
        join.update_arg(0, [*first[:position], value, *first[position + 1 :]])
    else:
        join.update_arg(position, value)


def take_padding(gm: fx.GraphModule, node: fx.Node) -> None:
    """Take the padding off a convolution or average pooling, of a module or of a function; others are left alone."""
    module = module_of(gm, node)
    if isinstance(module, CONVOLUTIONS):
        gm.add_submodule(str(node.target), unpadded(module))
    elif isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        bare = copy.copy(module)
        bare.padding = 0 if isinstance(bare.padding, int) else (0,) * len(bare.padding)  # type: ignore[assignment]
        gm.add_submodule(str(node.target), bare)
    elif module is None and len(node.args) > 4 and is_filter(node):
        node.update_arg(4, [0] * (len(shape_of(node)) - 2))


def unpadded(module: Conv) -> Conv:
    """The same convolution without padding, sharing its Parameters.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3, padding=1)
        >>> unpadded(conv), unpadded(conv).weight is conv.weight
        (Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)), True)
    """
    geometry = conv_geometry(module)
    with torch.device("meta"):  # its own weights are replaced at once
        bare = type(module)(
            geometry.in_channels,
            geometry.out_channels,
            geometry.kernel,  # type: ignore[arg-type]
            geometry.stride,  # type: ignore[arg-type]
            dilation=geometry.dilation,  # type: ignore[arg-type]
            groups=geometry.groups,
            bias=module.bias is not None,
        )
    bare.weight = module.weight
    if isinstance(module.bias, nn.Parameter):
        bare.bias = module.bias
    bare.training = module.training
    return bare
