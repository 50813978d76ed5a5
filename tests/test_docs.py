"""The documentation is true: its Python blocks run, and its tables say what the code does."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import ckpt_hooks

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ckpt_hooks"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PREFIX = "/jax/ckpt_hooks/"
KINDS = {"record_event": "event", "record_duration_secs": "duration", "record_scalar": "scalar"}
UNITS = {"event": "", "duration": "seconds", "scalar": "bytes"}


class Event(NamedTuple):
    name: str
    kind: str
    unit: str
    details: tuple[str, ...]


def python_blocks(page: Path) -> list[str]:
    """The ```python blocks of a page, each with blank lines before it, so that line numbers in tracebacks are right."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


def rows(page: Path, header: str) -> list[list[str]]:
    """The cells of the table whose header row begins with `header`."""
    _, _, table = page.read_text().partition(header)
    assert table, f"{page.name} has no table {header!r}"
    lines = table.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# ------------------------------------------------------------------ snippets


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of a page runs in an empty directory, after those before it on the page."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look for the module they stand in
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that there is, and its heading if it names one."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        linked = (page.parent / target) if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_format_page_has_a_reader_of_its_own() -> None:
    """The example reader on the page of the format imports nothing of ours."""
    reader = python_blocks(REPOSITORY / "docs/format.md")[0]
    imported = [node for node in ast.walk(ast.parse(reader)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in imported} == {"import json", "import struct", "import numpy as np"}


def test_readme_lists_every_example() -> None:
    """Each program in `examples/` has a row in the README's table, and says at its top how to run it."""
    folder = REPOSITORY / "examples"
    programs = {path.name for path in folder.iterdir() if path.name[0] not in "_."}
    linked = [
        re.findall(r"\]\(examples/([^)]+)\)", row[0]) for row in rows(REPOSITORY / "README.md", "| Example | What")
    ]
    assert {name for names in linked for name in names} == programs
    for path in folder.glob("[!_]*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert re.search(rf"^    python (examples/{path.name}|-m examples\.{path.stem})\b", docstring, re.MULTILINE)


# ------------------------------------------------------------------ events


def emitted_events() -> set[Event]:
    """What the calls of `ckpt_hooks.events` in the library send."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if ast.unparse(node.func.value) != "events":
                continue
            assert node.func.attr in KINDS, f"{path.name}:{node.lineno} calls events.{node.func.attr}"
            constant = node.args[0]
            assert isinstance(constant, ast.Attribute), f"{path.name}:{node.lineno} names no constant of events.py"
            name = getattr(ckpt_hooks.events, constant.attr)
            kind = KINDS[node.func.attr]
            details = tuple(sorted(keyword.arg or "**" for keyword in node.keywords))
            found.add(Event(name.removeprefix(PREFIX), kind, UNITS[kind], details))
    return found


def documented_events() -> list[Event]:
    found = []
    for name, kind, unit, details, _ in rows(REPOSITORY / "docs/events.md", "| Name | Kind |"):
        keywords = tuple(sorted(re.findall(r"`(\w+)`", details)))
        found.append(Event(name.strip("`"), kind, unit, keywords))
    return found


def test_events_page_lists_what_is_sent() -> None:
    """The table of events is the list of events that the code sends, with their kinds, units and details."""
    documented = documented_events()
    assert len(set(documented)) == len(documented)
    assert set(documented) == emitted_events()


def test_events_page_lists_the_loggers() -> None:
    """The table of log messages has each logger and level that the code uses, and no other."""
    logged = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        logged |= {(module, level.upper()) for level in re.findall(r"\b_log\.(\w+)\(", path.read_text())}
    documented = set()
    logger = ""
    for name, level, _ in rows(REPOSITORY / "docs/events.md", "| Logger | Level |"):
        logger = name.strip("`") or logger
        documented.add((logger, level))
    assert documented == logged


# ------------------------------------------------------------------ dependencies


def test_dependencies_page_has_every_dependency() -> None:
    """Each dependency in pyproject.toml, core or extra, stands on the page."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[>=<]", requirement)[0] for requirement in required} - {"ckpt_hooks[examples,orbax]"}
    page = (REPOSITORY / "docs/dependencies.md").read_text()
    assert not [name for name in names if f"`{name}`" not in page]
