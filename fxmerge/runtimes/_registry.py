"""Runtimes by name: fxmerge's own, and those of other packages."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxmerge.algebra import Geometry
from fxmerge.errors import UserError

from ._base import LayerSignature, Runtime
from ._precision import PRECISIONS

__all__ = ["get_runtime", "prove", "runtime_names"]

_GROUP = "fxmerge.runtimes"
# pyproject.toml lists the same; here they are found in a source checkout too, and no other package can take their names.
_OWN = {
    "tensorrt": "fxmerge.runtimes.tensorrt:TensorRT",
    "tensorrt-rtx": "fxmerge.runtimes.tensorrt:TensorRTRTX",
    "onnxruntime-tensorrt": "fxmerge.runtimes.onnxruntime_cuda:OnnxRuntimeTensorrt",
    "onnxruntime-cuda": "fxmerge.runtimes.onnxruntime_cuda:OnnxRuntimeCuda",
    "onnxruntime": "fxmerge.runtimes.onnxruntime:OnnxRuntime",
    "torch": "fxmerge.runtimes.torch:TorchRuntime",
    "macs": "fxmerge.runtimes.macs:Macs",
}
_AUTO = ("tensorrt", "onnxruntime-cuda", "onnxruntime")
_TINY = LayerSignature(Geometry(4, 4, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 1), (8, 8), 1, "ReLU")
_log = logging.getLogger("fxmerge")


def runtime_names() -> list[str]:
    """What :func:`get_runtime` knows, ``"auto"`` left out: fxmerge's own, then those of other packages.

    Example:
        >>> runtime_names()[-2:]
        ['torch', 'macs']
    """
    return list(_entry_points())


def get_runtime(spec: str | Runtime) -> Runtime:
    """The runtime of that name; a :class:`Runtime` object is returned as it is.

    Other packages add runtimes through the entry-point group ``fxmerge.runtimes``: a name, and a callable that takes the
    options as keyword arguments and returns a :class:`Runtime`.

    Args:
        spec: - a name: ``"onnxruntime"`` (this machine's CPU), ``"onnxruntime-cuda"``, ``"onnxruntime-tensorrt"``,
              ``"tensorrt"``, ``"tensorrt-rtx"``, ``"torch"``, ``"macs"`` (counted, not measured), or another package's;
            - a name and options, ``name:option,...``: an option is ``key=value``, a switch (``"torch:compile"``), or a
              precision (``"tensorrt:fp16"``);
            - ``"auto"``: the first of tensorrt, onnxruntime-cuda and onnxruntime that :func:`prove` finds working; it is looked
              for once in a process;
            - an object of your own.

    Raises:
        UserError: no runtime has that name, it does not take an option, or it cannot run here.
        MissingPackageError: its package is not installed.

    Example:
        >>> get_runtime("macs").unit
        'MACs'
        >>> get_runtime("torch:threads=1,bf16,device=cpu")
        TorchRuntime(compile=False, device='cpu', threads=1, precision='bfloat16')
    """
    if isinstance(spec, Runtime):
        return spec
    if spec == "auto":
        return _create(_own(_first_working()))
    entries = _entry_points()
    name, colon, options = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name not in entries:
        known = ", ".join(repr(name) for name in ("auto", *entries))
        raise UserError(f"unknown runtime {spec!r}; expected one of {known}, or a Runtime object.")
    return _create(entries[name], options.split(",") if colon else [])


def prove(runtime: Runtime) -> None:
    """Measure one small layer; returns if that works.

    Raises:
        UserError: the runtime found no latency.
        Exception: whatever its packages or its driver raise.

    Example:
        >>> prove(get_runtime("macs"))
    """
    found = []
    runtime.measure([_TINY], lambda _, latency: found.append(latency))
    if len(found) != 1 or not found[0] >= 0:
        raise UserError(f"runtime {runtime.name!r} returned {found} for one small layer; expected one latency.")


@functools.cache
def _first_working() -> str:
    for name in _AUTO:
        try:
            prove(_create(_own(name)))
        except Exception as error:
            _log.info("runtime %r does not work here: %s", name, error)
            if name == _AUTO[-1]:
                raise
        else:
            _log.info("runtime %r works and is used", name)
            break
    return name


def _create(entry: EntryPoint, options: Sequence[str] = ()) -> Runtime:
    try:
        factory: Callable[..., Any] = entry.load()
    except Exception as error:
        package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
        raise UserError(
            f"runtime {entry.name!r} cannot be loaded from {entry.value}{package}: {type(error).__name__}: {error}"
        ) from error
    runtime = factory(**_keywords(entry.name, factory, options))
    if not isinstance(runtime, Runtime):
        raise UserError(f"runtime {entry.name!r}: {entry.value} returned {runtime!r}, which is no Runtime.")
    return runtime


def _keywords(name: str, factory: Callable[..., Any], options: Sequence[str]) -> dict[str, Any]:
    """The options as the factory's arguments; a switch is one that is False by default."""
    parameters = inspect.signature(factory).parameters
    keywords: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        switch = key in parameters and parameters[key].default is False
        if not equals and key in PRECISIONS and "precision" in parameters:
            keywords["precision"] = key
        elif key in parameters and switch != bool(equals):
            keywords[key] = True if switch else int(value) if value.isdecimal() else value
        else:
            known = [key if each.default is False else f"{key}=..." for key, each in parameters.items()]
            known += PRECISIONS if "precision" in parameters else []
            expected = f"expected one of {', '.join(known)}" if known else "it takes none"
            raise UserError(f"runtime {name!r} has no option {option!r}; {expected}.")
    return keywords


def _own(name: str) -> EntryPoint:
    return EntryPoint(name, _OWN[name], _GROUP)


def _entry_points() -> dict[str, EntryPoint]:
    found = {name: _own(name) for name in _OWN}
    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.value):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            _log.warning("two runtimes are called %r: %s is used, %s is not", entry.name, first.value, entry.value)
    return found
