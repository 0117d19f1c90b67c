"""Fine-tuning: it is the loop one would write by hand, the original stays as it is, and a killed run goes on."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import fxmerge
from fxmerge.errors import StoreError, UnsupportedError, UserError
from fxmerge.finetuning import Epoch
from fxmerge.graph import clone


def conv(i, o, s=1):
    return [nn.Conv2d(i, o, 3, s, padding=1, bias=False), nn.BatchNorm2d(o)]


class Block(nn.Module):
    def __init__(self, i, o, s=1):
        super().__init__()
        self.body = nn.Sequential(*conv(i, o, s), nn.ReLU(), *conv(o, o))
        self.skip = nn.Identity() if i == o else nn.Conv2d(i, o, 1, s)

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def network(classes=10):
    blocks = [Block(8, 8), Block(8, 16, 2), Block(16, 16)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, classes)]
    return nn.Sequential(*conv(1, 8), nn.ReLU(), *blocks, *head)


@pytest.fixture(scope="module")
def digits(pixels, train_on_digits):
    """A small ResNet, trained for seconds on scikit-learn's digits of 8x8 pixels, and compressed; not to be changed."""
    (x, y), model = pixels, train_on_digits(network, epochs=8, size=50)
    options = {"runtime": "macs", "importance": "magnitude", "calibration": x[:300].split(50), "search": None}
    found = {fit: fxmerge.compress(model, x[:2], 0.35, fit=fit, **options) for fit in ("compose", "refit")}
    return SimpleNamespace(model=model, x=x, y=y, **found)


def fresh(result):
    return fxmerge.Result(clone(result.model), result.plan, result.report, result.example)


def accuracy(model, digits):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return float((model(digits.x[1200:]).argmax(1) == digits.y[1200:]).double().mean())


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def labelled(digits, size=50, count=300):
    return list(zip(digits.x[:count].split(size), digits.y[:count].split(size), strict=True))


def first(batch):
    return batch[0]


