"""Operators that overwrite values, in an exported graph: which storage they write, and how to do without them."""

from __future__ import annotations

__all__ = ["constant", "functionalise", "lift_borders"]

import math
import operator
import sys
from typing import Any

import torch
from torch import fx, nn

from fxmerge.graph import META, attribute, is_tensor, shape_of
from fxmerge.linear import pad_sides

_aten = torch.ops.aten

_DROPOUTS = (
    _aten.dropout.default,
    _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default,
    _aten.feature_dropout.default,
)
_COPIES = (_aten.lift_fresh_copy.default, _aten.detach.default, _aten.detach_.default)
_ZEROS = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)


def functionalise(gm: fx.GraphModule) -> None:
    """In-place operators become functional; where that could be seen, the values of the storage become ``opaque``."""
    storages = _storages(gm)
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        written = _written(node)
        if written is None:
            continue
        family = [other for other in order if storages[other] == storages[written]]
        functional = _functional(node)
        if functional is None or not _unseen(node, written, family, order):
            for other in family:
                other.meta.setdefault(META, {})["opaque"] = True
            continue
        for reader in list(written.users):
            if order[reader] > order[node]:
                reader.replace_input_with(written, node)
        node.target = functional
        later = [other for other in family if order[other] >= order[node]]
        storages.update(dict.fromkeys(later, node))


def _written(node: fx.Node) -> fx.Node | None:
    """The value that an operator overwrites."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            return value
    return None


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """``aten.relu_`` -> ``aten.relu``; None where there is no functional twin."""
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    twin = getattr(getattr(_aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None
    return twin if isinstance(twin, torch._ops.OpOverload) else None


def _unseen(node: fx.Node, written: fx.Node, family: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether nobody can tell the in-place operator from the functional one."""
    if any(other.op in ("placeholder", "get_attr") for other in family):
        return False
    earlier = [other for other in family if order[other] < order[node] and other is not written]
    return not any(order[reader] > order[node] for other in earlier for reader in other.users)


