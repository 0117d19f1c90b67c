"""The test networks are the published ones, seeded; and the smallest of the zoo go through the whole pipeline."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from zoo import NETWORKS, SMALLEST, ZOO, calibrate, dependence, he_weights, image_shape, seed_images

import fxmerge
from fxmerge import checks
from fxmerge.checks import check_equal, outputs_of, relative_error
from fxmerge.errors import BudgetError, InternalError
from fxmerge.exporters import input_arrays
from fxmerge.graph import convolutions as convolution_nodes
from fxmerge.inputs import split_example
from fxmerge.regions import Mesh, Parallel, Series, all_series, operations, region_tree

PARAMETERS = {
    "vgg16_bn": 138_365_992,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_503_872,  # 3,504,872 with the bias that pytorchcv leaves out of its classifier
    "preact_resnet": 11_687_848,
    "dncnn": 556_097,
}
CONVOLUTIONS = {
    "vgg16_bn": 13,
    "resnet18": 20,
    "resnet34": 36,
    "resnet50": 53,
    "mobilenet_v2": 53,  # its classifier is a convolution
    "preact_resnet": 20,
    "dncnn": 17,
}


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_published_one(name):
    with torch.device("meta"):
        model = NETWORKS[name]()
        output = model(torch.empty(image_shape(name, 2)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(convolutions(model)) == CONVOLUTIONS[name]
    assert output.shape == ((2, 1, 224, 224) if name == "dncnn" else (2, 1000))
    assert not model.training


@pytest.mark.parametrize("name", NETWORKS)
def test_calibrated_output_depends_on_the_input_and_shows_a_mirrored_kernel(name):
    shape = image_shape(name, 2, size=64)
    model = calibrate(NETWORKS[name](size=64), shape, passes=4)
    # DnCNN's output is its input less a noise estimate: the estimate is what must depend on it.
    assert dependence(model.noise if name == "dncnn" else model, shape) > 0.05

    images = seed_images(shape, seed=7)
    spatial = [conv for conv in convolutions(model) if conv.kernel_size != (1, 1)]
    with torch.no_grad():
        expected = model(images)
        spatial[len(spatial) // 2].weight.copy_(spatial[len(spatial) // 2].weight.flip(-1))
        change = (model(images) - expected).abs().max()
    assert change / (expected - expected.mean(0)).abs().max() > 0.01


def test_dependence_tells_an_uncalibrated_network_apart():
    # Under torch's default weights and fresh statistics activations shrink from layer to layer.
    noise = NETWORKS["dncnn"](size=32).noise
    shape = image_shape("dncnn", 2, size=32)
    assert dependence(noise, shape) < 1e-4
    assert dependence(calibrate(noise, shape, passes=4), shape) > 0.05


def test_same_seed_gives_the_same_network_and_leaves_the_global_state():
    before = torch.get_rng_state()
    one, same, other = (NETWORKS["resnet18"](size=32, seed=seed) for seed in (3, 3, 4))
    shape = image_shape("resnet18", 2, size=32)
    for model in (one, same, other):
        calibrate(model, shape, passes=2)
    images = seed_images(shape)
    assert torch.equal(one(images), same(images))
    assert not torch.allclose(one(images), other(images))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, seed_images(shape))
    assert not torch.equal(images, seed_images(shape, seed=1))


def test_calibrate_averages_batch_statistics_with_equal_weight():
    norm = nn.BatchNorm2d(3, momentum=0.3)
    shape = (4, 3, 8, 8)
    calibrate(norm, shape, passes=3, seed=50)  # earlier statistics must leave no trace
    assert calibrate(norm, shape, passes=5, seed=2) is norm
    batches = [seed_images(shape, seed) for seed in range(2, 7)]
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(norm.running_var, variance, atol=1e-6, rtol=0)
    assert norm.momentum == 0.3
    assert not norm.training


def test_dependence_is_the_largest_deviation_over_the_largest_output():
    class Offset(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)) + 10

    shape = (2, 1, 4, 4)
    a, b = seed_images(shape, seed=1000).mean((1, 2, 3)).tolist()
    assert dependence(Offset(), shape) == pytest.approx(abs(a - b) / 2 / (10 + max(a, b)), rel=1e-4)


@pytest.mark.parametrize("size", [0, 100])
def test_size_must_be_a_multiple_of_32(size):
    with pytest.raises(ValueError, match=f"size is {size}, must be a positive multiple of 32"):
        NETWORKS["resnet18"](size=size)


def test_networks_need_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; import zoo"
    subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parent, check=True
    )


# --- the zoo ----------------------------------------------------------------------------------------------------------

BUDGETS = (0.85, 0.7, 0.55)
KINDS = {
    "classification",
    "segmentation",
    "detection backbone",
    "super-resolution",
    "denoising",
    "diffusion",
    "1d audio",
    "3d video",
}
MERGING = ("resnet20", "repvgg", "fusion", "dncnn")
"""Those whose best plan at 0.7 of the multiply-accumulates merges; others get there by removing alone."""
MESHES = {"densenet": (2, 12), "fusion": (1, 21), "pyramid": (1, 22), "wavenet": (1, 11)}
"""Networks that hold Mesh regions: how many, and how many convolutions are inside. The others hold none."""


@cache
def prepared(name):
    """A network with its frontier and a result for each budget, or for the least share where one is out of reach."""
    entry = ZOO[name]
    model = entry.build()
    frontier = fxmerge.frontier(model, entry.example(), runtime="macs", importance="magnitude")
    least = frontier.points[0][0] / frontier.original
    results = {b: frontier.compress(b) if b >= least else frontier.apply(frontier.plan(0)) for b in BUDGETS}
    return SimpleNamespace(name=name, entry=entry, model=model, frontier=frontier, least=least, results=results)


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"zoo-{name}")) for name in SMALLEST], scope="module"
)
def network(request):
    yield prepared(request.param)
    prepared.cache_clear()


def inputs_of(made, batch=2, seed=1):
    return split_example(made.entry.example(batch, seed))


def mirrored(gm):
    """The network with one kernel in its middle mirrored, of those that are not their own mirror image."""
    weights = [(module, module.weight.detach()) for _, module in convolution_nodes(gm)]
    pairs = [(module, weight, weight.flip([*range(2, weight.ndim)])) for module, weight in weights]
    uneven = [(module, mirror) for module, weight, mirror in pairs if not torch.allclose(weight, mirror)]
    module, mirror = uneven[len(uneven) // 2]
    module.weight = nn.Parameter(mirror)
    return gm


def meshes(region):
    return [child for series in all_series(region) for child in series.children if isinstance(child, Mesh)]


def is_conv(node):
    module = node.graph.owning_module
    return node.op == "call_module" and isinstance(module.get_submodule(node.target), nn.modules.conv._ConvNd)


def in_series(region):
    """The operations that some Series of the tree orders: all but those that a Mesh alone holds."""
    if isinstance(region, (Series, Mesh)):
        return {node for child in region.children for node in in_series(child)}
    branches = [branch for branch in getattr(region, "branches", ()) if branch is not None]
    return {region.exit}.union(*map(in_series, branches))


def test_the_zoo_is_wide():
    assert len(ZOO) >= 60
    assert len({entry.family for entry in ZOO.values()}) >= 25
    assert {entry.kind for entry in ZOO.values()} >= KINDS
    assert len(set(SMALLEST)) == 12
    assert all(
        batch == tensor.shape[0] for batch in (1, 3) for tensor in (ZOO[name].example(batch) for name in ("m5", "r3d"))
    )


def test_a_network_of_the_zoo_is_seeded_and_leaves_the_global_state():
    before = torch.get_rng_state()
    one, same, other = (ZOO["time_unet"].build(seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    example = ZOO["time_unet"].example()
    assert torch.equal(one(*example), same(*example))
    assert not torch.allclose(one(*example), other(*example))
    assert all(torch.equal(a, b) for a, b in zip(example, ZOO["time_unet"].example(), strict=True))
    assert not torch.equal(example[0], ZOO["time_unet"].example(seed=2)[0])


def test_he_weights_keep_the_size_of_a_signal():
    layers = [layer for _ in range(20) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers), seed_images((2, 32, 8, 8))
    assert dependence(model, x.shape) < 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        he_weights(model)
    assert dependence(model, x.shape) > 0.1
    assert 0.05 < model(x).std() < 5


def test_the_empty_plan_is_the_model(network):
    """Captured, relaxed by nothing, and another batch size than the example's."""
    result = network.frontier.apply(network.frontier.at(1.0))
    assert result.plan.entries == ()
    assert sum(1 for _ in convolution_nodes(result.model)) == result.report.before.convolutions
    inputs = inputs_of(network, batch=3, seed=2)
    expected = outputs_of(network.model, inputs)
    assert checks.dependence(expected) >= 0.01
    assert relative_error(outputs_of(result.model, inputs), expected) <= 1e-5
    assert relative_error(outputs_of(mirrored(result.model), inputs), expected) > 1e-3


