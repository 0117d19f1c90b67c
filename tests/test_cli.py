"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

import fxmerge
from fxmerge.algebra import Geometry
from fxmerge.cli import _age, main
from fxmerge.importance import ImportanceTable
from fxmerge.runtimes import LayerSignature, OpSignature
from fxmerge.store import LatencyStore

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ("--input-shape", "2x3x12x12")
MACS = ("--runtime", "macs")

NETS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        return self.head(self.block(torch.relu(self.stem(image))).mean((2, 3)))


class Two(Net):
    def forward(self, image, index):
        return super().forward(image) + index[:, None]


def net():
    return Net()


def example():
    return {"image": torch.randn(3, 3, 12, 12)}


def images():
    return (torch.randn(4, 3, 12, 12) for _ in range(2))


def pairs():
    return [(batch, torch.zeros(4)) for batch in images()]


def first(pair):
    return pair[0]


def fails():
    raise RuntimeError("a fault of the user's")


instance = Net()
number = 7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "clinets.py").write_text(NETS)
    return path


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(folder)  # a test may import the module before any command has added its folder


@pytest.fixture(scope="module")
def saved(folder):
    """A result that ``compress --output`` wrote, by a process of its own, with what it printed."""
    command = ("-W", "error", "-m", "fxmerge", "compress", "clinets:net", *SHAPE, *MACS, "--budget", "60%")
    done = subprocess.run(  # noqa: S603
        [sys.executable, *command, "--output", "small", "--export", "small.onnx", "--export", "small.pt2"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def run(capsys, *arguments):
    """What a command prints; it must succeed and say nothing on stderr."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys, *arguments):
    """The one line on stderr of a command that must fail with code 1."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith("fxmerge: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("fxmerge: error: ").rstrip("\n")


def misused(capsys, *arguments):
    """What follows the usage on stderr of a command that must fail with code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    return err.splitlines()[-1].partition("error: ")[2]


# --- what it does -----------------------------------------------------------------------------------------------------


def test_compress_prints_the_report_and_writes_what_was_asked(saved, folder):
    result = fxmerge.load(folder / "small")
    assert saved == f"{result.report}\n"
    assert result.report.measured <= 0.6 * result.report.original
    assert saved.splitlines()[0].startswith("No calibration data: importance is magnitude")
    count = sum(node.op_type == "Conv" for node in onnx.load(str(folder / "small.onnx")).graph.node)
    assert count == result.report.after.convolutions < result.report.before.convolutions == 3
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(folder / "small.pt2").module()(x), result.merge()(x))


def test_help_names_commands_models_and_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for words in (
        "compress",
        "frontier",
        "fold",
        "export",
        "inspect",
        "doctor",
        "store",
        "package.module:name",
        "examples:\n  fxmerge inspect",
    ):
        assert words in out
    assert run(capsys) == out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fxmerge {fxmerge.__version__}\n"


def test_compress_as_json(capsys):
    data = json.loads(run(capsys, "compress", "clinets:net", *SHAPE, *MACS, "--budget", "0.6", "--json"))
    assert data["report"]["measured"] <= 0.6 * data["report"]["original"]
    assert fxmerge.Plan.from_json(data["plan"]).predicted == data["report"]["predicted"]


def test_options_reach_the_library(capsys, monkeypatch):
    seen = {}

    def compress(model, example, budget, **options):
        seen.update(options, model=model, example=example, budget=budget)
        raise fxmerge.FxmergeError("seen enough")

    monkeypatch.setattr("fxmerge.driver.compress", compress)
    command = ("compress", "clinets:instance", "--input", "clinets:example", "--budget", "8ms", "--threads", "3")
    search = ("--method", "depth", "--max-kernel", "5", "--max-span", "4", "--exit-activation", "--levels", "9")
    measure = (
        "--calibration",
        "clinets:pairs",
        "--inputs",
        "clinets:first",
        "--importance",
        "magnitude",
        "--fit",
        "compose",
        "--refit-kept",
        "--search",
        "none",
        "--polish",
        "30",
    )
    assert refused(capsys, *command, *search, *measure) == "seen enough"
    assert (seen["refit_kept"], seen["search"], seen["polish"]) == (True, None, 30)
    assert seen["budget"] == "8ms"
    assert repr(seen["runtime"]) == "OnnxRuntime(threads=3)"
    expected = {"method": "depth", "max_kernel": 5, "max_span": 4, "exit_activation": True, "levels": 9}
    assert {name: seen[name] for name in expected} == expected
    assert (seen["importance"], seen["fit"]) == ("magnitude", "compose")
    assert seen["model"] is importlib.import_module("clinets").instance
    assert seen["inputs"] is importlib.import_module("clinets").first
    assert [len(pair) for pair in seen["calibration"]] == [2, 2]
    assert {name: list(value.shape) for name, value in seen["example"].items()} == {"image": [3, 3, 12, 12]}

    seen.clear()
    refused(capsys, "compress", "clinets:net", *SHAPE, "--budget", "0.5")
    assert (seen["refit_kept"], seen["search"], seen["polish"]) == (False, "1min", None)
    assert set(seen) == {
        "budget",
        "model",
        "example",
        "runtime",
        "calibration",
        "inputs",
        "importance",
        "fit",
        "levels",
        "executor",
        "importance_table",
        "refit_kept",
        "search",
        "polish",
    }
    assert (seen["runtime"], seen["calibration"], seen["fit"], seen["levels"]) == ("auto", None, "auto", None)


def test_calibration_comes_from_a_function(capsys):
    data = ("--calibration", "clinets:pairs", "--inputs", "clinets:first", "--max-span", "2")
    out = run(capsys, "compress", "clinets:net", *SHAPE, *MACS, "--budget", "0.7", *data)
    assert out.startswith("Calibrated on 8 images: importance is distortion")


def test_several_inputs_and_dtypes(capsys):
    shapes = (*SHAPE, "--input-shape", "2:int64")
    out = run(capsys, "inspect", "clinets:Two", *shapes)
    assert "convolutions: 3, of which 3 could change" in out
    assert "Two rejects the example input" in refused(capsys, "inspect", "clinets:Two", *SHAPE)


def test_the_seed_decides_random_weights(capsys):
    def loss(*seed):
        return run(capsys, "frontier", "clinets:net", *SHAPE, *MACS, "--budget", "0.6", *seed)

    assert loss() == loss("--seed", "0") != loss("--seed", "1")


def test_frontier_prints_a_row_for_every_plan_and_saves_them(capsys, folder):
    nets = importlib.import_module("clinets")  # draws numbers, the first time
    torch.manual_seed(0)
    net = nets.Net()
    found = fxmerge.frontier(net, torch.randn(2, 3, 12, 12), runtime="macs")
    out = run(capsys, "frontier", "clinets:net", *SHAPE, *MACS, "--save", "plans.json")
    first, _, head, *rows = out.splitlines()
    assert first == f"original: {found.original / 1e3:.2f} kMACs, 3 convolutions"
    assert head.split() == ["latency", "share", "loss", "convolutions"]
    assert [row.split() for row in rows] == [
        [f"{latency / 1e3:.2f}", "kMACs", f"{latency / found.original:.1%}", f"{loss:.4g}", row.split()[-1]]
        for (latency, loss), row in zip(found.points, rows, strict=True)
    ]
    counts = [int(row.split()[-1]) for row in rows]
    assert counts[-1] == 3
    assert counts[0] == found.apply(found.plan(0)).report.after.convolutions == 1

    plans = json.loads((folder / "plans.json").read_text())["plans"]
    assert [fxmerge.Plan.from_json(plan) for plan in plans] == [found.plan(index) for index in range(len(found))]


def test_frontier_for_budgets_as_json(capsys):
    budgets = ("--budget", "0.5", "--budget", "100%")
    data = json.loads(run(capsys, "frontier", "clinets:net", *SHAPE, *MACS, *budgets, "--json"))
    assert data["unit"] == "MACs"
    half, full = data["plans"]
    assert half["latency"] <= 0.5 * data["original"]
    assert half["share"] == half["latency"] / data["original"]
    assert full == {"latency": data["original"], "share": 1.0, "loss": 0, "convolutions": 3}


def test_fold_prints_what_became_less_and_exports(capsys, folder):
    out = run(capsys, "fold", "clinets:net", *SHAPE, "--export", "folded.pt2")
    counts = {line.split(":")[0]: line.split(":")[1].split() for line in out.splitlines()}
    assert counts["convolutions"] == ["3", "->", "3"]
    before, _, after = counts["operations"]
    assert int(before) - int(after) == 2  # the batch norms
    program = torch.export.load(folder / "folded.pt2")
    assert sum(str(node.target) == "aten.conv2d.default" for node in program.graph.nodes) == 3
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


INSPECTED = """
convolution        geometry     output   merge bypass drop span  refused
input                           3x12x12
stem, relu         3x3 p1 3->8  8x12x12      -      -    -    -  kernel-cap
block: add, relu                8x12x12
+ identity
+ conv1, bn, relu  3x3 p1 8->8  8x12x12      -      -    -    -  kernel-cap
| conv2, bn        3x3 p1 8->8  8x12x12      -      -    -    -  kernel-cap
mean, head                      4
"""


def test_inspect_says_of_every_convolution_what_could_become_of_it(capsys):
    out = run(capsys, "inspect", "clinets:net", *SHAPE, "--max-kernel", "3", "--method", "depth")
    assert out.startswith(INSPECTED.lstrip())
    capped = "merged up to 'block.conv2' its kernel would be larger than max_kernel=3: block.conv2"
    lines = [line.strip() for line in out.splitlines()]
    assert capped in lines
    assert lines[-3] == "convolutions: 3, of which 0 could change"
    assert lines[-2] == "candidates:   none"
    assert lines[-1].endswith(" kernel-cap")
    lines = run(capsys, "inspect", "clinets:net", *SHAPE).splitlines()
    assert "+ conv1, bn, relu  3x3 p1 8->8  8x12x12      7      1    1    3  not-linear" in lines
    assert lines[-3] == "convolutions: 3, of which 3 could change"
    assert max(map(len, lines)) <= 100


def test_inspect_as_json_agrees_with_the_report(capsys):
    data = json.loads(run(capsys, "inspect", "clinets:net", *SHAPE, "--json"))
    report = json.loads(run(capsys, "compress", "clinets:net", *SHAPE, *MACS, "--budget", "0.6", "--json"))["report"]
    assert data["totals"]["candidates"].items() <= report["candidates"].items()
    assert data["totals"]["refusals"] == report["refusals"]
    assert [row["name"] for row in data["convolutions"]] == ["stem", "block.conv1", "block.conv2"]
    refusals = [(row["name"], each["code"], each["node"]) for row in data["convolutions"] for each in row["refusals"]]
    assert len(refusals) == sum(report["refusals"].values())


def test_a_saved_folder_is_a_model_with_an_example(saved, folder, capsys):
    assert saved
    assert run(capsys, "export", "small", "again.pt2") == "again.pt2\n"
    x = torch.randn(2, 3, 12, 12)
    again, merged = torch.export.load(folder / "again.pt2").module(), fxmerge.load(folder / "small").merge()
    with torch.no_grad():
        torch.testing.assert_close(again(x), merged(x))
    report = fxmerge.load(folder / "small").report
    assert f"convolutions: {report.after.convolutions} -> " not in run(capsys, "inspect", "small")
    assert f"-> {report.after.convolutions}\n" in run(capsys, "fold", "small")
    assert json.loads(run(capsys, "compress", "small", *MACS, "--budget", "0.9", "--json"))["report"]["measured"] > 0


def test_a_pt2_file_is_a_model(folder, capsys):
    torch.manual_seed(0)
    net = importlib.import_module("clinets").Net().eval()
    fxmerge.export(net, folder / "net.pt2", torch.randn(2, 3, 12, 12))
    from_file = json.loads(run(capsys, "inspect", "net.pt2", *SHAPE, "--json"))
    from_class = json.loads(run(capsys, "inspect", "clinets:net", *SHAPE, "--json"))
    assert from_file["totals"] == from_class["totals"]
    run(capsys, "compress", "net.pt2", *SHAPE, *MACS, "--budget", "1.0", "--output", "from_pt2")
    loaded = fxmerge.load(folder / "from_pt2")
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded.merge()(x), net(x))
    assert list(loaded.model.state_dict()) == list(net.state_dict())


def test_weights_come_from_a_file(folder, capsys):
    torch.manual_seed(5)
    net = importlib.import_module("clinets").Net().eval()
    save_file(net.state_dict(), folder / "net.safetensors")
    run(capsys, "export", "clinets:net", "weighted.pt2", *SHAPE, "--weights", "net.safetensors")
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(folder / "weighted.pt2").module()(x), net(x))
    save_file({"stem.weight": net.stem.weight}, folder / "part.safetensors")
    text = refused(capsys, "export", "clinets:net", "weighted.pt2", *SHAPE, "--weights", "part.safetensors")
    assert text.startswith("--weights part.safetensors: ")
    assert 'Missing key(s) in state_dict: "stem.bias"' in text


def test_a_reader_that_stops_reading_does_no_harm(folder, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["fold", "clinets:net", *SHAPE, "--export", "unread.pt2"]) == 0
    assert (folder / "unread.pt2").exists()


def test_frontier_scores_in_processes_and_keeps_a_table(capsys, folder, monkeypatch):
    command = ("frontier", "clinets:net", *SHAPE, *MACS, "--calibration", "clinets:images", "--json")
    expected = run(capsys, *command)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    assert run(capsys, *command, "--workers", "1", "--importance-table", "table.sqlite") == expected
    monkeypatch.setattr("fxmerge.workers._send", lambda *_: pytest.fail("something was scored again"))
    assert run(capsys, *command, "--workers", "1", "--importance-table", "table.sqlite") == expected
    with ImportanceTable(folder / "table.sqlite") as table:
        assert len(table) > 0
    refusal = refused(capsys, *command, "--seed", "1", "--importance-table", "table.sqlite")
    assert refusal.startswith("the importance table table.sqlite was made for something else; what differs: ")
    assert "weights (" in refusal


# --- the store --------------------------------------------------------------------------------------------------------

ONE = {"device": "AMD EPYC", "precision": "float32", "runtime": "onnxruntime 1.32.0", "threads": "1"}
OWN = {"runtime": "mine 0.1"}
IDS = ("1bbb4391", "622b09c1")
CONV = LayerSignature(Geometry(3, 16, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1), (28, 30), 8, "ReLU", True)
BARE = LayerSignature(Geometry(3, 16, (1, 1), (1, 1), (1, 1), (0, 0), (0, 0), 1), (9, 9), 1)
POOL = OpSignature("MaxPool2d(2)", ((16, 14, 15), (16, 7, 7)), 8, ("Conv2d",))
HEAD = "id        latencies  oldest      newest      runtime             threads  precision  device"
ROWS = {
    "onnxruntime": f"{IDS[0]}          2  2020-01-02  2020-01-02  onnxruntime 1.32.0  1        float32    AMD EPYC",
    "mine": f"{IDS[1]}          1  2020-01-02  2020-01-02  mine 0.1            -        -          -",
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The user's store, with three latencies of long ago."""
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path))
    path = tmp_path / "latency.sqlite"
    with LatencyStore(path) as opened:
        opened.put(ONE, CONV, 0.1234, "ms")
        opened.put(ONE, POOL, 0.5, "ms")
        opened.put(OWN, BARE, 2.0, "ms")
    connection = sqlite3.connect(path)
    connection.execute("UPDATE latency SET measured_at = '2020-01-02 03:04:05'")
    connection.commit()
    connection.close()
    return path


def test_store_list(capsys, store):
    lines = run(capsys, "store", "list").splitlines()
    kilobytes = f"{store.stat().st_size / 1000:.0f} kB"
    assert lines == [
        f"{store}: 3 latencies of 2 environments, {kilobytes}",
        "",
        HEAD,
        ROWS["onnxruntime"],
        ROWS["mine"],
    ]
    data = json.loads(run(capsys, "store", "list", "--json"))
    assert (data["path"], data["bytes"]) == (str(store), store.stat().st_size)
    assert data["environments"][1] == {
        "id": IDS[1],
        "entries": 1,
        "oldest": "2020-01-02 03:04:05",
        "newest": "2020-01-02 03:04:05",
        "values": OWN,
    }


def test_store_list_of_an_empty_store(capsys, store):
    run(capsys, "store", "prune", "--all")
    (line,) = run(capsys, "store", "list").splitlines()
    assert line.startswith(f"{store}: 0 latencies of 0 environments, ")


def test_store_show(capsys, store):
    about = ["  device     AMD EPYC", "  precision  float32", "  runtime    onnxruntime 1.32.0", "  threads    1"]
    dated = "measured from 2020-01-02 03:04:05 to 2020-01-02 03:04:05 (UTC)"
    one = [f"{IDS[0]}: 2 latencies, {dated}", *about]
    other = [f"{IDS[1]}: 1 latency, {dated}", "  runtime    mine 0.1"]
    assert run(capsys, "store", "show").splitlines() == [*one, "", *other]
    layers = [
        "      0.500 ms  MaxPool2d(2), shapes 16x14x15 16x7x7, batch 8",
        "      0.123 ms  3x3 s2 p1 3->16, input 28x30, batch 8, ReLU, addition",
    ]
    shown = run(capsys, "store", "show", "--environment", IDS[0], "--layers").splitlines()
    assert (shown[:5], sorted(shown[5:])) == (one, sorted(layers))
    assert run(capsys, "store", "show", "--environment", IDS[1], "--layers").splitlines() == [
        *other,
        "      2.000 ms  1x1 3->16, input 9x9, batch 1",
    ]
    data = json.loads(run(capsys, "store", "show", "--environment", IDS[1], "--layers", "--json"))
    assert data["environments"][0]["layers"] == [{**json.loads(BARE.key()), "latency": 2.0, "unit": "ms"}]
    assert refused(capsys, "store", "show", "--environment", "0") == f"{store} holds no environment '0'"


