"""Fit merged convolutions to the original network on calibration inputs, in closed form.

Every merged segment of a relaxed graph becomes the one convolution that it composes to. In the order of the graph, each
of these is then fitted (:mod:`fxmerge.regression`):

1. Its input is what the compressed network in front of it gives, with what was fitted before; its target is what the
   original network gives at the segment's exit, inner activations in place. Where the segment ends in an addition whose
   other operand is known by then, the target is what the original's sum lacks: what went wrong in the skip is made good.
2. The strength of the ridge, whether it draws towards zero or the composed weights, and whether the fitted or the composed
   weights are installed, is decided by the held-out images; of few rows and few such images little is believed.
3. Behind it stands a batch norm that changes nothing, because folded convolutions hardly train (fold removes it).

On request convolutions that are kept, but read what has changed, are fitted between them to what they gave in the
original, and then always the last linear layer, where its output is the network's: their old weights are in place of
composed ones. The matrices of side inputs that pass through a segment are fitted together with its convolution. A segment keeps its
composed weights where a norm returned behind it or an activation was put behind it.

Works in place on a relaxed graph of the original; needs the ids of a canonical graph, and leaves them. A graph without
merged segments is left as it is.
"""

from __future__ import annotations

__all__ = ["RefitPass", "RefitResult", "Reuse", "known_inputs", "put", "refit", "refit_alone", "why_not"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import Conv, Geometry
from fxmerge.calibration import Batch, Calibration, eval_mode, parse_memory
from fxmerge.candidates import Candidate
from fxmerge.evaluate import Known, evaluate, recorder, taken_over
from fxmerge.fitting import Refitted
from fxmerge.graph import (
    CONVOLUTIONS,
    META,
    by_id,
    changed_nodes,
    clone,
    graph_meta,
    is_convolution,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    shared_targets,
    sweep,
    written_in_place,
)
from fxmerge.linear import conv_geometry
from fxmerge.passes._base import GraphPass
from fxmerge.passes.fold import fold_segments
from fxmerge.passes.relax import RelaxPass
from fxmerge.regression import ENOUGH_IMAGES, Fit, Inputs, Regression, Wanted, window_of
from fxmerge.surgery import insert_behind

_RECENT = 2
_aten = torch.ops.aten
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class RefitResult(PassResult):
    """torch's PassResult with what was fitted."""

    fits: tuple[Refitted, ...]

    def __new__(cls, graph_module: fx.GraphModule, modified: bool, fits: tuple[Refitted, ...] = ()) -> RefitResult:
        """Make a result."""
        result = super().__new__(cls, graph_module, modified)
        assert isinstance(result, RefitResult)  # noqa: S101 - what the line above makes
        result.fits = fits
        return result


class RefitPass(GraphPass):
    """Fit the merged segments of a relaxed graph, in place; see the module docstring.

    Attributes:
        original: the canonical graph that was relaxed.
        calibration: images to fit, and held-out ones.
        memory: bound on what one fit holds, such as "2GiB".
    """

    def __init__(self, original: fx.GraphModule, calibration: Calibration, memory: str | int = "2GiB") -> None:
        super().__init__()
        self.original = original
        self.calibration = calibration
        self.memory = parse_memory(memory)

    def call(self, graph_module: fx.GraphModule) -> RefitResult:
        """Apply the pass in place; what was fitted is in the result's ``fits``."""
        images = known_inputs(self.original, self.calibration.fit)
        held_out = known_inputs(self.original, self.calibration.held_out)
        fits = refit(self.original, graph_module, images, held_out, self.memory)
        return RefitResult(graph_module, bool(fits), fits)


def refit(
    original: fx.GraphModule,
    gm: fx.GraphModule,
    fit: Sequence[Known],
    held_out: Sequence[Known],
    memory: int = 2**31,
    *,
    last: bool = True,
    kept: Callable[[str], bool] | None = None,
    reuse: Reuse | None = None,
    norms: bool = True,
) -> tuple[Refitted, ...]:
    """Fit in place.

    Args:
        original: the canonical graph.
        gm: a relaxed copy of it.
        fit: images to fit: for every batch values of the original by node id, the inputs at least. The more are known, the less
            is computed.
        held_out: images to choose by.
        memory: bound on what one fit holds, in bytes.
        last: fit the last linear layer, too, if anything was fitted.
        kept: whether a kept convolution of that id, whose input has changed, is fitted, too; None for none.
        reuse: fits of other plans of the same network and images.
        norms: put a batch norm behind each fitted convolution, and check what folds: not for a network that is only looked at.

    Returns:
        What became of every merged convolution, in the order of the graph, and of the last linear layer.
    """
    segments = {segment["exit"]: segment for segment in graph_meta(gm).get("segments", ())}
    if not segments:
        return ()
    old = set(gm.modules())
    fold_segments(gm, check=norms)
    work = _Refit(original, gm, (fit, held_out), memory, reuse or Reuse(), norms=norms)
    merged = [node for node in gm.graph.nodes if node.meta.get(META, {}).get("exit") in segments]
    nodes = merged if kept is None else _with_kept(original, gm, merged, kept)
    waiting = set(merged)
    found = []
    with eval_mode(original), eval_mode(gm), torch.no_grad():
        for node in nodes:
            if node not in waiting:
                found.append(work.fit_kept(node))
                continue
            waiting.discard(node)
            candidate = Candidate.from_json(segments[node.meta[META]["exit"]]["candidate"])
            found.append(work.fit(node, candidate, waiting))
        fitted = any(not each.reason for each in found)
        classifier = work.fit_last() if last and fitted else None
        if reuse is not None and fitted:  # else batch norms are re-estimated, and values change
            reuse.held_out = [values.recent for values, _ in work.held_out]
        sweep(gm)
    for module in set(gm.modules()) - old:
        module.train(gm.training)
    return (*found, *([] if classifier is None else [classifier]))


def refit_alone(
    original: fx.GraphModule,
    candidates: Iterable[Candidate],
    fit: Sequence[Known],
    held_out: Sequence[Known],
    memory: int = 2**31,
) -> dict[Candidate, fx.GraphModule]:
    """For each candidate the network with it alone, folded and fitted; none for those that cannot be fitted.

    Merges with one entry are fitted together: their patches are gathered once; those that side inputs pass through are left out.
    Parameters of what stays are the original's; modules are in eval mode. Other arguments as of :func:`refit`.
    """
    targets = by_id(original)
    room = 0 if written_in_place(original) else memory // (4 * _RECENT * max(1, len(fit) + len(held_out)))

    def values(batch: Known) -> tuple[_Values, _Values]:
        both = _Values(original, {targets[name]: value for name, value in batch.items()}, room)
        return both, both

    parts = [[values(batch) for batch in part] for part in (fit, held_out)]
    found: dict[Candidate, fx.GraphModule] = {}
    groups: list[list[_Alone]] = []
    for candidate in candidates:
        network = RelaxPass((candidate,))(clone(original, share_parameters=True)).graph_module.eval()
        exits = {segment["exit"] for segment in graph_meta(network)["segments"]}
        fold_segments(network, check=False)
        node = next(node for node in network.graph.nodes if node.meta.get(META, {}).get("exit") in exits)
        if (
            why_not(candidate, targets)
            or node.meta[META].get("sides")
            or node_id(node.all_input_nodes[0]) != candidate.entry
        ):
            continue
        module = module_of(network, node)
        assert isinstance(module, CONVOLUTIONS)  # noqa: S101 - fold made it
        network.recompile()
        found[candidate] = network
        alone = _Alone(candidate, conv_geometry(module), module)
        group = next((group for group in groups if _window([*group, alone]) is not None), None)
        if group is None:
            groups.append([alone])
        else:
            group.append(alone)
    with eval_mode(original), torch.no_grad():
        for group in groups:
            _fit_together(group, parts, targets, memory)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """The one convolution that a candidate leaves."""

    candidate: Candidate
    geometry: Geometry
    module: Conv


def _window(group: Sequence[_Alone]) -> Geometry | None:
    if len({each.candidate.entry for each in group}) > 1:
        return None
    return window_of([each.geometry for each in group])


def _fit_together(
    group: Sequence[_Alone],
    parts: Sequence[Sequence[tuple[_Values, _Values]]],
    targets: Mapping[str, fx.Node],
    memory: int,
) -> None:
    window = _window(group)
    assert window is not None  # noqa: S101 - that is what makes a group
    exits = tuple(dict.fromkeys(each.candidate.exit for each in group))
    source, wanted = targets[group[0].candidate.entry], tuple(targets[name] for name in exits)
    fitted, held_out = (_Pairs(part, source, wanted) for part in parts)
    regression = Regression(window, fitted, held_out, memory)
    kernels: dict[Geometry, list[_Alone]] = {}
    for each in group:
        kernels.setdefault(replace(each.geometry, out_channels=each.geometry.groups), []).append(each)
    for same in kernels.values():
        asked = [Wanted(e.geometry, exits.index(e.candidate.exit), e.module.weight, _bias(e.module)) for e in same]
        for each, fit in zip(same, regression.fit(asked), strict=True):
            put(fit, each.module)


def known_inputs(gm: fx.GraphModule, batches: Iterable[Batch]) -> list[Known]:
    """Batches as :func:`refit` takes them: the inputs alone."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    run = recorder(gm, inputs)
    with eval_mode(gm):
        return [{node_id(node): value for node, value in run(batch)[1].items()} for batch in batches]


class _Values:
    """Values of one batch of images in a network: those that are known, and the last few that were asked for."""

    def __init__(self, gm: fx.GraphModule, known: dict[fx.Node, Any], room: int) -> None:
        self.gm = gm
        self.known = known
        self.room = room
        self.recent: dict[fx.Node, Any] = {}

    def __call__(self, node: fx.Node) -> Tensor:
        value = evaluate(self.gm, node, {**self.known, **self.recent})
        if node not in self.known and isinstance(value, Tensor) and value.numel() * value.element_size() <= self.room:
            self.recent.pop(node, None)
            self.recent[node] = value
            while len(self.recent) > _RECENT:
                self.recent.pop(next(iter(self.recent)))
        found: Tensor = value
        return found


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What convolutions read in the compressed network, and what they should give: values of the original, less what is added."""

    batches: Sequence[tuple[_Values, _Values]]
    source: fx.Node
    wanted: tuple[fx.Node, ...]
    other: fx.Node | None = None
    sides: tuple[fx.Node, ...] = ()
    shaped: Callable[[Tensor], Tensor] = lambda value: value

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Inputs, list[Tensor]]]:
        for values, originals in self.batches:
            x, targets = values(self.source), [originals(node) for node in self.wanted]
            if self.other is not None:
                targets = [target - values(self.other) for target in targets]
            shaped = self.shaped(x), [self.shaped(target) for target in targets]
            if self.sides:
                sides = torch.cat([values(node).flatten(1).expand(len(x), -1) for node in self.sides], 1)
                yield (shaped[0], sides), shaped[1]
            else:
                yield shaped


