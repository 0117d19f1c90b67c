"""The frontier with quality on it: a metric of the user's, measured on the networks of several budgets.

:meth:`fxmerge.Frontier.evaluate` hands back a :class:`Quality`: plain data, to JSON and back, and a table in text and in
Markdown; :func:`fxmerge.plotting.plot` draws it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budget import parse_budget
from .errors import BudgetError, StoreError, UserError
from .files import write_files
from .plan import format_latency
from .progress import progress

if TYPE_CHECKING:
    from torch import fx, nn

    from .result import Result

__all__ = [
    "BUDGETS",
    "Quality",
    "Row",
    "Subject",
    "Unreachable",
    "check_evaluation",
    "evaluate_budgets",
    "metric_name",
    "read_quality",
    "short_hash",
    "weights_hash",
]

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.3)
"""Shares of the original that are evaluated where none are named."""

_FORMAT = "fxmerge.quality/1"
_WIDTHS = (10, 13, 7, 13, 10, 12, 12)
"""Characters of the columns, so that a row can be printed before the others are known."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated: all that must agree for one evaluation to continue another.

    Attributes:
        network: the class of the network.
        structure: hash of its structure (:func:`fxmerge.graph.structure`).
        weights: hash of its parameters, buffers and constants.
        runtime: the runtime's environment, and its ``name``.
        unit: of all latencies, ``ms`` or ``MACs``.
        batch: images in a run.
        search: what bounds the search.
        data: what the candidates were scored with and how weights are found.
        metric: the name of the metric.
    """

    network: str
    structure: str
    weights: str
    runtime: Mapping[str, str]
    unit: str
    batch: int
    search: str
    data: str
    metric: str

    @property
    def where(self) -> str:
        """Runtime, device and batch, for titles."""
        named = [self.runtime.get("runtime", self.runtime["name"])]
        named += [self.runtime["device"]] if "device" in self.runtime else []
        return ", ".join([*named, f"batch {self.batch}"])


@dataclass(frozen=True, slots=True)
class Row:
    """The network of one budget.

    Latencies are end to end, in the unit of the subject; ``original`` is that of the original, measured in alternation with
    ``measured``.
    """

    budget: str
    requested: float
    predicted: float
    measured: float
    original: float
    convolutions: int
    parameters: int
    metric: float

    @property
    def share(self) -> float:
        """The measured latency as a share of the original's."""
        return self.measured / self.original


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A budget that no plan keeps; ``smallest`` is the smallest latency in reach, ``original`` the original's."""

    budget: str
    requested: float
    smallest: float
    original: float


