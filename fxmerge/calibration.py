"""Calibration inputs: read once from any iterable, checked, cached up to a memory bound, and split by images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn

from .errors import UserError
from .graph import device_of, graph_meta, shape_of
from .inputs import batch_size, map_tensors, split_example, tensors, with_batch

__all__ = [
    "Batch",
    "Calibration",
    "eval_mode",
    "parse_memory",
    "read_calibration",
    "reestimate_batch_norms",
    "refuse_no_batches",
    "second_example",
    "spread",
    "take_inputs",
]

Batch: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one forward pass."""

_T = TypeVar("_T")
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PARTS = 5


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration batches in two parts.

    Attributes:
        fit: for statistics and fits.
        held_out: for scores: a fifth of the images, that no fit sees. (A single batch that cannot be split serves as
            both.)
        images: how many there are.
        truncated: whether the memory bound left some out.
    """

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
    text = str(memory).strip().upper()
    number = text.rstrip("BIKMG")
    try:
        size = float(number) * _UNITS[text[len(number) :] or "B"]
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size < math.inf:
        raise UserError(f"memory={memory!r} is no amount of memory; expected something like '2GiB' or '500MB'")
    return int(size)


def read_calibration(
    batches: Iterable[Any],
    take: Callable[[Any], Any] | None,
    model: fx.GraphModule,
    example: Batch,
    memory: str | int = "2GiB",
) -> Calibration:
    """Read calibration batches once, until they end or fill ``memory``, and check each against the model.

    Args:
        batches: what a loader yields.
        take: how to take the model's inputs out of a batch; without it a batch is a tensor, a tuple of positional
            inputs or a dict of keyword inputs. Nothing is guessed: for (images, labels) pass ``lambda batch:
            batch[0]``.
        model: the canonical graph, for its device and to try the first batch.
        example: what the model was traced with.
        memory: bound on the cache; the first batch is kept in any case.

    Raises:
        UserError: a batch does not fit the model (its number in the message), or there is none.
    """
    refuse_no_batches(batches, "calibration")
    limit = parse_memory(memory)
    device = device_of(model)
    expected = tensors(*example)
    read: list[Batch] = []
    used, truncated = 0, False
    for number, item in enumerate(batches):
        batch = take_inputs(item, take, expected, f"calibration batch {number}")
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
    fit, held_out = _split(read, splits=graph_meta(model).get("dynamic_batch", True))
    return Calibration(fit, held_out, images, truncated)


def refuse_no_batches(batches: object, option: str) -> None:
    """Raise :class:`~fxmerge.errors.UserError` unless ``batches``, what ``option`` was given, can be iterated over."""
    if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise UserError(
            f"{option} is a {type(batches).__name__}; expected an iterable of batches (loader, list, generator). "
            "For a single batch pass [batch]."
        )


def take_inputs(item: Any, take: Callable[[Any], Any] | None, expected: list[Tensor], name: str) -> Batch:
    """The model's inputs out of what a loader yielded.

    Args:
        item: what it yielded.
        take: how to take them out; without it ``item`` is a tensor, a tuple of positional inputs or a dict of keyword inputs.
        expected: the tensors of the example input; all but the batch axis must agree.
        name: of the batch, for messages, such as "calibration batch 0".

    Raises:
        UserError: ``take`` failed, or what it gave is no input of the model.
    """
    try:
        inputs = item if take is None else take(item)
    except Exception as error:
        raise UserError(f"inputs= failed on {name}: {type(error).__name__}: {error}") from error
    try:
        batch = split_example(tuple(inputs) if isinstance(inputs, list) else inputs)
    except UserError as error:
        raise UserError(f"{name} is not an input of the model: {error}") from error
    found = tensors(*batch)
    if [_kind(t) for t in found] != [_kind(t) for t in expected]:
        raise UserError(
            f"{name} holds tensors of shape {[list(t.shape) for t in found]}, the example input "
            f"{[list(t.shape) for t in expected]} (dtypes {[str(t.dtype) for t in found]} and "
            f"{[str(t.dtype) for t in expected]}); all but the batch axis must agree. Say how to take the model's "
            "inputs out of a batch, for example inputs=lambda batch: batch[0]."
        )
    return batch


def _kind(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.ndim, tuple(tensor.shape[1:]), tensor.dtype


def _try(model: nn.Module, batch: Batch) -> None:
    try:
        with torch.no_grad(), eval_mode(model):
            model(*batch[0], **batch[1])
    except Exception as error:
        raise UserError(f"the model rejects calibration batch 0: {error}") from error


def _split(read: list[Batch], *, splits: bool) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Every fifth batch is held out; fewer than five are cut into parts first, of two images at least."""
    if splits and len(read) < _PARTS:
        read = [part for batch in read for part in _parts(batch, -(-_PARTS // len(read)))]
    if len(read) == 1:
        return tuple(read), tuple(read)
    held_out = read[2::_PARTS] or read[-1:]
    return tuple(batch for batch in read if not any(batch is other for other in held_out)), tuple(held_out)


def _parts(batch: Batch, parts: int) -> list[Batch]:
    images = batch_size(*batch) or 1
    parts = max(1, min(parts, images // 2))
    bounds = [round(part * images / parts) for part in range(parts + 1)]
    return [_rows(batch, *pair) for pair in itertools.pairwise(bounds)]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    return map_tensors(lambda t: t[start:stop] if t.ndim else t, *batch)


def spread(batches: int, size: int, images: int) -> list[int]:
    """Numbers of the batches to take for so many images or little more, spread evenly: many loaders are sorted by class.

    Args:
        batches: how many there are.
        size: of one.
        images: wanted; all batches where there are no more.

    Example:
        >>> spread(8, 32, 100)
        [0, 2, 4, 6]
    """
    count = min(batches, -(-images // size))
    return [number * batches // count for number in range(count)]


def second_example(example: Batch) -> Batch:
    """The same inputs at batch 2 or more, so that outputs can be compared between inputs."""
    return with_batch(*example, 2) if batch_size(*example) == 1 else example


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the duration of a ``with`` block; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def reestimate_batch_norms(
    gm: fx.GraphModule, nodes: set[fx.Node], batches: Iterable[_T], forward: Callable[[_T], object] | None = None
) -> int:
    """Set running statistics anew from forward passes, for the batch norms called by ``nodes`` alone.

    They become averages over all batches, added up in float64: in half precision a running average would soon be too
    coarse to change. Modes and momenta are restored, everything else runs in eval mode. A batch norm that the user keeps in
    eval mode is re-estimated as well: its input has changed.

    Args:
        gm: a canonical graph.
        nodes: whose batch norms.
        batches: what to run; batches of inputs unless ``forward`` takes something else.
        forward: runs one of them; default the graph itself.

    Returns:
        How many batch norms there were.

    Raises:
        UserError: a batch leaves a batch norm a single value per channel, of which there is no variance.
    """
    norms = {
        node: gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node in nodes and _is_norm(gm, node)
    }
    if not norms:
        return 0
    found = (module for module in norms.values() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    modules = list(dict.fromkeys(found))  # one that is called twice averages over both
    momenta = [module.momentum for module in modules]
    run = forward or (lambda batch: gm(*batch[0], **batch[1]))  # type: ignore[index]
    totals: dict[nn.Module, list[Tensor]] = {
        module: [torch.zeros_like(each, dtype=torch.float64) for each in _statistics(module)] for module in modules
    }

    def add_up(module: nn.Module, *_: Any) -> None:
        for total, each in zip(totals[module], _statistics(module), strict=True):
            total += each

    hooks = [module.register_forward_hook(add_up) for module in modules]
    try:
        with eval_mode(gm), torch.no_grad():
            for module in modules:
                module.reset_running_stats()
                module.momentum = 1.0  # the statistics of one batch alone
                module.train()
            for batch in batches:
                run(batch)
            for module in modules:
                calls = int(module.get_buffer("num_batches_tracked"))
                for total, each in zip(totals[module], _statistics(module), strict=True):
                    each.copy_(total / calls if calls else each)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        where = next((str(node.target) for node in norms if math.prod(shape_of(node)[2:]) == 1), "")
        raise UserError(
            f"a calibration batch of one image leaves batch norm {where!r} one value per channel and no variance: "
            "use larger calibration batches."
        ) from error
    finally:
        for module, momentum, hook in zip(modules, momenta, hooks, strict=True):
            module.momentum = momentum
            hook.remove()
    return len(modules)


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.get_buffer("running_mean"), module.get_buffer("running_var")


def _is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = gm.get_submodule(str(node.target))
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
