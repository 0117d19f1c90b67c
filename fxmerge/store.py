"""Latencies that were measured once and need not be measured again: a small SQLite file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeAlias, TypeVar

from .database import Database
from .errors import UserError
from .runtimes import LayerSignature, Runtime, Signature, signature_from_key

__all__ = ["Entry", "Environment", "Inside", "LatencyStore", "default_path", "measured"]

_Signature = TypeVar("_Signature", bound=Signature)

Inside: TypeAlias = Callable[
    [Runtime, frozenset[Signature], Callable[[Signature, float], None], Callable[[int, int], None]], None
]
"""Measures what is missing inside networks: takes the runtime, the signatures, where to put each, and (done, all)."""

_NEVER = "9999"  # later than every date


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored latency; ``measured_at`` is the time in UTC."""

    environment: dict[str, str]
    signature: Signature
    latency: float
    unit: str
    measured_at: str


@dataclass(frozen=True, slots=True)
class Environment:
    """What a store holds of one environment.

    Attributes:
        values: all that the latencies depend on besides the layer, as the runtime said it.
        entries: how many latencies.
        oldest: when the oldest was measured, UTC.
        newest: when the newest was measured, UTC.
    """

    values: dict[str, str]
    entries: int
    oldest: str
    newest: str

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that name the environment, the same in every store.

        Example:
            >>> Environment({"runtime": "onnxruntime 1.32.0", "threads": "1"}, 0, "", "").id
            'eb96e4cf'
        """
        return _identity(_canonical(self.values))


class LatencyStore(Database):
    """Latencies on disk, by what they depend on and by layer; see :class:`~fxmerge.database.Database`.

    Args:
        path: the file, created when missing; None is :func:`default_path`.
        readonly: nothing is created or written, and the file need not be writable.

    Raises:
        StoreError: the file is corrupt, is not a store, was written by a newer fxmerge, cannot be written,
            or is missing and only to be read. It is left as it was. The methods raise it too.

    Example:
        >>> from fxmerge.algebra import Geometry
        >>> with LatencyStore(Path(":memory:")) as store:
        ...     len(list(store.entries()))
        0
    """

    what = "latency store"
    application_id = 0x66786D67  # "fxmg"
    schema = (
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
    elsewhere = "set FXMERGE_CACHE to another folder"

    def __init__(self, path: Path | None = None, *, readonly: bool = False) -> None:
        super().__init__(default_path() if path is None else Path(path), readonly=readonly)

    def get(self, environment: Mapping[str, str], signatures: Iterable[_Signature]) -> dict[_Signature, float]:
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

    def put(self, environment: Mapping[str, str], signature: Signature, latency: float, unit: str) -> None:
        """Store one latency; when this returns it survives a crash. An earlier one is replaced."""
        with self._errors():
            self._connection.execute(
                "INSERT OR REPLACE INTO latency (environment, signature, latency, unit) VALUES (?, ?, ?, ?)",
                (_canonical(environment), signature.key(), latency, unit),
            )

    def entries(self, environment: str | None = None) -> Iterator[Entry]:
        """Everything in the store, by environment, then layer.

        Args:
            environment: the :attr:`Environment.id` of the only one to list.
        """
        with self._errors():
            rows = self._connection.execute(
                "SELECT environment, signature, latency, unit, measured_at FROM latency ORDER BY 1, 2"
            ).fetchall()
        for text, signature, latency, unit, measured_at in rows:
            if environment in (None, _identity(text)):
                yield Entry(json.loads(text), signature_from_key(signature), latency, unit, measured_at)

    def environments(self) -> list[Environment]:
        """What is stored of each environment, in the order of :meth:`entries`."""
        with self._errors():
            return [environment for _, environment in self._grouped(_NEVER)]

    def prune(
        self,
        *,
        environment: str | None = None,
        runtime: str | None = None,
        device: str | None = None,
        older_than: timedelta | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> list[Environment]:
        """Remove the latencies that all the given criteria apply to, and give the space back to the system.

        What other processes store meanwhile is kept, unless it fits the criteria, too.

        Args:
            environment: the :attr:`Environment.id` of one environment.
            runtime: its name (``"onnxruntime"``), with or without the version (``"onnxruntime 1.32.0"``).
            device: part of the device's name, in any case.
            older_than: age since the measurement.
            everything: stands for criteria: remove all there is.
            dry_run: remove nothing.

        Returns:
            What was removed, or would be, of each environment.

        Raises:
            UserError: no criterion was given, or no environment has that id.
        """
        criteria = (environment, runtime, device, older_than)
        if everything == any(value is not None for value in criteria):
            raise UserError("prune needs a criterion: environment, runtime, device or older_than; or everything, alone")
        before = _NEVER if older_than is None else _timestamp(older_than)
        with self._errors(), nullcontext() if dry_run else self._transaction():
            if environment is not None and environment not in (known.id for _, known in self._grouped(_NEVER)):
                raise UserError(f"{self.path} holds no environment {environment!r}")
            found = [
                (text, group)
                for text, group in self._grouped(before)
                if environment in (None, group.id)
                and (runtime is None or f"{group.values.get('runtime', '')} ".startswith(f"{runtime} "))
                and (device is None or device.lower() in group.values.get("device", "").lower())
            ]
            if not dry_run:
                self._connection.executemany(
                    "DELETE FROM latency WHERE environment = ? AND measured_at < ?",
                    [(text, before) for text, _ in found],
                )
        if found and not dry_run:
            with self._errors():
                self._connection.execute("VACUUM")
        return [group for _, group in found]

    def merge(self, other: Path) -> tuple[int, int]:
        """Add the latencies of another store, which is only read. Of two of one layer the newer stays.

        All of them arrive or none.

        Args:
            other: its file.

        Returns:
            How many were new here, and how many replaced an older one.

        Raises:
            StoreError: the other file is missing, corrupt or no store.
        """
        with LatencyStore(other, readonly=True) as source, source._errors():
            rows = source._connection.execute(
                "SELECT environment, signature, latency, unit, measured_at FROM latency"
            ).fetchall()
        with self._errors(), self._transaction() as connection:
            entries, changes = self._count(), connection.total_changes
            connection.executemany(
                """
                INSERT INTO latency (environment, signature, latency, unit, measured_at) VALUES (?, ?, ?, ?, ?)
                ON CONFLICT (environment, signature) DO UPDATE
                SET latency = excluded.latency, unit = excluded.unit, measured_at = excluded.measured_at
                WHERE excluded.measured_at > latency.measured_at
                """,
                rows,
            )
            added = self._count() - entries
            return added, connection.total_changes - changes - added

    def _grouped(self, before: str) -> list[tuple[str, Environment]]:
        """What was measured before a date: each environment's text with its summary."""
        rows = self._connection.execute(
            """
            SELECT environment, count(*), min(measured_at), max(measured_at)
            FROM latency WHERE measured_at < ? GROUP BY environment ORDER BY environment
            """,
            (before,),
        )
        return [(text, Environment(json.loads(text), *summary)) for text, *summary in rows]

    def _count(self) -> int:
        count: int = self._connection.execute("SELECT count(*) FROM latency").fetchone()[0]
        return count


