"""What a compression hands back: a model that trains, merges, saves and exports."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calibration import Batch
from .checks import check_equal, distinct_inputs
from .errors import StoreError
from .graph import clone, device_of
from .plan import Plan
from .report import Report

__all__ = ["Result", "load", "merge_graph"]


class Result:
    """A compressed network.

    Attributes:
        model: GraphModule that trains; an ordinary module for anyone's own loop.
        plan: what was done to the original.
        report: what was asked, measured and decided.
        example: inputs that the model takes, ``(args, kwargs)``.
    """

    def __init__(self, model: fx.GraphModule, plan: Plan, report: Report, example: Batch) -> None:
        self.model = model
        self.plan = plan
        self.report = report
        self.example = example

    def merge(self) -> fx.GraphModule:
        """The deployable network: eval mode, every merged segment one convolution with the current weights.

        A new module every time; ``model`` stays trainable. Checked: every segment in float64, the whole network against
        ``model`` on random inputs.

        Raises:
            UserError: a merged segment of ``model`` was edited.
            InternalError: a check failed.
        """
        merged = merge_graph(self.model)
        inputs = distinct_inputs(self.model, self.example)
        check_equal(self.model, merged, inputs, self.report.original_error)
        return merged

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the result into a folder: graph and plan and report as JSON, weights as safetensors.

        Raises:
            StoreError: the folder cannot be written, or holds something that is not fxmerge's.
        """
        from .serialize import save_graph

        documents = {
            "plan": {"plan": self.plan.to_json()},
            "report": self.report.to_json(),
            "example": {"args": _describe(self.example[0]), "kwargs": _describe(self.example[1])},
        }
        save_graph(self.model, Path(folder), extra=documents)

    def __repr__(self) -> str:
        return f"Result({self.plan!r}, {self.report!r})"


def merge_graph(model: fx.GraphModule) -> fx.GraphModule:
    """A folded copy in eval mode; the tags of relaxed segments become convolutions, and what is exact to fold is folded.

    A randomised ReLU becomes the leaky one that it is in eval mode: ONNX has no other.
    """
    from .passes.fold import FoldPass

    merged: fx.GraphModule = FoldPass()(clone(model).eval()).graph_module
    for path, module in list(merged.named_modules()):
        if isinstance(module, nn.RReLU):
            merged.set_submodule(path, nn.LeakyReLU((module.lower + module.upper) / 2).eval())
    return merged


def load(folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Result:
    """Read what :meth:`Result.save` wrote: a result that trains and merges, without the user's model code and without pickle.

    Args:
        folder: the folder.
        device: where the model goes; by default where it was.

    Raises:
        StoreError: the folder is missing, damaged, foreign or of another version; it is left untouched.
    """
    from .serialize import load_documents, load_graph

    documents = load_documents(Path(folder))
    missing = [name for name in ("plan", "report", "example") if name not in documents]
    if missing:
        raise StoreError(f"{folder}: no saved result of fxmerge's: {missing[0]}.json is missing")
    model = load_graph(Path(folder), device=device)
    where = device_of(model)
    example = (
        tuple(_rebuild(documents["example"]["args"], where)),
        dict(_rebuild(documents["example"]["kwargs"], where)),
    )
    return Result(model, Plan.from_json(documents["plan"]["plan"]), Report.from_json(documents["report"]), example)


def _describe(value: Any) -> Any:
    """Example inputs as JSON: shapes, dtypes and ranges stand for tensors, so that nothing of the user's data is written."""
    if isinstance(value, Tensor):
        numbers = value.detach().double()
        some = numbers.numel() > 0
        return {
            "tensor": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "low": float(numbers.min()) if some else 0.0,
            "high": float(numbers.max()) if some else 0.0,
            "mean": float(numbers.mean()) if some else 0.0,
            "std": float(numbers.std(correction=0)) if some else 0.0,
        }
    if isinstance(value, (list, tuple)):
        return {"sequence": [_describe(each) for each in value], "tuple": isinstance(value, tuple)}
    if isinstance(value, dict):
        return {"mapping": {key: _describe(each) for key, each in value.items()}}
    return {"constant": value}


def _rebuild(data: Any, device: torch.device) -> Any:
    if "tensor" in data:
        dtype = getattr(torch, data["dtype"])
        generator = torch.Generator().manual_seed(0)
        if dtype.is_floating_point:
            value = torch.randn(data["tensor"], generator=generator, dtype=torch.float64) * data["std"] + data["mean"]
        else:
            low, high = math.floor(data["low"]), math.floor(data["high"])
            value = torch.randint(low, high + 1, data["tensor"], generator=generator)
        return value.to(device, dtype)
    if "sequence" in data:
        items = [_rebuild(each, device) for each in data["sequence"]]
        return tuple(items) if data["tuple"] else items
    if "mapping" in data:
        return {key: _rebuild(each, device) for key, each in data["mapping"].items()}
    return data["constant"]