def test_budgets_are_met_or_the_least_is_named(network):
    for budget, result in network.results.items():
        share = result.report.measured / result.report.original
        if budget >= network.least:
            assert share <= budget
        else:
            assert share == pytest.approx(network.least)
            with pytest.raises(BudgetError, match=f"smallest reachable is .* \\({network.least:.1%}\\)"):
                network.frontier.compress(budget)
        # Not exactly what is predicted: linear layers go with what they were added to, or grow with it.
        assert result.report.measured <= result.report.predicted * (1 + 1e-3)


def test_every_convolution_has_a_decision_and_a_reason(network):
    for result in network.results.values():
        decided = {each.convolution: each for each in result.report.decisions}
        assert len(decided) == result.report.before.convolutions
        assert all(
            each.decision in ("kept", "merged", "removed", "dropped") and each.reason for each in decided.values()
        )
        touched = {name for c in result.plan.candidates for name in (*c.kept, *c.bypassed)}
        assert touched == {name for name, each in decided.items() if each.decision != "kept"}


def test_merged_equals_relaxed_at_another_batch_size(network):
    for result in network.results.values():
        assert result.report.error <= result.report.error_allowed <= 1e-2
        assert result.report.dependence >= 1e-3
        inputs = inputs_of(network, batch=3, seed=5)
        own = result.report.original_error
        assert check_equal(result.model, result.merge(), inputs, own).error <= max(1e-5, 20 * own)


