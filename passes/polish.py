"""Train a compressed network for a while so that its outputs and inner values are the original's again; no labels.

The values compared are the outputs, and those behind each changed segment that both networks have: its exit, or the sum or
activation that alone reads it. All that has changed is trained at once by Adam (Kingma and Ba 2015) on the calibration
inputs. The loss is a sum over these values: squared error as a share of the variance, or Kullback-Leibler divergence for
outputs that are logits. A few hundred images are soon learned by heart; what they have to give inside keeps the network from
that. The learning rate falls along a cosine from 1e-3. Norms keep their statistics. The weights stay whose outputs were
nearest to the original's on held-out images, those before the first step among them.

In place. Weights in front of the first change, those used in more than one place, and those outside of the limits do not
change. Where a value is written in place nothing is done.
"""

from __future__ import annotations

__all__ = ["PolishPass", "PolishResult", "polish"]

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.calibration import Calibration, eval_mode, parse_memory
from fxmerge.candidates import Limits
from fxmerge.distances import output_distance, relative_error
from fxmerge.effort import Effort, parse_effort
from fxmerge.errors import UserError
from fxmerge.estimators import Distance, Remembered, remember
from fxmerge.evaluate import Known, evaluate_all, taken_over
from fxmerge.graph import (
    CONVOLUTIONS,
    META,
    by_id,
    changed_nodes,
    graph_meta,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    shared_targets,
    written_in_place,
)
from fxmerge.passes._base import GraphPass

_RATE = 1e-3
_LOOKS = 10
"""At held-out images while it is trained."""


class PolishResult(PassResult):
    """torch's PassResult with the distances of the outputs from the original's, on held-out images."""

    before: float
    after: float

    def __new__(
        cls, graph_module: fx.GraphModule, modified: bool, before: float = math.nan, after: float = math.nan
    ) -> PolishResult:
        """Make a result."""
        result = super().__new__(cls, graph_module, modified)
        assert isinstance(result, PolishResult)  # noqa: S101 - what the line above makes
        result.before, result.after = before, after
        return result


class PolishPass(GraphPass):
    """Train a relaxed graph towards the original's inner values, in place; see the module docstring.

    Attributes:
        original: the canonical graph that was relaxed.
        calibration: images to train on, and held-out ones.
        effort: a time such as "10s", or a number of steps.
        memory: bound on the values that are remembered, such as "2GiB".
    """

    def __init__(
        self,
        original: fx.GraphModule,
        calibration: Calibration,
        effort: int | str = "10s",
        memory: str | int = "2GiB",
    ) -> None:
        super().__init__()
        self.original = original
        self.calibration = calibration
        parsed = parse_effort(effort, "effort", "steps")
        if parsed is None:
            raise UserError("effort=None is no effort; expected a time such as '10s' or a number of steps")
        self.effort = parsed
        self.memory = parse_memory(memory)

    def call(self, graph_module: fx.GraphModule) -> PolishResult:
        """Apply the pass in place; the result's ``before`` and ``after`` are distances, nan where nothing was trained."""
        found = polish(self.original, graph_module, self.calibration, self.effort, self.memory)
        return PolishResult(graph_module, found is not None, *(found or ()))


def polish(
    original: fx.GraphModule,
    gm: fx.GraphModule,
    calibration: Calibration,
    effort: Effort,
    memory: int = 2**31,
    limits: Limits | None = None,
    compare: Distance | None = None,
) -> tuple[float, float] | None:
    """Train in place; the distance of the outputs from the original's on held-out images, before and after.

    None where there is nothing to train: nothing has changed, or a value is written in place.

    Args:
        original: the canonical graph.
        gm: a relaxed copy of it with its weights.
        calibration: images.
        effort: seconds or steps.
        memory: bound on the values that are remembered, in bytes; images that do not fit are not trained on.
        limits: what may change; None for everything.
        compare: how outputs are compared on held-out images, see :func:`fxmerge.estimators.of_outputs`.
    """
    changed = changed_nodes(original, gm)
    if not changed or written_in_place(gm) or written_in_place(original):
        return None
    part = _part(original, gm, changed, limits)
    if not part.trained:
        return None
    known = remember(original, calibration, memory, compare)
    with eval_mode(original), eval_mode(gm):
        return _train(original, gm, part, known, effort, memory)


def _places(original: fx.GraphModule, gm: fx.GraphModule, changed: set[fx.Node]) -> list[fx.Node]:
    """Behind every changed segment a value that the original has, too, and the outputs; in the order of the graph."""
    twins, order = by_id(original), {node: number for number, node in enumerate(gm.graph.nodes)}
    exits = {segment["exit"] for segment in graph_meta(gm).get("segments", ())}
    found = set()
    for node in gm.graph.nodes:
        if node in changed and (node_id(node) in exits or "exit" in node.meta.get(META, {})):  # a chain, or fitted
            place = node
            while (reader := _reader(gm, place)) is not None:
                place = reader
            if _twin(place, twins) is not None:
                found.add(place)
    output = next(iter(gm.graph.find_nodes(op="output")))
    found.update(node for node in output.all_input_nodes if node in changed and _twin(node, twins) is not None)
    return sorted(found, key=order.__getitem__)


