"""What the rest of fxmerge reads off a canonical graph: names, shapes, modules, structure.

A canonical graph is a :class:`torch.fx.GraphModule` whose convolutions, norms, activations, pools, dropouts and linears
are ``call_module`` nodes of ``torch.nn`` classes; :mod:`fxmerge.passes.canonicalise` makes one. Every node carries
plain data under ``node.meta["fxmerge"]``: its ``id`` (module path, operator and call index: stable between captures of
the same network) and, if it is a tensor, its ``shape`` and ``dtype`` at capture.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import operator
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.node import Argument, Target
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from .errors import PlanError

__all__ = [
    "CONVOLUTIONS",
    "META",
    "CanonicalGraph",
    "attribute",
    "between",
    "by_id",
    "changed_nodes",
    "clone",
    "convolutions",
    "device_of",
    "dtype_of",
    "graph_meta",
    "is_convolution",
    "is_tensor",
    "memory_format_of",
    "module_of",
    "node_id",
    "record_shapes",
    "refuse_other_structure",
    "shape_of",
    "shared_targets",
    "structure",
    "sweep",
    "written_in_place",
]

META = "fxmerge"
"""Key of fxmerge's plain data in ``node.meta`` and ``GraphModule.meta``."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def node_id(node: fx.Node) -> str:
    """The stable name of an operation: module path or ``path/operator``, with ``#k`` for its k-th repetition."""
    return str(node.meta[META]["id"]) if META in node.meta else node.name


def by_id(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """All nodes of the graph by :func:`node_id`."""
    return {node_id(node): node for node in gm.graph.nodes}


def graph_meta(gm: fx.GraphModule) -> dict[str, Any]:
    """Fxmerge's plain data about the whole graph, created when missing."""
    data: dict[str, Any] = gm.meta.setdefault(META, {})
    return data


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return "shape" in node.meta.get(META, {})


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor value at capture."""
    return tuple(node.meta[META]["shape"])


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a ``call_module`` node calls, None for every other node."""
    if node.op != "call_module":
        return None
    module: nn.Module | None = gm
    for name in str(node.target).split("."):
        module = None if module is None else module._modules[name]  # get_submodule takes four times as long
    return module


def attribute(gm: fx.GraphModule, path: str) -> Any:
    """The parameter, buffer or other attribute that a ``get_attr`` node of this target reads."""
    return operator.attrgetter(path)(gm)


def is_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls one of torch.nn's convolutions (transposed ones are not)."""
    return isinstance(module_of(gm, node), CONVOLUTIONS)


def convolutions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Conv1d | nn.Conv2d | nn.Conv3d]]:
    """Every convolution of the graph, in execution order, with its module."""
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        if isinstance(module, CONVOLUTIONS):
            yield node, module


def between(entry: fx.Node, exit_: fx.Node) -> set[fx.Node]:
    """The operations on the way from ``entry`` (excluded) to ``exit_`` (included).

    Parameters, sizes and side inputs are not on the way; the result is empty where ``exit_`` does not depend on
    ``entry``.
    """
    pending, sources = [exit_], {exit_}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in sources and entry < source:
                sources.add(source)
                pending.append(source)
    inside: set[fx.Node] = set()
    for node in sorted(sources):
        if any(source is entry or source in inside for source in node.all_input_nodes) and not _is_number(node):
            inside.add(node)
    return inside


def written_in_place(gm: fx.GraphModule) -> bool:
    """Whether some value is overwritten while others may still read it: then none but the inputs can be kept."""
    return any(node.meta.get(META, {}).get("opaque") for node in gm.graph.nodes)


def _is_number(node: fx.Node) -> bool:
    data = node.meta.get(META, {})
    return "id" in data and "shape" not in data and "parts" not in data


def shared_targets(gm: fx.GraphModule) -> frozenset[str]:
    """Paths of the modules that no rewrite may change alone.

    They are called more than once, or hold a Parameter that another module holds or an operation reads. A batch norm
    may be read: what is computed from it stays true whether it goes or stays.
    """
    calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    holders: dict[int, list[str]] = {}
    for path, module in gm.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(path)
    aliased = {path for paths in holders.values() if len(paths) > 1 for path in paths}
    read = {str(node.target).rpartition(".")[0] for node in gm.graph.nodes if node.op == "get_attr"}
    modules = dict(gm.named_modules(remove_duplicate=False))
    direct = {path for path in read if not isinstance(modules.get(path), _BatchNorm)}
    return frozenset({target for target, count in calls.items() if count > 1} | aliased | direct)


