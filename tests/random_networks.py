"""Hypothesis strategies of random networks: :func:`networks` draws specs of :mod:`random_specs`.

``networks(kind)`` puts into every network one thing that is hard to merge, one of :data:`KINDS`, between convolutions that
a merge may span; around it stands whatever else a CNN may hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from hypothesis import assume
from hypothesis import strategies as st
from random_modules import ACTIVATIONS, PLAIN
from random_specs import (
    Act,
    Block,
    Blocks,
    Conv,
    Fork,
    Gate,
    InPlace,
    Links,
    LongSkip,
    Network,
    Norm,
    Plain,
    Pool,
    Split,
    Streams,
    Time,
    Transposed,
    Twice,
    parts,
)

__all__ = ["KINDS", "networks"]

_T = TypeVar("_T")


def _of(*values: _T) -> st.SearchStrategy[_T]:
    """One of the values; the first is what hypothesis shrinks to, and one that is named twice comes twice as often."""
    return st.sampled_from(values)


def _any(block: Callable[..., _T], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[_T]:
    """A dataclass, its fields drawn from what is given, else by their type: every value of a Literal."""
    free = {field.name: ... for field in fields(block) if field.name not in given}  # type: ignore[arg-type]
    return st.builds(block, **given, **free)


def _rows(*rows: st.SearchStrategy[Any]) -> st.SearchStrategy[Blocks]:
    """Blocks one after another; each part is a strategy of a block or of several."""
    return st.tuples(*rows).map(lambda row: sum((part if isinstance(part, tuple) else (part,) for part in row), ()))


def _maybe(blocks: st.SearchStrategy[Any]) -> st.SearchStrategy[Blocks]:
    return st.just(()) | _rows(blocks) | _rows(blocks)


def _several(blocks: st.SearchStrategy[Blocks], least: int) -> st.SearchStrategy[tuple[Blocks, ...]]:
    return st.lists(blocks, min_size=least, max_size=3).map(tuple)


# --- blocks -----------------------------------------------------------------------------------------------------------

_one, _two, _three = (1, 1, 1), (2, 2, 2), (3, 3, 3)
_out = _of(4, 6, 8)
_groups = _of("one", "one", "two", "depth")

_conv = _any(
    Conv,
    out=_out,
    kernel=_of(_three, _one, _two, (3, 1, 3), (1, 3, 1), (5, 3, 1), (4, 3, 2)),
    stride=_of(_one, _one, _one, _two, _three, (2, 1, 2), (1, 3, 1)),
    dilation=_of(_one, _one, _one, _two, _three, (1, 2, 1)),
    groups=_groups,
    mode=_of(*["zeros"] * 9, "reflect", "replicate", "circular"),
)
_keeping = _any(
    Conv,
    out=_out,
    kernel=_of(_three, _one, _two, (3, 1, 3)),
    stride=st.just(_one),
    dilation=_of(_one, _one, _one, _two),
    groups=_groups,
    padding=_of("same", "same", "front"),
    mode=st.just("zeros"),
)
"""Convolutions that keep the image's size, so that they may stand in a branch."""

_act = st.builds(Act, _of(*ACTIVATIONS))
_leaf: st.SearchStrategy[Block] = st.one_of(
    _act,
    _any(Norm),
    _any(Pool, kernel=_of(2, 3), stride=_of(1, 2), padding=_of(0, 1)),
    _any(Time),
    _any(Gate),
    st.builds(Plain, _of(*PLAIN)),
    st.just(Transposed()),
)


def _layer(conv: st.SearchStrategy[Conv]) -> st.SearchStrategy[Blocks]:
    """A convolution with what usually stands behind it."""
    return _rows(conv, _maybe(st.just(Norm()) | _any(Norm)), _maybe(_act))


