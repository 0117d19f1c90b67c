"""Importance by performance: what is harmless costs less, and figures are the same every time."""

from __future__ import annotations

import copy
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from scoring import accuracy, candidates, cross_entropy, digits, graph
from torch import nn

import fxmerge
from fxmerge.calibration import read_calibration
from fxmerge.errors import UserError
from fxmerge.estimators import Estimator, Magnitude
from fxmerge.fitting import apply_candidates
from fxmerge.performance import Finetune, Score, as_estimator, installing

SGD = {"optimizer": torch.optim.SGD, "lr": 0.05}


def finetune(loss=cross_entropy, count=16, **options):
    return Finetune(digits()[:count], loss, inputs=operator.itemgetter(0), **options)


def bypass(name):
    return next(each for each in candidates() if each.kind == "bypass" and each.bypassed == (name,))


# --- finetune ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["labels", "teacher"])
def test_what_is_harmless_loses_less_than_what_is_not(loss):
    score = finetune(loss).prepare(graph(), candidates())
    harmless, destructive = score(bypass("2")), score(bypass("4"))
    assert abs(harmless) < 0.1 < 0.3 < destructive


def test_the_loss_is_the_performance_that_is_lost():
    def of_images(model, batches):
        return sum(len(labels) for _, labels in batches) + float(model.get_parameter("4.weight").mean())

    gm = graph()
    before = of_images(gm.requires_grad_(False), digits()[:8])
    loss = finetune(score=of_images, steps=1, optimizer=torch.optim.SGD, lr=0.0).prepare(gm.requires_grad_(), ())
    assert loss(bypass("2")) == 0.0
    loss = finetune(score=of_images, steps=1, **SGD).prepare(gm, ())
    assert loss(bypass("2")) != 0.0
    assert of_images(gm.requires_grad_(False), digits()[:8]) == before


def test_a_training_by_hand_gives_the_same_loss():
    gm, candidate = graph(), bypass("4")
    drawn = random.Random(3).sample(digits()[:5], 4)  # noqa: S311
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, _ = apply_candidates(gm, (candidate,), None)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
        for batch in (drawn[0], drawn[1], drawn[0]):
            optimizer.zero_grad()
            cross_entropy(model(batch[0]), batch).backward()
            optimizer.step()
    with torch.no_grad():
        after, before = (
            -sum(float(cross_entropy(net.eval()(batch[0]), batch)) for batch in drawn[2:]) / 2 for net in (model, gm)
        )
    assert finetune(count=5, seed=3, steps=3, **SGD).prepare(gm, ())(candidate) == before - after


def test_the_teacher_is_the_original():
    images, gm = digits()[0][0], graph()
    estimator = Finetune([batch[0] for batch in digits()[:2]], score=None, steps=1, optimizer=torch.optim.SGD, lr=0.0)
    candidate = bypass("4")
    model, _ = apply_candidates(gm, (candidate,), None)
    with torch.no_grad():
        by_hand = [
            float(
                F.kl_div(
                    model.eval()(x).log_softmax(1), gm.eval()(x).log_softmax(1), log_target=True, reduction="batchmean"
                )
            )
            for x, _ in digits()[:2]
        ]
    loss = estimator.prepare(gm, ())(candidate)
    # training with a rate of 0 moves nothing but running statistics, of one batch
    assert min(by_hand) / 3 < loss < 3 * max(by_hand)
    assert images.shape == (32, 1, 8, 8)


def test_losses_depend_neither_on_the_order_nor_on_what_ran_before():
    chosen = candidates()[:4]
    forth = finetune(steps=2, count=4).prepare(graph(), ())
    first = [forth(each) for each in chosen]
    torch.manual_seed(123)
    random.seed(5)
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    back = finetune(steps=2, count=4).prepare(graph(), ())
    assert [back(each) for each in reversed(chosen)] == first[::-1]
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    other = finetune(steps=2, count=4, seed=1).prepare(graph(), ())
    assert [other(each) for each in chosen] != first


def test_the_subsets_are_disjoint_and_of_the_same_size():
    seen = []

    def record(kind):
        def called(outputs, batch):
            seen.append((kind if torch.is_grad_enabled() else "score", id(batch[0])))
            return cross_entropy(outputs, batch)

        return called

    finetune(record("train"), count=7).prepare(graph(), ())(bypass("2"))
    trained, scored = ({name for kind, name in seen if kind == which} for which in ("train", "score"))
    assert len(trained) == len(scored) == 3
    assert not trained & scored


