"""Results: they merge, train, and come back from a folder in a process that knows nothing of the model's class."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxmerge
from fxmerge.errors import StoreError

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """Three convolutions, a skip, a batch norm, a dropout; two inputs by keyword, the second a number per image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, image, shift):
        x = torch.relu(self.stem(image))
        x = torch.relu(x + self.conv2(torch.relu(self.norm(self.conv1(x)))))
        return {"logits": self.head(self.drop(x.mean((2, 3)))) + shift[:, None]}


def example(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 12, 12, generator=generator)
    return {"image": image * 2 + 5, "shift": torch.arange(count) % 3}


@pytest.fixture(scope="module")
def result():
    """Not to be changed by a test."""
    torch.manual_seed(0)
    return fxmerge.compress(Net(), example(), 0.6, runtime="macs")


def logits(network, seed=1):
    with torch.no_grad():
        return network(**example(4, seed))["logits"]


def evaluated(network):
    return logits(copy.deepcopy(network).eval())


def test_every_merge_is_a_new_network_that_shares_nothing(result):
    first, second = result.merge(), result.merge()
    assert first is not second
    own = {p.data_ptr() for p in (*result.model.parameters(), *second.parameters())}
    assert not own & {p.data_ptr() for p in first.parameters()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(logits(second), logits(result.merge()))
    assert not torch.equal(logits(first), logits(second))


def test_the_merged_network_is_smaller_and_computes_what_the_trainable_one_does(result):
    merged = result.merge()
    convolutions = [m for m in merged.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == result.report.after.convolutions < result.report.before.convolutions == 3
    assert result.report.after.parameters == sum(p.numel() for p in merged.parameters())
    assert not merged.training
    torch.testing.assert_close(logits(merged), evaluated(result.model), rtol=0, atol=1e-4)


def train_one_step(network):
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    network.train()
    loss = network(**example(8, seed=2))["logits"].square().mean()
    loss.backward()
    optimiser.step()


def test_training_changes_what_is_merged_later():
    torch.manual_seed(0)
    result = fxmerge.compress(Net(), example(), 0.6, runtime="macs")
    before = logits(result.merge())
    train_one_step(result.model)
    after = logits(result.merge())
    assert float((after - before).abs().max()) > 1e-3
    assert result.model.training  # merging does not end the training
    torch.testing.assert_close(after, logits(result.model.eval()), rtol=0, atol=1e-4)


def test_a_saved_result_comes_back_with_all_it_held(result, tmp_path):
    result.save(tmp_path / "saved")
    loaded = fxmerge.load(tmp_path / "saved")
    assert loaded.plan == result.plan
    assert str(loaded.report) == str(result.report)
    assert torch.equal(logits(loaded.merge()), logits(result.merge()))
    assert list(loaded.model.state_dict()) == list(result.model.state_dict())
    assert loaded.model.training == result.model.training
    args, kwargs = loaded.example
    assert args == ()
    assert {name: (t.shape, t.dtype) for name, t in kwargs.items()} == {
        name: (t.shape, t.dtype) for name, t in example().items()
    }
    assert 4.5 < float(kwargs["image"].mean()) < 5.5  # values like the example's, and not the example's
    assert not torch.equal(kwargs["image"], example()["image"])
    assert set(kwargs["shift"].tolist()) <= {0, 1}
    assert repr(loaded) == repr(result)


SCRIPT = """
import sys, torch, fxmerge
from safetensors.torch import load_file, save_file
result = fxmerge.load("saved")
inputs = load_file("inputs.safetensors")
with torch.no_grad():
    before = result.merge()(**inputs)["logits"]
optimiser = torch.optim.SGD(result.model.parameters(), lr=0.1)
result.model.train()
result.model(**inputs)["logits"].square().mean().backward()
optimiser.step()
with torch.no_grad():
    after = result.merge()(**inputs)["logits"]
    trained = result.model.eval()(**inputs)["logits"]
save_file({"before": before, "after": after, "trained": trained}, "outputs.safetensors")
assert "test_result" not in sys.modules
"""


def test_a_saved_result_trains_and_merges_in_a_process_without_the_models_class(result, tmp_path):
    result.save(tmp_path / "saved")
    save_file(example(4, seed=1), tmp_path / "inputs.safetensors")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = load_file(tmp_path / "outputs.safetensors")
    torch.testing.assert_close(outputs["before"], logits(result.merge()), rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs["after"], outputs["trained"], rtol=0, atol=1e-4)
    assert float((outputs["after"] - outputs["before"]).abs().max()) > 1e-3


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("graph.json", lambda data: data[: len(data) // 2], r"saved/graph\.json: damaged or not written by fxmerge"),
        (
            "graph.json",
            lambda _: b'{"format": "fxmerge.graph/99"}',
            r"saved/graph\.json: its format is 'fxmerge\.graph/99'",
        ),
        (
            "weights.safetensors",
            lambda data: data[:40],
            r"saved/weights\.safetensors: damaged or not written by fxmerge",
        ),
        ("plan.json", lambda _: b"]", r"saved/plan\.json: damaged or not written by fxmerge"),
        ("example.json", None, r"saved/example\.json: no such file"),
        ("graph.json", None, r"saved/graph\.json: no such file"),
    ],
)
def test_a_damaged_folder_is_named_and_left_alone(result, tmp_path, name, damage, words):
    folder = tmp_path / "saved"
    result.save(folder)
    path = folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    before = contents(folder)
    with pytest.raises(StoreError, match=words):
        fxmerge.load(folder)
    assert contents(folder) == before


def test_a_report_of_another_version_is_refused(result, tmp_path):
    result.save(tmp_path / "saved")
    path = tmp_path / "saved" / "report.json"
    report = json.loads(path.read_text())
    del report["measured"]
    path.write_text(json.dumps(report))
    with pytest.raises(StoreError, match=r"this is no report of this version of fxmerge: .*measured"):
        fxmerge.load(tmp_path / "saved")


def test_a_foreign_folder_is_neither_loaded_nor_overwritten(result, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"beach")
    with pytest.raises(StoreError, match=r"graph\.json: no such file; expected one that fxmerge saved"):
        fxmerge.load(tmp_path)
    with pytest.raises(StoreError, match="is not empty and was not written by fxmerge: save into another folder"):
        result.save(tmp_path)
    assert contents(tmp_path) == {"holiday.jpg": b"beach"}


def test_the_report_has_a_line_for_every_convolution_and_every_number(result):
    lines = str(result.report).splitlines()
    assert lines[0].startswith("No calibration data: importance is magnitude, weights are composed")
    head = {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines[1 : lines.index("")]}
    assert head["convolutions"] == f"3 -> {result.report.after.convolutions}"
    for name in ("requested", "predicted", "measured"):
        value = getattr(result.report, name)
        assert head[name] == f"{value / 1e3:.2f} kMACs ({value / result.report.original:.1%})"
    table = [*lines[lines.index("") + 1 :], ""]
    decisions = [line.split()[:2] for line in table[: table.index("")]]  # what follows is the legend
    assert decisions == [[d.decision, d.convolution] for d in result.report.decisions]
    assert [d.convolution for d in result.report.decisions] == ["stem", "conv1", "conv2"]
    assert {d.decision for d in result.report.decisions} <= {"kept", "merged", "removed", "dropped"}
    assert all(len(d.reason) > 10 for d in result.report.decisions)


class Constant(Net):
    """Its output has nothing to do with its input."""

    def forward(self, image, shift):
        return super().forward(image * 0, shift * 0)


def test_a_network_that_cannot_be_checked_end_to_end_says_so_and_is_saved_all_the_same(tmp_path):
    torch.manual_seed(0)
    result = fxmerge.compress(Constant(), example(), 0.6, runtime="macs")
    assert any("not checkable end to end" in note for note in result.report.notes)
    result.save(tmp_path / "saved")
    assert fxmerge.load(tmp_path / "saved").report.notes == result.report.notes
