"""Save a canonical graph as plain data; load it without the user's model code and without pickle.

A folder holds ``graph.json`` (nodes, module classes with constructor arguments, the pytree
signature, tags), ``weights.safetensors`` (every tensor once) and any further JSON documents.
Loading constructs only the ``torch.nn`` classes and calls only the functions listed here, and
checks every name that reaches generated code: a folder from a stranger is refused at worst.

Arguments are JSON where JSON has them (null, booleans, numbers, strings, lists). All else is an
object with one key that says what it is: ``{"node": name}``, ``{"tuple": [...]}``, ``{"dict":
{...}}``, ``{"slice": [...]}``, ``{"float": "inf"}``, ``{"device": "cpu"}`` and ``{"torch":
"float32"}`` (a dtype, layout or memory format).
"""

from __future__ import annotations

import inspect
import json
import keyword
import math
import operator
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from .errors import StoreError, UnsupportedError, UserError
from .graph import CanonicalGraph

__all__ = ["graph_from_json", "graph_to_json", "load_documents", "load_graph", "save_graph", "state_tensors"]

_FAMILY = "fxmerge.graph/"
_FORMAT = f"{_FAMILY}1"
_GRAPH = "graph.json"
_WEIGHTS = "weights.safetensors"
_META = "fxmerge"

_PER_DIMENSION = """
    Conv ConvTranspose BatchNorm InstanceNorm Dropout MaxPool AvgPool LPPool AdaptiveAvgPool
    AdaptiveMaxPool MaxUnpool ZeroPad ConstantPad ReflectionPad ReplicationPad CircularPad
"""
_OTHERS = """
    GroupNorm LayerNorm RMSNorm LocalResponseNorm Dropout AlphaDropout FeatureAlphaDropout CELU ELU
    GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish PReLU
    ReLU ReLU6 RReLU SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh
    Tanhshrink Threshold Linear Bilinear Identity Flatten Unflatten Fold Unfold ChannelShuffle
    PixelShuffle PixelUnshuffle Upsample UpsamplingBilinear2d UpsamplingNearest2d
"""
_MODULES: dict[str, type[nn.Module]] = {
    name: getattr(nn, name)
    for name in (*(f"{n}{d}d" for n in _PER_DIMENSION.split() for d in (1, 2, 3)), *_OTHERS.split())
}

_OPERATORS = """
    abs add and_ eq floordiv ge getitem gt is_ le lt mod mul ne neg not_ or_ pos pow sub truediv xor
"""
_SYMBOLIC = "_assert sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{place}.{name}": getattr(module, name)
    for place, module, names in (
        ("operator", operator, _OPERATORS),
        ("math", math, "ceil floor trunc"),
        ("torch", torch, _SYMBOLIC),
        ("torch.nn.functional", nn.functional, "pad"),
    )
    for name in names.split()
}
_ATEN = re.compile(r"aten\.(\w+)\.(\w+)")

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def graph_to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """Describe a canonical graph, weights left out, as data that ``json`` can write.

    Kept are: nodes with names, order, targets and arguments; module classes, constructor arguments
    and training flags; which path holds which parameter, buffer or constant (shape, dtype, device,
    ``requires_grad``, what is shared); the pytree signature; ``meta["fxmerge"]`` of the nodes and
    of the graph module. Input and output containers of a class that neither Python nor torch
    brings along become plain: a dict where the class names its children, else a tuple.

    Raises:
        UnsupportedError: something that could not be loaded back, named by node or module.

    Example:
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        >>> [node["name"] for node in graph_to_json(gm)["nodes"]]
        ['input_1', '_0', '_1', 'output']
    """
    description = {
        "format": _FORMAT,
        "torch": str(torch.__version__),
        "name": type(gm).__name__,
        "signature": _signature_to_json(gm),
        "nodes": [_node_to_json(node) for node in gm.graph.nodes],
        "modules": _modules_to_json(gm),
        "state": _state(gm)[0],
    }
    if _META in gm.meta:
        description["meta"] = _encode(gm.meta[_META], "the meta of the graph")
    return description


