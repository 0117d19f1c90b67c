"""Give an exported graph its modules back: ``torch.nn`` calls under the user's names instead of flat aten operators.

What the pass does to the graph of ``torch.export.export(...).module(check_guards=False)``:

1. An in-place operator becomes the functional one, and later readers of the overwritten value read the new one.
2. Case 1 does not apply where it could be seen: the operator writes an input or a parameter, or a view of the same storage
   taken before is read after. Every value of that storage is then marked ``opaque``: no rewrite may touch it.
3. A convolution, linear or norm whose weight is a Parameter of the innermost module it was called in becomes a ``call_module`` of a
   new ``torch.nn`` module that shares that Parameter, under the user's name. Weights computed on the way stay functions.
4. An activation, dropout or pool becomes a module of its own for every call: the user's name where it is the first call of a
   module without children, a generated name otherwise.
5. ``sym_size`` is read from an input wherever the input has the same size, so that a value can be removed later.
6. A non-tensor input is compared with the constant it was at capture.

Needs: the model the graph was exported from (for momentum, tracked statistics and training flags). Leaves in
``node.meta["fxmerge"]``: ``id``, and for tensors ``shape`` and ``dtype``, ``opaque`` where case 2 held.
"""

from __future__ import annotations

__all__ = ["CanonicalisePass", "canonicalise"]

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.graph import META, shape_of

from ._base import GraphPass

aten = torch.ops.aten

