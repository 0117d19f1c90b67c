"""The importance table on disk: what every candidate loses, kept as soon as it is known.

A file holds the losses of one network by one estimator. What they depend on is written beside them
(:func:`identity_of`), and a file made for anything else is refused by the name of what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .candidates import Candidate
from .database import Database
from .errors import StoreError, UserError
from .graph import attribute, structure

if TYPE_CHECKING:
    from .estimators import Estimator

__all__ = ["ImportanceTable", "identity_of", "open_table"]

_WITHOUT_EFFECT = frozenset({"memory"})
"""Public attributes of an estimator that change no loss."""


class ImportanceTable(Database):
    """Losses on disk, by candidate; see :class:`~fxmerge.database.Database`.

    Args:
        path: the file, created when missing.
        identity: what the losses depend on, as :func:`identity_of` returns it; None takes that of the file, which must
            exist then.
        readonly: nothing is created or written, and the file need not be writable.

    Raises:
        StoreError: see :class:`~fxmerge.database.Database`; or the file was made for another network, other data or
            another estimator, which the message names. The methods raise it too.

    Example:
        >>> bypass = Candidate("bypass", "a", "b", bypassed=("b",))
        >>> with ImportanceTable(Path(":memory:"), {"model": "a1"}) as table:
        ...     table.put(bypass, 0.25)
        ...     table.get([bypass]) == {bypass: 0.25}, len(table)
        (True, 1)
    """

    what = "importance table"
    application_id = 0x66786D69  # "fxmi"
    schema = (
        "CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE loss (candidate TEXT PRIMARY KEY, loss REAL NOT NULL) WITHOUT ROWID",
    )
    elsewhere = "name another file as importance_table"

    def __init__(self, path: Path | str, identity: Mapping[str, str] | None = None, *, readonly: bool = False) -> None:
        path = Path(path)
        if identity is None and not path.exists():
            raise StoreError(f"there is no {self.what} at {path}")
        super().__init__(path, readonly=readonly)
        try:
            if identity is not None:
                self._claim(identity, readonly)
        except StoreError:
            self.close()
            raise

    @property
    def identity(self) -> dict[str, str]:
        """What the losses depend on."""
        with self._errors():
            return dict(self._connection.execute("SELECT name, value FROM identity ORDER BY name"))

    def __len__(self) -> int:
        with self._errors():
            count: int = self._connection.execute("SELECT count(*) FROM loss").fetchone()[0]
        return count

    def get(self, candidates: Iterable[Candidate]) -> dict[Candidate, float]:
        """The losses of those candidates that have one."""
        with self._errors():
            known = dict(self._connection.execute("SELECT candidate, loss FROM loss"))
        keys = {candidate: _key(candidate) for candidate in candidates}
        return {candidate: known[key] for candidate, key in keys.items() if key in known}

    def put(self, candidate: Candidate, loss: float) -> None:
        """Store one loss; when this returns it survives a crash. An earlier one is replaced."""
        with self._errors():
            self._connection.execute("INSERT OR REPLACE INTO loss VALUES (?, ?)", (_key(candidate), loss))

    def entries(self) -> Iterator[tuple[Candidate, float]]:
        """Every candidate with its loss, in no order of meaning."""
        with self._errors():
            rows = self._connection.execute("SELECT candidate, loss FROM loss ORDER BY candidate").fetchall()
        for key, loss in rows:
            yield Candidate.from_json(json.loads(key)), loss

    def merge(self, other: Path | str) -> int:
        """Add the losses of another table, made for the same, that this one lacks. The other file is only read.

        Args:
            other: its file.

        Returns:
            How many were added.

        Raises:
            StoreError: the other file is missing, is no table, or was made for something else.
        """
        with ImportanceTable(other, self.identity, readonly=True) as source, source._errors():
            rows = source._connection.execute("SELECT candidate, loss FROM loss").fetchall()
        with self._errors(), self._transaction() as connection:
            before = connection.total_changes
            connection.executemany("INSERT OR IGNORE INTO loss VALUES (?, ?)", rows)
            return connection.total_changes - before

    def _claim(self, identity: Mapping[str, str], readonly: bool) -> None:
        """Write what the table is for into an empty one; refuse one that is for something else."""
        with self._errors():
            if not readonly:
                with self._transaction() as connection:
                    if connection.execute("SELECT count(*) FROM identity").fetchone() == (0,):
                        connection.executemany("INSERT INTO identity VALUES (?, ?)", identity.items())
            found = self.identity
        differences = [
            f"{name} ({found.get(name, 'none')} in the file, {identity.get(name, 'none')} now)"
            for name in sorted(found.keys() | identity.keys())
            if found.get(name) != identity.get(name)
        ]
        if differences:
            raise StoreError(
                f"the importance table {self.path} was made for something else; what differs: {', '.join(differences)}. "
                f"It was left untouched: {self.elsewhere}, or remove it."
            )


def _key(candidate: Candidate) -> str:
    return json.dumps(candidate.to_json(), sort_keys=True, separators=(",", ":"))


def open_table(path: str | os.PathLike[str], gm: fx.GraphModule, estimator: Estimator) -> ImportanceTable:
    """The table at ``path`` for this network and estimator, made where there is none.

    Raises:
        StoreError: the file cannot be used, or was made for something else.
        UserError: see :func:`identity_of`.
    """
    return ImportanceTable(os.fspath(path), identity_of(gm, estimator))


# --- what losses depend on --------------------------------------------------------------------------------------------


def identity_of(gm: fx.GraphModule, estimator: Estimator) -> dict[str, str]:
    """What the losses of a network depend on: the model, its weights, and the estimator with its public attributes.

    Numbers and names are written out, all else as the first digits of a SHA-256. Of functions the name and the compiled
    code count. The methods of an estimator of your own are not looked at: give it another ``name`` when they change.

    Raises:
        UserError: an attribute of the estimator cannot be identified, such as a lock or an open file.

    Example:
        >>> import fxmerge
        >>> from fxmerge.estimators import Magnitude
        >>> gm = fxmerge.capture(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8))
        >>> sorted(identity_of(gm, Magnitude()))
        ['estimator', 'model', 'weights']
    """
    kind = type(estimator)
    identity = {
        "model": _digest(structure(gm)),
        "weights": _digest(_tensors(gm)),
        "estimator": f"{kind.__module__}.{kind.__qualname__} {estimator.name!r}",
    }
    for name, value in _attributes(estimator).items():
        if name.startswith("_") or name in _WITHOUT_EFFECT or name == "name":
            continue
        try:
            identity[f"estimator.{name}"] = _written(value)
        except TypeError as error:
            raise UserError(
                f"the attribute {name!r} of the estimator {estimator.name!r} has no content to know it by ({error}): let its name "
                "begin with an underscore if it changes no loss, or leave importance_table out"
            ) from error
    return identity


def _attributes(thing: object) -> dict[str, Any]:
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return dict(vars(thing)) if hasattr(thing, "__dict__") else {}


def _written(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return _digest(value)


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    read = {str(node.target): attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    held = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {**{name: value for name, value in read.items() if isinstance(value, Tensor)}, **dict(held)}


def _digest(value: object) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(value, ()):
        digest.update(len(piece).to_bytes(8, "big"))
        digest.update(piece)
    return digest.hexdigest()[:12]


def _pieces(value: object, above: tuple[int, ...]) -> Iterator[bytes]:
    """A value as bytes that are the same in every process; ``above`` are the ids of what it lies in.

    Raises:
        TypeError: something that cannot be pickled, and so has no content to go by.
    """
    if id(value) in above:
        yield b"above"
        return
    above = (*above, id(value))
    yield type(value).__qualname__.encode()
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        yield repr(value).encode()
    elif isinstance(value, (bytes, bytearray)):
        yield bytes(value)
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, content in value.items():
            yield from _pieces(key, above)
            yield from _pieces(content, above)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(_digest(content).encode() for content in value)
    elif isinstance(value, (list, tuple)):
        for content in value:
            yield from _pieces(content, above)
    elif isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        yield from _pieces([value.__code__, value.__defaults__, value.__kwdefaults__, cells], above)
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _pieces([value.co_names, value.co_consts], above)
    elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        yield f"{getattr(value, '__module__', '')}.{value.__name__}".encode()
    else:
        yield from _pieces(_reduced(value), above)


def _reduced(value: Any) -> object:
    """What pickle would make the value of, less how it would call itself."""
    found = value.__reduce_ex__(4)
    if isinstance(found, str):
        return found
    maker, arguments, *rest = found
    return [maker, arguments, *(list(part) if isinstance(part, Iterator) else part for part in rest)]