def graph_from_json(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device | str | None = None
) -> fx.GraphModule:
    """Build the graph that :func:`graph_to_json` described, over these very tensors.

    Args:
        description: of the graph.
        tensors: as :func:`state_tensors` returns them, on the device where they are to be.
        device: what all devices written in the graph become; by default what they were.

    Raises:
        StoreError: the description is damaged, or names a class or function outside fxmerge's list.
    """
    with _reading("a graph that was sent"):
        return _rebuild(dict(description), tensors, None if device is None else torch.device(device))


def state_tensors(gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Collect the tensors of a graph: parameters, buffers (persistent or not) and constants.

    Returns:
        The tensors by the first path that holds them, detached but not copied; and where else they
        are: path → path of the stored tensor. Shared are one object under several paths, and
        several objects over the same memory.

    Raises:
        UnsupportedError: a tensor without plain values (meta, sparse, quantised, a subclass).
    """
    entries, tensors = _state(gm)
    stored: dict[str, str] = {}
    for entry in entries:
        same = entry.get("same_as")
        stored[entry["path"]] = entry["tensor"] if same is None else stored[same]
    return tensors, {path: name for path, name in stored.items() if path != name}


def save_graph(gm: fx.GraphModule, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a canonical graph into a folder, complete or not at all.

    A folder written by :func:`save_graph` before is replaced at once; other files in it stay.
    Before anything is written the graph is rebuilt from its description and compared.

    Args:
        gm: the graph, on any device.
        folder: created, parents included, when missing.
        extra: further JSON documents by bare name: ``{"plan": ...}`` is written as ``plan.json``.

    Raises:
        UnsupportedError: something that could not be loaded back, named by node or module.
        UserError: a document's name is not a lower-case identifier, or its content is not JSON (NaN
            and infinity are not).
        StoreError: the folder is not empty and not fxmerge's, or cannot be written; it is left as
            it was.

    Example:
        >>> import tempfile
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_graph(gm, f"{place}/net", extra={"plan": {"steps": []}})
        ...     sorted(path.name for path in Path(place, "net").iterdir())
        ['graph.json', 'plan.json', 'weights.safetensors']
    """
    folder = Path(folder).resolve()
    extra = extra or {}
    files = {f"{name}.json": _document_text(name, value) for name, value in extra.items()}
    description = graph_to_json(gm)
    tensors, _ = state_tensors(gm)
    _refuse_unloadable(description, tensors)
    description["documents"] = list(extra)
    files[_GRAPH] = _layout(description)
    try:
        others = _other_files(folder, {_WEIGHTS, *files})
        folder.parent.mkdir(parents=True, exist_ok=True)
        _replace_folder(folder, files, tensors, others)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error}") from error


def load_graph(folder: str | Path, *, device: torch.device | str | None = None) -> fx.GraphModule:
    """Read a graph that :func:`save_graph` wrote; the model's own code is not needed.

    It computes, trains and copies as the saved one did: same node names, ``state_dict`` keys,
    shared parameters, training flags, dtypes and memory formats. No random numbers are drawn.

    Args:
        folder: what was given to :func:`save_graph`.
        device: where all tensors go, and what all devices written in the graph become; by default
            what they were when saved.

    Raises:
        StoreError: the folder is missing, damaged or of another format, names a class or function
            outside fxmerge's list, or needs a device that this machine lacks. The message names the
            file, and the node or module.
    """
    folder = Path(folder)
    description = _read_description(folder)
    with _reading(folder / _WEIGHTS):
        values = load_file(folder / _WEIGHTS)
    with _reading(folder / _GRAPH):
        target = None if device is None else torch.device(device)
        tensors = _place_tensors(description["state"], values, folder / _WEIGHTS, target)
        return _rebuild(description, tensors, target)


def load_documents(folder: str | Path) -> dict[str, Any]:
    """Read the further documents of a saved folder: what :func:`save_graph` was given as ``extra``.

    Tuples come back as lists.

    Raises:
        StoreError: the folder is missing, damaged or foreign, or lacks one of its documents.
    """
    folder = Path(folder)
    description = _read_description(folder)
    with _reading(folder / _GRAPH):
        names = [_checked_document_name(name) for name in description["documents"]]
    return {name: _read_json(folder / f"{name}.json") for name in names}


