"""Fine-tuning of a compressed network: any loss, distillation from the original, checkpoints, accelerate.

Optional: ``result.model`` is an ordinary module, and a loop of one's own does as well.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, ReduceLROnPlateau
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from .calibration import Batch, eval_mode, refuse_no_batches, take_inputs
from .capture import capture
from .distances import output_distance, relative_error
from .errors import UserError
from .evaluate import recording
from .graph import META, by_id, device_of, graph_meta, is_tensor, shape_of, structure
from .inputs import floats, map_tensors, tensors
from .progress import Bar, progress
from .result import Result

__all__ = ["Epoch", "finetune"]

_log = logging.getLogger("fxmerge")

_LR = 0.005
_WEIGHT_DECAY = 1e-4
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")

_Teacher: TypeAlias = Callable[[Batch], tuple[list[Tensor], list[Tensor]]]
"""A batch to the floating-point outputs of the teacher and its values at the exits of merged segments."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an epoch of fine-tuning came to; with several processes, in the main one.

    Attributes:
        number: which, from 1.
        loss: what was minimised, the mean over its steps.
        parts: the same of each summand, before it is weighted: ``loss`` (the user's), ``distillation``, ``features``.
        lr: learning rate of the first parameter group at its end.
    """

    number: int
    loss: float
    parts: Mapping[str, float]
    lr: float

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in self.parts.items())
        return f"epoch {self.number}: loss {self.loss:.4g} ({parts}), learning rate {self.lr:.3g}"


def finetune(
    result: Result,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    teacher: nn.Module | None = None,
    inputs: Callable[[Any], Any] | None = None,
    epochs: int = 1,
    lr: float | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    distill: float = 1.0,
    temperature: float = 2.0,
    features: float = 0.0,
    batch_norm: str = "train",
    max_norm: float | None = None,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int | None = None,
    on_epoch: Callable[[Epoch], object] | None = None,
    accelerator: Any = None,
) -> Result:
    """Train ``result.model`` in place, by labels, by distillation from the original, or by both.

    Minimised is ``loss + distill * distillation + features * features``, as far as there are a loss and a teacher:

    - *distillation* compares outputs. Two-dimensional ones are taken for logits: the Kullback-Leibler divergence
      KL(softmax(teacher / T) || softmax(model / T)) * T^2, the mean over the batch (Hinton et al. 2015, arXiv 1503.02531, section
      2). Others: squared error over the teacher's variance around its mean over the batch.
    - *features* compares values at the exits of merged segments in the same way as other outputs, the mean over segments.
      Left out are segments with a norm, an activation or a side input put behind them.

    Both are computed in float32 at least. The teacher sees the same inputs, in eval mode and without gradients; it is left as it
    was. Trained are the parameters with ``requires_grad``. Nothing else of the model changes but the running statistics of batch
    norms: with ``batch_norm="train"`` they use each batch's statistics and move their own, as in any training;
    with ``"frozen"`` they use and keep their own, while their weights still train. Everything else (dropout) is
    in train mode. Afterwards every module is in the mode it had, on the device it was on; gradients are cleared.

    A checkpoint holds the model, optimizer, schedule, history and torch's random numbers, the ``generator`` of a ``DataLoader``
    included. Called again with the same arguments and folder, a killed run goes on after its last checkpoint, and a
    finished one takes its weights from there and trains no more; batches of an epoch that were seen already are read and
    skipped. Random numbers of numpy, of Python, or with several processes, are not kept.

    Args:
        result: what :func:`fxmerge.compress` returned.
        batches: iterated over once an epoch. Tensors in lists, tuples and dicts are moved to the device.
        loss: of the model's outputs and the batch as ``batches`` gave it, a tensor with one number.
        teacher: the original model. On another device a copy is used.
        inputs: how to take the model's inputs out of a batch, for example ``lambda batch: batch[0]``. Without it a batch is a
            tensor, a tuple of positional inputs or a dict of keyword inputs.
        epochs: how many.
        lr: learning rate of the default optimizer, by default 0.005: refitted networks break at larger ones.
        optimizer: makes one of the list of parameters. Default: SGD with Nesterov momentum 0.9, and weight decay 1e-4 on
            what has two axes or more (no norms, no biases).
        schedule: makes a learning-rate schedule of the optimizer; it is stepped after every step, not every epoch. Default: a
            cosine to zero (Loshchilov and Hutter 2017, without restarts) where ``len(batches)`` is known, else constant.
        distill: weight of the distillation.
        temperature: T.
        features: weight of the features; the teacher is captured for them.
        batch_norm: ``"train"`` or ``"frozen"``.
        max_norm: gradients are scaled down to this norm, all together.
        seed: of torch's random numbers, which are put back afterwards. Default: they go on from where they are.
        checkpoint: folder; a checkpoint is written at the start and after every epoch.
        checkpoint_steps: also after every so many steps of an epoch.
        on_epoch: called after every epoch, for example ``history.append``, or to validate ``result.model``.
        accelerator: an ``accelerate.Accelerator`` (``pip install fxmerge[accelerate]``) for its device, mixed precision,
            gradient accumulation and several processes, each with the whole model. Batches are split between processes
            if they are a ``DataLoader``.

    Returns:
        The result, for chaining.

    Raises:
        UserError: an argument is wrong, found before anything is trained where that is possible; or the loss is no finite
            number: then the model is put back to where the epoch began.
        StoreError: the checkpoint is damaged, or of a run with another network, optimizer, schedule or other options.
        UnsupportedError: the state of the optimizer or schedule cannot be written without pickle.
        CaptureError: the teacher cannot be captured for its features.

    Example:
        >>> import torch, fxmerge
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(*[torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU()] * 3)
        >>> images = torch.randn(8, 4, 8, 8)
        >>> result = fxmerge.compress(net, images[:1], 0.9, runtime="macs")
        >>> history = []
        >>> _ = fxmerge.finetune(result, images.split(4), teacher=net, epochs=3, on_epoch=history.append)
        >>> history[-1].loss < history[0].loss
        True
    """
    _refuse_wrong_numbers(
        epochs=epochs,
        lr=lr,
        distill=distill,
        temperature=temperature,
        features=features,
        max_norm=max_norm,
        checkpoint_steps=checkpoint_steps,
    )
    if batch_norm not in ("train", "frozen"):
        raise UserError(f"batch_norm is {batch_norm!r}; expected 'train' or 'frozen'")
    if checkpoint_steps is not None and checkpoint is None:
        raise UserError("checkpoint_steps says how often checkpoints are written: pass checkpoint=, the folder, too")
    if not isinstance(result, Result) or not isinstance(result.model, fx.GraphModule):
        raise UserError(
            f"cannot fine-tune a {type(result).__name__}: expected what fxmerge.compress or fxmerge.load returned, its model "
            "as it was. Any other module trains in a loop of your own."
        )
    _refuse_useless_teacher(result, loss, teacher, distill, features)
    _refuse_wrong_batches(batches, epochs, accelerator)
    model, helper = result.model, _Alone(device_of(result.model)) if accelerator is None else accelerator
    exits = _exits(result) if features else {}
    with ExitStack() as stack:
        stack.enter_context(_kept_modes_and_device(model))
        model.to(helper.device)
        if seed is not None:
            stack.enter_context(_seeded(seed, helper.device))
        teach: _Teacher | None = None
        if teacher is not None:
            teach = stack.enter_context(_teaching(teacher, exits, result.example, helper.device))
        objective = _Objective(model, loss, teach, distill, features, temperature)
        network = recording(model, list(exits.values()))
        made = _make_optimizer(model, optimizer, lr)
        described = [*repr(made).splitlines(), f"{[len(group['params']) for group in made.param_groups]} parameters"]
        steps = _optimizer_steps(batches, epochs, helper)
        scheduled = _make_schedule(made, schedule, steps)
        training = _Training(result, network, made, scheduled, batches, objective, helper, inputs, batch_norm, max_norm)
        if checkpoint is not None:
            options = {
                "epochs": epochs,
                "distill": distill,
                "temperature": temperature,
                "features": features,
                "batch_norm": batch_norm,
                "max_norm": max_norm,
                "seed": seed,
                "loss": loss is not None,
                "teacher": teacher is not None,
            }
            training.resume(Path(checkpoint), checkpoint_steps, described, options)
        training.run(epochs, on_epoch)
    return result


# --- arguments -----------------------------------------------------------------------------------


def _refuse_wrong_numbers(**given: float | None) -> None:
    whole = ("epochs", "checkpoint_steps")
    from_zero = ("distill", "features")
    for name, value in given.items():
        if value is None:
            continue
        fits = (
            isinstance(value, Integral if name in whole else Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
        )
        if not fits or value < 0 or (value == 0 and name not in from_zero):
            kind = "a whole number of at least 1" if name in whole else "a number above 0"
            raise UserError(f"{name} is {value!r}; expected {'0 or ' if name in from_zero else ''}{kind}")


def _refuse_useless_teacher(
    result: Result, loss: object, teacher: nn.Module | None, distill: float, features: float
) -> None:
    if loss is not None and not callable(loss):
        raise UserError(
            f"loss is a {type(loss).__name__}; expected a function of the model's outputs and the batch, for example "
            "lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1])"
        )
    if teacher is None:
        if loss is None:
            raise UserError(
                "nothing to train for: pass loss=, a function of outputs and batch, or teacher=, the original model, for "
                "distillation without labels, or both."
            )
        if features:
            raise UserError(f"features={features} compares with the original: pass it as teacher=...")
        return
    if not isinstance(teacher, nn.Module):
        raise UserError(f"teacher is a {type(teacher).__name__}; expected the original model, a torch.nn.Module")
    if teacher is result.model:
        raise UserError("teacher is result.model itself; pass the original model")
    if not distill and not features:
        raise UserError("the teacher has no part in the loss with distill=0 and features=0: raise one, or leave it out")


def _refuse_wrong_batches(batches: Iterable[Any], epochs: int, accelerator: Any) -> None:
    refuse_no_batches(batches, "batches")
    if isinstance(batches, Iterator) and epochs > 1:
        raise UserError(
            f"batches is a {type(batches).__name__}, which can be iterated over once, and epochs is {epochs}. Pass a list, a "
            "DataLoader, or another object that starts anew."
        )
    if accelerator is None:
        return
    missing = [name for name in vars(_Alone) if not name.startswith("_") and not hasattr(accelerator, name)]
    if missing:
        raise UserError(
            f"accelerator is a {type(accelerator).__name__} without {missing[0]}; expected an accelerate.Accelerator()"
        )
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", "NO")
    if kind in _SHARDED:
        raise UserError(f"accelerator splits models ({kind}); finetune needs the whole model in every process")
    if accelerator.num_processes > 1 and not isinstance(batches, DataLoader):
        raise UserError(
            f"{accelerator.num_processes} processes would all train on the same batches: pass a torch DataLoader, which "
            "accelerate splits between them."
        )


def _make_optimizer(
    model: nn.Module, optimizer: Callable[[list[nn.Parameter]], Optimizer] | None, lr: float | None
) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(
            "no parameter of result.model requires gradients: result.model.requires_grad_() lets them train"
        )
    if optimizer is None:
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        rate = _LR if lr is None else lr
        return SGD([group for group in groups if group["params"]], lr=rate, momentum=0.9, nesterov=True)
    if lr is not None:
        raise UserError(f"lr={lr} is for the default optimizer: give your own its learning rate, and leave lr out")
    made = optimizer(parameters) if callable(optimizer) else optimizer
    if not callable(optimizer) or not isinstance(made, Optimizer):
        raise UserError(
            f"optimizer gave a {type(made).__name__}; expected a function of a list of parameters that makes one, for "
            "example lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"
        )
    known = {id(parameter) for parameter in parameters}
    if not all(id(parameter) in known for group in made.param_groups for parameter in group["params"]):
        raise UserError("optimizer holds parameters that it was not given: make it of its argument")
    return made


def _make_schedule(
    optimizer: Optimizer, schedule: Callable[[Optimizer], LRScheduler] | None, steps: int | None
) -> LRScheduler:
    if schedule is None:
        return (
            ConstantLR(optimizer, factor=1.0, total_iters=0) if steps is None else CosineAnnealingLR(optimizer, steps)
        )
    made = schedule(optimizer) if callable(schedule) else schedule
    if not callable(schedule) or not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        raise UserError(
            f"schedule gave a {type(made).__name__}; expected a function of the optimizer that makes a schedule for every "
            "step, for example lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=100)"
        )
    return made


def _optimizer_steps(batches: Iterable[Any], epochs: int, helper: Any) -> int | None:
    length = _length(batches)
    return None if length is None else max(1, epochs * math.ceil(length / helper.gradient_accumulation_steps))


# --- the objective -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Objective:
    """What is minimised."""

    model: fx.GraphModule
    loss: Callable[[Any, Any], Tensor] | None
    teach: _Teacher | None
    distill: float
    features: float
    temperature: float

    def __call__(
        self, found: Any, values: Sequence[Tensor], item: Any, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum and its parts, from what the network returned for a batch."""
        weights = {"loss": 1.0, "distillation": self.distill, "features": self.features}
        parts: dict[str, Tensor] = {}
        if self.loss is not None:
            parts["loss"] = _scalar(self.loss(self.model.graph.process_outputs(found), item))
        if self.teach is not None:
            outputs, targets = self.teach(batch)
            if self.distill:
                parts["distillation"] = _distillation(floats(found), outputs, self.temperature)
            if self.features:
                pairs = zip(values, targets, strict=True)
                parts["features"] = torch.stack([relative_error(_wide(a), _wide(b)) for a, b in pairs]).mean()
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        if not total.requires_grad:
            raise UserError(
                "the loss has no gradients: compute it from the outputs, without detach() or torch.no_grad()"
            )
        return total, parts


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise UserError(f"loss gave a {type(value).__name__} {what}; expected a tensor with one number")
    return value.reshape(())


def _distillation(found: Sequence[Tensor], reference: Sequence[Tensor], temperature: float) -> Tensor:
    shapes = [[list(tensor.shape) for tensor in side] for side in (found, reference)]
    if shapes[0] != shapes[1] or not found:
        raise UserError(f"the network gives outputs of shape {shapes[0]}, the teacher {shapes[1]}; they must agree")
    pairs = zip(found, reference, strict=True)
    return torch.stack([output_distance(_wide(a), _wide(b), temperature) for a, b in pairs]).mean()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _exits(result: Result) -> dict[str, fx.Node]:
    """Where merged segments end: the value's id in the original, and its node in ``result.model``.

    A segment that still is a chain has a tag; one that was fitted is a convolution, whose data say what it was made of, and
    what stands behind it under the same exit belongs to it.
    """
    nodes = by_id(result.model)
    ends: dict[frozenset[str], fx.Node] = {}
    for segment in graph_meta(result.model).get("segments", ()):
        if segment["exit"] in nodes:
            ends[frozenset(segment["candidate"]["kept"])] = nodes[segment["exit"]]
    last = {data["exit"]: node for node in result.model.graph.nodes if "exit" in (data := node.meta.get(META, {}))}
    for data in (node.meta.get(META, {}) for node in result.model.graph.nodes):
        if "made_of" in data and not data.get("sides"):
            ends[frozenset(data["made_of"])] = last[data["exit"]]
    found = {
        each.exit: ends[frozenset(each.kept)]
        for each in result.plan.candidates
        if each.kind == "merge" and frozenset(each.kept) in ends and each.norm is None and each.activation is None
    }
    if not found:
        raise UserError("features: no merged segment of this network has an exit to compare at; leave features out")
    return found


@contextmanager
def _teaching(
    teacher: nn.Module, exits: Mapping[str, fx.Node], example: Batch, device: torch.device
) -> Iterator[_Teacher]:
    """The teacher as a function; on another device a copy of it."""
    if device_of(teacher) != device:
        teacher = copy.deepcopy(teacher).to(device)
    network = _recorded(teacher, exits, example) if exits else teacher

    def teach(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            found = network(*batch[0], **batch[1])
        outputs, values = found if exits else (found, [])
        return floats(outputs), values

    with eval_mode(network):
        yield teach


def _recorded(teacher: nn.Module, exits: Mapping[str, fx.Node], example: Batch) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a capture warns of is of training mode
        graph = capture(teacher, example[0] or example[1])
    nodes = by_id(graph)
    for name, node in exits.items():
        twin = nodes.get(name)
        if twin is None or not is_tensor(twin) or shape_of(twin)[1:] != shape_of(node)[1:]:
            raise UserError(
                f"features: the teacher has no value {name!r} of shape {list(shape_of(node))[1:]}, where a merged segment of "
                "result.model ends. Pass the network that was compressed as teacher, or leave features out."
            )
    return recording(graph, [nodes[name] for name in exits])


# --- the loop ------------------------------------------------------------------------------------


class _Alone:
    """What finetune uses of an ``accelerate.Accelerator``, on one device and without mixed precision."""

    num_processes = 1
    gradient_accumulation_steps = 1
    is_main_process = True
    sync_gradients = True
    scaler = None
    device = torch.device("cpu")

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def accumulate(self, _: object) -> AbstractContextManager[None]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def clip_grad_norm_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)


class _DivergedError(Exception):
    """A loss or weight is not finite."""


@dataclass(frozen=True, slots=True)
class _Store:
    """Where checkpoints go, after how many steps, and what a run must have in common with one to go on from it."""

    folder: Path
    every: int | None
    identity: Mapping[str, Sequence[str]]


@dataclass(eq=False)
class _Training:
    """One run: what takes part in it, and how far it has come.

    ``random`` holds torch's random numbers as they were when the current epoch began, so that its batches can be drawn again.
    """

    result: Result
    network: nn.Module
    optimizer: Any
    schedule: Any
    batches: Iterable[Any]
    objective: _Objective
    helper: Any
    inputs: Callable[[Any], Any] | None
    batch_norm: str
    max_norm: float | None
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[Epoch] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)
    random_at_step: dict[str, Tensor] | None = None
    store: _Store | None = None

    def run(self, epochs: int, on_epoch: Callable[[Epoch], object] | None) -> None:
        """Train what is left of so many epochs."""
        things = self.network, self.optimizer, self.schedule, self.batches
        self.network, self.optimizer, self.schedule, self.batches = self.helper.prepare(*things)
        self.result.model.zero_grad()
        self.random = self.random or self._random_now()
        length = _length(self.batches)
        with progress("Fine-tuning", None if length is None else length * epochs) as bar:
            bar.advance(self.epoch * (length or 0))
            while self.epoch < epochs:
                self._run_epoch(bar, f"epoch {self.epoch + 1} of {epochs}")
                self._end_epoch()
                if on_epoch is not None:
                    on_epoch(self.history[-1])
                    self._set_random(self.random)  # validation draws some, and a resumed run does not repeat it

    def _run_epoch(self, bar: Bar, name: str) -> None:
        model = self.result.model
        before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
        try:
            self._run_steps(bar, name)
        except Exception as error:
            diverged = isinstance(error, _DivergedError)
            if diverged or not self.step:  # the first forward pass has moved statistics
                with torch.no_grad():
                    for tensor, value in before:
                        tensor.copy_(value)
            if not diverged:
                raise
            raise UserError(
                f"{error}: training diverged. result.model is back where the epoch began. Use a smaller lr, or max_norm=1.0 to "
                "limit gradients."
            ) from None

    def _run_steps(self, bar: Bar, name: str) -> None:
        _set_modes(self.result.model, self.batch_norm)
        for thing in (self.batches, getattr(self.batches, "sampler", None)):
            set_epoch = getattr(thing, "set_epoch", None)  # a sampler of several processes shuffles by it
            if set_epoch is not None:
                set_epoch(self.epoch)
        for number, item in enumerate(self.batches):
            if number >= self.step:
                loss = self._run_step(item, f"step {number + 1} of {name}")
                self.step += 1
                if self.store is not None and self.store.every and self.step % self.store.every == 0:
                    self.random_at_step = self._random_now()
                    self._save()
                bar.advance(1, f"{name}, loss {loss:.4g}")
            elif number == self.step - 1 and self.random_at_step is not None:
                self._set_random(self.random_at_step)  # the killed run went on from here
                bar.advance(self.step)
        if not self.step:
            raise UserError(f"batches yielded nothing in {name}; pass an iterable that is not empty and starts anew")
        if not all(bool(parameter.isfinite().all()) for parameter in self.result.model.parameters()):
            raise _DivergedError(f"weights are not finite after {name}")

    def _run_step(self, item: Any, name: str) -> float:
        device, expected = self.helper.device, tensors(*self.result.example)
        item = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), item)
        batch = map_tensors(lambda t: t.to(device), *take_inputs(item, self.inputs, expected, f"the batch of {name}"))
        with self.helper.accumulate(self.network):
            found, values = self._forward(batch, name)
            with self.helper.autocast():
                total, parts = self.objective(found, values, item, batch)
            numbers = {"total": float(total.detach()), **{part: float(value.detach()) for part, value in parts.items()}}
            if not math.isfinite(numbers["total"]):
                listed = ", ".join(f"{part} {value:.4g}" for part, value in list(numbers.items())[1:])
                rate = self.schedule.get_last_lr()[0]
                raise _DivergedError(
                    f"the loss is {numbers['total']} in {name} ({listed}), at a learning rate of {rate:.3g}"
                )
            self.helper.backward(total)
            if self.max_norm is not None and self.helper.sync_gradients:
                parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
                self.helper.clip_grad_norm_(parameters, self.max_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.sums = {part: self.sums.get(part, 0.0) + value for part, value in numbers.items()}
        return numbers["total"]

    def _forward(self, batch: Batch, name: str) -> tuple[Any, Sequence[Tensor]]:
        try:
            found, values = self.network(*batch[0], **batch[1])
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"the one image of {name} leaves a batch norm no variance: leave such a batch out (drop_last=True of a "
                "DataLoader), or pass batch_norm='frozen'."
            ) from error
        return found, values

    def _end_epoch(self) -> None:
        means = {part: value / self.step for part, value in self.sums.items()}
        self.epoch += 1
        self.history.append(Epoch(self.epoch, means.pop("total"), means, float(self.schedule.get_last_lr()[0])))
        self.step, self.sums, self.random, self.random_at_step = 0, {}, self._random_now(), None
        _log.info("Fine-tuning: %s", self.history[-1])
        self._save()

    # --- checkpoints ---------------------------------------------------------------------------------

    def resume(self, folder: Path, every: int | None, optimizer: list[str], options: Mapping[str, object]) -> None:
        """Go on from the checkpoint in ``folder``, or write the first one there."""
        from .checkpoints import load_state

        self.store = _Store(folder, every, self._identity(optimizer, options))
        state = load_state(folder, self.store.identity)
        if state is None:
            self.random = self._random_now()
            self._save()
            return
        with torch.no_grad():
            for name, tensor in self._stored_tensors().items():
                tensor.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.helper.scaler is not None:
            self.helper.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
        self.history = [Epoch(**each) for each in state["history"]]
        self.random, self.random_at_step = state["random"], state["random_at_step"]
        self._set_random(self.random)
        _log.info("Fine-tuning goes on from %s: after epoch %d, step %d of the next", folder, self.epoch, self.step)

    def _identity(self, optimizer: list[str], options: Mapping[str, object]) -> dict[str, list[str]]:
        from .checkpoints import plain

        shapes = [f"{name} {t.dtype} {list(t.shape)}" for name, t in self._stored_tensors().items()]
        start = {key: plain(value, "schedule", {}) for key, value in self.schedule.state_dict().items()}
        return {
            "network": [*structure(self.result.model), *shapes],
            "options": [f"{name}={value!r}" for name, value in options.items()],
            "optimizer": optimizer,
            "schedule": [type(self.schedule).__name__, *(f"{key}: {value}" for key, value in start.items())],
        }

    def _save(self) -> None:
        if self.store is None or not self.helper.is_main_process:
            return
        from .checkpoints import save_state

        history = [asdict(each) for each in self.history]
        state = {
            "model": self._stored_tensors(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.helper.scaler is None else self.helper.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": history,
            "random": self.random,
            "random_at_step": self.random_at_step,
        }
        save_state(self.store.folder, state, self.store.identity, history)

    def _stored_tensors(self) -> dict[str, Tensor]:
        from .serialize import state_tensors

        return state_tensors(self.result.model)[0]

    # --- random numbers ------------------------------------------------------------------------------

    def _random_now(self) -> dict[str, Tensor]:
        if self.helper.num_processes > 1:  # each has its own, and a checkpoint holds one
            return {}
        states = {"torch": torch.get_rng_state()}
        if self.helper.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.helper.device)
        generator = getattr(self.batches, "generator", None)
        if isinstance(generator, torch.Generator):
            states["loader"] = generator.get_state()
        return states

    def _set_random(self, states: Mapping[str, Tensor]) -> None:
        generator = getattr(self.batches, "generator", None)
        if "torch" in states:
            torch.set_rng_state(states["torch"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.helper.device)
        if "loader" in states and isinstance(generator, torch.Generator):
            generator.set_state(states["loader"])


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of an iterable data set has a length in name only
        return None


def _set_modes(model: nn.Module, batch_norm: str) -> None:
    model.train()
    for module in model.modules():
        if batch_norm == "frozen" and isinstance(module, _BatchNorm):
            module.eval()


@contextmanager
def _kept_modes_and_device(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    home = device_of(model)
    try:
        yield
    finally:
        model.zero_grad()
        model.to(home)
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