def _storages(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The first value of the storage that each value lives in, by the alias annotations of the operators' schemas."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        roots[node] = node
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and (node.target is operator.getitem or node.target in _DROPOUTS):
            roots[node] = roots[source]  # a dropout of an eval-mode graph hands its input through
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for value, argument in zip(node.args, node.target._schema.arguments, strict=False):
            if argument.alias_info is not None and isinstance(value, fx.Node):
                roots[node] = roots[value]
                break
    return roots


def constant(gm: fx.GraphModule, model: nn.Module, node: fx.Node) -> float | None:
    """The number that all elements of a value are, where that was settled at capture and nothing overwrites it."""
    if any(_written(user) is node and user.target is not _aten.detach_.default for user in node.users):
        return None
    if node.target in _ZEROS:
        return 0.0
    if node.target in _COPIES and isinstance(node.args[0], fx.Node):
        return constant(gm, model, node.args[0])
    if node.op != "get_attr" or node.target in {
        name for name, _ in (*model.named_parameters(), *model.named_buffers())
    }:
        return None
    tensor = attribute(gm, str(node.target)).flatten()
    return float(tensor[0]) if len(tensor) and bool((tensor == tensor[0]).all()) else None


# --- a border written by slices ---------------------------------------------------------------------------------------

_SLICES = (_aten.slice.Tensor, _aten.select.int)
_WRITES = (_aten.copy_.default, _aten.fill_.Tensor, _aten.fill_.Scalar)
_RESHAPES = (
    _aten.view.default,
    _aten.reshape.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
)


def lift_borders(gm: fx.GraphModule, model: nn.Module) -> None:
    """A zero padding whose border is then overwritten with one value per channel v becomes ``pad(x - v) + v``."""
    storages = _storages(gm)
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    writers = [(node, storages[written]) for node in order if (written := _written(node)) is not None]
    for pad in order:
        views, writes = _views_and_writes(pad)
        if not writes or {_strip(pad, write.args[0]) for write in writes} != _border(pad):
            continue
        values = {_border_value(gm, model, write) for write in writes}
        value = values.pop()
        if values or value is None:
            continue
        if isinstance(value, fx.Node) and value.meta[META]["dtype"] != pad.meta[META]["dtype"]:
            continue
        last = max(writes, key=order.__getitem__)
        reads = [pad.args[0], *(write.args[1] for write in writes)]
        read = {storages[node] for node in reads if isinstance(node, fx.Node)}
        changed = any(order[pad] < order[node] <= order[last] and storage in read for node, storage in writers)
        seen = any(order[user] < order[last] for user in pad.users if user not in views)
        if changed or seen:
            continue
        total = _pad_with(gm, pad, value, last)
        storages[total] = storages[pad]
        for user in list(pad.users):
            if user not in views:
                user.replace_input_with(pad, total)
        for node in (*writes, *reversed(views), pad):
            gm.graph.erase_node(node)


def _views_and_writes(pad: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """All slices of a value and what writes them; no writes where one of the slices is read as well."""
    views, writes = [user for user in pad.users if user.target in _SLICES], []
    for view in views:
        for user in view.users:
            if user.target in _SLICES:
                views.append(user)
            elif user.target in _WRITES and user.args[0] is view and user.args[1] is not view and not user.users:
                writes.append(user)
            else:
                return views, []
    return views, writes


def _border(pad: fx.Node) -> set[tuple[int, int, int] | None]:
    """The strips that a zero padding adds: axis, start and end of each; empty for other operations."""
    sides = pad_sides(pad) if pad.op == "call_function" else None
    if sides is None:
        return set()
    shape = shape_of(pad)[2:]
    starts = {(axis, 0, amount) for axis, amount in enumerate(sides[0], 2) if amount}
    ends = {
        (axis, size - amount, size)
        for axis, (amount, size) in enumerate(zip(sides[1], shape, strict=True), 2)
        if amount
    }
    return {*starts, *ends}


def _strip(pad: fx.Node, view: Any) -> tuple[int, int, int] | None:
    """The one axis in which a slice of a value is narrower than the value, with its range; None for other slices."""
    chain: list[fx.Node] = []
    while view is not pad:
        chain.append(view)
        view = view.args[0]
    # The batch axis is narrowed by every end but "to the end": its size at capture means nothing.
    axes = [(0, sys.maxsize), *enumerate(shape_of(pad)[1:], 1)]
    found = None
    for node in reversed(chain):
        numbers: list[Any] = [*node.args[1:], *[None] * (5 - len(node.args))]
        if node.kwargs or any(isinstance(number, fx.Node) for number in numbers):
            return None
        position, first, *rest = numbers
        axis, size = axes[position]
        if node.target is _aten.select.int:
            start, stop, step = first % size, first % size + 1, 1
            del axes[position]
        else:
            start, stop, step = slice(first, *rest).indices(size)
        if (start, stop, step) == (0, size, 1):
            continue
        if found is not None or step != 1:
            return None
        found = (axis, start, stop)
    return found


def _border_value(gm: fx.GraphModule, model: nn.Module, write: fx.Node) -> fx.Node | float | None:
    """What is written: a number, or the tensor with one element per channel that it was broadcast from."""
    view: Any = write.args[0]
    value: Any = write.args[1]
    if not isinstance(value, fx.Node):
        return float(value)
    number = constant(gm, model, value)
    if number is not None:
        return number
    if value.target is _aten.expand.default:
        value = value.args[0]
    if not is_tensor(value):
        return None
    broadcast = (1,) * (len(shape_of(view)) - len(shape_of(value))) + shape_of(value)
    if any(size != 1 for axis, size in enumerate(broadcast) if axis != 1):
        return None
    while value.target in _RESHAPES:
        value = value.args[0]
    assert isinstance(value, fx.Node)  # noqa: S101 - a view of a tensor
    return value


def _pad_with(gm: fx.GraphModule, pad: fx.Node, value: fx.Node | float, last: fx.Node) -> fx.Node:
    """``pad(x - value) + value``, behind ``last``."""
    shapes = [shape_of(pad.all_input_nodes[0]), shape_of(pad)]
    kept: dict[str, Any] = {key: pad.meta[key] for key in ("nn_module_stack", "stack_trace") if key in pad.meta}

    def call(target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
        node = gm.graph.call_function(target, args)
        node.meta = {**kept, META: {"shape": list(shape), "dtype": pad.meta[META]["dtype"]}}
        return node

    with gm.graph.inserting_before(last.next):
        if isinstance(value, fx.Node):
            shape = (1, math.prod(shape_of(value)), *(1 for _ in shapes[1][2:]))
            value = call(_aten.reshape.default, (value, list(shape)), shape)
        inner = call(_aten.sub.Tensor, (pad.args[0], value), shapes[0])
        padded = call(pad.target, (inner, *pad.args[1:]), shapes[1])
        return call(_aten.add.Tensor, (padded, value), shapes[1])