def cross_entropy(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


# --- what it is worth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "lr", "start", "end"), [("compose", 0.02, 0.4, 0.85), ("refit", None, 0.85, 0.87)])
def test_distillation_without_labels_recovers_the_accuracy(digits, fit, lr, start, end):
    assert accuracy(digits.model, digits) > 0.9
    result, history = fresh(getattr(digits, fit)), []
    before = accuracy(result.model, digits)
    options = {"teacher": digits.model, "epochs": 4, "lr": lr, "seed": 0, "on_epoch": history.append}
    assert fxmerge.finetune(result, digits.x[:1200].split(50), **options) is result
    after = accuracy(result.model, digits)
    assert before < start
    assert after > max(end, before + 0.08)
    assert history[-1].loss < history[0].loss
    assert accuracy(result.merge(), digits) == pytest.approx(after, abs=0.005)


# --- the loop one would write by hand -----------------------------------------------------------------------------------


def by_hand(result, batches, optimizer, schedule, epochs, max_norm=None):
    model = result.model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
    return weights(model)


def test_it_equals_a_loop_written_by_hand(digits):
    batches, epochs = labelled(digits), 2
    one, other = fresh(digits.compose), fresh(digits.compose)
    optimizer = AdamW(one.model.parameters(), 1e-3)
    torch.manual_seed(3)
    expected = by_hand(one, batches, optimizer, LinearLR(optimizer, 1.0, 0.1, 12), epochs, max_norm=0.5)
    torch.manual_seed(3)
    fxmerge.finetune(
        other,
        batches,
        loss=cross_entropy,
        inputs=first,
        epochs=epochs,
        optimizer=lambda parameters: AdamW(parameters, 1e-3),
        schedule=lambda made: LinearLR(made, 1.0, 0.1, 12),
        max_norm=0.5,
    )
    assert largest_difference(weights(other.model), expected) < 1e-6
    assert largest_difference(expected, weights(digits.compose.model)) > 1e-3


def test_the_defaults_are_those_that_are_stated(digits):
    batches = labelled(digits)
    one, other = fresh(digits.refit), fresh(digits.refit)
    groups = [
        {"params": [p for p in one.model.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in one.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in groups)
    optimizer = SGD(groups, lr=0.005, momentum=0.9, nesterov=True)
    torch.manual_seed(3)
    expected = by_hand(one, batches, optimizer, CosineAnnealingLR(optimizer, 12), 2)
    torch.manual_seed(3)
    history = []
    fxmerge.finetune(other, batches, loss=cross_entropy, inputs=first, epochs=2, on_epoch=history.append)
    assert largest_difference(weights(other.model), expected) < 1e-6
    assert [each.lr for each in history] == pytest.approx([0.0025, 0.0], abs=1e-12)


def test_without_a_length_the_learning_rate_is_constant(digits):
    history = []
    result = fresh(digits.refit)
    fxmerge.finetune(
        result, iter(labelled(digits)), loss=cross_entropy, inputs=first, lr=0.003, on_epoch=history.append
    )
    assert [each.lr for each in history] == [0.003]


def test_frozen_weights_stay(digits):
    result = fresh(digits.refit)
    result.model.requires_grad_(False)
    result.model.get_submodule("9").requires_grad_(True)
    before = weights(result.model)
    fxmerge.finetune(result, labelled(digits), loss=cross_entropy, inputs=first, batch_norm="frozen")
    after = weights(result.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"9.weight", "9.bias"}


# --- the objective ------------------------------------------------------------------------------------------------------


def chain():
    """Two convolutions that merge, and an image to image network without a head."""
    layers = [nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers)


def one_step(result, batch, **options):
    """The parts of the loss of one batch, before anything is trained."""
    history = []
    options = {"optimizer": lambda parameters: SGD(parameters, 0.0), "batch_norm": "frozen", **options}
    fxmerge.finetune(result, [batch], on_epoch=history.append, **options)
    (epoch,) = history
    return epoch


def compressed_chain(seed=0, fit="compose"):
    torch.manual_seed(seed)
    model = chain()
    x = torch.randn(20, 2, 8, 8)
    result = fxmerge.compress(model, x[:2], 0.5, runtime="macs", calibration=x.split(4), fit=fit, exclude="4")
    return model, result, torch.randn(6, 2, 8, 8)


def test_logits_are_distilled_by_kl_at_a_temperature(digits):
    result, x, temperature = fresh(digits.compose), digits.x[:40], 3.0
    for module in result.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = one_step(result, x, teacher=digits.model, temperature=temperature, distill=0.7)
    with torch.no_grad():
        student, teacher = (each(x).double() for each in (result.model.eval(), digits.model))
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean()) * temperature**2
    assert found.parts == {"distillation": pytest.approx(expected, rel=1e-4)}
    assert found.loss == pytest.approx(0.7 * expected, rel=1e-4)
    assert expected > 0.1


def test_other_outputs_are_distilled_by_relative_squared_error():
    model, result, x = compressed_chain()
    with torch.no_grad():
        student, teacher = result.model(x), model(x)
    expected = float(((student - teacher) ** 2).sum() / ((teacher - teacher.mean(0)) ** 2).sum())
    found = one_step(result, x, teacher=model, distill=0.25)
    assert found.parts == {"distillation": pytest.approx(expected, rel=1e-5)}
    assert found.loss == pytest.approx(0.25 * expected, rel=1e-5)
    assert expected > 0.01


@pytest.mark.parametrize("fit", ["compose", "refit"])
def test_features_are_compared_where_a_merged_segment_ends(fit):
    """The first two convolutions become one; its output is held against that of the second one in the original."""
    model, result, x = compressed_chain(fit=fit)
    (merge,) = result.plan.merges
    assert merge.kept == ("0", "2")
    assert merge.exit == "2"
    with torch.no_grad():
        teacher = model[:3](x)
        value = {}
        path = "0_norm" if fit == "refit" else "2"
        handle = result.model.get_submodule(path).register_forward_hook(lambda *seen: value.update(out=seen[2]))
        result.model.eval()(x)
        handle.remove()
    expected = float(((value["out"] - teacher) ** 2).sum() / ((teacher - teacher.mean(0)) ** 2).sum())
    found = one_step(result, x, teacher=model, features=2.0, distill=0.0)
    assert found.parts == {"features": pytest.approx(expected, rel=1e-5)}
    assert found.loss == pytest.approx(2.0 * expected, rel=1e-5)
    assert expected > 0.01


def test_features_have_gradients_up_to_the_exits_and_no_further():
    model, result, x = compressed_chain()
    before = weights(result.model)
    history = []
    options = {"distill": 0.0, "features": 1.0, "epochs": 10, "lr": 0.01, "on_epoch": history.append}
    fxmerge.finetune(result, x.split(3), teacher=model, **options)
    after = weights(result.model)
    assert history[-1].loss < 0.7 * history[0].loss
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"0.weight", "2.weight", "2.bias"} <= changed
    assert not changed & {"4.bias"}  # weight decay moves 4.weight a little


def test_loss_and_distillation_and_features_add_up(digits):
    batch = (digits.x[:40], digits.y[:40])
    options = {"inputs": first, "teacher": digits.model, "loss": cross_entropy, "distill": 0.3, "features": 0.1}
    found = one_step(fresh(digits.compose), batch, **options)
    assert list(found.parts) == ["loss", "distillation", "features"]
    assert found.loss == pytest.approx(
        found.parts["loss"] + 0.3 * found.parts["distillation"] + 0.1 * found.parts["features"], rel=1e-5
    )
    assert all(value > 1e-3 for value in found.parts.values())


def test_the_loss_sees_the_models_own_containers_and_keyword_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, image, shift):
            x = self.conv2(torch.relu(self.conv1(image)))
            return {"logits": x.mean((2, 3)) + shift[:, None], "map": x}

    torch.manual_seed(0)
    model = Net()
    batch = {"image": torch.randn(4, 3, 8, 8), "shift": torch.randn(4)}
    result = fxmerge.compress(model, batch, 0.9, runtime="macs")
    seen = []

    def loss(outputs, item):
        seen.append((sorted(outputs), item["labels"].tolist()))
        return F.cross_entropy(outputs["logits"], item["labels"])

    batches = [{**batch, "labels": torch.arange(4)}]
    fxmerge.finetune(
        result, batches, loss=loss, teacher=model, inputs=lambda item: {k: item[k] for k in ("image", "shift")}
    )
    assert seen == [(["logits", "map"], [0, 1, 2, 3])]


