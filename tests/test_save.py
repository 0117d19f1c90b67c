"""Exporting through the public function: results, modules, and what is refused before any work."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.errors import UserError
from fxmerge.result import Result


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image)))
        return self.conv2(torch.relu(x + self.conv1(x))).mean((2, 3))


class Fixed(Net):
    """Its batch size is part of it."""

    def forward(self, image):
        return super().forward(image.reshape(3, 3, 12, 12))


def images(count, seed=0):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    return fxmerge.compress(Net(), images(2), 0.6, runtime="macs")


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def run_pt2(path, x, *, keyword=False):
    program = torch.export.load(path).module()
    with torch.no_grad():
        return program(image=x) if keyword else program(x)


def count_convolutions(path):
    import onnx

    return sum(node.op_type == "Conv" for node in onnx.load(str(path)).graph.node)


def test_a_result_is_exported_merged_at_any_batch_size(result, tmp_path):
    path = fxmerge.export(result, tmp_path / "net.onnx")
    assert path == tmp_path / "net.onnx"
    assert count_convolutions(path) == result.report.after.convolutions < 3
    with torch.no_grad():
        for count in (1, 5):
            x = images(count, seed=count)
            torch.testing.assert_close(run_onnx(path, x), result.merge()(x), rtol=0, atol=1e-4)


def test_an_exported_program_loads_without_fxmerges_or_the_users_classes(result, tmp_path):
    path = fxmerge.export(result, str(tmp_path / "net.pt2"))
    x = images(5, seed=3)
    torch.testing.assert_close(run_pt2(path, x), result.merge()(x).detach(), rtol=0, atol=1e-5)


def test_training_changes_what_is_exported(tmp_path):
    torch.manual_seed(0)
    trained = fxmerge.compress(Net(), images(2), 0.6, runtime="macs")
    before = run_pt2(fxmerge.export(trained, tmp_path / "before.pt2"), images(3))
    trained.model.train()(images(8)).square().mean().backward()
    torch.optim.SGD(trained.model.parameters(), lr=0.5).step()
    after = run_pt2(fxmerge.export(trained, tmp_path / "after.pt2"), images(3))
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, trained.merge()(images(3)).detach(), rtol=0, atol=1e-4)


def test_a_result_can_be_exported_for_another_example(result, tmp_path):
    path = fxmerge.export(result, tmp_path / "net.pt2", images(3)[..., :10], dynamic_batch=False)
    (image,) = [node for node in torch.export.load(path).graph.nodes if node.name == "image"]
    assert list(image.meta["val"].shape) == [3, 3, 12, 10]


@pytest.mark.parametrize("make_example", [lambda x: x, lambda x: (x,), lambda x: {"image": x}])
def test_a_module_is_exported_as_it_is_for_any_form_of_example(tmp_path, make_example):
    torch.manual_seed(0)
    net = Net().eval()
    path = fxmerge.export(net, tmp_path / "net.pt2", make_example(images(2)))
    operators = [str(node.target) for node in torch.export.load(path).graph.nodes]
    assert operators.count("aten.conv2d.default") == 3
    assert operators.count("aten.batch_norm.default") == 1
    x = images(4, seed=1)
    keyword = isinstance(make_example(x), dict)
    torch.testing.assert_close(run_pt2(path, x, keyword=keyword), net(x).detach(), rtol=0, atol=1e-5)


def test_what_fold_and_merge_return_is_a_module_like_any_other(result, tmp_path):
    for name, network in (("folded", fxmerge.fold(Net(), images(2))), ("merged", result.merge())):
        path = fxmerge.export(network, tmp_path / f"{name}.pt2", images(2))
        x = images(3, seed=1)
        torch.testing.assert_close(run_pt2(path, x), network(x).detach(), rtol=0, atol=1e-5)


def test_a_network_with_a_fixed_batch_is_exported_with_it_and_a_warning(tmp_path):
    torch.manual_seed(0)
    fixed = fxmerge.compress(Fixed(), images(3), 0.6, runtime="macs")
    with pytest.warns(UserWarning, match="fixed the batch size of this network: exported with it fixed"):
        path = fxmerge.export(fixed, tmp_path / "net.pt2")
    torch.testing.assert_close(run_pt2(path, images(3)), fixed.merge()(images(3)).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.tflite", r"net\.tflite': expected a path ending in \.onnx, \.pt2 or \.engine"),
        ("net", r"net': expected a path ending in \.onnx, \.pt2 or \.engine"),
        ("missing/net.onnx", r"missing/net\.onnx': its folder does not exist\. Create it first"),
        ("folder.onnx", r"folder\.onnx': it is a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_merging(result, tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(Result, "merge", lambda _: pytest.fail("merged before the path was checked"))
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match=words):
        fxmerge.export(result, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize(
    ("network", "example", "words"),
    [
        (Net().eval(), None, "to export a Net pass example_input, what its forward takes"),
        (Net().eval(), [images(2)], "example_input is a list; expected a tensor, a tuple"),
        (Net().train(), images(2), r"Net is in training mode; call its \.eval\(\)"),
        ("saved", None, r"cannot export a str: expected a torch\.nn\.Module or a result .* fxmerge\.load\(folder\)"),
    ],
)
def test_what_is_no_network_with_an_example_is_refused(tmp_path, network, example, words):
    with pytest.raises(UserError, match=words):
        fxmerge.export(network, tmp_path / "net.pt2", example)
    assert list(tmp_path.iterdir()) == []
