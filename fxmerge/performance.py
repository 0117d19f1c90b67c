"""Importance as a change of performance: the paper's short fine-tuning, and a score of your own.

LayerMerge (Kim et al., ICML 2024, arXiv 2406.12837, Algorithm 2) takes for the importance of a candidate

    I = exp(performance with the candidate - performance of the original)

Losses add up here, so a candidate's loss is -log I, the performance that it costs. (The paper maximises the sum of I over
the segments of a plan; the least sum of losses is the largest product. To first order of small changes the two agree on
plans of equally many segments.) Performance is larger where a network is better, and a candidate that gains has a negative loss.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .calibration import Calibration
from .candidates import Candidate
from .distances import output_distance
from .errors import UserError
from .estimators import Estimator
from .fitting import apply_candidates
from .graph import clone, device_of
from .inputs import floats, split_example

__all__ = ["Finetune", "Score", "as_estimator", "installing"]

_Own = TypeVar("_Own", bound="_Performance")

_TURN = threading.Lock()
"""Seeds belong to the whole process: its threads take turns."""


class _Performance:
    """What the two estimators share: a candidate's network with the weights that will be installed, and seeds.

    Attributes:
        name: for progress and reports.
        seed: set before every candidate, so that none depends on those before it.
        calibration: what weights are composed or fitted with; None composes them and keeps batch-norm statistics.
        fit: how weights are found, ``compose`` or ``refit``.
        memory: bound on the moments of a fit, in bytes.
    """

    name: str
    seed: int
    calibration: Calibration | None = None
    fit: str = "compose"
    memory: int = 2**31

    def installing(self: _Own, calibration: Calibration | None, fit: str, memory: int) -> _Own:
        """The same estimator for networks whose weights are found so; :func:`fxmerge.frontier` asks for it."""
        bound = copy.copy(self)
        bound.calibration, bound.fit, bound.memory = calibration, fit, memory
        return bound

    def _losses(
        self, gm: fx.GraphModule, performance: Callable[[nn.Module], float], prepared: Callable[[nn.Module], None]
    ) -> Callable[[Candidate], float]:
        """Scores a candidate by the performance that it costs, after its network was ``prepared``."""
        device = device_of(gm)

        def measure(model: fx.GraphModule, what: str) -> float:
            with torch.no_grad():
                found = float(performance(model.eval()))
            if not math.isfinite(found):
                raise UserError(
                    f"the performance of {what} is {found}: no number to compare by; a training may have diverged"
                )
            return found

        with _TURN, _seeded(self.seed, device):
            original = measure(clone(gm), "the original")

        def score(candidate: Candidate) -> float:
            with _TURN, _seeded(self.seed, device):
                model, _ = apply_candidates(gm, (candidate,), self.calibration, self.fit, self.memory)
                prepared(model)
                return original - measure(model, "a candidate's network")

        return score


class Finetune(_Performance):
    """Losses after a short fine-tuning of every candidate: Algorithm 2 of the paper.

    The batches are shuffled with the seed; the first half is trained on, and the second, of as many batches, is scored on. (The
    paper takes two disjoint 4 % of ImageNet, 1 % of CIFAR-10.) Every candidate starts from the weights that would be
    installed and from the same seed of torch's random numbers, Python's and no others: losses do not depend on the order,
    and on the CPU are the same to the last digit for the same number of torch threads. The original is scored as it is.
    Candidates take turns where threads score them: several processes train several at a time.

    Args:
        batches: read once, and kept; at least two. As many as two short fine-tunings are worth.
        loss: ``loss(outputs, batch)``, a tensor; default the distance of the outputs from the original's, which needs no labels:
            KL divergence of logits (two axes), else squared error over the original's variance.
        inputs: the model's inputs out of a batch, such as ``operator.itemgetter(0)`` for (images, labels); default the batch
            itself. Never guessed.
        score: ``score(model, batches)``, the performance, larger is better; default -loss, averaged over the batches.
        steps: of training; default one pass over the first half.
        lr: learning rate.
        optimizer: called as ``optimizer(parameters, lr=lr)``, such as a class of ``torch.optim``.
        seed: of the draw and of every training.

    Raises:
        UserError: fewer than two batches, or no steps.

    Example:
        >>> import operator
        >>> data = [(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))) for _ in range(4)]
        >>> Finetune(data, lambda out, batch: F.cross_entropy(out, batch[1]), inputs=operator.itemgetter(0), steps=2)
        Finetune(4 batches, 2 steps, lr=0.001)
    """

    name = "finetune"

    def __init__(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        inputs: Callable[[Any], Any] | None = None,
        score: Callable[[nn.Module, Sequence[Any]], float] | None = None,
        steps: int | None = None,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        self.batches = list(batches)
        if len(self.batches) < 2:
            raise UserError(
                f"Finetune was given {len(self.batches)} batches; it needs two at least: it trains on one half of them "
                "and scores on the other"
            )
        for option, value in (("loss", loss), ("inputs", inputs), ("score", score), ("optimizer", optimizer)):
            if value is not None and not callable(value):
                raise UserError(f"{option} of Finetune is a {type(value).__name__}; expected a function")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise UserError(f"steps must be a whole number of at least 1 or None, not {steps!r}")
        self.loss = loss
        self.inputs = inputs
        self.score = score
        self.steps = len(self.batches) // 2 if steps is None else steps
        self.lr = lr
        self.optimizer = optimizer
        self.seed = seed

    def __repr__(self) -> str:
        return f"Finetune({len(self.batches)} batches, {self.steps} steps, lr={self.lr})"

    def prepare(
        self,
        gm: fx.GraphModule,
        candidates: Sequence[Candidate] = (),  # noqa: ARG002 - of the interface
    ) -> Callable[[Candidate], float]:
        """Draw the two subsets and score the original."""
        device = device_of(gm)
        if not any(parameter.requires_grad for parameter in gm.parameters()):
            raise UserError(
                "no parameter of the model requires gradients, so Finetune has nothing to train: call model.requires_grad_()"
            )
        drawn = random.Random(self.seed).sample(self.batches, 2 * (len(self.batches) // 2))  # noqa: S311 - no secret
        moved = [pytree.tree_map_only(Tensor, lambda t: t.to(device), batch) for batch in drawn]
        trained, scored = moved[: len(moved) // 2], moved[len(moved) // 2 :]
        teacher = clone(gm).eval()

        def forward(model: nn.Module, batch: Any) -> Any:
            args, kwargs = self._inputs(batch)
            return model(*args, **kwargs)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            outputs = forward(model, batch)
            if self.loss is not None:
                return self.loss(outputs, batch)
            with torch.no_grad():
                reference = forward(teacher, batch)
            return _distance(outputs, reference)

        def performance(model: nn.Module) -> float:
            if self.score is not None:
                return self.score(model, scored)
            return -sum(float(loss(model, batch)) for batch in scored) / len(scored)

        def train(model: nn.Module) -> None:
            model.train()
            optimizer = self.optimizer([p for p in model.parameters() if p.requires_grad], lr=self.lr)
            with torch.enable_grad():
                for batch in itertools.islice(itertools.cycle(trained), self.steps):
                    optimizer.zero_grad()
                    torch.autograd.backward(loss(model, batch))
                    optimizer.step()

        return self._losses(gm, performance, train)

    def _inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            found = batch if self.inputs is None else self.inputs(batch)
            return split_example(tuple(found) if isinstance(found, list) else found)
        except UserError as error:
            raise UserError(f"a batch of Finetune is no input of the model: {error}") from error


class Score(_Performance):
    """Losses by a function of yours: how much less a network scores with a candidate than without any.

    Args:
        function: ``function(model)``, larger is better, such as an accuracy. The model is a copy with the weights that would be
            installed, in eval mode; gradients are off.
        name: for progress and reports.
        seed: of torch's random numbers and Python's, before every call.

    Example:
        >>> Score(lambda model: -sum(p.numel() for p in model.parameters()), name="size").name
        'size'
    """

    def __init__(self, function: Callable[[nn.Module], float], *, name: str = "score", seed: int = 0) -> None:
        if not callable(function):
            raise UserError(f"Score was given a {type(function).__name__}; expected a function of a model")
        self.function = function
        self.name = name
        self.seed = seed

    def prepare(
        self,
        gm: fx.GraphModule,
        candidates: Sequence[Candidate] = (),  # noqa: ARG002 - of the interface
    ) -> Callable[[Candidate], float]:
        """Score the original."""
        return self._losses(gm, self.function, _as_it_is)


def _as_it_is(model: nn.Module) -> None:
    """Nothing is done to a network before it is scored."""
    del model


def as_estimator(importance: str | Estimator | Callable[[nn.Module], float]) -> str | Estimator:
    """What ``importance=`` may be besides a name or an estimator: a function of a model becomes a :class:`Score`.

    Raises:
        UserError: ``finetune`` by name, or a class in place of its instance.
    """
    if importance in ("finetune", Finetune):
        raise UserError(
            "importance='finetune' needs data to train on: pass importance=fxmerge.performance.Finetune(batches, loss, "
            "inputs=operator.itemgetter(0)), where loss(outputs, batch) is a tensor"
        )
    if callable(importance) and not hasattr(importance, "prepare"):
        return Score(importance)
    return importance  # type: ignore[return-value] # what is left is a name or an estimator, or refused by get_estimator


def installing(estimator: Estimator, calibration: Calibration | None, fit: str, memory: int) -> Estimator:
    """The estimator for networks whose weights are found so, if it is one of this module."""
    return estimator.installing(calibration, fit, memory) if isinstance(estimator, _Performance) else estimator


def _distance(outputs: Any, reference: Any) -> Tensor:
    """How far outputs are from the reference's, averaged over them; gradients flow."""
    pairs = zip(floats(outputs), floats(reference), strict=True)
    return torch.stack([output_distance(a, b) for a, b in pairs]).mean()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed inside, and those of the program untouched."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
