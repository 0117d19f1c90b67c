"""Time every distinct layer that some plan could contain, on a runtime: the latency table.

1. A convolution that stays as it is: its own geometry at its own input size.
2. A merge: the merged geometry at the input size of its segment.
3. Bypasses and drops cost nothing. Batch norms cost nothing: they fold. An activation behind a layer counts with it.

Equal signatures are measured once, and not at all where the store knows them. What folds without loss (the branches of a
RepVGG block) is deployed as one convolution, and counts as that until a candidate changes it. Sums of the table are
anchored on the original's end-to-end latency: counted runtimes add what the table leaves out as a constant, measured
ones are scaled. Changes nothing in the graph: ``modified`` is False.
"""

from __future__ import annotations

__all__ = ["LatencyTable", "ProfileLatencyPass", "ProfileResult", "layer_signatures", "profile_latency"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.algebra import Conv
from fxmerge.candidates import Candidate, Enumeration
from fxmerge.graph import META, by_id, convolutions, node_id, shape_of
from fxmerge.linear import activation_after, conv_geometry
from fxmerge.passes._base import GraphPass
from fxmerge.progress import progress
from fxmerge.runtimes import LayerSignature, Runtime
from fxmerge.store import LatencyStore, measured


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Latencies of layers and candidates on one runtime.

    Attributes:
        unit: ``ms`` or ``MACs``.
        kept: convolution id -> latency of leaving it as it is.
        merged: merge candidate -> latency of the convolution it leaves.
        folded: ids of convolutions that are one in the deployed original -> latency of that one.
        original: end-to-end latency of the original network.
        scale: what sums of table entries are multiplied by to give end-to-end latency.
        rest: what is added: all that no candidate changes.
    """

    unit: str
    kept: Mapping[str, float]
    merged: Mapping[Candidate, float]
    folded: Mapping[tuple[str, ...], float]
    original: float
    scale: float
    rest: float

    def end_to_end(self, total: float) -> float:
        """Predicted end-to-end latency of a network whose layers add up to ``total``."""
        return self.scale * total + self.rest

    def of(self, candidate: Candidate) -> float:
        """Latency of what a candidate leaves."""
        return self.merged.get(candidate, 0.0)

    def total(self, candidates: Iterable[Candidate]) -> float:
        """Sum of the layers of the deployed network with these candidates applied."""
        return _total(self.kept, self.folded, {candidate: self.of(candidate) for candidate in candidates})


def _total(
    kept: Mapping[str, float], folded: Mapping[tuple[str, ...], float], applied: Mapping[Candidate, float]
) -> float:
    left = dict(kept)
    for candidate in applied:
        for name in (*candidate.kept, *candidate.bypassed):
            left.pop(name, None)
    total = sum(applied.values())
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
        deployed: the original as it is deployed, folded; None stands for the network as it is.
    """

    def __init__(
        self,
        enumeration: Enumeration,
        runtime: Runtime,
        batch: int,
        original: float,
        store: LatencyStore | None = None,
        deployed: fx.GraphModule | None = None,
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


def profile_latency(
    gm: fx.GraphModule,
    enumeration: Enumeration,
    runtime: Runtime,
    batch: int,
    original: float,
    store: LatencyStore | None = None,
    deployed: fx.GraphModule | None = None,
) -> LatencyTable:
    """The latency table of a canonical graph; see the module docstring."""
    kept, merged = layer_signatures(gm, enumeration, batch)
    folded = {} if deployed is None else _folded_signatures(deployed, batch)
    with progress(f"Measuring layers on {runtime.name}") as bar:

        def advance(known: int, everything: int) -> None:
            bar.total = everything
            bar.advance(known - bar.done)

        latencies = measured(runtime, [*kept.values(), *merged.values(), *folded.values()], store, advance)
    kept_latencies = {name: latencies[signature] for name, signature in kept.items()}
    folded_latencies = {names: latencies[signature] for names, signature in folded.items() if len(names) > 1}
    kept_latencies |= {names[0]: latencies[signature] for names, signature in folded.items() if len(names) == 1}
    total = _total(kept_latencies, folded_latencies, {})
    exact = runtime.deterministic
    return LatencyTable(
        runtime.unit,
        kept_latencies,
        {candidate: latencies[signature] for candidate, signature in merged.items()},
        folded_latencies,
        original,
        scale=1.0 if exact or not total else original / total,
        rest=original - total if exact else 0.0,
    )


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
            follower = candidate.activation or activation_after(gm, nodes[candidate.exit])
            merged[candidate] = LayerSignature(candidate.geometry, size, batch, follower)
    return kept, merged


def _signature(gm: fx.GraphModule, node: fx.Node, module: Conv, batch: int) -> LayerSignature:
    size = tuple(shape_of(node.all_input_nodes[0])[2:])
    # Other padding modes run as a pad and the same convolution: close enough for a layer that never changes.
    return LayerSignature(conv_geometry(module), size, batch, activation_after(gm, node))


def _folded_signatures(deployed: fx.GraphModule, batch: int) -> dict[tuple[str, ...], LayerSignature]:
    """What convolutions became in the deployed network, by the ids of those that each is made of."""
    return {
        tuple(node.meta[META]["made_of"]): _signature(deployed, node, module, batch)
        for node, module in convolutions(deployed)
        if "made_of" in node.meta[META]
    }
