"""Computing a part of a canonical graph: some values from others that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen

from .calibration import Batch
from .graph import attribute, module_of, node_id
from .inputs import floats

__all__ = ["Known", "evaluate", "evaluate_all", "recorder", "recording", "taken_over"]

Known: TypeAlias = Mapping[str, Any]
"""Values of one batch of images in the original network, by node id."""


def evaluate(
    gm: fx.GraphModule,
    wanted: fx.Node,
    known: Mapping[fx.Node, Any],
    adapt: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of one node from those that are known, computing only what lies between.

    Args:
        gm: a canonical graph.
        wanted: a node; for the output node the value is what the graph returns, before it is put into the model's own
            containers.
        known: values of nodes that everything ``wanted`` depends on goes through.
        adapt: what to take in place of a module, a parameter or a buffer, default itself.

    Raises:
        KeyError: an input of the graph that ``wanted`` depends on is not known.
    """
    return evaluate_all(gm, [wanted], known, adapt)[0]


def evaluate_all(
    gm: fx.GraphModule,
    wanted: Sequence[fx.Node],
    known: Mapping[fx.Node, Any],
    adapt: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """The values of several nodes at once; see :func:`evaluate`."""
    same = adapt or (lambda thing: thing)
    values = dict(known)
    needed = _needed(wanted, values)
    readers = {node: sum(reader in needed for reader in node.users) for node in needed.difference(wanted)}
    for node in gm.graph.nodes:
        if node not in needed:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            values[node] = args[0]
        elif node.op == "get_attr":
            values[node] = same(attribute(gm, str(node.target)))
        elif node.op == "call_module":
            values[node] = same(module_of(gm, node))(*args, **kwargs)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        else:
            raise KeyError(node.name)
        for source in node.all_input_nodes:
            if source in readers:
                readers[source] -= 1
                if not readers[source]:
                    del values[source]
    return [values[node] for node in wanted]


def _needed(wanted: Sequence[fx.Node], known: Mapping[fx.Node, Any]) -> set[fx.Node]:
    pending = [node for node in wanted if node not in known]
    needed = set(pending)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in known and source not in needed:
                needed.add(source)
                pending.append(source)
    return needed


def taken_over(same: Iterable[fx.Node], values: Known) -> dict[fx.Node, Any]:
    """The values that are known of nodes of another network that compute the same as the original's."""
    return {node: values[node_id(node)] for node in same if node_id(node) in values}


def recording(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A network on the very modules of ``gm`` that returns ``(outputs, values)``, the latter those of some nodes.

    The outputs are as the graph returns them, before they are put into the model's own containers
    (``gm.graph.process_outputs`` does that).
    """
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(gm.graph, twins)
    graph.output((outputs, [twins[node] for node in nodes]))
    codegen = gm.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        graph.set_codegen(_PyTreeCodeGen(codegen.pytree_info._replace(out_spec=None)))
    return fx.GraphModule(gm, graph)


def recorder(
    gm: fx.GraphModule, nodes: Sequence[fx.Node]
) -> Callable[[Batch], tuple[list[Tensor], dict[fx.Node, Any]]]:
    """A forward pass that also tells the values of some nodes, on the modules of ``gm`` in the modes they are in.

    Returns:
        A function of a batch: the floating-point outputs as in :func:`fxmerge.checks.outputs_of`, and the nodes'
        values.
    """
    network = recording(gm, nodes)

    def run(batch: Batch) -> tuple[list[Tensor], dict[fx.Node, Any]]:
        with torch.no_grad():
            found, values = network(*batch[0], **batch[1])
        return floats(found), dict(zip(nodes, values, strict=True))

    return run
