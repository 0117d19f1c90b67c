"""The wheel that users install: what is in it, where it imports from, and what importing it loads.

Builds work on a copy of the sources: setuptools' build folder in a checkout keeps deleted files.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {
    "accelerate",
    "matplotlib",
    "networkx",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ray",
    "rich",
    "scipy",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torch_tensorrt",
    "torchvision",
}


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def copy_of_the_sources(target: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("fxmerge", "passes"):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(source: Path, target: Path) -> Path:
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "-qq", "--no-deps")
    done = python(*pip, "--no-build-isolation", "--wheel-dir", target, source, cwd=target)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("fxmerge-*.whl")
    return wheel


def modules_in(folder: Path) -> set[str]:
    """List the Python files below a folder, through its symlinks."""
    found = set()
    for path in folder.iterdir():
        if path.is_dir():
            found |= modules_in(path)
        elif path.suffix == ".py":
            found.add(path.relative_to(ROOT).as_posix())
    return found


def modules_shipped(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = copy_of_the_sources(tmp_path_factory.mktemp("source"))
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps")
    done = python(*pip, "--no-index", "--target", target, wheel, cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_ships_every_module(wheel):
    sources = modules_in(ROOT / "fxmerge")
    assert "fxmerge/passes/_base.py" in sources
    assert modules_shipped(wheel) == sources


def test_a_package_missing_from_pyproject_would_be_noticed(tmp_path):
    source = copy_of_the_sources(tmp_path)
    pyproject = source / "pyproject.toml"
    text = pyproject.read_text()
    assert text.count('"fxmerge.passes", ') == 1
    pyproject.write_text(text.replace('"fxmerge.passes", ', ""))
    target = tmp_path / "wheel"
    target.mkdir()
    missing = modules_in(ROOT / "fxmerge") - modules_shipped(build_wheel(source, target))
    assert "fxmerge/passes/_base.py" in missing


def test_the_wheel_ships_types_and_licence_and_no_second_passes_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fxmerge/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fxmerge"}


def test_the_installed_passes_import_from_the_installation(installed, tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import fxmerge.passes; "
        "print(fxmerge.passes.__file__); print(fxmerge.passes.GraphPass.__module__)"
    )
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(installed / "fxmerge" / "passes" / "__init__.py"),
        "fxmerge.passes._base",
    ]


@pytest.mark.parametrize("statement", ["import passes", "from passes import _base"])
def test_the_source_folder_is_no_second_import_name(statement):
    done = python("-c", statement, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: this folder is the source of fxmerge.passes and cannot be imported as "
        "'passes': two import names would make two copies of every class; "
        "write 'import fxmerge.passes' instead"
    )


def loaded_by(statement: str) -> set[str]:
    """Name the top-level modules that a fresh interpreter has after a statement."""
    program = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = python("-W", "error", "-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def torch_loads() -> set[str]:
    return loaded_by("import torch")


EVERY_MODULE = (
    "import fxmerge, pkgutil, importlib; "
    "[importlib.import_module(m.name) for m in pkgutil.walk_packages(fxmerge.__path__, 'fxmerge.')"
    " if not m.name.endswith('__main__')]"
)


@pytest.mark.parametrize("statement", ["import fxmerge", EVERY_MODULE])
def test_importing_loads_no_optional_package(statement, torch_loads):
    loaded = loaded_by(statement)
    assert "fxmerge" in loaded
    assert (loaded - torch_loads) & OPTIONAL == set()


def test_loading_an_optional_package_would_be_noticed(torch_loads):
    loaded = loaded_by("import fxmerge, networkx, rich")
    assert (loaded - torch_loads) & OPTIONAL == {"networkx", "rich"} - torch_loads
