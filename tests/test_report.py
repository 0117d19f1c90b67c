"""The report: decisions with reasons for every convolution, and how they are printed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from own_networks import TimeUNet
from torch import nn

import fxmerge
from fxmerge.report import Decision, Report, Size


class Chain(nn.Module):
    """Two blocks of two convolutions around a pool, and a lone convolution behind a second one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.pool(self.first(x)))


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def report(*decisions, **changed):
    fields = {
        "data": "No calibration data.",
        "notes": (),
        "runtime": {"name": "macs"},
        "unit": "MACs",
        "batch": 2,
        "requested": 50.0,
        "original": 100.0,
        "predicted": 40.0,
        "measured": 40.0,
        "repeatability": 0.0,
        "before": Size(2, 10),
        "after": Size(1, 5),
        "candidates": {"merge": 2},
        "useful": 1,
        "refusals": {"gate": 1},
        "fits": (),
        "decisions": decisions,
        "error": 0.0,
        "error_allowed": 1e-5,
        "original_error": 0.0,
        "dependence": 1.0,
        "bound": 0.0,
        "builds": (),
        "drift": 0.0,
        "seconds": {},
    }
    return Report(**(fields | changed))


def decisions(model, example, budget, **options):
    found = fxmerge.compress(model.eval(), example, budget, runtime="macs", **options).report
    return {each.convolution: (each.decision, each.reason) for each in found.decisions}, str(found)


def test_every_fate_has_its_reason():
    fates, text = decisions(Chain(), IMAGES, 0.6)
    pooled = "refused [not-linear] at pool: MaxPool2d is no affine shift-equivariant map"
    assert fates == {
        "first.0": ("merged", "into 3x3 p1 3->8 with its skip or what was removed around it"),
        "first.2": ("removed", "replaced by the identity in the merge into 3x3 p1 3->8"),
        "last": ("kept", f"no candidate; {pooled}"),
    }
    table = text.split("\n\n", 1)[1]
    assert table.splitlines() == [
        "merged   first.0  into 3x3 p1 3->8 with its skip or what was removed around it",
        "removed  first.2  replaced by the identity in the merge into 3x3 p1 3->8",
        "kept     last     no candidate; not-linear at pool",
        "",
        "not-linear  MaxPool2d is no affine shift-equivariant map: pool",
    ]


def test_what_was_not_chosen_says_how_many_candidates_there_were():
    fates, _ = decisions(Chain(), IMAGES, 1.0)
    assert fates["first.0"] == ("kept", "2 candidates, none in the best plan")
    assert fates["first.2"][1].startswith("3 candidates, none in the best plan; refused [not-linear] at pool: ")


def test_what_nothing_refused_has_a_reason_too():
    fates, text = decisions(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES, 1.0)
    alone = "there is nothing to merge it with, and it changes the shape 3x12x12 to 4x10x10"
    assert fates == {"0": ("kept", f"no candidate; refused [alone] at 0: {alone}")}
    assert text.splitlines()[-3:] == ["kept     0  no candidate; alone", "", f"alone  {alone}: 0"]


def test_a_norm_and_a_side_input_behind_a_merge_are_told():
    torch.manual_seed(0)
    example = torch.randn(2, 3, 16, 16), torch.rand(2)
    frontier = fxmerge.frontier(TimeUNet().eval(), example, runtime="macs")
    plan = next(
        plan
        for plan in map(frontier.plan, range(len(frontier)))
        if any(each.norm and len(each.kept) > 1 for each in plan.candidates)
    )
    (candidate, *_) = [each for each in plan.candidates if each.norm and len(each.kept) > 1]
    reasons = {each.convolution: each.reason for each in frontier.apply(plan).report.decisions}
    block = candidate.norm.partition(".norm")[0]
    for name in candidate.kept:
        others = ", ".join(other for other in candidate.kept if other != name)
        side = f"side input {block}/unsqueeze#1 is added behind it"
        start = f"into {candidate.geometry} with {others}; norm {candidate.norm} returns behind it"
        assert reasons[name] == f"{start}; {side}"


def test_long_lists_are_cut_short_and_long_names_stand_alone():
    name = "a.rather.long.path.of.modules.to.one.convolution"
    kept = Decision(
        name,
        "kept",
        "no candidate" + "".join(f"; refused [gate] at b.{k}/mul: b.{k}/mul multiplies two values" for k in range(6)),
    )
    lines = str(report(kept, Decision("short", "removed", "replaced by the identity"))).splitlines()
    blank = lines.index("")
    assert lines[blank + 1 :] == [
        f"kept     {name}",
        " " * 51 + "no candidate; gate at b.0/mul; gate at b.1/mul;",
        " " * 51 + "gate at b.2/mul; 3 more",
        "removed  short" + " " * 37 + "replaced by the identity",
        "",
        "gate  ... multiplies two values: b.0/mul, b.1/mul, b.2/mul and 3 more",
    ]
    assert max(map(len, lines)) <= 100


def test_the_head_is_wrapped_and_says_what_was_measured():
    seconds = dict.fromkeys(("capture", "analyse", "measure", "score", "solve", "closed loop", "install", "check"), 1.0)
    text = str(report(seconds=seconds, notes=("one", "two")))
    lines = text.splitlines()
    assert lines[:7] == [
        "No calibration data.",
        "note: one",
        "note: two",
        "runtime:      macs, batch 2",
        "original:     100 MACs",
        "requested:    50 MACs (50.0%)",
        "predicted:    40 MACs (40.0%)",
    ]
    assert max(map(len, lines)) <= 100
    assert lines[-2].startswith("seconds:      capture 1.0, ")
    assert lines[-1].startswith(" " * 14)
    timed = report(unit="ms", repeatability=0.012)
    assert "measured:     40.000 ms (40.0%), repeatability 1.2%" in str(timed).splitlines()


def test_networks_that_were_built_are_listed_with_the_drift():
    looped = report(unit="ms", builds=((0.498, 0.531), (0.471, 0.4995)), drift=-0.013)
    (line,) = [line for line in str(looped).splitlines() if line.startswith("built:")]
    assert line == "built:        53.1% for 49.8%, 50.0% for 47.1% predicted; the original's latency drifted by -1.3%"
    assert "built:" not in str(report())


def test_json_keeps_everything_but_the_form_of_infinity():
    whole = report(
        Decision("conv", "kept", "no candidate"), error=math.inf, builds=((0.5, 0.6), (0.4, 0.5)), drift=0.01
    )
    data = json.loads(json.dumps(whole.to_json()))
    assert data["error"] is None
    assert data["builds"] == [[0.5, 0.6], [0.4, 0.5]]
    assert Report.from_json(data) == whole
    assert Report.from_json(dataclasses.replace(whole, error=1.0).to_json()) != whole
    with pytest.raises(fxmerge.errors.StoreError, match="no report of this version"):
        Report.from_json({**data, "unknown": 1})
