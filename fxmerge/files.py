"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_files"]


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, each replaced in one step, and none before all are on the disk: a reader never finds half of one.

    Raises:
        OSError: the disk is full, a folder is missing, or there is no permission; nothing was replaced.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_files({Path(folder, "a"): b"one", Path(folder, "b"): b"two"})
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a', 'b']
    """
    temporary = {path.with_name(f".{path.name}.{os.getpid()}"): path for path in contents}
    try:
        for place, path in temporary.items():
            place.write_bytes(contents[path])
        for place, path in temporary.items():
            place.replace(path)
    finally:
        for place in temporary:
            place.unlink(missing_ok=True)
