"""The frontier with a metric on it: rows by hand, interrupted evaluations, foreign files, plots, the command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxmerge
from fxmerge.cli import main
from fxmerge.errors import BudgetError, MissingPackageError, StoreError, UserError
from fxmerge.plotting import plot
from fxmerge.quality import BUDGETS, Quality, Row, Subject, Unreachable, read_quality
from fxmerge.runtimes.macs import Macs

ROOT = Path(__file__).resolve().parents[1]

STEM, LAYER = 8 * 8 * 3 * 4 * 9, 8 * 8 * 4 * 4 * 9
"""Multiply-accumulates of 3x3 convolutions from 3 and from 4 to 4 channels on 8x8 pixels."""
FULL = STEM + 3 * LAYER
STEM_PARAMETERS, LAYER_PARAMETERS = 3 * 4 * 9 + 4, 4 * 4 * 9 + 4


def make_net(seed=0, norm=False):
    """Four convolutions; the first cannot go, and no merge of two is cheaper than both."""
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))]
    layers = [layer for conv in convolutions for layer in (conv, nn.ReLU())]
    return nn.Sequential(*([nn.BatchNorm2d(3)] * norm), *layers)


def make_frontier(net=None, batch=1, **options):
    return fxmerge.frontier(net or make_net(), torch.zeros(batch, 3, 8, 8), **{"runtime": "macs", **options})


@pytest.fixture(scope="module")
def found():
    return make_frontier()


def mean_distance(outputs, reference):
    return (outputs - reference).abs().mean()


def layers(network):
    """The metric of these tests: how many convolutions there are."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


class FailsAt:
    """The same number, except in one call."""

    def __init__(self, call):
        self.call, self.seen = call, []

    def __call__(self, network):
        self.seen.append(layers(network))
        if len(self.seen) == self.call:
            raise RuntimeError("the data set is gone")
        return self.seen[-1]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_every_row_is_as_counted_by_hand(found):
    quality = found.evaluate(layers, (0.8, "50%", f"{STEM}MACs"))
    assert quality.original == Row("original", FULL, FULL, FULL, FULL, 4, STEM_PARAMETERS + 3 * LAYER_PARAMETERS, 4)
    expected = [("80%", 0.8 * FULL, 2), ("50%", 0.5 * FULL, 1), (f"{STEM}MACs", STEM, 0)]
    for row, (budget, requested, left) in zip(quality.rows, expected, strict=True):
        macs = STEM + left * LAYER
        assert row == Row(
            budget, requested, macs, macs, FULL, 1 + left, STEM_PARAMETERS + left * LAYER_PARAMETERS, 1 + left
        )
        assert row.share == macs / FULL
    assert quality.networks == (quality.original, *quality.rows)
    subject = quality.subject
    assert (subject.network, subject.unit, subject.batch, subject.metric) == ("Sequential", "MACs", 1, "layers")
    assert subject.runtime == {"runtime": "macs", "name": "macs"}
    assert subject.where == "macs, batch 1"


def test_the_table_in_text_and_in_markdown(found):
    quality = found.evaluate(layers, (0.8, 0.1), name="a|b")
    assert str(quality).splitlines() == [
        "Sequential: a|b at several budgets",
        "macs, batch 1",
        "",
        "    budget       measured    share      predicted         a|b  convolutions    parameters",
        "  original    34.56 kMACs   100.0%    34.56 kMACs           4             4           556",
        "       80%    25.34 kMACs    73.3%    25.34 kMACs           3             3           408",
        "       10%  out of reach: the smallest reachable is 6.91 kMACs (20.0%)",
    ]
    assert quality.markdown().splitlines() == [
        r"| budget | measured | share | predicted | a\|b | convolutions | parameters |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| original | 34.56 kMACs | 100.0% | 34.56 kMACs | 4 | 4 | 556 |",
        "| 80% | 25.34 kMACs | 73.3% | 25.34 kMACs | 3 | 3 | 408 |",
        "| 10% | out of reach: the smallest reachable is 6.91 kMACs (20.0%) |  |  |  |  |  |",
    ]


