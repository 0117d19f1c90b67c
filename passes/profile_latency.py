"""Time every distinct layer that some plan could contain, on a runtime: the latency table.

1. A convolution that stays as it is: its own geometry at its own input size.
2. A merge: the merged geometry at the input size of its segment. An activation behind a layer, and an addition, are part
   of what is looked up, because runtimes run them inside of it.
3. What surrounds them (pools, additions, a classifier), on runtimes with a per-layer profiler. What a merge removes of it
   counts for the merge. Bypasses and drops leave nothing.

Runtimes with a per-layer profiler time all of it inside covering networks (:mod:`fxmerge.covering`), the others each layer
alone. Equal signatures are measured once, and not at all where the store knows them; nor are merges of so many
multiply-accumulates that they would be slower than what they replace at twice the rate of the original's quickest layer.
What folds without loss (the branches of a RepVGG block) is deployed as one convolution, and counts as that until a
candidate changes it. Sums of the table are anchored on the original's end-to-end latency: counted runtimes add what the
table leaves out as a constant, measured ones are scaled. Changes nothing in the graph: ``modified`` is False.
"""

from __future__ import annotations

__all__ = ["Deployed", "LatencyTable", "ProfileLatencyPass", "ProfileResult", "layer_signatures", "profile_latency"]

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import Conv
from fxmerge.candidates import Candidate, Enumeration
from fxmerge.graph import (
    META,
    between,
    by_id,
    convolutions,
    is_convolution,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    structure,
)
from fxmerge.linear import activation_after, conv_geometry, is_joined
from fxmerge.passes._base import GraphPass
from fxmerge.progress import progress
from fxmerge.runtimes import LayerSignature, OpSignature, ProfilingRuntime, Runtime, Signature
from fxmerge.store import LatencyStore, measured

if TYPE_CHECKING:
    from fxmerge.covering import Skeleton


_MARGIN = 2.0
"""How much quicker than the quickest layer of the original a merge is taken to be at best, before it is measured."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Latencies of layers and candidates on one runtime.

    Attributes:
        unit: ``ms`` or ``MACs``.
        kept: operation id -> latency of leaving it as it is: every convolution, and what else was measured.
        merged: merge candidate -> latency of the convolution it leaves, and of a norm that returns behind it; infinite
            for those that were not measured, because they have too many multiply-accumulates to be faster.
        folded: ids of convolutions that are one in the deployed original -> latency of that one.
        inside: candidate -> the ids in ``kept`` that it replaces.
        original: end-to-end latency of the original network.
        scale: what sums of table entries are multiplied by to give end-to-end latency.
        rest: what is added: all that no candidate changes.
    """

    unit: str
    kept: Mapping[str, float]
    merged: Mapping[Candidate, float]
    folded: Mapping[tuple[str, ...], float]
    inside: Mapping[Candidate, tuple[str, ...]]
    original: float
    scale: float
    rest: float

    def end_to_end(self, total: float) -> float:
        """Predicted end-to-end latency of a network whose layers add up to ``total``."""
        return self.scale * total + self.rest

    def of(self, candidate: Candidate) -> float:
        """Latency of what a candidate leaves."""
        return self.merged.get(candidate, 0.0)

    def replaced(self, candidate: Candidate) -> float:
        """Latency of what a candidate replaces."""
        return sum(self.kept[name] for name in self.inside[candidate])

    def total(self, candidates: Iterable[Candidate]) -> float:
        """Sum of the layers of the deployed network with these candidates applied."""
        chosen = tuple(candidates)
        gone = [name for candidate in chosen for name in self.inside[candidate]]
        return sum(map(self.of, chosen)) + _total(self.kept, self.folded, gone)


def _total(kept: Mapping[str, float], folded: Mapping[tuple[str, ...], float], gone: Iterable[str] = ()) -> float:
    left = dict(kept)
    for name in gone:
        left.pop(name, None)
    total = 0.0
    for names, latency in folded.items():
        if all(name in left for name in names):
            total += latency - sum(left[name] for name in names)
    return total + sum(left.values())


class ProfileResult(PassResult):
    """torch's PassResult with the latency table."""

    table: LatencyTable

    def __new__(cls, graph_module: fx.GraphModule, table: LatencyTable) -> ProfileResult:
        """Make a result; the graph is never modified."""
        result = super().__new__(cls, graph_module, False)
        assert isinstance(result, ProfileResult)  # noqa: S101 - what the line above makes
        result.table = table
        return result


