"""TensorRT engines from ONNX models: TensorRT, and TensorRT-RTX, which builds them on machines without a GPU.

The Python interfaces of ``tensorrt`` and ``tensorrt_rtx`` are the same but for a few names, so there is one code for both.
A network is always strongly typed, the one kind that TensorRT 11 and TensorRT-RTX know: its precision is that of the
ONNX model, which :func:`with_precision` changes.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import cuda

from .errors import MissingPackageError, UnsupportedError, UserError
from .files import write_files

if TYPE_CHECKING:
    import onnx

__all__ = [
    "FLAVOURS",
    "PRECISIONS",
    "build_engine",
    "check_options",
    "default_flavour",
    "load_module",
    "shared_logger",
    "with_precision",
]

FLAVOURS = ("tensorrt", "tensorrt-rtx")
"""``tensorrt`` builds on, and for, the CUDA device that is there; ``tensorrt-rtx`` anywhere for RTX GPUs."""

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What an engine computes in; its inputs and outputs keep the types that they have in the ONNX model."""

# Import names, the first that is there: the wheels of TensorRT-RTX's parts come without the package that bundles them.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "tensorrt-rtx"}

_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

_LOG = logging.getLogger(__name__)


def load_module(flavour: str) -> ModuleType:
    """The Python module of TensorRT or TensorRT-RTX.

    Raises:
        UserError: there is no such flavour.
        MissingPackageError: it is not installed, or cannot be loaded; the message holds the pip command.
    """
    if flavour not in FLAVOURS:
        raise UserError(f"there is no TensorRT called {flavour!r}; expected one of {', '.join(FLAVOURS)}.")
    problem: ImportError | None = None
    for name in _MODULES[flavour]:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            problem = error
    raise MissingPackageError(
        f"{flavour} needs a package that is not installed: pip install 'fxmerge[{_EXTRAS[flavour]}]' ({problem})"
    ) from problem


@functools.cache
def shared_logger(module: ModuleType) -> Any:
    """The one logger to give to everything that TensorRT creates; its ``errors`` are the messages of errors so far.

    TensorRT has one logger for the whole process, whoever's came first, until all that was created with it is gone.
    Everything goes to Python's logging as well, as debugging: what matters is raised.

    Args:
        module: what :func:`load_module` returned.
    """

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]  # known only once it is loaded
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            _LOG.debug("%s: %s", severity.name, message)

    return Logger()


def default_flavour(compute_capability: str | None = None) -> str:
    """``tensorrt`` where it is installed and a CUDA device is there, else ``tensorrt-rtx``.

    Args:
        compute_capability: where one is named, the answer is ``tensorrt-rtx``: only that builds for other devices.

    Raises:
        MissingPackageError: neither is installed; the message holds the pip commands.
    """
    flavours = ["tensorrt"] if compute_capability is None and cuda.is_available() else []
    for flavour in [*flavours, "tensorrt-rtx"]:
        try:
            load_module(flavour)
        except MissingPackageError:
            continue
        return flavour
    raise MissingPackageError(
        "an engine needs TensorRT: pip install 'fxmerge[tensorrt-rtx]', which builds for RTX GPUs on any machine "
        "(Linux and Windows on x86-64), or on a machine with a CUDA device pip install 'fxmerge[gpu]'"
    )


