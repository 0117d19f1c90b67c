"""Published networks through the whole pipeline at 64x64, counted in multiply-accumulates, and two of them measured.

Calibrated random weights, so that outputs depend on inputs (``zoo.calibrate``); importance is ``magnitude``.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from zoo import NETWORKS, calibrate, dependence, image_shape, seed_images

import fxmerge
from fxmerge.checks import check_equal, check_inputs, relative_error
from fxmerge.closed_loop import TOLERANCE
from fxmerge.errors import InternalError
from fxmerge.graph import by_id, clone, convolutions, graph_meta, node_id
from fxmerge.passes import FoldPass
from fxmerge.runtimes.onnxruntime import OnnxRuntime

SIZE = 64
BUDGETS = (0.8, 0.6, 0.45)
MEASURED = ("resnet18", "vgg16_bn")


@cache
def prepared(name):
    """A network with its frontier and its three results: what the tests of one network share."""
    model = calibrate(NETWORKS[name](size=SIZE), image_shape(name, 4, SIZE), passes=4)
    example = seed_images(image_shape(name, 2, SIZE), seed=1)
    frontier = fxmerge.frontier(model, example, runtime="macs")
    results = {budget: frontier.apply(frontier.at(budget)) for budget in BUDGETS}
    return SimpleNamespace(model=model, example=example, frontier=frontier, results=results)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NETWORKS], scope="module")
def network(request):
    yield request.param, prepared(request.param)
    prepared.cache_clear()


def test_capture_equals_the_model(network):
    name, made = network
    assert dependence(made.model, image_shape(name, 2, SIZE)) >= 0.01
    double = copy.deepcopy(made.model).double()
    x = seed_images(image_shape(name, 3, SIZE), seed=2).double()
    with torch.no_grad():
        captured = fxmerge.capture(double, x[:2])
        assert relative_error([captured(x)], [double(x)]) <= 1e-10
        assert set(captured.state_dict()) == set(double.state_dict())
        _mirror(captured)
        assert relative_error([captured(x)], [double(x)]) > 1e-3


def test_the_empty_plan_is_the_original(network):
    _, made = network
    result = made.frontier.apply(made.frontier.at(1.0))
    assert result.plan.entries == ()
    with torch.no_grad():
        assert torch.equal(result.model(made.example), made.model(made.example))
    assert result.report.after.convolutions == result.report.before.convolutions


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_are_met_and_the_merged_network_is_the_trainable_one(network, budget):
    _, made = network
    result = made.results[budget]
    assert result.report.measured <= budget * result.report.original
    assert result.report.predicted <= budget * result.report.original * (1 + 1e-9)
    assert result.report.error <= result.report.error_allowed <= 1e-2
    assert result.report.dependence >= 1e-3
    assert len(result.report.decisions) == result.report.before.convolutions


def test_at_60_percent_two_convolutions_are_merged_into_one(network):
    _, made = network
    assert made.results[0.6].plan.merges


def test_the_check_catches_a_wrong_network(network):
    """A mirrored kernel and a padding off by one in the merged network are caught by the comparison with the trainable one."""
    _, made = network
    result = made.results[0.6]
    inputs = check_inputs(((made.example,), {}))
    merged = result.merge()
    check_equal(result.model, merged, inputs, result.report.original_error)
    with pytest.raises(InternalError, match="differs from its trainable form"):
        check_equal(result.model, _mirror(result.merge()), inputs, result.report.original_error)
    with pytest.raises(InternalError, match="differs from its trainable form"):
        check_equal(result.model, _shift_padding(merged), inputs, result.report.original_error)


@pytest.mark.parametrize("budget", BUDGETS)
def test_onnx_gives_the_same_outputs_at_two_batch_sizes(network, budget, tmp_path):
    import onnxruntime

    name, made = network
    result = made.results[budget]
    path = fxmerge.export(result, tmp_path / "net.onnx", check=False)
    merged = result.merge()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = seed_images(image_shape(name, batch, SIZE), seed=batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = merged(torch.cat([x, x + 1]))
        scale = (expected - expected.mean(0)).abs().max()
        allowed = max(1e-4, 20 * result.report.original_error)
        assert (torch.from_numpy(found) - expected[:batch]).abs().max() <= allowed * scale


LOAD = """
import sys, torch, fxmerge
assert not any(name.startswith(("pytorchcv", "zoo")) for name in sys.modules)
for folder in sys.argv[1:]:
    result = fxmerge.load(folder)
    saved = torch.load(f"{folder}/expected.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(result.model(saved["x"]), saved["y"]), folder
    result.model.train()
    before = {name: p.detach().clone() for name, p in result.model.named_parameters()}
    loss = result.model(saved["x"]).square().mean()
    loss.backward()
    with torch.no_grad():
        for p in result.model.parameters():
            p -= 1e-3 * p.grad
    assert sum(not torch.equal(p, before[name]) for name, p in result.model.named_parameters()) >= len(before) // 2
    merged = result.merge()
    print(sum(isinstance(m, torch.nn.Conv2d) for m in merged.modules()))
"""


def test_saved_results_load_train_and_merge_in_a_fresh_process(network, tmp_path):
    _, made = network
    folders = []
    for budget, result in made.results.items():
        folder = tmp_path / str(budget)
        result.save(folder)
        with torch.no_grad():
            torch.save({"x": made.example, "y": result.model.eval()(made.example)}, folder / "expected.pt")
        folders.append(str(folder))
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "error", "-c", LOAD, *folders], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    counts = [result.report.after.convolutions for result in made.results.values()]
    assert run.stderr == ""
    assert [int(line) for line in run.stdout.split()] == counts


def test_training_then_merging_keeps_the_trained_function():
    made = prepared("resnet18")
    result = made.frontier.apply(made.frontier.at(0.6))
    before = result.merge()
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.01)
    result.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        result.model(made.example).square().mean().backward()
        optimizer.step()
    after = result.merge()
    result.model.eval()
    with torch.no_grad():
        trained = result.model(made.example)
        assert relative_error([after(made.example)], [trained]) <= 1e-3
        assert relative_error([before(made.example)], [trained]) > 1e-2


def test_a_missing_crop_of_a_skip_is_caught():
    """Folding a relaxed residual block whose identity skip is not cropped fails, rather than giving a wrong convolution."""
    made = prepared("resnet18")
    model = next(r.model for r in made.results.values() if _crops(r.model))
    broken = clone(model)
    crop = _crops(broken)[0]
    crop.replace_all_uses_with(crop.args[0])
    broken.graph.erase_node(crop)
    broken.recompile()
    with pytest.raises(fxmerge.FxmergeError, match=node_id(crop).partition("/")[0]):
        FoldPass()(broken)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MEASURED])
@pytest.mark.parametrize("budget", BUDGETS)
def test_measured_latency_meets_the_budget(name, budget, tmp_path):
    made = prepared(name)
    result = fxmerge.compress(
        made.model,
        made.example,
        budget,
        runtime=OnnxRuntime(threads=1),
        store=tmp_path.parent / f"{name}.sqlite",
        measure_seconds=0.5,
    )
    assert result.report.unit == "ms"
    slack = min(result.report.repeatability, TOLERANCE)  # two timings of one network differ by as much
    assert result.report.measured <= budget * result.report.original * (1 + slack)
    assert result.report.after.convolutions < result.report.before.convolutions
    assert result.report.error <= result.report.error_allowed


def _crops(gm):
    """Crops of identity skips inside merged segments: negative pads that an addition reads."""
    nodes = by_id(gm)
    members = [nodes[name] for segment in graph_meta(gm).get("segments", ()) for name in segment["members"]]
    return [
        node
        for node in members
        if node.target is nn.functional.pad
        and min(node.args[1]) < 0
        and any(u.op == "call_function" for u in node.users)
    ]


def _mirror(gm):
    """Mirror the largest kernel in the middle of the network."""
    modules = [module for _, module in convolutions(gm) if max(module.kernel_size) > 1]
    module = modules[len(modules) // 2]
    module.weight = nn.Parameter(module.weight.detach().flip(-1))
    return gm


def _shift_padding(gm):
    """Move the padding of a convolution by one pixel: one more on the left, one less on the right."""
    node, module = next((n, m) for n, m in convolutions(gm) if max(m.padding) > 0 and m.stride == (1, 1))
    left = right = module.padding[0]
    with gm.graph.inserting_before(node):
        pad = gm.graph.call_function(nn.functional.pad, (node.args[0], [left + 1, right - 1, left, right]))
    node.args = (pad,)
    module.padding = (0, 0)
    gm.recompile()
    return gm
