"""Give an exported graph its modules back: ``torch.nn`` calls under the user's names instead of flat aten operators.

What the pass does to the graph of ``torch.export.export(...).module(check_guards=False)``:

1. An in-place operator becomes the functional one, and later readers of the overwritten value read the new one.
2. Case 1 does not apply where it could be seen: the operator writes an input or a parameter, or a view of the same
   storage taken before is read after. Every value of that storage is then marked ``opaque``: no rewrite may touch it.
3. A zero padding whose border is overwritten, strip by strip, with one value per channel v becomes
   ``pad(x - v) + v``. The strips are slices that nothing else reads, all of them are written, all with the same v
   (a tensor with one element per channel, or a number), and none of this is changed on the way. Else case 2 holds.
4. A convolution, linear or norm (batch, instance, group, layer) whose weight or statistics are those of the innermost
   module it was called in becomes a ``call_module`` of a new ``torch.nn`` module that shares them, under the user's
   name. Weights computed on the way stay functions, and so does a second call with other options.
5. An activation, dropout, pool, channel shuffle or norm without tensors becomes a module of its own for every call: the
   user's name where it is the first call of a module without children, a generated name otherwise. Activations have
   many spellings: ``clamp(min=0)`` and ``maximum(x, 0)`` are ReLU, ``clamp(0, 6)`` is ReLU6 and with other bounds
   Hardtanh (only the derivative at the very bounds differs), ``rrelu`` is RReLU unless it draws random slopes in eval
   mode too. A ``clamp`` with one bound other than 0 stays a function: it guards more often than it activates.
6. ``sym_size`` is read from an input wherever the input has the same size, so that a value can be removed later.
7. A non-tensor input is compared with the constant it was at capture.
8. Buffers that are not in the model's ``state_dict``, and constants, stay out of the graph's.

Needs: the model the graph was exported from (for momentum, tracked statistics and training flags). Leaves in
``node.meta["fxmerge"]``: ``id``, and for tensors ``shape`` and ``dtype``, ``opaque`` where case 2 held. A second run
changes nothing.
"""

from __future__ import annotations

