"""The whole pipeline: capture, analyse, measure, score, select, rewrite, check."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx, nn

from .budget import Budget, parse_budget
from .calibration import Batch, Calibration, parse_memory, read_calibration
from .candidates import Candidate, Enumeration, Limits, Site, submodules
from .capture import capture
from .checks import check_equal, distinct_inputs, outputs_of, own_error
from .closed_loop import search, within_budget
from .effort import Effort, parse_effort
from .errors import BudgetError, PlanError, UnsupportedError, UserError
from .estimators import Distance, Estimator, get_estimator, plan_distance
from .fitting import Refitted, apply_candidates, last_may_change, resolve_fit
from .graph import clone, convolutions, device_of, graph_meta, refuse_other_structure, structure
from .importance import open_table
from .inputs import Example, batch_size, map_tensors, split_example, with_batch
from .performance import as_estimator, installing
from .plan import Plan, PlanEntry, format_latency
from .progress import progress
from .quality import BUDGETS, Quality, Row, Subject, evaluate_budgets, metric_name, short_hash, weights_hash
from .regression import FEW_ROWS
from .report import Report, decide, size_of
from .result import Result, merge_graph
from .runtimes import Runtime, Timing, get_runtime, interleave
from .solver import Frontier as Points
from .solver import solve, solve_levels
from .store import LatencyStore, default_path
from .verified import Chosen, Tried, search_plans

if TYPE_CHECKING:
    from .passes.profile_latency import LatencyTable
    from .passes.refit import Reuse

__all__ = ["Frontier", "compress", "fold", "frontier"]

_TOLERANCE = 0.02
_DRIFT = 0.05
_PROPOSED = 512
"""Points per region of the solves that propose plans."""
_FINALISTS = 4
_PATIENCE = 8
"""Times ``measure_seconds`` for timings to hold."""
_ROUNDS = 6
"""Of a try at least, however slow the network: the fastest of a few runs is no minimum."""
_log = logging.getLogger("fxmerge")


@dataclass(frozen=True, slots=True)
class _Setup:
    """What is fixed before anything is measured."""

    base: fx.GraphModule
    example: Batch
    batch: int
    calibration: Calibration | None
    estimator: Estimator
    runtime: Runtime
    limits: Limits
    fit: str
    memory: int
    notes: tuple[str, ...]
    distance: Distance | None
    search: Effort | None
    refit_kept: bool
    polish: Effort | None


class Frontier:
    """All Pareto-optimal plans of one network: one solve for every budget.

    ``len(frontier)`` plans; ``frontier.points`` are their predicted end-to-end latencies and losses, fastest first.
    """

    def __init__(
        self,
        setup: _Setup,
        enumeration: Enumeration,
        useful: tuple[Site, ...],
        table: LatencyTable,
        losses: dict[Candidate, float],
        points: Points,
        original: Timing,
        timer: Callable[[], float],
        seconds: dict[str, float],
        measure_seconds: float,
    ) -> None:
        self.enumeration = enumeration
        self._useful = useful
        self._structure = structure(setup.base)
        self._inputs = distinct_inputs(setup.base, setup.example)
        self._rounding = own_error(setup.base, self._inputs, outputs_of(setup.base, self._inputs))
        self._fits: tuple[Refitted, ...] = ()
        self._reuse: Reuse | None = None
        self._installed: tuple[tuple[Candidate, ...], tuple[fx.GraphModule, fx.GraphModule]] | None = None
        self._setup = setup
        self._table = table
        self._losses = losses
        self._points = points
        self._original = original
        self._quickest = original.latency
        self._timer = timer
        self._seconds = seconds
        self._measure_seconds = measure_seconds

    @property
    def original(self) -> float:
        """End-to-end latency of the original network, in ``unit``."""
        return self._original.latency

    @property
    def convolutions(self) -> int:
        """Convolution calls of the original network."""
        return size_of(self._setup.base).convolutions

    @property
    def unit(self) -> str:
        """``ms`` or ``MACs``."""
        return self._setup.runtime.unit

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """(predicted end-to-end latency, loss) of every plan, latency ascending."""
        pairs = zip(self._points.latency, self._points.loss, strict=True)
        return tuple((self._table.end_to_end(float(latency)), float(loss)) for latency, loss in pairs)

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        first, last = self.points[0], self.points[-1]
        return (
            f"Frontier({len(self)} plans, {format_latency(first[0], self.unit)} to {format_latency(last[0], self.unit)}, "
            f"loss {first[1]:.4g} to {last[1]:.4g})"
        )

    def at(self, budget: float | str, *, levels: int | None = None) -> Plan:
        """The plan that loses least within a budget, by prediction.

        Args:
            budget: a share of the original (0.6), or an amount ("8ms", "1.2GMACs").
            levels: None for the exact frontier; a number for the paper's Algorithm 1 with that many latency levels, whose plan
                may be over budget because it rounds latencies down.

        Raises:
            BudgetError: it cannot be read, or is below the smallest reachable latency, which the message names.
        """
        amount = parse_budget(budget, self.unit).resolve(self.original)
        _check_levels(levels)
        if amount >= self.original:
            return self._plan(())
        index = self._index(amount)
        if levels is None:
            return self.plan(index)
        from .passes.select_segments import selection_problem

        problem = selection_problem(replace(self.enumeration, sites=self._useful), self._table, self._losses)
        inner = (amount - self._table.rest) / self._table.scale
        return self._plan(solve_levels(problem, inner, levels).choices)

    def plan(self, index: int) -> Plan:
        """The plan of one point of the frontier."""
        return self._plan(self._points.choices(index))

    def compress(self, budget: float | str, *, levels: int | None = None) -> Result:
        """Install the best plan within a budget; on a runtime that measures, found by building and measuring networks.

        Args:
            budget: see :meth:`at`.
            levels: see :meth:`at`; the plan of Algorithm 1 is installed as it is.

        Raises:
            BudgetError: see :meth:`at`.
            InternalError: a check failed.
        """
        wanted = parse_budget(budget, self.unit)
        if levels is not None:
            return self._apply(self.at(budget, levels=levels), wanted.resolve(self.original))
        return self._fit_budget(wanted)

    def apply(self, plan: Plan) -> Result:
        """Install a plan: relax, compose weights, fold, check, measure.

        Raises:
            PlanError: the plan was made for a network of another structure (the message names the first difference), or
                for another unit with candidates that this frontier has not measured.
            InternalError: a check failed.
        """
        if not isinstance(plan, Plan):
            raise UserError(
                f"apply takes a fxmerge.Plan, not a {type(plan).__name__}; Plan.from_json reads a saved one"
            )
        refuse_other_structure(plan.structure, self._setup.base)
        plan = self._repriced(plan)
        return self._apply(plan, plan.predicted)

    def evaluate(
        self,
        metric: Callable[[nn.Module], float],
        budgets: Iterable[float | str] | float | str = BUDGETS,
        *,
        name: str | None = None,
        save: str | os.PathLike[str] | None = None,
        save_results: str | os.PathLike[str] | None = None,
        on_row: Callable[[Quality], None] | None = None,
    ) -> Quality:
        """What the networks of several budgets are worth by your own metric.

        Every budget is compressed as by :meth:`compress`; the metric is given the merged network, and once the folded
        original. Nothing is fine-tuned. A budget out of reach is a row that says so.

        Args:
            metric: from a network in eval mode, a copy of its own, to a number; larger or smaller may be better.
            budgets: see :meth:`at`; by default 80, 65, 50, 40 and 30 % of the original.
            name: what the metric is called, by default as its function. Two metrics of one name are taken for one.
            save: JSON file that is written after every row. Where it exists the evaluation continues it: budgets that
                it holds are not evaluated again, and stay part of what is returned.
            save_results: folder in which the result of each budget is saved before its metric: that of "60%" in
                ``60pct``, that of "8ms" in ``8ms``, for :func:`fxmerge.load`. A budget whose folder is missing is
                evaluated again.
            on_row: called with the quality so far: first with what is known without a budget, then after every row,
                which is the last.

        Raises:
            BudgetError: a budget cannot be read; found before anything is evaluated, as the next three.
            UserError: the metric is no function, there is no budget, or a path cannot be written. Later: the metric
                returned no number.
            StoreError: the file is of another evaluation (network, weights, runtime, options, metric), or a file or
                folder is not fxmerge's; it is left untouched.
            UnsupportedError: the network holds tensors that cannot be hashed, such as sparse ones.

        Example:
            >>> import torch, fxmerge
            >>> net = torch.nn.Sequential(*[torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
            >>> found = fxmerge.frontier(net, torch.randn(1, 4, 8, 8), runtime="macs", max_kernel=3)
            >>> quality = found.evaluate(lambda network: len(list(network.children())), [0.5], name="layers")
            >>> [(row.budget, row.metric) for row in quality.networks]
            [('original', 4.0), ('50%', 2.0)]
        """
        setup = self._setup
        subject = Subject(
            network=type(setup.base).__name__,
            structure=short_hash(self._structure),
            weights=weights_hash(setup.base),
            runtime={**setup.runtime.environment(), "name": setup.runtime.name},
            unit=self.unit,
            batch=setup.batch,
            search=str(setup.limits),
            data=_about_data(setup),
            metric=metric_name(metric, name),
        )
        size = size_of(setup.base)
        latencies = (self.original, self.original, self.original, self.original)
        original = Row("original", *latencies, size.convolutions, size.parameters, float("nan"))
        return evaluate_budgets(
            Quality(subject, original, ()),
            lambda: merge_graph(setup.base),
            self.compress,
            metric,
            budgets,
            save=save,
            save_results=save_results,
            on_row=on_row,
        )

    def _apply(self, plan: Plan, requested: float) -> Result:
        measured, original = self._measure(self._install(plan, None)[0])
        return self._result(plan, measured, original, requested)

    def _repriced(self, plan: Plan) -> Plan:
        """The plan with this frontier's latencies and losses: those it carries are history."""
        if all(c in self._losses and (c.geometry is None or c in self._table.merged) for c in plan.candidates):
            return self._priced(plan.candidates)
        if plan.unit != self.unit:
            raise PlanError(
                f"this plan was made on {plan.runtime} in {plan.unit}, and holds candidates that this frontier in {self.unit} has "
                "not measured: make the frontier with the plan's max_kernel, max_span and method, or plan anew"
            )
        return plan

    def _index(self, amount: float) -> int:
        latencies = np.array([latency for latency, _ in self.points])
        index = int(np.searchsorted(latencies, amount * (1 + 1e-12), side="right")) - 1
        if index < 0:
            raise self._unreachable(amount, float(latencies[0]))
        return index

    def _unreachable(self, amount: float, smallest: float) -> BudgetError:
        limits = self._setup.limits
        more = [
            "method='layermerge'" if limits.method != "layermerge" else "",
            "more of the network (include, exclude)" if limits.include or limits.exclude else "",
            "a larger max_kernel or max_span" if limits.method != "layer" else "",
        ]
        return BudgetError(
            f"the budget of {format_latency(amount, self.unit)} ({amount / self.original:.1%} of the original) is out of reach: "
            f"the smallest reachable is {format_latency(smallest, self.unit)} ({smallest / self.original:.1%}). Raise the budget, "
            f"or allow more: {', or '.join(filter(None, more))}.",
            smallest,
        )

    def _plan(self, chosen: Iterable[Any]) -> Plan:
        return self._priced(self._useful[number].candidate for number in chosen)

    def _priced(self, candidates: Iterable[Candidate]) -> Plan:
        entries = tuple(PlanEntry(c, self._table.scale * self._table.of(c), self._losses[c]) for c in candidates)
        return Plan(
            entries,
            self._structure,
            self._setup.runtime.name,
            self.unit,
            self.original,
            self._table.end_to_end(self._table.total(entry.candidate for entry in entries)),
            sum(entry.loss for entry in entries),
        )

    # --- installing and measuring ------------------------------------------------------------------------------------------

    def _install(self, plan: Plan, calibration: Calibration | None) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The merged and the trainable network of a plan; the last pair without calibration is kept, to be handed out."""
        if calibration is None and self._installed is not None and self._installed[0] == plan.candidates:
            return self._installed[1]
        setup = self._setup
        model, self._fits = apply_candidates(
            setup.base,
            plan.candidates,
            calibration,
            setup.fit,
            setup.memory,
            setup.limits,
            kept=setup.refit_kept,
            reuse=self._reuse,
        )
        pair = merge_graph(model), model
        if calibration is None:
            self._installed = plan.candidates, pair
        return pair

    def _measure(self, merged: fx.GraphModule) -> tuple[Timing, Timing]:
        """A network and the original, interleaved; repeated until timings hold, or time is up.

        They hold where the best two tries of both agree within 2 %, and the original is as quick as it has been: slow phases
        of a machine may last, and do not slow all networks alike.
        """
        runtime = self._setup.runtime
        timers = [runtime.build(merged, *self._setup.example), self._timer]
        if runtime.deterministic:
            measured, original = interleave(timers, 0.0, deterministic=True)
            return measured, original
        tries: list[list[Timing]] = []
        end = time.perf_counter() + _PATIENCE * self._measure_seconds
        while len(tries) < 2 or time.perf_counter() < end:
            tries.append(interleave(timers, self._measure_seconds / 2, _ROUNDS))
            measured, original = map(_best_of, zip(*tries, strict=True))
            agree = max(measured.repeatability, original.repeatability) <= _TOLERANCE
            if agree and original.latency <= (1 + _TOLERANCE) * self._quickest:
                break
        self._quickest = min(self._quickest, original.latency)
        return measured, original

    def _result(
        self,
        plan: Plan,
        measured: Timing,
        original: Timing,
        requested: float,
        note: str = "",
        seconds: Mapping[str, float] = MappingProxyType({}),
        builds: tuple[tuple[float, float], ...] = (),
    ) -> Result:
        setup, seconds = self._setup, {**self._seconds, **seconds}
        notes = (note,) if note else ()
        drift = original.latency / self.original - 1
        if abs(drift) > _DRIFT:
            notes = (*notes, self._about_drift(original.latency))
        with _stage(seconds, "install", "Installing the plan"):
            merged, model = self._install(plan, setup.calibration if plan.candidates else None)
            fits = self._fits
            self._installed = self._reuse = None  # handed out: the user may change it
        if setup.polish is not None and setup.calibration is not None and plan.candidates:
            with _stage(seconds, "polish", "Polishing"):
                notes = (*notes, self._polish(model, setup.calibration, setup.polish))
                merged = merge_graph(model)
        with _stage(seconds, "check", "Checking the merged network"):
            checked = check_equal(model, merged, self._inputs, self._rounding)
        if checked.caveat:
            notes = (*notes, checked.caveat)
        few = [each for each in fits if each.fitted and each.rows_per_unknown < FEW_ROWS]
        if few:
            least = min(each.rows_per_unknown for each in few)
            notes = (
                *notes,
                f"{len(few)} fits have fewer than {FEW_ROWS:.0f} rows for an unknown (the least {least:.1f}, of "
                f"{min(few, key=lambda each: each.rows_per_unknown).name}): more calibration images would help",
            )
        report = Report(
            data=_about_data(setup),
            notes=(*setup.notes, *notes),
            runtime={**setup.runtime.environment(), "name": setup.runtime.name},
            unit=self.unit,
            batch=setup.batch,
            requested=requested,
            original=original.latency,
            predicted=plan.predicted
            / self.original
            * original.latency,  # anchored on the latest timing of the original
            measured=measured.latency,
            repeatability=max(measured.repeatability, original.repeatability),
            before=size_of(setup.base),
            after=size_of(merged),
            candidates=dict(Counter(site.candidate.kind for site in self.enumeration.sites)),
            useful=len(self._useful),
            refusals=dict(Counter(refusal.code for refusal in self.enumeration.refusals)),
            decisions=decide(setup.base, self.enumeration, self._useful, plan),
            error=checked.error,
            error_allowed=checked.allowed,
            original_error=self._rounding,
            dependence=checked.dependence,
            fits=fits,
            bound=self._table.scale * self._points.bound,
            builds=builds,
            drift=drift,
            seconds=seconds,
        )
        return Result(model, plan, report, setup.example)

    def _polish(self, model: fx.GraphModule, calibration: Calibration, effort: Effort) -> str:
        """Train the trainable network towards the original's values; a note on what that did."""
        from .passes.polish import polish

        setup = self._setup
        found = polish(setup.base, model, calibration, effort, setup.memory, setup.limits, setup.distance)
        if found is None:
            return "polish: nothing was trained (nothing that may be, or a value is written in place)"
        return f"polish: on held-out images the outputs differ by {found[1]:.4g} from the original's, {found[0]:.4g} before"

    def _about_drift(self, latest: float) -> str:
        return (
            f"the machine changed its speed: the original took {format_latency(self.original, self.unit)} when layers were "
            f"measured and {format_latency(latest, self.unit)} at the end; all shares are of the latter. Something else may "
            "be running"
        )

    def _fit_budget(self, budget: Budget) -> Result:
        """The closed loop: solve, build, measure, move the target, until the largest plan within the budget is found."""
        amount = budget.resolve(self.original)
        if amount >= self.original:
            plan = self._plan(())
            note = f"the budget of {format_latency(amount, self.unit)} is at or above the original: nothing was changed"
            _log.info(note)
            return self._result(plan, self._original, self._original, amount, note)
        if self._setup.runtime.deterministic:
            return self._largest_counted(amount)
        return self._search(budget)

    def _verified(self, plan: Plan, limit: float, seconds: dict[str, float]) -> tuple[list[Tried], str]:
        """Plans of at most so much predicted latency, ranked by their networks' outputs; a note on what that changed."""
        from .passes.refit import Reuse
        from .passes.select_segments import selection_problem

        setup = self._setup
        if setup.search is None or setup.calibration is None or not plan.candidates:
            return [Tried(plan.candidates, math.nan)], ""
        worth = replace(self.enumeration, sites=self._useful)

        def best_for(losses: Mapping[Candidate, float]) -> Chosen:
            points = solve(selection_problem(worth, self._table, losses), max_points=_PROPOSED)
            latencies = [self._table.end_to_end(float(latency)) for latency in points.latency]
            index = bisect.bisect_right(latencies, limit * (1 + 1e-12)) - 1
            return self._plan(points.choices(index)).candidates

        last, self._reuse = last_may_change(setup.base, setup.limits), Reuse()
        with _stage(seconds, "verify", "Comparing plans"), progress("Comparing plans near the best") as bar:

            def advance(least: float) -> None:
                bar.advance(note=f"{least:.4g} from the original")

            distance = plan_distance(
                setup.base,
                setup.calibration,
                setup.fit,
                setup.memory,
                last=last,
                compare=setup.distance,
                reuse=self._reuse,
            )
            tried = search_plans(plan.candidates, self._losses, best_for, distance, setup.search, advance)
        first = next(each for each in tried if each.candidates == plan.candidates)
        if len(tried) == 1:
            return tried, ""
        return tried, (
            f"{len(tried)} plans near the budget were installed; on held-out images the outputs of the best differ by "
            f"{tried[0].distance:.4g} from the original's, those of the plan with the least sum of losses by {first.distance:.4g}"
        )

    def _before(self, plan: Plan, tried: Sequence[Tried]) -> Iterator[tuple[Plan, tuple[Timing, Timing]]]:
        """The plans that rank before this one, each installed and timed in turns with the original."""
        for each in itertools.takewhile(lambda each: each.candidates != plan.candidates, tried):
            other = self._priced(each.candidates)
            yield other, self._measure(self._install(other, None)[0])

    def _largest_counted(self, amount: float) -> Result:
        """The best plan whose network counts no more than ``amount``: what carries side inputs on is in no table."""
        counted = []
        for index in range(self._index(amount), -1, -1):
            plan = self.plan(index)
            measured, original = self._measure(self._install(plan, None)[0])
            if measured.latency <= amount:
                break
            counted.append(measured.latency)
        else:
            raise self._unreachable(amount, min(counted))
        seconds: dict[str, float] = {}
        tried, note = self._verified(plan, amount - max(0.0, measured.latency - plan.predicted), seconds)
        for other, timing in self._before(plan, tried):
            if timing[0].latency <= amount:
                plan, (measured, original) = other, timing
                break
        return self._result(plan, measured, original, amount, note, seconds)

    def _search(self, budget: Budget) -> Result:
        latencies = [latency for latency, _ in self.points[:-1]]  # the last plan is the original itself
        if not latencies:
            raise self._unreachable(budget.resolve(self.original), self.original)
        seconds: dict[str, float] = {}

        def measure(index: int) -> tuple[Timing, Timing]:
            measured, original = self._measure(self._install(self.plan(index), None)[0])
            _log.debug(
                "plan %d of %d: predicted %.3f, measured %.3f of the original, repeatability %.3f",
                index,
                len(latencies),
                latencies[index] / self.original,
                measured.latency / original.latency,
                max(measured.repeatability, original.repeatability),
            )
            return measured, original

        with _stage(seconds, "closed loop", "Measuring compressed networks"):
            builds = search(latencies, measure, budget.resolve, budget.resolve(self.original))
        within = [build for build in builds if build.within]
        if not within:
            smallest = min(build.measured.latency for build in builds)
            raise self._unreachable(budget.resolve(self.original), smallest)
        best = max(within, key=lambda build: build.index)
        plan, measured, original = self.plan(best.index), best.measured, best.original
        shares = [
            (build.predicted / self.original, build.measured.latency / build.original.latency) for build in builds
        ]
        room = max(1.0, budget.resolve(original.latency) / measured.latency)
        tried, note = self._verified(plan, room * plan.predicted, seconds)
        with _stage(seconds, "closed loop", "Measuring compressed networks"):
            for other, timing in self._before(plan, tried[:_FINALISTS]):
                shares.append((other.predicted / self.original, timing[0].latency / timing[1].latency))
                if within_budget(*timing, budget.resolve(timing[1].latency)):
                    plan, (measured, original) = other, timing
                    break
        return self._result(
            plan, measured, original, budget.resolve(original.latency), note, seconds=seconds, builds=tuple(shares)
        )


def compress(
    model: nn.Module,
    example_input: Example,
    budget: float | str,
    *,
    runtime: str | Runtime = "auto",
    calibration: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    importance: str | Estimator | Callable[[nn.Module], float] = "auto",
    fit: str = "auto",
    method: str = "layermerge",
    levels: int | None = None,
    **options: Any,
) -> Result:
    """Make a CNN shallower until it meets a latency budget, losing as little as possible.

    LayerMerge (Kim et al., ICML 2024): activations and convolutions are removed and what is then linear is merged into single
    convolutions; which ones, the exact Pareto frontier of measured latency against importance decides. The model handed in
    stays untouched.

    Args:
        model: any module that ``torch.export`` traces; its parameters on one device.
        example_input: a tensor, a tuple (positional inputs) or a dict (keyword inputs): traces, times and checks; calibrates
            nothing. Its batch is the batch that is timed, unless ``batch`` is given.
        budget: a share of the original's end-to-end latency (0.6, "60%"), or an amount ("8ms"; "1.2GMACs" with ``macs``). Kept in
            the measured latency of the merged network, up to what two timings of it differ by, and at most 2 %.
        runtime: "auto", a name with options as :func:`fxmerge.runtimes.get_runtime` takes it ("onnxruntime:threads=1",
            "torch", "macs": counted), or a :class:`~fxmerge.runtimes.Runtime`.
        calibration: iterable of inputs, read once, cached up to ``memory``; feeds statistics and importance. No labels.
        inputs: how to take the model's inputs out of a batch, such as ``lambda batch: batch[0]``; never guessed.
        importance: "distortion" (default with calibration), "magnitude" (default without), an
            :class:`~fxmerge.estimators.Estimator` such as :class:`~fxmerge.performance.Finetune`, or a function of a model that
            returns a score, larger is better.
        fit: "refit" (default with calibration): merged convolutions are fitted to the original on the calibration inputs, in
            closed form. "compose" (default without): merged weights are composed, as in the paper, and batch-norm statistics
            re-estimated where there is calibration data.
        method: "layermerge", or the paper's baselines "depth" (no convolution goes) and "layer" (nothing merges).
        levels: use the paper's Algorithm 1 with that many latency levels instead of the exact frontier.
        options: those of :func:`frontier`: distance, include, exclude, batch, max_span, max_kernel, exit_activation, max_points,
            memory, store, measure_seconds, executor, importance_table, search, refit_kept, polish.

    Returns:
        The trainable model with ``merge()``, ``plan``, ``report`` and ``save()``.

    Raises:
        UserError: an argument is wrong; found before anything is measured.
        BudgetError: the budget cannot be read or reached; the smallest reachable is named.
        CaptureError: ``torch.export`` cannot trace the model.
        UnsupportedError: the model has no convolution.
        InternalError: a check failed; nothing wrong is handed out.

    Example:
        >>> import torch, fxmerge
        >>> conv = lambda i, o: torch.nn.Sequential(torch.nn.Conv2d(i, o, 3, padding=1), torch.nn.ReLU())
        >>> net = torch.nn.Sequential(conv(3, 32), conv(32, 32), conv(32, 32))
        >>> result = fxmerge.compress(net, torch.randn(2, 3, 16, 16), 0.5, runtime="macs")
        >>> result.report.measured <= 0.5 * result.report.original
        True
    """
    chosen = get_runtime(runtime)
    parse_budget(budget, chosen.unit)
    _check_levels(levels)
    found = frontier(
        model,
        example_input,
        runtime=chosen,
        calibration=calibration,
        inputs=inputs,
        importance=importance,
        fit=fit,
        method=method,
        **options,
    )
    return found.compress(budget, levels=levels)


def _check_levels(levels: int | None) -> None:
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 1):
        raise UserError(f"levels must be a whole number of at least 1 or None, not {levels!r}")


def frontier(
    model: nn.Module,
    example_input: Example,
    *,
    runtime: str | Runtime = "auto",
    calibration: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    importance: str | Estimator | Callable[[nn.Module], float] = "auto",
    distance: Distance | None = None,
    fit: str = "auto",
    method: str = "layermerge",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    batch: int | None = None,
    max_span: int = 16,
    max_kernel: int = 7,
    exit_activation: bool = False,
    max_points: int | None = 4096,
    memory: str | int = "2GiB",
    store: str | os.PathLike[str] | None = "default",
    measure_seconds: float = 1.0,
    executor: Executor | None = None,
    importance_table: str | os.PathLike[str] | None = None,
    search: int | str | None = "1min",
    refit_kept: bool = False,
    polish: int | str | None = None,
) -> Frontier:
    """Everything up to the choice: all Pareto-optimal plans of a network, for every budget at once.

    The first arguments are those of :func:`compress`; the others:

    Args:
        model: see :func:`compress`.
        example_input: see :func:`compress`.
        runtime: see :func:`compress`.
        calibration: see :func:`compress`.
        inputs: see :func:`compress`.
        importance: see :func:`compress`.
        distance: how far outputs are from the original's, for importance "distortion", the search and the polish: a function
            of the outputs and the original's, tensors (lists of them where a network returns several), to a number, 0 for the
            same. None is :func:`fxmerge.estimators.distance`: Kullback-Leibler for logits, relative squared error otherwise.
        fit: see :func:`compress`.
        method: see :func:`compress`.
        include: paths of submodules, such as "backbone": nothing outside of them changes; none means the whole network.
        exclude: paths of submodules, such as "head": nothing inside of them changes.
        batch: images per run to time; default that of ``example_input``.
        max_span: the most convolutions one merged segment may hold.
        max_kernel: the largest kernel that several convolutions may merge into.
        exit_activation: allow an activation behind a merge whose exit has none.
        max_points: bound on the solver's points per region; None is exact.
        memory: bound on cached calibration inputs, such as "2GiB".
        store: file of measured latencies; "default" is one in the user's cache folder, None keeps nothing.
        measure_seconds: how long each network is timed against the original; eight times as long at most, until timings hold.
        executor: scores candidates: any ``concurrent.futures.Executor``, or :class:`fxmerge.clusters.RayExecutor`; None scores
            here, one after the other. It changes no loss.
        importance_table: file that keeps every loss as soon as it is known; the next run for the same model, data and estimator
            scores only what is missing, and one for others is refused. None keeps nothing.
        search: how long :meth:`Frontier.compress` installs plans near the best, to take the one whose network's outputs are
            nearest to the original's: a time such as "1min", a number of networks such as 20 (the same network every
            time), or None for the plan with the least sum of losses. Needs calibration.
        refit_kept: with fit="refit", also fit convolutions that are kept, behind those that merged, towards their old weights.
        polish: train the installed network for a while, without labels, so that its inner values and outputs are the original's
            again: a time such as "10s", or a number of steps (the same network every time). None does not. Needs calibration.

    Raises:
        UserError: see :func:`compress`.
        StoreError: importance_table was made for something else, or cannot be written.
    """
    seconds: dict[str, float] = {}
    chosen = get_runtime(runtime)
    fit = resolve_fit(fit, calibrated=calibration is not None)
    limits = Limits(
        method,
        max_span,
        max_kernel,
        exit_activation,
        submodules(model, "include", include),
        submodules(model, "exclude", exclude),
        norms_go=fit == "refit",
    )
    effort, polishing = parse_effort(search, "search", "networks"), parse_effort(polish, "polish", "steps")
    for name, given in (("polish", polish is not None), ("refit_kept", refit_kept), ("distance", distance is not None)):
        if given and calibration is None:
            raise UserError(f"{name} needs images: pass calibration=...")
    if refit_kept and fit != "refit":
        raise UserError(f"refit_kept=True fits more convolutions, but fit={fit!r} fits none: leave one of them out")
    if distance is not None and not callable(distance):
        raise UserError(f"distance is a {type(distance).__name__}; expected a function of outputs and the original's")
    chosen_importance = as_estimator(importance)
    get_estimator(chosen_importance, None if calibration is None else Calibration((), (), 0, False))
    for name, value in (("max_points", max_points), ("batch", batch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name} must be a whole number of at least 1 or None, not {value!r}")
    if isinstance(measure_seconds, bool) or not isinstance(measure_seconds, (int, float)) or not measure_seconds >= 0:
        raise UserError(f"measure_seconds must be a number of seconds, not negative, not {measure_seconds!r}")
    if inputs is not None and not callable(inputs):
        raise UserError(f"inputs is a {type(inputs).__name__}; expected a function from a batch to the model's inputs")
    if batch_size(*split_example(example_input)) == 0:
        raise UserError("the example input has an empty batch (axis 0): pass at least one image")
    kept = None if chosen.deterministic or store is None else _open_store(store)
    try:
        with _stage(seconds, "capture", "Capturing the model"):
            setup = _set_up(
                model,
                example_input,
                chosen,
                calibration,
                inputs,
                chosen_importance,
                limits,
                fit,
                batch=batch,
                memory=memory,
                distance=distance,
                search=effort,
                refit_kept=refit_kept,
                polish=polishing,
            )
        return _solve(setup, kept, seconds, max_points, measure_seconds, executor, importance_table)
    finally:
        if kept is not None:
            kept.close()


def _set_up(
    model: nn.Module,
    example_input: Example,
    runtime: Runtime,
    calibration: Iterable[Any] | None,
    inputs: Callable[[Any], Any] | None,
    importance: str | Estimator,
    limits: Limits,
    fit: str,
    *,
    batch: int | None,
    memory: str | int,
    distance: Distance | None,
    search: Effort | None,
    refit_kept: bool,
    polish: Effort | None,
) -> _Setup:
    base = clone(capture(model, example_input))
    if not any(True for _ in convolutions(base)):
        raise UnsupportedError(
            f"{type(model).__name__} has no convolution of torch.nn's (Conv1d, Conv2d, Conv3d): there is nothing to compress"
        )
    device = device_of(base)
    example = map_tensors(lambda t: t.detach().to(device), *split_example(example_input))
    notes: list[str] = []
    dynamic = graph_meta(base)["dynamic_batch"]
    if not dynamic:
        notes.append("torch.export keeps the batch size of the example: the result takes no other")
    if batch is not None:
        if not dynamic:
            raise UserError(f"batch={batch} cannot be timed: torch.export keeps the model at the example's batch size")
        example = with_batch(*example, batch)
    read = None if calibration is None else read_calibration(calibration, inputs, base, example, memory)
    if read is not None and read.truncated:
        notes.append(f"calibration stopped at {read.images} images: memory={memory!r} was full")
    estimator = installing(get_estimator(importance, read, fit, memory, distance), read, fit, parse_memory(memory))
    return _Setup(
        base,
        example,
        batch_size(*example) or 1,
        read,
        estimator,
        runtime,
        limits,
        fit,
        parse_memory(memory),
        tuple(notes),
        distance,
        search,
        refit_kept,
        polish,
    )


def _solve(
    setup: _Setup,
    store: LatencyStore | None,
    seconds: dict[str, float],
    max_points: int | None,
    measure_seconds: float,
    executor: Executor | None,
    importance_table: str | os.PathLike[str] | None,
) -> Frontier:
    from .passes.enumerate_segments import enumerate_segments
    from .passes.profile_latency import Deployed, profile_latency
    from .passes.score_importance import score_importance
    from .passes.select_segments import selection_problem
    from .workers import check_executor

    runtime, base = setup.runtime, setup.base
    check_executor(executor, base, setup.estimator)
    if importance_table is not None:
        open_table(importance_table, base, setup.estimator).close()  # refuses before anything is measured
    with _stage(seconds, "analyse", "Listing candidates"):
        enumeration = enumerate_segments(base, setup.limits)
    with _stage(seconds, "measure", "Measuring layers"):
        deployed = merge_graph(base)
        timer = runtime.build(deployed, *setup.example)
        original = interleave([timer], measure_seconds, deterministic=runtime.deterministic)[0]
        inputs = Deployed(deployed, *setup.example)
        table = profile_latency(base, enumeration, runtime, setup.batch, original.latency, store, inputs)
    # What is no faster than leaving the network alone is never chosen: do not spend time on scoring it.
    useful = tuple(site for site in enumeration.sites if table.of(site.candidate) < table.replaced(site.candidate))
    worth = replace(enumeration, sites=useful)
    with _stage(seconds, "score", "Scoring candidates"):
        losses = score_importance(base, worth, setup.estimator, executor, importance_table)
    with _stage(seconds, "solve", "Solving"):
        points = solve(selection_problem(worth, table, losses), max_points=max_points)
    return Frontier(setup, enumeration, useful, table, losses, points, original, timer, seconds, measure_seconds)


def _best_of(tries: Sequence[Timing]) -> Timing:
    """The fastest of several tries; how far the second fastest is from it says how far it can be trusted."""
    latencies = sorted(timing.latency for timing in tries)
    spread = (latencies[1] - latencies[0]) / latencies[0] if len(tries) > 1 else tries[0].repeatability
    return Timing(latencies[0], spread, sum(timing.runs for timing in tries))


def fold(model: nn.Module, example_input: Example) -> fx.GraphModule:
    """Fold what is already linear in a model, exactly: a new network in eval mode; the model stays untouched.

    Convolutions with their batch norms, unpadded chains, a 1x1 convolution without bias before a padded one, branches that are
    added (RepVGG): wherever one convolution computes the same and costs no more. No padding is moved: what has inner padding is
    left, and ``gm.meta["fxmerge"]["refusals"]`` says so.

    Args:
        model: any module that ``torch.export`` traces.
        example_input: a tensor, a tuple (positional inputs) or a dict (keyword inputs).

    Raises:
        UserError: see :func:`fxmerge.capture`.
        CaptureError: see :func:`fxmerge.capture`.
        InternalError: a folded convolution is not what it replaces.

    Example:
        >>> import torch, fxmerge
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> [type(m).__name__ for m in fxmerge.fold(net, torch.randn(2, 3, 8, 8)).children()]
        ['Conv2d']
    """
    from .passes.fold import FoldPass, FoldResult

    base = clone(capture(model, example_input)).eval()
    example = map_tensors(lambda t: t.detach().to(device_of(base)), *split_example(example_input))
    outcome = FoldPass()(clone(base))
    assert isinstance(outcome, FoldResult)  # noqa: S101 - tells the type checker what the pass returns
    inputs = distinct_inputs(base, example)
    check_equal(base, outcome.graph_module, inputs, own_error(base, inputs, outputs_of(base, inputs)))
    listed = [{"code": r.code, "first": r.convolution, "last": r.node, "reason": r.reason} for r in outcome.refusals]
    graph_meta(outcome.graph_module)["refusals"] = listed
    folded: fx.GraphModule = outcome.graph_module
    return folded


def _open_store(store: str | os.PathLike[str]) -> LatencyStore:
    return LatencyStore(default_path() if store == "default" else Path(store))


def _about_data(setup: _Setup) -> str:
    """What the network was chosen and its weights found with: a line of the report, and part of an evaluation's identity."""
    importance = f"importance is {setup.estimator.name}"
    if setup.calibration is None:
        return f"No calibration data: {importance}, weights are composed, batch-norm statistics are the original's."
    parts = [importance]
    if setup.fit == "refit":
        parts += ["merged convolutions refitted"] + ["kept convolutions, too"] * setup.refit_kept
    else:
        parts += ["weights composed", "batch-norm statistics re-estimated"]
    parts += [] if setup.distance is None else [f"distance of outputs by {metric_name(setup.distance)}"]
    parts += [] if setup.search is None else [f"verified selection ({setup.search})"]
    parts += [] if setup.polish is None else [f"polish ({setup.polish})"]
    return f"Calibrated on {setup.calibration.images} images: {', '.join(parts)}."


@contextmanager
def _stage(seconds: dict[str, float], name: str, title: str) -> Iterator[None]:
    start = time.perf_counter()
    with progress(title):
        yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