def default_path() -> Path:
    """``latency.sqlite`` in ``$FXMERGE_CACHE``, else ``$XDG_CACHE_HOME/fxmerge``, else ``~/.cache/fxmerge``."""
    if folder := os.environ.get("FXMERGE_CACHE"):
        return Path(folder) / "latency.sqlite"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fxmerge" / "latency.sqlite"


def measured(
    runtime: Runtime,
    signatures: Sequence[Signature],
    store: LatencyStore | None,
    progress: Callable[[int, int], None] | None = None,
    inside: Inside | None = None,
) -> dict[Signature, float]:
    """The latency of every distinct layer: looked up where it is known, else measured and stored at once.

    Args:
        runtime: whose :meth:`~fxmerge.runtimes.Runtime.measure` is asked for the layers that are missing; all of them if
            the runtime is deterministic, which leaves the store alone.
        signatures: repetitions allowed.
        store: where results are kept; None keeps nothing.
        progress: called with (done, all) as the measuring goes on.
        inside: measures what it can of what is missing inside networks, before the runtime is asked for the rest; what it
            hands over twice counts as it was last.

    Returns:
        Latencies in the runtime's unit, in the order in which the signatures first occur.

    Raises:
        UserError: the runtime returned something that is no latency, or left a layer out.
    """
    distinct = list(dict.fromkeys(signatures))
    if runtime.deterministic:
        store = None
    environment = runtime.environment()
    found = {} if store is None else store.get(environment, distinct)
    before, wanted = frozenset(found), frozenset(distinct)

    def keep(signature: Signature, latency: float) -> None:
        if not (math.isfinite(latency) and latency >= 0):
            raise UserError(f"runtime {runtime.name!r} returned the latency {latency} for {signature.key()}")
        if signature in before or signature not in wanted:
            return
        found[signature] = latency
        if store is not None:
            store.put(environment, signature, latency, runtime.unit)

    def keep_alone(signature: LayerSignature, latency: float) -> None:
        keep(signature, latency)
        if progress is not None:
            progress(len(found), len(distinct))

    def missing() -> list[Signature]:
        return [signature for signature in distinct if signature not in found]

    if inside is not None and missing():
        inside(runtime, frozenset(missing()), keep, progress or (lambda *_: None))
    if layers := [signature for signature in missing() if isinstance(signature, LayerSignature)]:
        runtime.measure(layers, keep_alone)
    if missing():
        raise UserError(f"runtime {runtime.name!r} returned no latency for {missing()[0].key()}")
    return {signature: found[signature] for signature in distinct}


def _canonical(environment: Mapping[str, str]) -> str:
    return json.dumps(dict(environment), sort_keys=True, separators=(",", ":"))


def _identity(environment: str) -> str:
    return hashlib.sha256(environment.encode()).hexdigest()[:8]


def _timestamp(age: timedelta) -> str:
    """The moment so long ago, in the form of SQLite's CURRENT_TIMESTAMP."""
    moment = datetime.now(timezone.utc) - age
    return moment.replace(tzinfo=None).isoformat(" ", "seconds")