def check_options(
    *,
    flavour: str,
    precision: str = "fp32",
    workspace: str | None = None,
    batches: tuple[int, int, int] | None = None,
    compute_capability: str | None = None,
) -> None:
    """Refuse options that :func:`build_engine` would refuse, before there is a model.

    Raises:
        UserError: an option is none of what it may be, the flavour does not have it, or ``tensorrt`` is asked
            for where there is no CUDA device.
        MissingPackageError: the flavour is not installed.

    Example:
        >>> check_options(flavour="tensorrt-rtx", precision="int8")
        Traceback (most recent call last):
        fxmerge.errors.UserError: precision is 'int8'; expected one of fp32, fp16, bf16.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if workspace is not None:
        _bytes(workspace)
    if batches is not None and not _ordered(batches):
        raise UserError(
            f"batches is {batches!r}; expected (smallest, usual, largest) batch size, three whole numbers, the first "
            "at least 1, such as (1, 8, 32)."
        )
    module = load_module(flavour)
    if flavour == "tensorrt-rtx":
        if compute_capability is not None:
            _capability(module, compute_capability)
        return
    if compute_capability is not None:
        raise UserError(
            f"tensorrt builds for the device that is there, not for compute capability {compute_capability}; "
            "tensorrt-rtx builds for any."
        )
    if not cuda.is_available():
        raise UserError("tensorrt builds on the device that the engine will run on, and torch finds no CUDA device.")


def build_engine(
    model: bytes,
    *,
    flavour: str,
    precision: str = "fp32",
    workspace: str | None = None,
    batches: tuple[int, int, int] | None = None,
    compute_capability: str | None = None,
    timing_cache: Path | None = None,
    detailed: bool = False,
) -> bytes:
    """Build a serialised engine from a serialised ONNX model.

    Args:
        model: float32 inside, or already in ``precision``, its weights in it. A batch axis that is dynamic is axis 0.
        flavour: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        precision: ``"fp32"`` (matrix products may use TF32, TensorRT's default), ``"fp16"`` or ``"bf16"``. The inputs
            and outputs of the engine have the types of the model's.
        workspace: most memory for temporary buffers of a layer, such as ``"2GiB"``; by default all that the device has.
        batches: smallest, usual and largest size of the dynamic batch axis; the engine is tuned for the usual one.
        compute_capability: of the GPU to build for, such as ``"8.9"``; ``tensorrt-rtx`` only. By default its engines run on
            all RTX GPUs from Ampere (8.0) on; for Turing name ``"7.5"``.
        timing_cache: a file with what TensorRT measured in earlier builds, updated after the build; ``tensorrt`` only. It is good
            for one TensorRT version and device; what is of no use to this one is replaced. The file appears whole or not at all.
        detailed: keep the names of the ONNX nodes in the engine's layers, for profiles.

    Returns:
        The engine: what ``Runtime.deserialize_cuda_engine`` of the same library version takes.

    Raises:
        UserError: as :func:`check_options`; or ``batches`` for a model with a fixed batch, or none for a dynamic one.
        MissingPackageError: the flavour is not installed.
        UnsupportedError: TensorRT cannot build the model, in TensorRT's words; or a weight is too large for fp16.
    """
    check_options(
        flavour=flavour,
        precision=precision,
        workspace=workspace,
        batches=batches,
        compute_capability=compute_capability,
    )
    if timing_cache is not None and flavour != "tensorrt":
        raise UserError(f"{flavour} has no timing cache: it times nothing while it builds.")
    module = load_module(flavour)
    # not an error recorder, which would be the builder's own: with TensorRT-RTX 1.7 one in Python ends the process
    logger = shared_logger(module)
    logger.errors.clear()
    builder = module.Builder(logger)
    network = _parse(module, flavour, builder, with_precision(model, precision))
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, _bytes(workspace))
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(module, compute_capability), 0)
    if detailed:
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    _set_batches(builder, network, config, batches)
    if timing_cache is not None:
        _read_timings(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnsupportedError(f"{flavour} cannot build this network: {'; '.join(logger.errors) or 'see its log'}")
    if timing_cache is not None:
        write_files({timing_cache: bytes(config.get_timing_cache().serialize())})
    return bytes(engine)


# --- options ----------------------------------------------------------------------------------------------------------


def _ordered(batches: Any) -> bool:
    if not (isinstance(batches, tuple) and len(batches) == 3 and all(type(size) is int for size in batches)):
        return False
    smallest, usual, largest = batches
    return bool(1 <= smallest <= usual <= largest)


def _bytes(size: Any) -> int:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_BYTES)})", size) if isinstance(size, str) else None
    amount = int(float(match[1]) * _BYTES[match[2]]) if match else 0
    if not amount:
        raise UserError(f"workspace is {size!r}; expected an amount of memory such as '512MiB' or '2GiB'.")
    return amount


def _capability(module: ModuleType, name: str) -> Any:
    """The member that a compute capability such as ``"8.9"`` names: ``SM89``."""
    known = {
        f"{member[2:-1]}.{member[-1]}": value
        for member, value in module.ComputeCapability.__members__.items()
        if re.fullmatch(r"SM\d+", member)
    }
    if name not in known:
        raise UserError(
            f"compute_capability is {name!r}; this version of TensorRT-RTX builds for {', '.join(known)}, and "
            "without one for all of them from 8.0 on."
        )
    return known[name]


# --- building ---------------------------------------------------------------------------------------------------------


def _parse(module: ModuleType, flavour: str, builder: Any, model: bytes) -> Any:
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, builder.logger)
    if not parser.parse(model):
        problems = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise UnsupportedError(f"{flavour} cannot read this network's ONNX model: {problems}")
    return network


def _set_batches(builder: Any, network: Any, config: Any, batches: tuple[int, int, int] | None) -> None:
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        shape = tuple(entry.shape)
        if -1 not in shape:
            continue
        dynamic = True
        if batches is None:
            raise UserError(f"input {entry.name!r} of the model takes any batch size: pass batches.")
        if -1 in shape[1:]:
            raise UnsupportedError(f"input {entry.name!r} is dynamic in more than its batch: {shape}.")
        profile.set_shape(entry.name, *((size, *shape[1:]) for size in batches))
    if dynamic:
        config.add_optimization_profile(profile)
    elif batches is not None:
        raise UserError(f"batches is {batches!r}, but the model's batch size is fixed.")


def _read_timings(config: Any, path: Path) -> None:
    """Attach the timings of a file; empty ones where it is not there, or is another version's or device's."""
    known = path.read_bytes() if path.exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


# --- precision --------------------------------------------------------------------------------------------------------


def with_precision(model: bytes, precision: str) -> bytes:
    """The same ONNX model with its float32 values in float16 or bfloat16.

    Every operator that ONNX defines for the shorter type runs in it; the others, and those that make a float out of
    something else, stay in float32, with casts around them. The model's inputs and outputs keep their types.

    Args:
        model: serialised.
        precision: ``"fp32"`` leaves the model as it is; ``"fp16"``, ``"bf16"``.

    Raises:
        UnsupportedError: a weight is too large for float16; or the model has control flow.
    """
    import onnx

    if precision == "fp32":
        return model
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    data: bytes = _Shorter(proto, precision).convert().SerializeToString()
    return data


class _Shorter:
    """Rewrites a model's graph. A float32 value ``v`` may exist as ``v``, as the shorter ``v.fp16``, or both.

    Each node takes its inputs in the form that it wants; where one does not exist in that form yet, a cast is added, or for a
    weight a converted copy: TensorRT takes some arguments only from weights.
    """

    def __init__(self, proto: onnx.ModelProto, precision: str) -> None:
        from onnx import TensorProto

        self.proto, self.precision, self.dtype = proto, precision, PRECISIONS[precision]
        self.float, self.short = TensorProto.FLOAT, TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        graph = proto.graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        values = [*graph.input, *graph.value_info, *graph.output]
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types.update((name, tensor.data_type) for name, tensor in self.weights.items())
        self.floats = {name for name, kind in types.items() if kind == self.float}
        self.there = {value.name for value in graph.input} | set(self.weights)
        self.nodes: list[onnx.NodeProto] = []

    def convert(self) -> onnx.ModelProto:
        graph = self.proto.graph
        for node in graph.node:
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise UnsupportedError(
                    f"node {node.name!r} ({node.op_type}) is control flow, which is built in fp32 only, "
                    f"not in {self.precision}."
                )
            self._node(node)
        for output in graph.output:
            self._form(output.name, shorter=False)
        del graph.node[:]
        graph.node.extend(self.nodes)
        # shapes of values that are gone, or have another type
        del graph.value_info[:]
        used = {name for node in self.nodes for name in node.input} | {output.name for output in graph.output}
        kept = [tensor for name, tensor in self.weights.items() if name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return self.proto

    def _node(self, node: onnx.NodeProto) -> None:
        """Append the node, in the shorter type where its operator has it."""
        inputs, outputs, allowed = self._types(node)
        short = set()
        for index, name in enumerate(node.input):
            if name in self.floats:
                shorter = inputs[index] in allowed
                short |= {inputs[index]} if shorter else set()
                node.input[index] = self._form(name, shorter=shorter)
        for index, name in enumerate(node.output):
            # an output has the type of the inputs that share its type variable
            if name in self.floats and outputs[index] in short:
                node.output[index] = self._short_name(name)
            self.there.add(node.output[index])
        self.nodes.append(node)

    def _types(self, node: onnx.NodeProto) -> tuple[list[str], list[str], set[str]]:
        """The type variables of the inputs and outputs, and those of them that may be the shorter type."""
        import onnx

        if node.op_type == "Cast":  # what it casts from is best left as it is
            return [""] * len(node.input), [""] * len(node.output), set()
        try:
            # The newest definition: TensorRT does not mind that bfloat16 came to convolutions only with opset 22.
            schema = onnx.defs.get_schema(node.op_type, domain=node.domain)
        except onnx.defs.SchemaError:
            return [""] * len(node.input), [""] * len(node.output), set()
        kind = "tensor(float16)" if self.precision == "fp16" else "tensor(bfloat16)"
        allowed = {each.type_param_str for each in schema.type_constraints if kind in each.allowed_type_strs}

        def variables(formal: Iterable[Any], count: int) -> list[str]:
            names = [each.type_str for each in formal]
            return names[:count] + names[-1:] * (count - len(names))

        return variables(schema.inputs, len(node.input)), variables(schema.outputs, len(node.output)), allowed

    def _short_name(self, name: str) -> str:
        return f"{name}.{self.precision}"

    def _form(self, name: str, *, shorter: bool) -> str:
        """The name of a value in the wanted form, which is made where it is not there."""
        from onnx import helper

        wanted, other = (self._short_name(name), name) if shorter else (name, self._short_name(name))
        if name not in self.floats or wanted in self.there:
            return wanted if name in self.floats else name
        self.there.add(wanted)
        if name in self.weights:
            self.weights[wanted] = self._shortened(self.weights[name], wanted)
        else:
            kind = self.short if shorter else self.float
            self.nodes.append(helper.make_node("Cast", [other], [wanted], name=f"{wanted}.cast", to=kind))
        return wanted

    def _shortened(self, weight: onnx.TensorProto, name: str) -> onnx.TensorProto:
        from onnx import helper, numpy_helper

        values = torch.from_numpy(numpy_helper.to_array(weight).copy())
        short = values.to(self.dtype)
        if not short.isfinite().eq(values.isfinite()).all():
            largest = float(values[values.isfinite()].abs().max())
            raise UnsupportedError(
                f"{weight.name!r} holds {largest:.3g}, more than {self.precision} can ({torch.finfo(self.dtype).max:.0f}): "
                "use bf16 or fp32."
            )
        data = short.view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, self.short, list(weight.dims), data, raw=True)
