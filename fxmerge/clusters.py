"""Scoring on a Ray cluster: a ``concurrent.futures.Executor`` whose workers may be on any machine.

Needs the extra ``ray``. Nothing of Ray is imported before an executor is made.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import MissingPackageError, UserError

__all__ = ["RayExecutor"]

_T = TypeVar("_T")


class RayExecutor(Executor):
    """Runs tasks on Ray: each takes the processors and GPUs it was promised; Ray says which.

    What all tasks share is sent to the cluster once. A task whose worker is lost, with its machine or alone, is run again
    elsewhere; one that raises is not. fxmerge and the modules that define a model's functions must be importable
    there (Ray's ``runtime_env``).

    Args:
        num_cpus: processors of a task, and its torch threads, unless ``OMP_NUM_THREADS`` is set.
        num_gpus: GPUs of a task, or a share of one. Tasks compute on a GPU where it is not 0, else on the CPU, wherever
            the network is.
        max_retries: how often a task is run again when its worker is lost.

    Ray is connected to, or started on this machine, by ``ray.init()`` unless the program did it before with options of its
    own; what was started here is stopped by ``shutdown``, or at the end of a ``with`` block.

    Raises:
        MissingPackageError: Ray is not installed.
        UserError: a number is negative.
    """

    def __init__(self, *, num_cpus: float = 1, num_gpus: float = 0, max_retries: int = 3) -> None:
        for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus), ("max_retries", max_retries)):
            if value < 0:
                raise UserError(f"{name} must not be negative, as {value!r} is")
        try:
            import ray
            from ray import cloudpickle
        except ImportError as error:
            raise MissingPackageError(
                f"scoring on Ray needs the package ray ({error}): pip install 'fxmerge[ray]'"
            ) from error
        self.pickle_module: Any = cloudpickle
        self.device: str | None = "cuda" if num_gpus else "cpu"
        self._ray = ray
        self._closed = False
        self._own = not ray.is_initialized()
        if self._own:
            ray.init()
        self._run: Any = ray.remote(_call).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=max_retries)
        self._shared: list[Any] = []
        self._waiting: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Run a function on the cluster; cancelling its future takes the task back."""
        if self._closed:
            raise RuntimeError("this executor was shut down and takes no more tasks")
        reference = self._run.remote(fn, args, kwargs)
        future: Future[_T] = Future()

        def done(found: Future[_T]) -> None:
            self._waiting.discard(future)
            if not future.set_running_or_notify_cancel():
                return
            error = found.exception()
            if error is None:
                future.set_result(found.result())
            else:  # what the task raised is inside of what Ray raises
                future.set_exception(getattr(error, "cause", None) or error)

        def taken_back(future: Future[_T]) -> None:
            if future.cancelled():
                self._ray.cancel(reference)

        self._waiting.add(future)
        future.add_done_callback(taken_back)
        reference.future().add_done_callback(done)
        return future

    def share(self, content: bytes) -> Callable[[], bytes]:
        """Put something into the cluster's object store once; what is returned reads it there."""
        reference = self._ray.put(content)
        self._shared.append(reference)  # the store drops what nobody holds
        return _Shared(reference)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks.

        Args:
            wait: until those that were submitted are done.
            cancel_futures: tasks that have not begun do not begin.
        """
        self._closed = True
        if cancel_futures:
            for future in list(self._waiting):
                future.cancel()
        if wait:
            concurrent.futures.wait(list(self._waiting))
        self._shared.clear()
        if wait and self._own:
            self._ray.shutdown()
            self._own = False


@dataclass(frozen=True, slots=True)
class _Shared:
    reference: Any

    def __call__(self) -> bytes:
        import ray

        content: bytes = ray.get(self.reference)
        return content


def _call(function: Callable[..., _T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _T:
    return function(*args, **kwargs)