__all__ = ["CanonicalisePass", "canonicalise"]

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.graph import META, is_tensor, shape_of
from fxmerge.passes._base import GraphPass
from fxmerge.passes._in_place import constant, functionalise, lift_borders
from fxmerge.passes._modules import Names, attach, innermost, name_nodes

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
    lift_borders(gm, model)
    functionalise(gm)
    _read_sizes_from_inputs(gm)
    _respell(gm, model)
    _Modules(gm, model).install()
    _check_constants(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    _adopt_state(gm, model)
    name_nodes(gm)
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


# --- spellings --------------------------------------------------------------------------------------------------------


def _respell(gm: fx.GraphModule, model: nn.Module) -> None:
    """Write activations that have no operator of their own as one that has."""
    for node in gm.graph.nodes:
        source: Any = node.args[0] if node.args else None
        if node.target in (_aten.maximum.default, _aten.max.other):
            for value, other in (node.args, reversed(node.args)):
                if _is_like(value, node) and "opaque" not in other.meta[META] and constant(gm, model, other) == 0:
                    node.target, node.args = _aten.relu.default, (value,)
                    break
        elif (
            node.target is operator.getitem and source.target is _aten.log_sigmoid_forward.default and not node.args[1]
        ):
            node.target, node.args = _aten.log_sigmoid.default, source.args


def _is_like(value: fx.Node, other: fx.Node) -> bool:
    return is_tensor(value) and all(value.meta[META][key] == other.meta[META][key] for key in ("shape", "dtype"))


# --- modules ----------------------------------------------------------------------------------------------------------


def _parameters(operation: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in operation._schema.arguments]


def _parameterised(node: fx.Node, options: _Options, owner: Any) -> nn.Module | None:
    """The module of an operator with a weight, whose tensors are the owner's; None where none fits."""
    operation = node.target
    weight, biased = options["weight"], options.get("bias") is not None
    if operation in _STATISTICS_NORMS:
        return _statistics_norm(node, options, owner)
    if operation is _aten.group_norm.default:
        channels, affine = shape_of(node)[1], weight is not None
        same = affine == biased
        return nn.GroupNorm(options["num_groups"], channels, options["eps"], affine, device="meta") if same else None
    if weight is None:
        return None
    if operation is _aten.linear.default:
        return nn.Linear(weight.shape[1], weight.shape[0], biased, device="meta")
    if operation is _aten.prelu.default:
        return nn.PReLU(weight.numel(), device="meta")
    if operation is _aten.layer_norm.default:
        return nn.LayerNorm(options["normalized_shape"], options["eps"], bias=biased, device="meta")
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


def _statistics_norm(node: fx.Node, options: _Options, owner: Any) -> nn.Module | None:
    tracked = options["running_mean"] is not None
    from_input = options.get("training", options.get("use_input_stats"))
    kind = _STATISTICS_NORMS[node.target].get(len(shape_of(node)))
    # In an eval-mode graph the input's statistics stand for missing ones; elsewhere they are no norm of torch.nn.
    if kind is None or (options["weight"] is None) != (options["bias"] is None) or from_input == tracked:
        return None
    module: nn.Module = kind(
        shape_of(node)[1],
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


def _clamp(node: fx.Node, options: _Options) -> nn.Module | None:
    low, high = options.get("min", options.get("min_val")), options.get("max", options.get("max_val"))
    if low is None or "float" not in node.meta[META]["dtype"]:
        return None
    if high is None:
        return nn.ReLU() if low == 0 else None
    if (low, high) == (0, 6):
        return nn.ReLU6()
    return nn.Hardtanh(low, high) if low < high else None


def _rrelu(lower: float, upper: float, training: bool, **_: object) -> nn.Module | None:
    return None if training else nn.RReLU(lower, upper)


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
_STATISTICS_NORMS: dict[Any, dict[int, Callable[..., Any]]] = {
    _aten.batch_norm.default: {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d},
    _aten.instance_norm.default: {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d},
}
"""Norms with statistics, by the number of axes they work on."""

_PARAMETERISED = {
    *_CONVOLUTIONS,
    *_STATISTICS_NORMS,
    _aten.linear.default,
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
    _aten.log_sigmoid.default: nn.LogSigmoid,
    _aten.threshold.default: nn.Threshold,
    _aten.hardshrink.default: nn.Hardshrink,
    _aten.softshrink.default: nn.Softshrink,
    _aten.rrelu.default: _rrelu,
    _aten.channel_shuffle.default: nn.ChannelShuffle,
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

_CLAMPS = (_aten.hardtanh.default, _aten.clamp.default, _aten.clip.default, _aten.clamp_min.default)
_DROPOUTS: dict[Any, Callable[..., nn.Module] | None] = {
    _aten.dropout.default: nn.Dropout,
    _aten.alpha_dropout.default: nn.AlphaDropout,
    _aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    _aten.feature_dropout.default: None,
}
_WITHOUT_TENSORS = {*_OWN, *_CLAMPS, *_DROPOUTS}
_FEATURE_DROPOUTS: dict[int, Callable[..., nn.Module]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


class _Modules:
    """Builds the modules of one graph."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module) -> None:
        self.gm = gm
        self.names = Names(model)
        self.built: dict[str, nn.Module] = {}
        self.calls: dict[str, tuple[object, ...]] = {}

    def install(self) -> None:
        """Replace every operator that has a module, then put the modules into the graph module."""
        for node in list(self.gm.graph.nodes):
            if node.target not in _PARAMETERISED and node.target not in _WITHOUT_TENSORS:
                continue
            options = self._options(node)
            if options is None:
                continue
            if any(isinstance(value, Tensor) for value in options.values()):
                self._install_parameterised(node, options)
            else:
                self._install_own(node, options)
        for path, module in self.built.items():
            attach(self.gm, path, module)

    def _install_parameterised(self, node: fx.Node, options: _Options) -> None:
        """Case 4: the operator's weight and statistics must be the innermost user module's own."""
        path, owner = innermost(node), self.names.owner(node)
        if not path or path not in self.names.users:
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
            self.names.used.add(path)
        if self.calls.get(path) == call:
            _call(node, path)

    def _install_own(self, node: fx.Node, options: _Options) -> None:
        """Case 5: a module for this call alone."""
        if node.target in _PARAMETERISED:
            module = _parameterised(node, options, self.names.owner(node))
        elif node.target in _DROPOUTS:
            module = _dropout(node, options)
        elif node.target in _CLAMPS:
            module = _clamp(node, options)
        else:
            if "kernel_size" in options:
                options["stride"] = options["stride"] or None
            module = _OWN[node.target](**options)
        if module is not None:
            path = self.names.name(node, module)
            self.built[path] = module
            _call(node, path)

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


def _call(node: fx.Node, path: str) -> None:
    node.op, node.target = "call_module", path
    node.args, node.kwargs = (node.args[0],), {}


def _has_nodes(options: _Options) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(options, found.append)
    return bool(found)


def _adopt_state(gm: fx.GraphModule, model: nn.Module) -> None:
    """Case 8, and the training flags of containers."""
    users = dict(model.named_modules(remove_duplicate=False))
    for path, module in gm.named_modules():
        owner = users.get(path)
        for name in module._buffers:
            if owner is None or name not in owner._buffers or name in owner._non_persistent_buffers_set:
                module._non_persistent_buffers_set.add(name)
        if owner is not None:
            module.training = owner.training