class CanonicalGraph(fx.GraphModule):
    """A ``GraphModule`` that ``copy.deepcopy`` copies as :func:`clone` does, and that pickles as :mod:`fxmerge.serialize` saves.

    What torch pickles of an exported graph cannot be read again, and lacks what fxmerge writes on nodes.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        return _deep_copy(self, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        from .serialize import graph_from_json, graph_to_json, state_tensors  # it reads this module

        return graph_from_json, (graph_to_json(self), state_tensors(self)[0])


def changed_nodes(original: fx.GraphModule, relaxed: fx.GraphModule) -> set[fx.Node]:
    """Operations of ``relaxed`` whose values may differ from those they had in ``original``.

    They are new, folded, read something else, or read what has changed.
    """
    before = by_id(original)
    changed: set[fx.Node] = set()
    for node in relaxed.graph.nodes:
        twin = before.get(node_id(node))
        same = twin is not None and list(map(node_id, twin.all_input_nodes)) == list(map(node_id, node.all_input_nodes))
        if not same or "made_of" in node.meta[META] or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    return changed


def clone(gm: fx.GraphModule, *, share_parameters: bool = False) -> fx.GraphModule:
    """A deep copy that shares nothing with ``gm``, fxmerge's plain data included; aliases stay aliased.

    Args:
        gm: a canonical graph.
        share_parameters: let the copy hold the very Parameters of ``gm``, which is much faster. Buffers are copied, and options
            and hooks of torch's modules are the copy's own.

    Example:
        >>> import torch, fxmerge
        >>> gm = fxmerge.capture(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8))
        >>> copied = clone(gm)
        >>> torch.equal(copied.get_parameter("0.weight"), gm.get_parameter("0.weight"))
        True
        >>> copied.get_parameter("0.weight") is gm.get_parameter("0.weight")
        False
    """
    return _deep_copy(gm, _shared_with(gm) if share_parameters else {})


def _shared_with(gm: fx.GraphModule) -> dict[int, Any]:
    """For ``copy.deepcopy`` what to take for what, by id: for Parameters themselves, for torch's modules light copies.

    Most of the time a deep copy takes goes into the many empty dictionaries of hooks that each module has.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in gm.parameters()}
    memo |= {id(buffer): buffer.clone() for buffer in gm.buffers()}
    light = [module for module in gm.modules() if type(module).__module__.startswith("torch.nn.modules.")]
    memo |= {id(module): type(module).__new__(type(module)) for module in light}
    for module in light:
        own = memo[id(module)].__dict__
        own |= {
            name: value.copy() if isinstance(value, (dict, list, set)) else value
            for name, value in vars(module).items()
        }
        own["_buffers"] = {name: memo.get(id(buffer)) for name, buffer in module._buffers.items()}
        own["_modules"] = {name: copy.deepcopy(child, memo) for name, child in module._modules.items()}
    return memo


_COPYING = threading.RLock()
"""Warning filters belong to the whole process: threads that copy graphs take turns."""


