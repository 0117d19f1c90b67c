"""Random networks from everything that a CNN may hold: captured, merged, saved and exported, no output is wrong."""

from __future__ import annotations

import pytest
import random_checks
import torch
from random_checks import TOLERANCE, Outcome, check, explore, kinds_of, summary, worst_error
from random_modules import build, call, inputs
from random_networks import KINDS
from random_specs import Act, Conv, Network, Norm, Plain
from torch import nn

import fxmerge
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.fold import FoldPass

PORTIONS = {None: 42, "save": 5, "onnx": 3}
"""Of the fifty networks of each kind: how many are only compared, are saved too, are exported too."""

LEAST = 20
"""Of the fifty: how many must have merged a segment that holds their kind."""

PLAIN = Network((Conv(), Act(), Conv(), Norm(), Act("silu"), Conv()))


@pytest.mark.parametrize("kind", KINDS)
def test_random_networks_keep_their_outputs(kind):
    found = []
    for portion, (extra, examples) in enumerate(PORTIONS.items()):
        found += explore(kind, examples, 10 * list(KINDS).index(kind) + portion, extra)
    counts = summary(found)
    assert counts["networks"] == 50, counts
    assert counts["comparable"] >= 45, counts
    assert counts[kind] >= LEAST, counts


def nudged(gm):
    """Folded, and then one weight off by 1e-8."""
    result = FoldPass()(gm)
    weight = next(m.weight for m in result.graph_module.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-8
    return result


def test_a_slightly_wrong_merge_is_noticed(monkeypatch):
    assert check(PLAIN, "fork-join").merges
    monkeypatch.setattr(random_checks, "FoldPass", lambda: nudged)
    with pytest.raises(AssertionError, match="outputs differ by"):
        check(PLAIN, "fork-join")


def test_a_merge_that_did_not_happen_is_noticed(monkeypatch):
    monkeypatch.setattr(random_checks, "FoldPass", lambda: lambda gm: fxmerge.passes.RelaxPass([])(gm))
    with pytest.raises(AssertionError, match="convolutions are left"):
        check(PLAIN, "fork-join")


def test_a_changed_model_is_noticed(monkeypatch):
    frontier = fxmerge.frontier

    def spoiling(model, *args, **kwargs):
        found = frontier(model, *args, **kwargs)
        next(model.parameters()).requires_grad_(False)
        return found

    monkeypatch.setattr(fxmerge, "frontier", spoiling)
    with pytest.raises(AssertionError, match="the model was changed"):
        check(PLAIN, "fork-join")


def test_error_is_held_against_what_depends_on_the_input():
    b = torch.tensor([[101.0], [99.0]], dtype=torch.float64)
    assert worst_error([b + 1e-10], [b]) == pytest.approx(1e-10, rel=1e-3)
    assert worst_error([b + 1e-9], [b]) > TOLERANCE
    assert worst_error([b], [b]) == 0


def test_spec_decides_everything():
    first, second = build(PLAIN), build(PLAIN)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.equal(call(first, inputs(PLAIN)), call(second, inputs(PLAIN)))
    other = build(Network(PLAIN.blocks, seed=1))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_batch_norms_are_calibrated():
    model = build(PLAIN)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda _module, _args, out: seen.append(out))
    call(model, inputs(PLAIN, batch=16, seed=5))
    normal = (seen[0] - norm.bias[:, None, None]) / norm.weight[:, None, None]
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 0.5
    assert 0.5 < normal.var(dim=(0, 2, 3)).min() < normal.var(dim=(0, 2, 3)).max() < 2


def test_failing_network_is_shrunk(monkeypatch):
    def without_depthwise(spec, _kind, _extra):
        assert "depth" not in repr(spec)
        return Outcome()

    monkeypatch.setattr(random_checks, "check", without_depthwise)
    with pytest.raises(AssertionError) as failure:
        explore("dilation", 100, seed=0)
    notes = "\n".join(failure.value.__notes__)
    assert "depth" in notes
    assert 2 <= notes.count("Conv(") <= 4


def kinds_in(network):
    graph = fxmerge.capture(build(network), inputs(network))
    return {kind for site in enumerate_segments(graph).sites for kind in kinds_of(graph, site.candidate)}


def test_kinds_are_told_apart():
    assert kinds_in(PLAIN) == set()
    assert kinds_in(Network((Conv(), Conv(stride=(2, 2, 2), padding="front"), Conv()), size=(8, 8))) == {
        "stride",
        "asymmetric pad",
    }
    assert kinds_in(Network((Conv(), Conv(groups="two", dilation=(2, 2, 2)), Conv(kernel=(1, 1, 1))))) == {
        "group",
        "dilation",
    }
    assert kinds_in(Network((Conv(), Plain("x * x"), Conv()))) == set()
