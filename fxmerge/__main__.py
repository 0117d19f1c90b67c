"""``python -m fxmerge`` is the command ``fxmerge``."""

from .cli import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
