"""PyTorch itself, eager or compiled, on the CPU or on a CUDA device."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import UnsupportedError, UserError
from fxmerge.inputs import map_tensors

from ._base import LayerSignature
from ._cuda import cuda_environment, event_timer, require_cuda
from ._precision import full_name
from ._slope import measure_slopes, torch_copies
from .onnxruntime import _processor

__all__ = ["TorchRuntime"]

_WARM_UP = 3
_log = logging.getLogger("fxmerge")


class TorchRuntime:
    """Milliseconds of PyTorch, in inference mode.

    Networks are copied, never moved. On a CUDA device they are captured as CUDA graphs where they can be, and timed with CUDA
    events. A layer's latency is the slope over copies of it; compiled, that takes seconds for each.

    Args:
        compile: run ``torch.compile``'s code, for fixed sizes and as one graph; False: eager.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None is the first CUDA device, without any the CPU.
        threads: of the CPU; None is torch's own setting.
        precision: of parameters and inputs: ``"float32"``, ``"float16"`` or ``"bfloat16"``, or ``"fp32"``, ``"fp16"``, ``"bf16"``.

    Raises:
        UserError: the device is none of these or not there, the precision is unknown, or threads is below 1.
    """

    name: Final = "torch"
    unit: Final[Literal["ms", "MACs"]] = "ms"
    deterministic: Final = False

    def __init__(
        self,
        *,
        compile: bool = False,  # noqa: A002 - torch's own name for it
        device: str | torch.device | None = None,
        threads: int | None = None,
        precision: str = "float32",
    ) -> None:
        self.compile = compile
        self.device = _device(device)
        if threads is not None and threads < 1:
            raise UserError(f"threads must be at least 1; got {threads}.")
        self.threads = threads
        self.precision = full_name(precision)

    def __repr__(self) -> str:
        return (
            f"TorchRuntime(compile={self.compile}, device={str(self.device)!r}, threads={self.threads}, "
            f"precision={self.precision!r})"
        )

    def environment(self) -> dict[str, str]:
        """Device, torch's version, mode and precision; threads on the CPU, CUDA and driver on a CUDA device."""
        mode = "compiled" if self.compile else "eager"
        common = {"mode": mode, "precision": self.precision, "runtime": f"{self.name} {torch.__version__}"}
        if self.device.type == "cpu":
            return {**common, "device": _processor(), "threads": str(self.threads or torch.get_num_threads())}
        # What torch makes of float32, and how it chooses convolutions, is set for the whole process.
        cudnn = torch.backends.cudnn
        choices = f"{cudnn.conv.fp32_precision}, benchmark {cudnn.benchmark}"  # type: ignore[attr-defined]
        return {**common, **cuda_environment(self.device.index), "mode": f"{mode}, CUDA graphs", "cudnn": choices}

    def measure(
        self,
        signatures: Sequence[LayerSignature],
        on_result: Callable[[LayerSignature, float], None],
    ) -> None:
        """Time each layer by the slope over copies of it; see :mod:`fxmerge.runtimes._slope`.

        Raises:
            InternalError: a layer cannot be run; the message holds its signature.
        """

        def build(signature: LayerSignature, copies: int) -> Callable[[], float]:
            net, inputs = torch_copies(signature, copies)
            return self.build(net, inputs, {})

        measure_slopes(signatures, build, on_result)

    def build(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], float]:
        """Copy the network to the device in the runtime's precision, compile it if asked to, and warm it up.

        Raises:
            UnsupportedError: it does not run there, or not in that precision.
        """
        with self._named(module):
            timer = self._cuda_timer if self.device.type == "cuda" else self._cpu_timer
            return timer(self._forward(module, args, kwargs))

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a network returns when it is built as :meth:`build` does, in order, on the CPU.

        Raises:
            UnsupportedError: see :meth:`build`.
        """
        with self._named(module), torch.inference_mode():
            leaves = pytree.tree_leaves(self._forward(module, args, kwargs)())
        return [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any]:
        dtype: torch.dtype = getattr(torch, self.precision)

        def place(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.device, dtype if tensor.is_floating_point() else None)

        net = copy.deepcopy(module).to(self.device, dtype)
        inputs, keywords = map_tensors(place, args, kwargs)
        # One graph or an error: where it could not be compiled, it would run eagerly and say nothing.
        forward = torch.compile(net, fullgraph=True, dynamic=False) if self.compile else net
        return lambda: forward(*inputs, **keywords)

    @contextmanager
    def _named(self, module: nn.Module) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except (RuntimeError, TypeError, ValueError) as error:
            mode = "compiled" if self.compile else "eager"
            raise UnsupportedError(
                f"{type(module).__name__} does not run on the runtime 'torch' ({mode}, {self.precision}, {self.device}): "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            ) from error

    def _cpu_timer(self, forward: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            with self._threads() as changed, torch.inference_mode():
                if changed:
                    # starts the threads that were missing
                    forward()
                start = time.perf_counter()
                forward()
                return (time.perf_counter() - start) * 1e3

        for _ in range(_WARM_UP):
            run()
        return run

    @contextmanager
    def _threads(self) -> Iterator[bool]:
        """Set torch's number of threads, which is the process's, for a moment; whether that changes it."""
        before = torch.get_num_threads()
        if self.threads is None or self.threads == before:
            yield False
            return
        torch.set_num_threads(self.threads)
        try:
            yield True
        finally:
            torch.set_num_threads(before)

    def _cuda_timer(self, forward: Callable[[], object]) -> Callable[[], float]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # the network and its inputs were copied on the other one
            stream.wait_stream(torch.cuda.current_stream())

            def eager() -> None:
                with torch.inference_mode():
                    forward()

            # graphs are captured from what has run before: the first run chooses kernels and allocates
            run = event_timer(eager, stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
                    # kept: the memory of the outputs belongs to the graph
                    outputs = forward()
            except RuntimeError as error:
                _log.info("no CUDA graph, kernels are launched one by one: %s", error)
                torch.cuda.synchronize()
                return run

            def replay() -> object:
                graph.replay()
                return outputs

            return event_timer(replay, stream)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"the runtime 'torch' has no device {device!r}; expected 'cpu', 'cuda' or 'cuda:N'.") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise UserError(f"the runtime 'torch' times on 'cpu' and 'cuda', not on {str(found)!r}.")
    require_cuda("torch", found.index or 0)
    return torch.device("cuda", found.index or 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch about itself: its compiler imports deprecated parts of torch (2.13)."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield
