from __future__ import annotations

import io
import logging
import threading

import pytest
from rich.console import Console

from fxmerge.errors import UserError
from fxmerge.progress import _Display, progress, set_progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(caplog, capsys):
    caplog.set_level(logging.INFO, logger="fxmerge")
    yield lambda: [record.getMessage() for record in caplog.records]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def display(clock, mode, console=None):
    made = _Display(clock=clock, heartbeat=None, console=console)
    made.mode = mode
    return made


def run(shown, clock, seconds, steps):
    with shown.stage("Measuring", steps) as bar:
        for step in range(steps):
            clock.now += seconds / steps
            bar.advance(1, f"conv{step}")


def test_nothing_is_logged_before_two_seconds(clock, lines):
    run(display(clock, "plain"), clock, seconds=1.9, steps=19)
    assert lines() == []


def test_lines_begin_after_two_seconds_are_few_and_end_with_the_total(clock, lines):
    run(display(clock, "plain"), clock, seconds=16.0, steps=16)
    assert lines() == [
        "Measuring: 2/16, 2 s, about 14 s left (conv1)",
        "Measuring: 7/16, 7 s, about 9 s left (conv6)",
        "Measuring: 12/16, 12 s, about 4 s left (conv11)",
        "Measuring: 16/16, done in 16 s",
    ]


def test_lines_get_rarer_in_a_long_run(clock, lines):
    run(display(clock, "plain"), clock, seconds=3600.0, steps=3600)
    assert 30 < len(lines()) < 60  # one every five seconds would be 720


def test_a_stage_that_never_advances_is_shown_by_the_heartbeat(clock, lines):
    shown = display(clock, "plain")
    with shown.stage("Waiting", None):
        clock.now += 3
        shown.tick()
    assert lines() == ["Waiting: 3 s", "Waiting: done in 3 s"]


def test_the_heartbeat_beats_while_a_stage_runs_and_then_ends(lines):
    ticked = threading.Event()
    shown = _Display(heartbeat=0.001)
    shown.mode = "plain"
    shown.tick = ticked.set
    before = threading.active_count()
    with shown.stage("Waiting", None):
        assert ticked.wait(5)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(5)
    assert threading.active_count() <= before
    assert lines() == []


def test_nested_stages_name_their_parents(clock, lines):
    shown = display(clock, "plain")
    with shown.stage("Compressing", 2) as outer:
        with shown.stage("Measuring", 4) as inner:
            clock.now += 3
            inner.advance(3)
        outer.advance()
        with shown.stage("Selecting", None):
            clock.now += 1
        clock.now += 4
        outer.advance()
    assert lines() == [
        "Compressing > Measuring: 3/4, 3 s, about 1 s left",
        "Measuring: 3/4, done in 3 s",
        "Compressing: 2/2, 8 s",
        "Compressing: 2/2, done in 8 s",
    ]


def test_a_failed_stage_says_where_it_stopped_and_the_next_one_works(clock, lines):
    shown = display(clock, "plain")

    def fail():
        with shown.stage("Measuring", 9) as bar:
            clock.now += 3
            bar.advance(4)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        fail()
    assert lines()[-1] == "Measuring: stopped at 4/9 after 3 s"
    run(shown, clock, seconds=4.0, steps=1)
    assert lines()[-1] == "Measuring: 1/1, done in 4 s"


def test_off_shows_nothing_and_still_counts(clock, lines):
    with display(clock, "off").stage("Measuring", 2) as bar:
        clock.now += 60
        bar.advance(2)
        assert bar.done == 2
    assert lines() == []


@pytest.fixture
def terminal():
    return Console(file=Terminal(), force_terminal=True, width=100, color_system=None)


def test_a_terminal_shows_nothing_before_two_seconds(clock, lines, terminal):
    run(display(clock, "rich", terminal), clock, seconds=1.9, steps=19)
    assert terminal.file.getvalue() == ""
    assert lines() == []


def test_a_terminal_shows_bars_of_nested_stages(clock, lines, terminal):
    shown = display(clock, "rich", terminal)
    with shown.stage("Compressing", 3) as outer:
        with shown.stage("Measuring [fast]", 4) as inner:
            clock.now += 6
            inner.advance(3, "net[conv]")
            drawn = terminal.file.getvalue()
        outer.advance()
    assert "Compressing" in drawn
    assert "0/3, 6 s" in drawn
    assert "Measuring [fast]" in drawn  # no markup: brackets stay
    assert "3/4, 6 s, about 2 s left (net[conv])" in drawn
    assert lines() == []


def test_a_terminal_is_redrawn_once_a_second_at_most(clock, terminal):
    shown = display(clock, "rich", terminal)
    with shown.stage("Measuring", 1000) as bar:
        clock.now += 3
        bar.advance()
        drawn = len(terminal.file.getvalue())
        for _ in range(9):
            clock.now += 0.1
            bar.advance()
        assert len(terminal.file.getvalue()) == drawn
        clock.now += 0.11
        bar.advance()
        assert len(terminal.file.getvalue()) > drawn


HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


def test_an_exception_leaves_the_terminal_clean(clock, terminal):
    shown = display(clock, "rich", terminal)

    def interrupt():
        with shown.stage("Measuring", 2) as bar:
            clock.now += 3
            bar.advance()
            assert HIDE_CURSOR in terminal.file.getvalue()
            assert SHOW_CURSOR not in terminal.file.getvalue()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    after = terminal.file.getvalue()
    assert after.rindex(SHOW_CURSOR) > after.rindex(HIDE_CURSOR)
    assert after.rindex(ERASE_LINE) > after.rindex("Measuring")


@pytest.mark.parametrize(
    ("terminal_type", "is_terminal", "expected"),
    [("xterm", True, "rich"), ("dumb", True, "plain"), ("xterm", False, "plain")],
)
def test_auto_takes_bars_on_a_terminal(monkeypatch, clock, terminal_type, is_terminal, expected):
    monkeypatch.setenv("TERM", terminal_type)
    monkeypatch.setattr("sys.stderr", Terminal() if is_terminal else io.StringIO())
    assert display(clock, "auto")._resolved() == expected


def test_the_environment_decides_until_a_call_does(monkeypatch, clock):
    monkeypatch.setenv("FXMERGE_PROGRESS", "off")
    assert display(clock, None)._resolved() == "off"
    assert display(clock, "plain")._resolved() == "plain"
    monkeypatch.setenv("FXMERGE_PROGRESS", "")
    assert display(clock, None)._resolved() in {"plain", "rich"}


def test_a_wrong_mode_is_named_with_the_allowed_ones(monkeypatch, clock):
    with pytest.raises(UserError) as caught:
        set_progress("loud")
    assert str(caught.value) == ("progress mode 'loud' does not exist; choose auto, rich, plain, off")
    monkeypatch.setenv("FXMERGE_PROGRESS", "loud")
    with pytest.raises(UserError, match=r"^FXMERGE_PROGRESS 'loud' does not exist; choose auto,"):
        display(clock, None).stage("Measuring", 1).__enter__()


def test_set_progress_governs_the_public_function(monkeypatch, clock, lines):
    shown = _Display(clock=clock, heartbeat=None)
    monkeypatch.setattr("fxmerge.progress._display", shown)
    for mode, expected in (("off", 0), ("plain", 2)):
        set_progress(mode)
        with progress("Measuring", total=2) as bar:
            clock.now += 3
            bar.advance()
        assert len(lines()) == expected


def test_threads_lose_no_step(clock, lines):
    with display(clock, "plain").stage("Measuring", 4000) as bar:
        threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bar.done == 4000
    assert lines() == []
