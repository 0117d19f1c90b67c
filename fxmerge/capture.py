"""The one front end: ``torch.export`` and the canonicalise pass turn a model into a canonical graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError, UnsupportedError, UserError
from .graph import graph_meta
from .inputs import Example, batch_size, split_example, with_batch

__all__ = ["capture"]


def capture(model: nn.Module, example_input: Example) -> fx.GraphModule:
    """Trace a model into its canonical graph: a view that shares the model's Parameters and buffers.

    Convolutions, batch norms, activations, pools, dropouts and linears become ``call_module`` nodes of ``torch.nn`` classes
    under the names the model gave them, so ``state_dict`` keys stay; everything else is ``call_function``. The graph computes
    what the model computes, in eval and in train mode, and for other batch sizes where ``torch.export`` allows it (otherwise
    ``gm.meta["fxmerge"]["dynamic_batch"]`` is False). The model itself is left as it was: weights, statistics, gradients,
    training flags and hooks.

    Args:
        model: any module that ``torch.export`` can trace.
        example_input: a tensor, a tuple (positional inputs) or a dict (keyword inputs). Non-tensor inputs are constants of
            the capture: calling the graph with others raises.

    Raises:
        UserError: the example is not a tensor, tuple or dict, or the model rejects it, or its parameters are on ``meta`` or
            on several devices.
        CaptureError: ``torch.export`` cannot trace the model; the message names the place.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> [node.target for node in fxmerge.capture(net, torch.randn(1, 3, 8, 8)).graph.nodes if node.op == "call_module"]
        ['0', '1']
    """
    from .passes.canonicalise import canonicalise

    args, kwargs = split_example(example_input)
    device = _only_device(model)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
    _warn_of_training_branches(model)
    with _eval_mode(model):
        _refuse_rejected(model, args, kwargs)
        program, dynamic = _export(model, args, kwargs)
        exported = program.module(check_guards=False)
        gm = fx.GraphModule(exported, exported.graph, type(model).__name__)
    canonicalise(gm, model)
    graph_meta(gm)["dynamic_batch"] = dynamic
    return gm


def _only_device(model: nn.Module) -> torch.device:
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places.setdefault(tensor.device, name)
    if any(device.type == "meta" for device in places):
        name = next(name for device, name in places.items() if device.type == "meta")
        raise UserError(
            f"parameter {name!r} is on the meta device and has no values. Materialise the model first "
            "(model.to_empty(device=...) and load its weights)."
        )
    if len(places) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise UserError(f"the model lies on several devices ({listed}). Move it to one: model.to(device).")
    return next(iter(places), torch.device("cpu"))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _refuse_rejected(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward pass, so that a wrong example is told from a model that cannot be traced."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        shapes = [list(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        raise UserError(
            f"{type(model).__name__} rejects the example input (tensors of shape {shapes}): {_first_line(error)}. "
            "Pass what model(...) takes: a tensor, a tuple for several positional inputs, a dict for keyword inputs."
        ) from error


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, bool]:
    """Export with a dynamic batch axis where the model allows it, with a static one otherwise."""
    attempts: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = []
    size = batch_size(args, kwargs)
    if size is not None:
        # torch.export takes an axis of size 1 for a constant (pytorch #133653), so a single example is repeated.
        attempts.append((*(with_batch(args, kwargs, 2) if size == 1 else (args, kwargs)), True))
    attempts.append((args, kwargs, False))
    failure: Exception | None = None
    for some_args, some_kwargs, dynamic in attempts:
        try:
            return _export_once(model, some_args, some_kwargs, dynamic), dynamic
        except Exception as error:
            failure = error
    assert failure is not None  # noqa: S101 - the loop above ran at least once
    raise CaptureError(
        f"torch.export cannot trace {type(model).__name__}: {_first_line(failure)}{_place(failure)}. Rewrite that part without "
        "control flow on tensor values, or compress the submodule that holds the convolutions."
    ) from failure


def _export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        shapes = pytree.tree_map(
            lambda leaf: {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.ndim else None, (args, kwargs)
        )
        names = list(inspect.signature(model.forward).parameters)
        shapes = _by_parameter(names, *shapes) if kwargs else shapes[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _by_parameter(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """The last line of user code in the traceback: outside torch, outside fxmerge."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in ("torch", "fxmerge", "contextlib", "sympy"):
            place = f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _warn_of_training_branches(model: nn.Module) -> None:
    """Python branches on ``self.training`` do not exist in an eval-mode capture: say so, with the module's name."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.") or not path:
            continue
        try:
            source = inspect.getsource(type(module).forward)
        except (OSError, TypeError):
            continue
        if "self.training" in source and "dropout" not in source:
            warnings.warn(
                f"module {path!r} ({type(module).__name__}) branches on self.training: the captured graph has its eval-mode "
                "branch only, in training too",
                stacklevel=4,
            )


def unsupported(node: fx.Node, reason: str) -> UnsupportedError:
    """The error for a graph that fxmerge cannot treat, naming the node."""
    return UnsupportedError(f"node {node.format_node()}: {reason}")
