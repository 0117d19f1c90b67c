"""Plots of an evaluation: metric against measured latency, as a PNG image or as one self-contained HTML page."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MissingPackageError, UserError
from .files import write_files
from .quality import Quality, Row, Unreachable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot", "plot"]

_SIZE = (960, 600)
_DPI = 128
"""A power of two: sizes in inches and back to pixels lose nothing."""
_BLUE, _ORANGE, _GREY = "#1f4e79", "#f2a33a", "#767676"
"""Dark, light and between in greyscale, too; the original is also told by its shape."""
_TICKS = 6
_LABELS_APART = (0.06, 0.05)
"""Of the width and height: a label nearer to one before it is left out."""


def plot(quality: Quality, path: str | os.PathLike[str], *, size: tuple[int, int] = _SIZE) -> Path:
    """Draw the metric of every network against its measured latency.

    Labels are measured shares of the original. ``.png`` is an image; ``.html`` is one file that refers to nothing outside, with
    all there is to know of a point where the pointer is on it, and the table below. Networks whose metric is not finite are
    not drawn.

    Args:
        quality: what :meth:`fxmerge.Frontier.evaluate` found, or :func:`fxmerge.quality.read_quality` read.
        path: ending in ``.png`` or ``.html``; an existing file is replaced.
        size: width and height in pixels, of the image or of the chart in the page; from 320 to 16384 pixels each.

    Returns:
        The path.

    Raises:
        UserError: the path cannot be written or has another suffix, the size is none, or no metric is finite.
        MissingPackageError: for ``.png`` matplotlib is not installed.
    """
    target = check_plot(path)
    if len(size) != 2 or not all(isinstance(side, int) and 320 <= side <= 16384 for side in size):
        raise UserError(f"size is {size!r}; expected width and height in pixels, each from 320 to 16384")
    chart = _chart(quality)
    draw = _png if target.suffix == ".png" else _html
    content = draw(quality, chart, size)
    try:
        write_files({target: content})
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    return target


def check_plot(path: str | os.PathLike[str]) -> Path:
    """The path, if :func:`plot` can write it.

    Raises:
        UserError: it has another suffix, or cannot be written.
        MissingPackageError: matplotlib is needed and not installed.
    """
    target = Path(path)
    if target.suffix not in (".png", ".html"):
        raise UserError(f"cannot plot to {str(target)!r}: expected a path ending in .png or .html")
    if target.is_dir() or not os.access(target.absolute().parent, os.W_OK):
        raise UserError(f"cannot plot to {str(target)!r}: it is a folder, or its folder is missing or takes no files")
    if target.suffix == ".png":
        _figure_class()
    return target


# --- what is drawn ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    """A network: where it lies, its label (may be empty), all about it, whether it is the original."""

    x: float
    y: float
    label: str
    hover: str
    original: bool


@dataclass(frozen=True, slots=True)
class _Chart:
    """Points from left to right, with the ranges and titles of the axes."""

    points: tuple[_Point, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_title: str
    y_title: str


def _chart(quality: Quality) -> _Chart:
    rows = [row for row in quality.networks if math.isfinite(row.metric)]
    if not rows:
        raise UserError(f"there is nothing to plot: no network has a finite {quality.subject.metric}")
    factor, unit = _axis_unit(max(row.measured for row in rows), quality.subject.unit)
    metrics = [row.metric for row in rows]
    low, high = min(metrics), max(metrics)
    room = (high - low) or abs(high) or 1.0
    y_range = (low - 0.08 * room, high + 0.12 * room)
    x_range = (0.0, 1.07 * max(row.measured for row in rows) / factor)
    points: list[_Point] = []
    for row in rows:  # the original first: it has a label in any case
        x, y = row.measured / factor, row.metric
        apart = (_LABELS_APART[0] * x_range[1], _LABELS_APART[1] * (y_range[1] - y_range[0]))
        near = any(abs(x - p.x) < apart[0] and abs(y - p.y) < apart[1] for p in points if p.label)
        original = row is quality.original
        label = "original" if original else f"{row.share:.0%}"
        points.append(_Point(x, y, "" if near else label, _about(quality, row), original))
    points.sort(key=lambda point: point.x)
    what = "measured latency" if quality.subject.unit == "ms" else "multiply-accumulates"
    return _Chart(tuple(points), x_range, y_range, f"{what} ({unit})", quality.subject.metric)


def _axis_unit(largest: float, unit: str) -> tuple[float, str]:
    """What to divide latencies by, and the unit that they are in then."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if unit == "MACs" else ()
    return next(((factor, prefix + unit) for factor, prefix in prefixes if largest >= factor), (1.0, unit))