@dataclass(frozen=True, slots=True)
class Quality:
    """What an evaluation has found; ``print`` it, or draw it with :func:`fxmerge.plotting.plot`.

    Attributes:
        subject: what was evaluated.
        original: the original, as it is deployed.
        rows: one for every budget, in the order of evaluation.
    """

    subject: Subject
    original: Row
    rows: tuple[Row | Unreachable, ...]

    @property
    def networks(self) -> tuple[Row, ...]:
        """The original, and the networks of all budgets in reach."""
        return (self.original, *(row for row in self.rows if isinstance(row, Row)))

    @property
    def title(self) -> str:
        """The network and the metric, in one line."""
        return f"{self.subject.network}: {self.subject.metric} at several budgets"

    def table(self) -> list[list[str]]:
        """Headings, the original, and every budget; the row of a budget out of reach has two cells: budget and remark."""
        headings = ["budget", "measured", "share", "predicted", self.subject.metric, "convolutions", "parameters"]
        return [headings, *(self._cells(row) for row in (self.original, *self.rows))]

    def _cells(self, row: Row | Unreachable) -> list[str]:
        def show(latency: float) -> str:
            return format_latency(latency, self.subject.unit)

        if isinstance(row, Unreachable):
            share = row.smallest / row.original
            return [row.budget, f"out of reach: the smallest reachable is {show(row.smallest)} ({share:.1%})"]
        latencies = [show(row.measured), f"{row.share:.1%}", show(row.predicted)]
        return [row.budget, *latencies, f"{row.metric:.5g}", f"{row.convolutions}", f"{row.parameters:,}"]

    def lines(self) -> list[str]:
        """The lines of the text; a further row adds one and changes none."""
        widths = [max(width, len(name)) for width, name in zip(_WIDTHS, self.table()[0], strict=True)]
        cells = ([cell.rjust(width) for cell, width in zip(row, widths, strict=False)] for row in self.table())
        return [self.title, self.subject.where, "", *("  ".join(row) for row in cells)]

    def markdown(self) -> str:
        """The table in Markdown."""
        headings, *rows = ([_escape_markdown(cell) for cell in row] for row in self.table())
        padded = (row + [""] * (len(headings) - len(row)) for row in rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---:"] * len(headings), *padded))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        return f"Quality({self.subject.network}, {self.subject.metric}, {len(self.rows)} budgets)"

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it back."""
        subject = {**asdict(self.subject), "runtime": dict(self.subject.runtime)}
        rows = [_row_to_json(row) for row in self.rows]
        return {"format": _FORMAT, "subject": subject, "original": _row_to_json(self.original), "rows": rows}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Quality:
        """Read what :meth:`to_json` wrote.

        Raises:
            StoreError: it is no evaluation of this version.
        """
        try:
            if data["format"] != _FORMAT:
                raise StoreError(
                    f"this evaluation has the format {data['format']!r}; this version of fxmerge reads {_FORMAT!r}"
                )
            rows = tuple(Unreachable(**row) if "smallest" in row else _row_from_json(row) for row in data["rows"])
            return Quality(Subject(**data["subject"]), _row_from_json(data["original"]), rows)
        except StoreError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"this is no evaluation of fxmerge's: {error!r}") from error


def _row_to_json(row: Row | Unreachable) -> dict[str, Any]:
    data = asdict(row)
    if isinstance(row, Row) and not math.isfinite(row.metric):
        data["metric"] = str(row.metric)  # JSON has no NaN and no infinity
    return data


def _row_from_json(data: Mapping[str, Any]) -> Row:
    return Row(**{**data, "metric": float(data["metric"])})


def _escape_markdown(text: str) -> str:
    return "".join(f"\\{letter}" if letter in r"\|*_`<[" else letter for letter in text)


def read_quality(path: str | os.PathLike[str]) -> Quality:
    """Read the file of an evaluation.

    Raises:
        StoreError: the file cannot be read, or holds no evaluation of this version.
    """
    try:
        return Quality.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as an evaluation of fxmerge's: {error}") from error


def short_hash(lines: Iterable[str]) -> str:
    """Sixteen hexadecimal digits for lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def weights_hash(gm: fx.GraphModule) -> str:
    """A hash of the names, types, shapes and values of a canonical graph's parameters, buffers and constants.

    Raises:
        UnsupportedError: a tensor without plain values, see :func:`fxmerge.serialize.state_tensors`.
    """
    import torch

    from .serialize import state_tensors

    def line(name: str, tensor: torch.Tensor) -> str:
        values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(values.tobytes()).hexdigest()}"

    return short_hash(line(name, tensor) for name, tensor in sorted(state_tensors(gm)[0].items()))


def metric_name(metric: Callable[..., object], name: str | None = None) -> str:
    """What a metric is called: ``name``, else the function's own name or the class of an object that can be called.

    Raises:
        UserError: it cannot be called.
    """
    if not callable(metric):
        raise UserError(f"the metric is a {type(metric).__name__}; expected a function of a torch.nn.Module")
    return str(getattr(metric, "__name__", type(metric).__name__)) if name is None else name


def check_evaluation(
    budgets: Iterable[float | str] | float | str,
    unit: str,
    save: str | os.PathLike[str] | None,
    save_results: str | os.PathLike[str] | None,
    expected: Mapping[str, Any],
) -> tuple[list[str], Quality | None]:
    """Refuse, before any work, what an evaluation could not do.

    Args:
        budgets: see :meth:`fxmerge.Frontier.evaluate`; one alone is taken too.
        unit: the runtime's.
        save: see there.
        save_results: see there.
        expected: what is known of the :class:`Subject`, by attribute.

    Returns:
        The budgets as they are written in rows, and what the file ``save`` holds, None where it does not exist.

    Raises:
        BudgetError: a budget cannot be read.
        UserError: there is no budget, or a path cannot be written.
        StoreError: a file or folder is there and is not fxmerge's, or the file is of another evaluation; it is left untouched.
    """
    listed: Sequence[float | str] = [budgets] if isinstance(budgets, (str, float, int)) else list(budgets)
    labels = [_label(budget, unit) for budget in listed]
    if not labels:
        raise UserError("there is no budget to evaluate: name at least one, such as 0.6")
    if save_results is not None:
        for label in labels:
            _check_folder(_folder(save_results, label))
    if save is None:
        return labels, None
    path = Path(save)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{path} cannot be written: it is a folder, or its folder is missing or takes no files")
    if not path.exists():
        return labels, None
    found = read_quality(path)
    for name, wanted in expected.items():
        held = getattr(found.subject, name)
        if held != wanted:
            raise StoreError(
                f"{path} is of another evaluation: its {name} is {_plain(held, wanted)}, here it is {_plain(wanted, held)}. It "
                "was left untouched; name another file, or remove this one"
            )
    return labels, found


