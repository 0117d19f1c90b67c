"""What must hold for every random network, whatever is merged in it: :func:`check`.

The reference is torch alone: the model against its captured graph, and a relaxed network, which is what trains, against
the merged one. Everything is compared in float64, on inputs drawn here, at a batch size that the capture has not seen.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import torch
from random_modules import Example, build, call, inputs
from random_networks import KINDS, networks
from random_specs import Network
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.candidates import Candidate
from fxmerge.errors import BudgetError
from fxmerge.graph import between, by_id, clone, convolutions, graph_meta, is_tensor, module_of, shape_of
from fxmerge.linear import conv_geometry, pad_sides
from fxmerge.passes.fold import FoldPass
from fxmerge.passes.relax import RelaxPass
from fxmerge.regions import JOINS
from fxmerge.surgery import join_operands

__all__ = ["TOLERANCE", "Outcome", "check", "explore", "kinds_of", "summary", "worst_error"]

TOLERANCE = 1e-10
"""Largest difference of two outputs in float64, relative to what of the output varies with the input."""

LEAST_DEPENDENCE = 1e-4
"""Share of the output that must vary with the input; below it rounding alone may exceed the tolerance."""

_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORMS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_FILTERS = {operation.default for operation in (torch.ops.aten.conv1d, torch.ops.aten.conv2d, torch.ops.aten.conv3d)}


@dataclass
class Outcome:
    """What was merged in one network.

    Attributes:
        kinds: what merged segments held, by :func:`kinds_of`.
        merges: merged segments in both plans.
        candidates: how many the network has.
        comparable: whether all outputs depended on the input enough to be held to the tolerance.
    """

    kinds: set[str] = field(default_factory=set)
    merges: int = 0
    candidates: int = 0
    comparable: bool = True


def check(spec: Network, kind: str, extra: str | None = None) -> Outcome:
    """Capture, plan, relax and fold one network; raises AssertionError, or what fxmerge raises, where anything is wrong.

    1. The captured graph computes what the model computes, and so does the empty plan, merged.
    2. The plan at a random budget meets it, and merges to what it trained as.
    3. So does a random choice of candidates; those that hold ``kind`` go first.
    4. ``extra="save"``: the result comes back from a folder; ``"onnx"``: ONNX Runtime computes the same.
    5. The model handed in is left as it was.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*may behave differently on self.training")  # drop-path
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        return _check(spec, kind, extra)


def _check(spec: Network, kind: str, extra: str | None) -> Outcome:
    outcome = Outcome()
    rng = random.Random(spec.seed)  # noqa: S311 - a seeded choice
    model = build(spec)
    before = _state(model)
    drawn = inputs(spec, batch=3, seed=1)
    frontier = fxmerge.frontier(
        model,
        inputs(spec),
        runtime="macs",
        max_kernel=rng.choice((5, 7, 7, 9, 11)),
        exit_activation=rng.random() < 0.3,
    )
    empty = frontier.apply(frontier.at(1.0))
    assert not empty.plan.candidates
    base = empty.model
    assert graph_meta(base)["dynamic_batch"]
    _same(outcome, call(base, drawn), call(model, drawn))
    _same(outcome, call(empty.merge(), drawn), call(model, drawn))

    smallest = frontier.points[0][0] / frontier.original
    result = _compressed(frontier, max(smallest + rng.random() * (1 - smallest), 1e-6))
    merged = result.merge()
    _folded(outcome, base, result.plan.candidates, result.model, merged)
    _same(outcome, call(merged, drawn), call(result.model, drawn))
    if extra == "save":
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder) / "result")
            loaded = fxmerge.load(Path(folder) / "result")
        _same(outcome, call(loaded.model, drawn), call(result.model, drawn))
        _same(outcome, call(loaded.merge(), drawn), call(merged, drawn))

    outcome.candidates = len(frontier.enumeration.sites)
    chosen = _choose(base, [site.candidate for site in frontier.enumeration.sites], kind, rng)
    relaxed = RelaxPass(chosen)(clone(base).eval()).graph_module
    folded = FoldPass()(clone(relaxed)).graph_module
    _folded(outcome, base, chosen, relaxed, folded)
    _same(outcome, call(folded, drawn), call(relaxed, drawn))
    if extra == "onnx":
        _same_in_onnx(folded, spec)
    assert smallest >= 0, f"the smallest reachable is predicted to be {smallest:.3f} of the original"
    over = result.report.measured / result.report.requested
    assert over <= 1 + 1e-9, f"measured {over:.3f} of the budget"
    assert all(torch.equal(a, b) for a, b in zip(before, _state(model), strict=True)), "the model was changed"
    return outcome


