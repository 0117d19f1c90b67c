"""What the runtimes on CUDA devices have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from fxmerge.errors import UserError

__all__ = ["cuda_environment", "event_timer", "require_cuda"]

_WARM_UP = 3


def require_cuda(runtime: str, device: int = 0) -> None:
    """Refuse where torch cannot use a CUDA device.

    Args:
        runtime: what needs it, for the message.
        device: its index.

    Raises:
        UserError: torch was built without CUDA, finds no device, or fewer than the index asks for.
    """
    if torch.cuda.is_available():
        if not 0 <= device < torch.cuda.device_count():
            raise UserError(
                f"runtime {runtime!r}: there is no CUDA device {device}; torch finds {torch.cuda.device_count()}, "
                "counted from 0."
            )
        return
    if torch.version.cuda is None:
        raise UserError(
            f"runtime {runtime!r} needs a CUDA device, and this PyTorch ({torch.__version__}) was built without CUDA. "
            "On a machine with an NVIDIA GPU, install one with it: https://pytorch.org/get-started/locally."
        )
    raise UserError(
        f"runtime {runtime!r} needs a CUDA device, and torch finds none. Check the driver with nvidia-smi, and "
        "CUDA_VISIBLE_DEVICES."
    )


def cuda_environment(device: int = 0) -> dict[str, str]:
    """The device's name, the version of its driver, and the CUDA version of torch.

    The name comes from the driver where torch has no CUDA of its own.
    """
    return {
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name(device) if torch.cuda.is_available() else _driver_name(device),
        "driver": _driver_version(),
    }


def event_timer(launch: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], float]:
    """Runs what is launched on a stream, once, and returns its milliseconds between two CUDA events.

    Warmed up first: kernels are loaded, chosen or compiled in the first runs.
    """

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            start.record(stream)
            launch()
            end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end))

    for _ in range(_WARM_UP):
        run()
    return run


def _driver_version(root: Path = Path("/proc/driver/nvidia")) -> str:
    """As NVIDIA's kernel module tells it on Linux."""
    try:
        text = (root / "version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


def _driver_name(device: int, root: Path = Path("/proc/driver/nvidia")) -> str:
    for place, file in enumerate(sorted(root.glob("gpus/*/information"))):
        found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if place == device and found:
            return found.group(1)
    return "unknown"
