"""ARCHITECTURE.md is true: what it draws is what the imports say."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckpt_hooks

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ckpt_hooks"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
SUBPACKAGES = ["handlers/__init__.py", "storage/__init__.py"]
MODULES = [file for file in FILES if file not in SUBPACKAGES]
MAX_LINES = 420
CYCLE_MARK = "# import cycle:"  # on the line of an import that has to close one, followed by the reason
NEVER_IMPORTED = {"clu", "flax", "optax", "orbax", "rich", "grain", "keras", "equinox"}
CHANGES_FILES = {
    "fsync",
    "fdatasync",
    "remove",
    "removedirs",
    "rename",
    "renames",
    "replace",
    "rmdir",
    "rmtree",
    "unlink",
}
OF_PATHS = {"rename", "rmdir", "rmtree", "unlink", "fsync"}  # methods that only paths and file modules have


def is_for_tests(file: str) -> bool:
    """Whether a file is what users test with, which damages files on purpose."""
    return file.startswith("testing/")


@functools.cache
def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(), file)


def layers() -> dict[str, str]:
    """{file: layer}, from the drawing."""
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    drawing = text.split("```text\n", 1)[1].split("```", 1)[0]
    found: dict[str, str] = {}
    layer = ""
    for line in drawing.splitlines():
        match = re.fullmatch(r"(\d[a-c]?)? +([\w/]+\.py) {2,}\S.*", line)
        assert match, f"not a line of the drawing: {line!r}"
        layer = match[1] or layer
        assert match[2] not in found, f"{match[2]} is drawn twice"
        found[match[2]] = layer
    return found


def imported_names(file: str) -> Iterator[tuple[str, ast.stmt]]:
    """(dotted name, statement) of everything that a file imports, also inside functions."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def file_of(name: str) -> str | None:
    """The file of ours that importing a dotted name loads; None for other packages."""
    parts = name.split(".")
    if parts[0] != "ckpt_hooks":
        return None
    for length in (len(parts), len(parts) - 1):
        inside = "/".join(parts[1:length])
        for file in (f"{inside}.py", f"{inside}/__init__.py".lstrip("/")):
            if file in FILES:
                return file
    raise AssertionError(f"{name} is no module of ours")


def imports_of_ours(file: str) -> set[str]:
    lines = (PACKAGE / file).read_text().splitlines()
    found = {file_of(name) for name, node in imported_names(file) if CYCLE_MARK not in lines[node.lineno - 1]}
    return {name for name in found if name is not None}


def files_importing(package: str) -> set[str]:
    """The files that import a package, or something inside it."""
    return {
        file for file in FILES for name, _ in imported_names(file) if name == package or name.startswith(f"{package}.")
    }


