"""Importance: what applying one candidate costs the whole network.

An estimator turns candidates into losses. :class:`Magnitude` needs no data; :class:`Distortion` compares outputs on
calibration inputs, no labels needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, fx, nn

from .algebra import Conv
from .calibration import Batch, Calibration, eval_mode, parse_memory, spread
from .candidates import Candidate
from .distances import output_distance, relative_error
from .errors import UserError
from .evaluate import Known, evaluate, recorder, taken_over
from .fitting import install
from .graph import (
    CONVOLUTIONS,
    META,
    by_id,
    changed_nodes,
    clone,
    is_convolution,
    is_tensor,
    module_of,
    node_id,
    shape_of,
    written_in_place,
)
from .inputs import batch_size, floats, tensors
from .linear import NORMS, conv_geometry, is_constant
from .regions import JOINS

if TYPE_CHECKING:
    from .passes.refit import Reuse

__all__ = [
    "Distance",
    "Distortion",
    "Estimator",
    "Local",
    "Magnitude",
    "Remembered",
    "distance",
    "get_estimator",
    "of_outputs",
    "plan_distance",
    "remember",
]


Distance: TypeAlias = Callable[[Any, Any], Any]
"""How far outputs are from the original's; see :func:`of_outputs`."""

_SCORED_PIXELS, _SCORED_IMAGES = 100_000, 32
"""Of the inputs on which a candidate is scored, and from which its batch norms get their statistics, and how many images at
least: there are many candidates, and the losses of single ones only propose."""

_LEAST_EXPLAINED = 1e-6
"""Of the variance: what removed operations explain at least, so that every loss is finite."""


@runtime_checkable
class Estimator(Protocol):
    """Anything that turns candidates into losses: the interface for estimators of your own.

    Attributes:
        name: for progress and reports.
    """

    @property
    def name(self) -> str:
        """What it is called in progress and reports."""
        ...

    def prepare(self, gm: fx.GraphModule, candidates: Sequence[Candidate]) -> Callable[[Candidate], float]:
        """Do once what the candidates of a network share; the result scores one of them.

        Those with the same entry are asked for one after the other.
        """
        ...


class Magnitude:
    """Losses from the weights alone: how much of the signal's correlation with the original every removal costs.

    Each operation is taken on its own, with independent standard normal inputs. The share of its output's variance that
    a per-channel affine map of its input explains, the squared correlation r^2, is what is left when the identity
    replaces it: for an activation f it is Cov(x, f(x))^2 / Var f(x) (0.73 for ReLU), by the trapezoidal rule; for a
    convolution the mean over output channels of w^2 / |W|^2, w being the tap that the identity has. Along a chain
    squared correlations multiply, so losses add as -log r^2: 0.31 for a ReLU, several nats for a convolution; r^2 is
    taken to be at least 1e-6, what a product that loses a factor is left with. A norm over each sample that goes, or
    moves, costs nothing: for one sample it is affine. A convolution that goes takes one activation along at no further
    loss, the cheapest: the identity in its place would leave two activations in a row, or one where none was. The
    measure is fxmerge's own; LayerMerge uses weight norms only to choose which convolutions of a segment stay (section
    4.3), as fxmerge does too.
    """

    name = "magnitude"

    def prepare(
        self,
        gm: fx.GraphModule,
        candidates: Sequence[Candidate] = (),  # noqa: ARG002 - of the interface
    ) -> Callable[[Candidate], float]:
        """Compute the loss of every operation once."""
        nodes = by_id(gm)
        norms = {name for name, node in nodes.items() if _is_norm(gm, node)}
        losses: dict[str, float] = {}

        def loss(name: str) -> float:
            if name not in losses:
                losses[name] = -math.log(max(1.0 - _unexplained(gm, nodes[name]), _LEAST_EXPLAINED))
            return losses[name]

        def score(candidate: Candidate) -> float:
            activations = sorted(loss(name) for name in candidate.removed if name not in norms)
            return sum(map(loss, candidate.bypassed)) + sum(activations[len(candidate.bypassed) :])

        return score