# --- arguments -----------------------------------------------------------------------------------


def _encode(value: Any, where: str) -> Any:
    """A Python value as JSON; ``where`` is its place, for the message."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(item, where) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [_encode(item, where) for item in value]}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: _encode(item, where) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(item, where) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    raise UnsupportedError(
        f"{where} holds {value!r} of type {type(value).__name__}, which cannot be saved. Numbers, "
        "strings, nodes, dtypes, devices, and lists, tuples, slices and string-keyed dicts of "
        "them can."
    )


def _decode(value: Any, nodes: Mapping[str, fx.Node], device: torch.device | None) -> Any:
    """The inverse of :func:`_encode`; ``device`` takes the place of every device written."""
    if isinstance(value, list):
        return [_decode(item, nodes, device) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        if content not in nodes:
            raise StoreError(f"reads node {content!r}, which does not come before it")
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(content, nodes, device))
    if kind == "dict":
        return {key: _decode(item, nodes, device) for key, item in content.items()}
    if kind == "slice":
        return slice(*_decode(content, nodes, device))
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content) if device is None else device
    constant = getattr(torch, content, None) if kind == "torch" else None
    if not isinstance(constant, torch.dtype | torch.layout | torch.memory_format):
        raise StoreError(f"holds an unknown value {value!r}")
    return constant


# --- nodes and their targets ---------------------------------------------------------------------


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    where = f"node {node.name!r}"
    entry = {
        "op": node.op,
        "name": node.name,
        "target": _target_to_json(node),
        "args": _encode(node.args, where)["tuple"],
    }
    if node.kwargs:
        entry["kwargs"] = _encode(node.kwargs, where)["dict"]
    if _META in node.meta:
        entry["meta"] = _encode(node.meta[_META], f"the meta of {where}")
    return entry


def _target_to_json(node: fx.Node) -> str:
    target = node.target
    if node.op == "call_method":
        raise UnsupportedError(
            f"node {node.name!r} calls the method {target!r}, which cannot be saved: use the aten operator"
        )
    if node.op != "call_function":
        return str(target)
    is_overload = isinstance(target, torch._ops.OpOverload)
    name = str(target) if is_overload else next((n for n, f in _FUNCTIONS.items() if f is target), "")
    if _function(name) is not target:
        raise UnsupportedError(
            f"node {node.name!r} calls {target!r}, which cannot be saved. Overloads of aten "
            f"operators can, and {', '.join(sorted(_FUNCTIONS))}."
        )
    return name


def _function(name: str) -> Callable[..., Any] | None:
    """The allow-listed function of that name, None for any other name."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    match = _ATEN.fullmatch(name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    overload = getattr(packet, match[2], None) if match else None
    if not isinstance(overload, torch._ops.OpOverload):
        return None
    # aten holds operators that open files, too (from_file, save): their schemas show it.
    opens_file = any(argument.name == "filename" for argument in overload._schema.arguments)
    return None if opens_file else overload


def _node_from_json(
    graph: fx.Graph,
    entry: dict[str, Any],
    paths: Mapping[str, set[str]],
    nodes: Mapping[str, fx.Node],
    device: torch.device | None,
) -> fx.Node:
    """Append one node. Its names become source code, so each is checked for what it may be."""
    op, target = entry["op"], entry["target"]
    if op in paths:
        if target not in paths[op]:
            raise StoreError(f"{op} finds nothing at its target {target!r}")
    elif op == "call_function":
        function = _function(target)
        if function is None:
            raise StoreError(f"target {target!r} is not a function that fxmerge loads")
        target = function
    elif op == "placeholder":
        _checked_name(target.lstrip("*"))
    elif op != "output":
        raise StoreError(f"{op!r} is not an operation that fxmerge loads")
    args = _decode({"tuple": entry["args"]}, nodes, device)
    kwargs = {_checked_name(key): _decode(item, nodes, device) for key, item in entry.get("kwargs", {}).items()}
    node = graph.create_node(op, target, args, kwargs, name=_checked_name(entry["name"]))
    if node.name != entry["name"]:
        raise StoreError("its name is taken or reserved")
    return node