def dotted(node: ast.AST) -> str:
    """``jax.distributed.is_initialized`` of the expression that says so; "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inside = dotted(node.value)
        return f"{inside}.{node.attr}" if inside else ""
    return ""


# ------------------------------------------------------------------ the drawing


def test_every_module_is_drawn_once_and_every_drawn_module_exists() -> None:
    """The drawing lists the modules that there are, and no other."""
    assert sorted(layers()) == sorted(MODULES)


def test_every_file_named_on_the_page_exists() -> None:
    """Whatever file of ours ARCHITECTURE.md names, drawing or text, is there."""
    named = set(re.findall(r"[\w/]+\.py\b", (REPOSITORY / "ARCHITECTURE.md").read_text()))
    there = set(FILES) | {Path(file).name for file in FILES}
    assert not [file for file in named - there if not (REPOSITORY / file).exists()]


def test_subpackages_have_no_code_of_their_own() -> None:
    """`handlers` and `storage` are folders: their `__init__.py` is one docstring, so it needs no place."""
    for file in SUBPACKAGES:
        assert len(parse(file).body) == 1
        assert ast.get_docstring(parse(file))


@pytest.mark.parametrize("file", MODULES)
def test_imports_go_down(file: str) -> None:
    """A module imports from its own layer or from a lower one."""
    layer = layers()
    upwards = [name for name in imports_of_ours(file) - set(SUBPACKAGES) if layer[name] > layer[file]]
    assert not upwards, f"{file} (layer {layer[file]}) imports {upwards}"


def test_imports_have_no_cycle() -> None:
    """Following imports, also those inside functions, never leads back to where one began."""
    done: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, " -> ".join((*path[path.index(file) :], file))
        if file not in done:
            for imported in imports_of_ours(file):
                visit(imported, (*path, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


# ------------------------------------------------------------------ where is it?


def test_only_foreign_imports_tensorstore() -> None:
    """tensorstore is used in one file."""
    assert files_importing("tensorstore") == {"storage/foreign.py"}


def test_only_preemption_handles_signals() -> None:
    """Signals are handled in one file; the hook needs two names of the module for its signature."""
    assert files_importing("signal") == {"preemption.py", "hook.py"}
    used = {name for node in ast.walk(parse("hook.py")) if (name := dotted(node)).startswith("signal.")}
    assert used == {"signal.SIGTERM", "signal.Signals"}


@pytest.mark.parametrize("file", [file for file in FILES if file != "processes.py"])
def test_only_processes_knows_of_other_processes(file: str) -> None:
    """`jax.distributed`, its coordination service and the number of processes are asked for in one file."""
    names = {name for name, _ in imported_names(file)} | {dotted(node) for node in ast.walk(parse(file))}
    known = ("jax._src.distributed", "jax.distributed", "jax.experimental.multihost_utils", "jax.process_")
    assert not [name for name in names if name.startswith(known)]


@pytest.mark.parametrize("file", [file for file in FILES if file != "storage/commit.py" and not is_for_tests(file)])
def test_only_commit_renames_removes_and_syncs(file: str) -> None:
    """Nothing else renames, removes or syncs a file or directory, by whatever module it could be done."""
    found = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute):
            name, owner = node.attr, dotted(node.value)
            of_a_path = name in OF_PATHS and owner not in ("commit", "self")  # what is in `self` is a field
            if (name in CHANGES_FILES and owner in ("os", "shutil")) or of_a_path:
                found.append(f"line {node.lineno}: {owner}.{name}")
    assert not found
    assert not [name for name, node in imported_names(file) if isinstance(node, ast.ImportFrom) and is_low_level(name)]


def test_nobody_imports_what_damages_files() -> None:
    """`testing/` is loaded by nobody but itself: what the library does never goes through it."""
    assert not [file for file in files_importing("ckpt_hooks.testing") if not is_for_tests(file)]


def is_low_level(name: str) -> bool:
    return name.split(".")[0] in ("os", "shutil")


def test_nobody_imports_what_users_bring() -> None:
    """Orbax, Flax, Optax, clu, Grain, Equinox and rich are imported nowhere in the library, also not inside functions.

    Only the zoo, whose states are such as users bring, makes some of Flax and Optax when it is asked for them, and
    only the callback that derives from one of Keras's imports Keras.
    """
    importing = {(file, package) for package in NEVER_IMPORTED for file in files_importing(package)}
    assert importing == {
        ("testing/zoo_states.py", "flax"),
        ("testing/zoo_states.py", "optax"),
        ("keras_callback.py", "keras"),
    }


def test_import_loads_nothing_heavy() -> None:
    """`import ckpt_hooks` loads neither Orbax nor Flax, clu, Keras, tensorstore or rich."""
    command = [sys.executable, "-X", "importtime", "-c", "import ckpt_hooks"]
    report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in report.splitlines()}
    assert {"ckpt_hooks", "jax"} <= loaded
    assert not loaded & (NEVER_IMPORTED | {"tensorstore"})


# ------------------------------------------------------------------ size and names


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long(file: str) -> None:
    """A file has at most about 400 lines."""
    assert len((PACKAGE / file).read_text().splitlines()) <= MAX_LINES


def test_public_names_are_sorted() -> None:
    """`ckpt_hooks.__all__` is in alphabetical order and names nothing twice."""
    assert ckpt_hooks.__all__ == sorted(set(ckpt_hooks.__all__))


@pytest.mark.parametrize("name", ckpt_hooks.__all__)
def test_public_name_is_importable_and_documented(name: str) -> None:
    """Every public name can be imported, and has a docstring that somebody wrote."""
    value = getattr(importlib.import_module("ckpt_hooks"), name)
    doc = value.__doc__
    assert doc and inspect.cleandoc(doc)
    assert not doc.startswith(f"{name}("), "this is what dataclass makes up"
