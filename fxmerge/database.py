"""A small SQLite file of fxmerge's own: crash-safe, shared between processes, and never mistaken for another file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

from .errors import StoreError

__all__ = ["Database"]

_Own = TypeVar("_Own", bound="Database")


class Database:
    """What the tables of fxmerge on disk have in common; a subclass says what is in it.

    Any number of processes may use one file at the same time, and a process that is killed loses at most the entry it was
    writing. It is used by the thread that opened it, and is a context manager.

    Args:
        path: the file, created when missing, parents included.
        readonly: nothing is created or written, and the file need not be writable.

    Raises:
        StoreError: the file is corrupt, is of another kind, was written by a newer fxmerge, cannot be written, or is
            missing and only to be read. It is left as it was.
    """

    what: ClassVar[str]
    """What it is called in messages."""
    application_id: ClassVar[int]
    """Marks the file as of this kind, in bytes 68 to 71 of SQLite's header."""
    version: ClassVar[int] = 1
    """Of the format; a file of a newer one is refused."""
    schema: ClassVar[tuple[str, ...]]
    """Statements that make the tables."""
    elsewhere: ClassVar[str]
    """What to do instead of using a file that cannot be used."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        with self._errors():
            if readonly and not self.path.exists():
                raise StoreError(f"there is no {self.what} at {self.path}")
            if not readonly:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # before SQLite sees the file: opening a foreign one may already change it (a write-ahead log)
            self._refuse_foreign()
            # autocommit: every statement is a transaction of its own
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            with self._errors():
                if readonly:
                    self._only_read()
                else:
                    self._create()
                self._check_sound()
        except StoreError:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def close(self) -> None:
        """Close the file; it cannot be used after."""
        self._connection.close()

    def __enter__(self: _Own) -> _Own:
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
            not header.startswith(b"SQLite format 3\0") or header[68:72] != self.application_id.to_bytes(4, "big")
        ):
            raise StoreError(
                f"{self.path} is not {_article(self.what)} of fxmerge; it was left untouched. Move it away, or "
                f"{self.elsewhere}."
            )

    def _create(self) -> None:
        """Make the tables where there are none."""
        with self._transaction():  # one process creates, the others wait; fails where nothing can be written
            if self._check_version() == 0:
                self._connection.execute(f"PRAGMA application_id = {self.application_id}")
                self._connection.execute(f"PRAGMA user_version = {self.version}")
                for statement in self.schema:
                    self._connection.execute(statement)

    def _only_read(self) -> None:
        if self._check_version() == 0:
            raise StoreError(f"there is no {self.what} at {self.path}: the file is empty")
        self._connection.execute("PRAGMA query_only = ON")

    def _check_version(self) -> int:
        """The file's format; 0 for an empty file."""
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > self.version:
            raise StoreError(
                f"{self.path} was written by a newer fxmerge (format {version}, this one reads {self.version}); "
                f"it was left untouched. Upgrade it, or {self.elsewhere}."
            )
        return version

    def _check_sound(self) -> None:
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and no other process writes meanwhile."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            if self._connection.in_transaction:  # SQLite may have rolled back itself, as it does when the disk is full
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the {self.what} {self.path} cannot be used: {error}. Move it away, or {self.elsewhere}."
            ) from error


def _article(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
