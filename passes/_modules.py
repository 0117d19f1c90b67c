"""What the passes that put modules into a graph share: names and places for the modules, ids for the nodes."""

from __future__ import annotations

__all__ = ["Names", "attach", "innermost", "name_nodes"]

from collections import Counter
from collections.abc import Iterable

from torch import fx, nn

from fxmerge.graph import META


def innermost(node: fx.Node) -> str:
    """Path of the innermost module the operator was called in; the root's is empty."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


class Names:
    """Names for modules of one call each: the user's where a module without children was called, else a free one.

    Args:
        model: the module the graph was exported from; none of its names is given away.
        used: paths at which the graph has a module already.
    """

    def __init__(self, model: nn.Module, used: Iterable[str] = ()) -> None:
        self.model = model
        self.users: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.taken = {*self.users, *model.state_dict(keep_vars=True)}
        self.used = set(used)

    def owner(self, node: fx.Node) -> nn.Module:
        """The innermost of the user's modules that the operator was called in."""
        return self.users.get(innermost(node), self.model)

    def name(self, node: fx.Node, module: nn.Module) -> str:
        """The path for the module of this operator, whose training flag becomes that of the module it stands in."""
        path, owner = innermost(node), self.owner(node)
        bare = next(owner.children(), None) is None and next(owner.parameters(), None) is None
        alone = bare and owner is not self.model
        if not alone or path in self.used:
            path = self._free(path, "" if alone else type(module).__name__.lower())
        module.training = owner.training
        self.used.add(path)
        return path

    def _free(self, path: str, name: str) -> str:
        stem = f"{path}.{name}" if path and name else path or name
        candidate, count = stem if name else f"{stem}_1", 1
        while candidate in self.taken or candidate in self.used:
            count += 1
            candidate = f"{stem}_{count}"
        return candidate


def attach(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Put a module at its path; children and tensors that other nodes still use stay where they are."""
    try:
        old = gm.get_submodule(path)
    except AttributeError:
        old = nn.Module()
    gm.add_submodule(path, module)
    for name, child in old.named_children():
        module.add_module(name, child)
    for name, parameter in old.named_parameters(recurse=False):
        if not hasattr(module, name):
            module.register_parameter(name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        if not hasattr(module, name):
            module.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)


def name_nodes(gm: fx.GraphModule) -> None:
    """Give every node its id: module path or ``path/operator``, with ``#k`` for the k-th repetition."""
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
    path = innermost(node)
    return f"{path}/{function}" if path and not path.startswith("_empty") else function
