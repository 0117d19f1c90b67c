"""The pipeline as a whole: what it refuses before it measures, the budgets it keeps, and what it leaves alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys

import pytest
import torch
from torch import nn
from untouched import Untouched

import fxmerge
from fxmerge.errors import (
    BudgetError,
    CaptureError,
    FxmergeError,
    MissingPackageError,
    PlanError,
    StoreError,
    UnsupportedError,
    UserError,
)
from fxmerge.runtimes.macs import Macs


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """Five convolutions, batch norms and two skips; a classifier."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.act = nn.ReLU()
        self.block1 = Block(channels)
        self.block2 = Block(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.act(self.stem(x)))).mean((2, 3)))


def make_net(seed=0, channels=8):
    torch.manual_seed(seed)
    net = Net(channels)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net


def images(count=2, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Clock:
    """Milliseconds from multiply-accumulates: concave, so that predictions err, with noise that only ever adds."""

    name = "clock"
    unit = "ms"
    deterministic = False

    def __init__(self):
        self.builds = 0
        self.runs = 0

    def environment(self):
        return {"runtime": "clock"}

    def measure(self, signatures, on_result):
        for signature in signatures:
            on_result(signature, self._milliseconds(signature.geometry.macs(signature.in_size, signature.batch)))

    def build(self, module, args, kwargs):
        self.builds += 1
        macs = Macs().build(module, args, kwargs)()

        def run():
            self.runs += 1
            return (0.3 + self._milliseconds(macs)) * (1 + 0.01 * abs(math.sin(self.runs)))

        return run

    @staticmethod
    def _milliseconds(macs):
        return (macs / 1e6) ** 0.7


@pytest.fixture(scope="module")
def net():
    return make_net()


@pytest.fixture(scope="module")
def found(net):
    return fxmerge.frontier(net, images(), runtime="macs")


# --- what is refused before anything is measured ----------------------------------------------------------------------


def compress(model, example, budget=0.5, runtime=None, store=None, **options):
    return fxmerge.compress(model, example, budget, runtime=runtime or Untouched(), store=store, **options)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("abc", "budget='abc' is not a number"),
        (None, "budget=None is a NoneType"),
        (math.nan, "budget=nan is not a number"),
        (True, "budget=True is a bool"),
        (0, "budget=0 is not positive"),
        (-1, "budget=-1 is not positive"),
        ("150", "budget='150' is 150 times the original; for an amount add its unit"),
        ("1.2GMACs", "budget='1.2GMACs' is in MACs, but this runtime measures ms"),
    ],
)
def test_a_wrong_budget_is_refused_before_the_model_is_looked_at(budget, words):
    with pytest.raises(BudgetError) as caught:
        compress(None, None, budget)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("runtime", "budget", "words"),
    [
        ("macs", "8ms", "budget='8ms' is in ms, but this runtime measures MACs"),
        ("onnxruntime", "1.2GMACs", "budget='1.2GMACs' is in MACs, but this runtime measures ms"),
    ],
)
def test_a_budget_is_in_the_unit_of_the_runtime(runtime, budget, words):
    with pytest.raises(BudgetError, match=words):
        compress(None, None, budget, runtime)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"runtime": "tpu"},
            "unknown runtime 'tpu'; expected one of 'auto', 'tensorrt', ",
        ),
        ({"runtime": 7}, "unknown runtime 7; expected one of 'auto', "),
        ({"method": "width"}, "unknown method 'width'; the known ones are layermerge, depth, layer"),
        (
            {"importance": "taylor"},
            "unknown importance 'taylor'; the known ones are auto, distortion, local, magnitude",
        ),
        (
            {"importance": "distortion"},
            "importance='distortion' compares outputs on calibration inputs: pass calibration",
        ),
        ({"fit": "guess"}, "unknown fit 'guess'; the known ones are auto, compose"),
        ({"levels": 0}, "levels must be a whole number of at least 1 or None, not 0"),
        ({"levels": 2.5}, "levels must be a whole number of at least 1 or None, not 2.5"),
        ({"max_kernel": 0}, "max_kernel must be a whole number of at least 1, not 0"),
        ({"max_span": "many"}, "max_span must be a whole number of at least 1, not 'many'"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_known(options, words):
    with pytest.raises(UserError) as caught:
        compress(None, None, **options)
    assert str(caught.value).startswith(words)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"not installed: pip install 'fxmerge\[cpu\]'"):
        compress(None, None, runtime="onnxruntime")


@pytest.mark.parametrize("example", [[images()], "1x3x16x16", 3, None])
def test_an_example_is_a_tensor_a_tuple_or_a_dict(net, example):
    words = f"example_input is a {type(example).__name__}; expected a tensor, a tuple"
    with pytest.raises(UserError, match=words):
        compress(net, example)