class ProfileLatencyPass(GraphPass):
    """Measure the latency table of a canonical graph; see the module docstring.

    Attributes:
        enumeration: what :class:`~fxmerge.passes.EnumerateSegmentsPass` found.
        runtime: where to measure.
        batch: images per run.
        original: end-to-end latency of the original network on that runtime.
        store: where latencies are kept; None keeps none.
        deployed: the original as it is deployed, folded, and its inputs; None: convolutions count as they are, and each
            is timed alone.
    """

    def __init__(
        self,
        enumeration: Enumeration,
        runtime: Runtime,
        batch: int,
        original: float,
        store: LatencyStore | None = None,
        deployed: Deployed | None = None,
    ) -> None:
        super().__init__()
        self.enumeration = enumeration
        self.runtime = runtime
        self.batch = batch
        self.original = original
        self.store = store
        self.deployed = deployed

    def call(self, graph_module: fx.GraphModule) -> ProfileResult:
        """Read the graph and measure; the table is in the result's ``table``."""
        table = profile_latency(
            graph_module, self.enumeration, self.runtime, self.batch, self.original, self.store, self.deployed
        )
        return ProfileResult(graph_module, table)


@dataclass(frozen=True, slots=True)
class Deployed:
    """The original as it is deployed: folded without loss, with its inputs at the batch size that counts."""

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def profile_latency(
    gm: fx.GraphModule,
    enumeration: Enumeration,
    runtime: Runtime,
    batch: int,
    original: float,
    store: LatencyStore | None = None,
    deployed: Deployed | None = None,
) -> LatencyTable:
    """The latency table of a canonical graph; see the module docstring."""
    kept, merged = layer_signatures(gm, enumeration, batch)
    folded: dict[tuple[str, ...], LayerSignature] = {}
    around: dict[str, Signature] = {}
    inside_networks = None
    if deployed is not None:
        folded = _folded_signatures(deployed.graph_module, batch)
        if isinstance(runtime, ProfilingRuntime) and merged:
            around = _surroundings(deployed.graph_module, batch)
            inside_networks = _Inside(gm, deployed, kept, merged, folded, around, batch)
    layout = [] if inside_networks is None else [inside_networks.layout]
    with progress(f"Measuring the original's layers on {runtime.name}") as bar:
        wanted = [*kept.values(), *folded.values(), *around.values(), *layout]
        latencies = measured(runtime, wanted, store, bar.advance_to, inside_networks)
    table = {name: latencies[signature] for name, signature in (*kept.items(), *around.items())}
    together = {names: latencies[signature] for names, signature in folded.items() if len(names) > 1}
    table |= {names[0]: latencies[signature] for names, signature in folded.items() if len(names) == 1}
    inside = _replaced(gm, enumeration, table, everything=bool(around))
    hopeful = _hopeful(merged, {c: sum(table[name] for name in inside[c]) for c in merged}, latencies)
    with progress(f"Measuring candidates on {runtime.name}") as bar:
        unknown = [signature for signature in hopeful.values() if signature not in latencies]
        if inside_networks is not None:
            inside_networks.known = latencies
        latencies |= measured(runtime, unknown, store, bar.advance_to, inside_networks)
    total, rest = _total(table, together), sum(latencies[signature] for signature in layout)
    counted = runtime.deterministic
    scale = 1.0 if counted or not total + rest else original / (total + rest)
    return LatencyTable(
        runtime.unit,
        table,
        {c: latencies.get(signature, math.inf) + _norm_cost(gm, c, table) for c, signature in merged.items()},
        together,
        inside,
        original,
        scale,
        original - total if counted else scale * rest,
    )


def _hopeful(
    merged: Mapping[Candidate, LayerSignature],
    replaced: Mapping[Candidate, float],
    latencies: Mapping[Signature, float],
) -> dict[Candidate, LayerSignature]:
    """The merges that could be faster than what they replace, were they twice as quick as the original's quickest layer.

    Quick: multiply-accumulates in a millisecond.
    """
    rates = [_macs(signature) / latency for signature, latency in latencies.items() if latency and _macs(signature)]
    bound = _MARGIN * max(rates, default=math.inf)
    return {c: signature for c, signature in merged.items() if _macs(signature) <= bound * replaced[c]}


def _macs(signature: Signature) -> int:
    if isinstance(signature, OpSignature):
        return 0
    return signature.geometry.macs(signature.in_size, signature.batch)


def _replaced(
    gm: fx.GraphModule, enumeration: Enumeration, table: Mapping[str, float], *, everything: bool
) -> dict[Candidate, tuple[str, ...]]:
    """For each candidate what it replaces of the table: its convolutions, or ``everything`` between entry and exit."""
    nodes = by_id(gm)
    found = {}
    for site in enumeration.sites:
        candidate = site.candidate
        names: Iterable[str] = (*candidate.kept, *candidate.bypassed)
        if everything:
            inside = map(node_id, sorted(between(nodes[candidate.entry], nodes[candidate.exit])))
            names = (*inside, *(join for join, _ in candidate.cuts if candidate.kind == "drop"))
        found[candidate] = tuple(name for name in names if name in table)
    return found


