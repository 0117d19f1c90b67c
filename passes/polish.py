"""Train a compressed network for a while so that its inner values are the original's again; no labels.

The values compared are those behind each changed segment that both networks have: its exit, or the sum or activation
that alone reads it; and the outputs. A window is what lies between one of them and the third after it. In the order of the
graph, the convolutions, norms and linear layers of each window are trained by Adam (Kingma and Ba 2015) on the calibration
inputs, with the values that enter it from the network in front, trained before, to bring those three values near the
original's: squared error as a share of the variance, or of outputs that are logits the Kullback-Leibler divergence, the mean
over the three. The last window is all that has changed, towards the outputs alone; it gets as much time as all others together. The
learning rate falls along a cosine from 1e-3. Norms keep their statistics. Of a window those weights stay that were nearest
to the original at the same places on held-out images, and in the end all of it if the outputs are nearer.

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

_SPAN = 3
"""Places per window."""
_RATE = 1e-3
_LOOKS = 5
"""At held-out images for each window: a few hundred images are soon learned by heart."""


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
        effort: a time such as "10s", or a number of steps for each window but the last, which takes as many as all others.
        memory: bound on the values of one window, such as "2GiB".
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
        effort: seconds for all windows, or steps for each but the last, which takes as many as all others.
        memory: bound on the values that one window remembers, in bytes; images that do not fit are not trained on.
        limits: what may change; None for everything.
        compare: how outputs are compared, see :func:`fxmerge.estimators.of_outputs`.
    """
    changed = changed_nodes(original, gm)
    places = _places(original, gm, changed)
    if not places or written_in_place(gm) or written_in_place(original):
        return None
    known = remember(original, calibration, memory, compare)
    spans, shares = zip(*_windows(places), strict=True)
    with eval_mode(original), eval_mode(gm):
        before = known.distance(original, gm)
        kept = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
        start = time.monotonic()
        for number, ((front, ends), share) in enumerate(zip(spans, shares, strict=True)):
            window = _Window.between(gm, front, ends, changed, limits)
            if not window.trained:
                continue
            left, steps = None, effort.count and share * effort.count
            if effort.seconds is not None:
                left = (effort.seconds - (time.monotonic() - start)) * share / sum(shares[number:])
                if left <= 0:
                    break
            _train(original, gm, window, known, left, steps, memory)
        after = known.distance(original, gm)
        if not after < before:
            gm.load_state_dict(kept)
            after = before
    return before, after


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


def _windows(places: Sequence[fx.Node]) -> list[tuple[tuple[fx.Node | None, list[fx.Node]], int]]:
    """What is in front of each and the values compared; its share of the time. The last is the whole network."""
    starts = range(max(1, len(places) - _SPAN + 1))
    spans = [(places[start - 1] if start else None, list(places[start : start + _SPAN])) for start in starts]
    whole = None, [place for place in places if any(reader.op == "output" for reader in place.users)]
    windows = [(span, 1) for span in spans]
    return windows if whole in spans else [*windows, (whole, len(windows))]


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
class _Window:
    """A part of the compressed network.

    Attributes:
        enter: values that it reads.
        ends: values that are compared.
        same: what has the original's values, in the whole network.
        trained: parameters.
    """

    enter: list[fx.Node]
    ends: list[fx.Node]
    same: list[fx.Node]
    trained: list[nn.Parameter]

    @staticmethod
    def between(
        gm: fx.GraphModule, front: fx.Node | None, ends: list[fx.Node], changed: set[fx.Node], limits: Limits | None
    ) -> _Window:
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        after = -1 if front is None else order[front]
        inside, pending = set(ends), list(ends)
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in changed and order[source] > after and source not in inside:
                    inside.add(source)
                    pending.append(source)
        shared = shared_targets(gm)
        modules = [
            module_of(gm, node)
            for node in sorted(inside, key=order.__getitem__)
            if node.op == "call_module"
            and str(node.target) not in shared
            and (limits is None or limits.covers(node_id(node)))
        ]
        trained = dict.fromkeys(p for module in modules if module is not None for p in module.parameters())
        enter = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in inside)
        same = [node for node in gm.graph.nodes if node not in changed]
        return _Window(sorted(enter, key=order.__getitem__), ends, same, [p for p in trained if p.is_floating_point()])


@dataclass(frozen=True, slots=True)
class _Rows:
    """One batch: what enters a window, and what should come out."""

    enter: dict[fx.Node, Any]
    wanted: list[Tensor]


def _train(
    original: fx.GraphModule,
    gm: fx.GraphModule,
    window: _Window,
    known: Remembered,
    seconds: float | None,
    steps: int | None,
    memory: int,
) -> None:
    start = time.monotonic()
    rows = list(_rows(original, gm, window, known.fit, memory // 2))
    held_out = list(_rows(original, gm, window, known.held_out, memory // 2))
    least, best = math.inf, [p.detach().clone() for p in window.trained]

    def look() -> None:
        nonlocal least, best
        error = _error(gm, window, held_out)
        if error < least:
            least, best = error, [p.detach().clone() for p in window.trained]

    look()
    wanted_gradients = [p.requires_grad for p in window.trained]
    for parameter in window.trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(window.trained, _RATE)
    step, looked = 0, 0
    while (done := step / steps if steps else (time.monotonic() - start) / (seconds or 1.0)) < 1:
        if done * _LOOKS >= looked + 1:
            looked = int(done * _LOOKS)
            look()
        optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(_loss(gm, window, rows[step % len(rows)]))
        optimizer.step()
        step += 1
    optimizer.zero_grad()
    look()
    with torch.no_grad():
        for parameter, weight, wanted in zip(window.trained, best, wanted_gradients, strict=True):
            parameter.requires_grad_(wanted)
            parameter.copy_(weight)


def _rows(
    original: fx.GraphModule, gm: fx.GraphModule, window: _Window, batches: Sequence[Known], memory: int
) -> Iterator[_Rows]:
    """Every batch that fits into memory, the first in any case."""
    twins = by_id(original)
    for number, batch in enumerate(batches):
        with torch.no_grad():
            enter = dict(zip(window.enter, evaluate_all(gm, window.enter, taken_over(window.same, batch)), strict=True))
            values = {twins[name]: value for name, value in batch.items()}
            ends = [twin for node in window.ends if (twin := _twin(node, twins)) is not None]
            wanted = evaluate_all(original, ends, values)
        memory -= sum(t.numel() * t.element_size() for t in (*enter.values(), *wanted) if isinstance(t, Tensor))
        if number and memory < 0:
            return
        yield _Rows(enter, wanted)


def _loss(gm: fx.GraphModule, window: _Window, rows: _Rows) -> Tensor:
    found = evaluate_all(gm, window.ends, rows.enter)
    return torch.stack([_one_loss(*each) for each in zip(window.ends, found, rows.wanted, strict=True)]).mean()


def _one_loss(node: fx.Node, found: Tensor, wanted: Tensor) -> Tensor:
    compare = output_distance if any(reader.op == "output" for reader in node.users) else relative_error
    return compare(found.float(), wanted.float())


def _error(gm: fx.GraphModule, window: _Window, rows: Sequence[_Rows]) -> float:
    with torch.no_grad():
        return sum(float(_loss(gm, window, each)) for each in rows)
