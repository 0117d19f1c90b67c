"""Blocks that train as several branches fold to exactly the convolution of their deploy form."""

from __future__ import annotations

import pytest
import torch
from reparam_networks import BLOCKS, DBB, NETWORKS, deployed, lively, network
from torch import nn

import fxmerge
from fxmerge.graph import convolutions, graph_meta, module_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
WRONG = 1e-3


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found, expected):
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    difference = (found.double() - expected).detach()
    return float(difference.abs().max() / expected.detach().abs().max())


def operations(gm):
    """The operations, by class of module or name of function."""
    calls = [(module_of(gm, node), node.target) for node in gm.graph.nodes if node.op.startswith("call")]
    return [target.__name__ if module is None else type(module).__name__ for module, target in calls]


def cases(names, single):
    """All in float64, some in float32 as well."""
    both = [(name, torch.float64) for name in names] + [(name, torch.float32) for name in single]
    return pytest.mark.parametrize(("name", "dtype"), both, ids=str)


@cases(BLOCKS, ["repvgg", "mobileone depthwise", "acnet crops", "dbb", "dbb groups, residual"])
def test_a_block_folds_to_its_deploy_form(name, dtype):
    block = lively(BLOCKS[name]()).to(dtype)
    twin = deployed(block)
    x = images(2, twin.in_channels, 9, 8)
    folded = fxmerge.fold(block, x.to(dtype))
    assert operations(folded) == ["Conv2d"]
    ((_, found),) = convolutions(folded)
    geometry = ("kernel_size", "stride", "padding", "dilation", "groups")
    assert [getattr(found, key) for key in geometry] == [getattr(twin, key) for key in geometry]
    assert (found.weight.dtype, found.bias.dtype) == (dtype, dtype)
    assert error(found.weight, twin.weight) < TOLERANCE[dtype]
    assert error(found.bias, twin.bias) < TOLERANCE[dtype]
    for size in ((9, 8), (8, 9), (7, 7), (12, 12)):
        x = images(3, twin.in_channels, *size, seed=1)
        expected = block.double()(x)
        assert error(folded(x.to(dtype)), expected) < TOLERANCE[dtype]
        assert error(twin(x), expected) < TOLERANCE[torch.float64]
        block.to(dtype)


@cases(NETWORKS, ["all"])
def test_a_network_folds_to_one_convolution_a_block(name, dtype):
    model, twin = network(name).to(dtype), network(name, deploy=True)
    x = images(4, 3, 16, 16)
    folded = fxmerge.fold(model, x.to(dtype))
    kept = ["Conv2d", "ReLU"] * len(NETWORKS[name])
    assert operations(folded) == [*kept, "AdaptiveAvgPool2d", "flatten.using_ints", "Linear"]
    assert error(folded(x.to(dtype)), twin(x)) < TOLERANCE[dtype]
    for (_, found), expected in zip(convolutions(folded), (m for m in twin if isinstance(m, nn.Conv2d)), strict=True):
        assert error(found.weight, expected.weight) < TOLERANCE[dtype]
        assert error(found.bias, expected.bias) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_start_from_the_deploy_forms(name):
    """Branches that are one convolution anyway cost what that costs: merging them wins nothing."""
    x = images(4, 3, 16, 16).float()
    found = fxmerge.frontier(network(name).float(), x, runtime="macs")
    expected = fxmerge.frontier(network(name, deploy=True).float(), x, runtime="macs")
    assert found.original == expected.original
    assert found.points[-1][0] == pytest.approx(found.original)
    assert found.points[0][0] <= expected.points[0][0]  # a block may lose a branch and not the others
    for index in (0, len(found) // 2):
        report = found.apply(found.plan(index)).report
        assert report.predicted == pytest.approx(report.measured)
    result = found.compress(0.8)
    assert result.report.measured <= 0.8 * found.original
    merged = result.merge()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    assert len(list(convolutions(merged))) <= len(NETWORKS[name])


def test_padding_a_batch_norm_with_zeros_is_another_network_and_stays():
    block, true = lively(DBB(4, 6, inner=5, constant=False)), lively(DBB(4, 6, inner=5))
    x = images(2, 4, 8, 8)
    assert error(block(x), true(x)) > WRONG
    inner = (..., slice(1, -1), slice(1, -1))
    assert error(block(x)[inner], true(x)[inner]) < TOLERANCE[torch.float64]
    folded = fxmerge.fold(block, x)
    assert "inner-padding" in {refusal["code"] for refusal in graph_meta(folded)["refusals"]}
    assert error(folded(x), block(x)) < TOLERANCE[torch.float64]
    assert len(list(convolutions(folded))) > 1


MUTATIONS = {
    "mirrored kernel": lambda conv: conv.weight.copy_(conv.weight.flip(-1)),
    "shifted kernel": lambda conv: conv.weight.copy_(conv.weight.roll(1, -2)),
    "no bias": lambda conv: conv.bias.zero_(),
    "channels in another order": lambda conv: conv.weight.copy_(conv.weight.flip(1)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_deploy_forms_are_caught(mutation):
    block = lively(BLOCKS["dbb"]())
    twin, x = deployed(block), images(2, 4, 9, 8)
    assert error(twin(x), block(x)) < TOLERANCE[torch.float64]
    with torch.no_grad():
        MUTATIONS[mutation](twin)
    assert error(twin(x), block(x)) > WRONG


@pytest.mark.parametrize("norm", ["dense", "point", "inner_norm", "outer", "mixed_norm", "pool_norm"])
def test_every_batch_norm_of_the_block_counts(norm):
    block = lively(BLOCKS["dbb"]())
    x = images(2, 4, 9, 8)
    expected = fxmerge.fold(block, x)(x)
    for part in block.get_submodule(norm).modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1
    assert error(block(x), expected) > WRONG
