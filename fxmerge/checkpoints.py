"""Checkpoints of a training run: one safetensors file that is replaced in one step. No pickle.

What is no tensor (counters, the options of optimizer and schedule, the history) is JSON in the header of the same file, so
that a killed run never leaves tensors of one step and numbers of another.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import StoreError, UnsupportedError
from .files import write_files

__all__ = ["HISTORY", "STATE", "load_state", "plain", "save_state"]

STATE = "training.safetensors"
"""The checkpoint."""

HISTORY = "history.json"
"""What the run came to so far, for people: it is written and never read."""

_FORMAT = "fxmerge.training/1"


def save_state(folder: Path, state: Any, identity: Mapping[str, Sequence[str]], history: Sequence[Any]) -> None:
    """Write a checkpoint, complete or not at all; the one before is replaced, other files of the folder stay.

    Args:
        folder: made, parents included, where it is missing.
        state: nested dicts, lists and tuples of tensors, numbers, strings and None.
        identity: what a run must have in common to go on from here: lines of text by name.
        history: plain data, also written as ``history.json``.

    Raises:
        UnsupportedError: the state holds something else; the message has its place.
        StoreError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    data = {"identity": identity, "state": plain(state, "state", tensors)}
    stored = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    files = {
        folder / HISTORY: json.dumps(history, indent=1).encode(),
        folder / STATE: save(stored, {"format": _FORMAT, "data": json.dumps(data)}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(files)
    except OSError as error:
        raise StoreError(f"checkpoint folder {folder} cannot be written: {error}") from error


def load_state(folder: Path, identity: Mapping[str, Sequence[str]]) -> Any:
    """The state that :func:`save_state` wrote, tensors on the CPU; None where the folder has no checkpoint.

    Raises:
        StoreError: the file is damaged or foreign, or of a run with another identity: what differs is in the message.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise StoreError(
                    f"{path}: its format is {header.get('format')!r}; this version of fxmerge reads {_FORMAT!r}"
                )
            data = json.loads(header["data"])
            state = _from_plain(data["state"], {name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118 - safetensors' files do not iterate
            found = {name: list(data["identity"][name]) for name in identity}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: damaged or not written by fxmerge ({type(error).__name__}: {error})") from error
    for name, lines in identity.items():
        for before, now in itertools.zip_longest(found[name], lines):
            if before != now:
                raise StoreError(
                    f"{path}: a checkpoint of another run. Its {name}: {before!r}; of this run: {now!r}. Go on with what it "
                    "was made with, or use another folder."
                )
    return state


def plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Nested data as JSON writes it, tensors moved into ``tensors`` under their ``place``.

    Raises:
        UnsupportedError: something else is among it; the message has its place.

    Example:
        >>> tensors = {}
        >>> plain({0: [torch.zeros(2), True]}, "state", tensors), list(tensors)
        ({'dict': [[0, {'list': [{'tensor': 'state/0/0'}, True]}]]}, ['state/0/0'])
    """
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[key, plain(each, f"{place}/{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [plain(each, f"{place}/{index}", tensors) for index, each in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedError(
        f"{place} holds {value!r} of type {type(value).__name__}, which a checkpoint cannot: numbers, strings, tensors, and "
        "lists, tuples and dicts of them it can. Train without checkpoint=, or with another optimizer or schedule."
    )


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        pairs = {key: _from_plain(each, tensors) for key, each in content}
        return Counter(pairs) if kind == "counter" else pairs
    items = [_from_plain(each, tensors) for each in content]
    return tuple(items) if kind == "tuple" else items