def _checked_name(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise StoreError(f"{name!r} is not a Python name")
    return name


def _checked_path(path: str) -> str:
    """Paths become ``self.a.b`` or ``getattr(self.a, "0")``: nothing in one may end the quotes."""
    parts = path.split(".")
    if not all(part.isprintable() and part and not set('"\\') & set(part) for part in parts):
        raise StoreError(f"{path!r} is not a path of modules")
    return path


# --- modules -------------------------------------------------------------------------------------


def _walk(gm: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """All modules as (path, module, first path of that module), entering each only once."""
    first: dict[int, str] = {}

    def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
        known = id(module) in first
        yield path, module, first.setdefault(id(module), path)
        for name, child in () if known else module._modules.items():
            if child is not None:
                yield from visit(_join(path, name), child)

    return visit("", gm)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _modules_to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """Called modules with class and arguments; the others only hold things: any class does."""
    calls = gm.graph.find_nodes(op="call_module")
    called = {id(gm.get_submodule(str(node.target))) for node in calls}
    modules: dict[str, Any] = {}
    for path, module, first in _walk(gm):
        if path != first:
            modules[path] = {"same_as": first}
            continue
        modules[path] = {"training": module.training}
        if id(module) in called or not path:
            _refuse_hooks(module, path)
        if id(module) in called:
            arguments = _encode(_constructor_arguments(module, path), f"module {path!r}")["dict"]
            modules[path] |= {"class": type(module).__name__, "arguments": arguments}
    return modules


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
        raise UnsupportedError(f"module {path!r} has hooks or a replaced forward, which cannot be saved: remove them")


def _constructor_arguments(module: nn.Module, path: str) -> dict[str, Any]:
    """The arguments that construct this module anew, read from its attributes of the same names."""
    cls = type(module)
    if _MODULES.get(cls.__name__) is not cls:
        raise UnsupportedError(
            f"module {path!r} is a {cls.__module__}.{cls.__qualname__}, which cannot be saved: "
            "only layers of torch.nn can. Capture the model so that its forward is traced."
        )
    arguments = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name in ("self", "device", "dtype") or variadic:
            continue
        if name == "bias":
            # Norms have this argument in recent torch only: written where it says something.
            if module.bias is None and getattr(module, "affine", True):
                arguments[name] = False
        elif hasattr(module, name):
            arguments[name] = getattr(module, name)
    with torch.device("meta"):
        rebuilt = cls(**arguments)
    for name in vars(rebuilt).keys() - _MODULE_INTERNALS:
        if getattr(module, name, inspect.Parameter.empty) != getattr(rebuilt, name):
            raise UnsupportedError(
                f"module {path!r}: its attribute {name!r} does not follow from the arguments of "
                f"{cls.__name__}, so it cannot be saved. Construct the module with the values that "
                "it should have instead of setting them afterwards."
            )
    return arguments


def _module_from_json(entry: dict[str, Any]) -> nn.Module:
    if "class" not in entry:
        return nn.Module()
    name = entry["class"]
    if name not in _MODULES:
        raise StoreError(f"class {name!r} is not one that fxmerge loads")
    with torch.device("meta"):  # the weights are replaced: no memory, no random numbers for them
        return _MODULES[name](**_decode({"dict": entry["arguments"]}, {}, None))


# --- tensors -------------------------------------------------------------------------------------


def _state(gm: fx.GraphModule) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The entries of graph.json's ``state``, and the tensors to store, by name."""
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    objects: dict[int, str] = {}
    memory: dict[Any, str] = {}
    for path, kind, tensor in _tensors_of(gm):
        entry: dict[str, Any] = {"path": path, "kind": kind}
        entries.append(entry)
        if id(tensor) in objects:
            entry["same_as"] = objects[id(tensor)]
            continue
        _refuse_special_tensor(path, tensor)
        objects[id(tensor)] = path
        layout = (tensor.dtype, tensor.shape, tensor.stride())
        place = (tensor.device, tensor.data_ptr(), *layout) if tensor.numel() else path
        name = memory.setdefault(place, path)
        tensors.setdefault(name, tensor.detach())
        entry |= {
            "tensor": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "device": str(tensor.device),
            "requires_grad": tensor.requires_grad,
        }
        stride = torch.empty_like(tensor, device="meta").stride()
        if stride != torch.empty(tensor.shape, device="meta").stride():
            entry["stride"] = list(stride)
    return entries, tensors


def _tensors_of(gm: fx.GraphModule) -> Iterator[tuple[str, str, Tensor]]:
    """All tensors of a graph module as (path, kind, tensor)."""
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for path, module, first in _walk(gm):
        if path != first:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _join(path, name), "parameter", parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                passing = name in module._non_persistent_buffers_set
                yield _join(path, name), "non-persistent buffer" if passing else "buffer", buffer
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and _join(path, name) in read:
                yield _join(path, name), "constant", value


def _refuse_special_tensor(path: str, tensor: Tensor) -> None:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_complex():
        raise UnsupportedError(
            f"tensor {path!r} is a {type(tensor).__name__} ({tensor.layout}, {tensor.dtype}), "
            "which cannot be saved: only plain, dense, real tensors can"
        )
    if tensor.is_meta:
        raise UnsupportedError(f"tensor {path!r} is on the meta device: it has no values to save")


def _place_tensors(
    entries: list[dict[str, Any]],
    values: Mapping[str, Tensor],
    file: Path,
    device: torch.device | None,
) -> dict[str, Tensor]:
    """Own copies of the loaded tensors, with the strides and on the devices that they had."""
    wanted = {entry["path"]: entry for entry in entries if entry.get("tensor") == entry["path"]}
    if wanted.keys() != values.keys():
        name = min(wanted.keys() ^ values.keys())
        raise StoreError(f"tensor {name!r} is only in one of this file and {file}")
    tensors = {}
    for name, entry in wanted.items():
        value = values[name]
        expected = f"torch.{entry['dtype']} {entry['shape']}"
        found = f"{value.dtype} {list(value.shape)}"
        if found != expected:
            raise StoreError(f"tensor {name!r} should be {expected}, but in {file} it is {found}")
        stride = entry.get("stride", value.stride())
        reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, stride, strict=True))
        if reach > max(value.numel(), 1):
            raise StoreError(f"tensor {name!r} cannot have the strides {stride}")
        place = torch.device(entry["device"]) if device is None else device
        try:
            empty = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=place)
        except (RuntimeError, AssertionError) as error:
            raise StoreError(
                f"tensor {name!r} was saved on {place}, which this machine lacks ({error}): load with device='cpu'"
            ) from error
        tensors[name] = empty.copy_(value)
    return tensors


