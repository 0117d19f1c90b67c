"""Covering networks: every layer that a plan could contain, timed inside networks instead of alone.

A layer alone is not the layer in a network: on ONNX Runtime's CPU provider up to half of a depthwise convolution alone
is the change of layout around it, and in a network an addition and an activation run inside of it. So a few rewrites
of the network itself are profiled, operator by operator, which together hold every distinct candidate. The smallest
time of an operator over all sweeps counts, on average over the operators of a network that are alike; one scale, from
the original's end-to-end latency, does the rest (:mod:`fxmerge.passes.profile_latency`).

The rewrites are made on the ONNX graph, which takes milliseconds: the original is exported once, its nodes named after the
operations of the canonical graph that they come from, and a candidate replaces what stands between two values by one
convolution with random weights.
"""

from __future__ import annotations

import ast
import logging
import math
import random
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .candidates import Candidate
from .errors import FxmergeError
from .exporters import input_arrays, onnx_bytes
from .graph import META, between, by_id, clone, module_of, node_id
from .linear import FREE
from .runtimes import LayerSignature, ProfilingRuntime, Signature
from .surgery import join_operands

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from .runtimes import Profile

__all__ = ["Skeleton", "cover", "measure_inside", "skeleton"]

_log = logging.getLogger("fxmerge")
_SWEEPS = 3
_MOST_SWEEPS = 6
_AGREEMENT = 0.02
_TOGETHER = 7
"""Networks whose sweeps alternate with each other and the original; more would only hold more memory."""
_TOKEN = re.compile(r"fxm(\d+)_")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The original as an ONNX graph in which candidates can be put.

    Attributes:
        model: the network, batch norms folded.
        feeds: its inputs.
        operations: number in the ONNX nodes' names -> id of the operation.
        values: id of an operation -> name of the ONNX value that it computes.
    """

    model: onnx.ModelProto
    feeds: Mapping[str, NDArray[Any]]
    operations: tuple[str, ...]
    values: Mapping[str, str]

    def holds(self, gm: fx.GraphModule, candidate: Candidate) -> bool:
        """Whether the candidate can be put here: its ends are not inside of what was folded without loss."""
        return all(self._value(gm, name) is not None for name in _ends(gm, candidate))

    def _value(self, gm: fx.GraphModule, name: str) -> str | None:
        """That an operation computes; of a batch norm that went into the convolution behind it, what it reads."""
        while name not in self.values:
            node = by_id(gm)[name]
            if not isinstance(module_of(gm, node), _BatchNorm):
                return None
            name = node_id(node.all_input_nodes[0])
        return self.values[name]

    def _placed(self, gm: fx.GraphModule, candidate: Candidate) -> tuple[str, str]:
        """The values at a candidate's ends."""
        first, last = (self._value(gm, name) for name in _ends(gm, candidate))
        assert first is not None  # noqa: S101 - it is only asked for what it holds
        assert last is not None  # noqa: S101 - as above
        return first, last

    def rewritten(self, gm: fx.GraphModule, candidates: Sequence[Candidate]) -> onnx.ModelProto:
        """The network with these disjoint candidates in place of what they replace.

        Weights are random. The convolution of candidate ``k`` is named as operation ``len(operations) + k``. A side input,
        and a norm that would return, are left out.
        """
        import onnx
        from onnx import numpy_helper

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        made: list[onnx.NodeProto] = []
        constants: dict[str, NDArray[Any]] = {}
        renamed: dict[str, str] = {}
        for number, candidate in enumerate(candidates, len(self.operations)):
            exit_, target = self._placed(gm, candidate)[1], f"fxm{number}_out"
            nodes, weights = self._replacement(gm, candidate, target, f"fxm{number}_")
            made += nodes
            constants |= weights
            renamed[exit_] = target
        for node in (*model.graph.node, *made):
            node.input[:] = [renamed.get(name, name) for name in node.input]
        for entry in model.graph.output:
            entry.name = renamed.get(entry.name, entry.name)
        alive = _needed((*model.graph.node, *made), [entry.name for entry in model.graph.output])
        read = {name for node in alive for name in node.input}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
        kept += [numpy_helper.from_array(array, name) for name, array in constants.items()]
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(alive)
        model.graph.initializer.extend(kept)
        return model

    def _replacement(
        self, gm: fx.GraphModule, candidate: Candidate, target: str, prefix: str
    ) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
        from onnx import helper

        from .runtimes.onnxruntime import conv_nodes

        source = self._placed(gm, candidate)[0]
        geometry = candidate.geometry
        if geometry is None:
            return [helper.make_node("Identity", [source], [target], name=prefix)], {}
        shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
        some = np.random.default_rng(0).standard_normal(4096, dtype=np.float32)
        weight = np.resize(some / np.sqrt(np.prod(shape[1:])).astype(np.float32), shape)
        bias = np.zeros(geometry.out_channels, dtype=np.float32)
        nodes, constants = conv_nodes(geometry, weight, bias, source, target, candidate.activation, prefix)
        dtype = _numpy_type(gm, candidate)
        return nodes, {
            name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in constants.items()
        }


