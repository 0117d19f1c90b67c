"""Plans as data: to JSON and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fxmerge import Plan
from fxmerge.algebra import Geometry
from fxmerge.candidates import Candidate
from fxmerge.errors import PlanError
from fxmerge.plan import PlanEntry, format_latency

MERGE = Candidate(
    "merge",
    "stem",
    "block/add",
    kept=("block.1", "block.2"),
    bypassed=("block.3",),
    removed=("block.act",),
    cuts=(("block/gate", 1),),
    geometry=Geometry(3, 8, (5, 3), (2, 1), (1, 1), (2, 1), (2, 1), 1),
    activation="ReLU",
)
BYPASS = Candidate("bypass", "a", "b", bypassed=("b",))
DROP = Candidate("drop", "a", "c", bypassed=("d", "e"), cuts=(("join", 0),))
PLAN = Plan(
    (PlanEntry(MERGE, 1.25, 0.1), PlanEntry(BYPASS, 0.0, 1 / 3), PlanEntry(DROP, 0.0, 2e-17)),
    ("stem 0123456789ab", "block.1 ba9876543210"),
    "onnxruntime",
    "ms",
    12.5,
    8.123456789012345,
    0.1 + 1 / 3 + 2e-17,
)


def test_a_plan_goes_to_json_and_back_unchanged():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(json.loads(PLAN.to_json())) == PLAN


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Candidate)])
def test_every_field_of_a_candidate_is_in_the_json(field):
    data = json.loads(PLAN.to_json())
    other = {
        "kind": "drop",
        "geometry": None,
        "activation": None,
        "entry": "x",
        "exit": "x",
        "cuts": [["x", 5]],
    }.get(field, ["x"])
    data["entries"][0]["candidate"][field] = other
    assert Plan.from_json(data) != PLAN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "this is no plan of fxmerge's: JSONDecodeError"),
        ("[]", "this is no plan of fxmerge's: TypeError"),
        ("{}", "this is no plan of fxmerge's: KeyError('format')"),
        ('{"format": "fxmerge.plan/1"}', "this is no plan of fxmerge's: KeyError('entries')"),
        (
            '{"format": "fxmerge.plan/9"}',
            "this plan has the format 'fxmerge.plan/9'; this version of fxmerge reads 'fxmerge.plan/1'",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text, words):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert str(caught.value).startswith(words)


def test_a_candidate_without_a_field_is_refused_by_name():
    data = json.loads(PLAN.to_json())
    del data["entries"][1]["candidate"]["removed"]
    with pytest.raises(PlanError, match=r"this is no candidate of fxmerge's: KeyError\('removed'\)"):
        Plan.from_json(data)


def test_only_what_makes_one_convolution_of_several_is_a_merge():
    alone = Candidate("merge", "a", "b", kept=("a",), bypassed=("b",), geometry=MERGE.geometry)
    plan = dataclasses.replace(PLAN, entries=(*PLAN.entries, PlanEntry(alone, 1.0, 0.0)))
    assert plan.candidates == (MERGE, BYPASS, DROP, alone)
    assert plan.merges == (MERGE,)


def test_a_printed_plan_has_a_line_for_every_change():
    lines = str(PLAN).splitlines()
    assert lines[0] == "Plan on onnxruntime: 12.500 ms -> 8.123 ms predicted, 3 changes, loss 0.4333"
    assert [line.split()[:3] for line in lines[1:]] == [
        ["1.250", "ms", "0.1000"],
        *[["0.000", "ms", x] for x in ("0.3333", "0.0000")],
    ]
    assert lines[1].endswith(str(MERGE))
    assert repr(PLAN) == "Plan(3 changes, 12.500 ms -> 8.123 ms, loss 0.4333)"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "ms", "0.000 ms"),
        (12.3456, "ms", "12.346 ms"),
        (999, "MACs", "999 MACs"),
        (1000, "MACs", "1.00 kMACs"),
        (999_994, "MACs", "999.99 kMACs"),
        (1.8e6, "MACs", "1.80 MMACs"),
        (1.8e9, "MACs", "1.80 GMACs"),
        (1.8e12, "MACs", "1.80 TMACs"),
    ],
)
def test_latencies_are_shown_with_their_unit(value, unit, text):
    assert format_latency(value, unit) == text