def test_a_budget_out_of_reach_is_a_row_and_the_next_is_evaluated(found):
    quality = found.evaluate(layers, (0.1, 0.25))
    assert quality.rows[0] == Unreachable("10%", 0.1 * FULL, STEM, FULL)
    assert (quality.rows[1].budget, quality.rows[1].metric) == ("25%", 1)
    assert quality.networks == (quality.original, quality.rows[1])


def test_budgets_are_written_one_way_and_evaluated_once(found):
    metric = FailsAt(None)
    quality = found.evaluate(metric, [0.5, "50%", " 50 % ", f"{STEM} MACs", f"{STEM}MACs", 1 / 3])
    assert [row.budget for row in quality.rows] == ["50%", f"{STEM}MACs", "33.33333333%"]
    assert metric.seen == [4, 2, 1, 1]
    assert [row.budget for row in found.evaluate(layers, 0.5).rows] == ["50%"]
    assert [row.budget for row in found.evaluate(layers, "50%").rows] == ["50%"]


def test_the_default_budgets(found):
    rows = found.evaluate(layers).rows
    assert [row.budget for row in rows] == [f"{share:.0%}" for share in BUDGETS] == ["80%", "65%", "50%", "40%", "30%"]
    assert [row.metric for row in rows] == [3, 2, 2, 1, 1]


def test_the_metric_gets_copies_in_eval_mode_as_they_are_deployed():
    net = make_net(norm=True)
    networks = []

    def spoil(network):
        networks.append((network.training, any(isinstance(each, nn.BatchNorm2d) for each in network.modules())))
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return torch.tensor(0.25)

    before = {name: value.clone() for name, value in net.state_dict().items()}
    frontier = make_frontier(net)
    assert [row.metric for row in frontier.evaluate(spoil, (0.8, 0.5)).networks] == [0.25] * 3
    assert networks[0][0] is False
    assert [training for training, _ in networks] == [False] * 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    first = next(each for each in frontier.compress(0.8).model.modules() if isinstance(each, nn.Conv2d))
    assert float(first.weight.detach().abs().sum()) > 0


def test_the_original_is_evaluated_with_its_norms_folded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def norms(network):
        return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())

    assert [row.metric for row in make_frontier(net).evaluate(norms, 0.5).networks] == [0, 0]


class Drifting:
    """A millisecond a convolution, on a machine that gets slower by a tenth with every network that is built."""

    name, unit, deterministic = "drifting", "ms", True

    def __init__(self):
        self.builds = 0

    def environment(self):
        return {"runtime": "drifting 1", "device": "a <board> & more"}

    def measure(self, signatures, on_result):
        for signature in signatures:
            on_result(signature, 1.0)

    def build(self, module, args, kwargs):  # noqa: ARG002
        self.builds += 1
        return lambda: float(layers(module)) * (1 + 0.1 * (self.builds - 1))


def test_shares_are_of_the_original_as_it_was_timed_with_the_network():
    quality = make_frontier(runtime=Drifting()).evaluate(layers, "3ms")
    assert quality.original.measured == 4.0
    (row,) = quality.rows
    assert row.measured > row.convolutions
    assert row.original / row.measured == pytest.approx(4 / row.convolutions)
    assert quality.subject.where == "drifting 1, a <board> & more, batch 1"


# --- what is written, and continued -----------------------------------------------------------------------------------


def test_an_evaluation_continues_where_its_metric_failed(found, tmp_path):
    path = tmp_path / "quality.json"
    budgets = (0.8, 0.5, 0.25)
    failing = FailsAt(4)
    handed = []
    with pytest.raises(RuntimeError, match="the data set is gone"):
        found.evaluate(failing, budgets, name="layers", save=path, on_row=handed.append)
    assert [[row.budget for row in quality.rows] for quality in handed] == [[], ["80%"], ["80%", "50%"]]
    assert read_quality(path) == handed[-1]

    again = FailsAt(None)
    handed.clear()
    quality = make_frontier().evaluate(again, (0.1, *budgets), name="layers", save=path, on_row=handed.append)
    assert again.seen == [1]
    assert [row.budget for row in quality.rows] == ["80%", "50%", "10%", "25%"]
    assert [len(each.rows) for each in handed] == [2, 3, 4]
    assert read_quality(path) == quality == handed[-1]
    assert {row.budget: row.metric for row in quality.networks[1:]} == {"80%": 3, "50%": 2, "25%": 1}

    none = FailsAt(None)
    assert found.evaluate(none, 0.8, name="layers", save=path) == quality
    assert none.seen == []


