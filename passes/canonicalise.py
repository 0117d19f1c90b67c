"""Give an exported graph its modules back: ``torch.nn`` calls under the user's names instead of flat aten operators.

What the pass does to the graph of ``torch.export.export(...).module(check_guards=False)``:

1. An in-place operator becomes the functional one, and later readers of the overwritten value read the new one.
2. Case 1 does not apply where it could be seen: the operator writes an input or a parameter, or a view of the same
   storage taken before is read after. Every value of that storage is then marked ``opaque``: no rewrite may touch it.
3. A convolution, linear or norm whose weight is a Parameter of the innermost module it was called in becomes a
   ``call_module`` of a new ``torch.nn`` module that shares that Parameter, under the user's name. Weights computed on
   the way stay functions, and so does a second call with other options.
4. An activation, dropout or pool becomes a module of its own for every call: the user's name where it is the first call
   of a module without children, a generated name otherwise.
5. ``sym_size`` is read from an input wherever the input has the same size, so that a value can be removed later.
6. A non-tensor input is compared with the constant it was at capture.
7. Buffers that are not in the model's ``state_dict``, and constants, stay out of the graph's.

Needs: the model the graph was exported from (for momentum, tracked statistics and training flags). Leaves in
``node.meta["fxmerge"]``: ``id``, and for tensors ``shape`` and ``dtype``, ``opaque`` where case 2 held. A second run
changes nothing.
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
from fxmerge.passes._base import GraphPass

_aten = torch.ops.aten
_Options = dict[str, Any]


class CanonicalisePass(GraphPass):
    """Flat aten operators of an exported graph become ``torch.nn`` modules; see the module docstring for the cases.

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
    before = _nodes(gm)
    _record_values(gm)
    _functionalise(gm)
    _read_sizes_from_inputs(gm)
    _Modules(gm, model).install()
    _check_constants(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    _adopt_state(gm, model)
    _name(gm)
    gm.graph.lint()
    gm.recompile()
    return before != _nodes(gm)


def _nodes(gm: fx.GraphModule) -> list[tuple[object, ...]]:
    return [(node.op, node.target, node.args, node.kwargs) for node in gm.graph.nodes]


def _record_values(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if META in node.meta:
            continue
        if isinstance(value, Tensor):
            shape = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
            node.meta[META] = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
        elif isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
            node.meta[META] = {"parts": len(value)}


# --- in-place operators -----------------------------------------------------------------------------------------------


def _functionalise(gm: fx.GraphModule) -> None:
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
    values = {**dict(zip(_parameters(node.target), node.args, strict=False)), **node.kwargs}
    for argument in node.target._schema.arguments:
        value = values.get(argument.name)
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


# --- symbolic sizes and constants -------------------------------------------------------------------------------------


def _read_sizes_from_inputs(gm: fx.GraphModule) -> None:
    inputs = {
        str(size): (node, axis)
        for node in reversed(gm.graph.find_nodes(op="placeholder"))
        if isinstance(node.meta.get("val"), Tensor)
        for axis, size in enumerate(node.meta["val"].shape)
        if not isinstance(size, int)
    }
    for node in gm.graph.find_nodes(op="call_function", target=_aten.sym_size.int):
        source = inputs.get(str(node.meta.get("val")))
        if source is not None:
            node.args = source


def _check_constants(gm: fx.GraphModule) -> None:
    """Non-tensor inputs were baked into the graph: calling with others must not go unnoticed."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders:
        value = node.meta.get("val", node)
        if META in node.meta or not isinstance(value, (bool, int, float, str, type(None))):
            continue
        node.meta[META] = {"constant": value}
        with gm.graph.inserting_after(placeholders[-1]):
            same = operator.is_ if value is None else operator.eq
            equal = gm.graph.call_function(same, (node, value))
            message = f"input {node.name!r} was {value!r} at capture and is a constant of this graph: capture again"
            equal.append(gm.graph.create_node("call_function", torch._assert, (equal, message)))


# --- modules ----------------------------------------------------------------------------------------------------------


def _parameters(operation: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in operation._schema.arguments]


def _parameterised(node: fx.Node, options: _Options, owner: Any) -> nn.Module | None:
    """The module of an operator with a weight, whose tensors are the owner's; None where none fits."""
    operation = node.target
    weight, biased = options["weight"], options.get("bias") is not None
    if operation is _aten.batch_norm.default:
        return _batch_norm(shape_of(node), options, owner)
    if weight is None:
        return None
    if operation is _aten.linear.default:
        return nn.Linear(weight.shape[1], weight.shape[0], biased, device="meta")
    if operation is _aten.prelu.default:
        return nn.PReLU(weight.numel(), device="meta")
    if operation is _aten.layer_norm.default:
        return nn.LayerNorm(options["normalized_shape"], options["eps"], bias=biased, device="meta")
    if operation is _aten.group_norm.default:
        groups = options["num_groups"]
        return nn.GroupNorm(groups, weight.numel(), options["eps"], device="meta") if biased else None
    return _CONVOLUTIONS[operation](
        weight.shape[1] * options["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        options["stride"],
        options["padding"],
        options["dilation"],
        options["groups"],
        biased,
        device="meta",
    )


def _batch_norm(shape: tuple[int, ...], options: _Options, owner: Any) -> nn.Module | None:
    tracked = options["running_mean"] is not None
    # In an eval-mode graph the batch's statistics stand for missing ones; elsewhere they are no torch.nn batch norm.
    if (options["weight"] is None) != (options["bias"] is None) or options["training"] == tracked:
        return None
    module = _BATCH_NORMS[len(shape)](
        shape[1],
        eps=options["eps"],
        momentum=getattr(owner, "momentum", options["momentum"]),
        affine=options["weight"] is not None,
        track_running_stats=tracked,
        device="meta",
    )
    if tracked:
        counter = getattr(owner, "num_batches_tracked", None)
        module.running_mean, module.running_var = options["running_mean"], options["running_var"]
        module.num_batches_tracked = torch.zeros((), dtype=torch.long) if counter is None else counter
    return module


def _elu(alpha: float, scale: float, input_scale: float) -> nn.Module | None:
    return nn.ELU(alpha) if scale == input_scale == 1 else None


def _dropout(node: fx.Node, options: _Options) -> nn.Module | None:
    if options["train"]:
        return None  # active in eval mode too
    kind = _DROPOUTS[node.target] or _FEATURE_DROPOUTS.get(len(shape_of(node)))
    return None if kind is None else kind(options["p"])


_CONVOLUTIONS: dict[Any, Callable[..., nn.Module]] = {
    overload: kind
    for packet, kind in ((_aten.conv1d, nn.Conv1d), (_aten.conv2d, nn.Conv2d), (_aten.conv3d, nn.Conv3d))
    for overload in (packet.default, packet.padding)
}
_BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_PARAMETERISED = {
    *_CONVOLUTIONS,
    _aten.linear.default,
    _aten.batch_norm.default,
    _aten.layer_norm.default,
    _aten.group_norm.default,
    _aten.prelu.default,
}
_OWN: dict[Any, Callable[..., nn.Module | None]] = {
    _aten.relu.default: nn.ReLU,
    _aten.relu6.default: nn.ReLU6,
    _aten.silu.default: nn.SiLU,
    _aten.mish.default: nn.Mish,
    _aten.hardswish.default: nn.Hardswish,
    _aten.hardsigmoid.default: nn.Hardsigmoid,
    _aten.sigmoid.default: nn.Sigmoid,
    _aten.tanh.default: nn.Tanh,
    _aten.gelu.default: nn.GELU,
    _aten.leaky_relu.default: nn.LeakyReLU,
    _aten.elu.default: _elu,
    _aten.celu.default: nn.CELU,
    _aten.selu.default: nn.SELU,
    _aten.softplus.default: nn.Softplus,
    _aten.hardtanh.default: nn.Hardtanh,
    _aten.log_sigmoid.default: nn.LogSigmoid,
    _aten.max_pool1d.default: nn.MaxPool1d,
    _aten.max_pool2d.default: nn.MaxPool2d,
    _aten.max_pool3d.default: nn.MaxPool3d,
    _aten.avg_pool1d.default: nn.AvgPool1d,
    _aten.avg_pool2d.default: nn.AvgPool2d,
    _aten.avg_pool3d.default: nn.AvgPool3d,
    _aten.adaptive_avg_pool1d.default: nn.AdaptiveAvgPool1d,
    _aten.adaptive_avg_pool2d.default: nn.AdaptiveAvgPool2d,
    _aten.adaptive_avg_pool3d.default: nn.AdaptiveAvgPool3d,
}
"""Operators whose options are, by name, the constructor arguments of a module."""

_DROPOUTS: dict[Any, Callable[..., nn.Module] | None] = {
    _aten.dropout.default: nn.Dropout,
    _aten.alpha_dropout.default: nn.AlphaDropout,
    _aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    _aten.feature_dropout.default: None,
}
_FEATURE_DROPOUTS: dict[int, Callable[..., nn.Module]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


class _Modules:
    """Builds the modules of one graph; holds what naming them needs."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module) -> None:
        self.gm = gm
        self.model = model
        self.users = dict(model.named_modules(remove_duplicate=False))
        self.taken = {*self.users, *model.state_dict(keep_vars=True)}
        self.built: dict[str, nn.Module] = {}
        self.calls: dict[str, tuple[object, ...]] = {}
        self.containers = {name for name, _ in gm.named_modules(remove_duplicate=False)}

    def install(self) -> None:
        """Replace every operator that has a module, then put the modules into the graph module."""
        for node in list(self.gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _PARAMETERISED:
                self._install_parameterised(node)
            elif node.target in _OWN or node.target in _DROPOUTS:
                self._install_own(node)
        for path, module in self.built.items():
            self._attach(path, module)

    def _install_parameterised(self, node: fx.Node) -> None:
        """Case 3: the operator's weight and statistics must be the innermost user module's own."""
        path, options = _innermost(node), self._options(node)
        owner = self.users.get(path)
        if not path or owner is None or options is None:
            return
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = options.get(name)
            own = value is getattr(owner, name, None) or (name == "bias" and value is None)
            tensor = nn.Parameter if name in ("weight", "bias") else Tensor
            if name in options and not (own and isinstance(value, (tensor, type(None)))):
                return
        call = (node.target, *((name, value) for name, value in options.items() if not isinstance(value, Tensor)))
        if path not in self.built:
            module = _parameterised(node, options, owner)
            if module is None:
                return
            for name in ("weight", "bias"):
                if options.get(name) is not None:
                    setattr(module, name, options[name])
            module.training = owner.training
            self.built[path], self.calls[path] = module, call
        if self.calls[path] == call:
            self._replace(node, path)

    def _install_own(self, node: fx.Node) -> None:
        """Case 4: a module for this call alone."""
        options = self._options(node)
        if options is None:
            return
        if "kernel_size" in options:
            options["stride"] = options["stride"] or None
        module = _dropout(node, options) if node.target in _DROPOUTS else _OWN[node.target](**options)
        if module is None:
            return
        path = _innermost(node)
        owner = self.users.get(path, self.model)
        alone = owner is not self.model and not any(owner.children()) and not any(owner.parameters())
        if not alone or path in self.built:
            path = self._free(path, "" if alone else type(module).__name__.lower())
        module.training = owner.training
        self.built[path] = module
        self._replace(node, path)

    def _options(self, node: fx.Node) -> _Options | None:
        """An operator's arguments but the first, by name, with defaults; None where one of them is computed."""
        assert isinstance(node.target, torch._ops.OpOverload)  # noqa: S101 - it was found in a table of them
        arguments = node.target._schema.arguments
        options = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        options |= dict(zip(_parameters(node.target), node.args, strict=False))
        options |= node.kwargs
        del options[arguments[0].name]
        for name, value in options.items():
            if isinstance(value, fx.Node) and value.op == "get_attr":
                options[name] = operator.attrgetter(str(value.target))(self.gm)
            elif isinstance(value, (list, tuple)):
                options[name] = tuple(value)
        return None if _has_nodes(options) else options

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

    def _attach(self, path: str, module: nn.Module) -> None:
        """Put a module at its path; children and tensors that other nodes still use stay where they are."""
        old = self.gm.get_submodule(path) if path in self.containers else nn.Module()
        self.gm.add_submodule(path, module)
        for name, child in old.named_children():
            module.add_module(name, child)
        for name, parameter in old.named_parameters(recurse=False):
            if not hasattr(module, name):
                module.register_parameter(name, parameter)
        for name, buffer in old.named_buffers(recurse=False):
            if not hasattr(module, name):
                module.register_buffer(name, buffer)


def _has_nodes(options: _Options) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(options, found.append)
    return bool(found)


def _innermost(node: fx.Node) -> str:
    """Path of the innermost module the operator was called in; the root's is empty."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _adopt_state(gm: fx.GraphModule, model: nn.Module) -> None:
    """Case 7, and the training flags of containers."""
    users = dict(model.named_modules(remove_duplicate=False))
    for path, module in gm.named_modules():
        owner = users.get(path)
        for name in module._buffers:
            if owner is None or name not in owner._buffers or name in owner._non_persistent_buffers_set:
                module._non_persistent_buffers_set.add(name)
        if owner is not None:
            module.training = owner.training


# --- names ------------------------------------------------------------------------------------------------------------


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
