"""What a random network is made of: a typed spec, every block a frozen dataclass.

A spec is a wish, which :mod:`random_modules` fulfils as far as it goes: a kernel that does not fit its image shrinks, groups
that do not divide the channels become one. So every spec builds, and hypothesis shrinks freely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

__all__ = [
    "Act",
    "Block",
    "Blocks",
    "Conv",
    "Fork",
    "Gate",
    "InPlace",
    "Links",
    "LongSkip",
    "Network",
    "Norm",
    "Plain",
    "Pool",
    "Split",
    "Streams",
    "Time",
    "Transposed",
    "Twice",
    "parts",
]

Axes: TypeAlias = tuple[int, int, int]
"""A number for each axis; networks of fewer axes leave out the last."""


@dataclass(frozen=True)
class Conv:
    """A convolution.

    Padding: ``half`` the kernel or one ``more`` as numbers, the string ``same``, or in ``front`` of it as TensorFlow pads.
    """

    out: int = 4
    kernel: Axes = (3, 3, 3)
    stride: Axes = (1, 1, 1)
    dilation: Axes = (1, 1, 1)
    groups: Literal["one", "two", "depth"] = "one"
    padding: Literal["half", "none", "same", "more", "front"] = "half"
    mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    bias: bool = True


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution of stride 2, where the image is small enough."""


@dataclass(frozen=True)
class Norm:
    """A normalisation; ``hand`` is a layer norm over the channels, written out."""

    kind: Literal["batch", "group", "plain batch", "own batch", "instance", "affine instance", "layer", "hand"] = (
        "batch"
    )


@dataclass(frozen=True)
class Act:
    """An activation: one of :data:`random_modules.ACTIVATIONS`."""

    kind: str = "relu"


@dataclass(frozen=True)
class Pool:
    """A pooling, or a fixed filter; the filter has kernel 3 and padding 1."""

    kind: Literal["avg", "max", "blur"] = "avg"
    kernel: int = 2
    stride: int = 1
    padding: int = 0
    ceil: bool = False
    count_pad: bool = True


@dataclass(frozen=True)
class Plain:
    """An operation without options: one of :data:`random_modules.PLAIN`; some read their value twice."""

    kind: str = "dropout"


@dataclass(frozen=True)
class Time:
    """A projection of the time embedding, added to every pixel."""

    how: Literal["linear", "silu", "view", "scale and shift"] = "linear"


@dataclass(frozen=True)
class Fork:
    """Branches from one value that meet in one join; ``skip``: the value itself is the first; ``drop_path``: on the last."""

    branches: tuple[Blocks, ...] = ()
    join: Literal["add", "cat", "sub", "mul"] = "add"
    skip: bool = True
    stride: int = 1
    drop_path: bool = False


@dataclass(frozen=True)
class Gate:
    """A squeeze-excite gate."""

    how: Literal["conv", "linear", "sum"] = "conv"


@dataclass(frozen=True)
class Split:
    """Half of the channels goes through the blocks and is put beside the other half; then channels are shuffled."""

    inner: Blocks = ()
    how: Literal["chunk", "split", "slice"] = "chunk"
    shuffle: bool = True


@dataclass(frozen=True)
class Links:
    """Every step reads the sum, or the concatenation, of all that was before."""

    steps: tuple[Blocks, ...] = ()
    join: Literal["cat", "add"] = "cat"


@dataclass(frozen=True)
class Streams:
    """Two resolutions that exchange values twice, as HRNet's."""

    wide: Blocks = ()
    low: Blocks = ()


@dataclass(frozen=True)
class LongSkip:
    """A U-Net's step: down, the blocks, up again, and the value from in front beside or added."""

    inner: Blocks = ()
    down: Literal["max", "avg", "conv"] = "max"
    up: Literal["nearest", "linear", "transposed"] = "nearest"
    join: Literal["cat", "add"] = "cat"


@dataclass(frozen=True)
class Twice:
    """One module that is called twice, or two that hold one Parameter."""

    inner: Blocks = ()
    how: Literal["row", "branches", "tied"] = "row"


@dataclass(frozen=True)
class InPlace:
    """Blocks around which a skip reads a value that is overwritten, before or after it was read."""

    inner: Blocks = ()
    how: Literal["before", "after", "clone", "view", "part"] = "before"


Leaf: TypeAlias = Conv | Transposed | Norm | Act | Pool | Plain | Time | Gate
Block: TypeAlias = Leaf | Fork | Split | Links | Streams | LongSkip | Twice | InPlace
Blocks: TypeAlias = tuple[Block, ...]


@dataclass(frozen=True)
class Network:
    """A whole network.

    Attributes:
        blocks: one after another.
        size: of the images; as many axes as the convolutions have.
        channels: of the images.
        second: whether there is a second image: ``none``, ``add`` to the first block's output, or ``cat`` to the first.
        time: where a time embedding comes from: an input, or the image.
        keywords: whether the inputs are handed over by name.
        outputs: ``map``, ``classes``, ``tuple``, ``dict``.
        seed: of the weights, the inputs, the budget and the plan.
    """

    blocks: Blocks = ()
    size: tuple[int, ...] = (7, 7)
    channels: int = 2
    second: Literal["none", "add", "cat"] = "none"
    time: Literal["input", "image"] = "input"
    keywords: bool = False
    outputs: Literal["map", "classes", "tuple", "dict"] = "map"
    seed: int = 0

    @property
    def timed(self) -> bool:
        """Whether a block reads the time embedding."""
        return any(isinstance(block, Time) for block in parts(self))


def parts(spec: object) -> Iterator[object]:
    """A spec and every block in it."""
    if isinstance(spec, tuple):
        for item in spec:
            yield from parts(item)
    elif hasattr(spec, "__dataclass_fields__"):
        yield spec
        for field in fields(spec):  # type: ignore[arg-type]
            yield from parts(getattr(spec, field.name))