_Key: TypeAlias = tuple[frozenset[Candidate], Candidate, str]


@dataclass(slots=True)
class Reuse:
    """Fits of one plan that others can take over: where all that starts in front of what was fitted to is the same.

    Attributes:
        plan: all candidates of the plan that is fitted now.
        memory: bound on the weights that are kept, in bytes; the oldest go first.
        fits: by what starts in front, the candidate, and what it was fitted to.
        held_out: values that the plan's fitted network gave for every batch that is held out: those computed last.
    """

    plan: tuple[Candidate, ...] = ()
    memory: int = 2**29
    fits: dict[_Key, Fit] = field(default_factory=dict)
    held_out: list[Mapping[fx.Node, Any]] = field(default_factory=list)

    def keep(self, key: _Key, fit: Fit) -> None:
        """Remember a fit."""
        self.fits[key] = fit
        while sum(each.weight.nbytes for each in self.fits.values()) > self.memory:
            del self.fits[next(iter(self.fits))]


class _Refit:
    """One run of the pass."""

    def __init__(
        self,
        original: fx.GraphModule,
        gm: fx.GraphModule,
        parts: tuple[Sequence[Known], Sequence[Known]],
        memory: int,
        reuse: Reuse,
        *,
        norms: bool,
    ) -> None:
        self.reuse = reuse
        self.norms = norms
        self.order = {node_id(node): number for number, node in enumerate(original.graph.nodes)}
        self.original = original
        self.gm = gm
        self.memory = memory
        self.targets = by_id(original)
        changed = changed_nodes(original, gm)
        same = [node for node in gm.graph.nodes if node not in changed]
        room = 0 if written_in_place(gm) else memory // (4 * _RECENT * max(1, sum(map(len, parts))))

        def values(batch: Known) -> tuple[_Values, _Values]:
            # What gives the same as in the original is known in the compressed network, too.
            return _Values(gm, taken_over(same, batch), room), _Values(
                original, {self.targets[name]: v for name, v in batch.items()}, room
            )

        self.fitted, self.held_out = ([values(batch) for batch in part] for part in parts)

    def fit(self, node: fx.Node, candidate: Candidate, waiting: set[fx.Node]) -> Refitted:
        """Fit one merged convolution, where that can be done."""
        module = module_of(self.gm, node)
        assert isinstance(module, CONVOLUTIONS)  # noqa: S101 - fold made it
        reason = why_not(candidate, self.targets)
        if reason:
            return Refitted(node_id(node), reason=reason)
        sides = _sides(self.gm, node)
        total, other = self._joined(sides[-1].total if sides else node, waiting)
        wanted = self.targets[candidate.exit if total is None else node_id(total)]
        before = frozenset(c for c in self.reuse.plan if self.order[c.entry] < self.order[node_id(wanted)])
        key = before, candidate, node_id(wanted)
        fit = self.reuse.fits.get(key)
        if fit is None:
            matrices = torch.cat([side.layer.weight for side in sides], 1) if sides else None
            prior = Wanted(conv_geometry(module), 0, module.weight, _bias(module), matrices)
            fit = self._solve(prior, node.all_input_nodes[0], wanted, other, tuple(side.value for side in sides))
            self.reuse.keep(key, fit)
        put(fit, module)
        if fit.side is not None:
            for side, matrix in zip(sides, torch.split(fit.side, [s.layer.in_features for s in sides], 1), strict=True):
                side.layer.weight.copy_(matrix)
        if self.norms:
            self._normalise(node, module)
        return _outcome(node_id(node), fit)

    def fit_kept(self, node: fx.Node) -> Refitted:
        """Fit a convolution that is kept to what it gave in the original; its old weights are what a ridge may draw to."""
        module = module_of(self.gm, node)
        assert isinstance(module, CONVOLUTIONS)  # noqa: S101 - how it was chosen
        prior = Wanted(conv_geometry(module), 0, module.weight, _bias(module))
        fit = self._solve(prior, node.all_input_nodes[0], self.targets[node_id(node)])
        if module.bias is None and fit.strength is not None:
            trains = module.weight.requires_grad
            module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0].flatten(1)[:, 0]), requires_grad=trains)
        put(fit, module)
        return _outcome(node_id(node), fit)

    def _joined(self, node: fx.Node, waiting: set[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
        """The addition that alone reads a convolution, and the other operand, if that is final by now."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or reader.target is not _aten.add.Tensor or reader.kwargs or len(reader.args) != 2:
            return None, None
        first, second = reader.args
        other = second if first is node else first
        if not isinstance(other, fx.Node) or not is_tensor(other) or other is node:
            return None, None
        twin = self.targets.get(node_id(reader))
        if twin is None or twin.target is not _aten.add.Tensor or shape_of(reader) != shape_of(node):
            return None, None
        if not waiting.isdisjoint(_ancestors(other)):
            return None, None
        return reader, other

    def _solve(
        self,
        prior: Wanted,
        source: fx.Node,
        wanted: fx.Node,
        other: fx.Node | None = None,
        sides: tuple[fx.Node, ...] = (),
        shaped: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Fit:
        fitted, held_out = (
            _Pairs(part, source, (wanted,), other, sides, shaped) for part in (self.fitted, self.held_out)
        )
        return Regression(prior.geometry, fitted, held_out, self.memory).fit([prior])[0]

    def _normalise(self, node: fx.Node, module: Any) -> None:
        """Put a batch norm behind a convolution whose running statistics are what it scales and shifts back."""
        count, total, squares = 0, 0.0, 0.0
        axes = [0, *range(2, module.weight.ndim)]
        images = 0
        for values, _ in self.fitted:
            if images >= ENOUGH_IMAGES:
                break
            wide: Any = evaluate(self.gm, node, {**values.known, **values.recent}).double()
            images += len(wide)
            count += wide.numel() // wide.shape[1]
            total, squares = total + wide.sum(axes), squares + wide.square().sum(axes)
        mean: Any = total / count
        variance: Any = (squares / count - mean.square()).clamp_min(1e-12)
        norm: Any = _NORMS[module.weight.ndim - 2](module.out_channels).to(module.weight)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
        behind = insert_behind(self.gm, node, norm.eval(), f"{node.target}_norm")
        del behind.meta[META]["made_of"]
        self.gm.recompile()

    def fit_last(self) -> Refitted | None:
        """Fit the linear layer whose output is the network's, if there is one."""
        output = next(iter(self.gm.graph.find_nodes(op="output")))
        node = output.all_input_nodes[0] if len(output.all_input_nodes) == 1 else None
        module = None if node is None else module_of(self.gm, node)
        if node is None or not isinstance(module, nn.Linear) or node_id(node) not in self.targets:
            return None
        source = node.all_input_nodes[0]
        if len(shape_of(source)) != 2 or str(node.target) in shared_targets(self.gm):
            return None
        pointwise = Geometry.pointwise(module.in_features, module.out_features, 1)
        prior = Wanted(pointwise, 0, module.weight[..., None], _bias(module))
        fit = self._solve(prior, source, self.targets[node_id(node)], shaped=lambda value: value[..., None])
        module.weight.copy_(fit.weight[..., 0].to(module.weight.dtype))
        if module.bias is not None:
            module.bias.copy_(fit.bias.to(module.bias.dtype))
        return _outcome(node_id(node), fit)


def _with_kept(
    original: fx.GraphModule, gm: fx.GraphModule, merged: Sequence[fx.Node], may: Callable[[str], bool]
) -> list[fx.Node]:
    """Merged convolutions and those kept ones that read what has changed, in the order of the graph."""
    before, changed, shared = by_id(original), changed_nodes(original, gm), shared_targets(gm)

    def fits(node: fx.Node) -> bool:
        twin = before.get(node_id(node))
        return (
            is_convolution(gm, node)
            and not changed.isdisjoint(node.all_input_nodes)
            and str(node.target) not in shared
            and twin is not None
            and shape_of(twin) == shape_of(node)
            and may(node_id(node))
        )

    return [node for node in gm.graph.nodes if node in merged or fits(node)]


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """A side input behind a merged convolution: its value, its matrix, and the sum that it goes into."""

    value: fx.Node
    layer: nn.Linear
    total: fx.Node


def _sides(gm: fx.GraphModule, node: fx.Node) -> list[_Side]:
    """What :func:`fxmerge.surgery.insert_side` put behind a convolution, in the order of the graph."""
    found = []
    for _ in node.meta[META].get("sides", ()):
        (total,) = node.users
        mapped = next(source for source in total.all_input_nodes if source is not node)
        while not isinstance(layer := module_of(gm, mapped), nn.Linear):
            (mapped,) = mapped.all_input_nodes
        (flat,) = mapped.all_input_nodes
        found.append(_Side(flat.all_input_nodes[0], layer, total))
        node = total
    return found


def why_not(candidate: Candidate, targets: Mapping[str, fx.Node]) -> str:
    """Why the merged convolution of a candidate cannot be fitted; empty where it can.

    Args:
        candidate: what it is left of.
        targets: the nodes of the original by id.
    """
    if candidate.norm is not None:
        return f"the norm {candidate.norm!r} stands behind it"
    if candidate.activation is not None:
        return "an activation was put behind it"
    if candidate.exit not in targets:
        return f"the original has no value {candidate.exit!r}"
    return ""


def put(fit: Fit, module: Conv) -> None:
    """Give a convolution the weights of a fit, in its own dtype."""
    module.weight.copy_(fit.weight)
    if module.bias is not None:
        module.bias.copy_(fit.bias)


def _bias(module: Conv | nn.Linear) -> Tensor:
    return module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias


def _outcome(name: str, fit: Fit) -> Refitted:
    return Refitted(name, fit.error, fit.prior_error, fit.rows_per_unknown, fit.strength is not None)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    pending, found = [node], {node}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found
