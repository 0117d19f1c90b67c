"""Calibration: any iterable, read once; every mistake named with its batch; statistics as computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxmerge
from fxmerge.calibration import (
    Calibration,
    eval_mode,
    parse_memory,
    read_calibration,
    reestimate_batch_norms,
    second_example,
)
from fxmerge.errors import UserError
from fxmerge.evaluate import evaluate
from fxmerge.graph import by_id, clone


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    return clone(fxmerge.capture(net, torch.randn(2, 3, 8, 8)))


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


def read(batches, model, take=None, **options):
    return read_calibration(batches, take, model, ((torch.randn(2, 3, 8, 8),), {}), **options)


def sizes(batches):
    return [batch[0][0].shape[0] for batch in batches]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_generator_is_read_once(model):
    given = images(4, 4, 4, 4, 4, 4)
    reads = []

    def once():
        for index, batch in enumerate(given):
            reads.append(index)
            yield batch

    found = read(once(), model)
    assert reads == list(range(6))
    assert repr(found) == "Calibration(24 images, 5 batches to fit, 1 held out)"
    kept = [batch[0][0] for batch in (*found.fit, *found.held_out)]
    assert all(any(torch.equal(a, b) for b in kept) for a in given)
    kept[0].zero_()
    assert all(batch.any() for batch in given)  # copies


def test_a_fifth_is_held_out_and_no_fit_sees_it(model):
    for count in (5, 7, 8, 10, 12, 25):
        found = read(images(*[2] * count), model)
        assert len(found.held_out) == round(count / 5)
        assert len(found.fit) + len(found.held_out) == count
        assert not {id(batch) for batch in found.fit} & {id(batch) for batch in found.held_out}


@pytest.mark.parametrize(
    ("given", "fit", "held_out"),
    [
        ((20,), [4] * 4, [4]),
        ((10, 10), [3, 4, 3, 4, 3], [3]),
        ((5,), [2], [3]),
        ((1, 1), [1], [1]),
        ((2, 2, 2), [2, 2], [2]),
    ],
)
def test_few_batches_are_split_by_images(model, given, fit, held_out):
    found = read(images(*given), model)
    assert (sizes(found.fit), sizes(found.held_out)) == (fit, held_out)
    assert found.images == sum(given)


def test_a_batch_that_cannot_be_split_serves_as_both(model):
    fixed = clone(model)
    fixed.meta["fxmerge"]["dynamic_batch"] = False
    found = read(images(2), fixed)
    assert sizes(found.fit) == sizes(found.held_out) == [2]


def test_the_memory_bound_truncates_and_says_so(model):
    image = 4 * 3 * 8 * 8
    found = read(images(2, 2, 2, 2, 2, 2, 2), model, memory=10 * image)
    assert (found.images, found.truncated) == (10, True)
    assert not read(images(2, 2, 2, 2, 2), model, memory=10 * image).truncated
    assert read(images(4, 4), model, memory=1).images == 4  # the first is kept in any case


def test_labels_are_refused_without_a_word_on_the_inputs(model):
    loader = DataLoader(TensorDataset(torch.cat(images(12)), torch.arange(12)), batch_size=4)
    with pytest.raises(
        UserError, match=r"batch 0 holds tensors of shape \[\[4, 3, 8, 8\], \[4\]\].*lambda batch: batch\[0\]"
    ):
        read(loader, model)
    found = read(loader, model, take=lambda batch: batch[0])
    assert found.images == 12
    assert all(len(batch[0]) == 1 for batch in found.fit)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 8, 9), torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8).double(), torch.zeros(3, 8, 8)]
)
def test_a_batch_of_another_kind_is_named_by_its_number(model, wrong):
    with pytest.raises(UserError, match=r"calibration batch 2 holds tensors of shape"):
        read([*images(2, 2), wrong], model)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 8, 8), {"x": 1}, "images", 3])
def test_what_is_no_iterable_of_batches_is_refused(model, wrong):
    with pytest.raises(UserError, match=r"expected an iterable of batches"):
        read(wrong, model)


def test_other_mistakes_are_named(model):
    with pytest.raises(UserError, match="yielded no batch"):
        read([], model)
    with pytest.raises(UserError, match="calibration batch 0 is not an input of the model: example_input is a int"):
        read([3], model)
    with pytest.raises(UserError, match="rejects calibration batch 0"):
        read_calibration([torch.zeros(2, 5, 8, 8)], None, model, ((torch.zeros(2, 5, 8, 8),), {}))


def test_trying_a_batch_changes_no_statistics(model):
    gm = clone(model).train()
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    read(images(4, 4, 4, 4, 4), gm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    assert all(module.training for module in gm.modules())


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5 kb", 1500), (10, 10), ("7", 7)]
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", 0, "nan", "inf", "2XB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UserError, match="is no amount of memory; expected something like '2GiB'"):
        parse_memory(text)


def test_a_second_example_has_two_rows():
    x = torch.randn(1, 3, 4, 4)
    ((found,), _) = second_example(((x,), {}))
    assert torch.equal(found, x.repeat(2, 1, 1, 1))
    several = ((torch.randn(3, 3, 4, 4),), {})
    assert second_example(several) is several


# --- statistics -------------------------------------------------------------------------------------------------------


def statistics(values):
    return values.mean((0, 2, 3)), values.var((0, 2, 3), correction=1)


def test_reestimated_statistics_are_those_computed_by_hand(model):
    gm = clone(model).train()
    gm.get_submodule("1").eval()
    modes = [module.training for module in gm.modules()]
    batches = [((batch,), {}) for batch in images(4, 6, 4, seed=3)]
    nodes = by_id(gm)
    untouched = {name: tensor.clone() for name, tensor in gm.get_submodule("1").state_dict().items()}
    assert reestimate_batch_norms(gm, {nodes["3"], nodes["4"]}, batches) == 1
    with eval_mode(gm), torch.no_grad():
        values = [nn.Sequential(*(gm.get_submodule(name) for name in "0123"))(batch[0][0]) for batch in batches]
    means, variances = zip(*map(statistics, values), strict=True)
    norm = gm.get_submodule("4")
    assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack(variances).mean(0), atol=1e-6)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in gm.get_submodule("1").state_dict().items())
    assert norm.momentum == 0.1
    assert [module.training for module in gm.modules()] == modes


def test_a_later_batch_norm_sees_the_earlier_one_normalise_each_batch(model):
    """As torch does in train mode: both at once, the second on what the first makes of each batch."""
    gm = clone(model)
    batches = [((batch,), {}) for batch in images(4, 4, seed=4)]
    assert reestimate_batch_norms(gm, set(gm.graph.nodes), batches) == 2
    twin = clone(model)
    for name in ("1", "4"):
        twin.get_submodule(name).reset_running_stats()
        twin.get_submodule(name).momentum = None
    twin.train()
    for args, _ in batches:
        twin(*args)
    for name, tensor in gm.named_buffers():
        assert torch.allclose(tensor, twin.get_buffer(name), rtol=1e-6), name
    assert not any(module._forward_hooks for module in gm.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_batches_count_alike_in_half_precision(dtype):
    """A running average in bfloat16 stands still after some hundred batches: its steps are smaller than a rounding."""
    generator = torch.Generator().manual_seed(0)
    batches = [step * torch.randn(4, 3, 2, 2, generator=generator).to(dtype) for step in (1, 4) for _ in range(200)]
    gm = clone(fxmerge.capture(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(dtype), batches[0]))
    assert reestimate_batch_norms(gm, set(gm.graph.nodes), [((batch,), {}) for batch in batches]) == 1
    norm, convolution = gm.get_submodule("1"), gm.get_submodule("0").double()
    with torch.no_grad():
        means, variances = zip(*(statistics(convolution(batch.double())) for batch in batches), strict=True)
    assert norm.running_var.dtype is dtype
    assert torch.allclose(norm.running_var.double(), torch.stack(variances).mean(0), rtol=2 * torch.finfo(dtype).eps)
    assert torch.allclose(norm.running_mean.double(), torch.stack(means).mean(0), atol=2e-2)
    running = variances[0].to(dtype)
    for count, variance in enumerate(variances[1:], 2):
        running = running * (1 - 1 / count) + (variance / count).to(dtype)
    wrong = dtype is torch.bfloat16
    assert torch.allclose(running.double(), torch.stack(variances).mean(0), rtol=0.05) is not wrong


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.idle = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x, side):
        return self.norm(self.norm(self.first(x))), self.idle(side)


def test_a_batch_norm_that_is_called_twice_averages_over_both_and_one_that_did_not_run_is_reset():
    torch.manual_seed(0)
    x, side = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    gm = clone(fxmerge.capture(Twice(), (x, side)))
    nodes = by_id(gm)

    def forward(batch):
        return evaluate(gm, nodes["norm#1"], {nodes["x"]: batch})

    assert reestimate_batch_norms(gm, set(gm.graph.nodes), [x], forward) == 2
    norm, idle = gm.get_submodule("norm"), gm.get_submodule("idle")
    with torch.no_grad():
        once = gm.get_submodule("first")(x)
        twice = nn.functional.batch_norm(once, None, None, norm.weight, norm.bias, training=True)
    (first, spread), (second, again) = statistics(once), statistics(twice)
    assert int(norm.num_batches_tracked) == 2
    assert torch.allclose(norm.running_mean, (first + second) / 2, atol=1e-6)
    assert torch.allclose(norm.running_var, (spread + again) / 2, atol=1e-6)
    assert torch.equal(idle.running_mean, torch.zeros(3))
    assert torch.equal(idle.running_var, torch.ones(3))


def test_one_value_per_channel_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    gm = clone(fxmerge.capture(net, torch.randn(2, 3, 8, 8)))
    with pytest.raises(UserError, match=r"leaves batch norm '1' one value per channel.*use larger calibration batches"):
        reestimate_batch_norms(gm, set(gm.graph.nodes), [((batch,), {}) for batch in images(1)])
    assert gm.get_submodule("1").momentum == 0.1


def test_without_batch_norms_nothing_runs(model):
    assert reestimate_batch_norms(model, {by_id(model)["0"]}, iter([None])) == 0


def test_a_calibration_is_plain_data():
    assert Calibration((), (), 0, False) == Calibration((), (), 0, False)