_CONV = {
    overload: module
    for dims, module in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
    for overload in (getattr(aten, f"conv{dims}d").default, getattr(aten, f"conv{dims}d").padding)
}
_BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_ACTIVATIONS: dict[Any, Callable[..., nn.Module]] = {
    aten.relu.default: nn.ReLU,
    aten.relu6.default: nn.ReLU6,
    aten.silu.default: nn.SiLU,
    aten.mish.default: nn.Mish,
    aten.hardswish.default: nn.Hardswish,
    aten.hardsigmoid.default: nn.Hardsigmoid,
    aten.sigmoid.default: nn.Sigmoid,
    aten.tanh.default: nn.Tanh,
    aten.gelu.default: lambda approximate="none": nn.GELU(approximate),
    aten.leaky_relu.default: nn.LeakyReLU,
    aten.elu.default: lambda alpha=1.0, scale=1, input_scale=1: nn.ELU(alpha),
    aten.celu.default: lambda alpha=1.0: nn.CELU(alpha),
    aten.selu.default: nn.SELU,
    aten.softplus.default: nn.Softplus,
    aten.hardtanh.default: nn.Hardtanh,
    aten.log_sigmoid.default: nn.LogSigmoid,
}
_DROPOUTS: dict[Any, type[nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
}


def _pools() -> dict[Any, Callable[..., nn.Module]]:
    table: dict[Any, Callable[..., nn.Module]] = {}
    for dims in (1, 2, 3):
        table[getattr(aten, f"max_pool{dims}d").default] = getattr(nn, f"MaxPool{dims}d")
        table[getattr(aten, f"avg_pool{dims}d").default] = getattr(nn, f"AvgPool{dims}d")
        table[getattr(aten, f"adaptive_avg_pool{dims}d").default] = getattr(
            nn, f"AdaptiveAvgPool{dims}d"
        )
    return table


_POOLS = _pools()


class CanonicalisePass(GraphPass):
    """Flat aten operators of an exported graph become ``torch.nn`` modules under the user's names; see the module's cases.

    Attributes:
        model: the module the graph was exported from.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the pass in place."""
        return PassResult(graph_module, canonicalise(graph_module, self.model))


def canonicalise(gm: fx.GraphModule, model: nn.Module) -> bool:
    """Rewrite ``gm`` in place as the module docstring says; True if anything changed."""
    before = [(node.op, node.target) for node in gm.graph.nodes]
    _record_values(gm)
    _functionalise(gm)
    _read_sizes_from_inputs(gm)
    _Modules(gm, model).install()
    _check_constants(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    _name(gm)
    gm.graph.lint()
    gm.recompile()
    return before != [(node.op, node.target) for node in gm.graph.nodes]


def _record_values(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
            node.meta[META] = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
        elif isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
            node.meta[META] = {"parts": len(value)}


# --- in-place operators ---------------------------------------------------------------------------------------------------


def _functionalise(gm: fx.GraphModule) -> None:
    storages = _storages(gm)
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not _writes(node):
            continue
        written = node.args[0]
        family = [other for other in order if storages.get(other) == storages[written]]
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


def _writes(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and bool(node.args)
        and isinstance(node.args[0], fx.Node)
    )


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """``aten.relu_`` -> ``aten.relu``; None where there is no functional twin."""
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    twin = (
        getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if packet.endswith("_")
        else None
    )
    return twin if isinstance(twin, torch._ops.OpOverload) else None


def _unseen(
    node: fx.Node, written: fx.Node, family: list[fx.Node], order: dict[fx.Node, int]
) -> bool:
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
        if node.target is operator.getitem:
            roots[node] = roots[node.args[0]]
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for value, argument in zip(node.args, node.target._schema.arguments, strict=False):
            if argument.alias_info is not None and isinstance(value, fx.Node):
                roots[node] = roots[value]
                break
    return roots


# --- symbolic sizes and constants ------------------------------------------------------------------------------------------


def _read_sizes_from_inputs(gm: fx.GraphModule) -> None:
    inputs = {
        str(size): (node, axis)
        for node in reversed(gm.graph.find_nodes(op="placeholder"))
        if isinstance(node.meta.get("val"), Tensor)
        for axis, size in enumerate(node.meta["val"].shape)
        if not isinstance(size, int)
    }
    for node in gm.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        source = inputs.get(str(node.meta.get("val")))
        if source is not None:
            node.args = source


def _check_constants(gm: fx.GraphModule) -> None:
    """Non-tensor inputs were baked into the graph: calling with others must not go unnoticed."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not placeholders:
        return
    with gm.graph.inserting_after(placeholders[-1]):
        for node in reversed(placeholders):
            value = node.meta.get("val")
            if not isinstance(value, (bool, int, float, str)):
                continue
            node.meta[META] = {"constant": value}
            equal = gm.graph.call_function(operator.eq, (node, value))
            message = f"input {node.name!r} was {value!r} at capture and is a constant of this graph: capture again"
            equal.append(gm.graph.create_node("call_function", torch._assert, (equal, message)))


# --- modules ---------------------------------------------------------------------------------------------------------------


class _Modules:
    """Builds the modules of one graph; holds what naming them needs."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module) -> None:
        self.gm = gm
        self.model = model
        self.users = dict(model.named_modules(remove_duplicate=False))
        self.taken = {*self.users, *model.state_dict(keep_vars=True)}
        self.built: dict[str, nn.Module] = {}
        self.called: set[str] = set()
        self.containers = {name for name, _ in gm.named_modules(remove_duplicate=False)}

    def install(self) -> None:
        """Replace every operator that has a module, then put the modules into the graph module."""
        for node in list(self.gm.graph.nodes):
            if node.op != "call_function" or node.meta.get(META, {}).get("opaque"):
                continue
            if node.target in _CONV:
                self._parameterised(node, 1, self._convolution)
            elif node.target is aten.linear.default:
                self._parameterised(node, 1, self._linear)
            elif node.target is aten.batch_norm.default:
                self._parameterised(node, 1, self._batch_norm)
            elif node.target is aten.layer_norm.default:
                self._parameterised(node, 2, self._layer_norm)
            elif node.target is aten.group_norm.default:
                self._parameterised(node, 2, self._group_norm)
            elif node.target is aten.prelu.default:
                self._parameterised(node, 1, self._prelu)
            elif node.target in _ACTIVATIONS:
                self._own(node, _call(_ACTIVATIONS[node.target], node))
            elif node.target in _POOLS:
                self._own(node, _call(_POOLS[node.target], node))
            elif node.target in _DROPOUTS:
                self._own(node, _DROPOUTS[node.target](node.args[1]))
        for path, module in self.built.items():
            self._attach(path, module)

    def _parameterised(
        self,
        node: fx.Node,
        position: int,
        build: Callable[[fx.Node, Tensor | None, Tensor | None], nn.Module | None],
    ) -> None:
        """Case 3: the operator's weight and bias must be the innermost user module's own."""
        path = _innermost(node)
        owner = self.users.get(path)
        operands = [node.args[k] if len(node.args) > k else None for k in (position, position + 1)]
        if node.target is aten.prelu.default:
            operands[1] = None
        tensors = [self._fetch(operand) for operand in operands]
        weight, bias = (getattr(owner, name, None) for name in ("weight", "bias"))
        if owner is None or not path or tensors[0] is not weight:
            return
        if operands[1] is not None and (tensors[1] is None or tensors[1] is not bias):
            return
        if path not in self.built:
            module = build(node, tensors[0], tensors[1])
            if module is None:
                return
            for name, tensor in (("weight", weight), ("bias", tensors[1])):
                if isinstance(tensor, nn.Parameter):
                    setattr(module, name, tensor)
                elif tensor is not None:
                    return
            module.training = owner.training
            self.built[path] = module
        self._replace(node, path)

    def _own(self, node: fx.Node, module: nn.Module) -> None:
        """Case 4: a module for this call alone."""
        path = _innermost(node)
        owner = self.users.get(path)
        alone = (
            owner is not None
            and bool(path)
            and not any(owner.children())
            and not any(owner.parameters())
        )
        if not alone or path in self.called:
            path = self._free(path, type(module).__name__.lower() if not alone else "")
        module.training = owner.training if owner is not None else self.model.training
        self.called.add(path)
        self.built[path] = module
        self._replace(node, path)

    def _free(self, path: str, name: str) -> str:
        stem = f"{path}.{name}" if path and name else path or name
        candidate, count = stem if name else f"{stem}_1", 1
        while candidate in self.taken or candidate in self.built:
            count += 1
            candidate = f"{stem}_{count}"
        return candidate

    def _replace(self, node: fx.Node, path: str) -> None:
        node.op, node.target = "call_module", path
        node.args, node.kwargs = (node.args[0],), {}

    def _fetch(self, operand: object) -> Tensor | None:
        if not isinstance(operand, fx.Node) or operand.op != "get_attr":
            return None
        value = operator.attrgetter(str(operand.target))(self.gm)
        return value if isinstance(value, Tensor) else None

    def _attach(self, path: str, module: nn.Module) -> None:
        """Put a module at its path; children and tensors that other nodes still use stay where they are."""
        old = self.gm.get_submodule(path) if path in self.containers else nn.Module()
        self.gm.add_submodule(path, module)
        for name, child in old.named_children():
            module.add_module(name, child)
        for name, tensor in (
            *old.named_parameters(recurse=False),
            *old.named_buffers(recurse=False),
        ):
            if not hasattr(module, name):
                setattr(module, name, tensor)

    def _convolution(
        self, node: fx.Node, weight: Tensor | None, bias: Tensor | None
    ) -> nn.Module | None:
        if weight is None:
            return None
        defaults = (None, None, None, 1, 0, 1, 1)
        _, _, _, stride, padding, dilation, groups = (*node.args, *defaults[len(node.args) :])
        kind = _CONV[node.target]
        dims = weight.ndim - 2
        return kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            _tuple(stride, dims),
            padding if isinstance(padding, str) else _tuple(padding, dims),
            _tuple(dilation, dims),
            groups,
            bias is not None,
            device="meta",
        )

    def _prelu(self, node: fx.Node, weight: Tensor | None, bias: Tensor | None) -> nn.Module | None:
        del node, bias
        return None if weight is None else nn.PReLU(weight.numel(), device="meta")

    def _linear(
        self, node: fx.Node, weight: Tensor | None, bias: Tensor | None
    ) -> nn.Module | None:
        del node
        if weight is None:
            return None
        return nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")

    def _batch_norm(
        self, node: fx.Node, weight: Tensor | None, bias: Tensor | None
    ) -> nn.Module | None:
        if (weight is None) != (bias is None):
            return None
        owner = self.users[_innermost(node)]
        mean, variance = self._fetch(node.args[3]), self._fetch(node.args[4])
        tracked = mean is not None
        if mean is not getattr(owner, "running_mean", None) or variance is not getattr(
            owner, "running_var", None
        ):
            return None
        module = _BATCH_NORM[len(shape_of(node))](
            shape_of(node)[1],
            eps=node.args[7],
            momentum=getattr(owner, "momentum", 0.1),
            affine=weight is not None,
            track_running_stats=tracked,
            device="meta",
        )
        if tracked:
            module.running_mean, module.running_var = mean, variance
            counter = getattr(owner, "num_batches_tracked", None)
            module.num_batches_tracked = (
                torch.zeros((), dtype=torch.long) if counter is None else counter
            )
        return module

    def _layer_norm(
        self, node: fx.Node, weight: Tensor | None, bias: Tensor | None
    ) -> nn.Module | None:
        if weight is None:
            return None
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        return nn.LayerNorm(tuple(node.args[1]), eps, bias=bias is not None, device="meta")

    def _group_norm(
        self, node: fx.Node, weight: Tensor | None, bias: Tensor | None
    ) -> nn.Module | None:
        if weight is None or bias is None:
            return None
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        return nn.GroupNorm(node.args[1], weight.numel(), eps, device="meta")


def _innermost(node: fx.Node) -> str:
    """Path of the innermost module the operator was called in; the root's is empty."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _call(factory: Callable[..., nn.Module], node: fx.Node) -> nn.Module:
    return factory(*node.args[1:], **node.kwargs)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return numbers * dims if len(numbers) == 1 else numbers


# --- names -----------------------------------------------------------------------------------------------------------------


def _name(gm: fx.GraphModule) -> None:
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        name = _plain_name(node)
        count = counts[name]
        counts[name] += 1
        node.meta.setdefault(META, {})["id"] = f"{name}#{count}" if count else name


def _plain_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    function = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    path = _innermost(node)
    return f"{path}/{function}" if path and not path.startswith("_empty") else function