def test_the_file_is_whole_at_every_call_of_the_users(found, tmp_path):
    path = tmp_path / "quality.json"
    seen = []
    found.evaluate(layers, (0.8, 0.1), save=path, on_row=lambda quality: seen.append(read_quality(path) == quality))
    assert seen == [True, True, True]
    assert [each.name for each in tmp_path.iterdir()] == ["quality.json"]


class OtherCount(Macs):
    name = "macs"

    def environment(self):
        return {"runtime": "macs of another kind", "device": "abacus"}


@pytest.mark.parametrize(
    ("name", "other", "here"),
    [
        ("structure", lambda: make_frontier(make_net()[:7]), None),
        ("weights", lambda: make_frontier(make_net(1)), None),
        (
            "runtime",
            lambda: make_frontier(runtime=OtherCount()),
            "device unknown, runtime macs, here it is device abacus, runtime macs of another kind",
        ),
        ("batch", lambda: make_frontier(batch=2), "1, here it is 2"),
        ("search", lambda: make_frontier(max_span=3), None),
        (
            "data",
            lambda: make_frontier(calibration=[torch.randn(4, 3, 8, 8)]),
            "No calibration data: importance is magnitude",
        ),
        ("metric", make_frontier, "layers, here it is others"),
    ],
)
def test_the_file_of_another_evaluation_is_refused_by_name_and_left_alone(found, tmp_path, name, other, here):
    path = tmp_path / "quality.json"
    found.evaluate(layers, 0.8, save=path)
    before = path.read_bytes()
    metric = FailsAt(None)
    called = "others" if name == "metric" else "layers"
    with pytest.raises(StoreError) as caught:
        other().evaluate(metric, 0.5, name=called, save=path)
    assert str(caught.value).startswith(f"{path} is of another evaluation: its {name} is {here or ''}")
    assert str(caught.value).endswith("It was left untouched; name another file, or remove this one")
    assert (metric.seen, path.read_bytes()) == ([], before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": None}, "merged convolutions refitted. It was left"),
        ({"search": 3}, "verified selection (3)"),
        ({"polish": "20s"}, "verified selection (2), polish (20 s)"),
        ({"refit_kept": True}, "merged convolutions refitted, kept convolutions, too, verified"),
        ({"distance": mean_distance}, "distance of outputs by mean_distance"),
    ],
)
def test_what_makes_another_network_makes_another_evaluation(tmp_path, options, words):
    path = tmp_path / "quality.json"
    same = {"calibration": [torch.randn(4, 3, 8, 8)], "search": 2}
    make_frontier(**same).evaluate(layers, 0.8, save=path)
    with pytest.raises(StoreError, match="its data is Calibrated on 4 images") as caught:
        make_frontier(**{**same, **options}).evaluate(layers, 0.5, save=path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("somebody's notes", "cannot be read as an evaluation of fxmerge's"),
        ("[]", "this is no evaluation of fxmerge's: TypeError"),
        ("{}", r"this is no evaluation of fxmerge's: KeyError\('format'\)"),
        (
            '{"format": "fxmerge.plan/1"}',
            "this evaluation has the format 'fxmerge.plan/1'; this version of fxmerge reads",
        ),
        ('{"format": "fxmerge.quality/1", "rows": []}', r"this is no evaluation of fxmerge's: KeyError\('subject'\)"),
        ('{"format": "fxmerge.quality/1", "rows": [{"smallest": 1}]}', "this is no evaluation of fxmerge's: TypeError"),
    ],
    ids=["notes", "list", "empty", "plan", "cut", "row"],
)
def test_what_is_no_evaluation_is_refused_and_left_alone(found, tmp_path, text, words):
    path = tmp_path / "quality.json"
    path.write_text(text)
    metric = FailsAt(None)
    with pytest.raises(StoreError, match=words) as caught:
        found.evaluate(metric, 0.5, save=path)
    assert str(path) in str(caught.value)
    assert (metric.seen, path.read_text()) == ([], text)


