"""What is public is in ``__all__`` and documented, in every module; failures say how to mend it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil

import pytest

import fxmerge

MODULES = sorted(
    name for _, name, _ in pkgutil.walk_packages(fxmerge.__path__, "fxmerge.") if not name.endswith(".__main__")
)
MODULES.insert(0, "fxmerge")


def public_definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Map the public names that a module defines itself, imports left out, to their statements."""
    found: dict[str, ast.stmt] = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign):
            targets = [node for target in statement.targets for node in ast.walk(target)]
            names = [node.id for node in targets if isinstance(node, ast.Name)]
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names = [statement.target.id]
        else:
            names = []
        found |= {name: statement for name in names if not name.startswith("_")}
    return found


def problems(name: str, source: str, exported: list[str] | None, attributes: object) -> list[str]:
    """List what is wrong with the public names of a module."""
    if exported is None:
        return [f"{name} has no __all__; add one, empty if nothing in it is public"]
    found = []
    definitions = public_definitions(ast.parse(source))
    for public in sorted(definitions.keys() - set(exported)):
        found.append(
            f"{name}.{public} looks public and is not in __all__; "
            f"add {public!r} to __all__, or rename it to '_{public}'"
        )
    for public in exported:
        if public.startswith("_") and not public.startswith("__"):
            found.append(
                f"{name}.__all__ names {public!r}, which looks private; "
                "take it out of __all__, or take the underscore off"
            )
        elif not hasattr(attributes, public):
            found.append(f"{name}.__all__ names {public!r}, which does not exist; take it out of __all__, or define it")
    for public, statement in definitions.items():
        documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(statement, documented) and ast.get_docstring(statement) is None:
            found.append(
                f"{name}.{public} has no docstring; write one, or make it private by renaming it to '_{public}'"
            )
    repeated = sorted({public for public in exported if exported.count(public) > 1})
    found += [f"{name}.__all__ names {public!r} twice; take one out" for public in repeated]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed_and_documented(name):
    module = importlib.import_module(name)
    found = problems(name, inspect.getsource(module), getattr(module, "__all__", None), module)
    assert not found, "\n" + "\n".join(found)


def test_the_walk_reaches_the_passes():
    assert {"fxmerge.errors", "fxmerge.passes", "fxmerge.passes._base"} <= set(MODULES)


GOOD = '''
from os import path
LIMIT: int = 3
_hidden = 1
def work():
    """Work."""
class Kind:
    """A kind."""
'''


class Anything:
    LIMIT, work, Kind, path = 3, print, int, None


@pytest.mark.parametrize(
    ("exported", "source", "expected"),
    [
        (["LIMIT", "Kind", "work"], GOOD, []),
        (["LIMIT", "Kind", "path", "work"], GOOD, []),
        (None, GOOD, ["m has no __all__; add one, empty if nothing in it is public"]),
        (
            ["Kind", "work"],
            GOOD,
            ["m.LIMIT looks public and is not in __all__; add 'LIMIT' to __all__, or rename it to '_LIMIT'"],
        ),
        (
            ["LIMIT", "Kind", "gone", "work"],
            GOOD,
            ["m.__all__ names 'gone', which does not exist; take it out of __all__, or define it"],
        ),
        (
            ["LIMIT", "Kind", "_hidden", "work"],
            GOOD,
            ["m.__all__ names '_hidden', which looks private; take it out of __all__, or take the underscore off"],
        ),
        (
            ["LIMIT", "Kind", "work"],
            GOOD.replace('"""A kind."""', "pass"),
            ["m.Kind has no docstring; write one, or make it private by renaming it to '_Kind'"],
        ),
        (
            ["LIMIT", "Kind", "work", "work"],
            GOOD,
            ["m.__all__ names 'work' twice; take one out"],
        ),
    ],
)
def test_the_check_notices_each_fault_and_gives_both_fixes(exported, source, expected):
    assert problems("m", source, exported, Anything) == expected
