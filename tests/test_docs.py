"""What the README and docs/ say is true: their Python blocks and fxmerge commands run, their links and names exist."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fxmerge
from fxmerge import effort
from fxmerge.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]
NOT_RUN = {"git", "make", "pip", "python"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    language: str
    line: int
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page; ``line`` is that of their first line of code."""
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m.group(1), text.count("\n", 0, m.start(2)) + 1, m.group(2)) for m in fences]


def run_python(block: Block, path: Path, namespace: dict[str, object]) -> None:
    """Run a block, with the page's own lines in tracebacks; one that begins with ``# name.py`` is that file, too."""
    title = re.match(r"# (\w+\.py)\n", block.code)
    if title is not None:
        Path(title.group(1)).write_text(block.code)
    exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)  # noqa: S102


def run_shell(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the lines that are fxmerge's, in a copy of the folder that a line goes to."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "cd":
            shutil.copytree(ROOT / words[1], words[1], ignore=shutil.ignore_patterns("__pycache__"))
            monkeypatch.chdir(words[1])
        elif words and words[0] == "fxmerge":
            assert main(words[1:]) == 0, line
        else:
            assert not words or words[0] in NOT_RUN, line


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, a store of its own, short minutes, and no trace left of modules that are imported from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(effort._SECONDS, "min", 2.0)
    monkeypatch.setenv("FXMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FXMERGE_PROGRESS", "off")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("data", "model", "nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_block_runs(path, monkeypatch):
    namespace: dict[str, object] = {"__name__": path.stem}
    for block in blocks(path.read_text()):
        if block.language == "python":
            run_python(block, path, namespace)
        elif block.language == "sh":
            run_shell(block, monkeypatch)
        else:
            pytest.fail(f"{path}:{block.line}: a block in {block.language!r}; python and sh are run")


def test_a_block_that_raises_is_noticed_at_its_line(elsewhere):
    page = elsewhere / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\n```python\n\nassert x == 2\n```\n")
    first, second = blocks(page.read_text())
    namespace: dict[str, object] = {}
    run_python(first, page, namespace)
    with pytest.raises(AssertionError) as caught:
        run_python(second, page, namespace)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 9)


@pytest.mark.usefixtures("elsewhere")
def test_a_command_that_fails_or_is_unknown_is_noticed(monkeypatch):
    with pytest.raises(AssertionError, match="fxmerge inspect nets:gone"):
        run_shell(Block("sh", 1, "fxmerge inspect nets:gone --input-shape 1x3x8x8\n"), monkeypatch)
    with pytest.raises(AssertionError, match="fxmarge"):
        run_shell(Block("sh", 1, "fxmarge inspect\n"), monkeypatch)


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, path: Path) -> list[str]:
    broken = []
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if not page.exists() or (anchor and anchor not in anchors(page.read_text() if name else text)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(path):
    assert broken_links(path.read_text(), path) == []


def test_a_broken_link_is_noticed():
    text = (
        "# One thing\n[a](LICENSE) [b](LICENCE) [c](#one-thing) [d](#two) [e](docs/how-to.md#no) [f](https://x.org/y)"
    )
    assert broken_links(text, README) == ["LICENCE", "#two", "docs/how-to.md#no"]


# --- names -----------------------------------------------------------------------------------------------------------


def commands(text: str, program: str) -> set[str]:
    """The first arguments of a program, wherever it is called in a shell block or in inline code."""
    shell = [line for block in blocks(text) if block.language == "sh" for line in block.code.splitlines()]
    code = [*shell, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
    return {found.group(1) for line in code if (found := re.match(rf"{program} ([a-z][a-z-]*)\b(?!=)", line))}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_make_target_exists(path):
    assert commands(path.read_text(), "make") <= make_targets()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_subcommand_exists(path, capsys):
    for name in sorted(commands(path.read_text(), "fxmerge")):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0, name
    capsys.readouterr()


def test_commands_are_found_where_they_are_written():
    text = "`make demo` make dust `make X=1` `fxmerge fold` `make gpu-check`\n```sh\nmake test  # all\nfxmerge inspect a:b\n```\n"
    assert commands(text, "make") == {"demo", "gpu-check", "test"}
    assert commands(text, "fxmerge") == {"fold", "inspect"}
    assert {"demo", "test", "lint", "gpu-check"} <= make_targets()


def resolve(name: str) -> object:
    """What a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_dotted_name_exists(path):
    names = set(re.findall(r"`(fxmerge(?:\.\w+)+)(?:\([^`]*)?`", path.read_text()))
    assert [name for name in sorted(names) if resolve(name) is None] == []


def test_a_name_that_does_not_exist_is_noticed():
    with pytest.raises(AttributeError, match="compact"):
        resolve("fxmerge.compact")


@pytest.mark.parametrize("module", ["fxmerge", "fxmerge.passes", "fxmerge.runtimes", "fxmerge.errors"])
def test_the_reference_lists_every_public_name(module):
    listed = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    public -= {"fxmerge.errors.FxmergeError"}
    assert public <= listed


def test_the_reference_lists_every_option():
    text = (ROOT / "docs" / "reference.md").read_text()
    parameters = {**inspect.signature(fxmerge.compress).parameters, **inspect.signature(fxmerge.frontier).parameters}
    options = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    listed = re.search(r"^Options of .*?\n\n", text, re.DOTALL | re.MULTILINE).group()
    assert set(re.findall(r"`(\w+)`", listed)) - {"compress", "frontier"} == options


def reason_codes() -> set[str]:
    """The codes of all refusals in the source; ``input`` is never shown."""
    sources = [path.read_text() for folder in ("fxmerge", "passes") for path in sorted((ROOT / folder).glob("*.py"))]
    pattern = r'(?:Barrier|InexactError|Refusal|_refuse)\(\s*"([a-z-]+)"'
    return {code for source in sources for code in re.findall(pattern, source)} - {"input"}


def test_every_reason_code_is_explained():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.search(r"### Refusals\n(.*?)\n## ", text, re.DOTALL).group(1)
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == reason_codes()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_solver_figures_are_those_of_the_committed_run():
    results = json.loads((ROOT / "benchmarks" / "results" / "solver.json").read_text())
    rows = []
    for entry in results["chain"]["comparison"]:
        method = entry["method"].removeprefix("algorithm_1_")
        name = "exact frontier, all budgets" if method == "exact frontier" else f"Algorithm 1, `{method}`"
        level = "-" if entry["level_ms"] is None else f"{entry['level_ms']:g} ms"
        times, over = entry["times_the_exact_frontier"], entry["over_budget_percent"]
        rows.append(f"| {name} | {level} | {entry['seconds']:.3f} | {times:.1f} | {over:.1f} % |")
    assert len(rows) == 7
    assert "\n".join(rows) in README.read_text()
    assert results["command"] in README.read_text()


def test_the_readme_shows_the_zoo_as_it_was_measured():
    table = (ROOT / "benchmarks" / "results" / "zoo.md").read_text(encoding="utf-8").strip()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table in readme
    networks, families, merging, best = re.search(
        r"(\d+) networks of (\d+) families;.*?(\d+) have a plan.*?of (\d+) it is", table
    ).groups()
    assert f"{networks} networks of {families}\nfamilies" in readme
    assert f"{merging} of them have a\nPareto-optimal plan within 0.7" in readme
    assert f"of {best} the best one does" in readme


@pytest.mark.parametrize(("name", "shown"), [("quality", 1), ("estimators", 1), ("refit", 2)])
def test_the_readme_shows_tables_as_they_were_measured(name, shown):
    tables = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(tables) >= shown
    for table in tables[:shown]:
        assert table in README.read_text(encoding="utf-8")
