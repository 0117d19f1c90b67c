"""Recognise activations and channel shuffles that were written out by hand: each becomes the ``torch.nn`` module.

In the formulas sums and products stand in any order, differences and quotients by a number for sums and products, and
constants are equal up to 1e-6 of their size; relu6, ``clamp`` and Hardtanh are one thing.

1. ``x * sigmoid(x)`` is SiLU.
2. ``relu6(x + 3) / 6``, ``clamp(x / 6 + 0.5, 0, 1)`` and ``clamp((x + 3) / 6, 0, 1)`` are Hardsigmoid.
3. ``x`` times any of these, or times a Hardsigmoid, is Hardswish; so is ``x * relu6(x + 3) / 6``.
4. ``x * tanh(softplus(x))`` is Mish.
5. ``0.5 * x * (1 + erf(x / sqrt(2)))`` is GELU.
6. ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))`` is the GELU of ``approximate="tanh"``, with ``x`` taken
   out of the inner bracket too.
7. ``x - tanh(x)`` is Tanhshrink, ``x / (1 + abs(x))`` is Softsign (``torch.nn``'s own are traced like that).
8. ``view(N, g, C / g, ...)``, ``transpose(1, 2)``, ``view(N, C, ...)`` is ChannelShuffle: also with ``reshape``,
   ``permute``, ``flatten`` and a copy in between.
9. ``split`` and ``chunk`` along the channels are a slice for each part that is read, so that every operation has one value.

Left alone: a value on the way that something else reads, or that is opaque; a gate ``x * sigmoid(y)``; integers; a formula
of which some operations carry another ``removable`` tag (:mod:`fxmerge.removable`) than the rest.

Needs: a graph of the canonicalise pass, and the model that was captured (for names, which follow that pass's rule). The new
module's node keeps the ``node.meta["fxmerge"]`` of the formula's last one, a ``removable`` tag included; ids are written
anew. A second run changes nothing.
"""

from __future__ import annotations

__all__ = ["RecognisePass", "recognise"]

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.graph import META, is_tensor, module_of, shape_of
from fxmerge.passes._base import GraphPass
from fxmerge.passes._modules import Names, attach, name_nodes

_aten = torch.ops.aten
_LONGEST = 12
"""More operations than any of the formulas has."""
_WIDEST = 4
"""More terms or factors than any of them has: powers of powers would have thousands."""


class RecognisePass(GraphPass):
    """Formulas become the ``torch.nn`` modules that compute the same; see the module docstring for the cases.

    Attributes:
        model: the module that was captured.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the pass in place."""
        return PassResult(graph_module, recognise(graph_module, self.model))


def recognise(gm: fx.GraphModule, model: nn.Module) -> bool:
    """Rewrite ``gm`` in place as the module docstring says; True if anything changed."""
    calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    names = Names(model, calls)
    changed = False
    for node in list(gm.graph.nodes):
        if _slice_parts(node):
            changed = True
            continue
        found = _shuffle(node) or _activation(gm, node)
        if found is not None and _replaceable(found, node):
            _replace(gm, names, calls, node, found)
            changed = True
    if changed:
        gm.delete_all_unused_submodules()
        name_nodes(gm)
        gm.graph.lint()
        gm.recompile()
    return changed


@dataclass(frozen=True)
class _Found:
    """What a node computes: ``module`` of ``source``, by way of the operations ``inside`` (the node is one of them)."""

    source: fx.Node
    inside: frozenset[fx.Node]
    module: nn.Module


def _replaceable(found: _Found, node: fx.Node) -> bool:
    data = [other.meta.get(META, {}) for other in found.inside]
    return (
        all(user in found.inside for other in found.inside - {node} for user in other.users)
        and not any("opaque" in entry for entry in (*data, found.source.meta[META]))
        and len({entry.get("removable") for entry in data}) == 1
    )


def _replace(gm: fx.GraphModule, names: Names, calls: Counter[str], node: fx.Node, found: _Found) -> None:
    calls.subtract(str(other.target) for other in found.inside if other.op == "call_module")
    names.used -= {str(other.target) for other in found.inside if not calls[str(other.target)]}
    path = names.name(node, found.module)
    calls[path] += 1
    node.op, node.target, node.args, node.kwargs = "call_module", path, (found.source,), {}
    for other in sorted(found.inside - {node}, reverse=True):
        gm.graph.erase_node(other)
    attach(gm, path, found.module)


