"""The end-to-end check: what it measures, where it draws the line, and what it must not miss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.checks import check_equal, check_inputs, dependence, outputs_of, own_error, relative_error
from fxmerge.errors import InternalError
from fxmerge.graph import clone
from fxmerge.result import merge_graph


class Off(nn.Module):
    """``model`` with ``by`` times the deviation of its output's first row from the mean added to that row."""

    def __init__(self, model, by):
        super().__init__()
        self.model, self.by = model, by

    def forward(self, x):
        y = self.model(x)
        wrong = torch.zeros_like(y)
        wrong[0] = self.by * (y - y.mean(0)).abs().max()
        return y + wrong


def batch(dtype=torch.float64):
    return (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype),), {}


def graph(model, inputs):
    return clone(fxmerge.capture(model, inputs[0]))


# --- relative error ---------------------------------------------------------------------------------------------------


def test_relative_error_is_held_against_what_varies():
    b = torch.tensor([[1003.0, 5.0], [1001.0, 5.0]])
    a = b + torch.tensor([[0.0, 0.25], [0.0, 0.0]])
    assert relative_error([a], [b]) == 0.25
    assert relative_error([a, b], [b, b]) == 0.25
    assert relative_error([b], [b]) == 0.0
    assert relative_error([b[:1] + 100.3], [b[:1]]) == pytest.approx(0.1)  # one row: against its own size
    assert relative_error([torch.tensor(3.0)], [torch.tensor(2.0)]) == 0.5


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [math.nan, 2.0], math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.inf, 2.0], [math.inf, 2.0], 0.0),
        ([-math.inf, 2.0], [math.inf, 2.0], math.inf),
        ([7.0, 7.0], [7.0, 7.0], 0.0),
        ([7.0, 7.5], [7.0, 7.0], math.inf),  # what never varied now does
    ],
)
def test_values_that_are_no_numbers_never_pass_for_equal_ones(found, expected, error):
    a, b = (torch.tensor(values).reshape(2, 1) for values in (found, expected))
    assert relative_error([a], [b]) == error


def test_dependence_is_the_share_that_varies():
    assert dependence([torch.tensor([[10.0], [12.0]])]) == pytest.approx(1 / 12)
    assert dependence([torch.tensor([[10.0], [12.0]]), torch.ones(2, 1)]) == 0.0
    assert dependence([torch.zeros(2, 3)]) == 0.0
    assert dependence([]) == 0.0


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "own", "allowed"),
    [
        (torch.float64, 0.0, 1e-10),
        (torch.float32, 0.0, 1e-5),
        (torch.bfloat16, 0.0, 2e-2),
        (torch.float32, 1e-6, 2e-5),
        (torch.float64, 1e-11, 2e-10),
        (torch.bfloat16, 2e-2, 0.12),
        (torch.float16, 1e-3, 2e-2),
        (torch.float32, 1e-9, 1e-5),
        (torch.float32, math.inf, 1e-5),
    ],
)
def test_both_sides_of_the_threshold(dtype, own, allowed):
    model = graph(nn.Identity(), batch(dtype))
    same = check_equal(model, model, batch(dtype), own)
    assert (same.error, same.allowed) == (0.0, pytest.approx(allowed))
    assert same.checkable
    check_equal(model, Off(model, 0.8 * allowed), batch(dtype), own)
    with pytest.raises(
        InternalError, match=r"differs from its trainable form by .* \(allowed .*\)\. Nothing was handed"
    ):
        check_equal(model, Off(model, 1.3 * allowed), batch(dtype), own)


def test_a_compressed_network_may_round_worse_than_the_original():
    class Cancelling(nn.Module):
        def forward(self, x):
            return (x + 3e3) - 3e3

    model = graph(Cancelling(), batch(torch.float32))
    own = own_error(model, batch(torch.float32), outputs_of(model, batch(torch.float32)))
    assert own > 1e-5
    check_equal(model, Off(model, 15 * own), batch(torch.float32), 0.0)
    with pytest.raises(InternalError):
        check_equal(model, Off(model, 25 * own), batch(torch.float32), 0.0)


def test_an_overflow_in_half_precision_allows_nothing_more():
    class Large(nn.Module):
        def forward(self, x):
            return x * 60000.0

    inputs = batch(torch.float16)
    model = graph(Large(), inputs)
    assert own_error(model, inputs, outputs_of(model, inputs)) == math.inf
    with pytest.raises(InternalError):
        check_equal(model, Zero(), inputs, math.inf)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_a_network_that_ignores_its_input_is_not_checkable_rather_than_wrong():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x) + 1e-6 * x

    model = graph(Constant(), batch())
    result = check_equal(model, Off(model, 100.0), batch(), 0.0)
    assert not result.checkable
    assert 0 < result.dependence < 1e-4
    assert result.error > 10
    assert (
        result.caveat == f"only {result.dependence:.1e} of the outputs depends on the input: not checkable end to end"
    )