def _compressed(frontier: fxmerge.Frontier, budget: float) -> fxmerge.Result:
    """At a budget, or at the least that the refusal names: what carries side inputs on is in no table, and counts."""
    try:
        return frontier.compress(budget)
    except BudgetError as error:
        return frontier.compress((error.smallest or 0.0) / frontier.original * (1 + 1e-9))


def _state(model: nn.Module) -> list[Tensor]:
    flags = [module.training for module in model.modules()]
    flags += [parameter.requires_grad for parameter in model.parameters()]
    flags += [parameter.grad is None for parameter in model.parameters()]
    return [torch.tensor(flags), *(tensor.clone() for tensor in (*model.parameters(), *model.buffers()))]


# --- comparing --------------------------------------------------------------------------------------------------------


def _same(outcome: Outcome, found: object, expected: object) -> None:
    """Equal structure, and equal values to the tolerance."""
    found_leaves, found_tree = pytree.tree_flatten(found)
    leaves, tree = pytree.tree_flatten(expected)
    assert found_tree == tree
    outcome.comparable &= all(map(_varies, leaves))
    error = worst_error(found_leaves, leaves)
    assert error <= TOLERANCE, f"outputs differ by {error:.1e}"


def worst_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |a - b| over the largest |b - mean of b over the batch|; over that of |b| where b hardly varies."""
    errors = [0.0]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert b.isfinite().all()
        scale = _variation(b) if _varies(b) else _size(b)
        errors.append(_size(a.double() - b.double()) / max(scale, 1e-100))
    return max(errors)


def _varies(tensor: Tensor) -> bool:
    return _variation(tensor) > LEAST_DEPENDENCE * _size(tensor)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


def _variation(tensor: Tensor) -> float:
    return _size(tensor - tensor.mean(dim=0))


def _same_in_onnx(gm: fx.GraphModule, spec: Network) -> None:
    """ONNX Runtime, which computes in float32, agrees as well as torch in float32 does."""
    import onnxruntime

    single = clone(gm).float()
    drawn = _floats(inputs(spec, batch=3, seed=2))
    with tempfile.TemporaryDirectory() as folder:
        path = fxmerge.export(single, Path(folder) / "net.onnx", _floats(inputs(spec)))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    values = [leaf for leaf in pytree.tree_leaves(drawn) if isinstance(leaf, Tensor)]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
    expected = pytree.tree_leaves(call(gm, inputs(spec, batch=3, seed=2)))
    own = worst_error(pytree.tree_leaves(call(single, drawn)), expected)
    error = worst_error([torch.as_tensor(value) for value in found], expected)
    assert error <= max(1e-4, 50 * own), f"ONNX Runtime differs by {error:.1e}, torch in float32 by {own:.1e}"


def _floats(example: Example) -> Example:
    found: Example = pytree.tree_map_only(Tensor, lambda tensor: tensor.float(), example)
    return found


# --- choosing and counting --------------------------------------------------------------------------------------------


def _choose(gm: fx.GraphModule, candidates: Sequence[Candidate], kind: str, rng: random.Random) -> list[Candidate]:
    """Disjoint candidates, as many as a random order lets in: first the merges that hold ``kind``, then other merges."""
    nodes = by_id(gm)
    ranked = sorted(candidates, key=lambda c: (kind not in kinds_of(gm, c), c.kind != "merge", rng.random()))
    chosen: list[Candidate] = []
    used: set[fx.Node] = set()
    for candidate in ranked:
        inside = between(nodes[candidate.entry], nodes[candidate.exit])
        inside |= {nodes[join] for join, _ in candidate.cuts if candidate.kind == "drop"}
        if not inside & used:
            used |= inside
            chosen.append(candidate)
    return chosen


def _folded(
    outcome: Outcome,
    base: fx.GraphModule,
    candidates: Sequence[Candidate],
    relaxed: fx.GraphModule,
    merged: fx.GraphModule,
) -> None:
    """Count the merges, and see that each left one convolution."""
    merges = [candidate for candidate in candidates if candidate.kind == "merge"]
    gone = sum(len(candidate.kept) - 1 for candidate in merges)
    left = _count(relaxed)
    assert left == _count(base) - sum(len(candidate.bypassed) for candidate in candidates)
    assert _count(merged) <= left - gone, f"{_count(merged)} convolutions are left, and {left} trained"
    outcome.merges += len(merges)
    for candidate in merges:
        outcome.kinds |= kinds_of(base, candidate)


def _count(gm: fx.GraphModule) -> int:
    return sum(1 for _ in convolutions(gm))


def kinds_of(gm: fx.GraphModule, candidate: Candidate) -> frozenset[str]:
    """What a merge holds, of :data:`random_networks.KINDS`: read off the original graph and the names of its modules."""
    return frozenset(_kinds_of(gm, candidate)) if candidate.kind == "merge" else frozenset()


def _kinds_of(gm: fx.GraphModule, candidate: Candidate) -> Iterator[str]:
    nodes = by_id(gm)
    entry = nodes[candidate.entry]
    inside = between(entry, nodes[candidate.exit])
    kept = [nodes[name] for name in candidate.kept]
    for node in inside:
        module, sides = module_of(gm, node), pad_sides(node)
        operands = join_operands(node) if node.target in JOINS else []
        cut = sum(nodes[join] is node for join, _ in candidate.cuts)
        if sum(operand in inside or operand is entry for operand in operands) - cut > 1:
            yield "fork-join"
        if any(_is_side(operand, inside, entry) for operand in operands):
            yield "side input"
        if isinstance(module, _AVERAGES) or node.target in _FILTERS:
            yield "average"
        if isinstance(module, _NORMS) or node.target is torch.ops.aten.instance_norm.default:
            yield "norm"
        if sides is not None and sides[0] != sides[1]:
            yield "asymmetric pad"
    for node in kept:
        geometry = conv_geometry(module_of(gm, node))  # type: ignore[arg-type]
        if max(geometry.stride) > 1 and len(kept) > 1:
            yield "stride"
        if geometry.groups > 1 and len(kept) > 1:
            yield "group"
        if any(d > 1 and k > 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True)):
            yield "dilation"
        if geometry.left != geometry.right:
            yield "asymmetric pad"
        if "long_skip" in str(node.target):
            yield "long skip"
        if "in_place" in str(node.target):
            yield "in-place skip"


def _is_side(node: fx.Node, inside: set[fx.Node], entry: fx.Node) -> bool:
    """Whether a value comes from outside a segment, one number for each channel of each image."""
    return (
        is_tensor(node)
        and node.op != "get_attr"
        and node not in inside
        and node is not entry
        and all(n == 1 for n in shape_of(node)[2:])
    )


# --- many networks ----------------------------------------------------------------------------------------------------


def explore(kind: str, examples: int, seed: int, extra: str | None = None) -> list[Outcome]:
    """Check different random networks of one kind, the same ones for the same ``seed``.

    Hypothesis shrinks the first one that fails and raises what it raised, the spec in its notes.
    """
    checked: dict[Network, Outcome] = {}

    def run(spec: Network) -> None:
        if spec not in checked:
            checked[spec] = check(spec, kind, extra)

    for batch in itertools.count():
        missing = examples - len(checked)
        if not missing:
            return list(checked.values())
        # The first network of a run is always the smallest one, and after ten a run repeats itself with variations.
        settings = hypothesis.settings(
            max_examples=min(missing + bool(checked), 10),
            database=None,
            deadline=None,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(1000 * seed + batch)(settings(hypothesis.given(networks(kind))(run)))()
    raise AssertionError


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """In how many networks something was merged, and what; in how many merges in all."""
    counts = Counter(kind for outcome in outcomes for kind in sorted(outcome.kinds))
    return {
        "networks": len(outcomes),
        "comparable": sum(outcome.comparable for outcome in outcomes),
        "merging": sum(outcome.merges > 0 for outcome in outcomes),
        "merges": sum(outcome.merges for outcome in outcomes),
        "candidates": sum(outcome.candidates for outcome in outcomes),
        **{kind: counts[kind] for kind in KINDS},
    }