def _composite(inner: st.SearchStrategy[Blocks]) -> st.SearchStrategy[Block]:
    return st.one_of(
        _any(Fork, branches=_several(inner, 1), stride=_of(1, 2)),
        _any(Split, inner=inner),
        _any(Links, steps=_several(inner, 2)),
        _any(Streams, wide=inner, low=inner),
        _any(LongSkip, inner=inner),
        _any(Twice, inner=inner),
        _any(InPlace, inner=inner),
    )


_layers = _layer(_keeping) | _rows(_layer(_keeping), _layer(_keeping)) | _rows(_layer(_keeping), _leaf)
_nested = _layers | _rows(_layer(_keeping), _composite(_layer(_keeping)))
_anything = _layer(_conv) | _rows(_leaf) | _rows(_composite(_nested))


# --- what merges are to hold ------------------------------------------------------------------------------------------

_small = _of(_three, _one, _two, (3, 1, 3), (1, 3, 1))
_large = _of(_three, _two, (3, 2, 3))
_simple = st.builds(Conv, _out, _small, groups=_of("one", "one", "two"), bias=...)
_same = st.builds(Conv, _out, _small, padding=st.just("same"))
_removable = _rows(_maybe(st.just(Norm())), _maybe(st.builds(Act, _of("relu", "silu", "in-place relu"))))


def _between(special: st.SearchStrategy[Any]) -> st.SearchStrategy[Blocks]:
    """Something between two convolutions, so that a merge can span it."""
    return _rows(_simple, _removable, special, _removable, _simple)


_chain = _rows(_simple, _removable, _simple) | _between(_simple)
_branches = _several(_rows(_same, _removable) | _rows(_same, _removable, _same), 2)

KINDS: dict[str, st.SearchStrategy[Blocks]] = {
    "fork-join": _between(_any(Fork, branches=_branches, join=_of("add", "cat", "sub"), stride=_of(1, 2))),
    "stride": _between(
        st.builds(Conv, _out, _large, _of(_two, _three, (2, 1, 2)), padding=_of("half", "none", "front"))
    ),
    "group": _between(st.builds(Conv, _out, _large, groups=_of("two", "depth"))),
    "dilation": _between(st.builds(Conv, _out, _of(_three, (3, 1, 2)), dilation=_of(_two, _three, (2, 1, 1)))),
    "asymmetric pad": _between(
        st.builds(Conv, _out, _of(_two, (2, 3, 3)), padding=_of("front", "same"))
        | st.builds(Conv, _out, _of(_two, _three), st.just(_two), padding=st.just("front"))
    ),
    "long skip": _rows(_simple, _any(LongSkip, inner=_chain), _simple),
    "in-place skip": _rows(_simple, _any(InPlace, inner=_chain), _simple),
    "side input": _between(st.builds(Time, _of("linear", "silu", "view"))),
    "average": _between(st.builds(Pool, _of("avg", "blur"), _of(2, 3), _of(1, 2))),
    "norm": _out.flatmap(
        lambda out: _rows(
            st.builds(Conv, st.just(out), _small),
            st.builds(Norm, _of("group", "instance", "affine instance")),
            _removable,
            st.builds(Conv, st.just(out), _small),
        )
    ),
}
"""What a merge may have to hold, with parts of networks in which it can: names as in :func:`random_checks.kinds_of`."""


@st.composite
def networks(draw: st.DrawFn, kind: str) -> Network:
    """Random networks of two to about ten convolutions, each with a part of one of :data:`KINDS`."""
    spec = draw(
        _any(
            Network,
            blocks=_rows(_maybe(_layer(_conv)), _maybe(_anything), KINDS[kind], _maybe(_anything)),
            size=_of(2, 2, 2, 1, 3).flatmap(lambda dims: st.tuples(*[st.integers(7, 13 if dims < 3 else 9)] * dims)),
            channels=_of(2, 1, 3, 4),
            time=_of("input", "input", "image"),
            second=_of("none", "none", "none", "add", "cat"),
            seed=st.integers(0, 2**16),
        )
    )
    assume(sum(isinstance(part, Conv) for part in parts(spec)) <= 10)
    return spec
