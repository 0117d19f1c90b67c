"""Activations of the user's own: classes whose calls may be replaced by the identity, as a ReLU may.

A registered class is a ``torch.nn.Module`` whose ``forward`` is traced into operations; capture tags the operations of
every call that is removable (:func:`tag_removable`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TypeVar

from torch import fx, nn

from .errors import UserError
from .graph import META, is_tensor, shape_of

__all__ = ["register_removable", "registered", "tag_removable", "unregister_removable"]

_Kind = TypeVar("_Kind", bound=type[nn.Module])

_REGISTERED: set[type[nn.Module]] = set()


def register_removable(kind: _Kind) -> _Kind:
    """Let fxmerge remove the calls of a module class, as it removes activations.

    For activations that are no class of ``torch.nn``; those need no registering. It holds for this process, for
    networks captured afterwards, and for subclasses too. A call is removable if it reads one tensor other than
    parameters and buffers, and returns one of the same shape and type; capture warns of calls that are not.

    Args:
        kind: a subclass of ``torch.nn.Module``. Registering it again changes nothing.

    Returns:
        The class, so that this is a class decorator too.

    Raises:
        UserError: ``kind`` is not such a class.

    Example:
        >>> import fxmerge, torch
        >>> @fxmerge.register_removable
        ... class Snake(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.sin(x) ** 2
        >>> gm = fxmerge.capture(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), Snake()), torch.randn(2, 3, 8, 8))
        >>> [node.meta["fxmerge"].get("removable") for node in gm.graph.nodes if node.op == "call_function"]
        ['1', '1', '1']
        >>> from fxmerge.removable import unregister_removable
        >>> unregister_removable(Snake)
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise UserError(
            f"{kind!r} cannot be registered: it is not a subclass of torch.nn.Module. Put the function into the forward "
            "of a module class and register that class."
        )
    _REGISTERED.add(kind)
    return kind


def registered() -> frozenset[type[nn.Module]]:
    """The classes given to :func:`register_removable`."""
    return frozenset(_REGISTERED)


def unregister_removable(kind: type[nn.Module]) -> None:
    """Undo :func:`register_removable`; a class that is not registered is none afterwards either."""
    _REGISTERED.discard(kind)


def tag_removable(gm: fx.GraphModule, model: nn.Module) -> None:
    """Write ``node.meta["fxmerge"]["removable"]`` on the operations of every removable call of a registered class.

    The tag is the module's path, with ``#k`` for the k-th further call of the same module. Where one registered module
    calls another, the operations belong to the outer one, or to the inner one if the outer one is not removable.

    Args:
        gm: a graph of the canonicalise pass, straight from an export of ``model``.
        model: its modules say which classes were called.

    Warns:
        UserWarning: a call that is not removable, with the reason.
    """
    kinds = tuple(_REGISTERED)
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in reversed(list(modules.items()))}
    calls: dict[str, list[fx.Node]] = {}
    modules_of: dict[str, nn.Module] = {}
    for node in gm.graph.nodes:
        # torch names every call in the stack: "L__self__act", then "L__self__act@1".
        for call, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if path and isinstance(modules.get(path), kinds) and node.op != "get_attr":
                calls.setdefault(call, []).append(node)
                modules_of[call] = modules[path]
    counts: Counter[str] = Counter()
    for call, nodes in calls.items():
        path = first[id(modules_of[call])]
        tag = f"{path}#{counts[path]}" if counts[path] else path
        counts[path] += 1
        values = [node for node in nodes if _is_value(node)]
        if all("removable" in node.meta[META] for node in values):
            continue
        obstacle = _obstacle(values)
        if obstacle:
            name = f"{path!r} ({type(modules_of[call]).__name__})"
            warnings.warn(f"{name} is registered as removable, but {obstacle}: it stays as it is", stacklevel=3)
            continue
        for node in values:
            node.meta[META]["removable"] = tag


def _is_value(node: fx.Node) -> bool:
    return is_tensor(node) or "parts" in node.meta.get(META, {})


def _obstacle(nodes: list[fx.Node]) -> str | None:
    """Why a call made of these operations cannot become the identity; None where it can."""
    inside = set(nodes)
    sources = {source for node in nodes for source in node.all_input_nodes}
    entries = {source for source in sources - inside if _is_value(source) and source.op != "get_attr"}
    exits = [node for node in nodes if not node.users or any(_reads(user, inside) for user in node.users)]
    if any("opaque" in node.meta[META] for node in nodes):
        return "its values are written in place where that can be seen"
    if len(entries) != 1:
        return f"it reads {len(entries)} tensors besides its parameters and buffers, not one"
    if len(exits) != 1:
        return f"{len(exits)} of its tensors are used outside, not one"
    (entry,), (exit_,) = entries, exits
    if not is_tensor(entry) or not is_tensor(exit_):
        return "it reads or returns a tuple"
    if shape_of(entry) != shape_of(exit_):
        return f"it makes {list(shape_of(exit_))} of the shape {list(shape_of(entry))}"
    if entry.meta[META]["dtype"] != exit_.meta[META]["dtype"]:
        return f"it makes {exit_.meta[META]['dtype']} of {entry.meta[META]['dtype']}"
    return None


def _reads(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a reader stands outside; one that only asks for a size does not count."""
    return user not in inside and (_is_value(user) or user.op == "output")