def test_a_network_that_rounding_alone_changes_is_not_checkable_and_infinities_still_raise():
    model = graph(nn.Identity(), batch(torch.bfloat16))
    fine = check_equal(model, model, batch(torch.bfloat16), 0.05)
    assert (fine.checkable, fine.caveat) == (True, "")
    result = check_equal(model, Off(model, 0.7), batch(torch.bfloat16), 0.2)
    assert not result.checkable
    assert result.caveat.startswith("rounding in the network's own dtype may change 120% of what depends on the input")
    with pytest.raises(InternalError, match="differs from its trainable form by inf"):
        check_equal(model, Off(model, math.inf), batch(torch.bfloat16), 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mirrored_kernel_is_caught_in_half_precision(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval().to(dtype)
    model = graph(net, batch(dtype))
    mirrored = clone(model)
    mirrored.get_parameter("0.weight").data = model.get_parameter("0.weight").data.flip(-1)
    own = own_error(model, batch(dtype), outputs_of(model, batch(dtype)))
    assert 0 < own < 0.05
    with pytest.raises(InternalError):
        check_equal(model, mirrored, batch(dtype), own)


def test_a_mirrored_kernel_hides_from_the_plain_error_and_not_from_ours():
    """Batch-norm statistics that nobody calibrated leave outputs that hardly depend on the input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    net[1].running_var.fill_(1e6)
    net[1].bias.data.fill_(1.0)
    model = graph(net.double().eval(), batch())
    mirrored = clone(model)
    mirrored.get_parameter("0.weight").data = model.get_parameter("0.weight").data.flip(-1)
    (expected,), (found,) = outputs_of(model, batch()), outputs_of(mirrored, batch())
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-3
    assert relative_error([found], [expected]) > 0.1
    with pytest.raises(InternalError):
        check_equal(model, mirrored, batch(), 0.0)


# --- own rounding error -----------------------------------------------------------------------------------------------


def test_own_error_is_the_distance_to_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3))
    inputs = batch(torch.float32)
    model = graph(net, inputs)
    outputs = outputs_of(model, inputs)
    found = own_error(model, inputs, outputs)
    assert found == relative_error(outputs, outputs_of(net.double(), ((inputs[0][0].double(),), {})))
    assert 1e-9 < found < 1e-5
    assert model.get_parameter("0.weight").dtype is torch.float32


def test_own_error_without_float64_is_that_of_disturbed_weights():
    class Baked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x.to(torch.float32))

    torch.manual_seed(0)
    gm = fxmerge.capture(Baked(), batch(torch.float32)[0][0])
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    found = own_error(gm, batch(torch.float32), outputs_of(gm, batch(torch.float32)))
    assert 1e-9 < found < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


# --- inputs and modes -------------------------------------------------------------------------------------------------


def test_check_inputs_differ_within_the_batch_and_keep_their_kind():
    image = torch.randint(0, 256, (1, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flat, labels, flags = torch.full((2, 3), 4.0).half(), torch.tensor([1, 2]), torch.tensor([True, False])
    (found, again, ids), rest = check_inputs(((flat, image.repeat(2, 1, 1, 1), labels), {"flags": flags}))
    assert found.dtype is torch.float16
    assert not torch.equal(found[0], found[1])  # no spread in the example: noise of one
    assert again.dtype is torch.uint8
    assert not torch.equal(again[0], again[1])
    assert torch.equal(again.flatten().sort().values, image.repeat(2, 1, 1, 1).flatten().sort().values)
    assert torch.equal(ids, labels)
    assert torch.equal(rest["flags"], flags)


def test_the_noise_has_the_examples_spread_and_is_the_same_every_time():
    x = 7 * torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    ((first,), _), ((second,), _) = check_inputs(((x,), {})), check_inputs(((x,), {}))
    assert torch.equal(first, second)
    assert float((first - x).std()) == pytest.approx(float(x.std()), rel=0.05)
    assert not torch.equal(check_inputs(((x,), {}), seed=1)[0][0], first)


def test_outputs_are_those_of_eval_mode_and_modes_are_restored():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3).eval(), nn.Identity()).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    (found,) = outputs_of(model, batch(torch.float32))
    assert torch.allclose(found, batch(torch.float32)[0][0], atol=1e-4)
    assert [module.training for module in model.modules()] == modes
    assert not found.requires_grad
    pair = outputs_of(Pair(), batch(torch.float32))
    assert [output.dtype for output in pair] == [torch.float32]


class Pair(nn.Module):
    def forward(self, x):
        return {"kept": x, "index": x.argmax(1)}


class Jumps(nn.Module):
    """Jumps between neighbouring numbers, as places of maxima do between values that agree up to rounding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([1 / 3, 1 / 7]).reshape(2, 1, 1, 1))
            self.second.weight.copy_(torch.tensor([3 / 11, 7 / 13]).reshape(1, 2, 1, 1))

    def forward(self, x):
        y = self.second(self.first(x))
        return torch.floor(y * 1e6) % 2 + y


def test_a_network_that_jumps_is_held_to_its_fold_in_float64(monkeypatch):
    monkeypatch.setattr(fxmerge.checks, "own_error", lambda *_: 0.0)  # a rare jump does not show there
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    gm = fxmerge.graph.clone(fxmerge.capture(Jumps(), x)).eval()
    merged = merge_graph(gm)
    result = check_equal(gm, merged, ((x,), {}), 0.0)
    assert result.exact
    assert result.error > 0.1 > result.allowed
    assert "rounding alone moves" in result.caveat
    with torch.no_grad():
        next(merged.parameters()).mul_(1 + 1e-6)
    with pytest.raises(InternalError, match="differs from its trainable form"):
        check_equal(gm, merged, ((x,), {}), 0.0)