def test_the_check_catches_a_mirrored_kernel(network):
    result = network.results[0.85]
    with pytest.raises(InternalError, match="differs from its trainable form"):
        check_equal(result.model, mirrored(result.merge()), inputs_of(network), result.report.original_error)


def test_onnx_runtime_gives_the_same_outputs_at_two_batch_sizes(network, tmp_path):
    import onnxruntime

    result = network.results[0.7]
    merged = result.merge()
    path = fxmerge.export(result, tmp_path / "net.onnx", check=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    allowed = max(1e-4, 20 * result.report.original_error)
    for batch in (3, 2):
        args, kwargs = inputs_of(network, batch, seed=batch)
        arrays = {name: array for name, array in input_arrays(merged, args, kwargs).items() if name in wanted}
        found = [torch.from_numpy(array) for array in session.run(None, arrays)]
        expected = outputs_of(merged, (args, kwargs))
        assert relative_error(found, expected) <= allowed
        assert relative_error([each.roll(1, 0) for each in found], expected) > 0.1


def test_the_best_plan_at_70_percent_merges(network):
    if network.name in MERGING:
        assert network.results[0.7].plan.merges
        assert network.results[0.7].report.after.convolutions < network.results[0.7].report.before.convolutions


def test_meshes_are_few_and_the_chains_inside_them_are_found(network):
    """A Mesh's convolutions are in a Series of their own wherever something is in a row with them."""
    tree = network.frontier.enumeration.series[0]
    found = meshes(tree)
    convolutions_inside = [node.target for mesh in found for node in mesh.nodes if is_conv(node)]
    assert (len(found), len(convolutions_inside)) == MESHES.get(network.name, (0, 0))
    if network.name in ("densenet", "fusion"):
        assert set(convolutions_inside) <= {node.target for node in in_series(tree)}


def test_blocks_that_read_an_embedding_of_the_image_are_one_series():
    model = ZOO["embedded"].make().eval()
    tree = region_tree(fxmerge.capture(model, ZOO["embedded"].example()))
    joins = [child.join for child in tree.children if isinstance(child, Parallel)]
    assert joins == ["add"] * 3
    assert meshes(tree) == []
    branches = [branch for child in tree.children if isinstance(child, Parallel) for branch in child.branches]
    chains = [branch for branch in branches if branch is not None]
    assert [sum(is_conv(node) for node in operations(chain)) for chain in chains] == [2, 2, 2]