# --- formulas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Formula:
    """A function of x. Sums and products are flat, with their constant as ``number``."""

    kind: str
    parts: tuple[_Formula, ...] = ()
    number: float = 0.0

    def __add__(self, other: _Formula | float) -> _Formula:
        return _joined("sum", 0.0, (self, _formula(other)))

    def __mul__(self, other: _Formula | float) -> _Formula:
        return _joined("product", 1.0, (self, _formula(other)))

    def __sub__(self, other: _Formula | float) -> _Formula:
        return self + _formula(other) * -1.0

    def __truediv__(self, other: _Formula | float) -> _Formula:
        other = _formula(other)
        if other.kind != "number":
            return self * _Formula("reciprocal", (other,))
        return self * (1 / other.number) if other.number else _Formula("quotient by zero", (self,))

    def __pow__(self, exponent: _Formula | float) -> _Formula:
        number = _formula(exponent).number
        return self * self ** (number - 1) if number in (2, 3) else self if number == 1 else _Formula("power", (self,))

    def same(self, other: _Formula) -> bool:
        """Whether both are one function, sums and products in any order."""
        if self.kind != other.kind or len(self.parts) != len(other.parts):
            return False
        if not math.isclose(self.number, other.number, rel_tol=1e-6):
            return False
        orders = itertools.permutations(other.parts) if self.kind in ("sum", "product") else (other.parts,)
        return any(all(map(_Formula.same, self.parts, order)) for order in orders)


def _formula(value: _Formula | float) -> _Formula:
    return value if isinstance(value, _Formula) else _Formula("number", (), float(value))


def _joined(kind: str, neutral: float, items: tuple[_Formula, ...]) -> _Formula:
    """The sum or product of some formulas, sums in a sum and products in a product taken apart."""
    number = neutral
    parts: list[_Formula] = []
    for item in items:
        if item.kind in (kind, "number"):
            number = number + item.number if kind == "sum" else number * item.number
            parts += item.parts
        else:
            parts.append(item)
    if not parts:
        return _formula(number)
    return parts[0] if len(parts) == 1 and number == neutral else _Formula(kind, tuple(parts), number)


def _function(kind: str) -> Callable[..., _Formula]:
    return lambda *values: _Formula(kind, tuple(_formula(value) for value in values))


_X = _Formula("x")
_sigmoid, _hardsigmoid, _tanh, _softplus, _erf, _abs, _clamp = map(
    _function, ("sigmoid", "hardsigmoid", "tanh", "softplus", "erf", "abs", "clamp")
)
_TANH_GELU = math.sqrt(2 / math.pi)

_ACTIVATIONS: tuple[tuple[_Formula, Callable[[], nn.Module]], ...] = (
    (_X * _sigmoid(_X), nn.SiLU),
    (_clamp(_X + 3, 0, 6) / 6, nn.Hardsigmoid),
    (_clamp(_X / 6 + 0.5, 0, 1), nn.Hardsigmoid),
    (_clamp((_X + 3) / 6, 0, 1), nn.Hardsigmoid),
    (_X * _hardsigmoid(_X), nn.Hardswish),
    (_X * _clamp(_X + 3, 0, 6) / 6, nn.Hardswish),
    (_X * _tanh(_softplus(_X)), nn.Mish),
    (_X * (_erf(_X / math.sqrt(2)) + 1) / 2, nn.GELU),
    (_X * (_tanh((_X + _X**3 * 0.044715) * _TANH_GELU) + 1) / 2, lambda: nn.GELU("tanh")),
    (_X * (_tanh(_X * (_X**2 * 0.044715 + 1) * _TANH_GELU) + 1) / 2, lambda: nn.GELU("tanh")),
    (_X - _tanh(_X), nn.Tanhshrink),
    (_X / (_abs(_X) + 1), nn.Softsign),
)

_OPERATORS: dict[Any, Callable[..., _Formula]] = {
    _aten.add.Tensor: lambda a, b, alpha=1: a + b * alpha,
    _aten.add.Scalar: lambda a, b, alpha=1: a + b * alpha,
    _aten.sub.Tensor: lambda a, b, alpha=1: a - b * alpha,
    _aten.sub.Scalar: lambda a, b, alpha=1: a - b * alpha,
    _aten.rsub.Scalar: lambda a, b, alpha=1: b - a * alpha,
    _aten.mul.Tensor: lambda a, b: a * b,
    _aten.mul.Scalar: lambda a, b: a * b,
    _aten.div.Tensor: lambda a, b: a / b,
    _aten.div.Scalar: lambda a, b: a / b,
    _aten.reciprocal.default: lambda a: _formula(1.0) / a,
    _aten.neg.default: lambda a: a * -1.0,
    _aten.pow.Tensor_Scalar: lambda a, b: a**b,
    _aten.square.default: lambda a: a**2,
    _aten.erf.default: _erf,
    _aten.abs.default: _abs,
}


def _operation(gm: fx.GraphModule, node: fx.Node) -> Callable[..., _Formula] | None:
    """What an operation does to formulas; None for all but arithmetic and a few activations."""
    module = module_of(gm, node)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        low, high = module.min_val, module.max_val
        return lambda value: _clamp(value, low, high)
    if isinstance(module, nn.Softplus):
        return _softplus if (module.beta, module.threshold) == (1, 20) else None
    for kind, operation in ((nn.Sigmoid, _sigmoid), (nn.Hardsigmoid, _hardsigmoid), (nn.Tanh, _tanh)):
        if isinstance(module, kind):
            return operation
    return _OPERATORS.get(node.target) if node.op == "call_function" else None


