"""Example inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.

Internally an example is always a pair ``(args, kwargs)``; tensors may lie inside nested tuples, lists and dicts. Axis 0
of every tensor that has axes is the batch; tensors without axes and values that are no tensors are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import UserError

__all__ = ["Example", "batch_size", "floats", "map_tensors", "split_example", "tensors", "with_batch"]

Example: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"
"""What ``example_input`` may be: one tensor, a tuple (positional inputs) or a dict (keyword inputs)."""


def split_example(example_input: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split an example input into the ``args`` and ``kwargs`` of ``model(*args, **kwargs)``.

    Raises:
        UserError: it is neither a tensor, a tuple nor a dict with string keys, or it holds no tensor.

    Example:
        >>> split_example((torch.zeros(1, 3), 7))
        ((tensor([[0., 0., 0.]]), 7), {})
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Tensor):
        args = (example_input,)
    elif isinstance(example_input, tuple):
        args = example_input
    elif isinstance(example_input, Mapping) and all(isinstance(key, str) for key in example_input):
        kwargs = dict(example_input)
    else:
        raise UserError(
            f"example_input is a {type(example_input).__name__}; expected a tensor, a tuple (positional inputs) or a "
            "dict with parameter names as keys (keyword inputs)."
        )
    if not tensors(args, kwargs):
        raise UserError("example_input holds no tensor. Pass the tensors that model(...) takes.")
    return args, kwargs


def tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors of an example: those of ``args``, then those of ``kwargs``."""
    return [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]


def floats(outputs: object) -> list[Tensor]:
    """All floating-point tensors inside of what a network returned."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def map_tensors(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same example with ``function`` applied to every tensor."""
    mapped: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, function, (args, dict(kwargs)))
    return mapped


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The common size of axis 0 of all tensors that have axes; None where they differ or there is none.

    Example:
        >>> batch_size((torch.zeros(4, 3),), {"time": torch.tensor(7)})
        4
    """
    sizes = {tensor.shape[0] for tensor in tensors(args, kwargs) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def with_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same example with ``size`` rows along axis 0: truncated, or repeated from the first row on.

    Raises:
        UserError: a tensor has no row to repeat.

    Example:
        >>> with_batch((torch.tensor([[1], [2]]),), {}, 3)[0][0].tolist()
        [[1], [2], [1]]
    """

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        if not tensor.shape[0]:
            raise UserError(
                f"an example tensor of shape {list(tensor.shape)} has an empty batch axis; pass at least one row."
            )
        rows = torch.arange(size, device=tensor.device) % tensor.shape[0]
        return tensor.index_select(0, rows)

    return map_tensors(resize, args, kwargs)