def test_an_example_holds_a_tensor(net):
    with pytest.raises(UserError, match="example_input holds no tensor"):
        compress(net, (3,))


def test_an_example_that_the_model_rejects_is_refused_with_the_models_own_words(net):
    with pytest.raises(UserError) as caught:
        compress(net, images()[:, :2])
    text = str(caught.value)
    assert text.startswith(
        "Net rejects the example input (tensors of shape [[2, 2, 16, 16]]): RuntimeError: Given groups=1"
    )
    assert "to have 3 channels, but got 2 channels instead" in text


def test_parameters_on_meta_are_named():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(UserError, match=r"parameter 'stem\.weight' is on the meta device and has no values"):
        compress(net, images())


def test_a_model_without_convolutions_has_nothing_to_compress():
    with pytest.raises(UnsupportedError, match=r"Sequential has no convolution of torch\.nn's .* nothing to compress"):
        compress(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))


class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


def test_a_model_that_cannot_be_traced_is_refused_with_reason_and_place():
    with pytest.raises(CaptureError) as caught:
        compress(Branching(), images())
    text = str(caught.value)
    assert text.startswith("torch.export cannot trace Branching: GuardOnDataDependentSymNode: ")
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f"(at {__file__}:{line}). Rewrite that part" in text


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (
            lambda: [(images(4), torch.zeros(4, dtype=torch.long))],
            r"calibration batch 0 holds .* shape \[\[4, 3, 16, 16\], \[4\]\], .* inputs=lambda batch: batch\[0\]",
        ),
        (lambda: [images(4), images(4)[..., :8]], r"calibration batch 1 holds tensors of shape \[\[4, 3, 16, 8\]\]"),
        (lambda: [images(4).double()], r"calibration batch 0 .*dtypes \['torch.float64'\] and \['torch.float32'\]"),
        (lambda: ["cat.png"], "calibration batch 0 is not an input of the model: example_input is a str"),
        (lambda: images(4), r"calibration is a Tensor; expected an iterable .* For a single batch pass \[batch\]"),
        (list, "calibration yielded no batch"),
    ],
)
def test_calibration_that_is_no_input_of_the_model_is_refused(net, calibration, words):
    with pytest.raises(UserError, match=words):
        compress(net, images(), calibration=calibration())


@pytest.mark.parametrize("content", [b"SQLite format 3\0" + bytes(100), b"not a database\n" * 50, b"SQLite format 3\0"])
def test_a_foreign_latency_store_is_named_and_left_alone(net, tmp_path, content):
    path = tmp_path / "latency.sqlite"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        compress(net, images(), store=path)
    assert str(path) in str(caught.value)
    assert "it was left untouched. Move it away" in str(caught.value)
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["latency.sqlite"]


