"""What a runtime is: an object that turns layers, and whole networks, into latencies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import nn

from fxmerge.algebra import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LayerSignature",
    "OpSignature",
    "Profile",
    "ProfilingRuntime",
    "Runtime",
    "Signature",
    "Timing",
    "interleave",
    "signature_from_key",
]

_TURN, _TURN_RUNS, _MOST_TURN_RUNS = 20.0, 2, 50
"""Of a network's turn: milliseconds and runs at least, runs at most."""


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """What one entry of a latency table is about: a convolution, bias included, at one input size.

    Two layers with equal signatures run equally fast, whatever their weights.

    Attributes:
        geometry: channels, kernel, stride, dilation, padding and groups.
        in_size: spatial size of the input, one entry per axis of the kernel.
        batch: number of images per run.
        activation: name of the ``torch.nn`` class that follows and that a runtime may fuse, such as
            ``"ReLU"``.
        joined: whether its output is then added to another value, which a runtime may fuse, too.
    """

    geometry: Geometry
    in_size: tuple[int, ...]
    batch: int
    activation: str | None = None
    joined: bool = False

    def key(self) -> str:
        """Canonical JSON, the same in every process: what a stored latency is looked up by."""
        content = {
            "geometry": self.geometry.to_json(),
            "in_size": self.in_size,
            "batch": self.batch,
            "activation": self.activation,
            "joined": self.joined,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> LayerSignature:
        """The signature that :meth:`key` was called on."""
        content = json.loads(key)
        return cls(
            geometry=Geometry.from_json(content["geometry"]),
            in_size=tuple(content["in_size"]),
            batch=content["batch"],
            activation=content["activation"],
            joined=content.get("joined", False),
        )


@dataclass(frozen=True, slots=True)
class OpSignature:
    """An entry of a latency table about what surrounds the convolutions: a pool, an addition, a classifier.

    Attributes:
        operation: with its options.
        shapes: of its inputs and its output, without the batch.
        batch: number of images per run.
        after: what computes its inputs: an operation may run inside of the one in front of it, at no cost of its own.
    """

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    batch: int
    after: tuple[str, ...] = ()

    def key(self) -> str:
        """Canonical JSON, the same in every process."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


Signature: TypeAlias = LayerSignature | OpSignature
"""What a latency table has an entry for."""


def signature_from_key(key: str) -> Signature:
    """The signature whose ``key`` this is."""
    content = json.loads(key)
    if "geometry" in content:
        return LayerSignature.from_key(key)
    shapes = tuple(map(tuple, content["shapes"]))
    return OpSignature(content["operation"], shapes, content["batch"], tuple(content["after"]))


@runtime_checkable
class Runtime(Protocol):
    """Where a network runs and how its latency is found: the interface of everything in this package.

    Any object with these members can be passed as ``runtime=``.

    Attributes:
        name: what the user calls it, and part of every stored latency.
        unit: of all latencies it returns.
        deterministic: measuring twice is pointless, and so is storing.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Literal["ms", "MACs"]: ...

    @property
    def deterministic(self) -> bool: ...

    def environment(self) -> dict[str, str]:
        """All that a latency depends on besides the layer: device, versions, threads, precision."""
        ...

    def measure(
        self,
        signatures: Sequence[LayerSignature],
        on_result: Callable[[LayerSignature, float], None],
    ) -> None:
        """Find each layer's latency and hand it to ``on_result`` once, as soon as it is known."""
        ...

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Prepare a network, in eval mode; each call of what is returned runs it once, in ``unit``."""
        ...


class Profile(Protocol):
    """A network that is ready to run on a runtime, each of its operators timed."""

    def sweep(self) -> float:
        """Run the network a few times; the smallest milliseconds of one run."""
        ...

    def latencies(self) -> dict[str, float]:
        """The runtime's name of each operator, in the order in which they run -> the smallest milliseconds of all runs.

        Ends the profile. Names hold those of the ONNX nodes that the operator was made of, or of values that they compute.
        """
        ...


@runtime_checkable
class ProfilingRuntime(Runtime, Protocol):
    """A runtime that times the operators of a network while the whole network runs.

    Layers are then timed inside networks (:mod:`fxmerge.covering`); other runtimes are asked to ``measure`` them.
    """

    def profile(self, model: bytes, feeds: Mapping[str, NDArray[Any]]) -> Profile:
        """Prepare a serialised ONNX model for profiled runs on these inputs."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
    """The latency of one network.

    Attributes:
        latency: the smallest of all runs, in the runtime's unit.
        repeatability: relative difference between the minima of the earlier and the later half of the
            runs: how far the figure can be trusted on this machine.
        runs: how many there were.
    """

    latency: float
    repeatability: float
    runs: int


def interleave(
    timers: Sequence[Callable[[], float]],
    seconds: float,
    min_rounds: int = 3,
    *,
    deterministic: bool = False,
) -> list[Timing]:
    """Run several prepared networks in turns and return the smallest latency of each.

    In every round each network has a turn, so that a busy or throttled machine slows all of them alike. A turn is
    at least two runs and 20 ms: a network that follows itself finds its weights in the caches, as in a server, one that follows
    another does not. The minimum repeats better than the median, and the median better than the mean.

    Args:
        timers: what :meth:`Runtime.build` returned, in milliseconds; the order of the result is theirs.
        seconds: rounds are added until this much time has passed.
        min_rounds: number of rounds even if that takes longer; at least 2.
        deterministic: run each network once, for runtimes that do not measure.

    Example:
        >>> import itertools
        >>> interleave([itertools.cycle([20.0, 10.0, 12.0, 25.0]).__next__], seconds=0, min_rounds=2)
        [Timing(latency=10.0, repeatability=0.2, runs=4)]
    """
    if deterministic:
        return [Timing(timer(), 0.0, 1) for timer in timers]
    samples: list[list[float]] = [[] for _ in timers]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < max(min_rounds, 2) or time.perf_counter() < end:
        for timer, runs in zip(timers, samples, strict=True):
            runs += _turn(timer)
        rounds += 1
    return [_timing(runs) for runs in samples]


def _turn(timer: Callable[[], float]) -> list[float]:
    runs: list[float] = []
    while len(runs) < _TURN_RUNS or (sum(runs) < _TURN and len(runs) < _MOST_TURN_RUNS):
        runs.append(timer())
    return runs


def _timing(runs: list[float]) -> Timing:
    half = len(runs) // 2
    earlier, later = min(runs[:half]), min(runs[half:])
    best = min(earlier, later)
    return Timing(best, abs(earlier - later) / best if best else 0.0, len(runs))
