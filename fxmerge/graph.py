"""What the rest of fxmerge reads off a canonical graph: names, shapes, modules, structure.

A canonical graph is a :class:`torch.fx.GraphModule` whose convolutions, norms, activations, pools, dropouts and linears are
``call_module`` nodes of ``torch.nn`` classes; :mod:`fxmerge.passes.canonicalise` makes one. Every node carries plain data under
``node.meta["fxmerge"]``: its ``id`` (module path, operator and call index: stable between captures of the same network) and, if
it is a tensor, its ``shape`` and ``dtype`` at capture.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from .errors import PlanError

__all__ = [
    "CONVOLUTIONS",
    "META",
    "by_id",
    "clone",
    "convolutions",
    "device_of",
    "dtype_of",
    "graph_meta",
    "is_convolution",
    "is_tensor",
    "module_of",
    "node_id",
    "record_shapes",
    "refuse_other_structure",
    "sweep",
    "shape_of",
    "shared_targets",
    "structure",
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
    """fxmerge's plain data about the whole graph, created when missing."""
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
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_convolution(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls one of torch.nn's convolutions (transposed ones are not)."""
    return isinstance(module_of(gm, node), CONVOLUTIONS)


def convolutions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Conv1d | nn.Conv2d | nn.Conv3d]]:
    """Every convolution of the graph, in execution order, with its module."""
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        if isinstance(module, CONVOLUTIONS):
            yield node, module


def shared_targets(gm: fx.GraphModule) -> frozenset[str]:
    """Module paths that no rewrite may change alone: called more than once, or holding a Parameter held elsewhere too."""
    calls = Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    holders: dict[int, list[str]] = {}
    for path, module in gm.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(path)
    aliased = {path for paths in holders.values() if len(paths) > 1 for path in paths}
    direct = {
        str(node.target).rpartition(".")[0] for node in gm.graph.nodes if node.op == "get_attr"
    }
    return frozenset({target for target, count in calls.items() if count > 1} | aliased | direct)


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy that shares nothing, fxmerge's plain data included (``copy.deepcopy`` shares ``meta``); aliases stay aliased."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying its pytree specs
        copied: fx.GraphModule = copy.deepcopy(gm)
    copied.meta[META] = copy.deepcopy(gm.meta.get(META, {}))
    for node in copied.graph.nodes:
        if META in node.meta:
            node.meta[META] = copy.deepcopy(node.meta[META])
    return copied


def record_shapes(gm: fx.GraphModule) -> None:
    """Write the shapes of all values anew, from those of the inputs, without computing anything."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = device_of(gm)
    with mode:
        inputs = [
            torch.empty(shape_of(node), dtype=getattr(torch, node.meta[META]["dtype"]), device=device)
            if is_tensor(node)
            else node.meta[META].get("constant")
            for node in gm.graph.find_nodes(op="placeholder")
        ]

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                kept = {key: n.meta[META][key] for key in ("id", "opaque") if key in n.meta.get(META, {})}
                n.meta[META] = {**kept, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            return value

    with mode, torch.no_grad():
        Recorder(gm).run(*inputs, enable_io_processing=False)


def sweep(gm: fx.GraphModule) -> None:
    """Remove what nothing reads any more, with the modules only it used; then lint and recompile."""
    for node in reversed(gm.graph.nodes):
        if not node.users and node.op in ("call_module", "call_function", "get_attr") and not _has_effect(node):
            gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()


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
    return next((tensor.device for tensor in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))


def dtype_of(gm: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter (float32 where there is none)."""
    for parameter in gm.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32