def test_a_corrupt_latency_store_is_named_and_left_alone(net, tmp_path):
    path = tmp_path / "latency.sqlite"
    fxmerge.compress(net, images(), 2.0, runtime=Clock(), store=path, measure_seconds=0)
    content = bytearray(path.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        compress(net, images(), store=path)
    assert str(caught.value).startswith(f"the latency store {path} cannot be used: ")
    assert path.read_bytes() == content


def test_a_latency_store_that_cannot_be_written_is_named(net, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "latency.sqlite"
    with pytest.raises(StoreError) as caught:
        compress(net, images(), store=path)
    assert str(caught.value).startswith(f"the latency store {path} cannot be used: ")


def test_a_budget_below_the_smallest_reachable_names_it(net, found):
    smallest = found.points[0][0]
    with pytest.raises(BudgetError) as caught:
        fxmerge.compress(net, images(), 0.01, runtime="macs")
    share = f"{smallest / found.original:.1%}"
    assert f"out of reach: the smallest reachable is {smallest / 1e3:.2f} kMACs ({share})" in str(caught.value)
    assert found.at(f"{smallest}MACs").predicted == smallest
    with pytest.raises(BudgetError, match="out of reach"):
        found.at(f"{smallest - 1}MACs")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "a larger max_kernel or max_span."),
        ({"method": "depth"}, "method='layermerge', or a larger max_kernel or max_span."),
        ({"method": "layer"}, "method='layermerge'."),
        ({"exclude": ["block1"]}, "more of the network (include, exclude), or a larger max_kernel or max_span."),
    ],
    ids=str,
)
def test_a_budget_out_of_reach_is_told_what_would_reach_farther(net, options, advice):
    with pytest.raises(BudgetError) as caught:
        fxmerge.compress(net, images(), 0.01, runtime="macs", **options)
    assert str(caught.value).endswith(f"Raise the budget, or allow more: {advice}")


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1.0, 1.5, "100%", "2GMACs"])
def test_a_budget_of_the_original_or_more_changes_nothing_and_says_so(net, budget):
    result = fxmerge.compress(net, images(), budget, runtime="macs")
    assert result.plan.entries == ()
    assert result.report.measured == result.report.original
    assert [decision.decision for decision in result.report.decisions] == ["kept"] * 5
    assert any("is at or above the original: nothing was changed" in note for note in result.report.notes)
    x = images(3, seed=5)
    expected = copy.deepcopy(net).eval()(x)
    assert torch.equal(result.model.eval()(x), expected)
    torch.testing.assert_close(result.merge()(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [0.1, 0.6, 0.99, "700kMACs"])
def test_budgets_in_macs_are_kept_and_the_next_larger_plan_breaks_them(net, found, budget):
    result = fxmerge.compress(net, images(), budget, runtime="macs")
    report = result.report
    amount = 700e3 if isinstance(budget, str) else budget * found.original
    assert report.requested == pytest.approx(amount, rel=1e-12)
    assert report.measured <= amount
    assert Macs().build(result.merge(), (images(),), {})() == report.measured
    assert min(latency for latency, _ in found.points if latency > result.plan.predicted) > amount


def test_levels_may_go_over_a_budget_that_the_exact_solution_keeps(net, found):
    amount = 0.5 * found.original
    rough = fxmerge.compress(net, images(), 0.5, runtime="macs", levels=3)
    assert rough.report.measured > amount
    assert rough.plan == found.at(0.5, levels=3)
    exact = found.at(0.5)
    assert exact.predicted <= amount
    assert exact.loss > rough.plan.loss
    assert found.at(0.5, levels=10**6) == exact


def test_every_point_of_the_frontier_is_what_its_network_measures(found):
    latencies = [latency for latency, _ in found.points]
    losses = [loss for _, loss in found.points]
    assert latencies == sorted(latencies)
    assert losses == sorted(losses, reverse=True)
    assert len(found) == len(latencies) > 5
    for index, (latency, loss) in enumerate(found.points):
        plan = found.plan(index)
        assert plan == found.at(f"{latency}MACs") or latency >= found.original
        assert plan.predicted == latency
        assert plan.loss == pytest.approx(loss, rel=1e-12)
        if index % 3:
            continue
        result = found.apply(plan)
        assert result.report.measured == Macs().build(result.merge(), (images(),), {})()
        assert result.report.measured <= latency
    assert repr(found).startswith(f"Frontier({len(found)} plans, ")


@pytest.fixture(scope="module")
def timed(net):
    return fxmerge.frontier(net, images(), runtime=Clock(), store=None, measure_seconds=0)


@pytest.mark.parametrize(("position", "share"), [(1 / 3, 1.02), (1 / 2, 0.98)])
def test_a_budget_in_milliseconds_is_kept_in_the_measurement(net, timed, position, share):
    """The budget lies just above and just below what one of the plans takes."""
    near = timed.apply(timed.plan(int(position * len(timed)))).report
    budget = share * near.measured / near.original
    clock = Clock()
    result = fxmerge.compress(net, images(), budget, runtime=clock, store=None, measure_seconds=0)
    report = result.report
    assert report.unit == "ms"
    assert report.requested == pytest.approx(budget * report.original, rel=1e-9)
    assert report.measured <= report.requested
    assert (report.measured == pytest.approx(near.measured, rel=0.015)) == (share > 1)
    assert abs(near.predicted - near.measured) > 0.01 * near.measured  # so the loop has something to correct
    assert 2 <= clock.builds <= 7
    larger = min(latency for latency, _ in timed.points if latency > 1.01 * report.predicted)
    index = [latency for latency, _ in timed.points].index(larger)
    assert timed.apply(timed.plan(index)).report.measured > report.requested


def test_an_unreachable_budget_in_milliseconds_names_the_smallest(net):
    with pytest.raises(BudgetError) as caught:
        fxmerge.compress(net, images(), "0.2ms", runtime=Clock(), store=None, measure_seconds=0)
    text = str(caught.value)
    assert text.startswith("the budget of 0.200 ms (")
    smallest = float(text.partition("smallest reachable is ")[2].split()[0])
    assert 0.3 < smallest < 0.6  # 0.3 ms do not depend on the network


def test_measured_layers_are_stored_and_not_measured_again(net, tmp_path):
    store = tmp_path / "latency.sqlite"
    first = fxmerge.frontier(net, images(), runtime=Clock(), store=store, measure_seconds=0)

    class Remembering(Clock):
        def measure(self, *_):
            pytest.fail("layers were measured again")

    second = fxmerge.frontier(net, images(), runtime=Remembering(), store=store, measure_seconds=0)
    assert [latency for latency, _ in second.points] == pytest.approx(
        [latency for latency, _ in first.points], rel=0.02
    )


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_from_json_applies_to_the_same_structure_with_other_weights(found):
    plan = fxmerge.Plan.from_json(found.at(0.6).to_json())
    other = make_net(seed=1)
    elsewhere = fxmerge.frontier(other, images(), runtime="macs")
    result = elsewhere.apply(plan)
    assert result.plan.candidates == plan.candidates
    assert result.plan.predicted == plan.predicted  # the same multiply-accumulates; losses are of the other weights
    assert result.plan.loss != plan.loss
    assert result.report.measured == found.apply(plan).report.measured
    assert result.report.original == found.original
    kept = next(d.convolution for d in result.report.decisions if d.decision == "kept")
    assert torch.equal(result.model.get_submodule(kept).weight, other.get_submodule(kept).weight)


class Renamed(Net):
    def __init__(self):
        super().__init__()
        self.first = self.stem
        del self.stem

    def forward(self, x):
        return self.head(self.block2(self.block1(self.act(self.first(x)))).mean((2, 3)))


class Longer(Net):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_net(channels=4), "operation 'stem' differs in its options, shape or inputs"),
        (Renamed, "it has 'first' where the plan's network has 'stem'"),
        (Longer, r"it has \d+ operations, the plan's network \d+"),
    ],
)
def test_a_plan_for_another_structure_is_refused_with_the_first_difference(found, make, words):
    other = fxmerge.frontier(make(), images(), runtime="macs")
    with pytest.raises(PlanError, match=f"made for a network of another structure: {words}. Make a plan for this"):
        other.apply(found.at(0.6))


