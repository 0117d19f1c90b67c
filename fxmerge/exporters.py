"""Networks as files: ONNX, checked against ONNX Runtime, TensorRT engines, and ``.pt2`` programs of ``torch.export``."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import io
import json
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

from .engines import build_engine, load_module
from .errors import UnsupportedError, UserError
from .files import write_files
from .inputs import batch_size, map_tensors, tensors, with_batch

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["check_path", "export_engine", "export_module", "files_written", "input_arrays", "onnx_bytes"]

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
        path: ends in ``.onnx`` or ``.pt2``, see :func:`export_engine` for ``.engine``; an existing file is replaced.
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
    if target.suffix == ".engine":
        raise UserError(f"cannot export to {str(target)!r}: export_engine writes engines.")
    _refuse_training(module)
    if dynamic_batch and batch_size(args, kwargs) is None:
        dynamic_batch = False
        warnings.warn(
            "the example inputs do not agree on a batch size (axis 0): exported with their sizes fixed",
            stacklevel=2,
        )
    export = _checked_onnx if target.suffix == ".onnx" else _checked_pt2
    reference = _reference(module, args, kwargs, dynamic_batch) if check else None
    write_files({target: export(module, args, kwargs, dynamic_batch, reference)})
    return target


def export_engine(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    flavour: str,
    precision: str = "fp32",
    workspace: str | None = None,
    batches: tuple[int, int, int] | None = None,
    compute_capability: str | None = None,
    check: bool = True,
) -> Path:
    """Write a network as a TensorRT engine, ``net.engine``, with two files beside it.

    - ``net.onnx``: the model that the engine was built from, in the module's own types, checked as :func:`export_module`
      does. The engine itself is not run: the device it is for may be another one.
    - ``net.engine.json``: versions, options, names and shapes of inputs and outputs (-1 is the batch), SHA-256 of both files.

    All three appear, or none.

    Args:
        module: in eval mode.
        args: example positional inputs; axis 0 of every tensor that has axes is the batch.
        kwargs: example keyword inputs.
        path: ends in ``.engine``; existing files are replaced.
        flavour: see :func:`~fxmerge.engines.build_engine`, as for ``precision``, ``workspace`` and ``compute_capability``.
        precision: of the engine; the ONNX model keeps its own.
        workspace: such as ``"2GiB"``.
        batches: smallest, usual and largest batch size; by default the engine takes the example's only.
        compute_capability: such as ``"8.9"``.
        check: compare the ONNX model's outputs with the module's.

    Returns:
        The path.

    Raises:
        UserError: the path cannot be written, the module is in training mode, or an option is wrong.
        MissingPackageError: the flavour is not installed.
        UnsupportedError: the module cannot be exported to ONNX, the model computes something else, or TensorRT
            cannot build it.
    """
    from . import __version__

    target = check_path(path)
    _refuse_training(module)
    dynamic = batches is not None
    reference = _reference(module, args, kwargs, dynamic) if check else None
    model = _checked_onnx(module, args, kwargs, dynamic, reference)
    engine = build_engine(
        model,
        flavour=flavour,
        precision=precision,
        workspace=workspace,
        batches=batches,
        compute_capability=compute_capability,
    )
    if flavour == "tensorrt":
        compute_capability = ".".join(map(str, torch.cuda.get_device_capability()))
    onnx_path, sidecar_path = files_written(target)[1:]
    sidecar = {
        "format": "fxmerge.engine/1",
        "fxmerge": __version__,
        "library": flavour,
        "library_version": load_module(flavour).__version__,
        "compute_capability": compute_capability,
        "precision": precision,
        "workspace": workspace,
        "batches": batches,
        **_signature(model),
        "onnx": {"file": onnx_path.name, "sha256": hashlib.sha256(model).hexdigest()},
        "engine": {"file": target.name, "sha256": hashlib.sha256(engine).hexdigest()},
    }
    text = json.dumps(sidecar, indent=1).encode()
    # the sidecar last: after a crash between two of them its sums tell
    write_files({onnx_path: model, target: engine, sidecar_path: text})
    return target


def files_written(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that an export to this path writes: the path, for an engine its ONNX model and its description too.

    Example:
        >>> [path.name for path in files_written("net.engine")]
        ['net.engine', 'net.onnx', 'net.engine.json']
    """
    target = Path(path)
    if target.suffix != ".engine":
        return (target,)
    return target, target.with_suffix(".onnx"), target.with_name(f"{target.name}.json")


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if :func:`export_module` or :func:`export_engine` can write it and what goes beside it.

    Raises:
        UserError: the suffix is unknown, the folder does not exist, the path is a folder, or there is no
            permission to write.
    """
    target = Path(path)
    if target.suffix not in (".onnx", ".pt2", ".engine"):
        raise UserError(f"cannot export to {str(target)!r}: expected a path ending in .onnx, .pt2 or .engine.")
    for file in files_written(target):
        if file.is_dir():
            raise UserError(f"cannot export to {str(file)!r}: it is a folder.")
        if not file.parent.is_dir():
            raise UserError(f"cannot export to {str(file)!r}: its folder does not exist. Create it first.")
        if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
            raise UserError(f"cannot export to {str(file)!r}: no permission to write there.")
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


def _refuse_training(module: nn.Module) -> None:
    if module.training:
        raise UserError(f"{type(module).__name__} is in training mode; call its .eval() before exporting it.")


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
    with _torch_quiet(), _one_registry():
        # optimize folds batch norms and shape arithmetic, which ONNX Runtime alone does not: without
        # it a ResNet runs a third slower
        exported = torch.onnx.export(program, dynamo=True, input_names=names, optimize=True, verbose=False)
    if exported is None:
        raise UnsupportedError("torch.onnx.export returned nothing")
    model = exported.model_proto
    _rename_returned_inputs(model)
    data: bytes = model.SerializeToString()
    return data


def _rename_returned_inputs(model: onnx.ModelProto) -> None:
    """Where a network returns an input as it is, torch 2.13 gives input and output one name, which is not valid ONNX."""
    inputs = {entry.name for entry in model.graph.input}
    names = {name: f"{name}_returned" for node in model.graph.node for name in node.output if name in inputs}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
    for entry in model.graph.output:
        entry.name = names.get(entry.name, entry.name)


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


@functools.cache
def _registry(make: Callable[..., Any], **options: Any) -> Any:
    return make(**options)


@contextmanager
def _one_registry() -> Iterator[None]:
    """Let the exporter make its table of operators once in a process, not at every export: it takes a second (torch 2.13).

    The table is private to torch. Where it is no longer what it was nothing is shared, and nothing else changes.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        make, original = ONNXRegistry.from_torchlib, vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    setattr(ONNXRegistry, "from_torchlib", functools.partial(_registry, make))  # noqa: B010 - not in its type
    try:
        yield
    finally:
        setattr(ONNXRegistry, "from_torchlib", original)  # noqa: B010


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


def _signature(model: bytes) -> dict[str, list[dict[str, Any]]]:
    """Names, types and shapes of an ONNX model's inputs and outputs; -1 is a size that is not fixed."""
    import onnx

    graph = onnx.load_model_from_string(model).graph

    def describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim]
        return {"name": value.name, "dtype": {"float": "float32"}.get(kind, kind), "shape": shape}

    return {
        "inputs": [describe(value) for value in graph.input],
        "outputs": [describe(value) for value in graph.output],
    }


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
