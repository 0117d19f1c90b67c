"""Networks as files: ONNX, checked against ONNX Runtime, and ``.pt2`` programs of ``torch.export``."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import UnsupportedError, UserError
from .inputs import batch_size, map_tensors, tensors, with_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["check_path", "export_module", "input_arrays", "onnx_bytes"]

_Run: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], list[Tensor]]


def export_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write a network to a file whose suffix names the format, and check what was written.

    - ``.onnx``: parameters inside (below 2 GB), input names are the parameter names of ``forward``, the opset is the
      exporter's own (20 in torch 2.13). The exporter built on ``torch.export`` is used; where it fails or its model
      computes something else, the older one, with a warning.
    - ``.pt2``: ``torch.export.save``; the example input is not stored in it.

    The check runs the file's content (ONNX in ONNX Runtime, else loaded by ``torch.export.load``) at two batch sizes,
    on the example with noise added, and compares floating-point outputs with the module's. Allowed is 20 times the
    module's own error between float64 and its dtype, and at least 1e-4 (float32; 2e-2 for shorter types) of
    ``max |output - its mean over the batch|``.

    The file appears whole or not at all. Non-tensor inputs become constants.

    Args:
        module: in eval mode.
        args: example positional inputs; axis 0 of every tensor that has axes is the batch.
        kwargs: example keyword inputs.
        path: ends in ``.onnx`` or ``.pt2``; an existing file is replaced.
        dynamic_batch: the file takes any batch size; False: only the example's.
        check: compare the file's outputs with the module's.

    Returns:
        The path.

    Raises:
        UserError: the path cannot be written or has another suffix (found before the work begins), or the
            module is in training mode.
        UnsupportedError: the module cannot be exported, or what was exported computes something else.
    """
    target = check_path(path)
    if module.training:
        raise UserError(f"{type(module).__name__} is in training mode; call its .eval() before exporting it.")
    if dynamic_batch and batch_size(args, kwargs) is None:
        dynamic_batch = False
        warnings.warn(
            "the example inputs do not agree on a batch size (axis 0): exported with their sizes fixed",
            stacklevel=2,
        )
    export = _checked_onnx if target.suffix == ".onnx" else _checked_pt2
    reference = _reference(module, args, kwargs, dynamic_batch) if check else None
    _write(target, export(module, args, kwargs, dynamic_batch, reference))
    return target


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if :func:`export_module` can write it.

    Raises:
        UserError: the suffix is unknown, the folder does not exist, the path is a folder, or there is no
            permission to write.
    """
    target = Path(path)
    if target.suffix not in (".onnx", ".pt2"):
        raise UserError(f"cannot export to {str(target)!r}: expected a path ending in .onnx or .pt2.")
    if target.is_dir():
        raise UserError(f"cannot export to {str(target)!r}: it is a folder.")
    if not target.parent.is_dir():
        raise UserError(f"cannot export to {str(target)!r}: its folder does not exist. Create it first.")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UserError(f"cannot export to {str(target)!r}: no permission to write there.")
    return target


def onnx_bytes(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic_batch: bool,
) -> bytes:
    """The network as a serialised ONNX model, in memory and unchecked.

    Args:
        module: in eval mode.
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_batch: axis 0 of every input that has axes is dynamic; else all sizes are the example's.

    Raises:
        UnsupportedError: ``torch.export`` or ``torch.onnx`` refuses the module.
    """
    try:
        return _onnx(module, args, kwargs, dynamic_batch)
    except Exception as error:
        raise UnsupportedError(f"{type(module).__name__} cannot be exported to ONNX: {_first_line(error)}") from error


def input_arrays(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors of an example as NumPy arrays, by their input names in :func:`onnx_bytes`'s model."""
    args, kwargs, names = _bind(module, args, kwargs)
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors(args, kwargs)]
    return dict(zip(names, arrays, strict=True))