# --- the user's model -------------------------------------------------------------------------------------------------


def test_the_users_model_is_left_as_it_was():
    net = make_net().train()
    net.block1.eval()
    net.block2.conv1.weight.requires_grad_(False)
    net(images()).sum().backward()
    calls = []
    handle = net.block1.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    identities = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()}
    training = {name: module.training for name, module in net.named_modules()}
    classes = {name: type(module) for name, module in net.named_modules()}

    result = fxmerge.compress(
        net, images(), 0.5, runtime="macs", calibration=[images(4, seed=1), images(4, seed=2)], max_span=2
    )
    with torch.no_grad():
        for tensor in (*result.model.parameters(), *result.model.buffers()):
            tensor.zero_()
    result.model.train()

    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in net.named_parameters()} == identities
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    assert {name: module.training for name, module in net.named_modules()} == training
    assert {name: type(module) for name, module in net.named_modules()} == classes
    calls.clear()
    net(images())
    assert calls == [1]
    handle.remove()


def test_a_frontier_keeps_the_weights_that_it_was_made_with():
    net = make_net().eval()
    found = fxmerge.frontier(net, images(), runtime="macs")
    before = net(images()).detach()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(found.apply(found.at(1.0)).model.eval()(images()), before)


def test_calibration_decides_by_outputs_and_says_so(net):
    batches = [(images(4, seed=k), torch.zeros(4)) for k in range(2)]
    options = {"runtime": "macs", "max_span": 2}
    result = fxmerge.compress(net, images(), 0.5, calibration=batches, inputs=lambda batch: batch[0], **options)
    assert result.report.data.startswith("Calibrated on 8 images: importance is distortion")
    without = fxmerge.compress(net, images(), 0.5, **options)
    assert without.report.data.startswith("No calibration data: importance is magnitude")
    assert result.plan.loss != without.plan.loss


def test_every_error_of_the_pipeline_is_of_one_family():
    for error in (BudgetError, CaptureError, MissingPackageError, PlanError, StoreError, UnsupportedError, UserError):
        assert issubclass(error, FxmergeError)


# --- folding ----------------------------------------------------------------------------------------------------------


def test_fold_is_exact_and_leaves_only_what_has_inner_padding(net):
    folded = fxmerge.fold(net, images())
    x = images(3, seed=7)
    torch.testing.assert_close(folded(x), copy.deepcopy(net).eval()(x), rtol=0, atol=1e-5)
    kinds = [type(module).__name__ for module in folded.modules()]
    assert kinds.count("Conv2d") == 5
    assert "BatchNorm2d" not in kinds
    assert not folded.training


def test_the_report_survives_json(found):
    report = found.apply(found.at(0.6)).report
    assert type(report).from_json(report.to_json()) == report
    assert dataclasses.asdict(report) == report.to_json()