# --- what is left alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_the_teacher_is_left_as_it_was(digits, features):
    teacher = copy.deepcopy(digits.model).train()
    teacher[3].eval()
    before, modes = weights(teacher), [module.training for module in teacher.modules()]
    seen = []
    teacher[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    fxmerge.finetune(fresh(digits.refit), digits.x[:100].split(50), teacher=teacher, features=features, lr=0.02)
    assert largest_difference(weights(teacher), before) == 0.0
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert not any(seen)


def statistics(model):
    return {name: tensor for name, tensor in weights(model).items() if "running" in name}


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_batch_norms_move_or_keep_their_statistics(digits, batch_norm):
    result = fresh(digits.refit)
    result.model.train()
    result.model.get_submodule("3").eval()
    modes = [module.training for module in result.model.modules()]
    before = weights(result.model)
    training = {}

    def loss(outputs, batch):
        training.update({type(m): m.training for m in result.model.modules()})
        return cross_entropy(outputs, batch)

    fxmerge.finetune(result, labelled(digits), loss=loss, inputs=first, batch_norm=batch_norm)
    after = weights(result.model)
    moved = {name for name in statistics(result.model) if not torch.equal(before[name], after[name])}
    assert moved == (set(statistics(result.model)) if batch_norm == "train" else set())
    assert len(statistics(result.model)) >= 4
    norms = [name for name, m in result.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in norms)
    assert training[nn.BatchNorm2d] is (batch_norm == "train")
    assert training[nn.Conv2d] is True
    assert [module.training for module in result.model.modules()] == modes
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_a_seed_is_for_this_run_alone(digits):
    found = []
    for _ in range(2):
        result = fresh(digits.compose)
        loader = DataLoader(TensorDataset(digits.x[:100], digits.y[:100]), 50, shuffle=True)
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        fxmerge.finetune(result, loader, loss=cross_entropy, inputs=first, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(result.model))
    assert largest_difference(*found) == 0.0


def test_the_result_merges_saves_and_trains_on(digits, tmp_path):
    result = fresh(digits.refit)
    fxmerge.finetune(result, labelled(digits), loss=cross_entropy, inputs=first)
    result.save(tmp_path / "saved")
    loaded = fxmerge.load(tmp_path / "saved")
    history = []
    options = {"loss": cross_entropy, "teacher": digits.model, "features": 1.0, "inputs": first}
    for each in (result, loaded):
        torch.manual_seed(0)
        fxmerge.finetune(each, labelled(digits), on_epoch=history.append, **options)
    assert history[0].parts == history[1].parts
    with torch.no_grad():
        torch.testing.assert_close(result.merge()(digits.x[:9]), result.model.eval()(digits.x[:9]), rtol=0, atol=1e-3)


# --- checkpoints --------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def killed_at(step):
    """The loss, which is killed at its so many-th call; its calls are counted."""

    def loss(outputs, batch):
        loss.calls += 1
        if loss.calls - 1 == step:
            raise KilledError
        return cross_entropy(outputs, batch)

    loss.calls = 0
    return loss


def loader(digits, generator=None):
    return DataLoader(TensorDataset(digits.x[:300], digits.y[:300]), 50, shuffle=True, generator=generator)


RECIPES = {
    "default": {},
    "adamw": {
        "optimizer": lambda parameters: AdamW(parameters, 1e-3),
        "schedule": lambda optimizer: MultiStepLR(optimizer, [4, 11], 0.3),
    },
}


@pytest.mark.parametrize(
    ("recipe", "steps", "repeated", "own_generator", "accelerated"),
    [
        ("default", None, 3, False, False),
        ("default", 2, 1, True, False),
        ("adamw", 2, 1, False, False),
        ("adamw", None, 3, True, False),
        ("default", 2, 1, False, True),
    ],
)
def test_a_killed_run_and_its_resumption_are_one_run(
    digits, tmp_path, recipe, steps, repeated, own_generator, accelerated
):
    """Six steps an epoch, killed in the fourth step of the second of three epochs; the network has a dropout."""

    def train(folder, loss, seed):
        result, history = fresh(digits.refit), []
        torch.manual_seed(seed)
        batches = loader(digits, torch.Generator().manual_seed(1) if own_generator else None)
        options = {"checkpoint": folder, "checkpoint_steps": steps, "epochs": 3, "on_epoch": history.append}
        options["accelerator"] = accelerator() if accelerated else None
        try:
            fxmerge.finetune(result, batches, loss=loss, inputs=first, **options, **RECIPES[recipe])
        except KilledError:
            torch.rand(3)
        return weights(result.model), history, loss.calls

    whole, history, calls = train(tmp_path / "whole", killed_at(None), 7)
    assert calls == 18
    _, before, calls = train(tmp_path / "killed", killed_at(9), 7)
    assert (len(before), calls) == (1, 10)
    resumed, after, calls = train(tmp_path / "killed", killed_at(None), 8)
    assert calls == 18 - 9 + repeated
    assert largest_difference(resumed, whole) < 1e-6
    assert [each.loss for each in (*before, *after)] == pytest.approx([each.loss for each in history], rel=1e-5)
    assert json.loads((tmp_path / "killed" / "history.json").read_text()) == [
        {"number": each.number, "loss": each.loss, "parts": each.parts, "lr": each.lr} for each in (*before, *after)
    ]

    again, none, calls = train(tmp_path / "killed", killed_at(None), 9)
    assert (none, calls) == ([], 0)
    assert largest_difference(again, resumed) == 0.0


def test_what_validation_draws_does_not_change_a_run(digits):
    found = []
    for validate in (lambda _: torch.rand(5), lambda _: None):
        result = fresh(digits.refit)
        torch.manual_seed(0)
        fxmerge.finetune(result, loader(digits), loss=cross_entropy, inputs=first, epochs=2, on_epoch=validate)
        found.append(weights(result.model))
    assert largest_difference(*found) == 0.0


BASE = {"epochs": 1, "loss": cross_entropy, "inputs": first}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fit": "compose"}, r"a checkpoint of another run. Its network: "),
        ({"optimizer": lambda p: AdamW(p, 0.005)}, r"Its optimizer: 'SGD \('; of this run: 'AdamW \('"),
        ({"lr": 0.01}, r"Its optimizer: '    lr: 0\.005'; of this run: '    lr: 0\.01'"),
        ({"schedule": lambda o: LinearLR(o)}, r"Its schedule: 'CosineAnnealingLR'; of this run: 'LinearLR'"),
        ({"count": 200}, r"Its schedule: 'T_max: 6'; of this run: 'T_max: 4'"),
        ({"max_norm": 1.0}, r"Its options: 'max_norm=None'; of this run: 'max_norm=1\.0'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(digits, tmp_path, changes, words):
    changes = dict(changes)
    fxmerge.finetune(fresh(digits.refit), labelled(digits), checkpoint=tmp_path, **BASE)
    before = (tmp_path / "training.safetensors").read_bytes()
    result = fresh(getattr(digits, changes.pop("fit", "refit")))
    state = weights(result.model)
    batches = labelled(digits, count=changes.pop("count", 300))
    with pytest.raises(StoreError, match=words):
        fxmerge.finetune(result, batches, checkpoint=tmp_path, **{**BASE, **changes})
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert largest_difference(weights(result.model), state) == 0.0


def test_damaged_foreign_and_unwritable_folders_are_refused(digits, tmp_path):
    path = tmp_path / "training.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(StoreError, match=r"training\.safetensors: damaged or not written by fxmerge"):
        fxmerge.finetune(fresh(digits.refit), labelled(digits), checkpoint=tmp_path, **BASE)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(StoreError, match=r"its format is None; this version of fxmerge reads 'fxmerge\.training/1'"):
        fxmerge.finetune(fresh(digits.refit), labelled(digits), checkpoint=tmp_path, **BASE)
    loss = killed_at(0)
    with pytest.raises(StoreError, match="cannot be written"):
        fxmerge.finetune(fresh(digits.refit), labelled(digits), checkpoint=path, **{**BASE, "loss": loss})
    assert loss.calls == 0


def test_a_schedule_that_is_no_plain_data_is_refused_before_training(digits, tmp_path):
    class Own(LinearLR):
        def __init__(self, optimizer):
            self.thing = object()
            super().__init__(optimizer)

    loss = killed_at(0)
    with pytest.raises(UnsupportedError, match=r"schedule holds <object .*Train without checkpoint="):
        fxmerge.finetune(
            fresh(digits.refit), labelled(digits), checkpoint=tmp_path, **{**BASE, "loss": loss, "schedule": Own}
        )
    assert loss.calls == 0


# --- divergence ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_it_and_puts_the_model_back(digits):
    states = []
    calls = itertools.count()

    def loss(outputs, batch):
        return cross_entropy(outputs, batch) * (math.nan if next(calls) == 9 else 1.0)

    result = fresh(digits.refit)
    words = (
        r"the loss is nan in step 4 of epoch 2 of 3 \(loss nan\), at a learning rate of 0\.00[0-9]+: training diverged. "
        r"result\.model is back where the epoch began\. Use a smaller lr, or max_norm=1\.0"
    )
    with pytest.raises(fxmerge.FxmergeError, match=words):
        fxmerge.finetune(
            result,
            labelled(digits),
            loss=loss,
            inputs=first,
            epochs=3,
            on_epoch=lambda _: states.append(weights(result.model)),
        )
    assert len(states) == 1
    assert largest_difference(weights(result.model), states[0]) == 0.0


def test_weights_that_are_no_numbers_after_the_last_step_are_noticed(digits):
    result = fresh(digits.refit)
    before = weights(result.model)
    with pytest.raises(UserError, match=r"weights are not finite after epoch 1 of 1: training diverged"):
        fxmerge.finetune(
            result, labelled(digits)[:1], loss=lambda *given: 1e3 * cross_entropy(*given), inputs=first, lr=3e38
        )
    assert largest_difference(weights(result.model), before) == 0.0


# --- refusals -----------------------------------------------------------------------------------------------------------


def images_of(digits):
    return list(digits.x[:100].split(50))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"nothing to train for: pass loss=.* or teacher=, the original model"),
        ({"loss": 3}, r"loss is a int; expected a function of the model's outputs and the batch"),
        ({"teacher": "resnet"}, r"teacher is a str; expected the original model"),
        ({"teacher": "self"}, r"teacher is result\.model itself"),
        ({"teacher": "model", "distill": 0}, r"the teacher has no part in the loss with distill=0 and features=0"),
        ({"loss": cross_entropy, "features": 0.5}, r"features=0\.5 compares with the original: pass it as teacher"),
        ({"loss": cross_entropy, "epochs": 0}, r"epochs is 0; expected a whole number of at least 1"),
        ({"loss": cross_entropy, "epochs": 1.5}, r"epochs is 1\.5; expected a whole number"),
        ({"loss": cross_entropy, "lr": -1.0}, r"lr is -1\.0; expected a number above 0"),
        ({"teacher": "model", "temperature": 0}, r"temperature is 0; expected a number above 0"),
        ({"teacher": "model", "distill": math.nan}, r"distill is nan; expected 0 or a number above 0"),
        ({"loss": cross_entropy, "max_norm": 0.0}, r"max_norm is 0\.0; expected a number above 0"),
        ({"loss": cross_entropy, "batch_norm": "eval"}, r"batch_norm is 'eval'; expected 'train' or 'frozen'"),
        ({"loss": cross_entropy, "checkpoint_steps": 5}, r"checkpoint_steps says .*: pass checkpoint="),
        ({"loss": cross_entropy, "result": nn.ReLU()}, r"cannot fine-tune a ReLU: expected what fxmerge\.compress"),
        ({"loss": cross_entropy, "batches": torch.zeros(2)}, r"batches is a Tensor; expected an iterable of batches"),
        (
            {"loss": cross_entropy, "batches": iter([]), "epochs": 2},
            r"batches is a list_iterator, which can be iterated over once, and epochs is 2",
        ),
        ({"loss": cross_entropy, "batches": []}, r"batches yielded nothing in epoch 1 of 1"),
        (
            {"loss": cross_entropy, "inputs": None},
            r"the batch of step 1 of epoch 1 of 1 holds tensors of shape \[\[50, 1, 8, 8\], \[50\]\].*inputs=lambda",
        ),
        ({"loss": cross_entropy, "optimizer": AdamW, "lr": 0.1}, r"lr=0\.1 is for the default optimizer"),
        ({"loss": cross_entropy, "optimizer": "adam"}, r"optimizer gave a str; expected a function of a list of par"),
        (
            {"loss": cross_entropy, "optimizer": lambda _: SGD(nn.Linear(1, 1).parameters(), 0.1)},
            r"optimizer holds parameters that it was not given",
        ),
        ({"loss": cross_entropy, "schedule": 0.1}, r"schedule gave a float; expected a function of the optimizer"),
        ({"loss": cross_entropy, "schedule": ReduceLROnPlateau}, r"schedule gave a ReduceLROnPlateau; expected"),
        ({"loss": lambda outputs, _: outputs}, r"loss gave a Tensor of shape \[50, 10\]; expected a tensor with one"),
        ({"loss": lambda *_: 0.5}, r"loss gave a float 0\.5; expected a tensor with one number"),
        ({"loss": lambda outputs, _: outputs.detach().sum()}, r"the loss has no gradients"),
        (
            {"loss": cross_entropy, "accelerator": "cuda"},
            r"accelerator is a str without num_processes; expected an acc",
        ),
        ({"teacher": network(7)}, r"the network gives outputs of shape \[\[50, 10\]\], the teacher \[\[50, 7\]\]"),
        (
            {"teacher": nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), "features": 1.0},
            r"features: the teacher has no value '.*' of shape .*Pass the network that was compressed",
        ),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(digits, options, words):
    result = fresh(digits.refit)
    named = {"self": result.model, "model": digits.model}
    given = {"batches": labelled(digits), "inputs": first, **options}
    if given.get("teacher") in ("self", "model"):
        given["teacher"] = named[given["teacher"]]
    before, modes = weights(result.model), [module.training for module in result.model.modules()]
    with pytest.raises(UserError, match=words):
        fxmerge.finetune(given.pop("result", result), given.pop("batches"), **given)
    assert largest_difference(weights(result.model), before) == 0.0
    assert [module.training for module in result.model.modules()] == modes


