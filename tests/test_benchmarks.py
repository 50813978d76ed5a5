"""The benchmarks run and print their tables; what they measure is not asked here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.workers import Worker

TABLES = {  # {benchmark: what stands in its tables}
    "save": ["tiny: 3 leaves", "ours (A/A)", "orbax, tuned", "msgpack", "raw"],
    "restore": ["tiny: 3 leaves", "ours (A/A)", "orbax v1, tuned", "msgpack", "raw", "; what orbax, tuned wrote"],
    "blocking": ["; blocking", "; per leaf", "; stall"],
    "interference": ["; training", "; lost", "; python", "no save"],
    "hook": ["a call with nothing due", "a function"],
    "scale": ["index entries, ms", "lines, ms", "bytes an entry", "model: processes, leaves", "10,000, 1,000,000"],
    "growth": ["leaves, ms", "bytes, ms", "kept, ms", "again", "start-up", "exponent", "factor"],
    "processes": ["save by 2 processes", "restore by 4 processes", "ours (A/A)", "orbax, tuned"],
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # Orbax's own
def test_a_benchmark_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every benchmark prints its tables and the machine's facts, appends to the history, and leaves nothing behind."""
    scratch, history = tmp_path / "scratch", tmp_path / "history.jsonl"
    scratch.mkdir()
    arguments = ["--tiny", "--workloads", "tiny", "--directory", str(scratch), "--json", str(history)]

    importlib.import_module(f"benchmarks.{name}").main(arguments)

    printed = capsys.readouterr().out
    assert [part for part in ["cores", "python", "jax", *TABLES[name]] if part not in printed] == []
    run = json.loads(history.read_text())
    assert run["benchmark"] == name
    assert all(table["values"] for table in run["tables"])
    assert list(scratch.iterdir()) == []


def test_a_process_that_dies_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """One that knows no such library ends, and says so on standard error; who asks it is told whose it was."""
    with Worker("nobody") as worker, pytest.raises(RuntimeError, match="the process of nobody has died"):
        worker.restore_secs("nowhere", "tiny", 1.0)
    assert "StopIteration" in capfd.readouterr().err
