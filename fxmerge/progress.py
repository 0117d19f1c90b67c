"""Progress of what takes longer than two seconds: a bar on a terminal, log lines elsewhere.

Nothing is ever written to stdout. On a terminal the bars go to stderr and are gone when the work
is; elsewhere lines go to ``logging.getLogger("fxmerge")`` at level INFO. What is shown is redrawn
once a second at most, so that watching a measurement does not disturb it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

from fxmerge.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["Bar", "ProgressMode", "progress", "set_progress"]

ProgressMode = Literal["auto", "rich", "plain", "off"]

_ENVIRONMENT = "FXMERGE_PROGRESS"
_QUIET_SECONDS = 2.0  # what is over sooner is never shown
_REDRAW_SECONDS = 1.0
_LINE_SECONDS = 5.0  # between two log lines; a tenth of the elapsed time where that is longer

_log = logging.getLogger("fxmerge")


def set_progress(mode: ProgressMode) -> None:
    """Choose how progress is shown from now on, in the whole process.

    Args:
        mode: "auto" (the default): bars where stderr is a terminal, log lines elsewhere; "rich":
            bars; "plain": log lines; "off": nothing. Without a call the environment variable
            ``FXMERGE_PROGRESS`` decides. Stages that are running keep what they began with.

    Raises:
        UserError: the mode is not one of the four.

    Example:
        >>> set_progress("off")
        >>> set_progress("loud")
        Traceback (most recent call last):
        fxmerge.errors.UserError: progress mode 'loud' does not exist; choose auto, rich, plain, off
        >>> set_progress("auto")
    """
    _display.mode = _checked(mode, "progress mode")


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Bar]:
    """Show how far a stage has come, once it has run for two seconds.

    Stages nest: one that begins while another runs is shown below it, or after it in log lines.
    Other threads may advance the bar.

    Args:
        title: what is being done, for example "Measuring candidates".
        total: how many steps it takes; None where that is not known.

    Yields:
        The bar to advance.

    Raises:
        UserError: the environment variable ``FXMERGE_PROGRESS`` names no mode.

    Example:
        >>> with progress("Measuring candidates", total=2) as bar:
        ...     for name in ("conv1", "conv2"):
        ...         bar.advance(1, name)
        >>> bar.done
        2
    """
    with _display.stage(title, total) as bar:
        yield bar


@dataclass(eq=False)
class Bar:
    """A running stage; :func:`progress` makes it."""

    title: str
    total: int | None
    started: float
    done: int = 0
    note: str = ""
    _display: _Display | None = field(default=None, repr=False)

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count steps as done.

        Args:
            steps: how many.
            note: what is at hand, shown at the end of the line; None keeps the last one.
        """
        if self._display is None:
            self.done += steps
        else:
            self._display.advance(self, steps, note)

    def advance_to(self, done: int, total: int) -> None:
        """Say how many steps are done, of how many."""
        self.total = total
        self.advance(done - self.done)


class _View(Protocol):
    """A way to show bars. The display calls it with its lock held."""

    def draw(self, bars: Sequence[Bar], now: float) -> None: ...

    def finish(self, bar: Bar, now: float, failed: bool) -> None: ...

    def close(self) -> None: ...