def _numpy_type(gm: fx.GraphModule, candidate: Candidate) -> np.dtype[Any]:
    """Of the weights that a candidate merges."""
    (first, *_) = (*candidate.kept, *candidate.bypassed)
    conv: Any = module_of(gm, by_id(gm)[first])
    return torch.empty(0, dtype=conv.weight.dtype).numpy().dtype


def _ends(gm: fx.GraphModule, candidate: Candidate) -> tuple[str, str]:
    """The value that a candidate reads, or for a dropped branch its join's other operand, and the one that it gives."""
    if candidate.kind != "drop":
        return candidate.entry, candidate.exit
    nodes = by_id(gm)
    ((join, position), *_) = candidate.cuts
    return node_id(join_operands(nodes[join])[1 - position]), join


def _needed(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """What the outputs depend on, every node behind those that it reads."""
    makers = {value: node for node in nodes for value in node.output}
    ordered: list[onnx.NodeProto] = []
    done: set[str] = set()
    stack = [(name, False) for name in outputs]
    while stack:
        name, ready = stack.pop()
        node = makers.get(name)
        if node is None or (name in done and not ready):
            continue
        if ready:
            ordered.append(node)
            continue
        done.update(node.output)
        stack.append((name, True))
        stack.extend((read, False) for read in node.input if read not in done)
    return ordered


def skeleton(deployed: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Skeleton:
    """Export a folded canonical graph such that every ONNX node is known by the operation it belongs to.

    Raises:
        UnsupportedError: the network cannot be exported to ONNX.
    """
    import onnx

    tagged, operations = _tagged(deployed)
    model = onnx.load_model_from_string(onnx_bytes(tagged, args, kwargs, dynamic_batch=False))
    owners = [_owner(node) for node in model.graph.node]
    fixed = {entry.name for entry in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    renamed: dict[str, str] = {}
    for place, (node, owner) in enumerate(zip(model.graph.node, owners, strict=True)):
        if owner is not None:
            node.name = f"fxm{owner}_{place}"
            renamed |= {name: f"fxm{owner}_{place}_{k}" for k, name in enumerate(node.output) if name not in fixed}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        del node.metadata_props[:]
    values = _values(deployed, operations, model, owners)
    return Skeleton(model, input_arrays(deployed, args, kwargs), operations, values)


def _tagged(deployed: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy whose every operation is a call of a module of its own, which the exporter names in what it makes of it."""
    gm = clone(deployed)
    operations: list[str] = []
    for node in list(gm.graph.nodes):
        if node.op not in ("call_module", "call_function"):
            continue
        called = module_of(gm, node) if node.op == "call_module" else node.target
        path = f"fxm{len(operations)}"
        operations.append(node_id(node))
        gm.add_submodule(path, _Call(called))
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(path, node.args, node.kwargs)
        call.meta = {
            META: node.meta[META]
        }  # without the module that it was captured in, whose name would be noted down
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.recompile()
    return gm, tuple(operations)


class _Call(nn.Module):
    def __init__(self, called: Any) -> None:
        super().__init__()
        self.called = called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.called(*args, **kwargs)


def _owner(node: onnx.NodeProto) -> int | None:
    """The number of the operation that an ONNX node came from, as torch's exporter notes it down."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            for scope in ast.literal_eval(entry.value):
                match = re.match(r"fxm(\d+)(\.|$)", scope)
                if match:
                    return int(match[1])
    return None


def _values(
    deployed: fx.GraphModule, operations: Sequence[str], model: onnx.ModelProto, owners: Sequence[int | None]
) -> dict[str, str]:
    """The ONNX value of every operation that gives one tensor and was not simplified away; a dropout hands its input on."""
    readers: dict[str, set[int | None]] = {}
    for node, owner in zip(model.graph.node, owners, strict=True):
        for name in node.input:
            readers.setdefault(name, set()).add(owner)
    for entry in model.graph.output:
        readers.setdefault(entry.name, set()).add(-1)
    given: dict[int, list[str]] = {}
    for node, owner in zip(model.graph.node, owners, strict=True):
        if owner is not None:
            outside = [name for name in node.output if readers.get(name, set()) - {owner}]
            given.setdefault(owner, []).extend(outside)
    numbers = {name: number for number, name in enumerate(operations)}
    inputs = {node_id(node): str(node.target) for node in deployed.graph.find_nodes(op="placeholder")}
    names = {entry.name for entry in model.graph.input}
    values = {name: target for name, target in inputs.items() if target in names}
    for node in deployed.graph.nodes:
        number = numbers.get(node_id(node))
        if number is None:
            continue
        outputs = given.get(number, [])
        sources = [node_id(source) for source in node.all_input_nodes]
        # What was folded without loss gives what the last of its operations gave, not what the first did.
        name = node.meta[META].get("exit", node_id(node))
        if len(outputs) == 1:
            values[name] = outputs[0]
        elif not outputs and isinstance(module_of(deployed, node), FREE) and sources[0] in values:
            values[name] = values[sources[0]]
    return values


# --- which networks ---------------------------------------------------------------------------------------------------


def cover(gm: fx.GraphModule, wanted: Mapping[Candidate, Signature], seed: int = 0) -> Iterator[tuple[Candidate, ...]]:
    """Sets of disjoint candidates that together hold every distinct signature, each new set as many as it can.

    Args:
        gm: the canonical graph.
        wanted: the candidates to choose from, with what is to be measured of each.
        seed: of the order in which they are tried.
    """
    nodes = by_id(gm)
    insides = {c: frozenset(map(node_id, between(nodes[c.entry], nodes[c.exit]))) for c in wanted}
    missing = set(wanted.values())
    order = sorted(wanted, key=lambda c: (c.entry, c.exit, str(c)))
    draw = random.Random(seed)  # noqa: S311 - a seeded choice
    while missing:
        draw.shuffle(order)
        chosen: list[Candidate] = []
        used: set[str] = set()
        for candidate in order:
            if wanted[candidate] in missing and used.isdisjoint(insides[candidate]):
                chosen.append(candidate)
                used |= insides[candidate]
                missing.discard(wanted[candidate])
        yield tuple(chosen)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_inside(
    runtime: ProfilingRuntime,
    gm: fx.GraphModule,
    found: Skeleton,
    operations: Mapping[str, Signature],
    wanted: Mapping[Candidate, Signature],
    layout: Signature,
    known: Mapping[Signature, float],
    on_result: Callable[[Signature, float], None],
    advance: Callable[[int, int], None],
) -> None:
    """Profile the original and its covering networks, and hand over the time that every signature takes in the original.

    The original runs in turns with every group of networks: what it takes each time corrects for a machine that changes its
    speed.

    Args:
        runtime: which profiles.
        gm: the canonical graph.
        found: the original's ONNX graph.
        operations: id of an operation of the original -> its signature.
        wanted: merges to measure, that the skeleton holds -> signature.
        layout: the signature of what the runtime adds to the original of its own.
        known: what the original's operations take in the table so far; empty takes it from here.
        on_result: called with each signature and its milliseconds after every group of networks, and again with the
            corrected ones.
        advance: called with (sweeps done, sweeps in all).
    """
    networks = list(cover(gm, wanted))
    runs: list[_Run] = []
    groups = [networks[start : start + _TOGETHER] for start in range(0, len(networks), _TOGETHER)] or [[]]
    total, done = (len(networks) + len(groups)) * _SWEEPS, 0
    for group in groups:
        built = [
            (chosen, model, profile)
            for chosen in ((), *group)
            for model in [found.rewritten(gm, chosen)]
            if (profile := _profile(runtime, model, found.feeds, chosen)) is not None
        ]
        for _ in _swept([profile for _, _, profile in built]):
            done += 1
            total = max(total, done)
            advance(done, total)
        original: _Run | None = None
        for chosen, model, profile in built:
            there = _signatures(found, operations, wanted, chosen, gm)
            run = _Run((layout, *there.values()), _read(profile, model, there, layout), original)
            original = original or run
            runs.append(run)
            for signature, latency in run.own.items():
                on_result(signature, latency)
    known = known or runs[0].latencies
    best: dict[Signature, float] = {}
    for run in runs:
        factor = (run.original or run).correction(known)
        for signature, latency in run.own.items():
            best[signature] = min(factor * latency, best.get(signature, math.inf))
    for signature, latency in best.items():
        on_result(signature, latency)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a network's operations took.

    Attributes:
        signatures: of all its operations, repetitions included.
        latencies: what each took.
        original: the original in the same turns; None if this is it.
    """

    signatures: tuple[Signature, ...]
    latencies: Mapping[Signature, float]
    original: _Run | None

    @property
    def own(self) -> dict[Signature, float]:
        """What the original does not have; of the original everything."""
        elsewhere = {} if self.original is None else self.original.latencies
        return {signature: latency for signature, latency in self.latencies.items() if signature not in elsewhere}

    def correction(self, known: Mapping[Signature, float]) -> float:
        """What the operations took at another time, as a multiple of what they took here."""
        both = [each for each in self.signatures if each in known and each in self.latencies]
        return sum(known[each] for each in both) / sum(self.latencies[each] for each in both)


def _profile(
    runtime: ProfilingRuntime, model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], chosen: Sequence[Candidate]
) -> Profile | None:
    """A network that is ready to be swept; None where the runtime rejects a rewrite: its merges will be timed alone."""
    try:
        return runtime.profile(model.SerializeToString(), feeds)
    except FxmergeError as error:
        if not chosen:
            raise
        _log.warning("%d merges are timed alone, not in a network: %s", len(chosen), error)
        return None


def _read(
    profile: Profile, model: onnx.ModelProto, there: Mapping[int, Signature], layout: Signature
) -> dict[Signature, float]:
    """The time of every signature in one network, on average over the operations that have it, and of the layout.

    Not the smallest of them: what occurs often would look quicker than what occurs once.
    """
    layers = {number for number, signature in there.items() if isinstance(signature, LayerSignature)}
    times, rest = _by_operation(profile.latencies(), model, layers)
    each: dict[Signature, list[float]] = {layout: [rest]}
    for number, signature in there.items():
        # What runs inside of a layer costs nothing of its own; a layer itself always takes time.
        if number in times or number not in layers:
            each.setdefault(signature, []).append(times.get(number, 0.0))
    return {signature: statistics.fmean(latencies) for signature, latencies in each.items()}


def _swept(profiles: Sequence[Profile]) -> Iterator[None]:
    """Sweep all networks in turns, each at least three times and until its best two sweeps agree; a step is one sweep."""
    lows: list[list[float]] = [[] for _ in profiles]
    for sweep in range(_MOST_SWEEPS):
        for profile, seen in zip(profiles, lows, strict=True):
            if sweep < _SWEEPS or _apart(seen) > _AGREEMENT:
                seen.append(profile.sweep())
                yield


def _apart(latencies: Sequence[float]) -> float:
    first, second = sorted(latencies)[:2]
    return (second - first) / first


def _signatures(
    found: Skeleton,
    operations: Mapping[str, Signature],
    wanted: Mapping[Candidate, Signature],
    chosen: Sequence[Candidate],
    gm: fx.GraphModule,
) -> dict[int, Signature]:
    """What the numbered operations of a rewritten network are signatures of: those of the original that are left, and merges."""
    nodes = by_id(gm)
    gone = {node_id(node) for each in chosen for node in between(nodes[each.entry], nodes[each.exit])}
    left = {
        number: operations[name]
        for number, name in enumerate(found.operations)
        if name in operations and name not in gone
    }
    return {**left, **{number: wanted[each] for number, each in enumerate(chosen, len(found.operations))}}


def _by_operation(
    latencies: Mapping[str, float], model: onnx.ModelProto, layers: Collection[int]
) -> tuple[dict[int, float], float]:
    """Milliseconds of every numbered operation, and of what belongs to none.

    What several operations run in has the name of any of them. It counts for the convolution among them. What has no number
    (a change of layout) counts for the operation next to it that is no convolution, because convolutions share a layout.
    """
    owners = [_operation(name, layers) for name in latencies]
    hosts = _hosts(model, {owner for owner in owners if owner is not None}, layers)
    owners = [owner if owner is None else hosts.get(owner, owner) for owner in owners]
    times: dict[int, float] = {}
    rest = 0.0
    for place, latency in enumerate(latencies.values()):
        owner = owners[place]
        if owner is None:
            owner = _cause(owners, place, layers)
        if owner is None:
            rest += latency
        else:
            times[owner] = times.get(owner, 0.0) + latency
    return times, rest


def _operation(name: str, layers: Collection[int]) -> int | None:
    numbers = [int(number) for number in _TOKEN.findall(name)]
    return next((number for number in numbers if number in layers), numbers[0] if numbers else None)


def _cause(owners: Sequence[int | None], place: int, layers: Collection[int]) -> int | None:
    """Of the operations that run next behind and in front of a change of layout the first that is no convolution."""
    around = (owners[place + 1 :], owners[place - 1 :: -1] if place else ())
    nearest = (next((owner for owner in side if owner is not None), None) for side in around)
    return next((owner for owner in nearest if owner is not None and owner not in layers), None)


def _hosts(model: onnx.ModelProto, timed: Collection[int], layers: Collection[int]) -> dict[int, int]:
    """The operations under whose names convolutions ran with which they were fused -> those convolutions."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    hosts: dict[int, int] = {}
    for node in model.graph.node:
        number = _number(node)
        if number is not None and number in layers and number not in timed:
            host = _host(node, readers, timed, layers)
            if host is not None:
                hosts.setdefault(host, number)
    return hosts


def _host(
    node: onnx.NodeProto,
    readers: Mapping[str, list[onnx.NodeProto]],
    timed: Collection[int],
    layers: Collection[int],
) -> int | None:
    """The operation behind a convolution that it was fused with: the next one that took time."""
    while len(following := [reader for value in node.output for reader in readers.get(value, ())]) == 1:
        node = following[0]
        number = _number(node)
        if number in layers:
            return None
        if number in timed:
            return number
    return None


def _number(node: onnx.NodeProto) -> int | None:
    match = _TOKEN.match(node.name)
    return int(match[1]) if match else None