def _attach_tensors(gm: nn.Module, entries: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    objects: dict[str, Tensor] = {}
    for entry in entries:
        path, kind = _checked_path(entry["path"]), entry["kind"]
        parent_path, _, name = path.rpartition(".")
        parent = gm.get_submodule(parent_path)
        if "same_as" in entry:
            tensor = objects[entry["same_as"]]
        else:
            stored = tensors[entry["tensor"]]
            parameter = kind == "parameter"
            tensor = nn.Parameter(stored, requires_grad=False) if parameter else stored.detach()
            tensor.requires_grad_(entry["requires_grad"])
        objects[path] = tensor
        if kind == "parameter":
            parent.register_parameter(name, tensor)  # type: ignore[arg-type] # torch checks it
        elif kind in ("buffer", "non-persistent buffer"):
            parent.register_buffer(name, tensor, persistent=kind == "buffer")
        elif kind == "constant" and not hasattr(parent, name):
            setattr(parent, name, tensor)
        else:
            raise StoreError(f"tensor {path!r} cannot be attached as {kind!r}")


# --- the signature -------------------------------------------------------------------------------


def _signature_to_json(gm: fx.GraphModule) -> dict[str, Any] | None:
    codegen = gm.graph._codegen
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise UnsupportedError(
            f"a graph with the signature class {type(codegen).__name__} cannot be saved: capture the model anew"
        )
    info = codegen.pytree_info
    return {
        "arguments": list(info.orig_args),
        "inputs": _spec_to_json(info.in_spec),
        "outputs": None if info.out_spec is None else _spec_to_json(info.out_spec),
    }


def _signature_from_json(entry: dict[str, Any]) -> _PyTreeCodeGen:
    arguments = [_checked_name(name) for name in entry["arguments"]]
    inputs = pytree.tree_structure(_spec_from_json(entry["inputs"]))
    if not inputs.is_leaf():
        for keywords in inputs.children()[1:]:  # (positional, keyword): the latter's keys are code
            for name in keywords.context if keywords.type is dict else ():
                _checked_name(name)
    outputs = entry["outputs"]
    spec = None if outputs is None else pytree.tree_structure(_spec_from_json(outputs))
    return _PyTreeCodeGen(_PyTreeInfo(arguments, inputs, spec))


def _spec_to_json(spec: pytree.TreeSpec) -> Any:
    """A pytree's structure: ``"*"`` for a leaf, else an object with the container's name.

    That holds the children, for mappings as pairs of key and child.
    """
    if spec.is_leaf():
        return "*"
    children = [_spec_to_json(child) for child in spec.children()]
    names = _child_names(spec)
    if names is not None:
        kind = "OrderedDict" if spec.type is OrderedDict else "dict"
        return {kind: [list(pair) for pair in zip(names, children, strict=True)]}
    return {"list" if _is_subclass(spec.type, list) else "tuple": children}


def _child_names(spec: pytree.TreeSpec) -> list[str | int] | None:
    """The keys of a mapping or the field names of a dataclass; None for a sequence.

    Mappings keep their keys as the context; ``defaultdict`` and the dataclasses of ``torch.export``
    keep them inside it.
    """
    if not isinstance(spec.context, list | tuple):
        return None
    for names in (spec.context, *spec.context):
        fits = isinstance(names, list | tuple) and len(names) == spec.num_children
        if fits and all(type(name) in (str, int) for name in names):
            return list(names)
    if _is_subclass(spec.type, dict):
        raise UnsupportedError(f"an input or output dict with the keys {spec.context!r} cannot be saved: use strings")
    return None


def _is_subclass(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _spec_from_json(entry: Any) -> Any:
    """A container of that structure, with zeros for leaves."""
    if entry == "*":
        return 0
    ((kind, children),) = entry.items()
    if kind in ("list", "tuple"):
        items = [_spec_from_json(child) for child in children]
        return items if kind == "list" else tuple(items)
    pairs = [(key, _spec_from_json(child)) for key, child in children]
    if kind not in ("dict", "OrderedDict") or not all(type(k) in (str, int) for k, _ in pairs):
        raise StoreError(f"the signature holds an unknown container {kind!r}")
    return dict(pairs) if kind == "dict" else OrderedDict(pairs)


# --- the whole graph -----------------------------------------------------------------------------


def _rebuild(
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device | None = None,
) -> fx.GraphModule:
    """The graph module of a description, over these very tensors."""
    entries = description["modules"]
    gm = CanonicalGraph(nn.Module(), fx.Graph(), _checked_name(description["name"]))
    for path, entry in entries.items():
        with _reading(f"module {path!r}"):
            if path:
                parent, _, name = _checked_path(path).rpartition(".")
                same = entry.get("same_as")
                module = _module_from_json(entry) if same is None else gm.get_submodule(same)
                gm.get_submodule(parent).add_module(name, module)
    _attach_tensors(gm, description["state"], tensors)
    stored = {entry["path"] for entry in description["state"]}
    for path, _, _ in _tensors_of(gm):
        if path not in stored:
            raise StoreError(f"tensor {path!r} has no values")
    gm.graph = _graph_from_json(description, device)
    for path, entry in entries.items():
        if "training" in entry:
            gm.get_submodule(path).training = bool(entry["training"])
    if "meta" in description:
        gm.meta[_META] = _decode(description["meta"], {}, device)
    return gm


def _graph_from_json(description: dict[str, Any], device: torch.device | None) -> fx.Graph:
    paths = {
        "call_module": {p for p, e in description["modules"].items() if e.keys() & {"class", "same_as"}},
        "get_attr": {entry["path"] for entry in description["state"]},
    }
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in description["nodes"]:
        with _reading(f"node {entry['name']!r}"):
            node = _node_from_json(graph, entry, paths, nodes, device)
            nodes[node.name] = node
            if "meta" in entry:
                node.meta[_META] = _decode(entry["meta"], nodes, device)
    if description["signature"] is not None:
        codegen = _signature_from_json(description["signature"])
        inputs = len(graph.find_nodes(op="placeholder"))
        leaves = codegen.pytree_info.in_spec.num_leaves
        if inputs != leaves:
            raise StoreError(f"the signature has {leaves} inputs, the graph {inputs}")
        graph.set_codegen(codegen)
    graph.lint()
    return graph


def _refuse_unloadable(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Rebuild before writing, so that what a folder holds is known to load."""
    try:
        again = graph_to_json(_rebuild(description, tensors))
    except StoreError as error:
        raise UnsupportedError(f"this graph cannot be saved: {error}") from error
    for key, before in description.items():
        after = again[key]
        if before != after:
            if isinstance(before, list):
                pairs = zip(before, after, strict=False)
                before, after = next((pair for pair in pairs if pair[0] != pair[1]), (before, after))
            raise UnsupportedError(f"this graph cannot be saved: in its {key}, {before!r} would come back as {after!r}")


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def _reading(place: str | Path) -> Iterator[None]:
    """Whatever goes wrong with foreign data is a StoreError that says where."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{place}: {error}") from error
    except FileNotFoundError as error:
        raise StoreError(f"{place}: no such file; expected one that fxmerge saved") from error
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError),
        *(SafetensorError, SyntaxError, TypeError, ValueError),
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{place}: damaged or not written by fxmerge ({reason})") from error


def _read_json(path: Path) -> Any:
    with _reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _read_description(folder: Path) -> dict[str, Any]:
    description = _read_json(folder / _GRAPH)
    found = description.get("format") if isinstance(description, dict) else None
    if found != _FORMAT:
        raise StoreError(f"{folder / _GRAPH}: its format is {found!r}; this version of fxmerge reads {_FORMAT!r}")
    return dict(description)


def _checked_document_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or f"{name}.json" == _GRAPH:
        raise UserError(f"{name!r} cannot name a document: use a lower-case identifier other than 'graph'")
    return name


def _document_text(name: str, value: Any) -> str:
    _checked_document_name(name)
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"document {name!r} is not JSON: {error}") from error