@pytest.mark.parametrize(
    ("criteria", "gone"),
    [
        (("--runtime", "onnxruntime"), ["onnxruntime"]),
        (("--device", "epyc"), ["onnxruntime"]),
        (("--environment", IDS[1]), ["mine"]),
        (("--older-than", "30d"), ["onnxruntime", "mine"]),
        (("--older-than", "30d", "--runtime", "mine"), ["mine"]),
        (("--older-than", "99999d"), []),
        (("--all",), ["onnxruntime", "mine"]),
    ],
    ids=["runtime", "device", "environment", "older-than", "two", "nothing", "all"],
)
def test_store_prune_removes_what_it_says(capsys, store, criteria, gone):
    count = sum({"onnxruntime": 2, "mine": 1}[name] for name in gone)
    what = f"{count} {'latency' if count == 1 else 'latencies'} of {len(gone)} environment{'s' * (len(gone) != 1)}"
    before = store.read_bytes()
    dry = run(capsys, "store", "prune", *criteria, "--dry-run").splitlines()
    assert dry[0] == f"{store}: would remove {what}"
    data = json.loads(run(capsys, "store", "prune", *criteria, "--dry-run", "--json"))
    assert (sum(each["entries"] for each in data["removed"]), data["dry_run"]) == (count, True)
    assert store.read_bytes() == before
    done = run(capsys, "store", "prune", *criteria).splitlines()
    assert done == [f"{store}: removed {what}", *dry[1:]]
    assert [line.split() for line in done[3:]] == [ROWS[name].split() for name in gone]
    left = json.loads(run(capsys, "store", "list", "--json"))["environments"]
    assert sum(each["entries"] for each in left) == 3 - count


