"""Budgets: what is read as a share, what as an amount, and what is refused in which words."""

from __future__ import annotations

import numpy as np
import pytest

from fxmerge.budget import parse_budget
from fxmerge.errors import BudgetError


@pytest.mark.parametrize(
    ("budget", "unit", "value"),
    [
        (0.6, "ms", 0.6),
        (1, "MACs", 1.0),
        ("0.25", "MACs", 0.25),
        ("60%", "ms", 0.6),
        (" 12.5 % ", "MACs", 0.125),
        ("1e-2", "ms", 0.01),
        (1e-05, "ms", 1e-05),
    ],
)
def test_a_number_or_a_percentage_is_a_share_of_the_original(budget, unit, value):
    parsed = parse_budget(budget, unit)
    assert parsed.unit is None
    assert parsed.value == pytest.approx(value, rel=1e-12)
    assert parsed.resolve(200.0) == pytest.approx(200 * value, rel=1e-12)


@pytest.mark.parametrize(
    ("budget", "unit", "value"),
    [
        ("8ms", "ms", 8.0),
        ("8 ms", "ms", 8.0),
        ("1500us", "ms", 1.5),
        ("0.02s", "ms", 20.0),
        ("7MACs", "MACs", 7.0),
        ("7kMACs", "MACs", 7e3),
        ("7MMACs", "MACs", 7e6),
        ("1.2GMACs", "MACs", 1.2e9),
        ("1.2gmacs", "MACs", 1.2e9),
        ("2TMACs", "MACs", 2e12),
    ],
)
def test_an_amount_has_a_unit_and_does_not_depend_on_the_original(budget, unit, value):
    parsed = parse_budget(budget, unit)
    assert parsed.unit == unit
    assert parsed.value == pytest.approx(value, rel=1e-12)
    assert parsed.resolve(200.0) == parsed.value


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("abc", "budget='abc' is not a number"),
        ("", "budget='' is not a number"),
        ("ms", "budget='ms' is not a number"),
        ("0.5.5", "budget='0.5.5' is not a number"),
        (float("nan"), "budget=nan is not a number"),
        (float("inf"), "budget=inf is not a number"),
        (None, "budget=None is a NoneType"),
        (True, "budget=True is a bool"),
        ([0.5], "budget=[0.5] is a list"),
        (0, "budget=0 is not positive"),
        (-1, "budget=-1 is not positive"),
        ("-8ms", "budget='-8ms' is not positive"),
        ("150", "budget='150' is 150 times the original; for an amount add its unit"),
        (150, "budget=150 is 150 times the original; for an amount add its unit"),
        ("8sec", "budget='8sec' has the unknown unit 'sec'"),
        ("1.2GMACs", "budget='1.2GMACs' is in MACs, but this runtime measures ms"),
    ],
)
def test_what_is_no_budget_is_named_with_what_is_expected(budget, words):
    with pytest.raises(BudgetError) as caught:
        parse_budget(budget, "ms")
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(
        "expected a share of the original such as 0.6 or '60%', or an amount such as '8ms' or '1.2GMACs'"
    )


def test_milliseconds_are_no_budget_for_a_runtime_that_counts():
    with pytest.raises(BudgetError, match="budget='8ms' is in ms, but this runtime measures MACs"):
        parse_budget("8ms", "MACs")


def test_a_numpy_float_is_a_number():
    assert parse_budget(np.linspace(0.25, 0.5, 2)[0], "ms").value == 0.25
