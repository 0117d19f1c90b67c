"""A runtime that must not be asked for anything: what is refused is refused before measuring."""

from __future__ import annotations

import pytest

__all__ = ["Untouched"]


class Untouched:
    """Fails the test that measures with it."""

    name = "untouched"
    deterministic = False

    def __init__(self, unit="ms"):
        self.unit = unit

    def environment(self):
        return {}

    def measure(self, *_):
        pytest.fail("layers were measured")

    def build(self, *_):
        pytest.fail("a network was built")