def test_more_steps_than_batches_begin_again():
    estimator = finetune(count=4, steps=5)
    calls = []

    def loss(outputs, batch):
        if torch.is_grad_enabled():
            calls.append(id(batch[0]))
        return cross_entropy(outputs, batch)

    estimator.loss = loss
    estimator.prepare(graph(), ())(bypass("2"))
    assert calls == [calls[0], calls[1], calls[0], calls[1], calls[0]]
    assert finetune(count=5).steps == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: finetune(count=1), r"Finetune was given 1 batches; it needs two at least"),
        (lambda: finetune(steps=0), r"steps must be a whole number of at least 1 or None, not 0"),
        (lambda: finetune(steps=True), r"steps must be a whole number of at least 1 or None, not True"),
        (lambda: finetune(loss=3), r"loss of Finetune is a int; expected a function"),
        (lambda: Score(3), r"Score was given a int; expected a function of a model"),
        (
            lambda: Finetune([["a"], ["b"]]).prepare(graph(), ()),
            r"a batch of Finetune is no input of the model: example_input holds no tensor",
        ),
        (
            lambda: finetune().prepare(graph().requires_grad_(False), ()),
            r"no parameter of the model requires gradients.*call model\.requires_grad_\(\)",
        ),
    ],
    ids=["one batch", "no steps", "bool", "loss", "score", "inputs", "frozen"],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_training_that_diverges_is_named():
    score = finetune(optimizer=torch.optim.SGD, lr=1e30, count=8).prepare(graph(), ())
    with pytest.raises(UserError, match=r"the performance of a candidate's network is nan: .* may have diverged"):
        score(bypass("4"))


# --- score ------------------------------------------------------------------------------------------------------------


def test_a_score_is_lost():
    gm = graph()
    score = Score(accuracy).prepare(gm, ())
    candidate = bypass("4")
    model, _ = apply_candidates(gm, (candidate,), None)
    assert score(candidate) == accuracy(gm.eval()) - accuracy(model.eval())
    assert score(candidate) > 0.2
    assert abs(score(bypass("2"))) < 0.01


def test_a_score_sees_the_weights_that_will_be_installed():
    gm = graph()
    batches = [batch[0] for batch in digits()[:5]]
    calibration = read_calibration(batches, None, gm, ((batches[0],), {}))
    bound = installing(Score(accuracy), calibration, "refit", 2**31)
    merge = next(
        each
        for each in candidates()
        if each.kind == "merge" and each.removed == ("1", "3", "6") and each.kept == ("0",)
    )
    expected, fits = apply_candidates(gm, (merge,), calibration, "refit", 2**31)
    assert any(each.fitted for each in fits)
    assert bound.prepare(gm, ())(merge) == accuracy(gm.eval()) - accuracy(expected.eval())
    assert bound.prepare(gm, ())(merge) < 0.1 < 0.5 < Score(accuracy).prepare(gm, ())(merge)


def test_binding_leaves_the_estimator_alone():
    mine, magnitude = Score(accuracy), Magnitude()
    bound = installing(mine, None, "refit", 7)
    assert (bound.fit, bound.memory, mine.fit) == ("refit", 7, "compose")
    assert installing(magnitude, None, "refit", 7) is magnitude


# --- importance= ------------------------------------------------------------------------------------------------------


def test_names_estimators_and_functions():
    assert as_estimator("auto") == "auto"
    magnitude = Magnitude()
    assert as_estimator(magnitude) is magnitude
    assert as_estimator(accuracy).function is accuracy
    assert isinstance(finetune(), Estimator)
    for bare in ("finetune", Finetune):
        with pytest.raises(
            UserError, match=r"importance='finetune' needs data .* pass importance=fxmerge\.performance\.Finetune\("
        ):
            as_estimator(bare)


def test_compress_takes_a_function_of_a_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))
    before = copy.deepcopy(model.state_dict())
    seen = []

    def score(network):
        seen.append(network)
        return float(network(digits()[0][0]).mean())

    result = fxmerge.compress(model, digits()[0][0], 0.7, runtime="macs", importance=score)
    assert "importance is score" in result.report.data
    assert len(seen) > 1
    assert not any(network.training for network in seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="importance='finetune' needs data"):
        fxmerge.compress(model, digits()[0][0], 0.7, runtime="macs", importance="finetune")
