"""Runtimes: where a compressed network will run, and how its latency is found."""

from __future__ import annotations

from ._base import (
    LayerSignature,
    OpSignature,
    Profile,
    ProfilingRuntime,
    Runtime,
    Signature,
    Timing,
    interleave,
    signature_from_key,
)
from ._registry import get_runtime, prove, runtime_names

__all__ = [
    "LayerSignature",
    "OpSignature",
    "Profile",
    "ProfilingRuntime",
    "Runtime",
    "Signature",
    "Timing",
    "get_runtime",
    "interleave",
    "prove",
    "runtime_names",
    "signature_from_key",
]