def _deep_copy(gm: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """The copy that torch makes, less its faults.

    Those are: the nodes' plain data is shared, buffers of the root become persistent, the class loses its name, and
    torch warns of its own pytree specs.
    """
    with _COPYING, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        copied = fx.GraphModule.__deepcopy__(gm, memo)
    type(copied).__name__ = type(gm).__name__
    copied._non_persistent_buffers_set |= gm._non_persistent_buffers_set & copied._buffers.keys()
    for node in copied.graph.nodes:
        if META in node.meta:
            node.meta[META] = copy.deepcopy(node.meta[META])
    return copied


def record_shapes(gm: fx.GraphModule) -> None:
    """Write the shapes of all values anew, from those of the inputs, without computing anything."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = device_of(gm)
    with mode, torch.no_grad():
        inputs = [
            torch.empty(shape_of(node), dtype=getattr(torch, node.meta[META]["dtype"]), device=device)
            if is_tensor(node)
            else node.meta[META].get("constant")
            for node in gm.graph.find_nodes(op="placeholder")
        ]
        _ShapeRecorder(gm).run(*inputs, enable_io_processing=False)


@dataclass(frozen=True, slots=True)
class _Value:
    """What a module gives, and a tensor without values that is made of it where an operator reads it."""

    shape: tuple[int, ...]
    like: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def tensor(self) -> Tensor:
        return self.like.new_empty(self.shape)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph on tensors without values; modules whose shape is known are not even called."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, (Tensor, _Value)):
            kept = {key: n.meta[META][key] for key in ("id", "opaque", "removable") if key in n.meta.get(META, {})}
            n.meta[META] = {**kept, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return value

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        from .linear import shape_after  # it reads this module

        value: Any = args[0]
        like = value.like if isinstance(value, _Value) else value
        if isinstance(like, Tensor):
            shape = shape_after(self.fetch_attr(str(target)), tuple(value.shape))
            if shape is not None:
                return _Value(shape, like)
        return super().call_module(target, *_made(args, kwargs))

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *_made(args, kwargs))


def _made(args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
    return pytree.tree_map_only(_Value, _Value.tensor, (args, kwargs))


def sweep(gm: fx.GraphModule) -> None:
    """Remove what nothing reads any more, with the modules and tensors only it used; then lint and recompile."""
    read: set[str] = set()
    for node in reversed(gm.graph.nodes):
        if not node.users and node.op in ("call_module", "call_function", "get_attr") and not _has_effect(node):
            gm.graph.erase_node(node)
            if node.op == "get_attr":
                read.add(str(node.target))
    gm.delete_all_unused_submodules()
    for path in read - {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}:
        _delete_tensor(gm, path)
    gm.graph.lint()
    gm.recompile()


def _delete_tensor(gm: fx.GraphModule, path: str) -> None:
    """Delete a parameter or buffer that was read by itself, unless a module that is called holds it."""
    owner, _, name = path.rpartition(".")
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    modules = dict(gm.named_modules(remove_duplicate=False))
    if owner in modules and owner not in called and hasattr(modules[owner], name):
        delattr(modules[owner], name)


def _has_effect(node: fx.Node) -> bool:
    if node.meta.get(META, {}).get("opaque"):
        return True
    return node.op == "call_function" and node.is_impure()


def structure(gm: fx.GraphModule) -> tuple[str, ...]:
    """One line an operation: id, a hash of what it does (operator, options, shape without batch) and what it reads.

    Two networks with equal structure accept each other's plans; weights play no part.
    """
    return tuple(_structure_line(gm, node) for node in gm.graph.nodes if is_tensor(node) and node.op != "get_attr")


def _structure_line(gm: fx.GraphModule, node: fx.Node) -> str:
    module = module_of(gm, node)
    if module is not None:
        what = f"{type(module).__name__}({module.extra_repr()})"
    elif node.op == "placeholder":
        what = "input"
    else:
        options = fx.map_arg((node.args, node.kwargs), lambda _: None)
        what = f"{node.target} {options}"
    inputs = [node_id(source) for source in node.all_input_nodes if is_tensor(source)]
    text = f"{what} {list(shape_of(node)[1:])} {inputs}"
    return f"{node_id(node)} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def refuse_other_structure(expected: tuple[str, ...], gm: fx.GraphModule) -> None:
    """Raise :class:`~fxmerge.PlanError` naming the first operation in which ``gm`` differs from ``expected``."""
    found = structure(gm)
    if found == expected:
        return
    for ours, theirs in zip(found, expected, strict=False):
        if ours != theirs:
            name, other = ours.rsplit(" ", 1)[0], theirs.rsplit(" ", 1)[0]
            difference = (
                f"operation {name!r} differs in its options, shape or inputs"
                if name == other
                else f"it has {name!r} where the plan's network has {other!r}"
            )
            break
    else:
        difference = f"it has {len(found)} operations, the plan's network {len(expected)}"
    raise PlanError(
        f"this plan was made for a network of another structure: {difference}. "
        "Make a plan for this network with fxmerge.compress or fxmerge.frontier."
    )


def device_of(gm: nn.Module) -> torch.device:
    """The device of the first parameter or buffer (the CPU where there is none)."""
    return next((tensor.device for tensor in itertools.chain(gm.parameters(), gm.buffers())), torch.device("cpu"))


def memory_format_of(gm: nn.Module, dims: int) -> torch.memory_format:
    """The one that weights of ``dims`` spatial dimensions are kept in: channels last if one of them is in no other."""
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)
    if last is None or not any(
        weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
        for weight in gm.parameters()
        if weight.ndim == dims + 2
    ):
        return torch.contiguous_format
    return last


def dtype_of(gm: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter (float32 where there is none)."""
    for parameter in gm.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32