def _reader(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What alone reads a value, unless that is a layer or changes the shape: what it lets through is what counts."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or not is_tensor(reader) or shape_of(reader) != shape_of(node):
        return None
    return None if isinstance(module_of(gm, reader), (*CONVOLUTIONS, nn.Linear)) else reader


def _twin(node: fx.Node, twins: Mapping[str, fx.Node]) -> fx.Node | None:
    """What the original has in this place: an operation of the same name, or the exit of the segment that became this one."""
    twin = twins.get(node_id(node)) or twins.get(node.meta.get(META, {}).get("exit", ""))
    return twin if twin is not None and is_tensor(node) and shape_of(twin) == shape_of(node) else None


@dataclass(frozen=True, slots=True)
class _Part:
    """What is trained of the compressed network.

    Attributes:
        enter: values of the original that it reads.
        ends: values that are compared.
        same: what has the original's values, in the whole network.
        trained: parameters.
    """

    enter: list[fx.Node]
    ends: list[fx.Node]
    same: list[fx.Node]
    trained: list[nn.Parameter]


def _part(original: fx.GraphModule, gm: fx.GraphModule, changed: set[fx.Node], limits: Limits | None) -> _Part:
    shared = shared_targets(gm)
    modules = [
        module_of(gm, node)
        for node in gm.graph.nodes
        if node in changed
        and node.op == "call_module"
        and str(node.target) not in shared
        and (limits is None or limits.covers(node_id(node)))
    ]
    trained = dict.fromkeys(p for module in modules if module is not None for p in module.parameters())
    same = [node for node in gm.graph.nodes if node not in changed]
    enter = [node for node in same if not changed.isdisjoint(node.users)]
    ends = _places(original, gm, changed)
    return _Part(enter, ends, same, [p for p in trained if p.is_floating_point()] if ends else [])


@dataclass(frozen=True, slots=True)
class _Rows:
    """One batch: what enters, and what should come out."""

    enter: dict[fx.Node, Any]
    wanted: list[Tensor]


def _train(
    original: fx.GraphModule, gm: fx.GraphModule, part: _Part, known: Remembered, effort: Effort, memory: int
) -> tuple[float, float]:
    start = time.monotonic()
    rows = list(_rows(original, gm, part, known.fit, memory))
    before = least = known.distance(original, gm)
    best = [parameter.detach().clone() for parameter in part.trained]

    def look() -> None:
        nonlocal least, best
        found = known.distance(original, gm)
        if found < least:
            least, best = found, [parameter.detach().clone() for parameter in part.trained]

    def done() -> float:
        return step / effort.count if effort.count else (time.monotonic() - start) / (effort.seconds or 1.0)

    wanted_gradients = [parameter.requires_grad for parameter in part.trained]
    for parameter in part.trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(part.trained, _RATE)
    step, looked = 0, 0
    while (share := done()) < 1:
        if share * _LOOKS >= looked + 1:
            looked = int(share * _LOOKS)
            look()
        optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(_loss(gm, part, rows[step % len(rows)]))
        optimizer.step()
        step += 1
    optimizer.zero_grad()
    look()
    with torch.no_grad():
        for parameter, weight, wanted in zip(part.trained, best, wanted_gradients, strict=True):
            parameter.requires_grad_(wanted)
            parameter.copy_(weight)
    return before, least


def _rows(
    original: fx.GraphModule, gm: fx.GraphModule, part: _Part, batches: Sequence[Known], memory: int
) -> Iterator[_Rows]:
    """Every batch that fits into memory, the first in any case."""
    twins = by_id(original)
    ends = [twin for node in part.ends if (twin := _twin(node, twins)) is not None]
    for number, batch in enumerate(batches):
        with torch.no_grad():
            enter = dict(zip(part.enter, evaluate_all(gm, part.enter, taken_over(part.same, batch)), strict=True))
            wanted = evaluate_all(original, ends, {twins[name]: value for name, value in batch.items()})
        memory -= sum(t.numel() * t.element_size() for t in (*enter.values(), *wanted) if isinstance(t, Tensor))
        if number and memory < 0:
            return
        yield _Rows(enter, wanted)


def _loss(gm: fx.GraphModule, part: _Part, rows: _Rows) -> Tensor:
    found = evaluate_all(gm, part.ends, rows.enter)
    return torch.stack([_one_loss(*each) for each in zip(part.ends, found, rows.wanted, strict=True)]).sum()


def _one_loss(node: fx.Node, found: Tensor, wanted: Tensor) -> Tensor:
    compare = output_distance if any(reader.op == "output" for reader in node.users) else relative_error
    return compare(found.float(), wanted.float())
