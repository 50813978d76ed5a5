"""Strikes and failures, counted by row and library, as a table and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from attacks.checks import CLASSES, Problem

__all__ = ["Report", "text_table"]

_PACKAGES = ("ckpt_hooks", "orbax-checkpoint", "jax", "numpy")
_ALL = "all"


@dataclasses.dataclass
class _Count:
    strikes: int = 0
    failed: int = 0
    classes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Report:
    """Collects what each strike led to.

    Args:
      attack: its name.
      strikes: what one strike is called in the tables.
      show: how many failures of each library are printed as they come.
      json_path: a file that gets one line at the end, or None.
    """

    def __init__(self, attack: str, strikes: str, *, show: int, json_path: str | None) -> None:
        self._attack, self._strikes, self._show, self._json_path = attack, strikes, show, json_path
        self._counts: dict[tuple[str, str], _Count] = collections.defaultdict(_Count)
        self._shown: collections.Counter[str] = collections.Counter()
        self._failures: list[dict[str, Any]] = []
        self._start_secs = time.monotonic()
        print(f"{attack}: {', '.join(f'{name} {value}' for name, value in _facts().items())}", flush=True)

    def add(self, library: str, row: str, what: str, problems: Sequence[Problem]) -> None:
        """One strike, and what is wrong after it."""
        count = self._counts[row, library]
        count.strikes += 1
        if not problems:
            return
        count.failed += 1
        count.classes.update({name for name, _ in problems})
        self._failures.append({"library": library, "row": row, "strike": what, "problems": [list(p) for p in problems]})
        self._shown[library] += 1
        if self._shown[library] <= self._show:
            print(f"\n{library}, {row}: {what}", flush=True)
            for name, text in problems:
                print(f"    {name}: {text}", flush=True)

    def table(self) -> str:
        """Rows by libraries: how many strikes, after how many of them something was wrong, and what."""
        libraries = list(dict.fromkeys(library for _, library in self._counts))
        rows = []
        for row in [*dict.fromkeys(row for row, _ in self._counts), _ALL]:
            cells = [row]
            for library in libraries:
                cells += _cells(self._count(row, library))
            rows.append(cells)
        head = [self._attack]
        for library in libraries:
            head += [f"{library}: {self._strikes}", "failures", "of which"]
        return text_table(head, rows)

    def _count(self, row: str, library: str) -> _Count:
        if row != _ALL:
            return self._counts.get((row, library), _Count())
        total = _Count()
        for (_, name), count in self._counts.items():
            if name == library:
                total.strikes += count.strikes
                total.failed += count.failed
                total.classes += count.classes
        return total

    def strikes_of(self, library: str) -> int:
        return self._count(_ALL, library).strikes

    def failures_of(self, library: str) -> int:
        return self._count(_ALL, library).failed

    def close(self) -> None:
        """Prints the table and what its words mean, and writes the JSON."""
        elapsed_secs = time.monotonic() - self._start_secs
        print(f"\n{self.table()}\n")
        seen = {name for count in self._counts.values() for name in count.classes}
        for name in CLASSES:
            if name in seen:
                print(f"{name}: {CLASSES[name]}")
        print(f"{elapsed_secs:.0f} s")
        if self._json_path:
            content = {
                "attack": self._attack,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "machine": _facts(),
                "seconds": round(elapsed_secs),
                "rows": [
                    {
                        "row": row,
                        "library": library,
                        "strikes": count.strikes,
                        "failed": count.failed,
                        "classes": dict(count.classes),
                    }
                    for (row, library), count in self._counts.items()
                ],
                "failures": self._failures,
            }
            with open(self._json_path, "a") as file:
                file.write(json.dumps(content) + "\n")
        sys.stdout.flush()


def _cells(count: _Count) -> list[str]:
    if not count.strikes:
        return ["-", "-", ""]
    classes = ", ".join(f"{number} {name}" for name, number in count.classes.most_common())
    return [f"{count.strikes:,}", f"{count.failed:,}", classes]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they have to be, words to the left and numbers to the right.

    >>> print(text_table(["kill", "ours: kills"], [["save", "1,500"], ["overwrite", "20"]]))
    kill       ours: kills
    save             1,500
    overwrite           20
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numeric = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in (head, *rows):
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").isdigit()


def _facts() -> dict[str, str]:
    facts = {"linux": platform.release(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "absent"
    return facts
