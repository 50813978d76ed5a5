"""Results as text, as JSON and as a picture, with the facts of the machine that they hold for."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.contestants import OURS
from benchmarks.options import Options
from benchmarks.timing import Series, Spread, ratios

__all__ = ["Report", "machine_facts", "text_table"]

_PACKAGES = ("jax", "numpy", "flax", "tensorstore", "orbax-checkpoint", "safetensors", "ckpt_hooks")


class Report:
    """Prints each table as soon as it is there; `close` writes the files that were asked for."""

    def __init__(self, benchmark: str, options: Options) -> None:
        self._options = options
        self._facts = machine_facts(options.directory)
        self._content: dict[str, Any] = {
            "benchmark": benchmark,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": self._facts,
            "rounds": options.rounds,
            "scale": options.scale,
            "tables": [],
        }
        print(f"{benchmark}: {', '.join(f'{name} {value}' for name, value in self._facts.items())}")

    def add(self, title: str, unit: str, series: Series) -> None:
        """A table of contestants: median, spread, and `OURS` divided by each, round by round."""
        self._content["tables"].append({"title": title, "unit": unit, "values": series})
        rows = []
        for name, values in series.items():
            spread, ratio = Spread.of(values), Spread.of(ratios(series, OURS, name))
            rows.append([name, *_cells(spread), *_cells(ratio)] if name != OURS else [name, *_cells(spread), "", ""])
        text = text_table([title, unit, "min .. max", f"{OURS} / it", "min .. max"], rows)
        print(f"\n{text}", flush=True)

    def add_growth(
        self, title: str, unit: str, sizes: Sequence[float], series: Series, *, linear_from: float = 0
    ) -> None:
        """A table of sizes, and of each column the power of the size with which it grows from `linear_from` on."""
        exponents = {name: [_exponent(sizes, values, linear_from)] for name, values in series.items()}
        self._content["tables"].append(
            {"title": title, "unit": unit, "sizes": list(sizes), "values": series, "exponents": exponents}
        )
        rows = [[f"{size:,.0f}", *(_number(values[n]) for values in series.values())] for n, size in enumerate(sizes)]
        rows.append(["exponent", *(f"{exponents[name][0]:.2f}" for name in series)])
        rows.append(["factor", *(_number(max(values) / min(values)) for values in series.values())])
        print(f"\n{text_table([f'{title}, {unit}', *series], rows)}", flush=True)

    def close(self) -> None:
        if self._options.json:
            with open(self._options.json, "a") as file:
                file.write(json.dumps(self._content) + "\n")
        if self._options.plot:
            _plot(self._options.plot, self._content)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they have to be, the first one to the left.

    >>> print(text_table(["save", "ms"], [["ours", "1.5"], ["theirs", "20"]]))
    save     ms
    ours    1.5
    theirs   20
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _exponent(sizes: Sequence[float], values: Sequence[float], linear_from: float) -> float:
    """That of the power that fits best, by least squares of the logarithms; of one size there is none.

    >>> round(_exponent([1, 10, 100], [5.0, 50.0, 500.0], 0), 3)
    1.0
    """
    points = [(size, value) for size, value in zip(sizes, values, strict=True) if size >= linear_from]
    if len(points) < 2:
        points = list(zip(sizes, values, strict=True))
    if len(points) < 2:
        return float("nan")
    x, y = np.log(points).T
    return float(np.polyfit(x, y, 1)[0])


def _cells(spread: Spread) -> tuple[str, str]:
    return _number(spread.median), f"{_number(spread.low)} .. {_number(spread.high)}"


def _number(value: float) -> str:
    """Three digits.

    >>> _number(1234.5), _number(12.34), _number(0.01234)
    ('1,234', '12.3', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine_facts(directory: str) -> dict[str, str]:
    """What the figures depend on, besides the code."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    facts = {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gib:.0f} GiB",
        "disk": _file_system(directory),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "absent"
    return facts


def _file_system(directory: str) -> str:
    """The kind of the file system that holds `directory`; "tmpfs" would not measure a disk."""
    path = os.path.realpath(directory)
    try:
        with open("/proc/mounts") as file:
            mounts = [row.split()[1:3] for row in file]
    except OSError:
        return "unknown"
    holding = [(place, kind) for place, kind in mounts if os.path.commonpath([place, path]) == place]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else "unknown"


# ------------------------------------------------------------------ the picture


def _plot(path: str, content: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not there")
        return
    tables = content["tables"]
    figure = Figure(figsize=(8, 2.6 * len(tables)), layout="constrained")
    for axes, table in zip(figure.subplots(len(tables), squeeze=False)[:, 0], tables, strict=True):
        axes.set_title(table["title"])
        if "sizes" in table:
            _plot_growth(axes, table)
        else:
            _plot_bars(axes, table)
    figure.savefig(path)


def _plot_bars(axes: Any, table: dict[str, Any]) -> None:
    names = list(table["values"])
    spreads = [Spread.of(values) for values in table["values"].values()]
    medians = [spread.median for spread in spreads]
    below_and_above = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.barh(names, medians, xerr=below_and_above)
    axes.invert_yaxis()
    axes.set_xlabel(table["unit"])
    if min(spread.low for spread in spreads) > 0:
        axes.set_xscale("log")


def _plot_growth(axes: Any, table: dict[str, Any]) -> None:
    for name, values in table["values"].items():
        axes.loglog(table["sizes"], values, marker="o", label=f"{name}: {table['exponents'][name][0]:.2f}")
    axes.set_ylabel(table["unit"])
    axes.legend()