def _activation(gm: fx.GraphModule, node: fx.Node) -> _Found | None:
    """Cases 1 to 7: the value is tried as a formula of each of the values it is computed from, the nearest first."""
    if not is_tensor(node) or "float" not in node.meta[META]["dtype"] or _operation(gm, node) is None:
        return None
    for source in _sources(gm, node):
        inside: set[fx.Node] = set()
        formula = _read(gm, node, source, inside)
        for known, kind in _ACTIVATIONS:
            if formula is not None and formula.same(known):
                return _Found(source, frozenset(inside), kind())
    return None


def _sources(gm: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Values of one shape and type that a value is computed from, by as many operations as a formula may have."""
    pending, seen = [node], {node}
    for other in itertools.islice(pending, _LONGEST):
        between = other is node or all(user <= node and _operation(gm, user) is not None for user in other.users)
        for source in other.all_input_nodes if between and _operation(gm, other) is not None else ():
            same = is_tensor(source) and all(
                source.meta[META][key] == node.meta[META][key] for key in ("shape", "dtype")
            )
            if same and source not in seen:
                seen.add(source)
                pending.append(source)
                yield source


def _read(gm: fx.GraphModule, value: Any, source: fx.Node, inside: set[fx.Node]) -> _Formula | None:
    """A value as a formula of ``source``, None where it is not one; the operations on the way are added to ``inside``."""
    if value is source:
        return _X
    if not isinstance(value, fx.Node):
        return _formula(value) if isinstance(value, (int, float)) else None
    operation = _operation(gm, value)
    if operation is None or len(inside) > _LONGEST:
        return None
    inside.add(value)
    arguments: list[_Formula] = []
    for argument in (*value.args, *value.kwargs.values()):
        formula = _read(gm, argument, source, inside)
        if formula is None:
            return None
        arguments.append(formula)
    formula = operation(*arguments)
    return formula if len(formula.parts) <= _WIDEST else None


# --- channel shuffle --------------------------------------------------------------------------------------------------

_VIEWS = (_aten.view.default, _aten.reshape.default)
_COPIES = (_aten.contiguous.default, _aten.clone.default)
_SWAPS = (_aten.transpose.int, _aten.permute.default)


def _shuffle(node: fx.Node) -> _Found | None:
    """Case 8."""
    if node.target not in (*_VIEWS, _aten.flatten.using_ints):
        return None
    swapped: Any = node.args[0]
    inside = {node}
    if swapped.target in _COPIES:
        inside.add(swapped)
        swapped = swapped.args[0]
    split: Any = swapped.args[0] if swapped.target in _SWAPS else None
    if not isinstance(split, fx.Node) or split.target not in _VIEWS or not _is_sized(split) or not _is_sized(node):
        return None
    source = split.all_input_nodes[0]
    if not 1 < len(shape_of(source)) < len(shape_of(split)):
        return None
    batch, channels, *size = shape_of(source)
    groups = shape_of(split)[1]
    shapes = [shape_of(view) for view in (split, swapped, node)]
    rest = channels // max(groups, 1)
    expected = [(batch, groups, rest, *size), (batch, rest, groups, *size), (batch, channels, *size)]
    if shapes != expected or not _swaps_channels(swapped):
        return None
    return _Found(source, frozenset(inside | {swapped, split}), nn.ChannelShuffle(groups))


def _is_sized(node: fx.Node) -> bool:
    """Whether all axes but the batch are numbers: they then say that the batch is the batch, whatever its size."""
    value = node.meta.get("val")
    return value is not None and all(isinstance(size, int) for size in value.shape[1:])


def _swaps_channels(node: fx.Node) -> bool:
    axes = list(range(len(shape_of(node))))
    options: Any = node.args[1:]
    if node.target is _aten.transpose.int:
        return sorted(axes[axis] for axis in options) == [1, 2]
    return [axes[axis] for axis in options[0]] == [0, 2, 1, *axes[3:]]


# --- splits -----------------------------------------------------------------------------------------------------------


def _slice_parts(node: fx.Node) -> bool:
    """Case 9: the parts of a split become slices, and the split goes; whether it was one."""
    starts = _parts(node)
    readers = list(node.users)
    if starts is None or "opaque" in node.meta[META] or not all(each.target is operator.getitem for each in readers):
        return False
    for part in readers:
        index: Any = part.args[1]
        part.target, part.args = _aten.slice.Tensor, (node.args[0], 1, starts[index], starts[index + 1])
    node.graph.erase_node(node)
    return True


def _parts(node: fx.Node) -> list[int] | None:
    """Where the parts of a split along axis 1 begin, and the last one ends; None for other operations."""
    if node.target not in (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default) or node.kwargs:
        return None
    source: Any = node.args[0]
    if not is_tensor(source) or len(node.args) != 3 or node.args[2] not in (1, 1 - len(shape_of(source))):
        return None
    channels, sizes = shape_of(source)[1], node.args[1]
    if isinstance(sizes, (list, tuple)):
        return list(itertools.accumulate(sizes, initial=0))
    if not isinstance(sizes, int) or channels == 0:
        return None
    step = math.ceil(channels / sizes) if node.target is _aten.chunk.default else sizes
    return [*range(0, channels, step), channels]
