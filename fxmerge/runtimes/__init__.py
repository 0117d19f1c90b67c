"""Runtimes: where a compressed network will run, and how its latency is found."""

from __future__ import annotations

from collections.abc import Callable

from fxmerge.errors import UserError

from ._base import LayerSignature, Runtime, Timing, interleave

__all__ = ["LayerSignature", "Runtime", "Timing", "get_runtime", "interleave"]


def _onnxruntime() -> Runtime:
    from .onnxruntime import OnnxRuntime

    return OnnxRuntime()


def _macs() -> Runtime:
    from .macs import Macs

    return Macs()


_FACTORIES: dict[str, Callable[[], Runtime]] = {
    "auto": _onnxruntime,
    "onnxruntime": _onnxruntime,
    "macs": _macs,
}


def get_runtime(spec: str | Runtime) -> Runtime:
    """The runtime of that name; a :class:`Runtime` object is returned as it is.

    Args:
        spec: ``"onnxruntime"`` (milliseconds on this machine's CPU), ``"macs"`` (counted, not measured),
            ``"auto"`` (``"onnxruntime"``), or an object of your own.

    Raises:
        UserError: no runtime has that name.
        MissingPackageError: its package is not installed.

    Example:
        >>> get_runtime("macs").unit
        'MACs'
    """
    if isinstance(spec, Runtime):
        return spec
    if not isinstance(spec, str) or spec not in _FACTORIES:
        known = ", ".join(repr(name) for name in _FACTORIES)
        raise UserError(f"unknown runtime {spec!r}; expected one of {known}, or a Runtime object.")
    return _FACTORIES[spec]()