def _about(quality: Quality, row: Row) -> str:
    headings, *rows = quality.table()
    cells = rows[(quality.original, *quality.rows).index(row)]
    return "\n".join(f"{name}: {cell}" for name, cell in zip(headings, cells, strict=True))


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers that lie within a range, six or so at most.

    >>> _ticks(0, 13.2), [f"{tick:g}" for tick in _ticks(0.913, 0.991)]
    ([0.0, 5.0, 10.0], ['0.92', '0.94', '0.96', '0.98'])
    """
    least = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    return [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --- PNG ----------------------------------------------------------------------------------------------------------------


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "a .png plot needs a package that is not installed: pip install 'fxmerge[plot]'; a .html plot needs none"
        ) from error
    return Figure


def _png(quality: Quality, chart: _Chart, size: tuple[int, int]) -> bytes:
    figure = _figure_class()(
        figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, facecolor="white", layout="constrained"
    )
    # Names are the user's: a dollar sign in them is no formula.
    columns = size[0] // 8
    figure.suptitle(textwrap.fill(quality.title, columns), fontsize=11, parse_math=False)
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(textwrap.fill(quality.subject.where, columns), fontsize=8, color=_GREY, parse_math=False)
    axes.set_xlim(*chart.x_range)
    axes.set_ylim(*chart.y_range)
    missing = [row.budget for row in quality.rows if isinstance(row, Unreachable)]
    remark = f"\nout of reach: {', '.join(missing)}" if missing else ""
    axes.set_xlabel(textwrap.fill(chart.x_title, columns) + remark, parse_math=False)
    axes.set_ylabel(chart.y_title, parse_math=False)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.plot([point.x for point in chart.points], [point.y for point in chart.points], color=_GREY, linewidth=1)
    for point in chart.points:
        marker, color = ("D", _ORANGE) if point.original else ("o", _BLUE)
        axes.plot([point.x], [point.y], marker, color=color, markersize=8, markeredgecolor="black")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line stays off the label
        place = (point.x, point.y)
        axes.annotate(point.label, place, (0, 9), textcoords="offset points", ha="center", fontsize=8, bbox=behind)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


# --- HTML ---------------------------------------------------------------------------------------------------------------

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: {width}px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.3em; margin: 0; }}
p {{ color: #595959; margin: 0; }}
svg {{ width: 100%; height: auto; font-size: 13px; }}
text {{ paint-order: stroke; stroke: #fff; stroke-width: 4px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{where}</p>
{chart}
{table}
</body>
</html>
"""
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 20, 60


def _html(quality: Quality, chart: _Chart, size: tuple[int, int]) -> bytes:
    page = _PAGE.format(
        title=escape(quality.title),
        where=escape(quality.subject.where),
        width=size[0],
        chart="\n".join(_svg(quality, chart, size)),
        table="\n".join(_table(quality)),
    )
    return page.encode()


def _svg(quality: Quality, chart: _Chart, size: tuple[int, int]) -> list[str]:
    width, height = size

    def scale(limits: tuple[float, float], start: int, end: int) -> Callable[[float], float]:
        return lambda value: round(start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start), 2)

    x, y = scale(chart.x_range, _LEFT, width - _RIGHT), scale(chart.y_range, height - _BOTTOM, _TOP)
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    lines = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(quality.title)}">']
    for tick in _ticks(*chart.x_range):
        lines.append(f'<path d="M{x(tick)} {top}V{bottom}" stroke="#e4e4e4"/>')
        lines.append(_text(x(tick), bottom + 18, f"{tick:.10g}"))
    for tick in _ticks(*chart.y_range):
        lines.append(f'<path d="M{left} {y(tick)}H{right}" stroke="#e4e4e4"/>')
        lines.append(_text(left - 8, y(tick) + 4, f"{tick:.10g}", "end"))
    lines.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{_GREY}"/>')
    lines.append(_text((left + right) / 2, height - 12, chart.x_title))
    middle = (top + bottom) / 2
    lines.append(_text(16, middle, chart.y_title, turn=f' transform="rotate(-90 16 {middle})"'))
    way = " ".join(f"{x(point.x)},{y(point.y)}" for point in chart.points)
    lines.append(f'<polyline points="{way}" fill="none" stroke="{_GREY}"/>')
    for point in chart.points:
        shape = _marker(x(point.x), y(point.y), point.original)
        lines.append(f'<g stroke="black">{shape}<title>{escape(point.hover)}</title></g>')
        if point.label:
            lines.append(_text(x(point.x), y(point.y) - 12, point.label))
    return [*lines, "</svg>"]


def _marker(x: float, y: float, original: bool) -> str:
    if original:
        return f'<path d="M{x} {y}m0 -8l8 8l-8 8l-8 -8z" fill="{_ORANGE}"/>'
    return f'<circle cx="{x}" cy="{y}" r="6" fill="{_BLUE}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", turn: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _table(quality: Quality) -> list[str]:
    headings, *rows = quality.table()
    lines = ["<table>", _table_row("th", headings, len(headings))]
    return [*lines, *(_table_row("td", row, len(headings)) for row in rows), "</table>"]


def _table_row(tag: str, cells: Sequence[str], columns: int) -> str:
    """A row; of one with fewer cells than columns the last spans the rest."""
    *first, last = cells
    span = f' colspan="{columns - len(first)}" style="text-align: left"' if len(cells) < columns else ""
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in first)}<{tag}{span}>{escape(last)}</{tag}></tr>"
