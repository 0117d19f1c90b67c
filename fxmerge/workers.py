"""Scoring candidates on any ``concurrent.futures.Executor``: what is sent, once, and what comes back.

Threads share the estimator. Everything else is taken for other processes: the network, the estimator (with its data) and
the candidates are written once, and read once by each worker; a task is the name of that and one candidate. Loading
the network involves no code of the model's.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, fx

from .calibration import eval_mode
from .candidates import Candidate
from .errors import FxmergeError, UnsupportedError, UserError
from .serialize import graph_from_json, graph_to_json, state_tensors

if TYPE_CHECKING:
    from .estimators import Estimator

__all__ = ["Cluster", "check_executor", "scores"]

_LIVES = 3
"""How often a pool of processes may break before it is given up."""

_NUMBER = "fxmerge_candidate"

_log = logging.getLogger("fxmerge")


def check_executor(executor: Executor | None, gm: fx.GraphModule, estimator: Estimator) -> None:
    """Refuse what could not score this network, without sending anything.

    Raises:
        UserError: no executor, or the estimator cannot be pickled.
        UnsupportedError: the network cannot be saved, and so not be sent.
    """
    if executor is None or isinstance(executor, ThreadPoolExecutor):
        return
    if not isinstance(executor, Executor):
        raise UserError(
            f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor, such as "
            "ProcessPoolExecutor(4) or fxmerge.clusters.RayExecutor()"
        )
    try:
        graph_to_json(gm)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error} It cannot be sent to other processes either: use a ThreadPoolExecutor."
        ) from error
    _check_pickles(_pickler(executor), estimator)


def scores(
    gm: fx.GraphModule,
    candidates: Sequence[Candidate],
    estimator: Estimator,
    executor: Executor | None = None,
    missing: Sequence[Candidate] | None = None,
) -> Iterator[tuple[Candidate, float]]:
    """Score candidates, each exactly once; yields them as they are done, in any order.

    The losses do not depend on the executor, on how many workers it has, or on the order. Processes take one torch thread
    each, unless ``OMP_NUM_THREADS`` is set for them; compare them with a serial run of as many threads. Where a worker of a
    ``ProcessPoolExecutor`` dies, a pool like it takes over what is left, up to three times.

    Each candidate is a task of its own, unless the estimator's ``by_start`` is true: then those that start at one value
    are one task, and threads take turns.

    Args:
        gm: the canonical graph; in eval mode meanwhile.
        candidates: all of them, distinct: what the estimator prepares for.
        estimator: what turns one into a loss.
        executor: None scores here, one after the other.
        missing: those to score; default all.

    Raises:
        UserError: the estimator failed, on the candidate that the message names; its exception is the cause. Or workers
            died too often.
        FxmergeError: one that the estimator raised, with the candidate named.
    """
    wanted = candidates if missing is None else missing
    if not wanted:
        return
    together = bool(getattr(estimator, "by_start", False))
    with ExitStack() as stack:
        stack.enter_context(eval_mode(gm))
        if isinstance(executor, ThreadPoolExecutor) or executor is None:
            task = _here_task(estimator.prepare(gm, candidates), together)
        else:
            task = _send(executor, gm, candidates, estimator, stack)
        groups = _groups(wanted, together and executor is not None)
        if executor is not None:
            yield from _collect(task, groups, estimator, executor, stack)
            return
        for group in groups:
            yield group[0], _named(functools.partial(task, group), group, estimator)[0]


_Group: TypeAlias = "tuple[Candidate, ...]"


def _groups(candidates: Sequence[Candidate], together: bool) -> list[_Group]:
    if not together:
        return [(candidate,) for candidate in candidates]
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.entry, []).append(candidate)
    return [tuple(group) for group in groups.values()]


def _here_task(score: Callable[[Candidate], float], together: bool) -> Callable[[_Group], list[float]]:
    turn = threading.Lock() if together else nullcontext()

    def task(group: _Group) -> list[float]:
        with turn:
            return _losses(score, group)

    return task


def _losses(score: Callable[[Candidate], float], group: _Group) -> list[float]:
    """The losses of a group; an error says by its number which candidate it is about, also between processes."""
    losses: list[float] = []
    try:
        for candidate in group:
            losses.append(float(score(candidate)))
    except Exception as error:
        vars(error)[_NUMBER] = len(losses)
        raise
    return losses


def _collect(
    task: Callable[[_Group], list[float]],
    groups: Sequence[_Group],
    estimator: Estimator,
    executor: Executor,
    stack: ExitStack,
) -> Iterator[tuple[Candidate, float]]:
    left = dict.fromkeys(groups)
    for life in range(1, _LIVES + 1):
        try:
            with _submitted(executor, task, list(left)) as futures:
                for future in as_completed(futures):
                    group = futures[future]
                    yield from zip(group, _named(future.result, group, estimator), strict=True)
                    del left[group]
            return
        except BrokenExecutor as error:
            count = sum(map(len, left))
            if life == _LIVES or not isinstance(executor, ProcessPoolExecutor):
                raise UserError(
                    f"workers died {life} times while {count} candidates were left to score ({error}): they may lack "
                    "memory; use fewer, or executor=None"
                ) from error
            _log.warning("a worker died; a new pool of processes scores the %d candidates that are left", count)
            executor = stack.enter_context(_another(executor))


@contextmanager
def _submitted(
    executor: Executor, task: Callable[[_Group], list[float]], groups: Sequence[_Group]
) -> Iterator[dict[Future[list[float]], _Group]]:
    """The future of every group; what has not begun at the end of the block does not begin."""
    futures: dict[Future[list[float]], _Group] = {}
    try:
        for group in groups:
            futures[executor.submit(task, group)] = group
        yield futures
    finally:
        for future in futures:
            future.cancel()


def _another(pool: ProcessPoolExecutor) -> ProcessPoolExecutor:
    """A pool like one that broke, which takes no more work."""
    return ProcessPoolExecutor(
        pool._max_workers,  # type: ignore[attr-defined] # as all executors have it
        pool._mp_context,
        pool._initializer,
        pool._initargs,
    )


def _named(losses: Callable[[], list[float]], group: _Group, estimator: Estimator) -> list[float]:
    """The losses of a group, or an error that names the candidate."""
    try:
        return losses()
    except BrokenExecutor:
        raise
    except FxmergeError as error:
        candidate = group[vars(error).get(_NUMBER, 0)]
        error.args = (f"{error} (while scoring the candidate: {candidate})", *error.args[1:])
        raise
    except Exception as error:
        candidate = group[vars(error).get(_NUMBER, 0)]
        raise UserError(
            f"the estimator {estimator.name!r} failed on the candidate: {candidate}: {type(error).__name__}: {error}"
        ) from error


# --- what is sent -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Cluster(Protocol):
    """What an executor has besides ``submit`` where its workers see no common disk."""

    pickle_module: Any
    """Pickles the estimator; ``pickle`` or what stands in for it."""
    device: str | None
    """Where workers compute, None for where the network is."""

    def share(self, content: bytes) -> Callable[[], bytes]:
        """Bring something to the workers once; what is returned goes with every task and reads it there."""
        ...


def _pickler(executor: Executor) -> Any:
    return executor.pickle_module if isinstance(executor, Cluster) else pickle


def _check_pickles(module: Any, estimator: Estimator) -> None:
    probe = type("Probe", (_WithoutTensors, module.Pickler), {})
    try:
        probe(BytesIO()).dump(estimator)
    except Exception as error:
        raise UserError(
            f"the estimator {estimator.name!r} cannot be sent to other processes ({error}): write its functions at the top "
            "level of a module (no lambdas, nothing defined inside a function), or use a ThreadPoolExecutor"
        ) from error


class _WithoutTensors:
    """Leaves tensors out of what is pickled only to see whether it can be."""

    def persistent_id(self, value: object) -> str | None:
        return "tensor" if isinstance(value, Tensor) else None


def _send(
    executor: Executor, gm: fx.GraphModule, candidates: Sequence[Candidate], estimator: Estimator, stack: ExitStack
) -> _Task:
    """Put everything where workers can read it, until the stack ends; the task says where that is."""
    content = BytesIO()
    sent = {
        "graph": graph_to_json(gm),
        "tensors": state_tensors(gm)[0],
        "estimator": estimator,
        "candidates": tuple(candidates),
    }
    torch.save(sent, content, pickle_module=_pickler(executor))
    key = secrets.token_hex(8)
    stack.callback(_prepared.pop, key, None)
    if isinstance(executor, Cluster):
        return _Task(key, _here(), executor.share(content.getvalue()), executor.device)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fxmerge-"))
    path = Path(folder) / "network.pt"
    path.write_bytes(content.getvalue())
    return _Task(key, _here(), path.read_bytes)


@dataclass(frozen=True, slots=True)
class _Task:
    """Scores candidates in a worker, which reads everything else before its first one and keeps it."""

    key: str
    home: tuple[int, str]
    read: Callable[[], bytes]
    device: str | None = None

    def __call__(self, group: _Group) -> list[float]:
        with _lock:
            if self.key not in _prepared:
                _prepared.clear()
                _prepared[self.key] = self._prepare()
            score = _prepared[self.key]
        return _losses(score, group)

    def _prepare(self) -> Callable[[Candidate], float]:
        if self.home != _here():
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]))
        # what this very program wrote a moment ago
        sent = torch.load(BytesIO(self.read()), map_location=self.device, weights_only=False)
        gm = graph_from_json(sent["graph"], sent["tensors"], device=self.device).eval()
        prepared: Callable[[Candidate], float] = sent["estimator"].prepare(gm, sent["candidates"])
        return prepared


_lock = threading.Lock()
_prepared: dict[str, Callable[[Candidate], float]] = {}
_PROCESS = secrets.token_hex(8)


def _here() -> tuple[int, str]:
    """This process: a forked one has another id, one on another machine another token."""
    return os.getpid(), _PROCESS