def _is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module_of(gm, node), NORMS)


def _unexplained(gm: fx.GraphModule, node: fx.Node) -> float:
    module = module_of(gm, node)
    if isinstance(module, CONVOLUTIONS):
        return _unexplained_of_conv(module)
    if module is not None:
        channels = next((parameter.numel() for parameter in module.parameters()), 1)
        return _unexplained_of_activation(_in_eval(module), channels)
    if "removable" not in node.meta[META]:
        return 1.0  # a product loses a factor, of which weights alone say nothing
    entry, (_, channels, *size) = _entry_of_registered(node), shape_of(node)

    def registered(x: Tensor) -> Tensor:
        value = x.reshape(*x.shape, *[1] * len(size))
        found: Tensor = evaluate(gm, node, {entry: value}, _in_eval)
        return found.reshape(x.shape)

    return _unexplained_of_activation(registered, channels)


def _in_eval(thing: Any) -> Any:
    """A copy on the CPU: a module in eval mode and float64, a tensor in float64."""
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing).double().cpu().eval()
    return thing.detach().cpu().double()


def _entry_of_registered(exit_: fx.Node) -> fx.Node:
    """The value that the operations of a registered removable module work on, from the last of them."""
    tag, pending, seen = exit_.meta[META]["removable"], [exit_], {exit_}
    while True:
        node = pending.pop()
        for source in node.all_input_nodes:
            if is_tensor(source) and not is_constant(source) and source.meta[META].get("removable") != tag:
                return source
            if source not in seen:
                seen.add(source)
                pending.append(source)


def _unexplained_of_activation(activation: Callable[[Tensor], Tensor], channels: int) -> float:
    """The share by quadrature; the mean over channels where each has parameters of its own."""
    points = np.linspace(-8.0, 8.0, 4001)  # even ones: a Gauss rule errs by percents where the activation has a kink
    weights = np.exp(-(points**2) / 2)
    weights /= weights.sum()
    with torch.no_grad():
        y = activation(torch.tensor(points).reshape(-1, 1).expand(-1, channels)).numpy()
    variance = weights @ (y - weights @ y) ** 2
    covariance = (weights * points) @ y
    explained = np.divide(covariance**2, variance, out=np.zeros_like(variance), where=variance > 0)
    return float(np.maximum(0.0, 1.0 - explained).mean())


def _unexplained_of_conv(module: Conv) -> float:
    geometry = conv_geometry(module)
    taps = zip(geometry.left, geometry.dilation, geometry.kernel, strict=True)
    if geometry.in_channels != geometry.out_channels or any(left % d or not 0 <= left // d < k for left, d, k in taps):
        return 1.0  # no tap is the identity's
    weight = module.weight.detach().double()
    centre: tuple[Any, ...] = (..., *(left // d for left, d in zip(geometry.left, geometry.dilation, strict=True)))
    channels = torch.arange(geometry.out_channels, device=weight.device)
    own = weight[centre][channels, channels % weight.shape[1]].square()
    total = weight.flatten(1).square().sum(dim=1)
    return float((1.0 - own / total.clamp_min(torch.finfo(total.dtype).tiny)).mean())


class _Calibrated:
    """What estimators share that judge the weights that will be installed by what a network computes.

    Args:
        calibration: what :func:`fxmerge.calibration.read_calibration` returned.
        memory: bound on what is remembered; with less of it more is computed again, and the losses are the same. Also on
            the moments of a fit, see :func:`fxmerge.passes.refit.refit`.
        fit: how weights are found, ``compose`` or ``refit``.
    """

    def __init__(self, calibration: Calibration, memory: str | int = "2GiB", fit: str = "compose") -> None:
        self.calibration = calibration
        self.memory = parse_memory(memory)
        self.fit = fit

    @property
    def by_start(self) -> bool:
        """Whether merges that start at one value belong to one worker: they are fitted together."""
        return self.fit == "refit"

    def _seen(self, known: Remembered) -> Remembered:
        """What candidates are scored on."""
        numbers = _scored(self.calibration.held_out)
        return replace(
            known,
            held_out=[known.held_out[number] for number in numbers],
            outputs=[known.outputs[number] for number in numbers],
        )

    def _networks(
        self, gm: fx.GraphModule, candidates: Sequence[Candidate], known: Remembered
    ) -> Callable[[Candidate], fx.GraphModule]:
        """The network with one candidate applied; with ``refit``, merges with one start are fitted when the first is asked for."""
        from .passes.refit import refit_alone
        from .passes.relax import RelaxPass

        few = [known.fit[number] for number in _scored(self.calibration.fit)]
        starts: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            if self.fit == "refit" and candidate.kind == "merge":
                starts.setdefault(candidate.entry, []).append(candidate)
        fitted: dict[Candidate, fx.GraphModule] = {}
        latest = ""

        def network(candidate: Candidate) -> fx.GraphModule:
            nonlocal fitted, latest
            if candidate in starts.get(candidate.entry, ()) and candidate.entry != latest:
                fitted.clear()  # before the next are made: they hold much
                fitted = refit_alone(gm, starts[candidate.entry], known.fit, known.held_out, self.memory)
                latest = candidate.entry
            if candidate in fitted:
                return fitted[candidate]
            relaxed: fx.GraphModule = RelaxPass((candidate,))(clone(gm, share_parameters=True)).graph_module.eval()
            images = known.fit if candidate in starts.get(candidate.entry, ()) else few
            # The last layer is fitted once, to the whole plan.
            install(gm, relaxed, self.fit, images, known.held_out, self.memory, last=False)
            return relaxed

        return network


def _scored(batches: Sequence[Batch]) -> list[int]:
    """Numbers of the batches that candidates are scored on."""
    pixels = max(math.prod(tensor.shape[2:]) for tensor in tensors(*batches[0]))
    images = max(_SCORED_IMAGES, -(-_SCORED_PIXELS // pixels))
    return spread(len(batches), batch_size(*batches[0]) or 1, images)


class Distortion(_Calibrated):
    """Losses from the network's outputs on calibration inputs.

    One candidate is applied with the weights that would be installed (:mod:`fxmerge.fitting`), and the outputs on the
    held-out batches are compared with the original's by :func:`distance`, or a function of your own: on batches spread evenly
    over them, of as many images as have 100,000 pixels, 32 at least, and batch norms are re-estimated on as many. Only what lies
    behind the candidate is computed: values in front of it are remembered from the original.

    Args:
        calibration: what :func:`fxmerge.calibration.read_calibration` returned.
        memory: bound on what is remembered; with less of it more is computed again, and the losses are the same. Also on
            the moments of a fit, see :func:`fxmerge.passes.refit.refit`.
        fit: how weights are found, ``compose`` or ``refit``.
        distance: of the outputs of one batch from the original's, see :func:`of_outputs`; None is :func:`distance`.
    """

    name = "distortion"

    def __init__(
        self,
        calibration: Calibration,
        memory: str | int = "2GiB",
        fit: str = "compose",
        distance: Distance | None = None,
    ) -> None:
        super().__init__(calibration, memory, fit)
        self.distance = distance

    def prepare(self, gm: fx.GraphModule, candidates: Sequence[Candidate] = ()) -> Callable[[Candidate], float]:
        """Run the original once."""
        known = remember(gm, self.calibration, self.memory, self.distance)
        network, seen = self._networks(gm, candidates, known), self._seen(known)
        return lambda candidate: seen.distance(gm, network(candidate))


class Local(_Calibrated):
    """Losses from the values behind a candidate alone: nothing of the network that follows is computed.

    One candidate is applied as for :class:`Distortion`; its loss is the squared error of the first value behind it that the
    original has, too, on the same held-out batches, as a share of that value's variance around its mean over the batch. Of a merge
    with refitted weights that is the error of the fit. Quicker than a distortion in long networks, and blind to how
    much of an error the rest of the network forgives.
    """

    name = "local"

    def prepare(self, gm: fx.GraphModule, candidates: Sequence[Candidate] = ()) -> Callable[[Candidate], float]:
        """Run the original once."""
        known = remember(gm, self.calibration, self.memory)
        network, seen = self._networks(gm, candidates, known), self._seen(known)
        nodes = by_id(gm)

        def score(candidate: Candidate) -> float:
            found = network(candidate)
            new, behind = changed_nodes(gm, found), {node_id(node) for node in _behind(nodes[candidate.exit])}
            here = next(
                node for node in found.graph.nodes if node in new and node_id(node) in behind and is_tensor(node)
            )
            there, same = nodes[node_id(here)], [node for node in found.graph.nodes if node not in new]
            losses = []
            for values in seen.held_out:
                with torch.no_grad():
                    value = evaluate(found, here, taken_over(same, values))
                    wanted = evaluate(gm, there, {nodes[name]: each for name, each in values.items()})
                losses.append(float(relative_error(value.double(), wanted.double())))
            return float(np.mean(losses))

        return score


def _behind(node: fx.Node) -> set[fx.Node]:
    """A node, and all that depends on it."""
    pending, found = [node], {node}
    while pending:
        new = set(pending.pop().users) - found
        found |= new
        pending += new
    return found


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the original computed on calibration images.

    Attributes:
        fit: for every batch that weights are made from, values by node id.
        held_out: for every other batch the same.
        outputs: what the original returns for those.
        compare: how outputs are compared.
    """

    fit: Sequence[Known]
    held_out: Sequence[Known]
    outputs: Sequence[list[Tensor]]
    compare: Distance | None = None

    def distance(
        self, gm: fx.GraphModule, changed: fx.GraphModule, computed: Sequence[Mapping[fx.Node, Any]] = ()
    ) -> float:
        """How far a changed network's outputs are from the original's, on held-out batches; only what has changed is computed.

        Args:
            gm: the original.
            changed: the network.
            computed: values that it gave already, for every batch, such as :attr:`fxmerge.passes.refit.Reuse.held_out`.
        """
        new = changed_nodes(gm, changed)
        same = [node for node in changed.graph.nodes if node not in new]
        output = next(iter(changed.graph.find_nodes(op="output")))
        distances = []
        for number, (values, outputs) in enumerate(zip(self.held_out, self.outputs, strict=True)):
            known = {**taken_over(same, values), **(computed[number] if computed else {})}
            with torch.no_grad():
                found = floats(evaluate(changed, output, known))
                distances.append(of_outputs(self.compare, found, outputs))
        return float(np.mean(distances))


def of_outputs(compare: Distance | None, outputs: list[Tensor], reference: list[Tensor]) -> float:
    """The distance by a user's function, or by :func:`distance`.

    Args:
        compare: a function of the outputs and the original's: the tensor where a network returns one floating-point tensor, a
            list of all of them otherwise. None is :func:`distance`.
        outputs: of a changed network.
        reference: of the original.

    Raises:
        UserError: the function raised, or returned no finite number.
    """
    if compare is None:
        return distance(outputs, reference)
    try:
        found = float(compare(outputs[0], reference[0]) if len(outputs) == 1 else compare(outputs, reference))
    except Exception as error:
        raise UserError(f"distance= failed on outputs of shape {[list(t.shape) for t in outputs]}: {error}") from error
    if not math.isfinite(found):
        raise UserError(f"distance= returned {found}: expected a finite number, 0 for outputs like the original's")
    return found


def remember(gm: fx.GraphModule, calibration: Calibration, memory: int, compare: Distance | None = None) -> Remembered:
    """Run the original once on all calibration images; remember as much of it as fits into ``memory`` bytes."""
    with eval_mode(gm):
        run = recorder(gm, _worth_remembering(gm, calibration.images, memory))
        fit = [_by_id(run(batch)[1]) for batch in calibration.fit]
        held_out = [run(batch) for batch in calibration.held_out]
    return Remembered(fit, [_by_id(values) for _, values in held_out], [outputs for outputs, _ in held_out], compare)


def plan_distance(
    gm: fx.GraphModule,
    calibration: Calibration,
    fit: str,
    memory: int,
    *,
    last: bool = True,
    compare: Distance | None = None,
    reuse: Reuse | None = None,
) -> Callable[[Sequence[Candidate]], float]:
    """A function that installs a plan, as it will be installed, and returns how far its outputs are from the original's.

    On held-out images. What was fitted for one plan is taken over for others that agree in all that comes before.

    Args:
        gm: the canonical graph.
        calibration: images.
        fit: ``compose`` or ``refit``.
        memory: bound on what is remembered and on what one fit holds, in bytes.
        last: whether the last linear layer is fitted.
        compare: how outputs are compared, see :func:`of_outputs`.
        reuse: where fits are found and kept, to install one of the plans with later.
    """
    from .passes.refit import Reuse
    from .passes.relax import RelaxPass

    known, fits = remember(gm, calibration, memory, compare), Reuse() if reuse is None else reuse

    def measure(candidates: Sequence[Candidate]) -> float:
        relaxed: fx.GraphModule = RelaxPass(tuple(candidates))(clone(gm)).graph_module.eval()
        fits.plan = tuple(candidates)
        fits.held_out = []
        install(gm, relaxed, fit, known.fit, known.held_out, memory, last=last, reuse=fits, norms=False)
        return known.distance(gm, relaxed, fits.held_out)

    return measure


def _worth_remembering(gm: fx.GraphModule, images: int, memory: int) -> list[fx.Node]:
    """The inputs, and of what convolutions and joins read the last values that fit into memory.

    Later values save more and are smaller. Where something is written in place no value is safe but the inputs.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    if written_in_place(gm):
        return inputs
    chosen: list[fx.Node] = []
    for node in reversed(gm.graph.nodes):
        if not is_tensor(node) or node in inputs or not any(_starts(gm, reader) for reader in node.users):
            continue
        memory -= images * math.prod(shape_of(node)[1:]) * getattr(torch, node.meta[META]["dtype"]).itemsize
        if memory < 0:
            break
        chosen.append(node)
    return [*inputs, *chosen]


def _starts(gm: fx.GraphModule, node: fx.Node) -> bool:
    return is_convolution(gm, node) or node.target in JOINS


def _by_id(values: dict[fx.Node, Any]) -> dict[str, Any]:
    return {node_id(node): value for node, value in values.items()}


def distance(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """How far outputs are from the reference's, averaged over them.

    Two-dimensional outputs are taken for logits: mean over the batch of KL(softmax(reference) || softmax(output)), in
    nats.
    Others: squared error over the reference's variance around its mean over the batch.

    Example:
        >>> zeros, ones = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
        >>> distance([zeros], [ones])
        1.0
    """
    return float(np.mean([_one_distance(a.double(), b.double()) for a, b in zip(outputs, reference, strict=True)]))


def _one_distance(output: Tensor, reference: Tensor) -> float:
    return max(float(output_distance(output, reference)), 0.0)  # rounding may leave a divergence below it


def get_estimator(
    spec: str | Estimator,
    calibration: Calibration | None,
    fit: str = "compose",
    memory: str | int = "2GiB",
    distance: Distance | None = None,
) -> Estimator:
    """The estimator of that name: ``auto`` is ``distortion`` where there is calibration data, else ``magnitude``.

    ``fit`` is how the weights that ``distortion`` and ``local`` judge are found, ``memory`` what they may take, and ``distance``
    how ``distortion`` compares.

    Raises:
        UserError: an unknown name, or ``distortion`` or ``local`` without calibration data.
    """
    if isinstance(spec, Estimator):
        return spec
    if spec == "magnitude" or (spec == "auto" and calibration is None):
        return Magnitude()
    if spec in ("auto", "distortion", "local"):
        if calibration is None:
            what = "values" if spec == "local" else "outputs"
            raise UserError(f"importance={spec!r} compares {what} on calibration inputs: pass calibration=...")
        return Local(calibration, memory, fit) if spec == "local" else Distortion(calibration, memory, fit, distance)
    raise UserError(
        f"unknown importance {spec!r}; the known ones are auto, distortion, local, magnitude, or an object with prepare()"
    )