def test_nothing_to_train_is_refused(digits):
    result = fresh(digits.refit)
    result.model.requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter of result\.model requires gradients"):
        fxmerge.finetune(result, labelled(digits), **BASE)


def test_features_without_a_merged_segment_are_refused():
    model, _, x = compressed_chain()
    result = fxmerge.compress(model, x[:2], 1.0, runtime="macs")
    assert not result.plan.candidates
    with pytest.raises(UserError, match="features: no merged segment of this network has an exit to compare at"):
        fxmerge.finetune(result, [x], teacher=model, features=1.0)


def test_a_segment_with_a_norm_put_behind_it_is_left_out():
    torch.manual_seed(0)
    block = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*block, nn.Conv2d(4, 2, 1))
    x = torch.randn(6, 2, 8, 8)
    result = fxmerge.compress(model, x[:2], 0.95, runtime="macs", exclude="5", method="depth")
    assert [each.norm for each in result.plan.merges] == ["1"]
    with pytest.raises(UserError, match="features: no merged segment of this network has an exit to compare at"):
        fxmerge.finetune(result, [x], teacher=model, features=1.0)


def test_a_batch_of_one_image_that_leaves_a_batch_norm_no_variance_is_named():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).eval()
    result = fxmerge.compress(model, torch.randn(2, 2, 5, 5), 0.9, runtime="macs")
    batches = torch.randn(5, 2, 5, 5).split(4)
    with pytest.raises(
        UserError, match=r"the one image of step 2 of epoch 1 of 1 .*drop_last=True.*batch_norm='frozen'"
    ):
        fxmerge.finetune(result, batches, teacher=model)
    fxmerge.finetune(result, batches, teacher=model, batch_norm="frozen")