def test_a_dry_run_waits_for_no_other_process(capsys, store):
    writer = sqlite3.connect(store, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert run(capsys, "store", "prune", "--all", "--dry-run").startswith(f"{store}: would remove 3 latencies")
    writer.close()


def test_store_prune_wants_to_be_told_what(capsys, store):
    words = "say what to remove: --environment, --runtime, --device or --older-than; or --all, alone"
    assert misused(capsys, "store", "prune") == misused(capsys, "store", "prune", "--dry-run") == words
    assert misused(capsys, "store", "prune", "--all", "--runtime", "mine") == words
    wrong = misused(capsys, "store", "prune", "--older-than", "30m")
    assert wrong == "argument --older-than: '30m' is no age; expected something like 12h, 30d or 8w"
    assert refused(capsys, "store", "prune", "--environment", "0") == f"{store} holds no environment '0'"
    assert json.loads(run(capsys, "store", "list", "--json"))["environments"] != []


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("2d", 48), ("3w", 504)])
def test_ages(text, hours):
    assert _age(text) == timedelta(hours=hours)


def test_store_merge(capsys, store, tmp_path):
    new = tmp_path / "new.sqlite"
    options = ("--store", str(new))
    before = store.read_bytes()
    assert (
        run(capsys, "store", "merge", str(store), *options) == f"{new}: 3 latencies added, 0 replaced by newer ones\n"
    )
    with LatencyStore(store) as opened:
        opened.put(OWN, BARE, 1.5, "ms")
        opened.put(OWN, CONV, 1.5, "ms")
    assert json.loads(run(capsys, "store", "merge", str(store), *options, "--json")) == {
        "path": str(new),
        "added": 1,
        "replaced": 1,
    }
    assert run(capsys, "store", "merge", str(new)) == f"{store}: 0 latencies added, 0 replaced by newer ones\n"
    assert store.read_bytes() != before


