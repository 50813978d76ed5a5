"""Which test passes through which line of the library: a plugin of pytest, also for the processes that a test starts.

    python -m pytest -p attacks.passages -n 2 tests      # with CKPT_HOOKS_PASSAGES=folder

Each process writes what it saw into that folder; `read_passages` puts it together.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

__all__ = ["FOLDER", "Passage", "Passages", "read_passages", "through", "trace_this_process"]

FOLDER = "CKPT_HOOKS_PASSAGES"  # where this process, or the test that it belongs to, writes
PACKAGE = Path(__file__).parents[1] / "ckpt_hooks"
_TRACED_AT_START = "import attacks.passages\nattacks.passages.trace_this_process()\n"

_Line = tuple[str, int]  # module, number
_exit = os._exit


@dataclasses.dataclass(frozen=True)
class Passage:
    """One test that passes through a line.

    Attributes:
      test: its id.
      took_secs: how long it takes.
      shared_secs: how long what it shares with the other tests of its file takes.
      lines: those of the library that it passes through.
    """

    test: str
    took_secs: float
    shared_secs: float
    lines: frozenset[_Line]

    @property
    def alone_secs(self) -> float:
        """How long it takes where no other test of its file runs."""
        return self.took_secs + self.shared_secs


Passages = list[Passage]


class _Tracer:
    """Notes each line of the library that any thread of this process passes."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._prefix = f"{PACKAGE}{os.sep}"

    def start(self) -> None:
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        del event, argument
        return self._pass if frame.f_code.co_filename.startswith(self._prefix) else None

    def _pass(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        del argument
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._pass

    def lines(self) -> list[list[Any]]:
        return [[file[len(self._prefix) :], number] for file, number in sorted(self.seen.copy())]


_tracer = _Tracer()


def _write(folder: str, kind: str, content: object) -> None:
    descriptor, path = tempfile.mkstemp(prefix=f"{kind}-", suffix=".part", dir=folder)
    with open(descriptor, "w") as file:
        json.dump(content, file)
    os.rename(path, f"{path[: -len('.part')]}.json")


# ------------------------------------------------------------------ processes that a test starts


def trace_this_process() -> None:
    """For `sitecustomize`: what this process passes belongs to the test that started it."""
    atexit.register(_tell_parent)
    _also_at_hard_exits(owner=0)
    _tracer.start()


def _tell_parent() -> None:
    folder = os.environ.get(FOLDER)
    if folder and os.path.isdir(folder):
        _write(folder, "child", _tracer.lines())


def _also_at_hard_exits(owner: int) -> None:
    """Forked processes end without atexit."""

    def exit_and_tell(code: int) -> None:
        if os.getpid() != owner:
            _tell_parent()
        _exit(code)

    os._exit = exit_and_tell  # type: ignore[assignment]


# ------------------------------------------------------------------ the plugin


class _Plugin:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._shared: dict[str, list[list[Any]]] = {}  # {file: lines that the fixtures of all its tests pass}
        self._shared_secs: dict[str, float] = defaultdict(float)
        self._children = tempfile.mkdtemp(prefix="children-", dir=folder)
        (Path(self._children) / "sitecustomize.py").write_text(_TRACED_AT_START)
        os.environ[FOLDER] = self._children
        os.environ["PYTHONPATH"] = f"{self._children}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        _also_at_hard_exits(owner=os.getpid())

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        """What a fixture of a whole file passes, all its tests depend on."""
        before, _tracer.seen = _tracer.seen, set()
        begin_secs = time.monotonic()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                file = str(request.node.nodeid).partition("::")[0]
                self._shared.setdefault(file, []).extend([*_tracer.lines(), *self._of_children()])
                self._shared_secs[file] += time.monotonic() - begin_secs
            _tracer.seen |= before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        _tracer.seen = set()
        _tracer.start()
        file = item.nodeid.partition("::")[0]
        begin_secs, before_secs = time.monotonic(), self._shared_secs[file]
        try:
            return (yield)
        finally:
            sys.settrace(None)
            shared_secs = self._shared_secs[file]
            took_secs = time.monotonic() - begin_secs - (shared_secs - before_secs)
            lines = [*_tracer.lines(), *self._of_children(), *self._shared.get(file, [])]
            seen = {"test": item.nodeid, "took_secs": took_secs, "shared_secs": shared_secs, "lines": lines}
            _write(self._folder, "test", seen)

    def _of_children(self) -> Iterator[list[Any]]:
        for path in Path(self._children).glob("*.json"):
            yield from json.loads(path.read_text())
            path.unlink()


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest where this module is a plugin."""
    folder = os.environ.get(FOLDER)
    is_controller = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if folder and not is_controller:
        config.pluginmanager.register(_Plugin(folder))


def read_passages(folder: Path) -> Passages:
    """What all processes wrote, the quickest test first."""
    found = []
    for path in folder.glob("test-*.json"):
        read = json.loads(path.read_text())
        lines = frozenset((module, number) for module, number in read["lines"])
        found.append(Passage(read["test"], read["took_secs"], read["shared_secs"], lines))
    return sorted(found, key=lambda passage: passage.alone_secs)


def through(passages: Passages, module: str, lines: Sequence[int], at_work: int) -> Passages:
    """The tests that pass through one of these lines; those that reach one of them first, then the quickest."""
    wanted = {(module, number) for number in lines}
    found = [passage for passage in passages if passage.lines & wanted]
    return sorted(found, key=lambda passage: (module, at_work) not in passage.lines)