def _norm_cost(gm: fx.GraphModule, candidate: Candidate, table: Mapping[str, float]) -> float:
    """Of the norm that returns behind a merge: as where it stood, by the number of pixels."""
    if candidate.norm is None or candidate.norm not in table:
        return 0.0
    nodes = by_id(gm)
    pixels = [math.prod(shape_of(nodes[name])[2:]) for name in (candidate.exit, candidate.norm)]
    return table[candidate.norm] * pixels[0] / pixels[1]


class _Inside:
    """Measures what it can inside covering networks, and says what it could not."""

    def __init__(
        self,
        gm: fx.GraphModule,
        deployed: Deployed,
        kept: Mapping[str, LayerSignature],
        merged: Mapping[Candidate, LayerSignature],
        folded: Mapping[tuple[str, ...], LayerSignature],
        around: Mapping[str, Signature],
        batch: int,
    ) -> None:
        self.gm = gm
        self.deployed = deployed
        self.merged = merged
        name = _fingerprint(deployed.graph_module)
        self.layout = OpSignature(f"layout {name}", (), batch)  # what the runtime adds of its own
        self.known: Mapping[Signature, float] = {}
        self.skeleton: Skeleton | None = None
        names = {names[0]: signature for names, signature in folded.items()}
        self.operations: dict[str, Signature] = {**kept, **around, **names}

    def __call__(
        self,
        runtime: Runtime,
        missing: frozenset[Signature],
        on_result: Callable[[Signature, float], None],
        advance: Callable[[int, int], None],
    ) -> None:
        from fxmerge.covering import measure_inside, skeleton

        assert isinstance(runtime, ProfilingRuntime)  # noqa: S101 - it is only made for those
        if self.skeleton is None:
            self.skeleton = skeleton(self.deployed.graph_module, self.deployed.args, self.deployed.kwargs)
        found = self.skeleton
        wanted = {c: s for c, s in self.merged.items() if s in missing and found.holds(self.gm, c)}
        measure_inside(runtime, self.gm, found, self.operations, wanted, self.layout, self.known, on_result, advance)


def layer_signatures(
    gm: fx.GraphModule, enumeration: Enumeration, batch: int
) -> tuple[dict[str, LayerSignature], dict[Candidate, LayerSignature]]:
    """What to measure: for every convolution (by id) that stays, and for every merge."""
    kept = {node_id(node): _signature(gm, node, module, batch) for node, module in convolutions(gm)}
    nodes = by_id(gm)
    merged = {}
    for site in enumeration.sites:
        candidate = site.candidate
        if candidate.geometry is not None:
            size = tuple(shape_of(nodes[candidate.entry])[2:])
            exit_ = nodes[candidate.exit]
            follower = candidate.activation or activation_after(gm, exit_)
            joined = candidate.activation is None and is_joined(gm, exit_)
            merged[candidate] = LayerSignature(candidate.geometry, size, batch, follower, joined)
    return kept, merged


def _signature(gm: fx.GraphModule, node: fx.Node, module: Conv, batch: int) -> LayerSignature:
    size = tuple(shape_of(node.all_input_nodes[0])[2:])
    # Other padding modes run as a pad and the same convolution: close enough for a layer that never changes.
    return LayerSignature(conv_geometry(module), size, batch, activation_after(gm, node), is_joined(gm, node))


def _folded_signatures(deployed: fx.GraphModule, batch: int) -> dict[tuple[str, ...], LayerSignature]:
    """What convolutions became in the deployed network, by the ids of those that each is made of."""
    return {
        tuple(node.meta[META]["made_of"]): _signature(deployed, node, module, batch)
        for node, module in convolutions(deployed)
        if "made_of" in node.meta[META]
    }


def _surroundings(deployed: fx.GraphModule, batch: int) -> dict[str, Signature]:
    """Everything in the deployed network that gives a tensor and is no convolution."""
    found: dict[str, Signature] = {}
    for node in deployed.graph.nodes:
        if node.op in ("call_module", "call_function") and is_tensor(node) and not is_convolution(deployed, node):
            sources = [source for source in node.all_input_nodes if is_tensor(source)]
            shapes = tuple(shape_of(each)[1:] for each in (*sources, node))
            after = tuple(_operator(deployed, source) for source in sources)
            found[node_id(node)] = OpSignature(_described(deployed, node), shapes, batch, after)
    return found


def _described(gm: fx.GraphModule, node: fx.Node) -> str:
    """An operation with its options."""
    module = module_of(gm, node)
    if module is not None:
        return repr(module)
    options = fx.node.map_arg((node.args, node.kwargs), lambda _: "_")
    return f"{_operator(gm, node)}{options}"


def _operator(gm: fx.GraphModule, node: fx.Node) -> str:
    module = module_of(gm, node)
    if module is not None:
        return type(module).__name__
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.op


def _fingerprint(gm: fx.GraphModule) -> str:
    return hashlib.sha256("\n".join(structure(gm)).encode()).hexdigest()[:16]