class _Display:
    """The running stages, and the view that shows them.

    Args:
        clock: seconds, never going back.
        heartbeat: seconds between two looks at the clock while nothing advances; None for never.
        console: where rich draws; None for stderr.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        heartbeat: float | None = _REDRAW_SECONDS,
        console: Console | None = None,
    ) -> None:
        self.mode: ProgressMode | None = None
        self._clock = clock
        self._heartbeat = heartbeat
        self._console = console
        self._lock = threading.RLock()
        self._bars: list[Bar] = []
        self._view: _View | None = None
        self._stop = threading.Event()

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Bar]:
        if not self._bars and self._resolved() == "off":
            yield Bar(title, total, self._clock())
            return
        bar = self._enter(title, total)
        failed = True
        try:
            yield bar
            failed = False
        finally:
            self._leave(bar, failed)

    def advance(self, bar: Bar, steps: int, note: str | None) -> None:
        with self._lock:
            bar.done += steps
            bar.note = bar.note if note is None else note
            self.tick()

    def tick(self) -> None:
        """Draw the stages that have run long enough to be shown."""
        with self._lock:
            now = self._clock()
            shown = [bar for bar in self._bars if now - bar.started >= _QUIET_SECONDS]
            if shown and self._view is not None:
                self._view.draw(shown, now)

    def _enter(self, title: str, total: int | None) -> Bar:
        with self._lock:
            if not self._bars:
                self._open()
            bar = Bar(title, total, self._clock(), _display=self)
            self._bars.append(bar)
            return bar

    def _open(self) -> None:
        rich = self._resolved() == "rich"
        self._view = _RichView(self._console) if rich else _PlainView()
        self._stop = threading.Event()
        if self._heartbeat is not None:
            threading.Thread(target=self._beat, args=(self._stop, self._heartbeat), daemon=True).start()

    def _beat(self, stop: threading.Event, seconds: float) -> None:
        while not stop.wait(seconds):
            self.tick()

    def _leave(self, bar: Bar, failed: bool) -> None:
        with self._lock:
            self._bars.remove(bar)
            view, now = self._view, self._clock()
            if view is None:
                return
            try:
                if now - bar.started >= _QUIET_SECONDS:
                    view.finish(bar, now, failed)
            finally:
                if not self._bars:
                    self._stop.set()
                    self._view = None
                    view.close()

    def _resolved(self) -> Literal["rich", "plain", "off"]:
        mode = self.mode or _checked(os.environ.get(_ENVIRONMENT) or "auto", _ENVIRONMENT)
        if mode != "auto":
            return mode
        terminal = sys.stderr is not None and sys.stderr.isatty()
        return "rich" if terminal and os.environ.get("TERM") != "dumb" else "plain"


class _PlainView:
    """Log lines, few of them: of the innermost stage, and of every one that ends."""

    def __init__(self) -> None:
        self._next_line = float("-inf")

    def draw(self, bars: Sequence[Bar], now: float) -> None:
        bar = bars[-1]
        if now < self._next_line:
            return
        self._next_line = now + max(_LINE_SECONDS, (now - bar.started) / 10)
        titles = " > ".join(shown.title for shown in bars)
        _log.info("%s: %s", titles, _status(bar, now))

    def finish(self, bar: Bar, now: float, failed: bool) -> None:
        taken = _duration(now - bar.started)
        if failed:
            _log.info("%s: stopped%s after %s", bar.title, "".join(f" at {count}" for count in _count(bar)), taken)
        else:
            _log.info("%s: %s", bar.title, ", ".join([*_count(bar), f"done in {taken}"]))

    def close(self) -> None:
        pass


class _RichView:
    """One bar below the other on a terminal, all gone at the end."""

    def __init__(self, console: Console | None) -> None:
        from rich import console as rich_console
        from rich import progress as rich_progress

        # The text is ours and the user's: square brackets in a module's name are no markup. The
        # standard streams stay alone: swapping them in the middle of a user's program is no
        # business of a progress display.
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.fields[status]}", markup=False),
            console=console or rich_console.Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._tasks: dict[Bar, TaskID] = {}
        self._next_draw = float("-inf")

    def draw(self, bars: Sequence[Bar], now: float) -> None:
        if now < self._next_draw:
            return
        self._next_draw = now + _REDRAW_SECONDS
        for bar in bars:
            if bar not in self._tasks:
                self._tasks[bar] = self._progress.add_task(bar.title, total=bar.total, status="")
            self._progress.update(self._tasks[bar], completed=bar.done, status=_status(bar, now))
        self._progress.start()
        self._progress.refresh()

    def finish(self, bar: Bar, now: float, failed: bool) -> None:
        del now, failed
        task = self._tasks.pop(bar, None)
        if task is not None:
            self._progress.remove_task(task)

    def close(self) -> None:
        self._progress.stop()


def _checked(mode: str, source: str) -> ProgressMode:
    modes = get_args(ProgressMode)
    if mode not in modes:
        raise UserError(f"{source} {mode!r} does not exist; choose {', '.join(modes)}")
    return cast("ProgressMode", mode)


def _status(bar: Bar, now: float) -> str:
    elapsed = now - bar.started
    parts = [*_count(bar), _duration(elapsed)]
    if bar.total is not None and 0 < bar.done < bar.total:
        parts.append(f"about {_duration(elapsed * (bar.total - bar.done) / bar.done)} left")
    return ", ".join(parts) + (f" ({bar.note})" if bar.note else "")


def _count(bar: Bar) -> list[str]:
    """How far a stage is, where it counts steps at all."""
    if bar.total is None:
        return [f"{bar.done}"] if bar.done else []
    return [f"{bar.done}/{bar.total}"]


def _duration(seconds: float) -> str:
    """Write a duration as a person would say it.

    >>> _duration(14.4), _duration(125), _duration(7260)
    ('14 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_display = _Display()
