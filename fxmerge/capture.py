"""The one front end: ``torch.export``, the canonicalise and the recognise pass turn a model into a canonical graph."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError, UserError
from .graph import CONVOLUTIONS, CanonicalGraph, graph_meta
from .inputs import Example, batch_size, map_tensors, split_example, tensors, with_batch
from .removable import tag_removable

__all__ = ["capture"]


def capture(model: nn.Module, example_input: Example) -> fx.GraphModule:
    """Trace a model into its canonical graph: a view that shares the model's Parameters and buffers.

    Convolutions, batch norms, activations, pools, dropouts and linears become ``call_module`` nodes of ``torch.nn``
    classes under the names the model gave them, so ``state_dict`` keys stay (what the forward pass does not use is left
    out); everything else is ``call_function``. The graph computes what the model computes, in eval and in train mode,
    and for other batch sizes where ``torch.export`` allows it (otherwise ``gm.meta["fxmerge"]["dynamic_batch"]`` is
    False). The model itself is left as it was: weights, statistics, gradients, training flags and hooks.

    Args:
        model: any module that ``torch.export`` can trace; one that is itself a convolution is captured as
            ``nn.Sequential(model)``.
        example_input: a tensor, a tuple (positional inputs) or a dict (keyword inputs). Non-tensor inputs are constants
            of the capture: calling the graph with others raises.

    Raises:
        UserError: the example is not a tensor, tuple or dict, or the model rejects it, or its parameters are on
            ``meta`` or on several devices.
        CaptureError: ``torch.export`` cannot trace the model; the message names the place.

    Warns:
        UserWarning: a module branches on ``self.training``. The graph has its eval-mode branch only. Or: a module whose
            class is registered (:func:`fxmerge.register_removable`) cannot be removed.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> gm = fxmerge.capture(net, torch.randn(1, 3, 8, 8))
        >>> [node.target for node in gm.graph.nodes if node.op == "call_module"]
        ['0', '1']
    """
    from .passes.canonicalise import canonicalise
    from .passes.recognise import recognise

    if not isinstance(model, nn.Module):
        hint = f"; did you mean {model.__name__}()?" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise UserError(f"model is {model!r}, not a torch.nn.Module{hint}")
    args, kwargs = split_example(example_input)
    device = _only_device(model)
    _warn_of_training_branches(model)
    if isinstance(model, CONVOLUTIONS):
        model = nn.Sequential(model).train(model.training)
    if any(tensor.device.type == "meta" for tensor in tensors(args, kwargs)):
        raise UserError("the example input is on the meta device and has no values. Pass real tensors.")
    args, kwargs = map_tensors(lambda tensor: tensor.detach().to(device), args, kwargs)
    with _eval_mode(model):
        _refuse_rejected(model, args, kwargs)
        program, dynamic = _export(model, args, kwargs)
        exported = program.module(check_guards=False)
    gm = CanonicalGraph(exported, exported.graph, type(model).__name__)
    _refuse_autocast(gm, model)
    canonicalise(gm, model)
    tag_removable(gm, model)
    recognise(gm, model)
    graph_meta(gm)["dynamic_batch"] = dynamic
    return gm


def _only_device(model: nn.Module) -> torch.device:
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places.setdefault(tensor.device, name)
    for device, name in places.items():
        if device.type == "meta":
            raise UserError(
                f"parameter {name!r} is on the meta device and has no values. Materialise the model first "
                "(model.to_empty(device=...) and load its weights)."
            )
    if len(places) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise UserError(f"the model lies on several devices ({listed}). Move it to one: model.to(device).")
    return next(iter(places), torch.device("cpu"))


def _refuse_autocast(gm: fx.GraphModule, model: nn.Module) -> None:
    """What runs under autocast is one opaque call of an exported graph: nothing in it could be found."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            where = f"{type(model).__name__}, in {stack[-1][0]!r}" if stack and stack[-1][0] else type(model).__name__
            raise CaptureError(
                f"{where} enters autocast in its forward pass, which hides its operations from torch.export. Pass the "
                "module without it, and enter autocast around the result."
            )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, by its flag alone: ``eval()`` may be overridden to do more."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _refuse_rejected(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward pass, so that a wrong example is told from a model that cannot be traced."""
    copied_args, copied_kwargs = map_tensors(torch.clone, args, kwargs)  # the model may write into its input
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*copied_args, **copied_kwargs)
    except Exception as error:
        shapes = [list(tensor.shape) for tensor in tensors(args, kwargs)]
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
        f"torch.export cannot trace {type(model).__name__}: {_first_line(failure)}{_place(failure)}. "
        "Rewrite that part without control flow on tensor values, or compress the submodule that has the convolutions."
    ) from failure


def _export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> torch.export.ExportedProgram:
    shapes = None
    args, kwargs = map_tensors(torch.clone, args, kwargs)  # torch.export marks them, and the model may write them
    if dynamic:
        axes = pytree.tree_map(_batch_axis, (args, kwargs))
        shapes = dict(inspect.signature(model.forward).bind(*axes[0], **axes[1]).arguments)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _batch_axis(leaf: object) -> object:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.ndim else None


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
    """Python branches on ``self.training`` do not exist in an eval-mode capture: say so, with the modules' names."""
    kinds = {type(module) for module in model.modules()}
    branching = {kind for kind in kinds if not kind.__module__.startswith("torch.") and _branches_on_training(kind)}
    found = [
        f"{path!r} ({type(module).__name__})" if path else type(module).__name__
        for path, module in model.named_modules()
        if type(module) in branching
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        warnings.warn(
            f"{', '.join(found[:3])}{more} may behave differently on self.training: the captured graph does what they "
            "do in eval mode, in training too",
            stacklevel=3,
        )


def _branches_on_training(kind: type[nn.Module]) -> bool:
    """Whether ``forward`` reads ``self.training`` for anything but the dropout and batch norm of torch."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    traced = [call for call in calls if any(name in ast.unparse(call.func) for name in ("dropout", "batch_norm"))]
    harmless = {id(node) for call in traced for argument in (*call.args, *call.keywords) for node in ast.walk(argument)}
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "self.training" and id(node) not in harmless
        for node in ast.walk(tree)
    )
