"""The public export: a compressed network, or any other, as a file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engines import PRECISIONS, check_options, default_flavour
from .errors import UserError
from .exporters import check_path, export_engine, export_module
from .graph import META, device_of, dtype_of
from .inputs import Example, batch_size, map_tensors, split_example
from .result import Result

__all__ = ["check_export", "export"]


def export(
    model_or_result: nn.Module | Result,
    path: str | os.PathLike[str],
    example_input: Example | None = None,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    runtime: str | None = None,
    precision: str | None = None,
    workspace: str | None = None,
    batches: tuple[int, int, int] | None = None,
    compute_capability: str | None = None,
) -> Path:
    """Write a network to ``.onnx``, ``.pt2`` or ``.engine``; the suffix of the path says which. What was written is checked.

    Of a result the merged network is written, :meth:`~fxmerge.Result.merge`. The file appears whole or not at all; see
    :func:`fxmerge.exporters.export_module` for what the formats hold and how they are checked.

    An ``.engine`` is built by TensorRT for the device that is there, or by TensorRT-RTX on any machine, with a GPU or without.
    ``net.engine`` comes with ``net.onnx``, what it was built from, which is what the check is about, and ``net.engine.json``, which
    describes it: versions, options, inputs and outputs, SHA-256 of both files. The options from ``runtime`` on are for
    engines only.

    Args:
        model_or_result: a result, or a module in eval mode. A saved folder is loaded first: ``fxmerge.load(folder)``.
        path: an existing file is replaced.
        example_input: a tensor, a tuple (positional inputs) or a dict (keyword inputs). A module needs it; for a result
            the default is its own.
        dynamic_batch: the file takes any batch size; False: only the example's. What an engine takes is said by ``batches``.
        check: compare the file's outputs with the network's.
        runtime: ``"tensorrt"`` or ``"tensorrt-rtx"``. The default is the first where it is installed and a CUDA device is there and
            no ``compute_capability`` is named, else the second.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``, by default the network's own. A float32 network is converted; what
            goes in and comes out stays float32.
        workspace: most memory for temporary buffers of a layer, such as ``"2GiB"``; by default all of the device's.
        batches: smallest, usual and largest batch size, such as ``(1, 8, 32)``; by default the example's only.
        compute_capability: of the GPU, such as ``"8.9"``; ``tensorrt-rtx`` only, whose engines by default run on all RTX
            GPUs from Ampere on.

    Returns:
        The path.

    Raises:
        UserError: the path cannot be written or has another suffix, an option is wrong or not for this file, the example is
            missing or no example, or the module is in training mode; all found before the work begins.
        MissingPackageError: TensorRT is not installed.
        UnsupportedError: the network cannot be exported, or what was exported computes something else.

    Example:
        >>> import tempfile, torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxmerge.export(net, f"{folder}/net.pt2", torch.randn(2, 3, 8, 8)).name
        'net.pt2'
    """
    options: dict[str, Any] = {
        "runtime": runtime,
        "precision": precision,
        "workspace": workspace,
        "batches": batches,
        "compute_capability": compute_capability,
    }
    target = check_export(path, **options)
    if isinstance(model_or_result, Result):
        args, kwargs = model_or_result.example if example_input is None else split_example(example_input)
        module: nn.Module = model_or_result.model
    elif isinstance(model_or_result, nn.Module):
        if example_input is None:
            raise UserError(f"to export a {type(model_or_result).__name__} pass example_input, what its forward takes.")
        args, kwargs = split_example(example_input)
        module = model_or_result
    else:
        raise UserError(
            f"cannot export a {type(model_or_result).__name__}: expected a torch.nn.Module or a result of "
            "fxmerge.compress; a saved one is read by fxmerge.load(folder)."
        )
    if target.suffix == ".engine":
        options["precision"] = _precision(module, precision)
        if batches is not None and not (dynamic_batch and _takes_any_batch(module) and batch_size(args, kwargs)):
            raise UserError(
                f"batches is {batches!r}, but the batch size is fixed: by dynamic_batch=False, by torch.export, which found "
                "it built into this network, or by example inputs that do not agree on one (axis 0)."
            )
    elif dynamic_batch and not _takes_any_batch(module):
        dynamic_batch = False
        warnings.warn("torch.export fixed the batch size of this network: exported with it fixed", stacklevel=2)
    if isinstance(model_or_result, Result):
        module = model_or_result.merge()
    device = device_of(module)
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), args, kwargs)
    if target.suffix == ".engine":
        options["flavour"] = options.pop("runtime") or default_flavour(compute_capability)
        return export_engine(module, args, kwargs, target, check=check, **options)
    return export_module(module, args, kwargs, target, dynamic_batch=dynamic_batch, check=check)


def check_export(path: str | os.PathLike[str], **options: Any) -> Path:
    """The path, if :func:`export` can write it with these options, those that are for engines only.

    Raises:
        UserError: the path cannot be written or has another suffix, or an option is wrong or not for this file.
        MissingPackageError: TensorRT is not installed.
    """
    target = check_path(path)
    given = {name: value for name, value in options.items() if value is not None}
    if target.suffix == ".engine":
        flavour = given.pop("runtime", None) or default_flavour(given.get("compute_capability"))
        check_options(flavour=flavour, **given)
    elif given:
        raise UserError(f"{', '.join(given)}: only for a path ending in .engine, not for {str(target)!r}.")
    return target


def _precision(module: nn.Module, precision: str | None) -> str:
    """The precision to build in: the network's own, unless a float32 network is to be converted."""
    dtype = dtype_of(module)
    own = next((name for name, each in PRECISIONS.items() if each == dtype), None)
    if own is None or (precision not in (None, own) and dtype != torch.float32):
        raise UserError(
            f"the network is in {str(dtype).removeprefix('torch.')}: an engine is built from a float32 network in "
            f"{', '.join(PRECISIONS)}, from a float16 or bfloat16 one in that precision."
        )
    return precision or own


def _takes_any_batch(module: nn.Module) -> bool:
    """False for a captured network that has the batch size of its example built in."""
    meta = getattr(module, "meta", None)
    return not isinstance(meta, dict) or bool(meta.get(META, {}).get("dynamic_batch", True))
