"""Efforts: what a time or a number is read as, and what is refused."""

from __future__ import annotations

import pytest

from fxmerge.effort import Effort, parse_effort
from fxmerge.errors import UserError


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (20, Effort(20, None)),
        ("30s", Effort(None, 30.0)),
        ("1.5 min", Effort(None, 90.0)),
        ("2h", Effort(None, 7200.0)),
        (None, None),
    ],
)
def test_efforts(search, expected):
    assert parse_effort(search, "search", "networks") == expected


@pytest.mark.parametrize("value", ["", "1", "fast", "-3s", 0, -1, True, 1.5, "1 year"])
def test_what_is_no_effort_is_refused(value):
    message = r"polish=.* is no effort; expected a time such as '1min' or '30s', a number of steps such as 20, or None"
    with pytest.raises(UserError, match=message):
        parse_effort(value, "polish", "steps")