def _label(budget: float | str, unit: str) -> str:
    """A budget as rows show it: two ways to write one share are one label."""
    parsed = parse_budget(budget, unit)
    return f"{100 * parsed.value:.10g}%" if parsed.unit is None else "".join(parsed.text.split())


def _folder(results: str | os.PathLike[str], label: str) -> Path:
    return Path(results, label.replace("%", "pct"))


def _check_folder(folder: Path) -> None:
    from .serialize import load_documents

    if folder.is_dir() and any(folder.iterdir()):
        load_documents(folder)  # refuses what is not fxmerge's
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise StoreError(f"{folder} cannot be written: {above} is no folder, or there is no permission to write there")


def _plain(value: Any, other: Any) -> str:
    """A value for a message; of a mapping only what differs from another."""
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return str(value).removesuffix(".")
    differing = [key for key in sorted({*value, *other}) if value.get(key) != other.get(key)]
    return ", ".join(f"{key} {value.get(key, 'unknown')}" for key in differing)


def evaluate_budgets(
    start: Quality,
    network: Callable[[], nn.Module],
    compress: Callable[[str], Result],
    metric: Callable[[nn.Module], float],
    budgets: Iterable[float | str] | float | str,
    *,
    save: str | os.PathLike[str] | None = None,
    save_results: str | os.PathLike[str] | None = None,
    on_row: Callable[[Quality], None] | None = None,
) -> Quality:
    """The evaluation itself: everything that :meth:`fxmerge.Frontier.evaluate` says, which calls it.

    Args:
        start: the subject, and the original with any number for its metric.
        network: makes the original as it is deployed.
        compress: makes the result of a budget.
        metric: see there.
        budgets: see there.
        save: see there.
        save_results: see there.
        on_row: see there.
    """
    subject = {field.name: getattr(start.subject, field.name) for field in fields(Subject)}
    labels, found = check_evaluation(budgets, start.subject.unit, save, save_results, subject)

    def hand_on(quality: Quality) -> Quality:
        if save is not None:
            try:
                write_files({Path(save): (json.dumps(quality.to_json(), indent=1) + "\n").encode()})
            except OSError as error:
                raise StoreError(f"{save} cannot be written: {error}") from error
        if on_row is not None:
            on_row(quality)
        return quality

    with progress("Evaluating budgets", len(labels)) as bar:
        if found is None:
            found = replace(start, original=replace(start.original, metric=_score(metric, network())))
        quality = hand_on(found)
        for label in labels:
            folder = None if save_results is None else _folder(save_results, label)
            if not any(row.budget == label and _is_done(row, folder) for row in quality.rows):
                row = _evaluate(label, start, compress, metric, folder)
                others = (each for each in quality.rows if each.budget != label)
                quality = hand_on(replace(quality, rows=(*others, row)))
            bar.advance(1, label)
    return quality


def _is_done(row: Row | Unreachable, folder: Path | None) -> bool:
    """False where the network is wanted in a folder and is not there: it has to be made again."""
    return isinstance(row, Unreachable) or folder is None or folder.is_dir()


def _evaluate(
    label: str,
    start: Quality,
    compress: Callable[[str], Result],
    metric: Callable[[nn.Module], float],
    folder: Path | None,
) -> Row | Unreachable:
    try:
        result = compress(label)
    except BudgetError as error:
        if error.smallest is None:
            raise
        original = start.original.measured
        return Unreachable(label, parse_budget(label, start.subject.unit).resolve(original), error.smallest, original)
    if folder is not None:
        result.save(folder)  # before the metric, which may fail
    report = result.report
    latencies = (report.requested, report.predicted, report.measured, report.original)
    score = _score(metric, result.merge())
    return Row(label, *latencies, report.after.convolutions, report.after.parameters, score)


def _score(metric: Callable[[nn.Module], float], network: nn.Module) -> float:
    value = metric(network)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the metric returned a {type(value).__name__}; expected a number: {error}") from error