def _checked_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_batch: bool,
    reference: _Reference | None,
) -> bytes:
    """The first exporter's model that computes the right thing."""
    if reference is not None and not _has_onnxruntime():
        reference = None
        warnings.warn(
            "onnxruntime is not installed: the exported ONNX model was not checked. To check it: "
            "pip install 'fxmerge[cpu]'",
            stacklevel=3,
        )
    problems = []
    for exporter in (_onnx, _onnx_torchscript):
        try:
            model = exporter(module, args, kwargs, dynamic_batch)
            if reference is not None:
                reference.compare(_onnx_run(model, module))
        except Exception as error:
            problems.append(_first_line(error))
            continue
        if problems:
            warnings.warn(
                f"exported with the older ONNX exporter (dynamo=False): with the newer, {problems[0]}",
                stacklevel=3,
            )
        return model
    raise UnsupportedError(
        f"{type(module).__name__} cannot be exported to ONNX. Newer exporter: {problems[0]}. "
        f"Older exporter: {problems[1]}."
    )


def _checked_pt2(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_batch: bool,
    reference: _Reference | None,
) -> bytes:
    buffer = io.BytesIO()
    try:
        program = _program(module, args, kwargs, dynamic_batch)
        # It would be pickled into the file: somebody's data, and unreadable without their classes.
        program.example_inputs = None
        torch.export.save(program, buffer)
        if reference is not None:
            buffer.seek(0)
            loaded = torch.export.load(buffer).module()
            reference.compare(lambda args, kwargs: _outputs(loaded, args, kwargs))
    except Exception as error:
        raise UnsupportedError(f"{type(module).__name__} cannot be exported to .pt2: {_first_line(error)}") from error
    return buffer.getvalue()


def _program(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_batch: bool
) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic_batch:
        if batch_size(args, kwargs) == 1:
            # torch.export takes an axis of size 1 for a constant (pytorch #133653)
            args, kwargs = with_batch(args, kwargs, 2)
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        shapes = pytree.tree_map(_batch_axis, dict(arguments))
    with torch.no_grad(), _torch_quiet():
        return torch.export.export(module, args, dict(kwargs), dynamic_shapes=shapes, strict=False)


def _batch_axis(leaf: Any) -> dict[int, Any] | None:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.ndim else None


def _onnx(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_batch: bool) -> bytes:
    args, kwargs, names = _bind(module, args, kwargs)
    program = _program(module, args, kwargs, dynamic_batch)
    with _torch_quiet():
        # optimize folds batch norms and shape arithmetic, which ONNX Runtime alone does not: without
        # it a ResNet runs a third slower
        exported = torch.onnx.export(program, dynamo=True, input_names=names, optimize=True, verbose=False)
    if exported is None:
        raise UnsupportedError("torch.onnx.export returned nothing")
    data: bytes = exported.model_proto.SerializeToString()
    return data


def _onnx_torchscript(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_batch: bool
) -> bytes:
    args, kwargs, names = _bind(module, args, kwargs)
    inputs = tuple(tensors(args, kwargs))
    axes = {name: {0: "batch"} for name, tensor in zip(names, inputs, strict=True) if tensor.ndim}
    buffer = io.BytesIO()
    with torch.no_grad(), _torch_quiet():
        torch.onnx.export(
            _OnTensors(module, args, kwargs).eval(),
            inputs,
            buffer,  # type: ignore[arg-type]  # this exporter writes to files and to buffers
            dynamo=False,
            input_names=names,
            dynamic_axes=axes if dynamic_batch else None,
        )
    return buffer.getvalue()


