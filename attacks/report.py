"""Strikes and failures, counted by row and library, as a table and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from attacks.checks import CLASSES, Problem

__all__ = ["Report", "text_table"]

_PACKAGES = ("ckpt_hooks", "orbax-checkpoint", "jax", "numpy")


@dataclasses.dataclass
class _Row:
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
        self._rows: dict[tuple[str, str], _Row] = collections.defaultdict(_Row)
        self._shown: collections.Counter[str] = collections.Counter()
        self._failures: list[dict[str, Any]] = []
        self._start_secs = time.monotonic()
        print(f"{attack}: {', '.join(f'{name} {value}' for name, value in _facts().items())}", flush=True)

    def add(self, library: str, row_name: str, what: str, problems: Sequence[Problem]) -> None:
        """One strike, and what is wrong after it."""
        row = self._rows[row_name, library]
        row.strikes += 1
        if not problems:
            return
        row.failed += 1
        row.classes.update({name for name, _ in problems})
        self._failures.append(
            {"library": library, "row_name": row_name, "strike": what, "problems": [list(p) for p in problems]}
        )
        self._shown[library] += 1
        if self._shown[library] <= self._show:
            print(f"\n{library}, {row_name}: {what}", flush=True)
            for name, text in problems:
                print(f"    {name}: {text}", flush=True)

    def table(self) -> str:
        """Rows by libraries: how many strikes, after how many of them something was wrong, and what."""
        libraries = list(dict.fromkeys(library for _, library in self._rows))
        rows = []
        for row_name in [*dict.fromkeys(row_name for row_name, _ in self._rows), "all"]:
            cells = [row_name]
            for library in libraries:
                cells += _cells(self._row(row_name, library))
            rows.append(cells)
        head = [self._attack]
        for library in libraries:
            head += [f"{library}: {self._strikes}", "failures", "of which"]
        return text_table(head, rows)

    def _row(self, row_name: str, library: str) -> _Row:
        if row_name != "all":
            return self._rows.get((row_name, library), _Row())
        total = _Row()
        for (_, name), row in self._rows.items():
            if name == library:
                total.strikes += row.strikes
                total.failed += row.failed
                total.classes += row.classes
        return total

    def strikes_of(self, library: str) -> int:
        return self._row("all", library).strikes

    def failures_of(self, library: str) -> int:
        return self._row("all", library).failed

    def close(self) -> None:
        """Prints the table and what its words mean, and writes the JSON."""
        elapsed_secs = time.monotonic() - self._start_secs
        print(f"\n{self.table()}\n")
        seen = {name for row in self._rows.values() for name in row.classes}
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
                    {"row_name": row_name, "library": library, **dataclasses.asdict(row)}
                    for (row_name, library), row in self._rows.items()
                ],
                "failures": self._failures,
            }
            with open(self._json_path, "a") as file:
                file.write(json.dumps(content) + "\n")
        sys.stdout.flush()


def _cells(row: _Row) -> list[str]:
    if not row.strikes:
        return ["-", "-", ""]
    classes = ", ".join(f"{count} {name}" for name, count in row.classes.most_common())
    return [f"{row.strikes:,}", f"{row.failed:,}", classes]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they have to be, words to the left and numbers to the right.

    >>> print(text_table(["kill", "ours: kills"], [["save", "1,500"], ["overwrite", "20"]]))
    kill       ours: kills
    save             1,500
    overwrite           20
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numeric = [all(not cell[:1].isalpha() for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for cells in (head, *rows):
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _facts() -> dict[str, str]:
    facts = {
        "cores": str(len(os.sched_getaffinity(0))),
        "linux": platform.release(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "absent"
    return facts