def test_a_store_that_is_missing_or_foreign_is_named_and_left_alone(capsys, tmp_path):
    missing, foreign = tmp_path / "missing.sqlite", tmp_path / "foreign.sqlite"
    foreign.write_text("somebody's notes")
    for command in (("list",), ("show",), ("prune", "--all"), ("prune", "--all", "--dry-run")):
        text = refused(capsys, "store", *command, "--store", str(missing))
        assert text == f"there is no latency store at {missing}"
        text = refused(capsys, "store", *command, "--store", str(foreign))
        assert text.startswith(f"{foreign} is not a latency store of fxmerge; it was left untouched")
    for other in (missing, foreign):
        assert str(other) in refused(capsys, "store", "merge", str(other), "--store", str(tmp_path / "new.sqlite"))
    assert foreign.read_text() == "somebody's notes"
    assert list(tmp_path.iterdir()) == [foreign]


def test_store_alone_prints_its_help(capsys):
    out = run(capsys, "store")
    assert out.startswith("usage: fxmerge store")
    for words in ("list", "show", "prune", "merge", "examples:\n  fxmerge store list"):
        assert words in out


# --- what it refuses --------------------------------------------------------------------------------------------------

BUDGET = ("--budget", "0.6")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compress", "clinets:net", *BUDGET), "an example input is needed: --input-shape or --input"),
        (("compress", "clinets:net", *SHAPE), "the following arguments are required: --budget"),
        (
            ("inspect", "clinets:net", "--input-shape", "1x3xA"),
            "argument --input-shape: '1x3xA' is no shape; expected something like 1x3x224x224 or 1x16:int64",
        ),
        (
            ("compress", "clinets:net", *SHAPE, *BUDGET, "--threads", "0"),
            "argument --threads: '0' is not a whole number of at least 1",
        ),
        (
            ("compress", "clinets:net", *SHAPE, *BUDGET, *MACS, "--threads", "2"),
            "--threads goes with --runtime onnxruntime",
        ),
    ],
)
def test_wrong_usage_ends_with_2(capsys, arguments, words):
    assert misused(capsys, *arguments) == words


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "resnet18",
            "no model 'resnet18': expected package.module:name, a .pt2 file, or a folder that compress --output",
        ),
        ("nowhere.nets:net", "nowhere.nets:net: there is no module 'nowhere', neither installed nor in "),
        ("clinets:nothing", "clinets:nothing: clinets has no 'nothing'"),
        ("clinets:", "'clinets:' names nothing: expected package.module:name"),
        ("clinets:number", "clinets:number is a int; expected something that can be called"),
        ("clinets:pairs", "clinets:pairs returned a list; expected a torch.nn.Module"),
        ("nothing.pt2", "nothing.pt2 is missing, or is no program that torch.export.save wrote"),
        (".", "graph.json: no such file; expected one that fxmerge saved"),
    ],
)
def test_what_is_no_model_is_named(capsys, model, words):
    assert refused(capsys, "inspect", model, *SHAPE).startswith(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output", "clinets.py"), "clinets.py is a file; expected a folder"),
        (("--output", "."), " is not empty and was not written by this version of fxmerge"),
        (("--output", "clinets.py/deeper"), "clinets.py/deeper cannot be written: "),
        (
            ("--export", "net.tflite"),
            "cannot export to 'net.tflite': expected a path ending in .onnx, .pt2 or .engine.",
        ),
        (("--export", "nowhere/net.onnx"), "cannot export to 'nowhere/net.onnx': its folder does not exist."),
        (("--runtime", "tpu"), "unknown runtime 'tpu'; expected one of 'auto', 'tensorrt', "),
        (
            ("--importance", "taylor"),
            "unknown importance 'taylor'; the known ones are auto, distortion, local, magnitude",
        ),
        (("--method", "width"), "unknown method 'width'; the known ones are layermerge, depth, layer"),
        (("--budget", "8ms", *MACS), "budget='8ms' is in ms, but this runtime measures MACs"),
        (("--budget", "lots"), "budget='lots' is not a number"),
        (("--budget", "0.001", *MACS), "is out of reach: the smallest reachable is "),
        (("--input-shape", "2:int63"), "--input-shape: torch has no dtype 'int63'"),
        (("--weights", "clinets.py"), "--weights clinets.py: "),
        (("--calibration", "clinets:nothing"), "clinets:nothing: clinets has no 'nothing'"),
        (("--calibration", "clinets:pairs"), "calibration batch 0 holds tensors of shape [[4, 3, 12, 12], [4]]"),
    ],
)
def test_a_wrong_option_ends_with_1_and_one_line_before_the_work(capsys, monkeypatch, options, words):
    monkeypatch.setattr("fxmerge.runtimes.onnxruntime.OnnxRuntime.build", lambda *_: pytest.fail("measured"))
    assert words in refused(capsys, "compress", "clinets:net", *SHAPE, *BUDGET, *options)


def test_unwritable_outputs_are_refused_before_the_model_is_made(capsys):
    for options in (("--output", "clinets.py"), ("--export", "net.tflite")):
        refused(capsys, "compress", "clinets:fails", *SHAPE, *BUDGET, *options)
    text = refused(capsys, "frontier", "clinets:fails", *SHAPE, *MACS, "--save", "nowhere/plans.json")
    assert text.startswith("nowhere/plans.json cannot be written: ")
    refused(capsys, "frontier", "clinets:fails", *SHAPE, *MACS, "--budget", "8ms")
    assert "expected a path ending in .onnx, .pt2 or .engine" in refused(
        capsys, "export", "clinets:fails", "net", *SHAPE
    )


def test_what_fails_in_the_users_own_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault of the user's"):
        main(["inspect", "clinets:fails", *SHAPE])