def _layout(description: Mapping[str, Any]) -> str:
    """JSON with one line for each node, module and tensor, for people to read and compare."""
    lines = []
    for key, value in description.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        elif key == "modules":
            entries = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            text = "{\n  " + ",\n  ".join(entries) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _other_files(folder: Path, files: set[str]) -> list[str]:
    """What a folder to be replaced holds that is not fxmerge's; a foreign folder is refused."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file; expected a folder to save into")
    names = {path.name for path in folder.iterdir()}
    if not names:
        return []
    try:
        old = _read_json(folder / _GRAPH)
        ours = {_GRAPH, _WEIGHTS, *(f"{name}.json" for name in old["documents"])}
        known = old["format"].startswith(_FAMILY)
    except (StoreError, AttributeError, LookupError, TypeError):
        known = False
    if not known:
        raise StoreError(f"{folder} is not empty and was not written by fxmerge: save into another folder")
    for name in sorted((names - ours) & files):
        raise StoreError(f"{folder / name} was not written by fxmerge and would be overwritten: move it away")
    return sorted(names - ours)


def _replace_folder(folder: Path, files: Mapping[str, str], tensors: Mapping[str, Tensor], others: list[str]) -> None:
    """Write everything beside the folder, then exchange the two and move ``others`` over."""
    mark = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{kind}-{mark}") for kind in ("new", "old"))
    try:
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        save_file(_disjoint(tensors), new / _WEIGHTS, {"format": _FORMAT})
        for path in new.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            new.rename(folder)
            return
        shutil.copymode(folder, new)
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for name in others:
        (old / name).rename(folder / name)
    shutil.rmtree(old)


def _disjoint(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without gaps and overlaps, as safetensors wants them, copied where need be."""
    seen: set[tuple[torch.device, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        dense = tensor.contiguous()
        result[name] = dense.clone() if storage in seen and dense is tensor else dense
        seen.add(storage)
    return result