def test_results_are_saved_before_their_metric_and_made_again_where_they_are_missing(found, tmp_path):
    save, results = tmp_path / "quality.json", tmp_path / "results"
    with pytest.raises(RuntimeError):
        found.evaluate(FailsAt(3), (0.8, 0.5, 0.1), name="layers", save=save, save_results=results)
    assert sorted(each.name for each in results.iterdir()) == ["50pct", "80pct"]
    assert fxmerge.load(results / "50pct").report.after.convolutions == 2
    assert fxmerge.load(results / "80pct").report.after.convolutions == 3

    again = FailsAt(None)
    options = {"name": "layers", "save": save, "save_results": results}
    found.evaluate(again, (0.8, 0.5, 0.1, f"{STEM}MACs"), **options)
    assert again.seen == [2, 1]
    assert sorted(each.name for each in results.iterdir()) == ["50pct", f"{STEM}MACs", "80pct"]

    (results / "80pct").rename(tmp_path / "elsewhere")
    once_more = FailsAt(None)
    quality = found.evaluate(once_more, (0.8, 0.5), **options)
    assert once_more.seen == [3]
    assert [row.budget for row in quality.rows] == ["50%", "10%", f"{STEM}MACs", "80%"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_kept(found, tmp_path, value):
    path = tmp_path / "quality.json"
    quality = found.evaluate(lambda network: value if layers(network) < 4 else 4, 0.5, name="loss", save=path)
    text = path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert repr(read_quality(path).rows[0].metric) == repr(value)
    assert quality.lines()[-1].split()[-3] == str(value)


# --- what is refused before the work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "options", "kind", "words"),
    [
        ((), {}, UserError, "there is no budget to evaluate"),
        ((0.5, "8ms"), {}, BudgetError, "budget='8ms' is in ms, but this runtime measures MACs"),
        ((0.5, None), {}, BudgetError, "budget=None is a NoneType"),
        (0.5, {"save": "."}, UserError, r"\. cannot be written: it is a folder"),
        (0.5, {"save": "nowhere/q.json"}, UserError, "nowhere/q.json cannot be written: .* its folder is missing"),
        (0.5, {"save_results": "notes"}, StoreError, "notes/50pct cannot be written: .*notes is no folder"),
        (0.5, {"save_results": "full"}, StoreError, "full/50pct/graph.json: no such file; expected one that fxmerge"),
    ],
    ids=["none", "unit", "type", "folder", "nowhere", "file", "full"],
)
def test_a_wrong_argument_is_refused_before_the_metric_is_called(
    found, tmp_path, monkeypatch, budgets, options, kind, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("")
    (tmp_path / "full" / "50pct").mkdir(parents=True)
    (tmp_path / "full" / "50pct" / "notes").write_text("")
    metric = FailsAt(None)
    with pytest.raises(kind, match=words):
        found.evaluate(metric, budgets, **options)
    assert metric.seen == []
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["50pct", "full", "notes", "notes"]


@pytest.mark.parametrize("name", [None, "loss"])
def test_a_metric_is_a_function(found, name):
    with pytest.raises(UserError, match=r"the metric is a float; expected a function of a torch\.nn\.Module"):
        found.evaluate(0.5, 0.5, name=name)


@pytest.mark.parametrize("value", [None, torch.zeros(2), "good"], ids=["none", "vector", "word"])
def test_a_metric_that_returns_no_number_is_named(found, value):
    with pytest.raises(UserError, match=rf"the metric returned a {type(value).__name__}; expected a number"):
        found.evaluate(lambda _: value, 0.5)


# --- plots ------------------------------------------------------------------------------------------------------------

SUBJECT = Subject(
    network="Net<script>",
    structure="0",
    weights="1",
    runtime={"runtime": "clock 1", "name": "clock", "device": 'a "board" & more'},
    unit="ms",
    batch=16,
    search="",
    data="",
    metric="<b>$\\frac$</b>",
)
ORIGINAL = Row("original", 10.0, 10.0, 10.0, 10.0, 21, 272186, 0.99)
QUALITY = Quality(
    SUBJECT,
    ORIGINAL,
    (
        Row("80%", 8.0, 7.9, 7.8, 10.0, 18, 250000, 0.985),
        Row("79%", 7.9, 7.8, 7.79, 10.0, 18, 250000, 0.985),
        Row("50%", 5.0, 4.9, 4.8, 9.6, 9, 150000, 0.95),
        Row("40%", 4.0, 3.9, 3.8, 10.0, 8, 140000, math.nan),
        Unreachable("10%", 1.0, 3.5, 10.0),
    ),
)


class Page(HTMLParser):
    """The elements of a page: names, attributes and texts; every element that is opened must be closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def test_the_page_is_one_file_that_refers_to_nothing_and_escapes_names(tmp_path):
    path = plot(QUALITY, tmp_path / "frontier.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "p", "svg", "path", "text", "polyline", "g"}
    assert {tag for tag, _ in page.elements} == allowed | {"circle", "table", "tr", "th", "td"}
    assert not {"src", "href", "xlink:href", "action", "data"} & {name for _, a in page.elements for name in a}
    for words in ("http:", "https:", "url(", "@import", "//"):
        assert words not in text
    title = "Net<script>: <b>$\\frac$</b> at several budgets"
    assert page.texts["h1"] == [title]
    assert page.texts["p"] == ['clock 1, a "board" & more, batch 16']
    assert dict(page.elements)["svg"]["aria-label"] == title


def test_the_page_shows_every_network_and_every_row(tmp_path):
    page = Page(plot(QUALITY, tmp_path / "frontier.html").read_text())
    about = [text for text in page.texts["title"] if text.startswith("budget")]
    assert [text.splitlines()[0] for text in about] == [f"budget: {b}" for b in ("50%", "79%", "80%", "original")]
    assert about[0].splitlines()[1:] == [
        "measured: 4.800 ms",
        "share: 50.0%",
        "predicted: 4.900 ms",
        "<b>$\\frac$</b>: 0.95",
        "convolutions: 9",
        "parameters: 150,000",
    ]
    assert (page.count("circle"), page.count("g")) == (3, 4)
    labels = [text for text in page.texts["text"] if text == "original" or text.endswith("%")]
    assert labels == ["50%", "78%", "original"]  # the two at 78 % are too near for two labels
    assert "measured latency (ms)" in page.texts["text"]
    cells = page.texts["td"]
    assert page.count("tr") == 7
    assert cells[:7] == ["original", "10.000 ms", "100.0%", "10.000 ms", "0.99", "21", "272,186"]
    assert "nan" in cells
    assert cells[-2:] == ["10%", "out of reach: the smallest reachable is 3.500 ms (35.0%)"]
    assert [a["colspan"] for tag, a in page.elements if tag == "td" and "colspan" in a] == ["6"]


def test_points_lie_where_their_numbers_say(tmp_path):
    page = Page(plot(QUALITY, tmp_path / "frontier.html", size=(1000, 500)).read_text())
    (way,) = [a["points"] for tag, a in page.elements if tag == "polyline"]
    points = [tuple(map(float, point.split(","))) for point in way.split()]
    circles = [(float(a["cx"]), float(a["cy"])) for tag, a in page.elements if tag == "circle"]
    assert points[:3] == circles
    (x0, y0), _, (x1, y1), (x2, y2) = points
    assert (x1 - x0) / (x2 - x0) == pytest.approx((7.8 - 4.8) / (10 - 4.8), abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx((0.985 - 0.95) / (0.99 - 0.95), abs=1e-3)
    assert y0 > y1 > y2  # a larger metric is further up
    assert (x0 - 80) / (x2 - 80) == pytest.approx(0.48, abs=1e-3)  # the axis begins at zero
    assert all(80 < x < 980 and 20 < y < 440 for x, y in points)


@pytest.mark.parametrize("metric", [0.0, -3.0, 1e9])
def test_a_metric_that_never_changes_is_drawn(tmp_path, metric):
    quality = Quality(SUBJECT, dataclasses.replace(ORIGINAL, metric=metric), ())
    for name in ("one.html", "one.png"):
        assert plot(quality, tmp_path / name).stat().st_size > 1000


def test_multiply_accumulates_are_drawn_in_a_unit_that_suits(tmp_path):
    rows = [dataclasses.replace(row, measured=row.measured * 1e8) for row in (ORIGINAL, *QUALITY.rows[:3])]
    quality = Quality(dataclasses.replace(SUBJECT, unit="MACs"), rows[0], tuple(rows[1:]))
    texts = Page(plot(quality, tmp_path / "frontier.html").read_text()).texts["text"]
    assert "multiply-accumulates (GMACs)" in texts
    assert {"0", "0.2", "0.8", "1"} <= set(texts)


@pytest.mark.parametrize("size", [(960, 600), (333, 777)])
def test_the_image_has_the_size_asked_for_and_shows_something(tmp_path, size):
    with Image.open(plot(QUALITY, tmp_path / "frontier.png", size=size)) as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB")).astype(int)
        grey = np.asarray(image.convert("L")).astype(float)
    assert grey.std() > 15
    blue, orange = (np.all(pixels == colour, axis=2) for colour in ((0x1F, 0x4E, 0x79), (0xF2, 0xA3, 0x3A)))
    assert blue.sum() > 100
    assert orange.sum() > 30
    assert np.argwhere(blue)[:, 1].max() < np.argwhere(orange)[:, 1].min()  # the original is the slowest
    assert np.argwhere(blue)[:, 0].min() > np.argwhere(orange)[:, 0].min()  # and the best
    assert grey[orange].mean() - grey[blue].mean() > 80  # seen in greyscale, too


def test_the_image_does_not_depend_on_what_was_drawn_before(tmp_path):
    first = plot(QUALITY, tmp_path / "a.png").read_bytes()
    plot(Quality(SUBJECT, ORIGINAL, ()), tmp_path / "b.png")
    assert plot(QUALITY, tmp_path / "c.png").read_bytes() == first != (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_the_page_is_drawn_and_the_image_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"not installed: pip install 'fxmerge\[plot\]'; a \.html plot needs"):
        plot(QUALITY, tmp_path / "frontier.png")
    plot(QUALITY, tmp_path / "frontier.html")
    assert [each.name for each in tmp_path.iterdir()] == ["frontier.html"]


@pytest.mark.parametrize(
    ("quality", "name", "size", "words"),
    [
        (QUALITY, "frontier.svg", (960, 600), "frontier.svg': expected a path ending in .png or .html"),
        (QUALITY, "nowhere/a.html", (960, 600), "nowhere/a.html': it is a folder, or its folder is missing"),
        (QUALITY, "a.html", (0, 600), r"size is \(0, 600\); expected width and height in pixels"),
        (
            Quality(SUBJECT, dataclasses.replace(ORIGINAL, metric=math.inf), ()),
            "a.html",
            (960, 600),
            "there is nothing to plot: no network has a finite ",
        ),
    ],
    ids=["suffix", "nowhere", "size", "nothing"],
)
def test_what_cannot_be_plotted_is_refused(tmp_path, quality, name, size, words):
    with pytest.raises(UserError, match=words):
        plot(quality, tmp_path / name, size=size)
    assert list(tmp_path.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------------

NETS = """
from pathlib import Path

import torch
from torch import nn


def net():
    convolutions = [nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))]
    return nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU())))


