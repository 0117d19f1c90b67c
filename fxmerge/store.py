"""Latencies that were measured once and need not be measured again: a small SQLite file."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import StoreError, UserError
from .runtimes import LayerSignature, Runtime

__all__ = ["Entry", "LatencyStore", "default_path", "measured"]

_APPLICATION_ID = 0x66786D67  # "fxmg": marks the file as ours, in bytes 68 to 71 of SQLite's header
_VERSION = 1
_SCHEMA = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
    """
    CREATE TABLE latency (
        environment TEXT NOT NULL,
        signature TEXT NOT NULL,
        latency REAL NOT NULL,
        unit TEXT NOT NULL,
        measured_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
        PRIMARY KEY (environment, signature)
    ) WITHOUT ROWID
    """,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored latency; ``measured_at`` is the time in UTC."""

    environment: dict[str, str]
    signature: LayerSignature
    latency: float
    unit: str
    measured_at: str


class LatencyStore:
    """Latencies on disk, by what they depend on and by layer.

    Any number of processes may use one file at the same time, and a process that is killed loses at most
    the entry it was writing. A store is used by the thread that opened it, and is a context manager.

    Args:
        path: the file, created when missing; None is :func:`default_path`.

    Raises:
        StoreError: the file is corrupt, is not a store, was written by a newer fxmerge, or cannot be
            written. It is left as it was. The methods raise it too.

    Example:
        >>> from fxmerge.algebra import Geometry
        >>> with LatencyStore(Path(":memory:")) as store:
        ...     len(list(store.entries()))
        0
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # before SQLite sees the file: opening a foreign one may already change it (a write-ahead log)
            self._refuse_foreign()
            # autocommit: every statement is a transaction of its own
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            with self._errors():
                self._prepare()
        except StoreError:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"LatencyStore({str(self.path)!r})"

    def get(self, environment: Mapping[str, str], signatures: Iterable[LayerSignature]) -> dict[LayerSignature, float]:
        """The latencies that are known for these layers in exactly this environment."""
        with self._errors():
            known = dict(
                self._connection.execute(
                    "SELECT signature, latency FROM latency WHERE environment = ?",
                    (_canonical(environment),),
                )
            )
        keys = {signature: signature.key() for signature in signatures}
        return {signature: known[key] for signature, key in keys.items() if key in known}

    def put(self, environment: Mapping[str, str], signature: LayerSignature, latency: float, unit: str) -> None:
        """Store one latency; when this returns it survives a crash. An earlier one is replaced."""
        with self._errors():
            self._connection.execute(
                "INSERT OR REPLACE INTO latency (environment, signature, latency, unit) VALUES (?, ?, ?, ?)",
                (_canonical(environment), signature.key(), latency, unit),
            )

    def entries(self) -> Iterator[Entry]:
        """Everything in the store, by environment, then layer."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT environment, signature, latency, unit, measured_at FROM latency ORDER BY 1, 2"
            ).fetchall()
        for environment, signature, latency, unit, measured_at in rows:
            key = LayerSignature.from_key(signature)
            yield Entry(json.loads(environment), key, latency, unit, measured_at)

    def close(self) -> None:
        """Close the file; the store cannot be used after."""
        self._connection.close()

    def __enter__(self) -> LatencyStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _refuse_foreign(self) -> None:
        try:
            with self.path.open("rb") as file:
                header = file.read(100)
        except FileNotFoundError:
            return
        # an empty file is one that another process is creating at this moment, or that a crash left
        if header and (
            not header.startswith(b"SQLite format 3\0") or header[68:72] != _APPLICATION_ID.to_bytes(4, "big")
        ):
            raise StoreError(
                f"{self.path} is not a latency store of fxmerge; it was left untouched. Move it away, or "
                "set FXMERGE_CACHE to another folder."
            )

    def _prepare(self) -> None:
        """Create the table, or check that the one there is sound."""
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")  # one process creates, the others wait; fails where nothing can be written
        (version,) = execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise StoreError(
                f"{self.path} was written by a newer fxmerge (format {version}, this one reads {_VERSION}); "
                "it was left untouched. Upgrade it, or set FXMERGE_CACHE to another folder."
            )
        if version == 0:
            for statement in _SCHEMA:
                execute(statement)
        execute("COMMIT")
        (verdict,) = execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the latency store {self.path} cannot be used: {error}. Move it away, or set "
                "FXMERGE_CACHE to a folder that can be written."
            ) from error


def default_path() -> Path:
    """``latency.sqlite`` in ``$FXMERGE_CACHE``, else ``$XDG_CACHE_HOME/fxmerge``, else ``~/.cache/fxmerge``."""
    if folder := os.environ.get("FXMERGE_CACHE"):
        return Path(folder) / "latency.sqlite"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fxmerge" / "latency.sqlite"


def measured(
    runtime: Runtime,
    signatures: Sequence[LayerSignature],
    store: LatencyStore | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[LayerSignature, float]:
    """The latency of every distinct layer: looked up where it is known, else measured and stored at once.

    Args:
        runtime: whose :meth:`~fxmerge.runtimes.Runtime.measure` is asked for what is missing; all of it if
            the runtime is deterministic, which leaves the store alone.
        signatures: layers, repetitions allowed.
        store: where results are kept; None keeps nothing.
        progress: called with (known, all) after each new result.

    Returns:
        Latencies in the runtime's unit, in the order in which the layers first occur.

    Raises:
        UserError: the runtime returned something that is no latency, or left a layer out.
    """
    distinct = list(dict.fromkeys(signatures))
    if runtime.deterministic:
        store = None
    environment = runtime.environment()
    known = {} if store is None else store.get(environment, distinct)

    def keep(signature: LayerSignature, latency: float) -> None:
        if not (math.isfinite(latency) and latency >= 0):
            raise UserError(f"runtime {runtime.name!r} returned the latency {latency} for {signature.key()}")
        known[signature] = latency
        if store is not None:
            store.put(environment, signature, latency, runtime.unit)
        if progress is not None:
            progress(len(known), len(distinct))

    missing = [signature for signature in distinct if signature not in known]
    if missing:
        runtime.measure(missing, keep)
    if absent := [signature.key() for signature in distinct if signature not in known]:
        raise UserError(f"runtime {runtime.name!r} returned no latency for {absent[0]}")
    return {signature: known[signature] for signature in distinct}


def _canonical(environment: Mapping[str, str]) -> str:
    return json.dumps(dict(environment), sort_keys=True, separators=(",", ":"))
