"""The public export: a compressed network, or any other, as a file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import nn

from .errors import UserError
from .exporters import check_path, export_module
from .graph import META, device_of
from .inputs import Example, map_tensors, split_example
from .result import Result

__all__ = ["export"]


def export(
    model_or_result: nn.Module | Result,
    path: str | os.PathLike[str],
    example_input: Example | None = None,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write a network to ``.onnx`` or ``.pt2``; the suffix of the path says which. What was written is checked.

    Of a result the merged network is written, :meth:`~fxmerge.Result.merge`. The file appears whole or not at all; see
    :func:`fxmerge.exporters.export_module` for what the formats hold and how they are checked.

    Args:
        model_or_result: a result, or a module in eval mode. A saved folder is loaded first: ``fxmerge.load(folder)``.
        path: an existing file is replaced.
        example_input: a tensor, a tuple (positional inputs) or a dict (keyword inputs). A module needs it; for a result
            the default is its own.
        dynamic_batch: the file takes any batch size; False: only the example's.
        check: compare the file's outputs with the network's.

    Returns:
        The path.

    Raises:
        UserError: the path cannot be written or has another suffix (found before the work begins), the example is
            missing or no example, or the module is in training mode.
        UnsupportedError: the network cannot be exported, or what was exported computes something else.

    Example:
        >>> import tempfile, torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxmerge.export(net, f"{folder}/net.pt2", torch.randn(2, 3, 8, 8)).name
        'net.pt2'
    """
    target = check_path(path)
    if isinstance(model_or_result, Result):
        args, kwargs = model_or_result.example if example_input is None else split_example(example_input)
        module: nn.Module = model_or_result.merge()
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
    if dynamic_batch and not _takes_any_batch(module):
        dynamic_batch = False
        warnings.warn("torch.export fixed the batch size of this network: exported with it fixed", stacklevel=2)
    device = device_of(module)
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), args, kwargs)
    return export_module(module, args, kwargs, target, dynamic_batch=dynamic_batch, check=check)


def _takes_any_batch(module: nn.Module) -> bool:
    """False for a captured network that has the batch size of its example built in."""
    meta = getattr(module, "meta", None)
    return not isinstance(meta, dict) or bool(meta.get(META, {}).get("dynamic_batch", True))