def test_every_epoch_is_logged(digits, caplog):
    with caplog.at_level(logging.INFO, logger="fxmerge"):
        fxmerge.finetune(fresh(digits.refit), labelled(digits), loss=cross_entropy, inputs=first, epochs=2)
    lines = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    pattern = r"Fine-tuning: epoch [12]: loss 0?\.?\d[\d.e-]* \(loss [\d.e-]+\), learning rate [\d.e-]+"
    assert len(lines) == 2
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_an_epoch_reads_as_a_line():
    epoch = Epoch(3, 0.51234, {"loss": 0.5, "distillation": 0.01234}, 0.0025)
    assert str(epoch) == "epoch 3: loss 0.5123 (loss 0.5, distillation 0.01234), learning rate 0.0025"


# --- accelerate ---------------------------------------------------------------------------------------------------------


def accelerator(**options):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a process has one otherwise
    return accelerate.Accelerator(cpu=True, **options)


def test_accelerate_on_one_device_changes_nothing(digits):
    found = []
    for helper in (None, accelerator()):
        result = fresh(digits.refit)
        torch.manual_seed(0)
        options = {"teacher": digits.model, "features": 0.1, "loss": cross_entropy, "inputs": first, "max_norm": 1.0}
        fxmerge.finetune(result, loader(digits), epochs=2, accelerator=helper, **options)
        found.append(weights(result.model))
        result.merge()
    assert largest_difference(*found) < 1e-6


