"""Calibration inputs: read once from any iterable, checked, cached up to a memory bound, and split by images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import UserError
from .inputs import batch_size, map_tensors, split_example, tensors, with_batch

__all__ = ["Batch", "Calibration", "parse_memory", "read_calibration", "reestimate_batch_norms"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one forward pass."""

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration batches in two parts: ``fit`` for statistics and fits, ``held_out`` (a fifth of the images) for scores."""

    fit: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    images: int
    truncated: bool

    def __repr__(self) -> str:
        return f"Calibration({self.images} images, {len(self.fit)} batches to fit, {len(self.held_out)} held out)"


def parse_memory(memory: str | int) -> int:
    """Bytes of ``"2GiB"``, ``"500MB"`` or a number.

    Raises:
        UserError: it is neither.

    Example:
        >>> parse_memory("2GiB")
        2147483648
    """
    if isinstance(memory, int) and memory > 0:
        return memory
    text = str(memory).strip().upper()
    number = text.rstrip("BIKMG")
    try:
        size = int(float(number) * _UNITS[text[len(number) :].strip()])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise UserError(f"memory={memory!r} is no amount of memory; expected something like '2GiB' or '500MB'")
    return size


def read_calibration(
    batches: Iterable[Any],
    take: Callable[[Any], Any] | None,
    model: nn.Module,
    example: Batch,
    memory: str | int = "2GiB",
) -> Calibration:
    """Read calibration batches once, until they end or fill ``memory``, and check each against the model.

    Args:
        batches: what a loader yields.
        take: how to take the model's inputs out of a batch; without it a batch is a tensor, a tuple of positional inputs or a
            dict of keyword inputs. Nothing is guessed: for (images, labels) pass ``lambda batch: batch[0]``.
        model: the canonical graph, for its device and to try the first batch.
        example: what the model was traced with.
        memory: bound on the cache.

    Raises:
        UserError: a batch does not fit the model (its number in the message), or there is none.
    """
    limit = parse_memory(memory)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    expected = tensors(*example)
    read: list[Batch] = []
    used, truncated = 0, False
    for number, item in enumerate(_iterate(batches)):
        batch = _as_batch(item, take, number)
        _refuse_foreign(batch, expected, number)
        used += sum(t.numel() * t.element_size() for t in tensors(*batch))
        if read and used > limit:
            truncated = True
            break
        read.append(map_tensors(lambda t: t.detach().to(device, copy=True), *batch))
        if number == 0:
            _try(model, read[0])
    if not read:
        raise UserError("calibration yielded no batch; pass a non-empty iterable, or calibration=None to do without")
    images = sum(batch_size(*batch) or 1 for batch in read)
    if len(read) == 1 and images > 1:
        read = _halves(read[0], images)
    held_out = read[4::5] or read[-1:]
    fit = [batch for batch in read if not any(batch is other for other in held_out)] or read
    return Calibration(tuple(fit), tuple(held_out), images, truncated)


def _iterate(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise UserError(
            f"calibration is a {type(batches).__name__}; expected an iterable of batches (a loader, a list, a generator). "
            "For a single batch pass [batch]."
        )
    return batches


def _as_batch(item: Any, take: Callable[[Any], Any] | None, number: int) -> Batch:
    inputs = item if take is None else take(item)
    try:
        return split_example(tuple(inputs) if isinstance(inputs, list) else inputs)
    except UserError as error:
        raise UserError(f"calibration batch {number} is not an input of the model: {error}") from error


def _refuse_foreign(batch: Batch, expected: list[Tensor], number: int) -> None:
    found = tensors(*batch)
    same = len(found) == len(expected) and all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(found, expected, strict=True)
    )
    if not same:
        raise UserError(
            f"calibration batch {number} holds tensors of shape {[list(t.shape) for t in found]}, the example input "
            f"{[list(t.shape) for t in expected]} (dtypes {[str(t.dtype) for t in found]} and {[str(t.dtype) for t in expected]}). "
            "Say how to take the model's inputs out of a batch, for example inputs=lambda batch: batch[0]."
        )


def _try(model: nn.Module, batch: Batch) -> None:
    try:
        with torch.no_grad():
            model(*batch[0], **batch[1])
    except Exception as error:
        raise UserError(f"the model rejects the first calibration batch: {error}") from error


def _halves(batch: Batch, images: int) -> list[Batch]:
    """One large batch as five, so that whole images can be held out."""
    parts = min(5, images)
    bounds = [round(k * images / parts) for k in range(parts + 1)]
    return [
        map_tensors(lambda t, a=a, b=b: t[a:b] if t.ndim else t, *batch)  # type: ignore[misc]
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def reestimate_batch_norms(gm: fx.GraphModule, nodes: set[fx.Node], batches: Iterable[Batch]) -> int:
    """Set running statistics anew from forward passes, for the batch norms called by ``nodes`` alone; how many there were.

    Cumulative averages over all batches (momentum None); modes and momenta are restored. A batch norm that the user keeps in
    eval mode is re-estimated as well: its input has changed.
    """
    modules = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node in nodes and node.op == "call_module"]
    norms = [
        m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        return 0
    training = [(module, module.training) for module in gm.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        gm.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for args, kwargs in batches:
                gm(*args, **kwargs)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, flag in training:
            module.training = flag
    return len(norms)


def second_example(example: Batch) -> Batch:
    """The same inputs at batch 2 or more, so that outputs can be compared between inputs."""
    size = batch_size(*example)
    return example if size is None or size > 1 else with_batch(*example, 2)
