"""Dtypes, memory formats and padding modes: half precision, mixed, float64, channels-last, meta, borders that are not zeros."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmerge
from fxmerge.checks import outputs_of, relative_error
from fxmerge.errors import FxmergeError, UserError
from fxmerge.graph import convolutions

HALVES = [torch.bfloat16, torch.float16]
WRONG = 1e-2


def conv(i, o, k=3, s=1, g=1, act=nn.ReLU, **options):
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False, **options), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class Skip(nn.Module):
    def __init__(self, *layers, shortcut=None):
        super().__init__()
        self.body, self.shortcut = nn.Sequential(*layers), shortcut

    def forward(self, x):
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def residual():
    return [
        conv(3, 6),
        Skip(conv(6, 6), conv(6, 6, act=None)),
        nn.ReLU(),
        Skip(conv(6, 8, s=2), conv(8, 8, act=None), shortcut=conv(6, 8, 1, 2, act=None)),
        nn.ReLU(),
        Skip(conv(8, 8), conv(8, 8, act=None)),
        nn.ReLU(),
    ]


def inverted(i, o, s=1):
    layers = [conv(i, 2 * i, 1, act=nn.ReLU6), conv(2 * i, 2 * i, 3, s, 2 * i, nn.ReLU6), conv(2 * i, o, 1, act=None)]
    return Skip(*layers) if i == o and s == 1 else nn.Sequential(*layers)


def mobilenet():
    return [
        conv(3, 6, s=2, act=nn.ReLU6),
        inverted(6, 6),
        inverted(6, 8, 2),
        inverted(8, 8),
        conv(8, 8, 1, act=nn.ReLU6),
    ]


NETWORKS = {"residual": residual, "mobilenet": mobilenet}


def network(name, dtype=torch.float64):
    """One of NETWORKS with a classifier, in eval mode, with drawn weights that bfloat16 and float16 hold exactly."""
    model = nn.Sequential(*NETWORKS[name](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return drawn(model).to(dtype)


def drawn(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                noise *= (2 / tensor[0].numel()) ** 0.5
            elif key.endswith(("running_var", "weight")):
                noise = 0.5 + noise.abs()
            tensor.copy_(noise.bfloat16().clamp(-8, 8).half())
    return model.double().eval()


def images(dtype=torch.float64, seed=0):
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).bfloat16().half().to(dtype)


def compress(model, x, budget=0.6, **options):
    return fxmerge.compress(model, x, budget, runtime="macs", **options)


@functools.cache
def in_float64(name):
    """The frontier of a network in float64, made once."""
    return fxmerge.frontier(network(name), images(), runtime="macs")


@functools.cache
def folded_in_float64(name):
    return fxmerge.fold(network(name), images())


@functools.cache
def compressed(name, dtype):
    """A compressed network, made once: leave its model as it is."""
    return compress(network(name, dtype), images(dtype))


def dtypes(model):
    return {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}


def error(found, expected):
    return relative_error([found], [expected])


def equal_once_rounded(found, expected, dtype):
    """Whether the tensors of ``found`` are those of ``expected`` rounded to a dtype, once."""
    rounded = {name: tensor.to(dtype) for name, tensor in expected.state_dict().items()}
    state = found.state_dict()
    assert state.keys() == rounded.keys()
    return all(torch.equal(state[name], rounded[name]) for name in rounded)


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_half_networks_fold_in_float64_and_round_once(name, dtype):
    model, x = network(name, dtype), images(dtype)
    folded = fxmerge.fold(model, x)
    assert dtypes(folded) == {dtype}
    assert folded(x).dtype is dtype
    assert equal_once_rounded(folded, folded_in_float64(name), dtype)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert error(folded(x), model(x)) < 64 * torch.finfo(dtype).eps
    assert dtypes(model) == {dtype}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_in_between_would_show(dtype):
    """What folding in half precision gives: weights that are not the float64 ones rounded."""
    expected = folded_in_float64("residual").get_parameter("0.0.weight")
    convolution, norm, _ = network("residual", dtype)[0]
    early = convolution.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    assert not torch.equal(early, expected.to(dtype))
    assert error(early, expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_half_networks_compress_and_merge_as_in_float64(name, dtype):
    result, x = compressed(name, dtype), images(dtype)
    assert result.report.measured <= 0.6 * result.report.original
    assert dtypes(result.model) == {dtype}
    merged, expected = result.merge(), in_float64(name).apply(result.plan)
    assert dtypes(merged) == {dtype}
    assert equal_once_rounded(merged, expected.merge(), dtype)
    assert result.report.after.convolutions < result.report.before.convolutions
    assert error(merged(x), outputs_of(expected.model, ((images(),), {}))[0]) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_networks_are_saved_loaded_and_trained(dtype, tmp_path):
    x, result = images(dtype), compressed("residual", dtype)
    result.save(tmp_path)
    loaded = fxmerge.load(tmp_path)
    assert dtypes(loaded.model) == {dtype}
    assert loaded.plan == result.plan
    assert torch.equal(outputs_of(loaded.model, ((x,), {}))[0], outputs_of(result.model, ((x,), {}))[0])
    assert torch.equal(loaded.merge()(x), result.merge()(x))
    model = loaded.model.train()
    model(x).float().square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    expected = outputs_of(model, ((x,), {}))[0]
    assert error(result.merge()(x), expected) > WRONG
    assert error(loaded.merge()(x), expected) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_networks_are_calibrated(dtype):
    calibration = [images(dtype, seed) for seed in range(1, 6)]
    result = compress(network("mobilenet", dtype), images(dtype), calibration=calibration, max_span=2)
    assert "importance is distortion" in result.report.data
    assert dtypes(result.merge()) == {dtype}
    assert result.report.error <= result.report.error_allowed


# --- float64, mixed dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_networks_are_exact(name):
    result = in_float64(name).compress(0.6)
    merged = result.merge()
    assert dtypes(merged) == {torch.float64}
    assert error(merged(images()), outputs_of(result.model, ((images(),), {}))[0]) < 1e-10
    assert result.report.error < 1e-10
    wrong = merged.get_parameter("0.0.weight")
    with torch.no_grad():
        wrong.copy_(wrong.flip(-1))
    assert error(merged(images()), outputs_of(result.model, ((images(),), {}))[0]) > WRONG


@pytest.mark.parametrize(("name", "dtype"), list(zip(NETWORKS, HALVES, strict=True)), ids=str)
def test_norms_in_float32_in_a_half_network_fold_into_its_dtype(name, dtype):
    model, x = network(name, dtype), images(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    folded, result = fxmerge.fold(model, x), compress(model, x)
    expected = in_float64(name).apply(result.plan)
    assert dtypes(result.model) == {dtype, torch.float32}
    assert dtypes(folded) == dtypes(result.merge()) == {dtype}
    assert equal_once_rounded(folded, folded_in_float64(name), dtype)
    assert equal_once_rounded(result.merge(), expected.merge(), dtype)


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def test_a_network_that_changes_its_dtype_keeps_both():
    stem, *rest = network("residual")
    model = nn.Sequential(stem.float(), Cast(torch.bfloat16), nn.Sequential(*rest).bfloat16())
    x = images(torch.float32)
    result = compress(model, x)
    merged = result.merge()
    assert merged.get_parameter("0.0.weight").dtype is torch.float32
    assert {module.weight.dtype for node, module in convolutions(merged) if str(node.target) != "0.0"} == {
        torch.bfloat16
    }
    (decision,) = [each for each in result.report.decisions if each.convolution == "0.0"]
    assert decision.decision == "kept"
    assert error(merged(x), outputs_of(result.model, ((x,), {}))[0]) < 64 * torch.finfo(torch.bfloat16).eps


class Autocast(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x)


def test_autocast_inside_the_model_is_refused_by_name():
    with pytest.raises(FxmergeError, match="autocast"):
        compress(Autocast(network("residual", torch.float32)), images(torch.float32))


# --- memory formats and devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), list(zip(NETWORKS, [torch.float32, torch.bfloat16], strict=True)), ids=str)
def test_channels_last_gives_the_same_numbers(name, dtype):
    plain, last = network(name, dtype), network(name, dtype).to(memory_format=torch.channels_last)
    x = images(dtype)
    y = x.contiguous(memory_format=torch.channels_last)
    expected, result = compressed(name, dtype), compress(last, y)
    assert result.plan.candidates == expected.plan.candidates
    tolerance = 64 * torch.finfo(dtype).eps
    merged = result.merge()
    folded = fxmerge.fold(last, y)
    for given in (x, y):
        assert error(merged(given), expected.merge()(x)) < tolerance
        assert error(folded(given), plain(x)) < tolerance
    for key, weight in expected.merge().state_dict().items():
        assert torch.allclose(merged.state_dict()[key], weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-6), key
    for each in (result.model, merged, folded):
        weights = [module.weight for module in each.modules() if isinstance(module, nn.Conv2d)]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(weight.is_contiguous() for weight in expected.merge().parameters())


@pytest.mark.parametrize("call", [fxmerge.capture, fxmerge.fold, compress])
def test_meta_is_refused_with_the_name_of_a_parameter(call):
    model = network("residual", torch.float32)
    with pytest.raises(UserError, match=r"parameter '0\.0\.weight' is on the meta device .*Materialise"):
        call(network("residual", torch.float32).to("meta"), images(torch.float32))
    model[1].body[0][0].to("meta")
    with pytest.raises(UserError, match=r"parameter '1\.body\.0\.0\.weight' is on the meta device"):
        call(model, images(torch.float32))
    model = network("residual", torch.float32)
    model[0][1].running_mean = model[0][1].running_mean.to("meta")
    with pytest.raises(UserError, match=r"'0\.1\.running_mean' is on the meta device"):
        call(model, images(torch.float32))


def test_an_example_on_meta_is_refused():
    with pytest.raises(UserError, match="meta"):
        fxmerge.capture(network("residual", torch.float32), images(torch.float32).to("meta"))


# --- borders that are not zeros ---------------------------------------------------------------------------------------


class Bordered(nn.Module):
    """A padding mode spelled as a function in front of the convolution."""

    def __init__(self, mode):
        super().__init__()
        self.conv, self.mode = nn.Conv2d(6, 6, 3, bias=False), mode

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1), self.mode))


def bordered(mode, spelling):
    layer = nn.Conv2d(6, 6, 3, padding=1, bias=False, padding_mode=mode) if spelling == "module" else Bordered(mode)
    before, after = [conv(3, 12, 1), conv(12, 6)], [conv(6, 12, 1), conv(12, 8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return drawn(nn.Sequential(*before, layer, nn.BatchNorm2d(6), nn.ReLU(), *after, *head)).float()


@pytest.mark.parametrize("spelling", ["module", "function"])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_are_refused_and_the_network_around_them_compresses(mode, spelling):
    model, x = bordered(mode, spelling), images(torch.float32)
    result = compress(model, x, 0.7, method="depth")
    assert "padding-mode" in result.report.refusals
    name = "2" if spelling == "module" else "2.conv"
    (decision,) = [each for each in result.report.decisions if each.convolution == name]
    assert decision.decision == "kept"
    assert "padding-mode" in decision.reason
    assert mode in decision.reason
    merged = result.merge()
    assert len(list(convolutions(merged))) == 3
    assert error(merged(x), outputs_of(result.model, ((x,), {}))[0]) < 1e-5
    folded = fxmerge.fold(model, x)
    assert error(folded(x), model(x)) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    zeros = bordered("constant" if spelling == "function" else "zeros", spelling)
    assert error(zeros(x), model(x)) > WRONG
