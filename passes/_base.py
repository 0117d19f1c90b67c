"""The contract that every fxmerge pass keeps: one base class over torch's ``PassBase``.

torch's own ``PassBase.__call__`` runs ``ensures`` on the module that went in, so a pass that
returns a new module is never checked; :class:`GraphPass` runs it on the result, and checks what
torch leaves to the author of the pass.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxmerge.errors import FxmergeError, InternalError, UnsupportedError, UserError

__all__ = ["GraphPass", "PassResult"]

_T = TypeVar("_T")
_REPR_CHARACTERS = 60


class GraphPass(PassBase):
    """A graph pass whose contract is checked at every call.

    A subclass implements :meth:`call` and, where it has something to demand or to promise,
    :meth:`requires` and :meth:`ensures`. Calling the pass does, in this order:

    1. lint the graph that came in, then run ``requires`` on it;
    2. run ``call``;
    3. if the result says ``modified=False``: check that the same module came back with the same
       nodes, modules and tensors (``node.meta`` is not compared: to annotate is not to modify);
    4. if it says ``modified=True``: lint the graph, check that no submodule with parameters or
       buffers lost its last use but stayed, and recompile;
    5. run ``ensures`` on the RESULT.

    Options are constructor arguments kept under their own names as attributes; ``repr`` prints
    them. No state is kept between calls. A pass may change the module it was given or return a
    new one.

    Raises:
        UserError: what was passed in is not a ``GraphModule``.
        UnsupportedError: the graph that came in does not pass ``Graph.lint``.
        InternalError: the pass broke its contract, or raised something that is not an
            ``FxmergeError``; the message names the pass by its ``repr`` and the cause is chained.
            Errors of fxmerge's own pass through unchanged.

    Example:
        >>> class DropClones(GraphPass):
        ...     def call(self, graph_module):
        ...         graph = graph_module.graph
        ...         clones = list(graph.find_nodes(op="call_function", target=torch.clone))
        ...         for node in clones:
        ...             node.replace_all_uses_with(node.args[0])
        ...             graph.erase_node(node)
        ...         return PassResult(graph_module, bool(clones))
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.clone(x)
        >>> graph_module = torch.fx.symbolic_trace(Net())
        >>> DropClones()(graph_module).modified, DropClones()(graph_module).modified
        (True, False)
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Check the input, run the pass, check its result, and return it."""
        if not isinstance(graph_module, GraphModule):
            raise UserError(
                f"{self!r} works on a torch.fx.GraphModule, not on a "
                f"{type(graph_module).__name__}; fxmerge.capture(model, example_input) makes one"
            )
        fault = _lint_fault(graph_module)
        if fault is not None:
            raise UnsupportedError(
                f"the graph handed to {self!r} is not valid: {fault}; repair it before, Graph.lint() tells when it is"
            ) from fault
        before = _State.of(graph_module)
        self._guarded("requires", self.requires, graph_module)
        result = self._guarded("call", self.call, graph_module)
        if not isinstance(result, PassResult) or not isinstance(result.modified, bool):
            raise InternalError(
                f"{self!r} returned {_one_line(result)}; "
                "call must return PassResult(graph_module, modified) with modified True or False"
            )
        if result.modified:
            self._check_modified(before, result.graph_module)
        else:
            self._check_untouched(before, graph_module, result.graph_module)
        self._guarded("ensures", self.ensures, result.graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the pass.

        Args:
            graph_module: what to work on, already checked by :meth:`requires`; it may be changed
                in place.

        Returns:
            torch's ``PassResult(graph_module, modified)``, or a subclass of it that carries data.
            ``modified`` is computed from the edits made: a second run says False.
        """

    def requires(self, graph_module: GraphModule) -> None:
        """Raise an ``FxmergeError`` where the input lacks what the pass needs; by default never."""

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise an ``InternalError`` where the RESULT breaks a promise; by default never."""

    def __repr__(self) -> str:
        """Return one line, the constructor call: for example ``Fold(max_kernel=9)``."""
        options = (
            f"{name}={_one_line(getattr(self, name))}"
            for name in inspect.signature(type(self)).parameters
            if hasattr(self, name)
        )
        return f"{type(self).__name__}({', '.join(options)})"

    def _guarded(self, step: str, function: Callable[[GraphModule], _T], graph_module: GraphModule) -> _T:
        try:
            return function(graph_module)
        except FxmergeError:
            raise
        except Exception as error:
            raise InternalError(f"{self!r} failed in {step}: {type(error).__name__}: {error}") from error

    def _check_modified(self, before: _State, graph_module: GraphModule) -> None:
        fault = _lint_fault(graph_module)
        if fault is not None:
            raise InternalError(f"{self!r} left a graph that is not valid: {fault}") from fault
        dangling = _dangling(graph_module) - before.dangling
        if dangling:
            raise InternalError(
                f"{self!r} left submodules that no node uses: {', '.join(sorted(dangling))}; "
                "end the pass with graph_module.delete_all_unused_submodules()"
            )
        graph_module.recompile()

    def _check_untouched(self, before: _State, given: GraphModule, returned: GraphModule) -> None:
        difference = before.difference(_State.of(returned)) if returned is given else "returned another module"
        if difference is not None:
            raise InternalError(f"{self!r} says modified=False but {difference}; compute modified from the edits made")


class _State(NamedTuple):
    """What a pass that says ``modified=False`` must leave as it was.

    The objects themselves are kept, not their ids: an id is used again once its object is gone.
    """

    nodes: tuple[tuple[Any, ...], ...]
    modules: tuple[tuple[Any, ...], ...]
    tensors: tuple[tuple[Any, ...], ...]
    dangling: frozenset[str]

    @classmethod
    def of(cls, graph_module: GraphModule) -> _State:
        tensors = (
            *graph_module.named_parameters(remove_duplicate=False),
            *graph_module.named_buffers(remove_duplicate=False),
        )
        return cls(
            nodes=tuple(
                (node.name, node, node.op, node.target, node.args, node.kwargs) for node in graph_module.graph.nodes
            ),
            modules=tuple(
                (name, module, module.extra_repr())
                for name, module in graph_module.named_modules(remove_duplicate=False)
            ),
            tensors=tuple((name, _Same(tensor), _version(tensor)) for name, tensor in tensors),
            dangling=_dangling(graph_module),
        )

    def difference(self, after: _State) -> str | None:
        """Name the first thing that differs, or return None."""
        for kind, old, new in (
            ("node", self.nodes, after.nodes),
            ("submodule", self.modules, after.modules),
            ("tensor", self.tensors, after.tensors),
        ):
            if old != new:
                return f"{kind} {_first_difference(old, new)!r} changed"
        return None


class _Same:
    """A tensor compared by identity: its own ``==`` compares elements."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor


def _first_difference(old: tuple[tuple[Any, ...], ...], new: tuple[tuple[Any, ...], ...]) -> str:
    for before, after in zip(old, new, strict=False):
        if before != after:
            return str(before[0])
    longer = max(old, new, key=len)
    return str(longer[min(len(old), len(new))][0])


def _version(tensor: torch.Tensor) -> int | None:
    """Return the counter of in-place writes; inference tensors have none."""
    return None if tensor.is_inference() else tensor._version


def _lint_fault(graph_module: GraphModule) -> Exception | None:
    # Graph.lint raises errors of several types, all of which mean the same here.
    try:
        graph_module.graph.lint()
    except Exception as error:
        return error
    return None


def _dangling(graph_module: GraphModule) -> frozenset[str]:
    """Name the submodules with tensors of their own that no node reaches.

    Decided by the module object, not by its name: a shared module may be registered under two
    names and called under one.
    """
    used: set[torch.nn.Module] = {graph_module}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            used.update(graph_module.get_submodule(node.target).modules())
        elif node.op == "get_attr":
            owner_name, _, attribute = node.target.rpartition(".")
            owner = graph_module.get_submodule(owner_name)
            used.add(owner)
            value = getattr(owner, attribute)
            if isinstance(value, torch.nn.Module):
                used.update(value.modules())
    return frozenset(
        name for name, module in graph_module.named_modules() if module not in used and _holds_tensors(module)
    )


def _holds_tensors(module: torch.nn.Module) -> bool:
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _one_line(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _REPR_CHARACTERS else text[: _REPR_CHARACTERS - 3] + "..."