def fails():
    raise RuntimeError("the model was made")


def layers(network):
    with Path("calls").open("a") as calls:
        calls.write("x")
    if Path("stop").exists() and len(Path("calls").read_text()) > 2:
        raise RuntimeError("the data set is gone")
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())
"""
COMMAND = ("frontier", "qnets:net", "--input-shape", "1x3x8x8", "--runtime", "macs")
EVALUATE = (*COMMAND, "--evaluate", "qnets:layers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "qnets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("qnets", None)


def run(capsys, *arguments):
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


@pytest.mark.usefixtures("folder")
def test_the_command_evaluates_saves_continues_and_plots(capsys):
    budgets = ("--budget", "80%", "--budget", "0.1", "--budget", "50%")
    outputs = ("--output", "quality.json", "--save-results", "results")
    Path("stop").write_text("")
    with pytest.raises(RuntimeError, match="the data set is gone"):
        main([*EVALUATE, *budgets, *outputs])
    interrupted = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in interrupted[3:]] == ["budget", "original", "80%", "10%"]

    Path("stop").unlink()
    plots = ("--plot", "frontier.html", "--plot", "frontier.png")
    lines = run(capsys, *EVALUATE, *budgets, *outputs, *plots).splitlines()
    assert lines[:-1] == interrupted
    assert lines[-1].split() == ["50%", "16.13", "kMACs", "46.7%", "16.13", "kMACs", "2", "2", "260"]
    quality = read_quality("quality.json")
    assert lines == str(quality).splitlines()
    assert Path("calls").read_text() == "x" * 4  # the original, 80 %, 50 % twice
    assert fxmerge.load("results/80pct").report.after.convolutions == 3
    assert Page(Path("frontier.html").read_text()).count("circle") == 2
    with Image.open("frontier.png") as image:
        assert image.size == (960, 600)

    assert json.loads(run(capsys, *EVALUATE, *budgets, *outputs, "--json")) == quality.to_json()
    assert run(capsys, *EVALUATE, *budgets, *outputs, "--markdown") == f"{quality.markdown()}\n"
    assert Path("calls").read_text() == "x" * 4


@pytest.mark.usefixtures("folder")
def test_without_budgets_the_command_takes_the_default_ones(capsys):
    lines = run(capsys, *EVALUATE).splitlines()
    assert [line.split()[0] for line in lines[5:]] == ["80%", "65%", "50%", "40%", "30%"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--plot", "a.svg"), "cannot plot to 'a.svg': expected a path ending in .png or .html"),
        (("--output", "nowhere/q.json"), "nowhere/q.json cannot be written: "),
        (("--output", "qnets.py"), "qnets.py cannot be read as an evaluation of fxmerge's: "),
        (("--output", "other.json"), "other.json is of another evaluation: its metric is accuracy, here it is layers."),
        (("--save-results", "qnets.py"), "qnets.py/80pct cannot be written: "),
        (("--budget", "8ms"), "budget='8ms' is in ms, but this runtime measures MACs"),
        (("--evaluate", "qnets:accuracy"), "qnets:accuracy: qnets has no 'accuracy'"),
    ],
    ids=["plot", "nowhere", "foreign", "other", "results", "budget", "metric"],
)
def test_the_command_refuses_before_the_model_is_made(folder, capsys, options, words):
    other = dataclasses.replace(QUALITY, subject=dataclasses.replace(SUBJECT, metric="accuracy"))
    (folder / "other.json").write_text(json.dumps(other.to_json()))
    command = [word.replace("qnets:net", "qnets:fails") for word in EVALUATE]
    assert main([*command, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fxmerge: error: {words}")
    assert not (folder / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*COMMAND, "--plot", "a.html"), "--plot goes with --evaluate"),
        ((*COMMAND, "--output", "a.json"), "--output goes with --evaluate"),
        ((*COMMAND, "--save-results", "results"), "--save-results goes with --evaluate"),
        ((*COMMAND, "--markdown"), "--markdown goes with --evaluate"),
        ((*EVALUATE, "--save", "plans.json"), "--save is for plans by prediction; with --evaluate say --save-results"),
    ],
    ids=["plot", "output", "results", "markdown", "save"],
)
def test_options_that_do_not_go_together_are_wrong_usage(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {words}")


def test_the_demos_network_and_metric(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "examples" / "digits")
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples" / "digits"), *sys.path])
    monkeypatch.setitem(importlib.import_module("data").SPLITS, "test", slice(8000, 8400))
    command = ("frontier", "model:pretrained", "--input-shape", "16x1x28x28", "--runtime", "macs", "--max-span", "2")
    output = tmp_path / "quality.json"
    run(capsys, *command, "--evaluate", "data:accuracy", "--budget", "90%", "--output", str(output))
    quality = read_quality(output)
    assert (quality.subject.network, quality.subject.metric) == ("DigitsResNet", "accuracy")
    assert quality.original.metric > 0.97  # of all test digits 98.95 %
    assert quality.original.convolutions == 21
    (row,) = quality.rows
    assert row.share <= 0.9
    assert row.convolutions < 21