class _OnTensors(nn.Module):
    """A module as a function of its tensors alone: the older exporter would make inputs of its numbers too."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = pytree.tree_flatten((args, dict(kwargs)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(inputs)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        outputs = pytree.tree_leaves(self.module(*args, **kwargs))
        return tuple(output for output in outputs if isinstance(output, Tensor))


def _bind(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """The example in the order of ``forward``'s parameters, which both exporters keep, and names for its tensors."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    leaves = pytree.tree_flatten_with_path(dict(bound.arguments))[0]
    names = [
        "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    return bound.args, bound.kwargs, names


@contextmanager
def _torch_quiet() -> Iterator[None]:
    """Silence what torch's exporters say about themselves; what the module's own code warns of is kept.

    torch 2.13: a FutureWarning about ``LeafSpec`` from copying a program, DeprecationWarnings that the
    older exporter is old, and TracerWarnings, whose subject the check decides; log lines about a missing torchvision.
    """
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):  # type: ignore[attr-defined]
                warnings.simplefilter("ignore", category)
            yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the module computes on a few inputs, and how far its exported form may be from it.

    ``limits`` are absolute, one per output; infinite for an output that is not compared.
    """

    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]
    outputs: list[list[Tensor]]
    limits: list[float]

    def compare(self, run: _Run) -> None:
        """Run the exported form on all inputs.

        Raises:
            UnsupportedError: an output is missing, has another shape, or is too far off.
        """
        for (args, kwargs), expected in zip(self.inputs, self.outputs, strict=True):
            actual = run(args, kwargs)
            shapes = [list(output.shape) for output in expected]
            if [list(output.shape) for output in actual] != shapes:
                found = [list(output.shape) for output in actual]
                raise UnsupportedError(f"the exported network's outputs have shapes {found}, not {shapes}")
            for index, limit in enumerate(self.limits):
                error = _distance(actual[index], expected[index])
                if limit < float("inf") and not error <= limit:
                    raise UnsupportedError(
                        f"output {index} of the exported network is off by {error:.2g}, "
                        f"more than the {limit:.2g} that rounding explains"
                    )


def _reference(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_batch: bool) -> _Reference:
    size = batch_size(args, kwargs)
    # One image says nothing about a difference between images, so two at least.
    sizes = [max(size or 1, 2), max(size or 1, 2) + 1] if dynamic_batch else [None, None]
    inputs = [_noisy(args, kwargs, size, seed) for seed, size in enumerate(sizes)]
    outputs = [_outputs(module, *example) for example in inputs]
    exact = _double_outputs(module, inputs)
    limits = []
    for index, output in enumerate(outputs[0]):
        seen = [some[index] for some in outputs]
        if not output.is_floating_point():
            limits.append(float("inf"))
            continue
        spread = _spread(seen)
        if exact is None:
            limit = 1e-3 * spread
        else:
            own = max(_distance(a[index], b) for a, b in zip(exact, seen, strict=True))
            floor = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
            limit = max(20 * own, floor * spread)
        limits.append(limit if 0 < limit <= 0.1 * spread else float("inf"))
    if all(limit == float("inf") for limit in limits):
        warnings.warn(
            f"{type(module).__name__}'s outputs barely depend on its inputs: only the shapes of the exported "
            "network's outputs were checked",
            stacklevel=3,
        )
    return _Reference(inputs, outputs, limits)


def _noisy(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int | None, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example at a batch size, with noise as large as its spread, so that no two rows are alike."""
    if size is not None:
        args, kwargs = with_batch(args, kwargs, size)
    generator = torch.Generator().manual_seed(seed)

    def disturb(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        scale = float(tensor.double().std(correction=0)) or 1.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
        return tensor + noise.to(tensor)

    return map_tensors(disturb, args, kwargs)


def _double_outputs(
    module: nn.Module, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> list[list[Tensor]] | None:
    """What the module computes in float64; None for a module that cannot (a dtype fixed in its graph)."""

    def widen(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    try:
        double = copy.deepcopy(module).double()
        return [_outputs(double, *map_tensors(widen, *example)) for example in inputs]
    except Exception:
        return None


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that the module returns, on the CPU."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(*args, **kwargs))
    return [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def _onnx_run(model: bytes, module: nn.Module) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        arrays = input_arrays(module, args, kwargs)
        feeds = {entry.name: arrays[entry.name] for entry in session.get_inputs()}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def _has_onnxruntime() -> bool:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


def _distance(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _spread(outputs: list[Tensor]) -> float:
    """How far an output moves from its mean over all the examples: the scale of what it says."""
    rows = [output.double().reshape(-1, *output.shape[1:]) for output in outputs]
    if len({row.shape[1:] for row in rows}) == 1:
        rows = [torch.cat(rows)]
    return max(float((row - row.mean(0)).abs().max()) if row.numel() else 0.0 for row in rows)


def _write(target: Path, data: bytes) -> None:
    """Replace the file in one step: a reader, or a crash, never finds half of it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