def test_mixed_precision_leaves_a_plain_float32_module(digits):
    result, names = fresh(digits.refit), set(vars(digits.refit.model))
    history = []
    options = {"teacher": digits.model, "features": 0.1, "epochs": 2, "on_epoch": history.append}
    torch.manual_seed(0)
    fxmerge.finetune(result, digits.x[:300].split(50), accelerator=accelerator(mixed_precision="bf16"), **options)
    assert set(vars(result.model)) == names
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    plain = fresh(digits.refit)
    exact = []
    torch.manual_seed(0)
    fxmerge.finetune(plain, digits.x[:300].split(50), **{**options, "on_epoch": exact.append})
    assert history[0].loss == pytest.approx(exact[0].loss, rel=0.1)
    assert history[0].loss != exact[0].loss


def test_accumulated_gradients_are_those_of_the_large_batch():
    _, result, x = compressed_chain()
    other = fresh(result)
    options = {"loss": lambda outputs, batch: (outputs - batch).square().mean(), "lr": 0.01, "epochs": 3}
    fxmerge.finetune(result, x.split(6), **options)
    fxmerge.finetune(other, x.split(3), accelerator=accelerator(gradient_accumulation_steps=2), **options)
    assert largest_difference(weights(result.model), weights(other.model)) < 1e-6
    fxmerge.finetune(other, x.split(2), accelerator=accelerator(gradient_accumulation_steps=2), **options)
    assert all(parameter.grad is None for parameter in other.model.parameters())  # of the odd batch at the end


def test_what_accelerate_cannot_do_here_is_refused(digits):
    helper = accelerator()
    for changes, words in (
        ({"num_processes": 2}, "2 processes would all train on the same batches: pass a torch DataLoader"),
        ({"distributed_type": SimpleNamespace(value="FSDP")}, r"accelerator splits models \(FSDP\)"),
    ):
        names = (
            "device",
            "is_main_process",
            "sync_gradients",
            "scaler",
            "gradient_accumulation_steps",
            "num_processes",
        )
        methods = ("prepare", "accumulate", "autocast", "backward", "clip_grad_norm_")
        stub = SimpleNamespace(**{**{name: getattr(helper, name) for name in (*names, *methods)}, **changes})
        with pytest.raises(UserError, match=words):
            fxmerge.finetune(fresh(digits.refit), labelled(digits), **BASE, accelerator=stub)
